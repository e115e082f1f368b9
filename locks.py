"""A lock between processes on any file system: its holder writes its name and shows signs of life.

The lock is a file that only one process can create. It needs no locking by the system, which
network file systems may answer without doing it.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Seconds between two signs of life, and of silence after which a holder counts as dead.
HEARTBEAT = 5.0
PATIENCE = 60.0
POLL = 0.2


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock at path; wait while another process does, unless that one is dead.

    Args:
        waiting: is called once, with the name of the holder, before waiting.

    Raises:
        OSError: when the lock cannot be written.
    """
    token = {"host": host_name(), "process": os.getpid(), "token": uuid.uuid4().hex}
    acquire(path, token, waiting)
    stop = threading.Event()
    thread = threading.Thread(target=show_life, args=(path, stop), daemon=True)
    thread.start()

    try:
        yield
    finally:
        stop.set()
        thread.join()

        if read(path) == token:
            path.unlink(missing_ok=True)


def acquire(path: Path, token: dict, waiting: Callable[[str], None]) -> None:
    watched, since, is_told = None, 0.0, False

    while not create(path, token):
        holder, beat = read(path), last_beat(path)

        if (holder, beat) != watched:
            watched, since = (holder, beat), time.monotonic()

        if is_dead(holder) or time.monotonic() - since > PATIENCE:
            take_away(path, holder)
        elif not is_told:
            waiting(describe(holder))
            is_told = True
        else:
            time.sleep(POLL)


def create(path: Path, token: dict) -> bool:
    """Create the lock unless it is there; return whether it was not."""
    try:
        with open(path, "x") as file:
            json.dump(token, file)
    except FileExistsError:
        return False

    return True


def take_away(path: Path, holder: dict | None) -> None:
    """Remove the lock of a dead holder; of several processes that try, only one does."""
    breaking = path.with_name(f"{path.name}.breaking")

    try:
        breaking.mkdir()
    except FileExistsError:
        # Whoever made it removes it at once, or died in between.
        with contextlib.suppress(OSError):
            if time.time() - breaking.stat().st_mtime > PATIENCE:
                breaking.rmdir()

        time.sleep(POLL)
        return

    try:
        if read(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        breaking.rmdir()


def read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def last_beat(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def show_life(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def is_dead(holder: dict | None) -> bool:
    """Tell whether a holder was a process of this machine and is no more (or had our number)."""
    if holder is None or holder.get("host") != host_name():
        return False

    if holder["process"] == os.getpid():
        return True

    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False

    return False


def describe(holder: dict | None) -> str:
    return f"process {holder['process']} on {holder['host'].split('/')[0]}" if holder else "another"


def host_name() -> str:
    """Name the machine, its last start and the container: where a process number means the same."""
    parts = [socket.gethostname()]

    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))

    return "/".join(parts)
