"""Text in, token files out: tokenized by several processes, restartable, whole or absent.

NAME-train.bin and NAME-test.bin hold token ids (uint16, little-endian, no header), end-of-text
behind every document. NAME.json describes both and is written last; without it there is no dataset.

    source -> files -> units of work -> parts, one per chunk of text -> two files

Parts lie in NAME.parts, where a journal tells which units are done. Killed at any moment, the next
preparation goes on with them. Parts depend on the text alone, so any number of processes, and any
number of restarts, ends with the same bytes.
"""

import bisect
import collections
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hub import DamagedDownloadError, HubDataset
from locks import exclusive
from sources import Listing, Reader, StandardLibrary, TextFiles
from tokenizer import (
    ENCODING,
    END_OF_TEXT,
    TOKEN_TYPE,
    VOCABULARY_SIZE,
    DataError,
    encode_documents,
)

FORMAT_VERSION = 2
SPLITS = ("train", "test")

# The share of the documents to test on: the first that gives 64 windows of GPT-2's context.
TEST_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
MIN_TEST_TOKENS = 65_536

# Files of at most so many bytes together are one unit of work.
UNIT_SIZE = 1 << 21
# A process more than this many bytes of text pay for is not started.
MIN_SIZE_PER_PROCESS = 1 << 24
MAX_DOWNLOADS = 3

Source = TextFiles | HubDataset


def parse_source(value: str) -> tuple[Source, float | None]:
    """Read SOURCE or SOURCE=WEIGHT as in `--dataset`.

    Raises:
        ValueError: when it names no source, or the weight is not a number above zero.
    """
    head, separator, tail = value.rpartition("=")
    weight = None

    if separator and not Path(value).exists():
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

    if value and Path(value).exists():
        return TextFiles(Path(value)), weight

    # The Hub allows no two dashes in a row, so they can stand for what file names do not have.
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", value)

    if match and "--" not in match[1]:
        return HubDataset(match[1], match[2], name=re.sub("[/:]", "--", value)), weight

    raise ValueError(
        f"{value or 'nothing'} is neither openwebtext, stdlib, a file or folder that is there,"
        " nor owner/name"
    )


@dataclass(frozen=True)
class TokenDataset:
    """The token files of one source, mapped into memory: uint16 arrays of token ids."""

    name: str
    train: np.ndarray
    test: np.ndarray
    fingerprint: str


def load_or_prepare(source: Source, folder: Path, num_processes: int) -> TokenDataset:
    """Map the token files of a source into memory, after making them where there are none.

    Raises:
        DataError: when files do not match what is written about them, or the source is unfit.
        OSError: when the files cannot be read or written.
    """
    sidecar = up_to_date_sidecar(source, folder)

    if sidecar is None:
        prepare(source, folder, num_processes)
        sidecar = read_sidecar(folder / f"{source.name}.json")

    verify(folder, source.name, sidecar)
    train, test = (
        np.memmap(token_path(folder, source.name, split), dtype=TOKEN_TYPE, mode="r")
        for split in SPLITS
    )

    return TokenDataset(source.name, train, test, sidecar["train"]["sha256"])


def up_to_date_sidecar(source: Source, folder: Path) -> dict | None:
    """Return what is known about the token files, None where there are none of this very text."""
    path = folder / f"{source.name}.json"

    if not path.exists():
        return None

    sidecar = read_sidecar(path)

    if not source.is_hub and sidecar_state(sidecar) != (source.description, source.revision()):
        return None

    return sidecar


def sidecar_state(sidecar: dict) -> tuple[str, str]:
    return sidecar["source"], sidecar["revision"]


def token_path(folder: Path, name: str, split: str) -> Path:
    return folder / f"{name}-{split}.bin"


# --- Checking what was prepared ---


