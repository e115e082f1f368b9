"""What only torchrun itself can show: signals, restarts, several machines."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import PROLOGUE, SAVE_AT_ONCE, assert_same_run, finish

from processes import Group, finished

FLAGS = ("--gradient_accumulation_steps=4", "--samples_per_epoch=40")


def torchrun(folder, argv, *options, patch="", num_processes=2) -> subprocess.Popen:
    """Start pre-training by torchrun, each process after Python statements that inject a fault."""
    script = folder / "pre-train-by-torchrun.py"
    script.write_text(
        f"{PROLOGUE}\nrank = int(os.environ['RANK'])\n"
        f"script = importlib.import_module('pre-train')\n{patch}\n"
        "if __name__ == '__main__': sys.exit(script.main())"
    )
    command = [sys.executable, "-m", "torch.distributed.run", *options]

    return subprocess.Popen(
        [*command, f"--nproc-per-node={num_processes}", str(script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )


def kill_once(mark, rank: int, step: int, place: str = "script.Trainer.take_step") -> str:
    """Return statements by which a process kills itself, unless there is a mark that it did."""
    return f"""{SAVE_AT_ONCE}
def killing(*args, function={place}):
    is_here = rank == {rank} and getattr(args[0], "step", 0) == {step}
    if is_here and not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
{place} = killing
"""


def position(folder) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["position"]


@pytest.mark.parametrize(
    ("number", "is_echoed"),
    [
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_signal_to_torchrun_stops_all_at_one_update(small, tmp_path, number, is_echoed):
    """A cluster sends it to all processes of a job, and torchrun sends it to its own once more."""
    argv = small(*FLAGS, "--num_epochs=2000")
    patch = "print('process', os.getpid(), flush=True)"
    process = torchrun(tmp_path, argv, "--standalone", patch=patch)
    own = []

    while not (line := process.stdout.readline()).startswith("epoch 2/"):
        assert line

        if line.startswith("process "):
            own.append(int(line.split()[1]))

    process.send_signal(number)

    for pid in own if is_echoed else ():
        os.kill(pid, number)

    _, output, errors = finish(process)
    stopped = re.findall(r"Stopped after update (\d+); saved", output)

    assert len(stopped) == 1
    assert position(tmp_path) == int(stopped[0]) >= 10
    assert "error: " not in errors


def test_process_that_is_killed_ends_the_run_and_is_named(small, tmp_path):
    patch = "trainer.Trainer.test = lambda *args: os.kill(os.getpid(), 9) if rank else {}"
    process = torchrun(tmp_path, small(*FLAGS), "--standalone", patch=patch)
    status, _, errors = finish(process)

    assert status == 1
    assert re.search(r"Root Cause[^=]*rank\s*: 1 .*exitcode\s*: -9", errors, re.DOTALL)
    assert "error: " not in errors
    assert position(tmp_path) == 5


def test_process_that_is_killed_is_started_again(small, tmp_path):
    """It goes on from the last checkpoint, and not from that of an earlier run."""
    left, right = tmp_path / "left", tmp_path / "right"
    flags = [*FLAGS, "--num_epochs=4", "--checkpoint_interval=2"]
    finished(Group(small(*flags, out=left), 2, left))
    finished(Group(small("--num_epochs=1", out=right), 1, right))

    # The first time before the run has begun.
    patch = kill_once(right / "first", 1, 0, "script.open_corpus")
    patch += kill_once(right / "second", 1, 12)
    options = ("--standalone", "--max-restarts=2")
    status, output, errors = finish(
        torchrun(right, small(*flags, out=right), *options, patch=patch)
    )

    assert status == 0, errors
    assert output.count("Kept:") == 1
    assert output.count("Resume: epoch 3, update 10") == 1
    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_begins_anew(small, tmp_path):
    patch = """
test = trainer.Trainer.test
def killing(self, *args):
    if rank == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return test(self, *args)
trainer.Trainer.test = killing
"""
    argv = small(*FLAGS, "--num_epochs=1")
    process = torchrun(tmp_path, argv, "--standalone", "--max-restarts=1", patch=patch)
    status, output, errors = finish(process)

    assert status == 0, errors
    assert "Resume:" not in output
    assert output.count("epoch 1/1") == 1


def test_two_machines_prepare_for_themselves_and_learn_as_one(small, tmp_path):
    """Two agents that meet on the loopback, with one process and two; one is killed on each."""
    one, many = tmp_path / "one", tmp_path / "many"
    finished(Group(small(*FLAGS, out=one), 3, one))
    many.mkdir()
    patch = kill_once(many / "first", 2, 8) + kill_once(many / "second", 0, 13)
    port = free_port()
    agents = [
        torchrun(
            many,
            small(*FLAGS, f"--dataset_path={many / str(number)}", out=many),
            "--nnodes=2",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=run",
            "--max-restarts=3",
            patch=patch,
            num_processes=number + 1,
        )
        for number in range(2)
    ]
    outputs = [finish(agent) for agent in agents]

    assert [status for status, _, _ in outputs] == [0, 0], outputs
    assert sum("3 processes" in output for _, output, _ in outputs) == 1
    assert not list(many.glob("checkpoint.2*"))
    assert_same_run(one / "checkpoint.pt", many / "checkpoint.pt")
    assert all(len(list((many / str(number)).glob("*.bin"))) == 2 for number in range(2))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))

        return server.getsockname()[1]
