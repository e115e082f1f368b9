"""Reads rows out of files: JSON, CSV, parquet and plain text, packed or not, a chunk at a time.

A row is a dict of its columns, the error that makes it unreadable, or None for a blank line. Text
to pre-train on comes as rows with a column `text`; instructions come as rows, too.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from text import blocks
from text.blocks import Block, Documents, NoTextError, Row, arrow_strings, check_columns
from text.damage import Damage
from text.errors import DataError, reported_errors
from text.local_files import UTF16_MARKS, LocalFile, decompress
from text.parquet import documents_of_column, read_parquet

# A file of plain text that is longer, in characters, is cut into several documents.
MAX_DOCUMENT = 1 << 22
# And so many characters each of these has, or more.
MIN_PIECE = 8192

# Stands behind the last line of CSV: a quote that is still open takes it in.
END_OF_CSV = "\x1e"


class Reader:
    """The rows of a file in order, a chunk at a time.

    A chunk is as many blocks as make CHUNK_SIZE, or the first that exceeds it. It depends on the
    file alone, so several processes can divide a file: each skips the chunks of the others.

    Args:
        columns: the names of the columns to read; some may be missing.
        is_text: whether rows are documents. If so, a file without a column `text` is refused, and
            malformed CSV is read as well as possible. If not, a malformed row of CSV is an error.

    Raises:
        DataError: when the file is damaged, or not what its name says.
    """

    def __init__(self, file: LocalFile, columns: Sequence[str] = ("text",), is_text: bool = True):
        self.file = file
        # Of the next chunk, and of its first row.
        self.number = 0
        self.row = 0
        self.is_finished = False
        with reported_errors(file.description):
            self.raw = open(file.path, "rb")  # noqa: SIM115
            self.content = decompress(self.raw, file.path.name)
            self.blocks = READERS[file.kind](self.content, file, columns, is_text)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.blocks.close()
        self.raw.close()

    @property
    def position(self) -> int:
        """About how many bytes of the file have been read."""
        return self.file.size if self.is_finished else min(self.raw.tell(), self.file.size)

    def chunk(self, damage: Damage) -> Iterator[Documents]:
        """Yield the documents of the next chunk; none behind the last.

        Args:
            damage: counts the rows, and those that are malformed, which are no documents.
        """
        first = self.row
        if self.file.kind == "parquet":
            for block in self.skip():
                with reported_errors(self.file.description):
                    for batch in block.batches():  # type: ignore[misc]
                        damage.num_rows += batch.num_rows
                        yield documents_of_column(batch.column("text"), first)
                        first += batch.num_rows

            return

        # Nobody chooses the encoding of the Hub's files.
        place_of_file = "" if self.file.origin else self.file.description
        found: dict[int, str] = {}
        for number, (place, row) in enumerate(self.rows(), start=first):
            try:
                if text := document_of(row):
                    damage.add_row(text, place_of_file)
                    found[number] = text
            except ValueError as error:
                damage.add_malformed(f"{self.file.description}, {place}", error)

        yield Documents(np.array([*found], dtype=np.int64), arrow_strings([*found.values()]))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the next chunk; none behind the last."""
        for block in self.skip():
            with reported_errors(self.file.description):
                yield from block.rows()

    def skip(self) -> list[Block]:
        """Return the next chunk without decoding it, which would be most of the work."""
        found, size = [], 0
        with reported_errors(self.file.description):
            while size < blocks.CHUNK_SIZE:
                block = next(self.blocks, None)
                if block is None:
                    self.is_finished = True
                    break

                found.append(block)
                size += block.size + block.num_rows * blocks.ROW_SIZE
                self.row += block.num_rows

        self.number += 1
        return found


def document_of(row: dict | ValueError | None) -> str | None:
    """Return the text of a row; None or an empty one is no document.

    Raises:
        ValueError: when the row cannot be read, or has no text.
    """
    if row is None:
        return None

    if isinstance(row, ValueError):
        raise row

    if not isinstance(row, dict) or "text" not in row:
        raise ValueError("there is no `text`")

    if not isinstance(row["text"], str | None):
        raise ValueError("`text` is no text")

    return row["text"]


def read_text(content: BinaryIO, file: LocalFile, *_) -> Generator[Block, None, None]:
    """Read plain text. Line ends of any system become those of this one, line feeds."""
    with as_text(content, file, newline=None) as text:
        head = text.read(MAX_DOCUMENT + 1)
        is_one = not file.is_cut and len(head) <= MAX_DOCUMENT
        blocks = itertools.chain([head], iter(lambda: text.read(MAX_DOCUMENT), ""))
        for number, document in enumerate([head] if is_one else cut(blocks)):
            yield block_of_one(f"document {number}", {"text": document}, len(document))


