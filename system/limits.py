"""How much memory and how many cores this process may use, as its container limits them.

Linux limits by control groups, of version 1 or 2: the group of the process, and those around it.
"""

import contextlib
import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Of each version: the limit, what is used of it, and the part of this that is given up when memory
# gets tight, files that were read or written lately.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def group_memory() -> float:
    """Return the bytes that the groups of this process have left; infinite without a limit."""
    limits = [math.inf]
    for folder in control_groups("memory"):
        for limit, used, cached in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError, KeyError):
                lines = (folder / "memory.stat").read_text().splitlines()
                statistics = dict(line.split() for line in lines)
                most, now = (int((folder / name).read_text()) for name in (limit, used))
                limits.append(most - now + int(statistics[cached]))

    return min(limits)


def num_cores() -> int:
    """Return how many cores this process may use; a part of one counts as one."""
    quotas = [float(os.cpu_count() or 1)]
    if hasattr(os, "sched_getaffinity"):
        quotas.append(len(os.sched_getaffinity(0)))

    for folder in control_groups("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            # A quota of version 2 is "max" without a limit, one of version 1 is -1.
            with contextlib.suppress(OSError, ValueError):
                text = " ".join((folder / name).read_text() for name in names)
                quota, period = map(int, text.split())
                quotas.append(quota / period if quota > 0 else math.inf)

    return max(1, math.ceil(min(quotas)))


def control_groups(controller: str) -> list[Path]:
    """Return the folders of all groups that may limit this process."""
    folders = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                root = ROOT / controller if controllers else ROOT
                group = root / path.removeprefix("/")
                groups = (group, *group.parents)
                folders += [folder for folder in groups if folder.is_relative_to(root)]

    return folders
