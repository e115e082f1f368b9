"""Where text comes from: files of your own, the standard library, and what both are read by.

A source is a list of files. A file is a sequence of rows, and a row is one document or none.
"""

import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from text.tokenizer import DataError, without_surrogates

SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NOT_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

# Parquet is read by its row groups, where they are no larger than this many bytes.
MAX_LAZY_GROUP = 1 << 25

# Plain text of more characters than this is cut into documents even where a file is one document.
MAX_DOCUMENT = 1 << 22


@dataclass(frozen=True)
class LocalFile:
    """A file of a source.

    Args:
        name: with its row, the place of a document: the same wherever the source lies.
        size: in bytes, as stored.
        kind: text, json (a row a line), csv or parquet.
        is_cut: whether plain text is many documents, and not one.
    """

    path: Path
    name: str
    size: int
    kind: str
    is_cut: bool = False

    @property
    def is_divisible(self) -> bool:
        """Tell whether several processes may read it, each on its own way through."""
        # To be read at all, packed parquet has to be unpacked whole.
        return self.kind != "parquet" or not is_packed(self.path.name)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def check(self, _: BinaryIO) -> None:
        """Do nothing: a disk gives what it holds, or an error."""

    @property
    def description(self) -> str:
        return without_surrogates(str(self.path))


@dataclass(frozen=True)
class Listing:
    """The files of a source, and a text that is another one when they are."""

    files: tuple
    revision: str

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class TextFiles:
    """Your own text: a file, or all that is text below a folder, in sorted order.

    Args:
        excluded: folders that are passed over, such as those that a run writes to.
    """

    path: Path
    excluded: tuple[Path, ...] = ()
    is_hub = False

    @property
    def name(self) -> str:
        # Two folders of one name must not share their token files.
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        stem = without_surrogates(self.path.resolve().stem[:60])

        return f"{stem or 'root'}-{digest[:8]}"

    @property
    def description(self) -> str:
        return without_surrogates(str(self.path.resolve()))

    def is_read(self, name: str) -> bool:
        """Tell whether a file or folder of this name is looked at."""
        return not name.startswith(".")

    def paths(self) -> list[Path]:
        """Return the files, also those behind links, each once.

        Raises:
            OSError: when a folder cannot be read.
        """
        if self.path.is_file():
            return [self.path]

        excluded = {path.resolve() for path in self.excluded} - {self.path.resolve()}
        found, seen = [], set()

        def stop(error: OSError) -> None:
            raise error

        for folder, folders, files in os.walk(self.path, onerror=stop, followlinks=True):
            place = Path(folder).resolve()

            if place in seen or place in excluded:
                folders.clear()
                continue

            seen.add(place)
            folders[:] = filter(self.is_read, folders)
            found += (Path(folder, name) for name in filter(self.is_read, files))

        return sorted(path for path in found if path.is_file())

    def revision(self) -> str:
        """Return number, size and a digest of names and times of the files, to notice a change."""
        digest, size = hashlib.sha256(), 0

        with reported_errors(self.description):
            paths = self.paths()

            for path in paths:
                status = path.stat()
                size += status.st_size
                digest.update(os.fsencode(path.relative_to(self.path)))
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())

        return f"{len(paths):,} files, {size:,} bytes, state {digest.hexdigest()[:16]}"

    def listing(self, _: str | None = None) -> Listing:
        """Tell which files are read, and how; say which are passed over.

        Raises:
            DataError: when a file cannot be read, or is one and no text.
        """
        revision = self.revision()
        files, foreign = [], []

        with reported_errors(self.description):
            sizes = {path: path.stat().st_size for path in self.paths()}

        for path, size in sizes.items():
            kind = kind_of(path) if size else None

            if kind:
                name = path.relative_to(self.path).as_posix()
                files.append(LocalFile(path, name, size, kind, is_cut=path == self.path))
            elif size:
                foreign.append(without_surrogates(path.name))

        if foreign and self.path.is_file():
            raise DataError(f"{self.description} is not text.")

        if foreign:
            names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            print(f"Note:   {len(foreign)} files in {self.description} are not text: {names}")

        return Listing(tuple(files), revision)


