"""Files that are whole or absent: every file of this project is written here (law 2).

A file is written under a temporary name in its folder, forced onto the disk, and renamed.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def replaced(
    path: Path, mode: str = "wb", temporary: Path | None = None, is_forced: bool = True, **options
) -> Iterator[IO]:
    """Yield a file that takes the place of the one at path when it is whole, or not at all.

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
