"""Finds the token files of a text: what it holds decides, not its place or its times."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from system.files import write_whole
from text.errors import DataError
from text.sources import Source, TextFiles
from text.token_files import find_name, read_sidecar, sidecars


def is_prepared(source: Source, folder: Path) -> bool:
    """Whether there are token files of just this text; the Hub is not asked."""
    return prepared_name(source, folder) is not None


def prepared_name(source: Source, folder: Path) -> str | None:
    """Return the name of the token files of just this text, None when there are none.

    Text that was moved or touched is the same text; that of the Hub is, and text that is gone.
    """
    if not isinstance(source, TextFiles):
        return source.name if (folder / f"{source.name}.json").exists() else None

    name = find_name(folder, source.name, source.description)
    path = folder / f"{name}.json"
    if path.exists():
        sidecar = read_sidecar(path)
        if source.is_gone:
            print(f"Note:   {source.description} is not there; its token files are read")
            return name

        prepared = sidecar["source"], sidecar["revision"]
        is_same = prepared == (source.description, source.revision())
        return name if is_same or has_content(source, path, sidecar) else None

    for name, sidecar in sidecars(folder):
        # Text that was moved is not where it was.
        if not Path(sidecar["source"]).exists() and has_content(
            source, folder / f"{name}.json", sidecar
        ):
            return name

    return None


def has_content(source: TextFiles, path: Path, sidecar: dict) -> bool:
    """Tell whether a sidecar is of text with other times or another place, and note these."""
    revision = source.revision()
    is_like = size_of(sidecar["revision"]) == size_of(revision) and "content" in sidecar
    if not is_like or sidecar["content"] != source.content():
        return False

    # On a disk that cannot be written to it is compared every time.
    with contextlib.suppress(OSError):
        changes = {"source": source.description, "revision": revision}
        write_whole(path, json.dumps({**sidecar, **changes}, indent=2).encode())

    return True


def size_of(revision: str) -> str:
    """Return the number and the size of files, without their times."""
    return revision.partition(", state ")[0]


def check_kept(source: Source, folder: Path, kept: Sequence[str]) -> None:
    """Raise DataError where changed text would replace the token files of a resumed run."""
    path = folder / f"{source.name}.json"
    if not path.exists():
        return

    sidecar = read_sidecar(path)
    # Earlier versions did not note the content: only the tokens can tell.
    is_open = "content" not in sidecar and size_of(sidecar["revision"]) == size_of(
        source.revision()
    )
    if sidecar["train"]["sha256"] in kept and not is_open:
        raise DataError(
            f"The data changed since the checkpoint was saved: {source.name} had"
            f" {sidecar['revision']} then, and has {source.revision()} now. Restore the files, or"
            " leave out --resume to begin a new run."
        )
