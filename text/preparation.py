"""Prepares a source: text in, token files out, by several processes, restartable.

    source -> files -> units of work -> parts, one per chunk of text -> two files

Parts are in NAME.parts, where a journal lists the units that are done. After a kill at any moment
the next preparation uses them. Parts depend on the text alone: any number of processes, and any
number of restarts, makes the same bytes.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from system.files import write_whole
from system.limits import num_cores
from system.locks import Lock
from text.damage import Damage
from text.errors import DataError, is_full_disk
from text.local_files import Listing
from text.parts import JoinedFiles, Journal, PartWriter
from text.prepared import check_kept, prepared_name
from text.readers import Reader
from text.sources import Source
from text.token_files import (
    FORMAT_VERSION,
    SPLITS,
    TokenDataset,
    check_sizes,
    files_name,
    open_dataset,
    read_sidecar,
    state_of,
    token_path,
)
from text.tokenizer import Tokenizer
from text.workers import in_order

# Files of at most so many bytes together are one unit of work.
UNIT_SIZE = 1 << 21
# Bytes of text that make one more process worth starting.
MIN_SIZE_PER_PROCESS = 1 << 24
# Characters and rows after which a source that is damaged as a whole is refused at once.
MIN_CHECKED = 1 << 24
# The suffix of folders that hold a file of the Hub while it is read.
DOWNLOAD = ".download"


def load_or_prepare(
    source: Source,
    folder: Path,
    tokenizer: Tokenizer,
    num_processes: int,
    is_split: bool = True,
    kept: Sequence[str] = (),
) -> TokenDataset:
    """Map the token files of a source into memory; make them first if there are none.

    Args:
        is_split: whether both splits need a document.
        kept: checksums of token files that a resumed run needs: they are not replaced.

    Raises:
        DataError: when files do not match what is written about them, or the source is unfit.
        OSError: when the files cannot be read.
    """
    name = prepared_name(source, folder, tokenizer.encoding)
    if name is None:
        name = files_name(source.name, tokenizer.encoding)
        check_kept(source, folder / f"{name}.json", kept)
        prepare(source, folder, tokenizer, num_processes, is_split)

    check_documents(source.name, read_sidecar(folder / f"{name}.json"), is_split)
    return open_dataset(folder, name, tokenizer)


def check_documents(name: str, counts: dict, is_split: bool) -> None:
    """Raise DataError when there are too few documents."""
    numbers = [counts[split]["documents"] for split in SPLITS]
    if not (all(numbers) if is_split else any(numbers)):
        raise DataError(
            f"{name} has {numbers[0]} documents to train on and {numbers[1]} to test on; it takes"
            " at least one of each, so give more documents."
        )


def prepare(
    source: Source, folder: Path, tokenizer: Tokenizer, num_processes: int, is_split: bool
) -> None:
    """Tokenize a source into its token files, unless another process does so meanwhile.

    Raises:
        DataError: when the source cannot be read, or is too small to train and test on, or the
            files cannot be written.
    """
    name = files_name(source.name, tokenizer.encoding)
    parts = folder / f"{name}.parts"

    def report(holder: str) -> None:
        print(f"Note:   {source.name} is being prepared by {holder}; waiting for it", flush=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder / f"{name}.lock", on_wait=report) as lock:
            if prepared_name(source, folder, tokenizer.encoding) is None:
                tell_change(source, folder / f"{name}.json")
                shutil.rmtree(finished_path(parts), ignore_errors=True)
                parts.mkdir(exist_ok=True)
                with no_downloads_left(parts):
                    prepare_parts(source, parts, tokenizer, num_processes, is_split)

                if not lock.is_held():
                    raise DataError(f"{source.name}: another process has taken this over.")

                publish(parts, folder, name)
    except OSError as error:
        cure = "Make room" if is_full_disk(error) else "Choose another --dataset_path"
        kept = f"; what is whole is kept in {parts}, the same command goes on with it"
        raise DataError(
            f"{error.filename or folder} cannot be written: {error.strerror}."
            f" {cure}{kept if parts.is_dir() else ''}."
        ) from error


@contextlib.contextmanager
def no_downloads_left(parts: Path) -> Iterator[None]:
    """Remove downloads: before, those of a killed preparation, and after, those of this one."""

    def remove() -> None:
        for folder in parts.glob(f"*{DOWNLOAD}"):
            shutil.rmtree(folder, ignore_errors=True)

    remove()
    try:
        yield
    finally:
        remove()


def tell_change(source: Source, path: Path) -> None:
    """Print why a source is prepared again, if there is a sidecar at path."""
    if path.exists():
        sidecar = read_sidecar(path)
        print(
            f"Note:   {source.name} is prepared again, for the text has changed:"
            f" {sidecar['source']}, {sidecar['revision']}, then;"
            f" {source.description}, {source.revision()}, now"
        )


def prepare_parts(
    source: Source, parts: Path, tokenizer: Tokenizer, num_processes: int, is_split: bool
) -> None:
    """Make both token files and their sidecar in the folder of parts.

    Parts are joined as they come, once the share to test on is known, and deleted.
    """
    journal = Journal(parts / "journal.jsonl")
    listing = None

    # When all is tokenized the Hub has nothing more to say.
    is_tokenized = journal.is_complete and journal.is_of(source.description, journal.revision)
    if not (is_tokenized and source.is_hub):
        listing = source.listing(journal.revision)
        journal.open(source.description, listing.revision)

    if (parts / "sidecar.json").exists():
        return

    with JoinedFiles(parts, journal) as joined:
        if not journal.is_complete:
            listing = listing or source.listing(journal.revision)
            for _ in tokenize(source, listing, parts, journal, tokenizer, num_processes):
                joined.add_new_parts()

            journal.complete()

        counts = joined.finish()

    damage = damage_of(journal.units.values())
    check_damage(damage, source, parts)
    try:
        check_documents(source.name, counts, is_split)
    except DataError:
        shutil.rmtree(parts)
        raise

    for note in damage.notes():
        print(f"Note:   {source.description}: {note}")

    sidecar = {
        "format_version": FORMAT_VERSION,
        "source": source.description,
        "revision": journal.revision,
        "encoding": tokenizer.encoding,
        "split": joined.rule,
        **counts,
    }
    if not source.is_hub:
        sidecar["content"] = source.content()

    write_whole(parts / "sidecar.json", json.dumps(sidecar, indent=2).encode())


def publish(parts: Path, folder: Path, name: str) -> None:
    """Move finished files to their places, the sidecar last."""
    for stale in (folder / f"{name}.json", folder / f"{name}.verified"):
        stale.unlink(missing_ok=True)

    for split in SPLITS:
        # Not there when a preparation was killed just here.
        if (parts / f"{split}.bin").exists():
            os.replace(parts / f"{split}.bin", token_path(folder, name, split))

    # What was hashed on its way to the disk need not be read again.
    sidecar = read_sidecar(parts / "sidecar.json")
    check_sizes(folder, name, sidecar)
    write_whole(folder / f"{name}.verified", state_of(folder, name, sidecar))
    os.replace(parts / "sidecar.json", folder / f"{name}.json")

    # Under its own name, half a folder would be gone on with.
    os.replace(parts, finished_path(parts))
    shutil.rmtree(finished_path(parts))


def finished_path(parts: Path) -> Path:
    return parts.with_suffix(".finished")


@dataclass(frozen=True)
class Unit:
    """Work for one process: several files whole, or one chunk of a large one.

    Args:
        key: units sort by it in the order of the text.
        before: the bytes of all files in front of these.
    """

    key: str
    files: tuple
    before: int
    chunk: int | None = None


def units(files: tuple, finished: set[str]) -> Iterator[Unit]:
    """Divide files into work, in order; chunks of a large file go on until it is in finished."""
    group: list = []
    size = before = 0
    for number, file in enumerate(files):
        is_divided = file.is_divisible and file.size > UNIT_SIZE
        if group and (is_divided or size + file.size > UNIT_SIZE):
            yield Unit(f"{number - len(group):08d}", tuple(group), before - size)
            group, size = [], 0

        if is_divided:
            chunks = itertools.count()
            while file.name not in finished:
                chunk = next(chunks)
                yield Unit(f"{number:08d}-{chunk:06d}", (file,), before, chunk)
        else:
            group.append(file)
            size += file.size

        before += file.size

    if group:
        yield Unit(f"{len(files) - len(group):08d}", tuple(group), before - size)


def tokenize(
    source: Source,
    listing: Listing,
    parts: Path,
    journal: Journal,
    tokenizer: Tokenizer,
    num_processes: int,
) -> Iterator[None]:
    """Do all units that the journal lacks; yield after each."""
    affordable = math.ceil(listing.size / MIN_SIZE_PER_PROCESS)
    num_workers = max(1, min(num_processes, num_cores(), affordable))
    finished: set[str] = set()
    work = functools.partial(tokenize_unit, parts, tokenizer)
    if tokenizer.gigatoken is None:
        print("Note:   gigatoken is not installed; tiktoken tokenizes, which takes longer")

    results = in_order(work, units(listing.files, finished), journal.units, num_workers)
    bar = {"desc": f"Tokenizing {source.name}", "unit": "B", "unit_scale": True}
    # A log, in which every redrawn bar stays, gets one a minute.
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    bar |= {"leave": False} if is_terminal else {"mininterval": 60.0, "maxinterval": 60.0}
    num_tokens, damage = 0, Damage()
    open_reader.cache_clear()
    with contextlib.closing(results), tqdm(total=listing.size, **bar) as progress:
        for unit, result in results:
            if result["ended"]:
                finished.add(unit.files[-1].name)

            if unit.key not in journal.units:
                journal.add(result)

            damage.add(damage_of([result]))
            # Not only at the end of hours.
            if damage.num_characters + damage.num_rows > MIN_CHECKED:
                check_damage(damage, source, parts)

            num_tokens += sum(sum(part["tokens"]) for part in result["parts"])
            progress.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)
            progress.update(max(0, result["position"] - progress.n))
            yield


def tokenize_unit(parts: Path, tokenizer: Tokenizer, unit: Unit) -> dict:
    """Write the parts of a unit of work.

    Returns:
        Its key, its parts as PartWriter makes them, whether its file has ended, and how many bytes
        of all files are behind it.
    """
    writer = PartWriter(parts, unit.key, tokenizer)
    if unit.chunk is None:
        download = parts / f"{unit.key}{DOWNLOAD}"
        ended, position = tokenize_files(unit.files, writer, download)
    else:
        ended, position = tokenize_chunk(unit.files[0], unit.chunk, writer)

    writer.flush()
    return {
        "unit": unit.key,
        "parts": writer.records,
        "ended": ended,
        "position": unit.before + position,
        "damage": asdict(writer.damage),
    }


def check_damage(damage: Damage, source: Source, parts: Path) -> None:
    """Raise DataError, and leave no parts, when a source is damaged as a whole."""
    try:
        damage.check(source.description)
    except DataError:
        shutil.rmtree(parts, ignore_errors=True)
        raise


def damage_of(units: Iterable[dict]) -> Damage:
    """Add up what could not be read; units of earlier versions do not say."""
    damage = Damage()
    for unit in units:
        damage.add(Damage(**unit.get("damage", {})))

    return damage


def tokenize_files(files: tuple, writer: PartWriter, download: Path) -> tuple[bool, int]:
    """Tokenize whole files; return, as tokenize_chunk does, that they have ended and their size.

    Args:
        download: a folder for files that are not on this disk, one at a time.
    """
    for file in files:
        with file.on_disk(download) as local, Reader(local) as reader:
            while not reader.is_finished:
                for documents in reader.chunk(writer.damage):
                    writer.add(file, documents)

    return True, sum(file.size for file in files)


def tokenize_chunk(file, chunk: int, writer: PartWriter) -> tuple[bool, int]:
    """Tokenize one chunk of a file; return whether it has ended and how far it has been read."""
    try:
        reader = open_reader(file)
        if reader.number > chunk:
            open_reader.cache_clear()
            reader = open_reader(file)

        while reader.number < chunk and not reader.is_finished:
            reader.skip()

        if not reader.is_finished:
            for documents in reader.chunk(writer.damage):
                writer.add(file, documents)
    except BaseException:
        open_reader.cache_clear()
        raise

    return reader.is_finished, reader.position


@functools.lru_cache(maxsize=1)
def open_reader(file) -> Reader:
    """Keep one file open: a process is given later and later chunks of it."""
    return Reader(file)
