"""Finds the token files of a text: what it holds decides, not its place or its times."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from system.files import write_whole
from text.errors import DataError
from text.sources import Source, TextFiles
from text.token_files import files_name, read_sidecar, sidecars


def prepared_name(source: Source, folder: Path, encoding: str) -> str | None:
    """Return the name of the token files of just this text, None when there are none.

    Text that was moved or touched is the same text; that of the Hub is, and text that is gone. The
    Hub is not asked.
    """
    name = files_name(source.name, encoding)
    path = folder / f"{name}.json"
    if not isinstance(source, TextFiles):
        return name if path.exists() else None

    if not path.exists():
        for other, sidecar in sidecars(folder, encoding):
            if sidecar["source"] == source.description:
                name, path = other, folder / f"{other}.json"
                break

    if path.exists():
        sidecar = read_sidecar(path, encoding)
        if source.is_gone:
            print(f"Note:   {source.description} is not there; its token files are read")
            return name

        prepared = sidecar["source"], sidecar["revision"]
        is_same = prepared == (source.description, source.revision())
        return name if is_same or has_content(source, path, sidecar) else None

    for name, sidecar in sidecars(folder, encoding):
        # Text that was moved is not where it was.
        if not Path(sidecar["source"]).exists() and has_content(
            source, folder / f"{name}.json", sidecar
        ):
            return name

    return None


def has_content(source: TextFiles, path: Path, sidecar: dict) -> bool:
    """Tell whether a sidecar is of text with other times or another place, and note these."""
    if not holds_same(source, sidecar):
        return False

    # On a disk that cannot be written to it is compared every time.
    with contextlib.suppress(OSError):
        changes = {"source": source.description, "revision": source.revision()}
        write_whole(path, json.dumps({**sidecar, **changes}, indent=2).encode())

    return True


def holds_same(source: TextFiles, saved: dict) -> bool:
    """Tell by size and content whether a text is the saved one; old ones have no content."""
    is_like = size_of(saved["revision"]) == size_of(source.revision()) and "content" in saved
    return is_like and saved["content"] == source.content()


def state_of_text(source: Source) -> dict:
    """Return what is_same_text needs to know of a text."""
    if not isinstance(source, TextFiles):
        return {}

    return {"revision": source.revision(), "content": source.content()}


def is_same_text(source: Source, saved: dict) -> bool:
    """Tell whether a text is the saved one; that of the Hub is, and text that is gone."""
    return (
        not isinstance(source, TextFiles)
        or source.is_gone
        or saved["revision"] == source.revision()
        or holds_same(source, saved)
    )


def size_of(revision: str) -> str:
    """Return the number and the size of files, without their times."""
    return revision.partition(", state ")[0]


def check_kept(source: Source, path: Path, kept: Sequence[str]) -> None:
    """Raise DataError where changed text would replace the token files of a resumed run.

    Args:
        path: of the sidecar that would be replaced.
        kept: checksums of token files that a resumed run needs.
    """
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
