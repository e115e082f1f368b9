"""What readers of files give: rows in blocks, and documents."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from text.errors import DataError, without_surrogates
from text.local_files import LocalFile

# A chunk is as many blocks as have so many characters or bytes, and these for every row: rows
# without text must fill a chunk, too.
CHUNK_SIZE = 1 << 21
ROW_SIZE = 16

# The place of a row within its file, and the row.
Row = tuple[str, dict | ValueError | None]


class NoTextError(DataError):
    """A table without a column `text`."""


class Block(NamedTuple):
    """Rows of a file that follow one another, found but not decoded.

    Args:
        size: in characters or bytes.
        rows: decodes them.
        batches: reads them as record batches of pyarrow; None where the file has none.
    """

    num_rows: int
    size: int
    rows: Callable[[], Iterable[Row]]
    batches: Callable[[], Iterable[Any]] | None = None


class Documents(NamedTuple):
    """Documents of a file, none of them empty.

    Args:
        numbers: of their rows, int64 (documents).
        texts: pyarrow.LargeStringArray (documents).
    """

    numbers: np.ndarray
    texts: Any


def check_columns(file: LocalFile, names: list[str], is_text: bool) -> None:
    """Raise NoTextError when a file of documents has no column `text`."""
    if is_text and "text" not in names:
        raise NoTextError(
            f"{file.description} has no column `text`, it has {', '.join(names[:8]) or 'none'}."
        )


def arrow_strings(texts: list[str | None]):
    """Return texts as pyarrow.LargeStringArray."""
    import pyarrow

    try:
        return pyarrow.array(texts, pyarrow.large_string())
    except UnicodeEncodeError:
        return arrow_strings([text and without_surrogates(text) for text in texts])
