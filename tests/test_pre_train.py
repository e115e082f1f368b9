"""Whole runs of pre-train.py: what a user does, and what happens to them."""

import csv
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SAVE_AT_ONCE, assert_same_run, finish, launch, write_documents
from faults import KILL_AT, SIGNAL_AT, read
from token_folders import contents

from system.devices import resolve_device
from text.sources import TextFiles
from training import run, trainer
from training.checkpoint import best_path, previous_path, save_checkpoint


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folders(tmp_path):
    """Two folders for the outputs of two runs."""
    for name in ("left", "right"):
        (tmp_path / name).mkdir()

    return tmp_path / "left", tmp_path / "right"


def test_run_learns_records_and_concludes(pre_train, small, tmp_path, capsys):
    assert pre_train.main(small("--num_epochs=8", "--learning_rate=3e-4")) == 0

    output, errors = capsys.readouterr()
    state = read(tmp_path / "checkpoint.pt")
    table = rows(tmp_path)

    # Where standard error is no terminal, no bar is drawn.
    assert "batch/s" not in errors
    assert "step/s" not in errors
    assert state["position"] == 24
    assert state["encoding"] == "r50k_base"
    assert [row["epoch"] for row in table] == [str(n) for n in range(1, 9)]
    assert [row["step"] for row in table] == [str(3 * n) for n in range(1, 9)]
    assert table[-1]["tokens"] == str(24 * 4 * 16)
    assert [bool(row["test_loss"]) for row in table] == [False, True] * 4
    assert float(table[-1]["test_loss"]) < 6 < float(table[0]["train_loss"])
    assert float(table[-1]["perplexity"]) < 400
    assert 0 < float(table[-1]["mfu"]) < 1
    assert float(table[3]["learning_rate"]) > float(table[6]["learning_rate"]) > 0

    assert "epoch 8/8, train loss" in output
    assert "Test loss" in output.splitlines()[-4]
    assert output.splitlines()[-2].startswith("Next:   python generate.py --checkpoint_path=")
    assert output.splitlines()[-1].endswith("--resume --num_epochs=16")
    assert best_path(tmp_path / "checkpoint.pt").exists()
    assert previous_path(tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(("optimizer", "are_waves"), [("muon", True), ("adamw", False)])
def test_first_weights_go_with_the_recipe(pre_train, small, tmp_path, optimizer, are_waves):
    """A cosine and a sine lie on a circle; random numbers do not."""
    pre_train.main(small("--num_epochs=1", "--learning_rate=1e-9", f"--optimizer={optimizer}"))
    positions = read(tmp_path / "checkpoint.pt")["model"]["position_embeddings.weight"]
    radii = positions[:, :2].norm(dim=1)

    assert (radii.std() < 1e-4 * radii.mean()) == are_waves


def test_steps_go_by_the_width_and_the_length_of_the_run(pre_train, small, monkeypatch):
    step_factors = Mock(wraps=pre_train.step_factors)
    monkeypatch.setattr(pre_train, "step_factors", step_factors)
    pre_train.main(small())

    step_factors.assert_called_once_with(16, 9)


def test_checkpoint_holds_tensors_strings_and_numbers(pre_train, small, tmp_path):
    pre_train.main(small("--num_epochs=1"))
    state = read(tmp_path / "checkpoint.pt")

    def check(value):
        if isinstance(value, dict):
            [check(item) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple):
            [check(item) for item in value]
        else:
            assert value is None or isinstance(value, torch.Tensor | str | int | float), value

    check(state)
    assert state["model_args"]["vocabulary_size"] == 50257
    assert "blocks.1.mlp.output.weight" in state["model"]


@pytest.mark.parametrize("seed", ["0", "5"])
def test_same_seed_gives_the_same_run(pre_train, small, folders, seed):
    left, right = folders

    for folder in folders:
        pre_train.main(small(f"--seed={seed}", "--dropout=0.1", out=folder))

    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")
    assert read(left / "checkpoint.pt")["seed"] == int(seed)


def test_other_seed_gives_another_run(pre_train, small, folders):
    for seed, folder in enumerate(folders):
        pre_train.main(small(f"--seed={seed}", "--num_epochs=1", out=folder))

    left, right = (read(folder / "checkpoint.pt")["model"] for folder in folders)
    assert not torch.equal(left["norm.weight"], right["norm.weight"])


def test_seed_is_drawn_printed_and_kept(pre_train, small, tmp_path, capsys):
    argv = [arg for arg in small("--num_epochs=1") if not arg.startswith("--seed")]
    pre_train.main(argv)
    seed = read(tmp_path / "checkpoint.pt")["seed"]

    assert f"--seed={seed}" in capsys.readouterr().out

    pre_train.main([*argv, "--num_epochs=2", "--resume"])
    assert read(tmp_path / "checkpoint.pt")["seed"] == seed


def test_what_comes_next_is_told_of_a_resumed_run_too(pre_train, small, capsys, monkeypatch):
    pre_train.main(small("--num_epochs=1"))
    argv = small("--num_epochs=2", "--resume")
    monkeypatch.chdir(ROOT)
    pre_train.main(argv)
    command = capsys.readouterr().out.splitlines()[-1].strip()

    assert command == shlex.join(["python", "pre-train.py", *argv, "--num_epochs=4"])


def test_what_comes_next_works_from_another_folder(pre_train, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pre_train.main(small("--num_epochs=1"))
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:]]

    assert lines[0][1:3] == ["python", str(ROOT / "generate.py")]
    assert lines[1][:2] == ["python", str(ROOT / "pre-train.py")]


