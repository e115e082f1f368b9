"""Token files, read back."""

from pathlib import Path

import numpy as np
from vocabularies import END_OF_TEXT, decode


def documents_in(path: Path) -> list[str]:
    """Read a token file back into its documents."""
    tokens = np.fromfile(path, dtype="<u2")
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    documents = np.split(tokens, ends + 1)

    assert not len(documents.pop()), "the last document is not ended"

    return [decode(document[:-1].tolist()) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix != ".verified"}
