"""`--eval_only` against a loop over windows, PyTorch's own loss, and tiktoken's own bytes."""

import csv
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_documents
from vocabularies import GPT2_TOKENIZER

from model import GPT
from training.checkpoint import load_model, save_checkpoint

LINE = re.compile(
    r"Loss:   (\S+), ([0-9.]+) nats a token, perplexity ([0-9.,]+), ([0-9.]+) bits a byte;"
    r" ([0-9,]+) tokens, ([0-9,]+) bytes"
)


def numbers_of(output: str) -> dict[str, list[float]]:
    return {
        name: [float(value.replace(",", "")) for value in values]
        for name, *values in LINE.findall(output)
    }


def measure(model: GPT, files: list, size: int) -> list[float]:
    """Return loss, perplexity, bits a byte, tokens and bytes, window by window."""
    nats, num_tokens, num_bytes = 0.0, 0, 0

    for file in files:
        tokens = np.fromfile(file, dtype="<u2").astype(np.int64)

        for start in range(0, len(tokens) - size, size):
            window = torch.from_numpy(tokens[start : start + size + 1])
            targets = window[1:]
            nats += F.cross_entropy(model(window[None, :-1])[0], targets, reduction="sum").item()
            num_tokens += size
            text = [token for token in targets.tolist() if token != 50256]
            num_bytes += len(GPT2_TOKENIZER.tiktoken.decode_bytes(text))

    loss = nats / num_tokens

    return [loss, math.exp(loss), nats / num_bytes / math.log(2), num_tokens, num_bytes]


@pytest.fixture
def trained(pre_train, small, tmp_path, capsys):
    """A small model with weights that predict something, and the command line of its run."""
    assert pre_train.main(small()) == 0
    capsys.readouterr()

    return load_model(tmp_path / "checkpoint.pt").eval()


# Sizes and recipe that were not given are those of the checkpoint, or do not matter.
def look(small, *extra: str) -> list[str]:
    kept = ("--dataset", "--checkpoint_path", "--metrics_path", "--device", "--precision")

    return [*(arg for arg in small() if arg.startswith(kept)), "--eval_only", *extra]


@torch.no_grad()
@pytest.mark.parametrize("split", ["test", "all"])
def test_loss_perplexity_and_bits_a_byte(trained, pre_train, small, dataset_path, capsys, split):
    assert pre_train.main(look(small, f"--eval_split={split}")) == 0

    ((name, found),) = numbers_of(capsys.readouterr().out).items()
    splits = ["test"] if split == "test" else ["test", "train"]
    files = [dataset_path / f"{name}-{each}.bin" for each in splits]
    assert found == pytest.approx(measure(trained, files, 16), rel=5e-4)


@pytest.mark.parametrize("flags", [[], ["--batch_size=200"]], ids=["default", "large"])
def test_it_is_the_loss_that_training_gives(trained, pre_train, small, tmp_path, capsys, flags):
    """Also in batches that are too large for an epoch of the defaults."""
    assert pre_train.main(look(small, *flags)) == 0
    ((loss, *_),) = numbers_of(capsys.readouterr().out).values()

    with open(tmp_path / "metrics.csv") as file:
        assert loss == pytest.approx(float([*csv.DictReader(file)][-1]["test_loss"]), abs=1e-4)


@torch.no_grad()
def test_each_source_and_shorter_windows(trained, pre_train, small, dataset_path, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_documents(other, 40, num_words=90)
    argv = look(small, "--dataset", str(other), "--block_size=8", "--batch_size=3")
    assert pre_train.main(argv) == 0

    found = numbers_of(capsys.readouterr().out)
    assert len(found) == 2

    for name, values in found.items():
        expected = measure(trained, [dataset_path / f"{name}-test.bin"], 8)
        assert values == pytest.approx(expected, rel=5e-4)


def test_all_of_a_short_text_is_one_short_window(trained, pre_train, small, tmp_path, capsys):
    """It needs neither two documents nor a whole window."""
    (tmp_path / "a.txt").write_text("the cat runs")
    argv = look(small, "--eval_split=all", f"--dataset={tmp_path / 'a.txt'}")

    assert pre_train.main(argv) == 0
    assert "; 3 tokens, 9 bytes" in capsys.readouterr().out


def test_it_writes_nothing(trained, pre_train, small, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    assert pre_train.main(look(small)) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--embedding_dimensions=32"], 2, "--embedding_dimensions: 32 given, "),
        (["--block_size=17"], 2, "--block_size: 17 given, "),
        (["--resume"], 2, "--eval_only and --resume: give one of them"),
        (["--dry_run"], 2, "--eval_only and --dry_run: give one of them"),
        (["--initial_checkpoint=x.pt"], 2, "--initial_checkpoint: --eval_only reads "),
        (["--eval_only=False", "--eval_split=all"], 2, "--eval_split needs --eval_only"),
        (["--checkpoint_path=missing.pt"], 1, "There is no checkpoint at missing.pt"),
    ],
)
def test_what_does_not_fit_is_one_line(trained, small, error_of, flags, status, message):
    found, line = error_of(look(small, *flags))

    assert found == status
    assert message in line


def test_checkpoint_without_an_optimizer_is_enough(pre_train, small, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {
        "vocabulary_size": 50257,
        "block_size": 16,
        "embedding_dimensions": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "bias": True,
    }
    state = {
        "format_version": 1,
        "encoding": "r50k_base",
        "model_args": sizes,
        "model": GPT(**sizes).state_dict(),
    }
    save_checkpoint(tmp_path / "checkpoint.pt", state)

    assert pre_train.main(look(small)) == 0
    ((loss, *_),) = numbers_of(capsys.readouterr().out).values()
    assert loss == pytest.approx(math.log(50257), abs=0.1)


@pytest.mark.parametrize("args", [{}, {"block_size": 16}, {"vocabulary_size": 5}])
def test_model_that_is_none(small, tmp_path, error_of, args):
    state = {"format_version": 1, "encoding": "r50k_base", "model_args": args, "model": {}}
    save_checkpoint(tmp_path / "checkpoint.pt", state)

    status, line = error_of(look(small))
    assert status == 1
    assert "does not describe a valid model" in line


def test_loss_beyond_all_perplexities(trained, pre_train, small, tmp_path, capsys):
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["model"]["norm.weight"] *= 1e6
    save_checkpoint(tmp_path / "checkpoint.pt", state)

    assert pre_train.main(look(small)) == 0
    ((loss, perplexity, *_),) = numbers_of(capsys.readouterr().out).values()
    assert loss > 700
    assert perplexity > 1e300


def test_all_of_a_source_whose_test_split_is_too_short(
    trained, pre_train, small, dataset_path, tmp_path, capsys, error_of
):
    short = tmp_path / "short"
    short.mkdir()

    for number in range(12):
        (short / f"{number}.txt").write_text("a cat")

    argv = look(small, f"--dataset={short}")
    argv.remove(next(arg for arg in argv if arg.startswith("--dataset=")))
    assert pre_train.main([*argv, "--eval_split=all"]) == 0
    assert numbers_of(capsys.readouterr().out)

    status, line = error_of(argv)
    assert status == 1
    assert "short-" in line
