"""Files that an earlier version wrote are read, resumed and used.

fixtures/2026-11 holds a run of November 2026 after its first of three epochs (half) and at its end
(final), an adapter of its model likewise, and their data.
"""

import importlib
import lzma
import shutil

import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "2026-11"
PRE_TRAIN = (
    "--dataset=someone/notes",
    "--initial_checkpoint=initial.pt",
    "--samples_per_epoch=12",
    "--eval_interval=2",
    "--learning_rate=3e-3",
    "--dropout=0.1",
    "--num_epochs=3",
)
FINE_TUNE = ("--dataset=rows.jsonl", "--rank=2", "--learning_rate=1e-2", "--num_epochs=3")
SHARED = (
    "--batch_size=2",
    "--gradient_accumulation_steps=2",
    "--checkpoint_interval=1",
    "--device=cpu",
    "--precision=fp32",
    "--compile=False",
    "--seed=7",
    "--resume",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for packed in FOLDER.glob("*.xz"):
        (tmp_path / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))

    for name in ("someone--notes-train.bin", "someone--notes-test.bin", "someone--notes.json"):
        (tmp_path / "dataset").mkdir(exist_ok=True)
        shutil.copy(FOLDER / name, tmp_path / "dataset")

    shutil.copy(FOLDER / "rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)

    return tmp_path


def assert_close(left: dict, right: dict) -> None:
    """Compare weights; another processor may add up in another order."""
    assert left.keys() == right.keys()

    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, atol=1e-5, rtol=0)


def test_pre_training_is_resumed(pre_train, folder):
    flags = ("--checkpoint_path=checkpoint-half.pt", "--metrics_path=out.csv")
    assert pre_train.main([*PRE_TRAIN, *SHARED, *flags]) == 0

    found, expected = (
        torch.load(folder / f"checkpoint-{name}.pt", weights_only=True)
        for name in ("half", "final")
    )
    assert found["position"] == expected["position"] == 9
    assert_close(expected["model"], found["model"])


def test_fine_tuning_is_resumed(fine_tune, folder):
    base = "--base_model_path=checkpoint-final.pt"
    flags = ("--checkpoint_path=lora-half.pt", "--metrics_path=out.csv")
    assert fine_tune.main([*FINE_TUNE, *SHARED, base, *flags]) == 0

    found, expected = (
        torch.load(folder / f"lora-{name}.pt", weights_only=True) for name in ("half", "final")
    )
    assert found["position"] == expected["position"] > 9
    assert_close(expected["lora"], found["lora"])


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        ("", "the cat a the a the a the a the a the a the was dog was in was was the dog\n"),
        ("lora-final.pt", f" dog dog in dog was{' dog was' * 5} dog a the the the\n"),
    ],
)
def test_text_is_generated(folder, capsys, lora, text):
    generate = importlib.import_module("generate")
    files = ("--checkpoint_path=checkpoint-final.pt", f"--lora_path={lora}")
    choice = ("--prompt=the cat", "--max_tokens=20", "--temperature=0", "--seed=1")

    assert generate.main([*files, *choice, "--device=cpu", "--precision=fp32"]) == 0
    assert capsys.readouterr().out == text
