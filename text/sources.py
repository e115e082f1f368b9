"""Says which files a source has: text of your own, or the standard library; reads `--dataset`."""

import contextlib
import difflib
import hashlib
import os
import re
import stat
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

from text.blocks import NoTextError
from text.errors import DataError, reported_errors, without_surrogates
from text.hub import HubDataset
from text.local_files import Listing, LocalFile, is_file_name, kind_of, kind_of_name
from text.readers import MAX_DOCUMENT, MIN_PIECE, check_table
from text.splits import TEST_SHARES, place_hash
from text.token_files import sidecars

NOT_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


# Folders that a run writes to, each with a regular expression of its files' names there.
Outputs = tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class TextFiles:
    """Text of your own: a file, or all files of text below a folder, in sorted order.

    Args:
        excluded: folders that a run writes to, and a regular expression of the names of its files.
            Such a folder is skipped; where it is the text's own, these names are.
        encoding: of files that are not UTF-8, nor marked as UTF-16.
    """

    path: Path
    excluded: Outputs = ()
    encoding: str = ""
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
        """Whether a file or folder of this name is read."""
        # TensorBoard's files change with every epoch.
        return not name.startswith((".", "events.out.tfevents."))

    def paths(self) -> list[Path]:
        """Return the files, also those behind links, each once.

        Raises:
            DataError: when a folder cannot be read.
        """
        if self.path.is_file():
            return [self.path]

        outputs = [(folder.resolve(), re.compile(names)) for folder, names in self.excluded]
        excluded = {folder for folder, _ in outputs} - {self.path.resolve()}
        logs = open_logs()
        found: list[Path] = []
        seen = set()

        def stop(error: OSError) -> None:
            folder = without_surrogates(os.fsdecode(error.filename))
            raise DataError(f"{folder} cannot be read: {error.strerror}.") from error

        for folder, folders, files in os.walk(self.path, onerror=stop, followlinks=True):
            place = Path(folder).resolve()
            if place in seen or place in excluded:
                folders.clear()
                continue

            seen.add(place)
            own = [names for folder_, names in outputs if folder_ == place]

            def is_text(name: str, own: list[re.Pattern] = own) -> bool:
                return self.is_read(name) and not any(names.fullmatch(name) for names in own)

            folders[:] = filter(is_text, folders)
            found += (Path(folder, name) for name in filter(is_text, files))

        # Of the names of one file, that of a table says how it is read; else the first counts.
        names: dict[Path, Path] = {}
        for path in sorted(found, key=lambda path: (not kind_of_name(path.name), path)):
            if path.is_file() and not any(os.path.samestat(path.stat(), log) for log in logs):
                names.setdefault(path.resolve(), path)

        return sorted(names.values())

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

        encoding = f", encoding {self.encoding}" if self.encoding else ""
        return f"{len(paths):,} files, {size:,} bytes, state {digest.hexdigest()[:16]}{encoding}"

    @property
    def is_gone(self) -> bool:
        """Whether there is nothing at the path any more."""
        return not self.path.exists()

    def content(self) -> str:
        """Return a digest of what the files hold, wherever they lie and however old they are."""
        digest = hashlib.sha256(self.encoding.encode())
        with reported_errors(self.description):
            for path in self.paths():
                name = os.fsencode(path.relative_to(self.path))
                digest.update(b"%s\0%d\0" % (name, path.stat().st_size))
                with open(path, "rb") as file:
                    while chunk := file.read(1 << 24):
                        digest.update(chunk)

        return digest.hexdigest()

    def listing(self, _: str | None = None) -> Listing:
        """List the files and how each is read; print which ones are skipped.

        Raises:
            DataError: when a file cannot be read, or is one and no text.
        """
        revision = self.revision()
        files, foreign, tables = [], [], []
        with reported_errors(self.description):
            sizes = {path: path.stat().st_size for path in self.paths()}

        for path, size in sizes.items():
            kind = kind_of(path) if size else None
            if kind:
                name = path.relative_to(self.path).as_posix()
                is_lone = path == self.path
                file = LocalFile(path, name, size, kind, is_lone, encoding=self.encoding)
                try:
                    if not is_lone and kind != "text":
                        check_table(file)

                    files.append(file)
                except NoTextError as error:
                    tables.append(error)
            elif size:
                foreign.append(without_surrogates(path.name))

        if foreign and self.path.is_file():
            raise DataError(f"{self.description} is not text.")

        if foreign:
            names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            print(f"Note:   {len(foreign)} files in {self.description} are not text: {names}")

        if tables and not files:
            raise tables[0]

        if tables:
            others = f", and {len(tables) - 1} more tables" if len(tables) > 1 else ""
            print(f"Note:   {str(tables[0]).rstrip('.')}; it is left out{others}")

        if has_lone_split(files):
            files = [replace(file, is_cut=True) for file in files]

        return Listing(tuple(files), revision)


