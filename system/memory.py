"""Measures the memory of a process: how much there is, how much is used, when it has run out."""

import contextlib
import ctypes
import math
import os
import re
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor


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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of PyTorch means that memory ran out; on a CPU it has no own type."""
    types = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, types) or "can't allocate memory" in str(error)
