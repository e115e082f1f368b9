"""Describes files of rows: where one is, and by its name and first bytes how it is read."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from text.errors import reported_errors
from text.tokenizer import without_surrogates

SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class LocalFile:
    """A file of rows.

    Args:
        name: identifies a document together with its row, wherever the source lies.
        size: in bytes, as stored.
        kind: text, json (a row a line), csv or parquet.
        is_cut: whether plain text is many documents, and not one.
        origin: what messages call it; by default its path.
    """

    path: Path
    name: str
    size: int
    kind: str
    is_cut: bool = False
    origin: str = ""

    @property
    def is_divisible(self) -> bool:
        """Whether several processes can divide the file: each skips the others' chunks."""
        # Packed parquet has to be unpacked whole before anything is read.
        return self.kind != "parquet" or not is_packed(self.path.name)

    @contextlib.contextmanager
    def on_disk(self, _: Path) -> Iterator["LocalFile"]:
        """Yield the file itself; a file of the Hub is downloaded for it."""
        yield self

    @property
    def description(self) -> str:
        return self.origin or without_surrogates(str(self.path))


@dataclass(frozen=True)
class Listing:
    """The files of a source, and a revision that changes whenever they do."""

    files: tuple
    revision: str

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def kind_of(path: Path) -> str | None:
    """Return how a file is read: by its name, or text by its first bytes; None for other files."""
    if kind := kind_of_name(path.name):
        return kind

    with reported_errors(without_surrogates(str(path))), open(path, "rb") as raw:
        head = decompress(raw, path.name).read(8192)

    # As git does it: text holds no zero byte, unless it is UTF-16 and says so.
    return "text" if b"\0" not in head or head.startswith(UTF16_MARKS) else None


def kind_of_name(name: str) -> str | None:
    path = Path(name.lower())
    return SUFFIXES.get(Path(path.stem).suffix if is_packed(name) else path.suffix)


def is_packed(name: str) -> bool:
    return Path(name).suffix.lower() in (*COMPRESSIONS, ".zst")


def decompress(file: BinaryIO, name: str) -> BinaryIO:
    """Decompress a file as the suffix of its name says."""
    suffix = Path(name).suffix.lower()
    if suffix in COMPRESSIONS:
        return COMPRESSIONS[suffix](file)

    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))

    return file
