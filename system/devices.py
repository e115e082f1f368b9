"""What a run computes on: the device, the number format, the compiler, and the memory."""

import contextlib
import ctypes
import math
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from system.distributed import World


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
    """Return what one of several processes computes on.

    Raises:
        ValueError: when there is nothing for each.
    """
    if world.size == 1 or device.type == "cpu":
        return device

    if device.type == "mps" or device.index is not None:
        raise ValueError(
            f"--device={device} given with {world.size} processes: each has a GPU of its own by"
            " --device=cuda, or its share of the cores by --device=cpu"
        )

    if world.local_size > torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node={world.local_size} given, there are {torch.cuda.device_count()} GPUs"
        )

    return torch.device("cuda", world.local_rank)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- Number format ---

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def product_format(precision: str) -> torch.dtype:
    """Return the format for the matrix products of an optimizer: fp16 has no room for them."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_precision(device: torch.device) -> str:
    """Return the precision, bf16, fp16 or fp32, that is fast on a device."""
    if device.type == "cuda":
        # Older cards run bf16 too, but in slow emulation.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"

    if device.type == "cpu":
        # Nothing that a processor says of itself is as sure as a try: 6 times faster with matrix
        # units, 4 times slower without.
        rates = {name: matmul_rate(device, name) for name in ("bf16", "fp32")}

        return "bf16" if rates["bf16"] > 1.5 * rates["fp32"] else "fp32"

    return "fp32"


def matmul_rate(device: torch.device, precision: str) -> float:
    """Measure how many operations a second a matrix product reaches: the limit of training."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (
        torch.randn(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2)
    )
    seconds = []

    # The first few are slow while threads and caches warm up.
    while len(seconds) < 3 or sum(seconds) < 0.2:
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - start)

    return 2 * size**3 / min(seconds)


def sum_of_rates(world: World, precision: str) -> float:
    """Return the operations a second of all devices together."""
    return world.sum(int(matmul_rate(world.device, precision)))[0]


def autocast(device: torch.device, precision: str):
    if precision == "fp32":
        return contextlib.nullcontext()

    return torch.autocast(device.type, PRECISIONS[precision])


# --- Compiler ---


def compile_model(model: nn.Module, device: torch.device, is_dynamic: bool = False) -> str:
    """Compile a model in place if that works here; return what was chosen, for people.

    Args:
        is_dynamic: whether the shapes of micro-batches differ.
    """
    probe = torch.compile(lambda x: torch.nn.functional.gelu(x + 1))

    try:
        probe(torch.zeros(64, device=device))
    except Exception as error:  # whatever a compiler that is missing or broken may raise
        return f"not compiled ({first_sentence(error)})"

    model.compile(dynamic=is_dynamic)

    return "compiled"


def first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]

    return lines[0][:120] if lines else type(error).__name__


# --- Memory ---


def tune_memory() -> None:
    """Let this process keep what it frees, in huge pages; to be called before the first tensor.

    By itself glibc gives it back to the system, and every step pays for it again in page faults.
    Elsewhere than on Linux nothing changes.
    """
    # PyTorch reads it once, when it first allocates.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def peak_memory(device: torch.device) -> int:
    """Return the most memory in bytes that this process has had on the device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    # Linux counts in ru_maxrss what the process that launched this one had by then.
    status = Path("/proc/self/status")

    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    return peak if sys.platform == "darwin" else peak * 1024


def library_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that neither are free nor hold tensors of this process."""
    free, total = torch.cuda.mem_get_info(device)

    return total - free - torch.cuda.memory_reserved(device)


def whole_memory(device: torch.device) -> float:
    """Return the bytes that this process could have in all; infinite where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf

    return available_memory() + pages * resource.getpagesize()


def num_bytes(value) -> int:
    """Return the size of all tensors in containers of them."""
    if isinstance(value, Tensor):
        return value.nbytes

    parts = value.values() if isinstance(value, dict) else value

    return sum(map(num_bytes, parts)) if isinstance(value, dict | list | tuple) else 0


def available_memory() -> float:
    """Return the bytes that this process can still have, as far as Linux tells; else no limit."""
    limits = [math.inf]

    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * next(int(line.split()[1]) for line in lines if "MemAvail" in line))

    for folder in control_groups():
        with contextlib.suppress(OSError, ValueError, StopIteration):
            limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
            lines = (folder / "memory.stat").read_text().splitlines()
            # Files that were read or written lately are given up when it gets tight.
            cached = next(int(line.split()[1]) for line in lines if "inactive_file" in line)
            limits.append(limit - used + cached)

    return min(limits)


def control_groups() -> list[Path]:
    """Return what may limit the memory of this process on Linux: its group and those around it."""
    root = Path("/sys/fs/cgroup")

    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                group = root / line.removeprefix("0::/")

                return [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]

    return [root]


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of PyTorch means that memory ran out; on a CPU it has no own type."""
    types = (torch.OutOfMemoryError, MemoryError)

    return isinstance(error, types) or "can't allocate memory" in str(error)


def first_that_fits(
    numbers: Iterable[int], attempt: Callable[[int], object], device: torch.device
) -> int | None:
    """Return the first number that an attempt has memory enough for; None without any."""
    for number in numbers:
        if device.type == "cuda":
            torch.cuda.empty_cache()

        try:
            attempt(number)
        except Exception as error:
            # Libraries have their own words for it; what fails is of no use, whatever the cause.
            release(error)
        else:
            return number

    return None


def release(error: Exception) -> None:
    """Free what the functions that an error has ended still hold."""
    traceback.clear_frames(error.__traceback__)
