"""Keeps the files that a run writes apart: from each other, from other runs, from earlier ones."""

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from system.files import lock_path, temporary_path
from system.locks import PATIENCE, HeldError, Lock
from training.arguments import Settings, UsageError
from training.checkpoint import CheckpointError, best_path, previous_path
from training.metrics import picture_path


def outputs_by_flag(settings: Settings) -> dict[str, list[Path]]:
    """Return all files that a run writes, by the flags that name them."""
    return {
        "checkpoint_path": written_by(settings.checkpoint_path),
        "metrics_path": metrics_files(settings.metrics_path),
    }


def written_by(checkpoint_path: str) -> list[Path]:
    """Return all files that a run with this --checkpoint_path writes or moves."""
    path = Path(checkpoint_path).resolve()
    files = [path, previous_path(path), best_path(path)]
    return [*files, *map(temporary_path, files), lock_path(path)]


def metrics_files(metrics_path: str) -> list[Path]:
    """Return all files that a run with this --metrics_path writes."""
    table = Path(metrics_path).resolve()
    picture = picture_path(Path(metrics_path)).resolve()
    return [table, picture, *map(temporary_path, (table, picture)), lock_path(table)]


def names_by_folder(settings: Settings) -> tuple[tuple[Path, str], ...]:
    """Return the folders that a run writes to, and a regular expression of its names in each."""
    checkpoint, table = Path(settings.checkpoint_path), Path(settings.metrics_path)
    # Also earlier files of the same name, and what is temporary.
    return tuple(
        (path.resolve().parent, rf"{re.escape(path.stem)}(\..+)?{re.escape(path.suffix)}(\..+)?")
        for path in (checkpoint, table, picture_path(table))
    )


def check_outputs(settings: Settings) -> None:
    """Raise UsageError when metrics, picture and checkpoint would overwrite each other."""
    checkpoints = written_by(settings.checkpoint_path)
    for file in metrics_files(settings.metrics_path):
        if file in checkpoints:
            raise UsageError(f"--metrics_path: {file.name} is the path of a checkpoint")


# --- Before a run writes them ---


@contextlib.contextmanager
def claimed(path: Path, flag: str) -> Iterator[Lock]:
    """Hold the lock of an output file that flag named, and prove that it can be written.

    Raises:
        CheckpointError: when it cannot be written, or another process is writing it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory")

            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(lock_output(path, flag))
            # Only under the lock: another run may be writing to this name.
            temporary_path(path).write_bytes(b"")

            # Also what a killed run has left.
            for name in (path, previous_path(path), best_path(path)):
                temporary_path(name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}. Choose another path."
            ) from error

        yield lock


def lock_output(path: Path, flag: str) -> Lock:
    """Take the lock of an output path that flag named.

    Raises:
        CheckpointError: when another process is writing it.
        OSError: when the lock cannot be written.
    """

    def report(holder: str) -> None:
        limit = f"{PATIENCE:.0f} s without a heartbeat"
        print(f"Wait:   {path} is locked by {holder}; taking over after {limit}", flush=True)

    try:
        return Lock(lock_path(path), wait=False, on_wait=report)
    except HeldError as error:
        raise CheckpointError(
            f"{path} is being written by {error}; end it, or choose another {flag}."
        ) from error


def set_aside(path: Path, *others: Path) -> Path | None:
    """Rename the files of an earlier run, out of the way of a new one.

    Args:
        path: its checkpoint; the previous and the best one go with it.
        others: further files of that run.

    Returns:
        Where the checkpoint is now; None when there was none.
    """
    if not path.exists():
        return None

    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    while stamped_path(path, stamp).exists():
        stamp += "+"

    for file in (*others, previous_path(path), best_path(path), path):
        if file.exists():
            os.replace(file, stamped_path(file, stamp))

    return stamped_path(path, stamp)


def stamped_path(path: Path, stamp: str) -> Path:
    return path.with_name(f"{path.stem}.{stamp}{path.suffix}")
