"""Writes and reads checkpoints: each is whole or absent, and its checksum proves it.

`save_checkpoint` writes a file by `system.files.replaced`: temporary name, fsync, rename. Its last
bytes are a checksum. The latest file, the previous one and the best by test loss stay side by side.
"""

import hashlib
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from model import GPT
from system.files import duplicate, replaced, sync, temporary_path
from system.locks import PATIENCE, Lock
from system.memory import available_memory, map_tensors, num_bytes
from text.errors import DataError
from text.tokenizer import Tokenizer, load_tokenizer
from training.lora import merge_lora

FORMAT_VERSION = 1
# The keys that build_model needs.
MODEL_KEYS = ("model_args", "model", "encoding")
# The keys that merge_adapter needs.
LORA_KEYS = ("lora_args", "lora", "base")

ZIP_MAGIC = b"PK\x03\x04"
# The last two bytes of a zip archive without a comment say that the comment has no bytes.
NO_COMMENT = struct.pack("<H", 0)


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of the wrong kind; the message is one line."""


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, one after the other."""

    def __init__(self, path: Path, locks: Sequence[Lock] = ()):
        self.path = path
        self.locks = locks
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.pending: Future | None = None

    def save(self, state: dict, is_best: bool = False) -> None:
        """Copy a state and write the copy in the background; without memory for it, write at once.

        Raises:
            CheckpointError: when it cannot be written, or belongs to another run.
        """
        self.check_owner()
        can_wait = can_copy(state)
        try:
            self.wait()
        except CheckpointError:
            # The cause may be gone by now; if not, the run has to know at once.
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
        """Whether the last write has failed; false while it is under way."""
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
    """Tell whether memory has room for two copies of a state."""
    return 2 * num_bytes(state) < available_memory()


def copy_to_cpu(value):
    """Copy tensors, in containers of any depth, to the CPU; later steps do not change the copy."""
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)


def previous_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def best_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.best{path.suffix}")


def save_checkpoint(path: Path, state: dict, is_best: bool = False) -> None:
    """Write a checkpoint that is whole or absent, and keep the previous one beside it.

    The file is the zip archive that torch.save writes. The comment of the archive is the CRC-32 of
    all bytes before it.

    Raises:
        CheckpointError: when it cannot be written; the files that were there are untouched.
    """
    try:
        with replaced(path) as file, ThreadPoolExecutor(max_workers=1) as executor:
            write_archive(summed := ChecksumFile(file, executor), state)
            file.seek(-len(NO_COMMENT), os.SEEK_END)
            file.write(checksum_comment(summed.checksum))
            sync(file)

            # In this order a kill between two steps loses nothing: the run writes it again.
            if is_best:
                duplicate(temporary_path(path), best_path(path))

            if path.exists():
                duplicate(path, previous_path(path))
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be saved: {error.strerror}. Earlier checkpoints are untouched;"
            " free some space, then continue with --resume."
        ) from error


class ChecksumFile:
    """A file that is written front to back, and the CRC-32 of its bytes.

    Args:
        executor: computes the checksum while the bytes are being written.
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


def checksum_comment(checksum: int) -> bytes:
    """Return the end of an archive: the length of its comment, then the checksum as comment."""
    comment = f"crc32:{checksum:08x}".encode()
    return struct.pack("<H", len(comment)) + comment


def write_archive(file: ChecksumFile, state: dict) -> None:
    """Write a state by torch.save; raise the OSError that torch.save hides in a RuntimeError."""
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        # When a write fails, closing the archive fails too, and torch raises that second error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None

        raise


def load_checkpoint(path: Path, required: Iterable[str], is_mapped: bool = False) -> dict:
    """Read a checkpoint whose checksum is right, onto the CPU.

    Args:
        required: the keys that it has to hold.
        is_mapped: whether tensors stay in the file until they are read; processes then share one
            copy in memory.

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
        raise CheckpointError(
            f"{path} is another kind of checkpoint: it has no {', '.join(missing)}."
        )

    if "model" in state:
        state["model"] = {plain_name(name): weight for name, weight in state["model"].items()}

    return state


def plain_name(name: str) -> str:
    """Remove the prefixes that torch.compile and DistributedDataParallel add to a weight's name."""
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

        remaining = max(0, size - len(checksum_comment(0)))
        checksum = 0
        file.seek(0)
        while chunk := file.read(min(1 << 24, remaining)):
            checksum = zlib.crc32(chunk, checksum)
            remaining -= len(chunk)

        if file.read() != checksum_comment(zlib.crc32(NO_COMMENT, checksum)):
            raise CheckpointError(f"{path} is damaged, or not of this project.{hint}")


def build_model(state: dict, path: Path) -> GPT:
    """Build the network of a checkpoint that was read from path, with its weights.

    Raises:
        CheckpointError: when it describes no valid model.
    """
    try:
        # On the meta device no weights are drawn, as the next line replaces them.
        with torch.device("meta"):
            model = GPT(**state["model_args"])

        model.load_state_dict(state["model"], assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not describe a valid model: {' '.join(str(error).split())[:200]}"
        ) from error

    check_finite(state["model"], path)
    return model


def read_tokenizer(state: dict, path: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint, which carries a vocabulary other than GPT-2's.

    Args:
        state: what load_checkpoint has read from path.

    Raises:
        CheckpointError: when it is damaged, or not that of the model.
    """
    try:
        tokenizer = load_tokenizer(state["encoding"], state.get("vocabulary"))
    except DataError as error:
        raise CheckpointError(f"{path}: {error}.") from error

    size = state["model_args"].get("vocabulary_size")
    if size != tokenizer.vocabulary_size:
        raise CheckpointError(
            f"{path} has {size} tokens, the {tokenizer.vocabulary_size} of {tokenizer.encoding} are"
            " needed."
        )

    return tokenizer


def vocabulary_state(tokenizer: Tokenizer) -> dict:
    """Return the entries of a checkpoint that read_tokenizer needs."""
    vocabulary = {"vocabulary": tokenizer.ranks} if tokenizer.is_own else {}
    return {"encoding": tokenizer.encoding, **vocabulary}


def load_model(path: str | PathLike) -> GPT:
    """Read the network of a checkpoint."""
    return load_model_and_tokenizer(path)[0]


def load_model_and_tokenizer(path: str | PathLike) -> tuple[GPT, Tokenizer]:
    """Read the network of a checkpoint, and its tokenizer.

    Raises:
        CheckpointError: as load_checkpoint, build_model and read_tokenizer.
    """
    path = Path(path)
    state = load_checkpoint(path, MODEL_KEYS)
    return build_model(state, path), read_tokenizer(state, path)


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
        print(f"Note: {path} was trained on another base model; it is ignored.", file=sys.stderr)
        return None

    merge_lora_checkpoint(model, state, path)
    # Earlier versions had none.
    introduction = state.get("introduction", "")
    if not isinstance(introduction, str):
        raise CheckpointError(f"{path}: its introduction is no text.")

    return introduction


def merge_lora_checkpoint(model: GPT, state: dict, path: Path) -> None:
    """Add an adapter that was read from path to the weights of its base.

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
            f"{path} was trained on another base model than this; give that model's checkpoint, or"
            " another LoRA file."
        )