@contextlib.contextmanager
def as_text(content: BinaryIO, file: LocalFile, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """Decode a file: as UTF-16 where it is marked, else as it says; bytes that are not become �."""
    if not hasattr(content, "peek"):
        content = io.BufferedReader(content)  # type: ignore[type-var]

    is_utf16 = content.peek(2).startswith(UTF16_MARKS)
    encoding = "utf-16" if is_utf16 else file.encoding or "utf-8-sig"
    text = io.TextIOWrapper(content, encoding, errors="replace", newline=newline)
    try:
        yield text
    finally:
        # The file is closed by who opened it.
        text.detach()


def block_of_one(place: str, row: dict | ValueError | None, size: int) -> Block:
    return Block(1, size, lambda: [(place, row)])


def cut(blocks: Iterator[str], size: int = MIN_PIECE) -> Iterator[str]:
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


def read_json(
    content: BinaryIO, file: LocalFile, columns: Sequence[str], is_text: bool
) -> Generator[Block, None, None]:
    """Read an object a line, or a list of objects."""
    if not hasattr(content, "peek"):
        content = io.BufferedReader(content)  # type: ignore[type-var]

    with contextlib.ExitStack() as stack:
        lines: Iterator[bytes] = iter(content)
        if file.encoding or content.peek(2).startswith(UTF16_MARKS):
            text = stack.enter_context(as_text(content, file, newline="\n"))
            lines = (line.encode() for line in text)

        head = lines_to_first_row(lines)
        if head and decoded(head[-1]).lstrip().startswith("["):
            rows = parse_json(decoded(b"".join([*head, *lines])))
            yield Block(len(rows), 0, lambda: [(f"row {n}", row) for n, row in enumerate(rows)])
            return

        for number, line in enumerate(itertools.chain(head, lines), start=1):
            yield Block(1, len(line), functools.partial(json_rows, number, line))


def lines_to_first_row(content: Iterator[bytes]) -> list[bytes]:
    """Return the lines up to the first that is not blank."""
    lines = []
    for line in content:
        lines.append(line)
        if line.strip():
            break

    return lines


def json_rows(number: int, line: bytes) -> list[Row]:
    text = decoded(line)
    try:
        row = parse_json(text) if text.strip() else None
    except (ValueError, RecursionError):
        row = ValueError("this is no JSON")

    return [(f"line {number}", row)]


def decoded(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="replace")


def parse_json(text: str):
    # Numbers are not used, and Python refuses whole ones of thousands of digits.
    return json.loads(text, parse_int=float)


def read_csv(
    content: BinaryIO, file: LocalFile, columns: Sequence[str], is_text: bool
) -> Generator[Block, None, None]:
    csv.field_size_limit(1 << 30)
    with as_text(content, file, newline="") as lines:
        values = csv.reader(itertools.chain(lines, [END_OF_CSV]), strict=not is_text)
        names = next(values)
        check_columns(file, names if names != [END_OF_CSV] else [], is_text)
        places = {name: names.index(name) for name in columns if name in names}
        while True:
            first_line, is_open = values.line_num + 1, False
            found: list[str] = []
            try:
                found = next(values, [END_OF_CSV])
                is_open = bool(found) and found != [END_OF_CSV] and END_OF_CSV in found[-1]
            except csv.Error as error:
                is_open = str(error) == "unexpected end of data"
                if not is_open:
                    yield block_of_one(f"line {values.line_num}", ValueError(str(error)), 0)
                    continue

            if is_open:
                raise DataError(
                    f"{file.description}, line {first_line}: a quote is opened and never closed."
                )

            if found == [END_OF_CSV]:
                return

            row = csv_row(found, places, len(names) if not is_text else None)
            size = sum(map(len, filter(None, row.values()))) if isinstance(row, dict) else 0
            yield block_of_one(f"line {values.line_num}", row, size)


def csv_row(
    values: list[str], places: dict[str, int], num_values: int | None
) -> dict | ValueError | None:
    """Make a row of its values; num_values is how many it has to have, None for any."""
    if not values:
        return None

    if num_values not in (None, len(values)):
        return ValueError("it has not as many values as there are columns")

    return {
        name: with_line_feeds(values[i]) if i < len(values) else None for name, i in places.items()
    }


def with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_table(file: LocalFile, num_rows: int = 20) -> None:
    """Raise NoTextError when a table has no column `text`, or none of its first rows in JSON."""
    with Reader(file) as reader, reported_errors(file.description):
        blocks = itertools.islice(reader.blocks, num_rows)
        if file.kind != "json":
            next(blocks, None)
            return

        rows = (row for block in blocks for _, row in block.rows() if row is not None)
        found = list(itertools.islice(rows, num_rows))

    if found and not any(isinstance(row, dict) and "text" in row for row in found):
        raise NoTextError(f"{file.description} has no rows with a `text`.")


READERS: dict[str, Callable[..., Generator[Block, None, None]]] = {
    "text": read_text,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}
