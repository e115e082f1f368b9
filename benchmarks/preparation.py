"""Preparing text for training, beside nanoGPT's data/openwebtext/prepare.py on the same file.

    python benchmarks/preparation.py TEXT.parquet --nanogpt=PATH --num_processes=2

Prints tokens a second of whole commands, start-up and all, alternately run; of both `prepare`s and
of tiktoken's encode_ordinary_batch alone, with the text already in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OURS = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import preparation

if __name__ == "__main__":
    source, _ = preparation.parse_source({text!r})
    dataset = preparation.load_or_prepare(source, Path({folder!r}), {num_processes})
    print(len(dataset.train) + len(dataset.test))
"""

# What nanoGPT's script would download is given to it: the text, and the ranks of the encoding.
NANOGPT = """
import sys
sys.path.insert(0, {root!r})
import runpy
from pathlib import Path
import datasets, tiktoken
import tokenizer

load_dataset = datasets.load_dataset
datasets.load_dataset = lambda *_, **__: load_dataset("parquet", data_files={text!r})
known = tokenizer.load_encoding()
encoding = tiktoken.Encoding(
    "gpt2",
    pat_str=known._pat_str,
    mergeable_ranks=known._mergeable_ranks,
    special_tokens=known._special_tokens,
)
tiktoken.registry.ENCODINGS["gpt2"] = encoding
tiktoken.get_encoding = lambda _: encoding
script = Path({folder!r}) / "prepare.py"
source = (Path({nanogpt!r}) / "data" / "openwebtext" / "prepare.py").read_text()
source = source.replace("num_proc = 8", "num_proc = {num_processes}")
# Of a small text it tests on fewer documents than the batches that it writes.
script.write_text(source.replace("total_batches = 1024", "total_batches = min(1024, len(dset))"))
runpy.run_path(str(script), run_name="__main__")
print(sum(path.stat().st_size // 2 for path in script.parent.glob("*.bin")))
"""

BATCH = """
import sys
sys.path.insert(0, {root!r})
import time
import pyarrow.parquet
import tokenizer

texts = pyarrow.parquet.read_table({text!r}, columns=["text"]).column(0).to_pylist()
encoding = tokenizer.load_encoding()
start = time.perf_counter()
tokens = encoding.encode_ordinary_batch(texts, num_threads={num_processes})
seconds = time.perf_counter() - start
print(sum(map(len, tokens)), seconds)
"""


def run(code: str, **values) -> float:
    """Run code in a new process and folder; return tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(code.format(root=str(ROOT), folder=folder, **values))
        env = {**os.environ, "HF_HOME": folder, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, script], env=env, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start

    if result.returncode:
        sys.exit(result.stderr)

    tokens, *measured = result.stdout.split("\n")[-2].split()

    return int(tokens) / float(measured[0] if measured else seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    codes = {"ours": OURS, "encode_ordinary_batch": BATCH}
    codes.update({"nanoGPT": NANOGPT} if args.nanogpt else {})
    rates: dict[str, list[float]] = {name: [] for name in codes}

    for _ in range(args.repeats):
        for name, code in codes.items():
            rates[name].append(run(code, **vars(args)))

    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "tokens_per_second": {name: round(median) for name, median in medians.items()},
        "ratios": {name: round(medians["ours"] / median, 2) for name, median in medians.items()},
        "openwebtext_minutes_on_8_cores": round(
            9.0e9 / (medians["ours"] / args.num_processes * 8) / 60, 1
        ),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
