"""Several processes against one: the same samples, weights and files; and what happens to them."""

import importlib
import os
import re
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SAVE_AT_ONCE, assert_same_run

from processes import Group, assert_close_runs, finished
from system.distributed import ProcessError, World
from training.run import load_micro_batches


@pytest.fixture
def run(small, tmp_path):
    """Return a function that runs pre-training on some processes, and gives their checkpoint.

    20 updates of 4 micro-batches.
    """

    def start(size: int, *extra: str, name: str = "", patch: str = "", env=None) -> Group:
        out = tmp_path / (name or f"{size}")
        flags = ("--gradient_accumulation_steps=4", "--samples_per_epoch=40", "--num_epochs=4")

        return Group(small(*flags, *extra, out=out), size, out, patch=patch, env=env)

    return start


# --- Who does what ---


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_items", [0, 1, 4, 7, 8])
def test_items_are_shared_out_in_turns(size, num_items):
    parts = [list(World(rank, size).shard(range(num_items))) for rank in range(size)]

    assert len({len(part) for part in parts}) == 1
    # Read in turns they are all there, in order, each once.
    turns = [part[turn] for turn in range(len(parts[0])) for part in parts]
    assert [item for item, is_own in turns if is_own] == list(range(num_items))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_fills_up_has_no_targets(size):
    data = SimpleNamespace(
        batch_numbers=lambda update: range(5, 9),
        batch=lambda number: (torch.full((2, 3), number), torch.full((2, 3), number)),
    )
    steps = [load_micro_batches(data, 0, World(rank, size)) for rank in range(size)]

    assert len({len(step) for step in steps}) == 1
    trained = [number for step in steps for number, _, y in step if (y >= 0).all()]
    assert sorted(trained) == [5, 6, 7, 8]
    assert all((y < 0).all() for step in steps for n, _, y in step if n not in trained)


# Where processes meet; without it there is one.
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        {"WORLD_SIZE": ""},
    ],
)
def test_malformed_environment_is_refused(monkeypatch, small, error_of, environment):
    for name, value in {**environment, **MEETING}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ProcessError):
        World.from_environment()

    status, line = error_of(small())
    assert status == 1
    assert "is not a valid rank layout; start the processes with torchrun" in line


def test_place_is_read_from_the_environment(monkeypatch):
    assert World.from_environment() == World()

    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert World.from_environment() == World()

    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)

    assert World.from_environment() == World(5, 8, 1, 4)


def test_rank_without_a_place_to_meet_is_a_run_of_its_own(
    pre_train, small, monkeypatch, tmp_path, capsys, error_of
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert pre_train.main(small("--num_epochs=1")) == 0
    assert "Next: " in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").exists()
    assert error_of(["--batch_size=0"])[0] == 2


def test_generate_looks_at_no_rank(monkeypatch, error_of):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)

    assert error_of(["--top_k=0"], importlib.import_module("generate"))[0] == 2


# --- The same run on any number ---

# For so narrow a model the recipe takes 320 of them a step. Larger steps round more coarsely, above
# all those of tokens that never occur, whose gradients add up to nothing over the waves.
GENTLE = "--learning_rate=5e-6"

# SIGTERM to the last process alone, inside an epoch.
STOP = """
take_step = trainer.Trainer.take_step
def stopping(self, *args):
    if self.step == 12 and rank + 1 == int(os.environ["WORLD_SIZE"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return take_step(self, *args)
trainer.Trainer.take_step = stopping
"""


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--optimizer=muon", GENTLE], (2, 3, 4)),
        (["--optimizer=adamw", "--dropout=0.2"], (3,)),
        (["--sharding=full", "--dropout=0.2", "--activation_checkpointing", GENTLE], (3,)),
        (["--sharding=full", "--optimizer=adamw"], (2,)),
    ],
    ids=["muon", "adamw", "muon-full", "adamw-full"],
)
def test_any_number_of_processes_learns_the_same(run, flags, sizes):
    """3 do not divide the 4 micro-batches."""
    one = finished(run(1, *flags))

    for size in sizes:
        assert_close_runs(one, finished(run(size, *flags)))


