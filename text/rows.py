"""Loads instructions and answers from files, the Hub or the standard library, and splits them.

A source yields rows with their places. A row that cannot be read is the error that says why.
"""

import ast
import collections
import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from text.blocks import Row
from text.errors import DataError, one_line, reported_errors, without_surrogates
from text.hub import HubDataset
from text.instructions import COLUMNS, Example, encode_turns, turns_of
from text.local_files import LocalFile, is_file_name, is_json, kind_of_name
from text.readers import Reader
from text.sources import StandardLibrary
from text.tokenizer import Tokenizer

# The share of the rows that is set aside to test on.
TEST_SHARE = 0.1


@dataclass(frozen=True)
class RowFile:
    """A .json, .jsonl, .csv or .parquet file of your own, packed or not."""

    path: Path

    @property
    def description(self) -> str:
        return without_surrogates(str(self.path.resolve()))

    def rows(self) -> Iterator[Row]:
        """Yield all rows.

        Raises:
            DataError: when the file is damaged, or not what its name says.
        """
        kind = kind_of_rows(self.path.name) or "json"
        with reported_errors(self.description):
            file = LocalFile(self.path, self.path.name, self.path.stat().st_size, kind)

        with Reader(file, COLUMNS, is_text=False) as reader:
            while not reader.is_finished:
                yield from ((place, row) for place, row in reader.rows() if row is not None)


class StandardLibraryFunctions:
    """Functions of the running interpreter's standard library that say what they do.

    The instruction is a signature with the first paragraph of its documentation, the answer the
    function's source without that documentation. The signature comes first: a small model finds a
    name best where it always stands. Long functions would fit no small context.
    """

    MAX_SIZE = 300
    description = "functions of the standard library"

    def rows(self) -> Iterator[Row]:
        library = StandardLibrary()
        for path in library.paths():
            source = path.read_bytes().decode("utf-8", errors="replace").lstrip("\N{BOM}")
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue

            place = path.relative_to(library.path).as_posix()
            for node, owner in functions_of(tree):
                row = row_of_function(node, owner, source)
                if row and len(row["output"]) <= self.MAX_SIZE:
                    yield f"{place}, line {node.lineno}", row


@dataclass(frozen=True)
class HubRows:
    """The split `train` of a dataset on the Hub."""

    dataset: HubDataset

    @property
    def description(self) -> str:
        return self.dataset.description

    def rows(self) -> Iterator[Row]:
        for number, row in enumerate(self.dataset.rows(COLUMNS)):
            yield f"row {number}", row


RowSource = RowFile | StandardLibraryFunctions | HubRows


def parse_row_source(value: str) -> RowSource:
    """Read `--dataset` of fine-tuning.

    Raises:
        ValueError: when it names no source.
    """
    if value == "alpaca":
        return HubRows(HubDataset("tatsu-lab/alpaca", name="alpaca"))

    if value == "stdlib":
        return StandardLibraryFunctions()

    path = Path(value)
    try:
        is_file, is_there = path.is_file(), bool(value) and path.exists()
    except OSError as error:
        raise ValueError(f"{value[:80]} cannot be read: {error.strerror}") from None

    if is_file and kind_of_rows(path.name):
        return RowFile(path)

    if is_there:
        raise ValueError(f"{value} is no .json, .jsonl, .csv or .parquet file")

    if is_file_name(path.name):
        raise ValueError(f"there is no file {value}")

    if dataset := HubDataset.parse(value):
        return HubRows(dataset)

    raise ValueError(
        f"{value or 'nothing'} is neither alpaca, stdlib, a file that is there, nor owner/name"
    )


def kind_of_rows(name: str) -> str | None:
    return "json" if is_json(name) else kind_of_name(name)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Yield the functions of a module, and those of its classes with the name of the class."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node, ""
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, Function):
                    yield child, node.name


