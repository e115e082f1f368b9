"""Describes files of rows: where one is, and by its name and first bytes how it is read."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from text.errors import reported_errors, without_surrogates

SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
TEXT_SUFFIXES = (".json", ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".log", ".py")
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
        encoding: of plain text, JSON and CSV; by default UTF-8, or UTF-16 where it is marked.
    """

    path: Path
    name: str
    size: int
    kind: str
    is_cut: bool = False
    origin: str = ""
    encoding: str = ""

    @property
    def is_divisible(self) -> bool:
        """Whether several processes can divide the file: each skips the others' chunks."""
        # Packed parquet and lists in JSON are unpacked whole before anything is read.
        is_whole = self.kind == "parquet" and is_packed(self.path.name)
        return not is_whole and not is_json(self.path.name)

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
        head = decompress(raw, path.name).read(1 << 16 if is_json(path.name) else 8192)

    if is_json(path.name) and holds_rows(head):
        return "json"

    # As git does it: text holds no zero byte, unless it is UTF-16 and says so.
    return "text" if b"\0" not in head or head.startswith(UTF16_MARKS) else None


def holds_rows(head: bytes) -> bool:
    """Tell by its beginning whether JSON is a list of objects, or an object a line."""
    encoding = "utf-16" if head.startswith(UTF16_MARKS) else "utf-8-sig"
    text = head.decode(encoding, errors="replace").lstrip()
    if text.startswith("["):
        return text[1:].lstrip().startswith("{")

    line, is_line, _ = text.partition("\n")
    with contextlib.suppress(ValueError, RecursionError):
        return text.startswith("{") and (not is_line or isinstance(json.loads(line), dict))

    return False


def kind_of_name(name: str) -> str | None:
    return SUFFIXES.get(suffix_of(name))


def is_json(name: str) -> bool:
    """Tell whether the name is that of JSON, in which only some files hold rows."""
    return suffix_of(name) == ".json"


def is_file_name(name: str) -> bool:
    """Tell whether a name ends as only those of files do; a dataset may be called v1.5."""
    return is_packed(name) or suffix_of(name) in (*SUFFIXES, *TEXT_SUFFIXES)


def suffix_of(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if is_packed(name) else path.suffix


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