def read_sidecar(path: Path) -> dict:
    """Read what is known about a pair of token files, and refuse what this code cannot use."""
    remedy = f"delete {path} to have the dataset prepared again"

    try:
        sidecar = json.loads(path.read_text())
        version, encoding = sidecar["format_version"], sidecar["encoding"]

        if version == FORMAT_VERSION:
            [sidecar[split][key] for split in SPLITS for key in ("documents", "sha256")]
            [sidecar[split]["tokens"] + 0 for split in SPLITS]
            [sidecar[key] for key in ("source", "revision")]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged; {remedy}.") from error

    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format {version}, format {FORMAT_VERSION} is read; {remedy}.")

    if encoding != ENCODING:
        raise DataError(f"{path} was tokenized by {encoding}, {ENCODING} is needed; {remedy}.")

    return sidecar


def verify(folder: Path, name: str, sidecar: dict) -> None:
    """Compare token files with their sidecar: sizes always, contents once and after each change.

    Raises:
        DataError: when a file is missing, or its size, checksum or ids are wrong.
    """
    for split in SPLITS:
        path = token_path(folder, name, split)
        expected = sidecar[split]["tokens"] * TOKEN_TYPE.itemsize

        if not path.exists():
            raise DataError(f"{path} is missing; delete {name}.json to have it prepared again.")

        if (size := path.stat().st_size) != expected:
            raise DataError(
                f"{path} has {size:,} bytes where {expected:,} were written;"
                f" delete {name}.json to have it prepared again."
            )

    stamp_path = folder / f"{name}.verified"
    stamp = state_of(folder, name, sidecar)

    if stamp_path.exists() and stamp_path.read_bytes() == stamp:
        return

    for split in SPLITS:
        path = token_path(folder, name, split)
        digest, largest = scan(path)

        if digest != sidecar[split]["sha256"]:
            raise DataError(f"{path} is damaged; delete {name}.json to have it prepared again.")

        if largest >= VOCABULARY_SIZE:
            raise DataError(
                f"{path} holds token id {largest}, {ENCODING} ends at {VOCABULARY_SIZE - 1}."
            )

    # Files on a disk that cannot be written to are read through every time.
    with contextlib.suppress(OSError):
        write_whole(stamp_path, stamp)


def state_of(folder: Path, name: str, sidecar: dict) -> bytes:
    """Return checksums, sizes and times of a pair of token files: what a file changes with."""
    lines = []

    for split in SPLITS:
        status = token_path(folder, name, split).stat()
        lines.append(f"{sidecar[split]['sha256']} {status.st_size} {status.st_mtime_ns}\n")

    return "".join(lines).encode()


def scan(path: Path) -> tuple[str, int]:
    """Return the sha256 of a token file and its largest id (-1 when it is empty)."""
    digest, largest = hashlib.sha256(), -1

    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype=TOKEN_TYPE).max()))

    return digest.hexdigest(), largest


# --- Preparing ---


def prepare(source: Source, folder: Path, num_processes: int) -> None:
    """Tokenize a source into its token files, unless another process does so meanwhile.

    Raises:
        DataError: when the source cannot be read, or is too small to train and test on, or the
            files cannot be written.
    """
    parts = folder / f"{source.name}.parts"

    def tell(holder: str) -> None:
        print(f"Note:   {source.name} is being prepared by {holder}; waiting for it", flush=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)

        with exclusive(folder / f"{source.name}.lock", tell):
            if up_to_date_sidecar(source, folder) is None:
                tell_change(source, folder)
                parts.mkdir(exist_ok=True)
                prepare_parts(source, parts, num_processes)
                publish(parts, folder, source.name)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "Make room" if is_full else "Choose another --dataset_path"
        kept = f"; what is whole is kept in {parts}, the same command goes on with it"

        raise DataError(
            f"{error.filename or folder} cannot be written: {error.strerror}."
            f" {cure}{kept if parts.is_dir() else ''}."
        ) from error


def tell_change(source: Source, folder: Path) -> None:
    """Say why a source is prepared that was prepared before."""
    path = folder / f"{source.name}.json"

    if path.exists():
        print(
            f"Note:   {source.name} is prepared again, for the text has changed:"
            f" {', '.join(sidecar_state(read_sidecar(path)))}, then;"
            f" {source.description}, {source.revision()}, now"
        )


