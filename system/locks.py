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
def exclusive(
    path: Path, waiting: Callable[[str], None], living: Callable[[str], None] = lambda holder: None
) -> Iterator[Callable[[], bool]]:
    """Hold the lock at path; wait while another process does, unless that one is dead.

    Args:
        waiting: is called once, with the name of the holder, before waiting.
        living: is called with that name once the holder surely is alive; what it raises ends the
            waiting.

    Yields:
        A function that tells whether the lock is held still: who is silent for long may lose it.

    Raises:
        OSError: when the lock cannot be written.
    """
    token = {
        "host": host_name(),
        "process": os.getpid(),
        "started": state_and_start(os.getpid())[1],
        "token": uuid.uuid4().hex,
    }
    acquire(path, token, waiting, living)
    stop = threading.Event()
    thread = threading.Thread(target=show_life, args=(path, token, stop), daemon=True)
    thread.start()

    try:
        # What cannot be read, or was deleted, has not been taken by anybody.
        yield lambda: read(path) in (token, None)
    finally:
        stop.set()
        thread.join()

        if read(path) == token:
            path.unlink(missing_ok=True)


def acquire(
    path: Path, token: dict, waiting: Callable[[str], None], living: Callable[[str], None]
) -> None:
    watched, since, is_told = None, 0.0, False

    while not create(path, token):
        holder, beat = read(path), last_beat(path)
        lives = is_alive(holder)

        if (holder, beat) != watched:
            lives = lives or (watched is not None and holder is not None and holder == watched[0])
            watched, since = (holder, beat), time.monotonic()

        is_silent = time.monotonic() - since > PATIENCE

        if is_dead(holder) or (is_silent and not is_alive(holder)):
            take_away(path, holder)
            continue

        if lives:
            living(describe(holder))

        if not is_told:
            waiting(describe(holder))
            is_told = True
        else:
            time.sleep(POLL)


def create(path: Path, token: dict) -> bool:
    """Create the lock unless it is there; return whether it was not."""
    try:
        file = open(path, "x")  # noqa: SIM115
    except FileExistsError:
        return False

    try:
        with file:
            json.dump(token, file)
    except OSError:
        path.unlink(missing_ok=True)
        raise

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
    """Return who holds a lock; None where that cannot be read."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return None

    return holder if isinstance(holder, dict) and {"host", "process"} <= holder.keys() else None


def last_beat(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def show_life(path: Path, token: dict, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        if read(path) == token:
            with contextlib.suppress(OSError):
                os.utime(path)


def is_dead(holder: dict | None) -> bool:
    """Tell whether a holder surely was a process of this machine and is no more."""
    if holder is None or holder["host"] != host_name():
        return False

    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False

    state, started = state_and_start(holder["process"])

    # It has ended, though nobody has asked how: in many containers nobody ever does.
    if state in ("Z", "X"):
        return True

    # Another process may have its number by now, or this one.
    has_number_only = holder.get("started") != started

    return has_number_only if started else holder["process"] == os.getpid()


def is_alive(holder: dict | None) -> bool:
    """Tell whether a holder surely is a process of this machine, working, waiting or stopped."""
    return (
        holder is not None
        and holder["host"] == host_name()
        and not is_dead(holder)
        and holder.get("started") is not None
    )


def state_and_start(process: int) -> tuple[str | None, str | None]:
    """Return the state of a process, Z for one that has ended, and when it was started.

    The time is in ticks of its machine; both are None where they are not told.
    """
    try:
        # Behind the name, which may hold anything but ends with the last bracket.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()

        return fields[0], fields[19]
    except (OSError, IndexError):
        return None, None


def describe(holder: dict | None) -> str:
    return f"process {holder['process']} on {holder['host'].split('/')[0]}" if holder else "another"


def host_name() -> str:
    """Name the machine, its last start and the container: where a process number means the same."""
    parts = [socket.gethostname()]

    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))

    return "/".join(parts)