@pytest.mark.parametrize("sharding", ["optimizer", pytest.param("full", marks=pytest.mark.slow)])
def test_state_is_shared_out_evenly(run, sharding):
    """Also that of large embeddings; each process counts what it keeps."""
    report = """
class Trainer(trainer.Trainer):
    def finish_epoch(self, *args):
        states = [state for part in self.optimizers.parts for state in part.state.values()]
        tensors = [getattr(t, "_local_tensor", t) for state in states for t in state.values()]
        print("state", sum(t.numel() for t in tensors if t.ndim), file=sys.stderr)
        return super().finish_epoch(*args)
script.Trainer = Trainer
"""
    sizes = {}

    for size in (1, 2, 4):
        group = run(size, f"--sharding={sharding}", "--num_epochs=1", patch=report)
        finished(group)
        texts = [(group.folder / f"{rank}.err").read_text() for rank in range(size)]
        sizes[size] = [int(re.search(r"state (\d+)", text)[1]) for text in texts]

    assert sum(sizes[2]) == sum(sizes[4]) == sizes[1][0]
    assert max(sizes[2]) < 1.01 * sizes[1][0] / 2
    assert max(sizes[4]) < 1.02 * sizes[1][0] / 4


def test_scaled_gradients_are_those_of_one_process(run):
    flags = ["--precision=fp16", "--num_epochs=1", GENTLE]

    assert_close_runs(finished(run(1, *flags)), finished(run(2, *flags)))


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (2, ["--precision=bf16", "--optimizer=adamw"]),
        (3, ["--dropout=0.2"]),
        (3, ["--sharding=full"]),
    ],
    ids=["bf16", "fp32", "full"],
)
def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(run, size, flags):
    """Inside an epoch, by a signal to the last process alone; bit for bit."""
    whole = run(size, *flags, name="whole")
    finished(whole)

    group = run(size, *flags, name="stopped", patch=STOP)
    assert group.wait() == [128 + signal.SIGTERM] * size
    assert group.output().count("Stopped after update 12;") == 1
    assert not any(group.output(rank) for rank in range(1, size))
    assert group.errors == []

    finished(run(size, *flags, "--resume", name="stopped"))
    assert_same_run(whole.folder / "checkpoint.pt", group.folder / "checkpoint.pt")


@pytest.mark.parametrize("place", ["trainer.Trainer.evaluate", "checkpoint.save_checkpoint"])
def test_signal_to_one_process_at_any_time_is_heard_by_all(run, place):
    """While they test, or while the first one saves."""
    fault = f"""
function = {place}
def stopping(*args):
    if not stopping.is_done:
        stopping.is_done = True
        os.kill(os.getpid(), signal.SIGINT)
    return function(*args)
stopping.is_done = rank == 0 and "Trainer" in "{place}"
{place} = stopping
"""
    whole = run(2, name="whole")
    finished(whole)
    group = run(2, name="stopped", patch=fault)
    assert group.wait() == [128 + signal.SIGINT] * 2
    finished(run(2, "--resume", name="stopped"))

    assert_same_run(whole.folder / "checkpoint.pt", group.folder / "checkpoint.pt")


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("place", ["distributed.World.disconnect", "dist.destroy_process_group"])
def test_signal_to_one_process_that_takes_leave_changes_nothing(run, is_stopped, place):
    """Another has stopped all already, or all is done; who ended now would count as lost."""
    patch = f"""
dist = distributed.dist
function = {place}
def late(*args):
    global is_due
    if is_due:
        is_due = False
        os.kill(os.getpid(), signal.SIGTERM)
    return function(*args)
is_due = rank == 0
{place} = late
"""
    group = run(2, name="late", patch=patch + STOP * is_stopped)

    assert group.wait() == [128 + signal.SIGTERM if is_stopped else 0] * 2
    assert group.errors == []