class StandardLibrary(TextFiles):
    """The standard library of the running interpreter without its tests, a document per module."""

    name = "stdlib"

    def __init__(self):
        super().__init__(Path(sysconfig.get_path("stdlib")))

    @property
    def description(self) -> str:
        return f"standard library of Python {sys.version.split()[0]}"

    def is_read(self, name: str) -> bool:
        return name not in NOT_MODULES

    def paths(self) -> list[Path]:
        return [path for path in super().paths() if path.suffix == ".py"]


def kind_of(path: Path) -> str | None:
    """Tell by its name how a file is read, or that it is text by its first bytes; None if not."""
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


UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decompress(file: BinaryIO, name: str) -> BinaryIO:
    """Return what a file holds, by the suffix of its name."""
    suffix = Path(name).suffix.lower()

    if suffix in COMPRESSIONS:
        return COMPRESSIONS[suffix](file)

    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))

    return file


class Block(NamedTuple):
    """Rows of a file that follow one another, found but not decoded.

    Args:
        size: in characters or bytes.
        texts: yields the text of each row; None or an empty one is no document.
    """

    num_rows: int
    size: int
    texts: Callable[[], Iterable[str | None]]


class Reader:
    """The rows of a file in order, a chunk at a time.

    A chunk is as many blocks as make CHUNK_SIZE, or the first that exceeds it. It depends on the
    file alone, so that several processes can divide a file, each on its own way through.

    Raises:
        DataError: when the file is damaged, or not what its name says.
    """

    CHUNK_SIZE = 1 << 21
    # What a row counts beside its text: also rows without one have to come to an end.
    ROW_SIZE = 16

    def __init__(self, file):
        self.file = file
        # Of the next chunk, and of its first row.
        self.number = 0
        self.row = 0
        self.is_finished = False

        with self.reported_errors():
            self.raw = file.open()
            # Kept here: what is collected closes the file below it.
            self.buffered = self.raw

            if isinstance(self.raw, io.RawIOBase):
                self.buffered = io.BufferedReader(self.raw, 1 << 20)

            self.content = decompress(self.buffered, file.path.name)
            self.blocks = READERS[file.kind](self.content, file)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.blocks.close()
        self.raw.close()

    @property
    def position(self) -> int:
        """How many of the file's bytes have been read, about."""
        return self.file.size if self.is_finished else min(self.raw.tell(), self.file.size)

    def chunk(self) -> Iterator[tuple[int, str | None]]:
        """Yield the texts of the next rows, each with its number; none behind the last."""
        number = self.row

        for block in self.skip():
            with self.reported_errors():
                for text in block.texts():
                    yield number, text
                    number += 1

    def skip(self) -> list[Block]:
        """Return the next chunk as it is; most of the work is to decode it."""
        blocks, size = [], 0

        with self.reported_errors():
            while size < self.CHUNK_SIZE:
                block = next(self.blocks, None)

                if block is None:
                    self.file.check(self.raw)
                    self.is_finished = True
                    break

                blocks.append(block)
                size += block.size + block.num_rows * self.ROW_SIZE
                self.row += block.num_rows

        self.number += 1

        return blocks

    @contextlib.contextmanager
    def reported_errors(self) -> Iterator[None]:
        with reported_errors(self.file.description):
            try:
                yield
            except DataError:
                raise
            except Exception:
                # It may be that it only came to us damaged.
                if hasattr(self, "raw"):
                    self.file.check(self.raw)

                raise


