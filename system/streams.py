"""Standard output and error that end no work: where nobody reads them, what is written is dropped.

A run of days outlives the terminal, the pipe or the disk that its lines go to.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm


class SteadyStream:
    """A text stream; from its first failure on it drops what is written.

    Args:
        name: what a note calls it; without a name there is no note.
    """

    def __init__(self, stream: TextIO, name: str = ""):
        self.stream = stream
        self.name = name

    def write(self, text: str) -> int:
        with self.dropped():
            self.stream.write(text)

        return len(text)

    def flush(self) -> None:
        with self.dropped():
            self.stream.flush()

    @contextlib.contextmanager
    def dropped(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # What Python still holds for it goes nowhere, too.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

            if self.name:
                reason = getattr(error, "strerror", None) or error
                tqdm.write(f"Note:   no more on {self.name}: {reason}", file=sys.stderr)

            self.name = ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Let standard output and error fail without an error."""
    output, errors = SteadyStream(sys.stdout, "standard output"), SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # type: ignore[type-var]
        try:
            yield
        finally:
            output.flush()
            errors.flush()


def open_closed_streams() -> None:
    """Open the standard streams that were closed at the start; they lead nowhere.

    Otherwise the next file that is opened gets their number, and what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode))  # noqa: SIM115
