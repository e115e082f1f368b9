"""Text, small command lines and ways to run them, for all tests."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Tests side by side have a core each. Several with as many threads as cores wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A shell that starts tests in the background lets them ignore it, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of the instructions to fine-tune on.
NUM_ROWS = 45

WORDS = ("the", "a", "cat", "dog", "runs", "eats", "sees", "in", "house", "garden", "it", "was")


def write_documents(folder: Path, num_documents: int, num_words: int = 60) -> None:
    generator = random.Random(0)

    for number in range(num_documents):
        text = " ".join(generator.choices(WORDS, k=num_words))
        (folder / f"{number:03d}.txt").write_text(text)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """A block that earlier tests had compiled for many shapes would run uncompiled."""
    torch.compiler.reset()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, 80)

    return folder


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """One folder of token files for all runs: the text is prepared once."""
    return tmp_path_factory.mktemp("dataset")


@pytest.fixture
def small(text_folder, dataset_path, tmp_path):
    """Return a function that builds the command line of a run of seconds: 3 epochs of 3 updates."""

    def build(*extra: str, out: Path = tmp_path, dataset: Path = text_folder) -> list[str]:
        return [
            f"--dataset={dataset}",
            f"--dataset_path={dataset_path}",
            f"--checkpoint_path={out / 'checkpoint.pt'}",
            f"--metrics_path={out / 'metrics.csv'}",
            "--block_size=16",
            "--embedding_dimensions=16",
            "--num_attention_heads=2",
            "--num_hidden_layers=2",
            "--batch_size=2",
            "--gradient_accumulation_steps=2",
            "--samples_per_epoch=12",
            "--num_epochs=3",
            "--eval_interval=2",
            "--checkpoint_interval=1",
            "--device=cpu",
            "--precision=fp32",
            "--compile=False",
            "--seed=7",
            *extra,
        ]

    return build


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    """A checkpoint as pre-training writes it, with nothing but what fine-tuning reads."""
    from model import GPT
    from training.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("base") / "checkpoint.pt"
    sizes = {
        "vocabulary_size": 50257,
        "block_size": 64,
        "embedding_dimensions": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "bias": False,
    }
    torch.manual_seed(0)
    state = {
        "format_version": 1,
        "encoding": "r50k_base",
        "model_args": sizes,
        "model": GPT(**sizes).state_dict(),
    }
    save_checkpoint(path, state)

    return path


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {
            "instruction": f"Count to {n}.",
            "input": "",
            "output": " ".join(map(str, range(n % 9 + 1))),
        }
        for n in range(NUM_ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))

    return path


@pytest.fixture(scope="session")
def pre_train():
    return importlib.import_module("pre-train")


@pytest.fixture(scope="session")
def fine_tune():
    return importlib.import_module("fine-tune")


@pytest.fixture
def error_of(pre_train, capsys):
    """Return a function that runs a command line which fails, and checks how it tells it.

    Gives the exit status and the only line on standard error.
    """

    def run(argv: list[str], script=pre_train) -> tuple[int, str]:
        try:
            status = script.main(argv)
        except SystemExit as exit_:
            status = exit_.code

        # Progress bars are wiped from a line before anything else is written on it.
        lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "error" in line]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")

        return status, lines[0]

    return run


@pytest.fixture
def convert(capsys, tmp_path, monkeypatch):
    """Return a function that converts in a folder of its own; gives what is printed."""
    script = importlib.import_module("convert")
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> str:
        status = script.main(list(map(str, argv)))
        output, errors = capsys.readouterr()
        assert status == 0, errors
        # No library adds anything of its own.
        assert all(line.startswith("Note:") for line in errors.splitlines()), errors

        return output

    return run


@pytest.fixture
def refused(error_of, tmp_path, monkeypatch):
    """Return a function that converts what is to be refused, and checks that nothing is written."""
    script = importlib.import_module("convert")
    monkeypatch.chdir(tmp_path)

    def run(*argv, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        found, line = error_of(list(map(str, argv)), script)
        # A folder for the results may stay, empty.
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] in (
            [],
            [tmp_path / "out"],
        )
        assert found == status, line
        assert line.endswith(".") or status == 2 or "pip install" in line

        return line

    return run


@pytest.fixture(scope="session")
def theirs():
    """Transformers' GPT-2; no test may change it."""
    from conversions import new_gpt2

    return new_gpt2()


@pytest.fixture(scope="session")
def gpt2_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)

    return folder


@pytest.fixture
def source(gpt2_folder, tmp_path):
    """A copy of transformers' model, to be changed."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "source"))


# What a process that is about to be killed has saved is written then.
SAVE_AT_ONCE = "\ncheckpoint.available_memory = lambda: 0\n"

PROLOGUE = f"""
import importlib, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data
from training import checkpoint, trainer
"""


def launch(
    argv: list[str], patch: str = "", env: dict | None = None, script: str = "pre-train"
) -> subprocess.Popen:
    """Start a script in a process of its own, after Python statements that inject a fault."""
    code = (
        f"{PROLOGUE}\nscript = importlib.import_module({script!r})\n{patch}\n"
        f"if __name__ == '__main__': sys.exit(script.main({argv!r}))"
    )

    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Wait for a process; return its status, standard output and standard error."""
    output, errors = process.communicate(timeout=timeout)

    return process.returncode, output, errors


def assert_same_run(left: Path, right: Path) -> None:
    """Compare two checkpoints in all that decides how a run goes on, bit for bit."""
    left, right = (torch.load(path, weights_only=True) for path in (left, right))

    for key in ("position", "tokens", "seed", "model_args", "lora_args", "scaler", "precision"):
        assert left.get(key) == right.get(key), key

    assert_same(left.get("model"), right.get("model"))
    assert_same(left.get("lora"), right.get("lora"))
    assert_same(left["optimizer"], right["optimizer"])

    for row, other in zip(left["metrics"], right["metrics"], strict=True):
        for key in row.keys() - {"tokens_per_second", "mfu", "seconds"}:
            assert row[key] == other[key], key


def assert_same(left, right) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right
