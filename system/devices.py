"""Chooses what a run computes on: the device, the number format, the compiler."""

import contextlib
import os
import re
import time

import torch
from torch import nn

from system.distributed import World
from system.limits import num_cores


class DeviceError(Exception):
    """A device that this machine does not have; the message is one line for the user."""


# --- Device ---


def resolve_device(name: str | None) -> torch.device:
    """Turn `--device` into a device; None takes the best that there is.

    Raises:
        ValueError: when no such device is known.
        DeviceError: when it is known but this machine has none.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")

        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise ValueError(f"--device must be cuda, cuda:N, mps or cpu, {name} given")

    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device: no CUDA device was found; --device=cpu runs without one.")

    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name} given, there are {torch.cuda.device_count()} GPUs")

    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("--device: no MPS device was found; --device=cpu runs without one.")

    return torch.device(name)


def own_device(device: torch.device, world: World) -> torch.device:
    """Return the device of this process when several share a machine.

    Raises:
        ValueError: when --device or the number of GPUs leaves a process without one.
    """
    if world.size == 1 or device.type == "cpu":
        return device

    if device.type == "mps" or device.index is not None:
        raise ValueError(
            f"--device={device} given with {world.size} processes: --device=cuda gives"
            " each process its own GPU, --device=cpu its share of the cores"
        )

    if world.local_size > torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node={world.local_size} given, there are {torch.cuda.device_count()} GPUs"
        )

    return torch.device("cuda", world.local_rank)


def limit_threads() -> None:
    """Compute with as many threads as this process has cores, unless OMP_NUM_THREADS is set.

    Where a container may use a part of the machine, others would wait for their turn.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- Number format ---

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the format for the matrix products of an optimizer: never fp16, its range is small."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_precision(device: torch.device) -> str:
    """Return the precision, bf16, fp16 or fp32, that is fast on a device."""
    if device.type == "cuda":
        # Older cards run bf16 too, but in slow emulation.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"

    if device.type == "cpu":
        # Measured, because CPU flags do not tell: bf16 is 6 times faster with matrix units, 4 times
        # slower without.
        rates = {name: matmul_rate(device, name) for name in ("bf16", "fp32")}
        return "bf16" if rates["bf16"] > 1.5 * rates["fp32"] else "fp32"

    return "fp32"


def matmul_rate(device: torch.device, precision: str) -> float:
    """Measure how many operations a second a matrix product reaches: the limit of training."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (
        torch.randn(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2)
    )
    seconds: list[float] = []

    # The first few are slow while threads and caches warm up.
    while len(seconds) < 3 or sum(seconds) < 0.2:
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - start)

    return 2 * size**3 / min(seconds)


def total_matmul_rate(world: World, precision: str) -> float:
    """Return the operations a second of all devices together."""
    return world.sum(int(matmul_rate(world.device, precision)))[0]


def autocast(device: torch.device, precision: str):
    if precision == "fp32":
        return contextlib.nullcontext()

    return torch.autocast(device.type, PRECISIONS[precision])


# --- Compiler ---


def check_compiler_cache(is_wanted: bool) -> None:
    """Go without a cache folder that cannot be made; print a note if it would be used.

    PyTorch makes it when it imports its compiler, which it does even where nothing is compiled.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        if folder:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        if is_wanted:
            print(f"Note:   TORCHINDUCTOR_CACHE_DIR={folder} is left out: {error.strerror}")


def compile_model(
    model: nn.Module, device: torch.device, is_wanted: bool = True, is_dynamic: bool = False
) -> str:
    """Compile a model in place if that works here; return what was chosen, for people.

    Args:
        is_dynamic: whether the shapes of micro-batches differ.
    """
    if not is_wanted:
        return "not compiled"

    probe = torch.compile(lambda x: torch.nn.functional.gelu(x + 1))
    try:
        probe(torch.zeros(64, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken may raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"not compiled ({reason[0][:120]})"

    model.compile(dynamic=is_dynamic)
    return "compiled"
