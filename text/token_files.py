"""Opens token files and their sidecar, and refuses them when they are damaged.

NAME-train.bin and NAME-test.bin hold token ids (uint16, little-endian, no header), end-of-text
behind every document. NAME.json describes both and is written last; without it there is no dataset.
NAME is that of the source; with a vocabulary of your own that vocabulary's stands behind it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system.files import write_whole
from text.errors import DataError
from text.tokenizer import GPT2, OWN_ENCODING, TOKEN_TYPE, Tokenizer

FORMAT_VERSION = 2
SPLITS = ("train", "test")
# The names of what lies in a folder of token files, also while they are made.
NAMES = (
    rf"(stdlib|openwebtext|.+--.+|.+-[0-9a-f]{{8}})(\.{OWN_ENCODING})?"
    r"(-(train|test)\.bin|\.(json|verified|lock|parts|finished))(\..+)?"
    r"|.+\.\d+\.vocabulary(\..+)?"
)


@dataclass(frozen=True)
class TokenDataset:
    """The token files of one source, mapped into memory.

    Args:
        name: of the source.
        train, test: token ids, uint16 (tokens).
        fingerprint: the checksum of the tokens to train on.
        tokenizer: the one that made them.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    fingerprint: str
    tokenizer: Tokenizer


def open_dataset(folder: Path, name: str, tokenizer: Tokenizer) -> TokenDataset:
    """Map the token files of a source into memory, once they are checked.

    Args:
        name: of the files.

    Raises:
        DataError: when they do not match what is written about them.
    """
    sidecar = read_sidecar(folder / f"{name}.json", tokenizer.encoding)
    verify(folder, name, sidecar, tokenizer)
    train, test = (
        # An empty file cannot be mapped.
        np.memmap(token_path(folder, name, split), dtype=TOKEN_TYPE, mode="r")
        if sidecar[split]["tokens"]
        else np.empty(0, dtype=TOKEN_TYPE)
        for split in SPLITS
    )
    source = name.removesuffix(f".{tokenizer.encoding}")
    return TokenDataset(source, train, test, sidecar["train"]["sha256"], tokenizer)


def files_name(source: str, encoding: str) -> str:
    """Return the name of the token files of a source."""
    return source if encoding == GPT2 else f"{source}.{encoding}"


def token_path(folder: Path, name: str, split: str) -> Path:
    return folder / f"{name}-{split}.bin"


def read_sidecar(path: Path, wanted: str | None = None) -> dict:
    """Read what is known about a pair of token files, and refuse what this code cannot use.

    Args:
        wanted: the encoding that they need to have; None for any.
    """
    remedy = f"delete {path} to have the dataset prepared again"
    try:
        sidecar = json.loads(path.read_text())
        version, encoding = sidecar["format_version"], sidecar["encoding"]
        if version == FORMAT_VERSION:
            [sidecar[split][key] for split in SPLITS for key in ("documents", "sha256")]
            [sidecar[split]["tokens"] + 0 for split in SPLITS]
            [sidecar[key] for key in ("source", "revision")]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; {remedy}.") from error

    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format {version}, format {FORMAT_VERSION} is read; {remedy}.")

    if encoding != (wanted or encoding):
        raise DataError(f"{path} was tokenized by {encoding}, {wanted} is needed; {remedy}.")

    return sidecar


def sidecars(folder: Path, encoding: str | None = None) -> Iterator[tuple[str, dict]]:
    """Yield the sidecars of a folder by their names, and pass over what is none.

    Args:
        encoding: that of the sidecars to yield; None yields all.
    """
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(DataError, OSError):
            yield path.stem, read_sidecar(path, encoding)


def verify(folder: Path, name: str, sidecar: dict, tokenizer: Tokenizer) -> None:
    """Compare token files with their sidecar: sizes always, contents once and after each change.

    Raises:
        DataError: when a file is missing, or its size, checksum or ids are wrong.
    """
    check_sizes(folder, name, sidecar)
    stamp_path = folder / f"{name}.verified"
    stamp = state_of(folder, name, sidecar)
    if stamp_path.exists() and stamp_path.read_bytes() == stamp:
        return

    for split in SPLITS:
        path = token_path(folder, name, split)
        digest, largest = scan(path)
        if digest != sidecar[split]["sha256"]:
            raise DataError(f"{path} is damaged; delete {name}.json to have it prepared again.")

        if largest > tokenizer.end_of_text:
            raise DataError(
                f"{path} holds token id {largest}, {tokenizer.encoding} ends at"
                f" {tokenizer.end_of_text}."
            )

    # Files on a disk that cannot be written to are read through every time.
    with contextlib.suppress(OSError):
        write_whole(stamp_path, stamp)


def check_sizes(folder: Path, name: str, sidecar: dict) -> None:
    """Raise DataError unless both token files are there in their sizes."""
    for split in SPLITS:
        path = token_path(folder, name, split)
        expected = sidecar[split]["tokens"] * TOKEN_TYPE.itemsize
        if not path.exists():
            raise DataError(f"{path} is missing; delete {name}.json to have it prepared again.")

        if (size := path.stat().st_size) != expected:
            raise DataError(
                f"{path} has {size:,} bytes where {expected:,} were written;"
                f" delete {name}.json to have it prepared again."
            )


def state_of(folder: Path, name: str, sidecar: dict) -> bytes:
    """Return checksums, sizes and times of a pair of token files: what a file changes with."""
    lines = []
    for split in SPLITS:
        status = token_path(folder, name, split).stat()
        lines.append(f"{sidecar[split]['sha256']} {status.st_size} {status.st_mtime_ns}\n")

    return "".join(lines).encode()


def scan(path: Path) -> tuple[str, int]:
    """Return the sha256 of a token file and its largest id (-1 when it is empty)."""
    digest, largest = hashlib.sha256(), -1
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype=TOKEN_TYPE).max()))

    return digest.hexdigest(), largest
