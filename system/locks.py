"""Locks a path between processes, on any file system: the holder creates a file and touches it.

Only one process can create the file. The file locks of the system are not used, because a network
file system may grant them without locking anything.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

# Seconds between two touches of a held lock.
HEARTBEAT = 5.0
# Seconds without a touch after which a holder on another machine counts as dead.
PATIENCE = 60.0
# Seconds between two looks at a lock that another process holds.
POLL = 0.2


class HeldError(Exception):
    """A living process holds the lock; the message is its name."""


class Lock:
    """Take the lock at path, as open() opens a file; leaving the context gives it back.

    The lock of a dead process of this machine is taken over at once. A holder on another machine
    counts as dead when the own clock has run for PATIENCE seconds without seeing a touch.

    Args:
        wait: whether to wait for a living holder.
        on_wait: is called once, with the name of the holder, before waiting.

    Raises:
        HeldError: when a holder is alive and wait is False.
        OSError: when the lock cannot be written.
    """

    def __init__(
        self, path: Path, wait: bool = True, on_wait: Callable[[str], None] = lambda holder: None
    ):
        self.path = path
        self.record = {
            "host": host_name(),
            "process": os.getpid(),
            "started": start_of(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self.acquire(wait, on_wait)
        self.is_released = threading.Event()
        self.heartbeat = threading.Thread(target=self.keep_alive, daemon=True)
        self.heartbeat.start()

    def acquire(self, wait: bool, on_wait: Callable[[str], None]) -> None:
        seen: tuple[dict | None, int | None] = (None, None)
        since, is_waiting = time.monotonic(), False
        while not self.create():
            found = holder, _ = look(self.path)
            alive = is_alive(holder)
            if found != seen:
                # A touch by the same holder is a sign of life from any machine.
                if alive is None and holder and holder == seen[0]:
                    alive = True

                seen, since = found, time.monotonic()

            # A stopped process of this machine touches nothing, but it is alive.
            if alive is False or (alive is None and time.monotonic() - since > PATIENCE):
                remove(self.path, found)
                continue

            if alive and not wait:
                raise HeldError(describe(holder))

            if not is_waiting:
                on_wait(describe(holder))
                is_waiting = True

            time.sleep(POLL)

    def create(self) -> bool:
        """Create the file; return False when it is there already."""
        try:
            file = open(self.path, "x")  # noqa: SIM115
        except FileExistsError:
            return False

        try:
            with file:
                json.dump(self.record, file)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

        return True

    def keep_alive(self) -> None:
        while not self.is_released.wait(HEARTBEAT):
            if look(self.path)[0] == self.record:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def is_held(self) -> bool:
        """Tell whether no other process has taken the lock; deleting its file does not take it."""
        return look(self.path)[0] in (self.record, None)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.is_released.set()
        self.heartbeat.join()
        if look(self.path)[0] == self.record:
            self.path.unlink(missing_ok=True)


def remove(path: Path, found: tuple) -> None:
    """Remove the lock of a dead holder, unless it is another one than look() found before."""
    with Lock(path.with_name(f"{path.name}.breaking")):
        if look(path) == found:
            path.unlink(missing_ok=True)


def look(path: Path) -> tuple[dict | None, int | None]:
    """Return who holds a lock, and when the file was touched; each is None if unreadable."""
    holder = touched = None

    # A network file system asks its server for the time when a file is opened.
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text())

    with contextlib.suppress(OSError):
        touched = path.stat().st_mtime_ns

    is_known = isinstance(holder, dict) and isinstance(holder.get("host"), str)
    return holder if is_known and isinstance(holder.get("process"), int) else None, touched


def is_alive(holder: dict | None) -> bool | None:
    """Tell whether a process of this machine has not ended; None where that is unknown."""
    if holder is None or holder["host"] != host_name():
        return None

    if started := start_of(holder["process"]):
        # Otherwise another process has its number by now.
        return started == holder.get("started")

    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # A process of another user.
        pass

    # Where no start is known, another process may have its number.
    return True if holder.get("started") else None


def start_of(process: int) -> str | None:
    """Return when a process was started, in ticks of its machine; None where that is unknown."""
    try:
        # Behind the name, which may hold anything but ends with the last bracket.
        status = Path(f"/proc/{process}/stat").read_text(errors="replace")
        state, *fields = status.rpartition(")")[2].split()

        # A zombie has ended, though in many containers it stays as long as they run.
        return "ended" if state in ("Z", "X") else fields[18]
    except (OSError, ValueError, IndexError):
        return None


def describe(holder: dict | None) -> str:
    if holder is None:
        return "another process"

    return f"process {holder['process']} on {holder['host'].split('/')[0]}"


def host_name() -> str:
    """Name where a process number means one process: the machine, its last start, the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))

    return "/".join(parts)