def prepare_parts(source: Source, parts: Path, num_processes: int) -> None:
    """Leave both token files and their sidecar in the folder of parts.

    Parts are joined as they come, once the share to test on is known, and deleted.
    """
    if (parts / "sidecar.json").exists():
        return

    journal = Journal(parts / "journal.jsonl")

    # When all is tokenized the Hub has nothing more to say.
    if not (journal.is_complete and source.is_hub):
        listing = source.listing(journal.revision)
        journal.open(source.description, listing.revision)

    with JoinedFiles(parts, journal) as joined:
        if not journal.is_complete:
            for _ in tokenize(source, listing, parts, journal, num_processes):
                joined.add_new_parts()

            journal.complete()

        counts = joined.finish()

    for split in SPLITS:
        if not counts[split]["documents"]:
            shutil.rmtree(parts)

            raise DataError(
                f"{source.name} has {counts['train']['documents']} documents to train on and"
                f" {counts['test']['documents']} to test on; it takes at least one of each,"
                " so give more documents."
            )

    sidecar = {
        "format_version": FORMAT_VERSION,
        "source": source.description,
        "revision": journal.revision,
        "encoding": ENCODING,
        "split": f"test: blake2b('file row') below {joined.test_share}",
        **counts,
    }
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
    sidecar = json.loads((parts / "sidecar.json").read_text())
    write_whole(folder / f"{name}.verified", state_of(folder, name, sidecar))
    os.replace(parts / "sidecar.json", folder / f"{name}.json")
    shutil.rmtree(parts)


class Journal:
    """Which units of work are done, in order, and with which parts; a line of JSON for each.

    Args:
        path: a file that a kill may have cut at any byte.
    """

    def __init__(self, path: Path):
        self.path = path
        self.head: dict = {}
        self.units: dict[str, dict] = {}
        self.is_complete = False

        with contextlib.suppress(OSError, ValueError, KeyError):
            head, *lines = path.read_text().split("\n")
            self.head = json.loads(head)

            for line in lines[:-1]:
                unit = json.loads(line)
                self.is_complete = unit == COMPLETE

                if not self.is_complete:
                    self.units[unit["unit"]] = unit

        # In the order of the text.
        self.parts = [part for unit in self.units.values() for part in unit["parts"]]

    @property
    def revision(self) -> str | None:
        return self.head.get("revision")

    def open(self, description: str, revision: str) -> None:
        """Go on with the parts of just this text, or begin anew."""
        head = {"format_version": FORMAT_VERSION, "source": description, "revision": revision}

        if self.head != head:
            shutil.rmtree(self.path.parent)
            self.path.parent.mkdir()
            self.units, self.parts, self.head, self.is_complete = {}, [], head, False
        elif self.units:
            print(f"Note:   going on with {len(self.parts):,} parts that are done")

        self.rewrite()

    def rewrite(self) -> None:
        lines = [self.head, *self.units.values(), *([COMPLETE] if self.is_complete else [])]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def keep(self, num_parts: int) -> None:
        """Forget the units from the one on that has more than the first num_parts parts."""
        kept, self.units, self.parts, self.is_complete = self.units, {}, [], False

        for key, unit in kept.items():
            if len(self.parts) + len(unit["parts"]) > num_parts:
                break

            self.units[key] = unit
            self.parts += unit["parts"]

        self.rewrite()

    def add(self, unit: dict) -> None:
        self.units[unit["unit"]] = unit
        self.parts += unit["parts"]
        self.append(unit)

    def complete(self) -> None:
        """Note that there are no more units."""
        self.is_complete = True
        self.append(COMPLETE)

    def append(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


COMPLETE = {"unit": None}


# --- Tokenizing ---


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
    group, size, before = [], 0, 0

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
    source: Source, listing: Listing, parts: Path, journal: Journal, num_processes: int
) -> Iterator[None]:
    """Do all units that the journal lacks; yield after each."""
    affordable = math.ceil(listing.size / MIN_SIZE_PER_PROCESS)
    num_workers = max(1, min(num_processes, os.cpu_count() or 1, affordable))
    finished: set[str] = set()
    work = functools.partial(tokenize_unit, parts)
    results = in_order(work, units(listing.files, finished), journal.units, num_workers)
    bar = {"desc": f"Tokenizing {source.name}", "unit": "B", "unit_scale": True}
    num_tokens = 0
    open_reader.cache_clear()

    with contextlib.closing(results), tqdm(total=listing.size, **bar, leave=False) as progress:
        for unit, result in results:
            if result["ended"]:
                finished.add(unit.files[-1].name)

            if unit.key not in journal.units:
                journal.add(result)

            num_tokens += sum(sum(part["tokens"]) for part in result["parts"])
            progress.set_postfix_str(f"{num_tokens:,} tokens", refresh=False)
            progress.update(max(0, result["position"] - progress.n))

            yield