def row_of_function(node: Function, owner: str, source: str) -> dict | None:
    """Return the row of a function; None without documentation, or without more than that."""
    documentation = ast.get_docstring(node)
    if not documentation or len(node.body) < 2:
        return None

    lines = source.splitlines()
    first, last = node.body[0].lineno, node.body[0].end_lineno
    # Decorators stand above the line that the function has.
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = [*lines[begin - 1 : first - 1], *lines[last : node.end_lineno]]
    if first == node.lineno or not documentation.strip():
        return None

    paragraph = " ".join(documentation.split("\n\n")[0].split())
    suffix = f" (a method of {owner})" if owner else ""
    return {
        "instruction": f"{node.name}({ast.unparse(node.args)}): {paragraph}{suffix}",
        "output": dedent("\n".join(kept)),
    }


def dedent(text: str) -> str:
    """Take the indentation of the first line off all lines that have it."""
    indentation = text[: len(text) - len(text.lstrip())]
    return "\n".join(line.removeprefix(indentation) for line in text.splitlines())


@dataclass
class Examples:
    """The rows of a source as a model sees them.

    Args:
        notes: what became of the rows that are not among them, a line each.
        introduction: what most rows begin with; empty for the one of the template.
    """

    train: list[Example]
    test: list[Example]
    notes: list[str]
    introduction: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all tokens and targets, by which a resumed run knows its data."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.test):
            digest.update(f"{len(example.tokens)} ".encode())
            digest.update(example.tokens.data)
            digest.update(example.is_target.data)

        return digest.hexdigest()


def load_examples(
    source: RowSource, tokenizer: Tokenizer, block_size: int, mask_input: bool
) -> Examples:
    """Read and tokenize a source, and set a tenth of its rows aside to test on.

    Which rows those are is decided by a hash of their places alone.

    Raises:
        DataError: when the source cannot be read, or has not one row for each of the two.
    """
    kept: list[tuple[float, Example]] = []
    malformed, empty, cut, unanswered = [], [], [], []
    introductions: collections.Counter[str] = collections.Counter()
    for place, row in source.rows():
        try:
            if isinstance(row, ValueError):
                raise row

            turns = turns_of(row)
        except ValueError as error:
            malformed.append(f"{place}: {error}")
            continue

        if not all(turn.answer.strip() for turn in turns):
            empty.append(place)
            continue

        example = encode_turns(turns, tokenizer, block_size, mask_input)
        prompt = turns[0].prompt
        if example.is_cut and len(example.tokens) <= len(tokenizer.encode(prompt)):
            unanswered.append(place)
            continue

        if example.is_cut:
            cut.append(place)

        kept.append((share_of(place), example))
        introductions[turns[0].introduction] += 1

    notes = [
        *note(malformed, "are malformed and left out"),
        *note(empty, "have an empty answer and are left out"),
        *note(unanswered, f"have no room for an answer in {block_size} tokens and are left out"),
        *note(cut, f"are cut at {block_size} tokens"),
    ]
    if len(kept) < 2:
        reasons = "".join(f"; {note}" for note in notes)
        raise DataError(
            f"{source.description} has {len(kept)} rows to train and test on, 2 are"
            f" needed{reasons}."
        )

    # A source of a few rows has one to test on, and one to train on, all the same.
    smallest, *_, largest = sorted(share for share, _ in kept)
    limit = min(max(TEST_SHARE, math.nextafter(smallest, 1)), largest)
    return Examples(
        [example for share, example in kept if share >= limit],
        [example for share, example in kept if share < limit],
        notes,
        without_surrogates(introductions.most_common(1)[0][0]),
    )


def share_of(place: str) -> float:
    """Map a place to a pseudo-random number in [0, 1), which decides its split."""
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big") / 2**64


def note(places: list[str], what: str) -> list[str]:
    if not places:
        return []

    # A place may quote what a row holds.
    names = "; ".join(one_line(without_surrogates(place), 120) for place in places[:3])
    names = "".join(letter if letter.isprintable() else "?" for letter in names)
    names += "; …" if len(places) > 3 else ""
    return [f"{len(places):,} rows {what} ({names})"]