@pytest.mark.parametrize(
    ("before", "after", "sharding"),
    [
        (1, 3, "full"),
        (3, 1, "optimizer"),
        pytest.param(2, 1, "full", marks=pytest.mark.slow),
        pytest.param(2, 4, "optimizer", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_goes_on(run, before, after, sharding):
    flags = ["--dropout=0.2", GENTLE]
    sharded = [*flags, f"--sharding={sharding}"]
    run(before, *sharded, name="other", patch=STOP).wait()
    group = run(after, *sharded, "--resume", name="other")

    assert_close_runs(finished(run(1, *flags)), finished(group))
    assert "Resume: epoch 3, update 12" in group.output()


def test_gradients_are_sent_once_an_update(run):
    """4 micro-batches on 2 processes; the first time is the warm-up."""
    count = """
wrap = distributed.World.wrap
def counting(self, *args):
    network = wrap(self, *args)
    def hook(state, bucket):
        print("sent", bucket.is_last(), file=sys.stderr)
        return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)
    network.register_comm_hook(None, hook)
    return network
distributed.World.wrap = counting
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
"""
    group = run(2, patch=count)
    finished(group)

    assert (group.folder / "1.err").read_text().count("sent True") == 1 + 20


@pytest.mark.parametrize("sharding", ["optimizer", pytest.param("full", marks=pytest.mark.slow)])
def test_compiled_network_on_two_processes(run, sharding):
    flags = ["--compile=True", "--num_epochs=1", GENTLE]
    group = run(2, *flags, f"--sharding={sharding}")

    assert_close_runs(finished(run(1, *flags)), finished(group))
    assert ", compiled," in group.output()


# --- When it goes wrong ---


def test_fewer_batches_than_processes_are_refused(run):
    group = run(3, "--gradient_accumulation_steps=2")

    assert group.wait() == [2, 2, 2]
    assert group.errors == [
        "error: --gradient_accumulation_steps must be at least 3, one batch for each process;"
        " 2 given"
    ]


def test_wrong_flag_is_told_once(run):
    group = run(2, "--batch_size=0")

    assert group.wait() == [2, 2]
    assert len(group.errors) == 1


@pytest.mark.parametrize(
    "flag", ["--samples_per_epoch=1", "--gradient_accumulation_steps=1", "--dataset=nobody"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_flag_is_told_before_processes_meet(
    pre_train, small, monkeypatch, capsys, rank, flag
):
    """Another machine may be started later; one process tells it."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))

    assert pre_train.main(small("--process_timeout=0.01", flag)) == 2
    assert capsys.readouterr().err.count("error: --") == (rank == 0)


def test_batches_that_do_not_divide_are_told(run):
    group = run(3, "--num_epochs=1")
    finished(group)

    assert "4 batches are not a multiple of 3 processes; some wait" in group.output()

    group = run(2, "--num_epochs=1")
    finished(group)
    assert "no multiple" not in group.output()


def test_port_that_is_taken_is_named(small, error_of, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        for name, value in place.items():
            monkeypatch.setenv(name, str(value))

        monkeypatch.setattr(os, "_exit", sys.exit)
        status, line = error_of(small())

    assert status == 1
    assert line == (
        f"error: Process 0 of 2 did not meet the others at 127.0.0.1:{port}: the port is in use;"
        " choose another MASTER_PORT."
    )


def test_network_that_is_not_there_is_named(run):
    group = run(2, env={"GLOO_SOCKET_IFNAME": "nosuch"})

    assert group.wait() == [1, 1]
    assert len(group.errors) >= 1
    assert all("nosuch" in line and "no answer" not in line for line in group.errors)


def test_process_that_met_nobody_waits_for_no_thread(run):
    """As of a library that is still trying."""
    patch = """
import threading, time
def failing(*args, **options):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise RuntimeError("no network")
distributed.dist.init_process_group = failing
"""
    group = run(2, patch=patch)

    assert group.wait(15) == [1, 1]
    assert "did not meet the others" in group.errors[0]


def test_slow_save_is_no_loss(run):
    """Longer than the processes wait for each other."""
    fault = """
save = checkpoint.save_checkpoint
def slow(*args):
    distributed.time.sleep(2)
    return save(*args)
checkpoint.save_checkpoint = slow
"""
    finished(run(2, "--process_timeout=0.02", "--num_epochs=1", patch=fault))


def test_process_that_never_comes_is_not_waited_for_long(run):
    group = run(2, "--process_timeout=0.05", patch="sys.exit(0) if rank == 1 else None")

    assert group.wait() == [1, 0]
    assert re.fullmatch(
        r"error: Process 0 of 2 did not meet the others at .*: no answer\.", group.errors[0]
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_nan_in_one_process_stops_all_at_one_update(run, rank, sharding):
    fault = f"""
forward = model.GPT.forward
def faulty(self, x, y=None):
    loss = forward(self, x, y)
    faulty.calls += 1
    return loss * (float("nan") if rank == {rank} and faulty.calls == 10 else 1.0)
faulty.calls = 0
model.GPT.forward = faulty
"""
    group = run(2, f"--sharding={sharding}", patch=fault)

    assert group.wait() == [1, 1]
    assert len(group.errors) == 1
    assert "Loss nan" in group.errors[0]
    # One rehearsal where gradients are bundled, and then 2 batches an update.
    update = 4
    assert f"in epoch 1, step {update}; the weights were not changed" in group.errors[0]
    assert torch.load(group.folder / "checkpoint.pt", weights_only=True)["position"] == update


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "torch.OutOfMemoryError('no memory')",
            "error: cpu is out of memory for the model and a batch of 2; halve",
        ),
        ("OSError(5, 'Input/output error')", "error: [Errno 5] Input/output error"),
        ("KeyError('surprise')", "Traceback (most recent call last):"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_process_ends_all_and_is_told_alone(run, error, message, rank):
    """The other one loses it, and waits until it is ended or a while is over."""
    fault = f"""
take_step = trainer.Trainer.take_step
def faulty(self, *args):
    if self.step == 12 and rank == {rank}:
        raise {error}
    return take_step(self, *args)
trainer.Trainer.take_step = faulty
distributed.PATIENCE = 0.5
"""
    group = run(2, patch=fault)

    assert group.wait() == [1, 1]
    assert len(group.errors) == 1
    assert group.errors[0].startswith(message)
    assert torch.load(group.folder / "checkpoint.pt", weights_only=True)["position"] == 10


@pytest.mark.parametrize(
    ("rank", "number", "sharding"),
    [
        (0, signal.SIGKILL, "optimizer"),
        (1, signal.SIGKILL, "full"),
        (0, signal.SIGSTOP, "full"),
        (1, signal.SIGSTOP, "optimizer"),
    ],
)
def test_process_that_dies_or_hangs_ends_the_run_and_is_named(run, rank, number, sharding):
    fault = f"""
take_step = trainer.Trainer.take_step
def faulty(self, *args):
    if self.step == 12 and rank == {rank}:
        os.kill(os.getpid(), {int(number)})
    return take_step(self, *args)
trainer.Trainer.take_step = faulty
distributed.PATIENCE = 0.5
{SAVE_AT_ONCE}"""
    group = run(2, "--process_timeout=0.05", f"--sharding={sharding}", patch=fault)
    group.processes[1 - rank].join(30)

    assert group.processes[1 - rank].exitcode == 1
    assert group.errors == [f"error: Process {rank} of 2 ended or does not answer."]
    group.processes[rank].kill()
    group.wait()
    assert torch.load(group.folder / "checkpoint.pt", weights_only=True)["position"] == 10


@pytest.mark.parametrize("place", ["script.open_corpus", "script.build_trainer"])
@pytest.mark.parametrize("rank", [0, 1])
def test_error_at_the_start_ends_all_and_is_told_alone(run, place, rank):
    fault = f"""
from text.errors import DataError
function = {place}
def faulty(*args):
    if rank == {rank}:
        raise DataError("the data are not there")
    return function(*args)
{place} = faulty
distributed.PATIENCE = 0.5
"""
    group = run(2, patch=fault)

    assert group.wait() == [1, 1]
    assert group.errors == ["error: the data are not there"]


def test_text_is_prepared_once(run, tmp_path):
    path = tmp_path / "data"
    group = run(3, "--num_epochs=1", f"--dataset_path={path}")
    finished(group)
    texts = [(group.folder / f"{rank}.err").read_text() for rank in range(3)]

    assert ["Tokenizing" in text for text in texts] == [True, False, False]
    assert len(list(path.glob("*.bin"))) == 2


def test_other_flags_on_another_machine_are_refused(run):
    group = run(2, patch="argv += ['--learning_rate=1'] if rank else []")

    assert group.wait() == [1, 1]
    assert group.errors == [
        "error: The flags differ between processes; start all machines with the same command, on"
        " the same files."
    ]


@pytest.mark.parametrize("num_ends", [2, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [2, 4])
def test_normal_ends_in_a_row(run, size, num_ends):
    for number in range(num_ends):
        group = run(size, "--num_epochs=1", name=str(number))

        assert group.wait() == [0] * size
        assert group.errors == []


@pytest.mark.parametrize(
    ("error", "status"), [("RuntimeError('no connection')", 1), ("KeyboardInterrupt", 130)]
)
def test_error_while_taking_leave_is_no_success(run, error, status):
    patch = f"""
dist = distributed.dist
function = dist.destroy_process_group
def failing():
    function()
    raise {error}
dist.destroy_process_group = failing
script.is_finished = lambda *args: True
"""
    group = run(2, patch=patch)

    assert group.wait() == [status] * 2
    assert len(group.errors) == (status == 1)


def test_dry_run_that_is_started_again_plans_a_new_run(
    pre_train, small, tmp_path, monkeypatch, capsys
):
    """It writes nothing, so the checkpoint that is there is that of another run."""
    assert pre_train.main(small("--num_epochs=1")) == 0

    place = {"RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 1, **MEETING}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))

    monkeypatch.setattr("training.planning.TIMED_SECONDS", 0.0)
    assert pre_train.main(small("--num_epochs=1", "--dry_run")) == 0

    output = capsys.readouterr().out
    assert "Memory:" in output
    assert "Nothing to do" not in output


def test_gpu_without_a_number_is_the_default_one():
    """Where there is none of any kind, too: `set_device` refuses what has no number."""
    World(device=torch.device("cuda")).connect()