def in_order(
    work: Callable[[Unit], dict], items: Iterable[Unit], done: dict[str, dict], num_workers: int
) -> Iterator[tuple[Unit, dict]]:
    """Yield each unit with its result, in order; what is done is not done again."""
    if num_workers == 1:
        for unit in items:
            yield unit, done.get(unit.key) or work(unit)

        return

    pending: collections.deque[tuple[Unit, dict | Future]] = collections.deque()

    def next_result() -> tuple[Unit, dict]:
        unit, result = pending.popleft()

        return unit, result.result() if isinstance(result, Future) else result

    try:
        with worker_processes(num_workers) as pool:
            for unit in items:
                pending.append((unit, done.get(unit.key) or pool.submit(work, unit)))

                if len(pending) == 3 * num_workers:
                    yield next_result()

            while pending:
                yield next_result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenizes was killed, perhaps for lack of memory. The same command"
            " goes on; lower --num_dataset_processes."
        ) from error


@contextlib.contextmanager
def worker_processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end with this one, however it ends, and when the work is given up."""
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)

    with (
        lifeline,
        held,
        ProcessPoolExecutor(
            number, mp_context=context, initializer=hold_lifeline, initargs=(lifeline,)
        ) as pool,
    ):
        try:
            yield pool
        except BaseException:
            held.close()
            pool.shutdown(cancel_futures=True)
            raise


def hold_lifeline(lifeline) -> None:
    """Leave at once when the other end of a pipe is closed, be it by a kill."""
    # Ctrl-C reaches all processes of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()

        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tokenize_unit(parts: Path, unit: Unit) -> dict:
    """Write the parts of a unit of work, after a damaged download once more.

    Returns:
        Its key, its parts as PartWriter makes them, whether its file has ended, and how many bytes
        of all files are behind it.
    """
    for _ in range(MAX_DOWNLOADS - 1):
        with contextlib.suppress(DamagedDownloadError):
            return tokenize_unit_once(parts, unit)

    return tokenize_unit_once(parts, unit)


def tokenize_unit_once(parts: Path, unit: Unit) -> dict:
    writer = PartWriter(parts, unit.key)

    if unit.chunk is None:
        ended, position = tokenize_files(unit.files, writer)
    else:
        ended, position = tokenize_chunk(unit.files[0], unit.chunk, writer)

    writer.flush()

    return {
        "unit": unit.key,
        "parts": writer.records,
        "ended": ended,
        "position": unit.before + position,
    }


def tokenize_files(files: tuple, writer: "PartWriter") -> tuple[bool, int]:
    """Tokenize whole files; return, as tokenize_chunk does, that they have ended and their size."""
    for file in files:
        with Reader(file) as reader:
            while not reader.is_finished:
                writer.add(file, reader.chunk())

    return True, sum(file.size for file in files)


def tokenize_chunk(file, chunk: int, writer: "PartWriter") -> tuple[bool, int]:
    """Tokenize one chunk of a file; return whether it has ended and how far it has been read."""
    try:
        reader = open_reader(file)

        if reader.number > chunk:
            open_reader.cache_clear()
            reader = open_reader(file)

        while reader.number < chunk and not reader.is_finished:
            reader.skip()

        if not reader.is_finished:
            writer.add(file, reader.chunk())
    except BaseException:
        open_reader.cache_clear()
        raise

    return reader.is_finished, reader.position


@functools.lru_cache(maxsize=1)
def open_reader(file) -> Reader:
    """Keep the file open that this process is at: it is given later and later chunks of it."""
    return Reader(file)


class PartWriter:
    """Writes documents, as they come, into parts of about a chunk each.

    A part holds its documents by the smallest of TEST_SHARES that would test on them, so that what
    is tested on, once all parts are known and the share is chosen, stands at its beginning.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key
        self.records: list[dict] = []
        self.clear()

    def clear(self) -> None:
        self.texts: list[str] = []
        self.places: list[int] = []
        self.size = 0

    def add(self, file, rows: Iterable[tuple[int, str | None]]) -> None:
        """Add rows of a file, each with its number; those without text are no documents."""
        for number, text in rows:
            if text:
                self.texts.append(text)
                self.places.append(bisect.bisect(TEST_SHARES, place_hash(file.name, number)))
                self.size += len(text)

            if self.size >= Reader.CHUNK_SIZE:
                self.flush()

    def flush(self) -> None:
        """Write what has come since the last part, if anything; a kill leaves no half of it."""
        if not self.texts:
            return

        tokens = encode_documents(self.texts)
        ends = np.flatnonzero(tokens == END_OF_TEXT) + 1  # (documents)
        documents = np.split(tokens, ends[:-1])
        order = np.argsort(self.places, kind="stable")
        name = f"{self.key}-{len(self.records):06d}.part"
        content = np.concatenate([documents[i] for i in order]).tobytes()
        write_whole(self.folder / name, content, is_forced=False)

        num_places = len(TEST_SHARES) + 1
        num_tokens = np.bincount(self.places, np.diff(ends, prepend=0), num_places)
        self.records.append(
            {
                "name": name,
                "crc32": zlib.crc32(content),
                "documents": np.bincount(self.places, minlength=num_places).tolist(),
                "tokens": num_tokens.astype(int).tolist(),
            }
        )
        self.clear()


