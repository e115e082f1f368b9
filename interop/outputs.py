"""Claim the output of a conversion: a new folder, or a checkpoint whose earlier one is kept."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from system import files
from training.checkpoint import CheckpointError, save_checkpoint
from training.outputs import claimed, lock_output, set_aside, written_by


class ConversionError(Exception):
    """A model or an adapter that cannot be converted; the message is one line for the user."""


@contextlib.contextmanager
def new_folder(path: Path, flag: str) -> Iterator[Path]:
    """Hold the lock of a new folder while it is filled, see system.files.new_folder.

    Args:
        flag: that named it.

    Raises:
        ConversionError: when there is something at path already, or it cannot be written.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_output(path, flag), files.new_folder(path) as temporary:
            yield temporary
    except OSError as error:
        raise ConversionError(
            f"{flag}: {path} cannot be written: {error.strerror or error}. Choose another folder."
        ) from error


@contextlib.contextmanager
def new_checkpoint(path: Path, flag: str, base_path: Path | None = None) -> Iterator[Callable]:
    """Claim a checkpoint's path; yield a function that saves there and keeps an earlier one.

    Args:
        flag: that named it.
        base_path: the checkpoint that is read, which must not be written over.

    Raises:
        CheckpointError: when it cannot be written, or belongs to base_path.
    """
    if base_path and path.resolve() in written_by(str(base_path)):
        raise CheckpointError(f"{flag}: this is the path of the base model.")

    def save(state: dict) -> None:
        if aside := set_aside(path):
            print(f"Kept:   an earlier one, as {aside}")

        save_checkpoint(path, state)

    with claimed(path, flag):
        yield save
