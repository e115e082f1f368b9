"""Says which files a source has: text of your own, or the standard library; reads `--dataset`."""

import hashlib
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from text.errors import DataError, reported_errors
from text.hub import HubDataset
from text.local_files import Listing, LocalFile, kind_of
from text.tokenizer import without_surrogates

NOT_MODULES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextFiles:
    """Text of your own: a file, or all files of text below a folder, in sorted order.

    Args:
        excluded: folders that are skipped, such as those that a run writes to.
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
        """Whether a file or folder of this name is read."""
        return not name.startswith(".")

    def paths(self) -> list[Path]:
        """Return the files, also those behind links, each once.

        Raises:
            DataError: when a folder cannot be read.
        """
        if self.path.is_file():
            return [self.path]

        excluded = {path.resolve() for path in self.excluded} - {self.path.resolve()}
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
        """List the files and how each is read; print which ones are skipped.

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


Source = TextFiles | HubDataset


def parse_source(value: str, excluded: tuple[Path, ...] = ()) -> tuple[Source, float | None]:
    """Read SOURCE or SOURCE=WEIGHT as in `--dataset`.

    Args:
        excluded: folders that are skipped in a folder of text.

    Raises:
        ValueError: when it names no source, or the weight is not a number above zero.
    """
    head, separator, tail = value.rpartition("=")
    weight = None
    if separator and not os.path.exists(value):
        try:
            weight = float(tail)
        except ValueError:
            raise ValueError(f"a weight must be a number, {tail} given") from None

        if not 0 < weight < float("inf"):
            raise ValueError(f"a weight must be above 0 and finite, {tail} given")

        value = head

    if value == "openwebtext":
        return HubDataset("Skylion007/openwebtext", name="openwebtext"), weight

    if value == "stdlib":
        return StandardLibrary(), weight

    if os.path.exists(value):
        return TextFiles(Path(value), excluded), weight

    if dataset := HubDataset.parse(value):
        return dataset, weight

    raise ValueError(
        f"{value or 'nothing'} is neither openwebtext, stdlib, a file or folder that is there,"
        " nor owner/name"
    )
