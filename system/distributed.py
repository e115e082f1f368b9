"""Joins the processes that torchrun starts into one run: ranks, agreement, sharding, failures.

Gradients and weights travel by a process group of the device (NCCL, or gloo on a CPU). What the
processes agree on, such as that it is time to stop, travels by one of its own on the CPU.

W is the number of processes.
"""

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from system.memory import map_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# No timeout: wait_until decides how long to wait.
NO_TIMEOUT = timedelta(days=365)
# Seconds that torchrun has to end this process before it reports a lost one.
PATIENCE = 5.0


class ProcessError(Exception):
    """The processes of a run cannot work together; the message is one line for the user."""


class LostProcessError(ProcessError):
    """Another process ended or does not answer; no message when another process prints it."""


class NoAnswerError(Exception):
    """The processes did not come together in time."""


@dataclass
class World:
    """The processes of a run, seen from one of them. By default it is the only one.

    Args:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many are on its machine.
        num_restarts: how often torchrun has started those of its machine again.
        device: what it computes on.
        sharding: `optimizer`, or `full` for weights and gradients too.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    num_restarts: int = 0
    device: torch.device = torch.device("cpu")
    sharding: str = "optimizer"
    timeout: timedelta = timedelta(minutes=10)

    @classmethod
    def from_environment(cls) -> "World":
        """Read where torchrun has put this process.

        Raises:
            ProcessError: when the variables contradict themselves.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = {name: os.environ[name] for name in names if name in os.environ}
        # Some clusters and notebooks set a rank for programs that do not work together.
        can_meet = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not (can_meet and given.keys() & {"RANK", "WORLD_SIZE"}):
            return cls()

        try:
            rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
            local_rank = int(given.get("LOCAL_RANK", rank))
            local_size = int(given.get("LOCAL_WORLD_SIZE", size))
            is_valid = 0 <= rank < size and 0 <= local_rank < local_size <= size
        except (KeyError, ValueError):
            is_valid = False

        if not is_valid:
            text = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ProcessError(
                f"{text} is not a valid rank layout; start the processes with torchrun."
            )

        num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return cls(rank, size, local_rank, local_size, num_restarts)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def has_sharded_weights(self) -> bool:
        return self.size > 1 and self.sharding == "full"

    def connect(self) -> None:
        """Meet the other processes.

        Raises:
            ProcessError: when that fails.
        """
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

        if self.size == 1:
            return

        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            self.base, _, _ = next(dist.rendezvous("env://", timeout=self.timeout))
            self.store = dist.PrefixStore(self.agree_on_name(self.base), self.base)
            dist.init_process_group(
                backend,
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
                device_id=self.device if backend == "nccl" else None,
            )
            self.control = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        except (RuntimeError, ValueError, NoAnswerError) as error:
            cause = " ".join(str(error).split())[:150]
            if isinstance(error, NoAnswerError | dist.DistStoreError):
                cause = "no answer"
            elif "EADDRINUSE" in cause:
                cause = "the port is in use; choose another MASTER_PORT"

            raise ProcessError(
                f"Process {self.rank} of {self.size} did not meet the others at {address}: {cause}."
            ) from error

    def agree_on_name(self, store: dist.Store) -> str:
        """Find a name for the part of a store that no earlier start has written to.

        torchrun keeps one store when it starts processes again, and what it says of those that
        ended would be believed. How often it did so is no such name: machines count for themselves.
        So the first process answers each of the others, by a word that is new.
        """
        word = uuid.uuid4().hex
        greeting = "hello/{}".format
        store.set(greeting(self.rank), word)
        if not self.is_first:
            self.wait_until(lambda: store.check([word]))
            name = store.get(word).decode()
            store.set(f"{name}/{self.rank}", "")
            return name

        missing = set(range(1, self.size))

        def answer() -> bool:
            for rank in sorted(missing):
                if store.check([greeting(rank)]):
                    store.set(store.get(greeting(rank)).decode(), word)

                if store.check([f"{word}/{rank}"]):
                    missing.remove(rank)

            return not missing

        self.wait_until(answer)
        return word

    def is_restarted(self) -> bool:
        """Tell whether torchrun has restarted a run that had begun; all processes have to ask.

        Each machine counts its own restarts, so a store that they share decides, if there is one.
        """
        if self.size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return bool(self.broadcast(self.is_first and self.base.check(["begun"])))

        return self.max(self.num_restarts) > 0

    def mark_started(self) -> None:
        """Mark in the store that the run has begun: after a restart its files are its own."""
        if self.size > 1 and self.is_first:
            self.base.set("begun", "")

    def disconnect(self) -> None:
        """Leave together: leaving early can break the connections of others.

        Does nothing after the first call.
        """
        if self.size > 1 and dist.is_initialized():
            self.max(0)
            dist.destroy_process_group()

    # --- Agreement ---

    def max(self, number: int) -> int:
        """Return the greatest of the numbers that the processes give."""
        return self.reduce_numbers([number], dist.ReduceOp.MAX)[0]

    def sum(self, *numbers: int) -> list[int]:
        """Return the sum over the processes of every number that they give."""
        return self.reduce_numbers(numbers, dist.ReduceOp.SUM)

    def broadcast(self, number: int) -> int:
        """Return the number that the first process gives."""
        return self.sum(number if self.is_first else 0)[0]

    def check_same(self, subject: str, value: object) -> None:
        """Raise ProcessError unless all processes give the same value."""
        digest = int(hashlib.sha256(repr(value).encode()).hexdigest()[:15], 16)
        if self.max(digest) != -self.max(-digest):
            raise ProcessError(
                f"{subject} differ between processes; start all machines with the same command, on"
                " the same files."
            )

    def reduce_numbers(self, numbers: Iterable[int], operation) -> list[int]:
        """Reduce numbers over all processes; raise NoAnswerError when one takes too long."""
        tensor = torch.tensor(list(numbers), dtype=torch.int64)
        if self.size > 1:
            work = dist.all_reduce(tensor, operation, group=self.control, async_op=True)
            self.wait_until(work.is_completed)
            work.wait()

        return tensor.tolist()

    def wait_until(self, is_done: Callable[[], bool], timeout: timedelta | None = None) -> None:
        """Wait in Python: inside of the library no signal handler would run."""
        deadline = time.monotonic() + (timeout or self.timeout).total_seconds()
        pause = 1e-5
        while not is_done():
            if time.monotonic() > deadline:
                raise NoAnswerError

            time.sleep(pause)
            pause = min(2 * pause, 1e-3)

    @contextlib.contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """Let the first process of every machine pass, however long it takes; then the others."""
        if self.local_rank:
            self.barrier()

        yield
        if not self.local_rank:
            self.barrier()

    def barrier(self) -> None:
        if self.size > 1:
            work = dist.barrier(group=self.control, async_op=True)
            self.wait_until(work.is_completed, NO_TIMEOUT)
            work.wait()

    # --- Work ---

    def shard(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Yield every W-th item, and whether it is this process's own.

        All processes get the same number: when none is left for one, it gets another's.
        """
        items = iter(items)
        while group := list(islice(items, self.size)):
            is_own = self.rank < len(group)
            yield group[self.rank if is_own else 0], is_own

    def wrap(self, model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """Move a model to the device, and wrap it in DDP or FSDP when there are several processes.

        Returns:
            The network to call in training.

        Args:
            layers: the parts that FSDP gathers and frees one after the other.
        """
        if self.has_sharded_weights:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)

            return fully_shard(model, mesh=mesh)  # type: ignore[return-value]

        model.to(self.device)
        if self.size == 1:
            return model

        from torch.nn.parallel import DistributedDataParallel

        # The wrapper would cut compiled layers where its buckets end.
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def no_sync(self, network: nn.Module, is_last: bool):
        """Return a context in which gradients are added up here, and sent with the last batch.

        Where the gradients are sharded each batch has to send its own: there is no room to keep
        them.
        """
        if is_last or self.size == 1 or self.has_sharded_weights:
            return contextlib.nullcontext()

        return network.no_sync()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

        return tensor

    # --- Failures ---

    def is_lost_process(self, error: BaseException) -> bool:
        """Tell whether an error means that another process is gone."""
        is_remote = isinstance(error, NoAnswerError | dist.DistError)
        return self.size > 1 and (is_remote or "gloo" in str(error))

    def describe_lost_process(self, is_stopped: Callable[[], bool]) -> str:
        """Return which processes do not answer; empty when this one is asked to end, too.

        torchrun reports a process that died, and ends the others.

        Args:
            is_stopped: tells whether a signal has come.
        """
        deadline = time.monotonic() + PATIENCE
        self.ask_store(lambda store: store.set(f"alive/{self.rank}", ""), None)
        while time.monotonic() < deadline:
            if is_stopped():
                return ""

            time.sleep(0.05)

        def find_lost(store: dist.Store) -> list[int]:
            return [r for r in range(self.size) if not store.check([f"alive/{r}"])]

        nobody: list[int] = []
        numbers = ", ".join(map(str, self.ask_store(find_lost, nobody)))
        lost = f"Process {numbers} of {self.size}" if numbers else "Another process"
        return f"{lost} ended or does not answer."

    def is_first_to_fail(self) -> bool:
        """Tell whether this process is the first to fail: only its error is printed."""
        if self.size == 1 or not hasattr(self, "store"):
            return self.is_first

        return self.ask_store(lambda store: store.add("failures", 1), 1) == 1

    def ask_store(self, question: Callable[[dist.Store], T], default: T) -> T:
        """Ask the store in a thread, as it can be gone or hang; return default when it does."""
        answers = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(self.store))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return answers[0] if answers else default


def is_sharded(value: object) -> "TypeGuard[DTensor]":
    """Tell whether this is a distributed tensor, without the second that importing these takes."""
    return hasattr(value, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes have to call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def unshard(value):
    """Gather sharded tensors, in containers of any depth, on the CPU of the first process.

    All processes have to call it; the others get None for a sharded tensor.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        if not is_sharded(tensor):
            return tensor

        tensor = tensor.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None

    return map_tensors(gather, value)


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Shard a whole tensor like model; return it unchanged when model is not sharded."""
    if not is_sharded(model):
        return tensor

    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the norm of the gradient to max_norm; return the norm before."""
    return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether this process's parts of tensors hold finite numbers alone."""
    return all(torch.stack([own_part(tensor).isfinite().all() for tensor in tensors]).tolist())
