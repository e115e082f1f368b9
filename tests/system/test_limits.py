"""What a container allows: limits of control groups, of both versions."""

import os
from pathlib import Path

import pytest
import torch

from system import devices
from system.limits import num_cores
from system.memory import available_memory

NEW, OLD = "0::/a/b\n", "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=x:/y\n0::/\n"


@pytest.fixture
def system(monkeypatch):
    """Return a function that puts texts in the place of the system's files."""

    def pretend(files: dict[str, str]) -> None:
        def read_text(path):
            try:
                return files[str(path)]
            except KeyError:
                raise FileNotFoundError from None

        monkeypatch.setattr(Path, "read_text", read_text)

    return pretend


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 8000 * 1024),
        ({"a/b": ("5000000", 4000000, 500000), "a": ("max", 9, 0)}, 1500000),
        ({"a/b": ("max", 4000000, 0), "a": ("7000000", 6000000, 0)}, 1000000),
        ({"": ("3000000", 1000000, 0)}, 2000000),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_that_of_the_narrowest_group(system, groups, expected, version):
    files = {
        "/proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n",
        "/proc/self/cgroup": OLD if version == 1 else NEW,
    }
    root = Path("/sys/fs/cgroup", *["memory"] * (version == 1))
    limit_name, used_name, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 1\ntotal_"),
        2: ("memory.max", "memory.current", ""),
    }[version]

    for name, (limit, used, cached) in groups.items():
        folder = root / name
        # Version 1 has no word for no limit.
        files[str(folder / limit_name)] = "9223372036854771712" if limit == "max" else limit
        files[str(folder / used_name)] = str(used)
        files[str(folder / "memory.stat")] = f"anon 5\n{prefix}inactive_file {cached}\n"

    system(files)
    assert available_memory() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"/proc/self/cgroup": NEW, "/sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 6),
        ({"/proc/self/cgroup": NEW, "/sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"/proc/self/cgroup": NEW, "/sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        (
            {
                "/proc/self/cgroup": OLD,
                "/sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            {
                "/proc/self/cgroup": OLD,
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_cores_are_those_of_the_quota(system, monkeypatch, files, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    system(files)

    assert num_cores() == expected


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("2", 2)])
def test_threads_follow_the_cores(pre_train, small, monkeypatch, given, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(devices, "num_cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)

    try:
        pre_train.main(small("--num_epochs=1"))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
