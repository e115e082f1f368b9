"""Several processes of one run, without the seconds that each would take to import PyTorch."""

import importlib
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent

# Its processes are forked from one that has imported everything and has no threads yet.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "processes", "pre-train", "fine-tune"]
CONTEXT.set_forkserver_preload(PRELOADED)


class Group:
    """The processes of a run as torchrun would start them, and what they say."""

    def __init__(self, argv, size, folder, script="pre-train", patch="", env=None):
        """Start them.

        Args:
            patch: Python statements that inject a fault; `rank` and the modules are at hand.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # As torchrun does, they meet at a process that outlives them.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        self.processes = [
            CONTEXT.Process(
                target=work, args=(argv, rank, size, port, folder, script, patch, env or {})
            )
            for rank in range(size)
        ]

        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 60) -> list[int]:
        """Return the exit statuses; negative for the number of a signal."""
        try:
            for process in self.processes:
                process.join(timeout)

            assert all(process.exitcode is not None for process in self.processes), "hangs"
        finally:
            for process in self.processes:
                process.kill()

        return [process.exitcode for process in self.processes]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.out").read_text()

    @property
    def errors(self) -> list[str]:
        """The lines on standard error that tell errors, of all processes."""
        texts = [(self.folder / f"{rank}.err").read_text() for rank in range(len(self.processes))]

        return [
            line.strip()
            for text in texts
            for line in re.split(r"[\r\n]", text)
            if re.match(r"\s*(error: |Traceback)", line)
        ]


def work(argv, rank, size, port, folder, script, patch, env):
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo", **env},
    )

    names = (
        "torch",
        "data",
        "model",
        "system.distributed",
        "training.checkpoint",
        "training.run",
        "training.launch",
        "training.sharding",
        "training.trainer",
    )
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    modules["torch"].set_num_threads(1)
    namespace = {**modules, "argv": argv, "rank": rank, "os": os, "signal": signal, "sys": sys}
    namespace["script"] = importlib.import_module(script)
    exec(patch, namespace)
    sys.exit(namespace["script"].main(argv))


def finished(group: Group, name: str = "checkpoint.pt") -> dict:
    """Wait for a run that ends well; return its checkpoint."""
    statuses = group.wait()
    assert statuses == [0] * len(statuses), group.errors

    return torch.load(group.folder / name, weights_only=True)


def assert_close_runs(left: dict, right: dict) -> None:
    """Compare the checkpoints of runs on different numbers of processes."""
    assert left["position"] == right["position"]
    assert left["tokens"] == right["tokens"]

    for key in {"model", "lora"} & left.keys():
        assert left[key].keys() == right[key].keys()

        for name, weight in left[key].items():
            torch.testing.assert_close(right[key][name], weight, atol=1e-5, rtol=0)

    for one, other in zip(left["optimizer"], right["optimizer"], strict=True):
        assert one["state"].keys() == other["state"].keys()
        assert_same(one["param_groups"], other["param_groups"])

        for number, values in one["state"].items():
            assert values.keys() == other["state"][number].keys()
            for name, value in values.items():
                torch.testing.assert_close(other["state"][number][name], value, atol=1e-5, rtol=0)

    for row, other in zip(left["metrics"], right["metrics"], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert row["test_loss"] == pytest.approx(other["test_loss"], abs=1e-5)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