def place_hash(name: str, row: int) -> float:
    """Map the place of a document to [0, 1): its split depends on nothing else."""
    digest = hashlib.blake2b(f"{name} {row}".encode(), digest_size=8).digest()

    return int.from_bytes(digest, "little") / 2**64


# --- Joining ---


class JoinedFiles:
    """The two token files, growing by the parts of a journal, also over several attempts.

    A part is deleted as soon as its copy is forced onto the disk: so the disk holds the tokens
    about once, and the parts that are missing are those that were joined.
    """

    # Parts wait for the disk until they are so many bytes, or this share of what is joined.
    MIN_WAITING = 1 << 20
    WAITING_SHARE = 1 / 32

    def __init__(self, folder: Path, journal: Journal):
        self.folder = folder
        self.journal = journal
        # How many classes of documents are tested on, once it is known.
        self.num_test_classes: int | None = None
        self.num_joined = 0
        self.num_bytes = 0
        self.waiting: list[Path] = []
        self.num_waiting = 0
        self.files = {split: open(folder / f"{split}.bin", "a+b") for split in SPLITS}  # noqa: SIM115
        self.digests = {split: hashlib.sha256() for split in SPLITS}

    def __enter__(self) -> "JoinedFiles":
        self.go_on()

        return self

    def __exit__(self, *_) -> None:
        for file in self.files.values():
            file.close()

    def go_on(self) -> None:
        """Go back to what an earlier attempt has surely joined, and check the parts it left."""
        parts = self.journal.parts
        is_left = [(self.folder / part["name"]).exists() for part in parts]
        self.num_joined = is_left.index(True) if True in is_left else len(parts)
        self.choose_share()

        if self.num_test_classes is None:
            self.num_joined = 0

        joined = parts[: self.num_joined]

        for split, file in self.files.items():
            size = sum(self.size(part, split) for part in joined)

            if os.fstat(file.fileno()).st_size < size:
                shutil.rmtree(self.folder)

                raise DataError(
                    f"{file.name} was damaged and is deleted; start the same command again."
                )

            file.truncate(size)
            file.seek(0)
            self.num_bytes += size

            while chunk := file.read(1 << 24):
                self.digests[split].update(chunk)

        for number in range(self.num_joined, len(parts)):
            if self.read(parts[number]) is None:
                self.journal.keep(number)
                break

    def read(self, part: dict) -> bytes | None:
        """Return the content of a part, None when it is not what the journal says."""
        with contextlib.suppress(FileNotFoundError):
            content = (self.folder / part["name"]).read_bytes()

            return content if zlib.crc32(content) == part["crc32"] else None

        return None

    def size(self, part: dict, split: str) -> int:
        """Return how many bytes of a part belong to a split; all to none while that is open."""
        if self.num_test_classes is None:
            return 0

        return sum(part["tokens"][self.classes[split]]) * TOKEN_TYPE.itemsize

    @property
    def classes(self) -> dict[str, slice]:
        return {"train": slice(self.num_test_classes, None), "test": slice(self.num_test_classes)}

    @property
    def test_share(self) -> float:
        return TEST_SHARES[self.num_test_classes - 1]

    def choose_share(self) -> None:
        """Choose the first share of the documents that is enough to test on, else the largest.

        More text only adds to what each share gives, so the first one may be sure early.
        """
        tokens = sum_lists(self.journal.parts, "tokens")
        is_enough = np.cumsum(tokens[:-1]) >= MIN_TEST_TOKENS

        if is_enough[0]:
            self.num_test_classes = 1
        elif self.journal.is_complete:
            found = np.append(np.flatnonzero(is_enough), len(TEST_SHARES) - 1)
            self.num_test_classes = int(found[0]) + 1

    def add_new_parts(self) -> None:
        """Append what the journal has more than the files, if the share to test on is known.

        Raises:
            DataError: when a part is damaged.
        """
        if self.num_test_classes is None:
            self.choose_share()

        if self.num_test_classes is None:
            return

        for part in self.journal.parts[self.num_joined :]:
            content = self.read(part)

            if content is None:
                raise DataError(
                    f"A part in {self.folder} was damaged; start the same command again."
                )

            num_test = self.size(part, "test")
            self.append("test", content[:num_test])
            self.append("train", content[num_test:])
            self.num_joined += 1
            self.num_bytes += len(content)
            self.num_waiting += len(content)
            self.waiting.append(self.folder / part["name"])

            if self.num_waiting > max(self.MIN_WAITING, self.WAITING_SHARE * self.num_bytes):
                self.force()

    def append(self, split: str, content: bytes) -> None:
        self.files[split].write(content)
        self.digests[split].update(content)

    def force(self) -> None:
        """Force the files onto the disk, and delete the parts that are in them."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

        for path in self.waiting:
            path.unlink()

        self.waiting, self.num_waiting = [], 0

    def finish(self) -> dict[str, dict]:
        """Append all that is left; return documents, tokens and sha256 of both files."""
        self.add_new_parts()
        self.force()
        sums = {key: sum_lists(self.journal.parts, key) for key in ("documents", "tokens")}

        return {
            split: {
                **{key: int(values[classes].sum()) for key, values in sums.items()},
                "sha256": self.digests[split].hexdigest(),
            }
            for split, classes in self.classes.items()
        }


def sum_lists(parts: list[dict], key: str) -> np.ndarray:
    """Add up, by class, the documents or the tokens of all parts."""
    return np.sum([part[key] for part in parts], axis=0) + np.zeros(len(TEST_SHARES) + 1, dtype=int)


def write_whole(path: Path, content: bytes, is_forced: bool = True) -> None:
    """Write a small file so that it is either complete or absent, whatever happens.

    Args:
        is_forced: onto the disk, so that it also survives a power failure.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    try:
        with open(temporary, "wb") as file:
            file.write(content)

            if is_forced:
                file.flush()
                os.fsync(file.fileno())

        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
