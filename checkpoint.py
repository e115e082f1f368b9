"""Checkpoints that are whole or absent, and prove it when they are read.

A file is written under a temporary name in its folder, forced to the disk and renamed. Its last
bytes are a checksum. The last file, the one before and the best by test loss stay side by side.
"""

import errno
import hashlib
import io
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lora import merge_lora
from model import GPT
from tokenizer import ENCODING

FORMAT_VERSION = 1

ZIP_MAGIC = b"PK\x03\x04"
CHECKSUM_PREFIX = b"sha256:"
CHECKSUM_SIZE = len(CHECKSUM_PREFIX) + 64


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or of no use here; the message is one line."""


def previous_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def best_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.best{path.suffix}")


def temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def check_writable(path: Path) -> None:
    """Make the folder of an output file, and prove that a file can be written there.

    Raises:
        CheckpointError: when that cannot be.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")

        path.parent.mkdir(parents=True, exist_ok=True)
        temporary_path(path).write_bytes(b"")

        # Also what a killed run has left.
        for name in (path, previous_path(path), best_path(path)):
            temporary_path(name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Choose another path."
        ) from error


def save_checkpoint(path: Path, state: dict, is_best: bool = False) -> None:
    """Write a checkpoint that is whole or absent, and keep the previous one beside it.

    The file is a zip archive as torch.save writes it; its comment is the sha256 of all before it.

    Raises:
        CheckpointError: when it cannot be written; the files that were there are untouched.
    """
    temporary = temporary_path(path)

    try:
        with open(temporary, "w+b") as file:
            write_archive(file, state)
            append_checksum(file)
            file.flush()
            os.fsync(file.fileno())

        # In this order a kill between two moves leaves nothing that the run will not write again.
        if is_best:
            duplicate(temporary, best_path(path))

        if path.exists():
            duplicate(path, previous_path(path))

        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be saved: {error.strerror}. Earlier checkpoints are untouched;"
            " make room, then go on with --resume."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_archive(file: io.BufferedRandom, state: dict) -> None:
    """Write a state as torch.save does, and raise OSError where that hides one."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # When a write fails, closing the archive fails in turn, and that is what comes out.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None

        raise


def append_checksum(file: io.BufferedRandom) -> None:
    """Give a zip archive without a comment the sha256 of itself as its comment."""
    # The last two bytes of an archive are the length of its comment.
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", CHECKSUM_SIZE))
    file.seek(0)
    digest = hash_bytes(file)
    file.write(CHECKSUM_PREFIX + digest.encode())


def hash_bytes(file: io.BufferedIOBase, size: int | None = None) -> str:
    """Return the sha256 of the next size bytes of a file, or of all that are left."""
    digest = hashlib.sha256()
    remaining = math.inf if size is None else size

    while remaining and (chunk := file.read(int(min(1 << 24, remaining)))):
        digest.update(chunk)
        remaining -= len(chunk)

    return digest.hexdigest()


def duplicate(source: Path, target: Path) -> None:
    """Make target a second link to source, or a copy of it; at no moment is target absent."""
    temporary = temporary_path(target)
    temporary.unlink(missing_ok=True)

    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as original, open(temporary, "wb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())

    os.replace(temporary, target)
    # Renaming does nothing where both names are links to one file already.
    temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def load_checkpoint(path: Path, required: Iterable[str], is_mapped: bool = False) -> dict:
    """Read a checkpoint whose checksum is right, onto the CPU.

    Args:
        required: keys without which it is of no use here.
        is_mapped: whether tensors stay in the file until they are read, so that several processes
            have them in memory once.

    Raises:
        CheckpointError: when the file is missing, damaged, foreign, or of another kind or version.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")

    try:
        verify_checksum(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except CheckpointError:
        raise
    except Exception as error:  # the loader raises dozens of types, and advises what is unsafe
        raise CheckpointError(f"{path} is not a checkpoint of this project.") from error

    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise CheckpointError(f"{path} is not a checkpoint of this project: no format_version.")

    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {state['format_version']}, this version reads {FORMAT_VERSION};"
            " update this repository."
        )

    if missing := [key for key in required if key not in state]:
        raise CheckpointError(f"{path} is of no use here: it has no {', '.join(missing)}.")

    if "model" in state:
        state["model"] = {plain_name(name): weight for name, weight in state["model"].items()}

    return state


def plain_name(name: str) -> str:
    """Take off what wrappers for compilation and distribution put in front of a weight's name."""
    parts = name.split(".")

    return ".".join(part for part in parts if part not in ("_orig_mod", "module"))


def verify_checksum(path: Path) -> None:
    """Raise CheckpointError unless a file is a whole checkpoint."""
    other = previous_path(path)
    hint = f" {other} is there: copy it over." if other.exists() else ""

    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        magic = file.read(len(ZIP_MAGIC))

        if magic and magic != ZIP_MAGIC[: len(magic)]:
            raise CheckpointError(f"{path} is not a checkpoint.{hint}")

        content_size = max(0, size - CHECKSUM_SIZE)
        file.seek(0)
        digest = hash_bytes(file, content_size)

        if file.read() != CHECKSUM_PREFIX + digest.encode():
            raise CheckpointError(f"{path} is damaged, or not of this project.{hint}")


def build_model(state: dict, path: Path) -> GPT:
    """Build the network of a checkpoint, with its weights.

    Args:
        state: what load_checkpoint has read from path.

    Raises:
        CheckpointError: when it belongs to another tokenizer, or makes no model.
    """
    if state["encoding"] != ENCODING:
        raise CheckpointError(f"{path} was trained on {state['encoding']}, {ENCODING} is needed.")

    try:
        # Weights that are about to be replaced need not be drawn.
        with torch.device("meta"):
            model = GPT(**state["model_args"])

        model.load_state_dict(state["model"], assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} makes no model: {' '.join(str(error).split())[:200]}"
        ) from error

    check_finite(state["model"], path)

    return model


def check_finite(weights: dict[str, Tensor], path: Path) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite numbers.")


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Return a digest of named weights, by which an adapter knows its base."""
    digest = hashlib.sha256()

    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.uint8).numpy())

    return digest.hexdigest()


def merge_lora_checkpoint(model: GPT, state: dict, path: Path) -> None:
    """Add an adapter to the weights of its base.

    Args:
        state: what load_checkpoint has read from path.

    Raises:
        CheckpointError: when it was trained on another base, or does not fit.
    """
    check_base(state, fingerprint(model.state_dict()), path)
    check_finite(state["lora"], path)

    try:
        merge_lora(model, state["lora"], state["lora_args"]["alpha"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit its base model.") from error


def check_base(state: dict, base: str, path: Path) -> None:
    """Raise CheckpointError unless an adapter was trained on the base with this fingerprint."""
    if state["base"] != base:
        raise CheckpointError(
            f"{path} was trained on another base model than this; give its checkpoint, or another"
            " LoRA file."
        )