@pytest.fixture
def two_threads():
    """Let the sums of a run be those of two threads, here and where this environment is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield {"OMP_NUM_THREADS": "2"}
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=fp32", "--dropout=0.1"],
        ["--precision=bf16", "--dropout=0.1"],
        ["--precision=fp32", "--dropout=0.1", "--compile=True"],
        ["--precision=fp16", "--optimizer=adamw", "--lr_schedule=constant"],
    ],
    ids=["fp32", "bf16", "compiled", "fp16"],
)
def test_killed_twice_and_resumed_it_ends_as_if_nothing_had_happened(
    pre_train, small, folders, flags, two_threads
):
    """Killed in the middle of an epoch, then at the boundary of one."""
    undisturbed, killed = folders
    pre_train.main(small(*flags, out=undisturbed))
    argv = small(*flags, out=killed)

    for extra, step in (([], 4), (["--resume"], 6)):
        status, _, errors = finish(launch([*argv, *extra], KILL_AT.format(step), two_threads))
        assert status == -signal.SIGKILL, errors

    assert read(killed / "checkpoint.pt")["position"] == 6
    assert pre_train.main([*argv, "--resume"]) == 0

    assert_same_run(undisturbed / "checkpoint.pt", killed / "checkpoint.pt")
    assert [row["epoch"] for row in rows(killed)] == ["1", "2", "3"]
    assert [row["train_loss"] for row in rows(killed)] == [
        row["train_loss"] for row in rows(undisturbed)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_leaves_and_loses_no_update(pre_train, small, folders, number):
    """The interval of checkpoints alone would have lost four updates."""
    undisturbed, stopped = folders
    flags = ["--dropout=0.1", "--checkpoint_interval=3"]
    pre_train.main(small(*flags, out=undisturbed))
    argv = small(*flags, out=stopped)
    patch = SIGNAL_AT.format(4, [int(number)])
    status, output, _ = finish(launch(argv, patch))

    assert status == 128 + number
    assert "Stopped after update 4" in output
    assert read(stopped / "checkpoint.pt")["position"] == 4

    assert pre_train.main([*argv, "--resume"]) == 0
    assert_same_run(undisturbed / "checkpoint.pt", stopped / "checkpoint.pt")


def test_signal_from_outside(small, tmp_path):
    process = launch(small("--num_epochs=100000", "--checkpoint_interval=100000"))

    while not process.stdout.readline().startswith("epoch 2/"):
        assert process.poll() is None

    process.send_signal(signal.SIGTERM)
    status, output, _ = finish(process, timeout=30)

    assert status == 143
    assert f"Stopped after update {read(tmp_path / 'checkpoint.pt')['position']};" in output


def test_closed_terminal_ends_no_run_under_nohup(small, tmp_path):
    patch = "signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SIGNAL_AT.format(4, [1])
    status, output, errors = finish(launch(small(), patch))

    assert status == 0, errors
    assert "Stopped" not in output
    assert read(tmp_path / "checkpoint.pt")["position"] == 9


def test_second_signal_leaves_at_once(small, tmp_path):
    patch = SAVE_AT_ONCE + SIGNAL_AT.format(4, [int(signal.SIGTERM), int(signal.SIGINT)])
    status, output, _ = finish(launch(small(), patch))

    assert status == 130
    assert "Stopped" not in output
    assert read(tmp_path / "checkpoint.pt")["position"] == 3


@pytest.mark.parametrize(
    ("place", "position"),
    [
        ("trainer.Trainer.evaluate", 6),
        ("trainer.Trainer.fix_bucket_order", 0),
        ("trainer.Trainer.state_dict", 3),
        ("trainer.Trainer.finish_epoch", 3),
    ],
    ids=["testing", "first", "saving", "closing"],
)
def test_signal_during_anything_loses_nothing(pre_train, small, folders, place, position):
    undisturbed, stopped = folders
    pre_train.main(small(out=undisturbed))
    patch = f"""
