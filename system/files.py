"""Writes files and folders that are whole or absent (law 2 in CONTRIBUTING.md).

Each is written under a temporary name in the same folder, forced onto the disk, and renamed.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# A file in a folder that is being filled: leftovers of a killed run can be recognised.
MARK = ".incomplete"


def temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def replaced(
    path: Path, mode: str = "wb", temporary: Path | None = None, is_forced: bool = True, **options
) -> Iterator[IO]:
    """Yield a file to write; it replaces the one at path when the block ends without an error.

    Args:
        mode, options: as for open.
        temporary: the name meanwhile; by default temporary_path(path).
        is_forced: whether it is to survive a power failure.

    Raises:
        OSError: when it cannot be written; what was at path is untouched.
    """
    temporary = temporary or temporary_path(path)
    try:
        with open(temporary, mode, **options) as file:
            yield file
            if is_forced:
                sync(file)

        os.replace(temporary, path)
        if is_forced:
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

        raise


def write_whole(path: Path, content: bytes, is_forced: bool = True) -> None:
    """Write a small file, as replaced does; several processes may do so at a time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with replaced(path, temporary=temporary, is_forced=is_forced) as file:
        file.write(content)


def duplicate(source: Path, target: Path) -> None:
    """Make target a second link to source, or a copy of it; at no moment is target absent."""
    temporary = temporary_path(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original, replaced(target) as copy:
            shutil.copyfileobj(original, copy)

        return

    os.replace(temporary, target)
    # Renaming does nothing where both names are links to one file already.
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when it is whole, or never.

    Only one process at a time may do so: the caller holds a lock.

    Raises:
        OSError: when it cannot be written, or something else is there.
    """
    temporary = temporary_path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "it is there already")

    remove_left_over(temporary)
    temporary.mkdir()
    try:
        (temporary / MARK).touch()
        yield temporary
        (temporary / MARK).unlink()
        # Some libraries write files that only their owner can read.
        mode = temporary.stat().st_mode & 0o666
        for name in temporary.iterdir():
            name.chmod(mode)
            with open(name, "rb") as file:
                sync(file)

        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_over(folder: Path) -> None:
    """Remove a folder that a killed run was filling, and no other one."""
    if not folder.exists():
        return

    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).exists()):
        raise FileExistsError(errno.EEXIST, f"{folder.name} is in the way; remove it")

    shutil.rmtree(folder)


def sync(file: IO) -> None:
    """Force what was written to a file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
