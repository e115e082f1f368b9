"""Trains a vocabulary of your own on the documents to train on, and keeps it for the next run.

SOURCES.N.vocabulary, in the folder of the token files, holds N tokens and what they were trained
on: the same text gives the same vocabulary, whatever the number of processes.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from system.files import write_whole
from system.locks import Lock
from text import blocks
from text.damage import Damage
from text.errors import DataError, is_full_disk
from text.prepared import is_same_text, state_of_text
from text.readers import Reader
from text.sources import Source
from text.splits import TEST_SHARES, place_hash
from text.tokenizer import GPT2_SIZE, Tokenizer, format_ranks, gpt2_tokenizer

FORMAT_VERSION = 1
# Bytes of text that a vocabulary is trained on, about; of a large corpus a sample.
SAMPLE_SIZE = 1 << 26


def open_tokenizer(sources: Sequence[Source], folder: Path, size: int) -> Tokenizer:
    """Return GPT-2's tokenizer, or one with a vocabulary of these sources, trained if need be.

    Args:
        folder: that of the token files.
        size: the number of tokens; GPT2_SIZE means GPT-2's.

    Raises:
        DataError: when a source cannot be read, has too little text, or the folder cannot be
            written to.
    """
    if size == GPT2_SIZE:
        return gpt2_tokenizer()

    # In whatever order they are named, they are the same text.
    sources = sorted(sources, key=lambda source: source.name)
    names = "+".join(source.name for source in sources)
    path = folder / f"{shortened(names)}.{size}.vocabulary"

    def report(holder: str) -> None:
        print(f"Note:   {path} is being made by {holder}; waiting for it", flush=True)

    if tokenizer := read_vocabulary(path, sources):
        return tokenizer

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_name(f"{path.name}.lock"), on_wait=report):
            return read_vocabulary(path, sources) or train_vocabulary(path, sources, size)
    except OSError as error:
        cure = "Make room" if is_full_disk(error) else "Choose another --dataset_path"
        place = error.filename or folder
        raise DataError(f"{place} cannot be written: {error.strerror}. {cure}.") from error


def shortened(names: str, size: int = 120) -> str:
    """Return a name of a file for any number of sources."""
    digest = hashlib.sha256(names.encode()).hexdigest()[:8]
    return names if len(names) <= size else f"{names[: size - 9]}-{digest}"


def read_vocabulary(path: Path, sources: Sequence[Source]) -> Tokenizer | None:
    """Return the vocabulary in a file, None unless it was trained on just this text."""
    if not path.is_file():
        return None

    try:
        content = json.loads(path.read_text())
        saved = {each["name"]: each for each in content["sources"]}
        tokenizer = Tokenizer(content["ranks"])
        if (content["format_version"], content["encoding"]) != (FORMAT_VERSION, tokenizer.encoding):
            raise ValueError("another format, or other ranks")
    except (ValueError, KeyError, TypeError, DataError) as error:
        raise DataError(f"{path} is damaged; delete it to have it made again.") from error

    if all(s.name in saved and is_same_text(s, saved[s.name]) for s in sources):
        return tokenizer

    print(f"Note:   the text has changed since {path} was made; it is made again")
    return None


def train_vocabulary(path: Path, sources: Sequence[Source], size: int) -> Tokenizer:
    """Train a vocabulary and write it whole.

    Raises:
        DataError: when a source cannot be read, or there is too little text for so many tokens.
    """
    names = ", ".join(source.description for source in sources)
    print(f"Tokens: training a vocabulary of {size:,} on {names}", flush=True)

    downloads = path.with_name(f"{path.name}.download")
    share = SAMPLE_SIZE // len(sources)
    texts = (text for source in sources for text in sample(source, share, downloads))
    tokens = merge(texts, size - 1)
    if len(tokens) < size - 1:
        raise DataError(
            f"{names} has too little text for a vocabulary of {size:,} tokens, it gives"
            f" {len(tokens) + 1:,}; lower --vocabulary_size or give more text."
        )

    tokenizer = Tokenizer(format_ranks(tokens))
    content = {
        "format_version": FORMAT_VERSION,
        "encoding": tokenizer.encoding,
        "sources": [
            {"name": source.name, "source": source.description, **state_of_text(source)}
            for source in sources
        ],
        "ranks": tokenizer.ranks,
    }
    write_whole(path, json.dumps(content, indent=2).encode())
    return tokenizer


def sample(source: Source, size: int, downloads: Path) -> Iterator[str]:
    """Yield about size bytes of the documents of a source that are never tested on.

    That is decided later, by the number of tokens: the largest share is left out, and the first
    document, which is tested on where no share has any. Of a large folder the documents come from
    everywhere, of the Hub from the first files.

    Args:
        downloads: a folder for files of the Hub.
    """
    listing = source.listing()
    interval = 1 if source.is_hub else max(1, math.ceil(listing.size / size))
    num_bytes = 0
    with contextlib.closing(documents(listing.files, interval, downloads)) as found:
        next(found, None)
        for place, text in found:
            if place >= TEST_SHARES[-1]:
                num_bytes += len(text.encode())
                yield text

            if num_bytes >= size:
                return


def documents(
    files: Sequence, interval: int, downloads: Path
) -> Generator[tuple[float, str], None, None]:
    """Yield the documents of every interval-th chunk, each with the hash of its place."""
    number = 0
    for file in files:
        # A small file is one chunk, which need not be opened to be passed over.
        if number % interval and file.size <= blocks.CHUNK_SIZE:
            number += 1
            continue

        with file.on_disk(downloads) as local, Reader(local) as reader:
            while not reader.is_finished:
                if number % interval:
                    reader.skip()
                else:
                    for rows, texts in reader.chunk(Damage()):
                        places = (place_hash(file.name, row) for row in rows.tolist())
                        yield from zip(places, texts.to_pylist(), strict=True)

                number += 1


def merge(texts: Iterator[str], num_tokens: int) -> dict[bytes, int]:
    """Train a byte-level BPE (Sennrich et al. 2016) by the library of Hugging Face.

    Returns:
        The tokens with their ranks; fewer than num_tokens where text is too short.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    # It has GPT-2's pattern built in.
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = byte_characters()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=[*alphabet], show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return {
        b"".join(alphabet[character] for character in token): rank
        for token, rank in model.get_vocab().items()
    }


def byte_characters() -> dict[str, bytes]:
    """Return the characters that stand for bytes in byte-level BPE (Radford et al. 2019)."""
    printable = [*range(ord("!"), 127), *range(ord("¡"), 173), *range(ord("®"), 256)]
    others = [value for value in range(256) if value not in printable]
    codes = {value: value for value in printable} | {v: 256 + i for i, v in enumerate(others)}
    return {chr(code): bytes([value]) for value, code in codes.items()}
