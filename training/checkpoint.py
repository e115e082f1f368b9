"""Checkpoints that are whole or absent, and prove it when they are read.

A file is written under a temporary name in its folder, forced to the disk and renamed. Its last
bytes are a checksum. The last file, the one before and the best by test loss stay side by side.
"""

import contextlib
import errno
import hashlib
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from model import GPT
from system.files import duplicate, lock_path, replaced, sync, temporary_path
from system.locks import PATIENCE, HeldError, Lock
from system.memory import available_memory, num_bytes
from text.tokenizer import ENCODING
from training.lora import merge_lora

FORMAT_VERSION = 1
# What a checkpoint has to hold for its model to be built.
MODEL_KEYS = ("model_args", "model", "encoding")
# And what an adapter has to hold to be merged.
LORA_KEYS = ("lora_args", "lora", "base")

ZIP_MAGIC = b"PK\x03\x04"
# The last two bytes of a zip archive without a comment say that the comment has no bytes.
NO_COMMENT = struct.pack("<H", 0)


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or of no use here; the message is one line."""


class CheckpointWriter:
    """Writes the checkpoints of a run behind its next steps, one after the other.

    Args:
        locks: of the files of the run.
    """

    def __init__(self, path: Path, locks: Sequence[Lock] = ()):
        self.path = path
        self.locks = locks
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def save(self, state: dict, is_best: bool = False) -> None:
        """Copy a state, and leave it to be written; where memory is short, write it at once.

        Raises:
            CheckpointError: when it cannot be written, or belongs to another run.
        """
        self.check_owner()
        can_wait = can_copy(state)
        try:
            self.wait()
        except CheckpointError:
            # What was in the way may be gone; if not, that is to be known now.
            can_wait = False

        if can_wait:
            copy = copy_to_cpu(state)
            self.pending = self.executor.submit(save_checkpoint, self.path, copy, is_best)
        else:
            save_checkpoint(self.path, state, is_best)

    def check_owner(self) -> None:
        """Raise CheckpointError when another run has taken over the files of this one."""
        if not all(lock.is_held() for lock in self.locks):
            raise CheckpointError(
                f"{self.path} now belongs to another run: this run lost its lock, with no"
                f" heartbeat for {PATIENCE:.0f} s, as on a machine that sleeps."
            )

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint was not written; false as long as that is open."""
        pending = self.pending
        return bool(pending and pending.done() and pending.exception())

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            CheckpointError: when it cannot be.
        """
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def can_copy(state: dict | list) -> bool:
    """Tell whether memory holds a copy of a state, and as much again."""
    return 2 * num_bytes(state) < available_memory()


def copy_to_cpu(value):
    """Return a copy of containers of tensors that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)

    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}

    if isinstance(value, list | tuple):
        return type(value)(map(copy_to_cpu, value))

    return value


def previous_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def best_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.best{path.suffix}")


@contextlib.contextmanager
def claimed(path: Path, flag: str) -> Iterator[Lock]:
    """Hold the lock of an output file, and prove that it can be written.

    Args:
        flag: that named it.

    Raises:
        CheckpointError: when it cannot be written, or another process is writing it.
    """
    with contextlib.ExitStack() as stack:
        with reported_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "Is a directory")

            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(lock_output(path, flag))
            # Not before: another run may be writing under this name.
            temporary_path(path).write_bytes(b"")

            # Also what a killed run has left.
            for name in (path, previous_path(path), best_path(path)):
                temporary_path(name).unlink(missing_ok=True)

        yield lock


def lock_output(path: Path, flag: str) -> Lock:
    """Take the lock of an output path.

    Args:
        flag: that named it.

    Raises:
        CheckpointError: when another process is writing it.
        OSError: when the lock cannot be written.
    """

    def report(holder: str) -> None:
        silence = f"{PATIENCE:.0f} s of silence"
        print(f"Wait:   {path} is locked by {holder}; taken over after {silence}", flush=True)

    try:
        return Lock(lock_path(path), wait=False, on_wait=report)
    except HeldError as error:
        raise CheckpointError(
            f"{path} is being written by {error}; end it, or choose another {flag}."
        ) from error


@contextlib.contextmanager
def reported_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Choose another path."
        ) from error


def save_checkpoint(path: Path, state: dict, is_best: bool = False) -> None:
    """Write a checkpoint that is whole or absent, and keep the previous one beside it.

    The file is a zip archive as torch.save writes it; its comment is the CRC-32 of what it was
    without one.

    Raises:
        CheckpointError: when it cannot be written; the files that were there are untouched.
    """
    try:
        with replaced(path) as file, ThreadPoolExecutor(max_workers=1) as executor:
            write_archive(summed := SummedFile(file, executor), state)
            file.seek(-len(NO_COMMENT), os.SEEK_END)
            file.write(comment_of(summed.checksum))
            sync(file)

            # In this order a kill between two moves leaves nothing that the run will not write
            # again.
            if is_best:
                duplicate(temporary_path(path), best_path(path))

            if path.exists():
                duplicate(path, previous_path(path))
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be saved: {error.strerror}. Earlier checkpoints are untouched;"
            " make room, then go on with --resume."
        ) from error


class SummedFile:
    """A file that is written from its beginning to its end, and the CRC-32 of that.

    Args:
        executor: sums up what is being written meanwhile.
    """

    def __init__(self, file: IO[bytes], executor: ThreadPoolExecutor):
        self.file = file
        self.executor = executor
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> int:
        summing = self.executor.submit(zlib.crc32, data, self.checksum)
        written = self.file.write(data)
        self.checksum = summing.result()
        return written

    def flush(self) -> None:
        self.file.flush()


def comment_of(checksum: int) -> bytes:
    """Return the comment of a zip archive that holds its checksum, behind its length."""
    comment = f"crc32:{checksum:08x}".encode()
    return struct.pack("<H", len(comment)) + comment


def write_archive(file: SummedFile, state: dict) -> None:
    """Write a state as torch.save does, and raise OSError where that hides one."""
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # When a write fails, closing the archive fails in turn, and that is what comes out.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None

        raise


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

        remaining = max(0, size - len(comment_of(0)))
        checksum = 0
        file.seek(0)
        while chunk := file.read(min(1 << 24, remaining)):
            checksum = zlib.crc32(chunk, checksum)
            remaining -= len(chunk)

        if file.read() != comment_of(zlib.crc32(NO_COMMENT, checksum)):
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


def load_model(path: str | PathLike) -> GPT:
    """Read the network of a checkpoint, as load_checkpoint and build_model do."""
    path = Path(path)
    return build_model(load_checkpoint(path, MODEL_KEYS), path)


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
        digest.update(weight.view(torch.uint8).numpy().data)

    return digest.hexdigest()


def merge_adapter(model: GPT, path: Path, is_needed: bool) -> str | None:
    """Merge the adapter at path into its base.

    Args:
        is_needed: whether a flag named it; otherwise it may be missing, or of another base.

    Returns:
        What its prompts begin with, empty for the template's own; None when it was left out.

    Raises:
        CheckpointError: when it cannot be read, or does not fit.
    """
    if not (is_needed or path.exists()):
        return None

    state = load_checkpoint(path, LORA_KEYS)
    if not is_needed and state["base"] != fingerprint(model.state_dict()):
        print(f"Note: {path} was trained on another base model; it is left out.", file=sys.stderr)
        return None

    merge_lora_checkpoint(model, state, path)
    # Earlier versions had none.
    introduction = state.get("introduction", "")
    if not isinstance(introduction, str):
        raise CheckpointError(f"{path}: its introduction is no text.")

    return introduction


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
