"""How a script ends."""

import re

import pytest
import torch
from conftest import assert_same_run, finish, launch
from faults import SIGNAL_AT, read

from training import checkpoint, trainer


def test_checkpoint_that_cannot_be_written_is_a_note_beside_what_ended_the_run(
    small, error_of, monkeypatch
):
    """Whatever has failed: not all that PyTorch raises is an error of the disk."""

    def save_checkpoint(*args):
        raise RuntimeError("no archive")

    fail_at(monkeypatch, 4, OSError(5, "Input/output error"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)

    assert error_of(small()) == (1, "error: [Errno 5] Input/output error")


def fail_at(monkeypatch, step: int, error: Exception) -> None:
    """Let an update fail before it changes anything."""

    def take_step(self, *args):
        if self.step == step:
            raise error

        return real(self, *args)

    real = trainer.Trainer.take_step
    monkeypatch.setattr(trainer.Trainer, "take_step", take_step)


@pytest.mark.parametrize("error", [ZeroDivisionError("why"), torch.OutOfMemoryError("why")])
def test_error_that_nobody_expected_loses_no_update(
    pre_train, small, tmp_path, monkeypatch, capsys, error
):
    """The interval of checkpoints alone would have lost four updates."""
    left, right = tmp_path / "left", tmp_path / "right"
    pre_train.main(small("--checkpoint_interval=9", out=left))
    fail_at(monkeypatch, 4, error)
    argv = small("--checkpoint_interval=9", "--eval_interval=9", out=right)
    if isinstance(error, ZeroDivisionError):
        # Python tells it in full.
        with pytest.raises(ZeroDivisionError, match="why"):
            pre_train.main(argv)
    else:
        assert pre_train.main(argv) == 1

    assert "Saved after update 4 as " in capsys.readouterr().out
    assert read(right / "checkpoint.pt")["position"] == 4

    monkeypatch.undo()
    assert pre_train.main(small("--checkpoint_interval=9", "--resume", out=right)) == 0
    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_half_an_update_is_not_saved(pre_train, small, tmp_path, monkeypatch):
    def step(self, *args):
        if args[-1] == 4:
            raise ZeroDivisionError

        return real(self, *args)

    real = pre_train.Optimizers.step
    monkeypatch.setattr(pre_train.Optimizers, "step", step)
    with pytest.raises(ZeroDivisionError):
        pre_train.main(small())

    assert read(tmp_path / "checkpoint.pt")["position"] == 3


@pytest.mark.parametrize(("patch", "expected"), [("", 0), (SIGNAL_AT.format(4, [2]), 130)])
def test_reader_of_the_output_that_leaves_ends_no_run(small, tmp_path, patch, expected):
    """As head does, and tee at the Ctrl-C that is for both."""
    process = launch(small(), patch)
    process.stdout.readline()
    process.stdout.close()
    status, _, errors = finish(process)

    assert status == expected, errors
    assert re.findall("^(?:Note|error|Traceback).*", errors, re.MULTILINE) == [
        "Note:   no more on standard output: Broken pipe"
    ]
    assert read(tmp_path / "checkpoint.pt")["position"] == (4 if patch else 9)