def has_lone_split(files: list[LocalFile]) -> bool:
    """Tell whether so few files fall into one of the splits that they have to be cut.

    It takes text of less than one piece that cut makes. Tables have many rows, and large files are
    cut anyway.
    """
    if not all(file.kind == "text" and file.size <= MAX_DOCUMENT for file in files):
        return False

    size = sum(file.size for file in files)
    test_size = sum(f.size for f in files if place_hash(f.name, 0) < TEST_SHARES[-1])
    return min(test_size, size - test_size) < MIN_PIECE


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


Source = TextFiles | HubDataset


def near_path(value: str) -> str:
    """Return a path that is there and nearly the same, empty when there is none."""
    folder, _, name = value.rpartition("/")
    with contextlib.suppress(OSError, ValueError):
        found = difflib.get_close_matches(name, os.listdir(folder), 1, 0.8) if folder else []
        return f"{folder}/{found[0]}" if found else ""

    return ""


def open_logs() -> list[os.stat_result]:
    """Return the files that this process writes its output to."""
    logs = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            logs.append(os.fstat(descriptor))

    return [log for log in logs if stat.S_ISREG(log.st_mode)]


def has_tokens(source: TextFiles, folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        description = source.description
        return any(sidecar["source"] == description for _, sidecar in sidecars(folder))

    return False


def parse_source(
    value: str, excluded: Outputs = (), encoding: str = "", folder: Path | None = None
) -> tuple[Source, float | None]:
    """Read SOURCE or SOURCE=WEIGHT as in `--dataset`.

    Args:
        excluded, encoding: as TextFiles has them.
        folder: that of the token files: text that has some may be gone.

    Raises:
        ValueError: when it names no source, or the weight is not a number above zero.
    """
    head, separator, tail = value.rpartition("=")
    weight = None
    if separator and not os.path.exists(value):
        try:
            weight = float(tail)
        except ValueError:
            if "/" in value and not os.path.exists(head):
                raise ValueError(f"there is no file or folder {value}") from None

            raise ValueError(f"a weight must be a number, {tail} given") from None

        if not 0 < weight < float("inf"):
            raise ValueError(f"a weight must be above 0 and finite, {tail} given")

        value = head

    if value == "openwebtext":
        return HubDataset("Skylion007/openwebtext", name="openwebtext"), weight

    if value == "stdlib":
        return StandardLibrary(), weight

    if os.path.exists(value):
        return TextFiles(Path(value), excluded, encoding), weight

    if folder and value and has_tokens(gone := TextFiles(Path(value)), folder):
        return gone, weight

    # A name on the Hub could be mistyped, too; nobody waits for its answer here.
    if is_file_name(value) or (near := near_path(value)):
        hint = "" if is_file_name(value) else f"; did you mean {near}?"
        raise ValueError(f"there is no file or folder {value}{hint}")

    if dataset := HubDataset.parse(value):
        return dataset, weight

    raise ValueError(
        f"{value or 'nothing'} is neither openwebtext, stdlib, a file or folder that is there,"
        " nor owner/name"
    )
