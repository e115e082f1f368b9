"""Counts what cannot be read in a source, and refuses a source that is damaged as a whole."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from text.errors import DataError, one_line, without_surrogates

# What takes the place of bytes that are no text in the encoding.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Above this share the encoding is another one.
MAX_REPLACED = 0.01


@dataclass
class Damage:
    """The rows of a source that are malformed, and the characters that were no text.

    Args:
        num_rows, num_characters: of which these are a part.
        first_malformed, first_replaced: where they begin, and why.
    """

    num_rows: int = 0
    num_malformed: int = 0
    first_malformed: str = ""
    num_characters: int = 0
    num_replaced: int = 0
    first_replaced: str = ""

    def add_row(self, text: str, place: str) -> None:
        """Count a row, and its characters; those of no place are taken as they are."""
        self.num_rows += 1
        self.num_characters += len(text)
        if place and (num_replaced := text.count(REPLACEMENT)):
            self.num_replaced += num_replaced
            self.first_replaced = self.first_replaced or place

    def add_malformed(self, place: str, error: ValueError) -> None:
        self.num_rows += 1
        self.num_malformed += 1
        self.first_malformed = self.first_malformed or f"{place}: {one_line(error)}"

    def add(self, other: "Damage") -> None:
        """Add what comes later in the source."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, mine + value if isinstance(value, int) else mine or value)

    def check(self, name: str) -> None:
        """Raise DataError when most rows are malformed, or the text has another encoding."""
        if self.num_malformed * 2 >= max(1, self.num_rows):
            raise DataError(
                f"{name}: {self.num_malformed:,} of {self.num_rows:,} rows are malformed; the"
                f" first is {self.first_malformed}."
            )

        if self.num_replaced > MAX_REPLACED * self.num_characters:
            raise DataError(
                f"{name}: {self.replaced}. Name the encoding of the text, such as"
                " --text_encoding=cp1252 or gb18030."
            )

    @property
    def replaced(self) -> str:
        share = self.num_replaced / max(1, self.num_characters)
        return (
            f"{self.num_replaced:,} of {self.num_characters:,} characters ({share:.2%}) cannot be"
            f" decoded, the first in {self.first_replaced}"
        )

    def notes(self) -> Iterable[str]:
        """Yield what is to be said about a source that is read all the same."""
        if self.num_malformed:
            yield (
                f"{self.num_malformed:,} of {self.num_rows:,} rows are malformed and left out; the"
                f" first is {without_surrogates(self.first_malformed)}"
            )

        if self.num_replaced:
            yield f"{self.replaced}; they become {REPLACEMENT} (--text_encoding)"
