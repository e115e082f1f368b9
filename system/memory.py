"""Measures the memory of a process: how much there is, how much is used, when it has run out."""

import contextlib
import ctypes
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from system.limits import group_memory


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


def total_memory(device: torch.device) -> float:
    """Return the bytes that this process could have in all; infinite where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf

    return available_memory() + pages * resource.getpagesize()


def map_tensors(function: Callable, value):
    """Return containers of any depth with function(tensor) in the place of each tensor."""
    if isinstance(value, Tensor):
        return function(value)

    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}

    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)

    return value


def num_bytes(value) -> int:
    """Return the size of all tensors in containers of any depth."""
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), value)
    return sum(sizes)


def available_memory() -> float:
    """Return the bytes that this process can still have, as far as Linux tells; else no limit."""
    available = math.inf
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if "MemAvail" in line)

    return min(available, group_memory())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch means that memory ran out; only CUDA has its own type."""
    types = (torch.OutOfMemoryError, MemoryError)
    texts = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, types) or any(text in str(error) for text in texts)


def describe_shortage(error: BaseException, device: torch.device, purpose: str) -> str:
    """Say which memory ran out, and for what."""
    is_main = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return f"{'cpu' if is_main else device} is out of memory for {purpose}"
