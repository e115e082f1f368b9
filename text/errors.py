"""Turns what goes wrong with data into one line for the user."""

import contextlib
import errno
from collections.abc import Iterator


class DataError(Exception):
    """Text or tokens that are missing, damaged or unfit; the message is one line for the user."""


@contextlib.contextmanager
def reported_errors(what: str) -> Iterator[None]:
    """Turn whatever is raised on damaged files, dozens of types, into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{what} cannot be read: {one_line(reason)}.") from error


def one_line(error: object, max_size: int = 240) -> str:
    """Put the message of an error into one line without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text[: max_size - 1] + "…" if len(text) > max_size else text).rstrip(".")


def is_full_disk(error: Exception) -> bool:
    """Tell whether a disk, or what a user may have of it, is full."""
    return isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    )


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot express, by question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