@contextlib.contextmanager
def reported_errors(what: str) -> Iterator[None]:
    """Turn whatever readers raise on damaged files, dozens of types, into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error

        raise DataError(f"{what} cannot be read: {one_line(reason)}.") from error


def read_text(content: BinaryIO, file) -> Iterator[Block]:
    """Read plain text, UTF-8 (bytes that are not become �) or UTF-16 where it is marked.

    Line ends of any system become those of this one, line feeds.
    """
    if not hasattr(content, "peek"):
        content = io.BufferedReader(content)

    is_utf16 = content.peek(2).startswith(UTF16_MARKS)
    text = io.TextIOWrapper(content, "utf-16" if is_utf16 else "utf-8-sig", errors="replace")

    try:
        head = text.read(MAX_DOCUMENT + 1)

        if not file.is_cut and len(head) <= MAX_DOCUMENT:
            yield text_block(head)
            return

        blocks = iter(lambda: text.read(MAX_DOCUMENT), "")

        yield from map(text_block, cut(itertools.chain([head], blocks)))
    finally:
        text.detach()


def text_block(text: str | None) -> Block:
    return Block(1, len(text or ""), lambda: [text])


def cut(blocks: Iterator[str], size: int = 8192) -> Iterator[str]:
    """Cut a long text into documents of size characters or more, at blank lines if it has any.

    A lone file has to give both text to train on and text to test on.
    """
    rest = ""

    for block in blocks:
        lines = (rest + block).splitlines(keepends=True)
        # The last line may go on in the next block.
        rest = lines.pop() if lines and len(lines[-1]) < MAX_DOCUMENT else ""
        document = ""

        for line in lines:
            document += line

            if len(document) >= (2 * size if line.strip() else size):
                yield document
                document = ""

        rest = document + rest

    yield rest


def read_json(content: BinaryIO, file) -> Iterator[Block]:
    """Read an object a line; blank lines are rows without a text."""
    for number, line in enumerate(content, start=1):
        yield Block(1, len(line), functools.partial(json_texts, file, number, line))


def json_texts(file, number: int, line: bytes) -> list[str | None]:
    if not line.strip():
        return [None]

    place = f"{file.description}, line {number}"

    try:
        # Of numbers nothing is wanted, and those of thousands of digits are no whole ones.
        row = json.loads(line.decode("utf-8-sig", errors="replace"), parse_int=float)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: this is no JSON ({error}).") from error

    if not isinstance(row, dict) or "text" not in row:
        raise DataError(f"{place}: there is no `text`.")

    if not isinstance(row["text"], str | None):
        raise DataError(f"{place}: `text` is no text.")

    return [row["text"]]


def read_csv(content: BinaryIO, file) -> Iterator[Block]:
    csv.field_size_limit(1 << 30)
    lines = io.TextIOWrapper(content, "utf-8-sig", errors="replace", newline="")

    try:
        rows = csv.reader(lines)
        column = column_of(file, next(rows, []))

        for row in rows:
            yield text_block(row[column] if column < len(row) else None)
    finally:
        lines.detach()


def read_parquet(content: BinaryIO, file) -> Iterator[Block]:
    import pyarrow.parquet

    if is_packed(file.path.name):
        # Its contents are at the end of the file, and a packed one is read from its beginning.
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(content, unpacked)
        content = unpacked

    # Buffered by the page, so that a row group may be larger than memory.
    table = pyarrow.parquet.ParquetFile(content, buffer_size=1 << 20)
    schema = table.schema_arrow
    kind = schema.types[column_of(file, schema.names)]

    if not is_text(kind):
        raise DataError(f"{file.description}: the column `text` holds {kind}, not text.")

    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        # Of all columns: to ask for a single one of a damaged file may end the process.
        size = metadata.total_byte_size

        if size + metadata.num_rows * Reader.ROW_SIZE <= MAX_LAZY_GROUP:
            # Who passes over it need not even read it.
            yield Block(metadata.num_rows, size, functools.partial(group_texts, table, group))
            continue

        for column in group_columns(table, group):
            yield Block(len(column), column.nbytes, functools.partial(column_texts, column))


def is_text(kind) -> bool:
    """Tell whether a type of pyarrow is text, however it is stored."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type

    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def group_columns(table, group: int) -> Iterator:
    """Yield the texts of a row group a few at a time: they may be of 10 MB each."""
    for batch in table.iter_batches(16, [group], ["text"], use_threads=False):
        yield batch.column(0)


def group_texts(table, group: int) -> Iterator[str | None]:
    for column in group_columns(table, group):
        yield from column_texts(column)


def column_texts(column) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [
            None if text is None else text.decode("utf-8", errors="replace")
            for text in column.cast("string").cast("binary").to_pylist()
        ]


def column_of(file, names: list[str]) -> int:
    """Return the place of the column `text`."""
    if "text" not in names:
        raise DataError(
            f"{file.description} has no column `text`, it has {', '.join(names[:8]) or 'none'}."
        )

    return names.index("text")


READERS: dict[str, Callable[[BinaryIO, LocalFile], Iterator[Block]]] = {
    "text": read_text,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}


def one_line(error: object, max_size: int = 240) -> str:
    """Put the message of an error into one line without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__

    return (text[: max_size - 1] + "…" if len(text) > max_size else text).rstrip(".")
