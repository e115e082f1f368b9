"""Whole runs of pre-train.py: what a user does, and what happens to them."""

import csv
import hashlib
import json
import os
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAVE_AT_ONCE, assert_same_run, finish, launch, write_documents

import model
import session
import training
from checkpoint import best_path, previous_path, save_checkpoint

KILL_AT = f"""{SAVE_AT_ONCE}
real = training.Trainer.take_step
def take_step(self, step, stop):
    if self.step == {{}}: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step, stop)
training.Trainer.take_step = take_step
"""

SIGNAL_AT = """
real = training.Trainer.accumulate_gradient
def accumulate_gradient(self, step, stop):
    if self.step == {}:
        for number in {}: os.kill(os.getpid(), number)
    return real(self, step, stop)
training.Trainer.accumulate_gradient = accumulate_gradient
"""


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


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
    assert pre_train.main(small("--num_epochs=8", "--learning_rate=1e-4")) == 0

    output = capsys.readouterr().out
    state = read(tmp_path / "checkpoint.pt")
    table = rows(tmp_path)

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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


def test_second_signal_leaves_at_once(small, tmp_path):
    patch = SIGNAL_AT.format(4, [int(signal.SIGTERM), int(signal.SIGINT)])
    status, output, _ = finish(launch(small(), patch))

    assert status == 130
    assert "Stopped" not in output
    assert read(tmp_path / "checkpoint.pt")["position"] == 3


@pytest.mark.parametrize(
    ("place", "position"),
    [
        ("training.Trainer.evaluate", 6),
        ("training.Trainer.rehearse", 0),
        ("training.Trainer.state_dict", 3),
        ("training.Trainer.finish_epoch", 3),
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
import preparation
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
    real = training.Trainer.accumulate_gradient

    def accumulate_gradient(self, step, stop):
        loss, num_tokens = real(self, step, stop)
        return (loss * float(value) if self.step == 4 else loss), num_tokens

    monkeypatch.setattr(training.Trainer, "accumulate_gradient", accumulate_gradient)
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
    real = training.Trainer.take_step

    def take_step(self, step, stop):
        result = real(self, step, stop)
        self.model.norm.weight.data[0] = float("inf")
        return result

    monkeypatch.setattr(training.Trainer, "take_step", take_step)
    status, line = error_of(small("--resume", "--num_epochs=2"))

    assert status == 1
    assert "A weight is not a finite number after update 4" in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_gradient_that_is_not_finite_stops_the_run(small, monkeypatch, error_of):
    real = training.Trainer.accumulate_gradient

    def accumulate_gradient(self, step, stop):
        loss, num_tokens = real(self, step, stop)
        self.model.norm.weight.grad[0] = float("nan")
        return loss, num_tokens

    monkeypatch.setattr(training.Trainer, "accumulate_gradient", accumulate_gradient)
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


def test_epoch_of_no_whole_number_of_updates(pre_train, small, folders, capsys):
    left, right = folders
    pre_train.main(small(out=left))
    pre_train.main(small("--samples_per_epoch=15", out=right))

    assert "an epoch holds whole updates alone" in capsys.readouterr().out
    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_accumulation_and_batch_size_are_one_product(pre_train, small, folders):
    """The same samples in larger batches: the same loss up to rounding."""
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
    monkeypatch.setitem(training.sys.modules, "torch.utils.tensorboard", module)
    pre_train.main(small("--num_epochs=2"))

    assert written[0] == (str(tmp_path / "runs" / "metrics"), 1)
    assert {("train_loss", 1), ("train_loss", 2), ("test_loss", 2), ("mfu", 1)} <= set(written)
    assert ("test_loss", 1) not in written


def test_tiny_preset_is_offline_and_small(pre_train):
    args, given = pre_train.build_parser().parse(
        ["--preset=tiny", "--dropout=0.3"], pre_train.PRESETS
    )

    assert args.dataset == ["stdlib"]
    assert args.dropout == 0.3
    assert args.embedding_dimensions == pre_train.PRESETS["tiny"]["embedding_dimensions"]
    assert given == {"preset", "dropout"}
    assert json.dumps(vars(args))


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
    monkeypatch.setattr(training.Trainer, "take_step", count(training.Trainer.take_step))
    monkeypatch.setattr(training.Trainer, "evaluate", count(training.Trainer.evaluate))
    pre_train.main(small("--compile=True", "--eval_interval=1", "--batch_size=3", *flags))

    assert len(graphs) == 3 * 2 + 3
    # The probe of the compiler, a block and the loss.
    assert {number - before for number in graphs} == {3}