real = {place}
def signalled(*args):
    if not os.path.exists({str(stopped / "signalled")!r}):
        open({str(stopped / "signalled")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)
{place} = signalled
"""
    status, output, _ = finish(launch(small(out=stopped), patch))

    assert status == 143
    assert read(stopped / "checkpoint.pt")["position"] == position
    # However long a test takes, it is not waited for.
    assert ("epoch 2/3" in output) == (position > 6)

    pre_train.main(small("--resume", out=stopped))
    assert_same_run(undisturbed / "checkpoint.pt", stopped / "checkpoint.pt")
    assert len(rows(stopped)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_preparation(pre_train, small, tmp_path, number):
    """As from a terminal: to the workers, too."""
    patch = f"""
from text import preparation
os.setpgrp()
preparation.MIN_SIZE_PER_PROCESS, preparation.UNIT_SIZE = 1, 1 << 12
add = preparation.Journal.add
def signalled(self, result):
    add(self, result)
    if len(self.units) == 2:
        os.killpg(0, {int(number)})
preparation.Journal.add = signalled
"""
    argv = small("--num_epochs=1", f"--dataset_path={tmp_path / 'dataset'}")
    status, output, errors = finish(launch(argv, patch))

    assert status == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert "error: " not in errors
    assert (tmp_path / "dataset").is_dir()

    assert pre_train.main(argv) == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_loss_that_is_not_finite_stops_the_run(
    pre_train, small, tmp_path, monkeypatch, error_of, value
):
    real = trainer.Trainer.accumulate_gradient

    def accumulate_gradient(self, step):
        loss, num_tokens = real(self, step)
        return (loss * float(value) if self.step == 4 else loss), num_tokens

    monkeypatch.setattr(trainer.Trainer, "accumulate_gradient", accumulate_gradient)
    status, line = error_of(small())

    assert status == 1
    assert f"Loss {value} and gradient norm" in line
    assert "in epoch 2, step 4" in line
    assert read(tmp_path / "checkpoint.pt")["position"] == 4

    monkeypatch.undo()
    assert pre_train.main(small("--resume")) == 0


def test_weights_that_are_not_finite_are_never_saved(
    pre_train, small, tmp_path, monkeypatch, error_of
):
    pre_train.main(small("--num_epochs=1"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    real = trainer.Trainer.take_step

    def take_step(self, step):
        result = real(self, step)
        self.model.norm.weight.data[0] = float("inf")
        return result

    monkeypatch.setattr(trainer.Trainer, "take_step", take_step)
    status, line = error_of(small("--resume", "--num_epochs=2"))

    assert status == 1
    assert "A weight is not a finite number after update 4" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_gradient_that_is_not_finite_stops_the_run(small, monkeypatch, error_of):
    real = trainer.Trainer.accumulate_gradient

    def accumulate_gradient(self, step):
        loss, num_tokens = real(self, step)
        self.model.norm.weight.grad[0] = float("nan")
        return loss, num_tokens

    monkeypatch.setattr(trainer.Trainer, "accumulate_gradient", accumulate_gradient)
    status, line = error_of(small())

    assert status == 1
    assert "gradient norm nan in epoch 1, step 0" in line


def test_evaluation_and_saving_do_not_touch_the_run(pre_train, small, folders):
    left, right = folders
    pre_train.main(small("--dropout=0.1", out=left))
    pre_train.main(
        small("--dropout=0.1", "--eval_interval=1", "--checkpoint_interval=3", out=right)
    )
    left, right = (read(folder / "checkpoint.pt")["model"] for folder in (left, right))

    assert all(torch.equal(left[name], right[name]) for name in left)


def test_epoch_of_no_whole_number_of_updates(pre_train, small, folders):
    left, right = folders
    pre_train.main(small(out=left))
    pre_train.main(small("--samples_per_epoch=15", out=right))

    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_accumulation_and_batch_size_are_one_product(pre_train, small, folders):
    """The same samples in larger batches: the same loss up to rounding."""
    left, right = folders
    pre_train.main(small("--dropout=0", out=left))
    pre_train.main(
        small("--dropout=0", "--batch_size=4", "--gradient_accumulation_steps=1", out=right)
    )

    for row, other in zip(rows(left), rows(right), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)


def test_activation_checkpointing_gives_the_same_run(pre_train, small, folders):
    left, right = folders
    pre_train.main(small("--dropout=0.1", out=left))
    pre_train.main(small("--dropout=0.1", "--activation_checkpointing", out=right))

    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_nothing_to_do(pre_train, small, tmp_path, capsys):
    pre_train.main(small())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()

    assert pre_train.main(small("--resume")) == 0
    assert "Nothing to do: all 3 epochs are done" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resumed_run_can_go_on_for_longer_with_another_rate(pre_train, small, tmp_path, capsys):
    pre_train.main(small())
    assert pre_train.main(small("--resume", "--num_epochs=4", "--learning_rate=0.001")) == 0

    output = capsys.readouterr().out
    assert "Changed: learning_rate 0.0005 (saved) and 0.001 (given)" in output
    assert "Changed: num_epochs 3 (saved) and 4 (given)" in output
    assert read(tmp_path / "checkpoint.pt")["position"] == 12


def test_changed_flags_take_effect_on_resume(pre_train, small, tmp_path):
    pre_train.main(small("--num_epochs=1"))
    flags = ["--resume", "--num_epochs=2", "--weight_decay=0.7", "--precision=fp16"]
    pre_train.main(small(*flags))
    state = read(tmp_path / "checkpoint.pt")
    groups = [group for each in state["optimizer"] for group in each["param_groups"]]

    assert [group["weight_decay"] for group in groups] == [0.7, 0.7, 0.0, 0.0, 0.0]
    assert state["precision"] == "fp16"
    assert state["scaler"]["scale"] > 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--embedding_dimensions=32", r"embedding_dimensions 16 (saved) and 32 (given)"),
        ("--block_size=8", r"block_size 16 (saved) and 8 (given)"),
        ("--batch_size=1", r"batch_size 2 (saved) and 1 (given)"),
        ("--seed=8", r"seed 7 (saved) and 8 (given)"),
        ("--optimizer=adamw", r"optimizer muon (saved) and adamw (given)"),
    ],
)
def test_resuming_another_run_is_refused(pre_train, small, tmp_path, error_of, flag, message):
    pre_train.main(small("--num_epochs=1"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    status, line = error_of(small("--resume", flag))

    assert status == 1
    assert message in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resuming_with_another_tokenizer_is_refused(pre_train, small, tmp_path, error_of):
    pre_train.main(small("--num_epochs=1"))
    state = read(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, "encoding": "cl100k_base"})
    status, line = error_of(small("--resume"))

    assert status == 1
    assert "its vocabulary is cl100k_base, r50k_base or one of this project is needed" in line


def test_resuming_on_changed_data_is_refused(pre_train, small, tmp_path, error_of):
    """Also when its token files are not there any more."""
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 60)
    argv = small(f"--dataset_path={tmp_path / 'dataset'}", dataset=tmp_path / "text")
    pre_train.main([*argv, "--num_epochs=1"])
    (tmp_path / "text" / "000.txt").write_text("something else")
    shutil.rmtree(tmp_path / "dataset")
    status, line = error_of([*argv, "--resume"])

    assert status == 1
    assert "The data changed since the checkpoint was saved" in line


def test_changed_text_is_refused_before_token_files_are_replaced(
    pre_train, small, tmp_path, error_of
):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 80)
    flags = [f"--dataset_path={tmp_path / 'dataset'}", "--num_epochs=1"]
    argv = small(*flags, dataset=tmp_path / "text")
    assert pre_train.main(argv) == 0

    before = contents(tmp_path / "dataset")
    (tmp_path / "text" / "000.txt").write_text("another beginning")
    status, line = error_of([*argv, "--resume", "--num_epochs=2"])

    assert status == 1
    assert "The data changed since the checkpoint was saved" in line
    assert contents(tmp_path / "dataset") == before


IN_A_FOLDER = """
import os
os.chdir({folder!r})
os.dup2(os.open("log.txt", os.O_APPEND | os.O_CREAT | os.O_WRONLY), 1)
"""
KILLED_WHEN_PREPARED = """
import signal
import text.preparation as preparation
preparation.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("dataset_path", [".", "./dataset"])
def test_what_a_run_writes_beside_its_text_is_none_of_it(small, tmp_path, dataset_path):
    """Checkpoints, metrics, token files, parts and a log, of a killed run and a resumed one."""
    folder = tmp_path / "notes"
    folder.mkdir()
    write_documents(folder, 80)
    argv = small(f"--dataset_path={dataset_path}", out=Path(), dataset=Path())
    name = TextFiles(folder).name
    patch = IN_A_FOLDER.format(folder=str(folder))
    status, _, errors = finish(launch(argv, patch + KILLED_WHEN_PREPARED))
    assert status == -signal.SIGKILL, errors

    for flags in (["--num_epochs=1"], ["--resume"]):
        status, _, errors = finish(launch([*argv, *flags], patch))
        assert status == 0, errors

    log = (folder / "log.txt").read_text()
    sidecar = json.loads((folder / dataset_path / f"{name}.json").read_text())
    assert "going on with" in log
    assert "changed" not in log
    assert "not text" not in log
    assert sidecar["train"]["documents"] + sidecar["test"]["documents"] == 80


def test_moved_text_is_resumed_and_its_columns_with_it(pre_train, small, tmp_path):
    """Also where its token files were made anew, under another name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_documents(tmp_path / name, 80)

    def argv(first: Path, *extra: str) -> list[str]:
        return [
            *small(f"--dataset_path={tmp_path / 'dataset'}", *extra, dataset=first),
            f"--dataset={tmp_path / 'b'}",
        ]

    assert pre_train.main(argv(tmp_path / "a", "--num_epochs=1")) == 0
    (tmp_path / "a").rename(tmp_path / "c")
    shutil.rmtree(tmp_path / "dataset")
    assert pre_train.main(argv(tmp_path / "c", "--num_epochs=2", "--resume")) == 0

    name = TextFiles(tmp_path / "c").name
    assert [bool(row[f"test_loss_{name}"]) for row in rows(tmp_path)] == [True, True]


@pytest.mark.parametrize("content", [None, "empty", "truncated", "weights", "adapter", "folder"])
def test_resuming_from_what_is_no_checkpoint(pre_train, small, tmp_path, error_of, content):
    path = tmp_path / "checkpoint.pt"

    if content == "folder":
        path.mkdir()
    elif content is not None:
        pre_train.main(small("--num_epochs=1"))
        whole, state = path.read_bytes(), read(path)
        if content == "weights":
            save_checkpoint(path, {"format_version": 1, "model": state["model"]})
        elif content == "adapter":
            save_checkpoint(path, {"format_version": 1, "lora_args": {"rank": 8}})
        else:
            path.write_bytes(b"" if content == "empty" else whole[: len(whole) // 2])

    status, line = error_of(small("--resume"))

    assert status == 1
    assert "checkpoint.pt" in line
    assert {
        None: "There is no checkpoint at",
        "folder": "Is a directory",
        "empty": "is damaged",
        "truncated": "is damaged",
        "weights": "it has no model_args, optimizer",
        "adapter": "it has no model_args, model, optimizer",
    }[content] in line


def test_new_run_keeps_the_checkpoint_of_an_earlier_one(pre_train, small, tmp_path, capsys):
    pre_train.main(small("--num_epochs=1"))
    first = (tmp_path / "checkpoint.pt").read_bytes()
    pre_train.main(small("--num_epochs=1"))
    kept = [path for path in tmp_path.glob("checkpoint.2*.pt") if path.read_bytes() == first]

    assert len(kept) == 1
    assert str(kept[0]) in capsys.readouterr().out
    assert len(list(tmp_path.glob("checkpoint.best.2*.pt"))) == 1
    assert len(list(tmp_path.glob("metrics.2*.csv"))) == 1
    assert len(list(tmp_path.glob("metrics.2*.svg"))) == 1


@pytest.mark.parametrize(
    ("flag", "other"), [("--checkpoint_path", "metrics.csv"), ("--metrics_path", "checkpoint.pt")]
)
def test_a_second_run_on_the_same_files_is_refused(
    pre_train, small, folders, monkeypatch, error_of, flag, other
):
    """It is started while the first one is evaluating, which ends as if it were alone."""
    left, right = folders
    argv = small(out=left)
    name = "checkpoint.pt" if flag == "--checkpoint_path" else "metrics.csv"
    answers = []

    def evaluate(self, *args):
        if not answers:
            answers.append(None)
            answers[0] = error_of([*small(out=right), f"{flag}={left / name}"])

        return real(self, *args)

    assert pre_train.main(small(out=left)) == 0
    (left / "checkpoint.pt").rename(left / "alone.pt")
    real = trainer.Trainer.evaluate
    monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)

    assert pre_train.main(argv) == 0

    ((status, line),) = answers
    assert status == 1
    assert f"{left / name} is being written by process {os.getpid()} on " in line
    assert flag in line
    assert not (right / other).exists()
    assert_same_run(left / "alone.pt", left / "checkpoint.pt")
    assert not [*left.glob("*.lock"), *right.glob("*.lock")]


def test_the_files_of_a_run_that_was_killed_are_free(pre_train, small, tmp_path):
    process = launch(small(), KILL_AT.format(2))
    status, *_ = finish(process)

    assert status == -signal.SIGKILL
    assert json.loads((tmp_path / "checkpoint.pt.lock").read_text())["process"] == process.pid
    assert pre_train.main(small()) == 0
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_that_was_taken_for_dead_leaves_the_files_alone(
    small, tmp_path, monkeypatch, error_of
):
    """As after an hour of sleep, in which another machine has taken them over."""
    lock = tmp_path / "checkpoint.pt.lock"
    theirs = json.dumps({"host": "another machine", "process": 1, "token": "theirs"})

    def evaluate(self, *args):
        lock.write_text(theirs)

        return real(self, *args)

    real = trainer.Trainer.evaluate
    monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)
    status, line = error_of(small("--checkpoint_interval=2"))

    assert status == 1
    assert "now belongs to another run" in line
    assert not (tmp_path / "checkpoint.pt").exists()
    assert lock.read_text() == theirs


def test_a_dry_run_needs_no_files_of_its_own(pre_train, small, tmp_path, monkeypatch):
    statuses = []

    def evaluate(self, *args):
        monkeypatch.undo()
        statuses.append(pre_train.main(small("--dry_run")))

        return self.evaluate(*args)

    monkeypatch.setattr(trainer.Trainer, "evaluate", evaluate)

    assert pre_train.main(small()) == 0
    assert statuses == [0]


def test_signal_during_a_dry_run(small, tmp_path):
    patch = SIGNAL_AT.format(0, [int(signal.SIGINT)])
    status, _, errors = finish(launch(small("--dry_run"), patch))

    assert status == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_lone_text_file(pre_train, small, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n} of a book. " * 20 for n in range(300)))

    assert pre_train.main(small("--num_epochs=1", dataset=path)) == 0


def test_dataset_folder_that_cannot_be_written(small, tmp_path, error_of):
    (tmp_path / "file").write_text("")
    status, line = error_of(small(f"--dataset_path={tmp_path / 'file' / 'dataset'}"))

    assert status == 1
    assert "file/dataset cannot be written: Not a directory. Choose another --dataset_path" in line


@pytest.mark.parametrize("flag", ["--checkpoint_path", "--metrics_path"])
def test_output_that_cannot_be_written_is_told_before_any_work(tmp_path, error_of, small, flag):
    (tmp_path / "file").write_text("")
    status, line = error_of(small(f"{flag}={tmp_path / 'file' / 'output'}", "--dataset=a/b"))

    assert status == 1
    assert "file/output cannot be written" in line


def test_picture_is_drawn_at_every_evaluation_and_at_the_end(
    pre_train, small, tmp_path, monkeypatch
):
    picture, pictures = tmp_path / "metrics.svg", []

    def updates(self, epoch):
        # There is none before the first test.
        pictures.append(picture.read_text() if picture.exists() else None)
        return real(self, epoch)

    real = run.Run.updates
    monkeypatch.setattr(run.Run, "updates", updates)
    pre_train.main(small("--num_epochs=5"))
    pictures.append(picture.read_text())

    # Tests are due after epochs 2 and 4, and after the last one.
    changes = [left != right for left, right in zip(pictures, pictures[1:], strict=False)]
    assert changes == [False, True, False, True, True]
    assert "5 epochs, 960 tokens" in pictures[-1]


def test_picture_of_a_run_that_was_stopped_has_all_its_epochs(
    pre_train, small, tmp_path, monkeypatch
):
    def take_step(self, *args):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

        return real(self, *args)

    real = trainer.Trainer.take_step
    monkeypatch.setattr(trainer.Trainer, "take_step", take_step)

    assert pre_train.main(small("--eval_interval=9")) == 143
    assert "1 epoch, 192 tokens" in (tmp_path / "metrics.svg").read_text()


def test_picture_that_cannot_be_drawn_ends_no_run(pre_train, small, tmp_path, capsys):
    (tmp_path / "metrics.svg").mkdir()

    assert pre_train.main(small()) == 0
    assert capsys.readouterr().err.count("metrics.svg was not drawn: Is a directory") == 1
    assert len(rows(tmp_path)) == 3


def test_outputs_are_made_in_folders_that_are_missing(pre_train, small, tmp_path):
    out = tmp_path / "a" / "b"
    pre_train.main(small("--num_epochs=1", out=out))

    assert {"checkpoint.pt", "metrics.csv"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("num_documents", [1, 2])
def test_too_little_text(tmp_path, small, error_of, num_documents):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", num_documents, num_words=3)
    status, line = error_of(small(dataset=tmp_path / "text"))

    assert status == 1
    assert "documents" in line or "tokens" in line


def test_block_that_is_longer_than_the_data(small, error_of):
    status, line = error_of(small("--block_size=100000"))

    assert status == 1
    assert "one sample takes 100,001; lower --block_size" in line


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def cut_in_half_a_token(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_the_end_with_zeros(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


def swell(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(2))


def put_in_other_ids(path: Path) -> None:
    """Change a token to one beyond the vocabulary, with a checksum that is right."""
    content = b"\xff\xff" + path.read_bytes()[2:]
    path.write_bytes(content)
    sidecar = Path(str(path).replace("-train.bin", ".json"))
    values = json.loads(sidecar.read_text())
    values["train"]["sha256"] = hashlib.sha256(content).hexdigest()
    sidecar.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "bytes where"),
        (cut_in_half_a_token, "bytes where"),
        (empty, "0 bytes where"),
        (fill_the_end_with_zeros, "is damaged"),
        (swell, "bytes where"),
        (put_in_other_ids, "holds token id 65535"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_token_file_ends_the_run_before_its_first_step(
    pre_train, small, tmp_path, error_of, damage, message
):
    flags = [f"--dataset_path={tmp_path / 'dataset'}"]
    pre_train.main(small(*flags, "--num_epochs=1"))
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    path = next((tmp_path / "dataset").glob("*-train.bin"))
    damage(path)
    status, line = error_of(small(*flags))

    assert status == 1
    assert path.name in line
    assert message in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_sources_are_mixed_by_weight_and_tested_apart(pre_train, small, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    write_documents(tmp_path / "notes", 30, num_words=100)
    argv = small("--num_epochs=2")
    argv[0:1] = ["--dataset", argv[0].removeprefix("--dataset="), f"{tmp_path / 'notes'}=0.25"]

    assert pre_train.main(argv) == 0

    checkpoint = read(tmp_path / "checkpoint.pt")
    names = [name for name, _, _ in checkpoint["dataset"]]
    output = capsys.readouterr().out

    assert [weight for _, weight, _ in checkpoint["dataset"]] == [0.75, 0.25]
    assert "75.00% of the samples" in output
    assert "25.00% of the samples" in output

    with open(tmp_path / "metrics.csv", newline="") as file:
        first, last = csv.DictReader(file)

    losses = [float(last[f"test_loss_{name}"]) for name in names]

    assert first["test_loss"] == first[f"test_loss_{names[0]}"] == ""
    assert float(last["test_loss"]) == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    assert losses[0] != losses[1]
    assert (
        f"test loss {float(last['test_loss']):.3f} ({names[0]} {losses[0]:.3f},"
        f" {names[1]} {losses[1]:.3f})"
    ) in output


def test_machine_without_a_compiler_trains(small, tmp_path):
    env = {
        "CXX": "/nonexistent/c++",
        "CC": "/nonexistent/cc",
        "PATH": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    status, output, errors = finish(launch(small("--compile=True", "--num_epochs=1"), env=env))

    assert status == 0, errors
    assert "not compiled (" in output
    assert "epoch 1/1" in output


def test_gpu_is_taken_when_there_is_one_and_demanded_when_asked_for(small, error_of):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    status, line = error_of([*small(), "--device=cuda"])

    assert status == 1
    assert "--device=cpu" in line


def test_device_is_chosen_when_none_is_given(pre_train, small, capsys):
    argv = [arg for arg in small("--num_epochs=1") if not arg.startswith("--device")]

    assert pre_train.main(argv) == 0
    assert f"Device: {resolve_device(None)}," in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("can't allocate memory: 9 GB")],
    ids=["cuda", "cpu"],
)
@pytest.mark.parametrize("place", ["accumulate_gradient", "evaluate"])
def test_out_of_memory_is_one_line(small, tmp_path, monkeypatch, error_of, place, error):
    """Memory becomes short in the second epoch."""
    real = getattr(trainer.Trainer, place)

    def refuse(self, *args):
        if self.step >= 4:
            raise error

        return real(self, *args)

    monkeypatch.setattr(trainer.Trainer, place, refuse)
    status, line = error_of(small())

    assert status == 1
    assert line == (
        "error: cpu is out of memory for the model and a batch of 2; halve --batch_size and double"
        " --gradient_accumulation_steps, or add --activation_checkpointing, or take a smaller"
        " model, or a device with more memory."
    )
    position = 4 if place == "accumulate_gradient" else 6
    assert read(tmp_path / "checkpoint.pt")["position"] == position


@pytest.mark.parametrize(
    ("place", "flag", "message"),
    [
        ("build_trainer", "--seed=1", "2; halve --batch_size"),
        ("Trainer.test", "--batch_size=1", "1; add --activation_checkpointing, or take a smaller"),
        ("report_losses", "--eval_only", "2; halve --batch_size"),
        ("Trainer.evaluate", "--eval_only", "2; halve --batch_size"),
    ],
)
def test_what_was_too_large_for_the_memory_is_told(
    pre_train, small, monkeypatch, error_of, place, flag, message
):
    if flag == "--eval_only":
        pre_train.main(small("--num_epochs=1"))

    def refuse(*args):
        raise MemoryError

    owner, _, name = place.rpartition(".")
    monkeypatch.setattr(pre_train.Trainer if owner else pre_train, name, refuse)
    status, line = error_of(small(flag))

    assert status == 1
    assert f"cpu is out of memory for the model and a batch of {message}" in line


def test_batches_may_be_cut_otherwise_on_resume(pre_train, small, folders):
    """As where memory ran out: the samples of an update stay the same."""
    left, right = folders
    flags = ("--dropout=0", "--lr_schedule=constant")
    pre_train.main(small(*flags, out=left))
    pre_train.main(small(*flags, "--num_epochs=1", out=right))
    shape = ("--batch_size=1", "--gradient_accumulation_steps=4")
    pre_train.main(small(*flags, *shape, "--resume", out=right))

    for key, value in read(left / "checkpoint.pt")["model"].items():
        other = read(right / "checkpoint.pt")["model"][key]
        torch.testing.assert_close(other, value, atol=5e-5, rtol=0)


def test_tensorboard_gets_the_scalars_where_it_is_installed(
    pre_train, small, tmp_path, monkeypatch
):
    """A module in place of the optional package."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((str(folder), purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch))

        def flush(self):
            pass

    module = type(os)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    pre_train.main(small("--num_epochs=2"))

    assert written[0] == (str(tmp_path / "runs" / "metrics"), 1)
    assert {("train_loss", 1), ("train_loss", 2), ("test_loss", 2), ("mfu", 1)} <= set(written)
    assert ("test_loss", 1) not in written


def test_tiny_preset_is_offline_and_small(pre_train):
    args = pre_train.build_parser().parse(["--preset=tiny", "--dropout=0.3"], pre_train.PRESETS)

    assert args.dataset == ["stdlib"]
    assert args.dropout == 0.3
    assert args.embedding_dimensions == pre_train.PRESETS["tiny"]["embedding_dimensions"]
    assert args.given == {"preset", "dropout"}


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing=True", "--dropout=0.1"]])
def test_nothing_is_compiled_after_the_first_update(pre_train, small, monkeypatch, flags):
    """Neither testing, nor a last batch of fewer windows, nor the epochs that follow."""
    graphs = []

    def count(move):
        def counted(*args):
            result = move(*args)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

            return result

        return counted

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(trainer.Trainer, "take_step", count(trainer.Trainer.take_step))
    monkeypatch.setattr(trainer.Trainer, "evaluate", count(trainer.Trainer.evaluate))
    pre_train.main(small("--compile=True", "--eval_interval=1", "--batch_size=3", *flags))

    assert len(graphs) == 3 * 2 + 3
    # The probe of the compiler, a block and the loss.
    assert {number - before for number in graphs} == {3}
