"""Reads parquet in record batches of pyarrow: its text goes to the tokenizer as it is."""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from text import blocks
from text.blocks import (
    Block,
    Documents,
    Row,
    arrow_strings,
    check_columns,
)
from text.errors import DataError
from text.local_files import LocalFile, is_packed

# Row groups of parquet up to this many bytes are skipped without reading them.
MAX_LAZY_GROUP = 1 << 25


def read_parquet(
    content: BinaryIO, file: LocalFile, columns: Sequence[str], is_text: bool
) -> Generator[Block, None, None]:
    import pyarrow.parquet

    if is_packed(file.path.name):
        # Its index is at the end of the file, and a packed file is read from its beginning.
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(content, unpacked)
        content = unpacked

    # Buffered by the page, so that a row group may be larger than memory.
    table = pyarrow.parquet.ParquetFile(content, buffer_size=1 << 20)
    schema = table.schema_arrow
    check_columns(file, schema.names, is_text)
    if is_text and not holds_text(kind := schema.types[schema.names.index("text")]):
        raise DataError(f"{file.description}: the column `text` holds {kind}, not text.")

    names = [name for name in schema.names if name in columns]
    first = 0
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        # Of all columns: asking a damaged file for a single one can crash the process.
        size = metadata.total_byte_size
        # A few rows at a time: they may be of 10 MB each.
        num_rows = min(1024, blocks.CHUNK_SIZE * metadata.num_rows // max(1, size)) or 1
        batches = functools.partial(table.iter_batches, num_rows, [group], names, use_threads=False)
        if size + metadata.num_rows * blocks.ROW_SIZE <= MAX_LAZY_GROUP:
            # Whoever skips it does not even read it.
            yield block_of_batches(metadata.num_rows, size, batches, first)
            first += metadata.num_rows
            continue

        for batch in batches():
            one = functools.partial(iter, [batch])
            yield block_of_batches(batch.num_rows, batch.nbytes, one, first)
            first += batch.num_rows


def block_of_batches(
    num_rows: int, size: int, batches: Callable[[], Iterable[Any]], first: int
) -> Block:
    """Make a block of record batches, of which the first row has the number first in its file."""

    def rows() -> Iterator[Row]:
        numbers = itertools.count(first)
        for batch in batches():
            columns = {name: column_values(batch.column(name)) for name in batch.schema.names}
            for i in range(batch.num_rows):
                row = {name: values[i] for name, values in columns.items()}
                yield f"row {next(numbers)}", row

    return Block(num_rows, size, rows, batches)


def column_values(column) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [
            None if text is None else text.decode("utf-8", errors="replace")
            for text in column.cast("string").cast("binary").to_pylist()
        ]


def documents_of_column(column, first: int) -> Documents:
    """Return the documents of a column of text, whose first row has the number first."""
    import pyarrow
    import pyarrow.compute

    try:
        texts = column.cast(pyarrow.large_string())
        texts.validate(full=True)
    except pyarrow.ArrowInvalid:
        texts = arrow_strings(column_values(column))

    # Nulls have no length.
    numbers = np.flatnonzero(pyarrow.compute.binary_length(texts).fill_null(0))
    if len(numbers) < len(texts):
        texts = texts.take(pyarrow.array(numbers))

    return Documents(first + numbers, texts)


def holds_text(kind) -> bool:
    """Tell whether a type of pyarrow is text, however it is stored."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type

    # A column of nothing but nulls has no type.
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_null(kind)
        or str(kind) == "string_view"
    )
