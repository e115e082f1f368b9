"""Preparing text for training, beside nanoGPT's data/openwebtext/prepare.py on the same file.

    python benchmarks/preparation.py TEXT.parquet --nanogpt=PATH --num_processes=2

Prints tokens a second of whole commands, start-up and all, run in turns; beside them those of
tiktoken's encode_ordinary_batch alone, with the text in memory, and of gigatoken's encode_files
alone, on all cores, which leaves all tokens in memory. Of ours also the peak memory of the largest
process, the most that the disk held, as a multiple of the finished files, and how many seconds of
one process each stage takes.
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
import json, resource, threading
from pathlib import Path
from text import preparation, sources, tokenizer

folder = Path({folder!r}) / "dataset"

def watch(stop, sizes):
    while not stop.wait(0.02):
        try:
            sizes.append(sum(path.stat().st_size for path in folder.rglob("*")))
        except FileNotFoundError:
            pass

if __name__ == "__main__":
    stop, sizes = threading.Event(), [0]
    thread = threading.Thread(target=watch, args=(stop, sizes))
    thread.start()
    source, _ = sources.parse_source({text!r})
    gpt2 = tokenizer.gpt2_tokenizer()
    dataset = preparation.load_or_prepare(source, folder, gpt2, {num_processes})
    stop.set()
    thread.join()
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    size = sum(path.stat().st_size for path in folder.glob("*"))
    print(json.dumps(dict(
        tokens=len(dataset.train) + len(dataset.test),
        peak_memory_mb=round(max(usage.ru_maxrss for usage in usages) / 1024),
        peak_disk_ratio=round(max(sizes) / size, 3),
    )))
"""

STAGES = """
import sys
sys.path.insert(0, {root!r})
import collections, json, time
from pathlib import Path
from text import parts, preparation, readers, sources, tokenizer

seconds = collections.Counter()

def timed(owner, name, stage):
    real = getattr(owner, name)

    def call(*args, **options):
        start = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            seconds[stage] += time.perf_counter() - start

    setattr(owner, name, call)

def read(self, damage, real=readers.Reader.chunk):
    found = real(self, damage)
    while True:
        start = time.perf_counter()
        documents = next(found, None)
        seconds["reading"] += time.perf_counter() - start
        if documents is None:
            return
        yield documents

readers.Reader.chunk = read
timed(tokenizer.Tokenizer, "encode_documents", "tokenizing")
timed(parts.PartWriter, "check_sample", "tiktoken on a sample")
timed(parts, "write_whole", "writing parts")
timed(parts.JoinedFiles, "add_new_parts", "joining, with checksums")
timed(parts.JoinedFiles, "force", "of that, forcing onto the disk")
start = time.perf_counter()
source, _ = sources.parse_source({text!r})
folder = Path({folder!r}) / "dataset"
preparation.load_or_prepare(source, folder, tokenizer.gpt2_tokenizer(), 1)
seconds["all, without start-up"] = time.perf_counter() - start
print(json.dumps(dict(tokens=0, stages={{k: round(v, 2) for k, v in seconds.items()}})))
"""

GIGATOKEN = """
import sys
sys.path.insert(0, {root!r})
import json
import gigatoken
from text import tokenizer

fast = tokenizer.gpt2_tokenizer().gigatoken
tokens = fast.encode_files(gigatoken.ParquetFileSource([{text!r}]), parallel=True)
print(json.dumps(dict(tokens=len(tokens.layout.content) + len(tokens))))
"""

# What nanoGPT's script would download is given to it: the text, and the ranks of the encoding.
NANOGPT = """
import sys
sys.path.insert(0, {root!r})
import json, runpy
from pathlib import Path
import datasets, tiktoken
from text import tokenizer

load_dataset = datasets.load_dataset
datasets.load_dataset = lambda *_, **__: load_dataset("parquet", data_files={text!r})
known = tokenizer.gpt2_tokenizer()
encoding = tiktoken.Encoding(
    "gpt2",
    pat_str=tokenizer.PIECES,
    mergeable_ranks=known.tokens,
    special_tokens={{"<|endoftext|>": known.end_of_text}},
)
tiktoken.registry.ENCODINGS["gpt2"] = encoding
tiktoken.get_encoding = lambda _: encoding
script = Path({folder!r}) / "prepare.py"
source = (Path({nanogpt!r}) / "data" / "openwebtext" / "prepare.py").read_text()
source = source.replace("num_proc = 8", "num_proc = {num_processes}")
# Of a small text it tests on fewer documents than the batches that it writes.
script.write_text(source.replace("total_batches = 1024", "total_batches = min(1024, len(dset))"))
runpy.run_path(str(script), run_name="__main__")
print(json.dumps(dict(tokens=sum(p.stat().st_size // 2 for p in script.parent.glob("*.bin")))))
"""

BATCH = """
import sys
sys.path.insert(0, {root!r})
import json, time
import pyarrow.parquet
from text import tokenizer

texts = pyarrow.parquet.read_table({text!r}, columns=["text"]).column(0).to_pylist()
encoding = tokenizer.gpt2_tokenizer().tiktoken
start = time.perf_counter()
tokens = encoding.encode_ordinary_batch(texts, num_threads={num_processes})
seconds = time.perf_counter() - start
print(json.dumps(dict(tokens=sum(map(len, tokens)), seconds=seconds)))
"""


def run(code: str, **values) -> dict:
    """Run code in a new process and folder; return what it prints, and tokens_per_second."""
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

    measured = json.loads(result.stdout.splitlines()[-1])
    rate = measured["tokens"] / measured.get("seconds", seconds)

    return {**measured, "tokens_per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--is_long", action="store_true", help="leave tiktoken out")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    codes = {"ours": OURS, "gigatoken": GIGATOKEN}
    codes.update({} if args.is_long else {"encode_ordinary_batch": BATCH})
    codes.update({"nanoGPT": NANOGPT} if args.nanogpt else {})
    runs: dict[str, list[dict]] = {name: [] for name in codes}

    for _ in range(args.repeats):
        for name, code in codes.items():
            runs[name].append(run(code, **vars(args)))

    rates = {
        name: statistics.median(run["tokens_per_second"] for run in some)
        for name, some in runs.items()
    }
    result = {
        "tokens": runs["ours"][0]["tokens"],
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "ours_is_faster_by": {name: round(rates["ours"] / rate, 2) for name, rate in rates.items()},
        "minutes_for_openwebtext_on_8_cores": round(
            9.0e9 / (rates["ours"] / args.num_processes * 8) / 60, 1
        ),
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs["ours"]),
        "peak_disk_ratio": max(run["peak_disk_ratio"] for run in runs["ours"]),
        "seconds_of_one_process": run(STAGES, **vars(args))["stages"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
