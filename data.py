"""Text in, token ids out: the tokenizer, sources of text, token files and the stream of samples.

Text is prepared once: every document of a source is tokenized, followed by end-of-text, and
appended to NAME-train.bin or NAME-test.bin (uint16, little-endian, no header). NAME.json is written
last and describes both; without it there is no dataset. Training maps the files into memory.

Axes of the tensors: B samples, T tokens (block_size).
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm

ENCODING = "r50k_base"
VOCABULARY_SIZE = 50257
END_OF_TEXT = 50256

RANKS_PATH = Path(__file__).parent / "assets" / "r50k_base.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Pieces of text within which bytes are merged (Radford et al. 2019, as tiktoken writes it).
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The target of a position without loss; the value that torch's cross entropy ignores.
IGNORE_INDEX = -100

FORMAT_VERSION = 1
TOKEN_TYPE = np.dtype("<u2")
SPLITS = ("train", "test")

# The share of the documents to test on: the first that gives 64 windows of GPT-2's context.
TEST_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
MIN_TEST_TOKENS = 65_536

PLAIN_TEXT = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".org"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


class DataError(Exception):
    """Data that is missing, damaged or unfit; the message is one line for the user."""


@functools.cache
def load_encoding() -> tiktoken.Encoding:
    """Load the tokenizer of GPT-2 from the ranks that this repository carries; nothing is fetched.

    Raises:
        DataError: when the file of ranks is missing or is not the published one.
    """
    try:
        ranks = load_tiktoken_bpe(str(RANKS_PATH), expected_hash=RANKS_SHA256)
    except (OSError, ValueError) as error:
        raise DataError(f"{RANKS_PATH} is missing or damaged; restore it with git.") from error

    return tiktoken.Encoding(
        ENCODING,
        explicit_n_vocab=VOCABULARY_SIZE,
        pat_str=PIECES,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )


def encode(text: str) -> np.ndarray:
    """Tokenize text as it stands: a literal <|endoftext|> in it is text like any other.

    Returns:
        Token ids, uint16 (T).
    """
    try:
        tokens = load_encoding().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot express
        return encode(text.encode("utf-8", errors="replace").decode("utf-8"))

    return tokens.astype(TOKEN_TYPE)


@dataclass(frozen=True)
class StandardLibrary:
    """The standard library of the running interpreter without its tests, a document per module."""

    name = "stdlib"
    num_shards = 1

    @property
    def description(self) -> str:
        return f"standard library of Python {sys.version.split()[0]}"

    def documents(self, shard: int) -> Iterator[str]:
        root = Path(sysconfig.get_path("stdlib"))
        excluded = TEST_FOLDERS | {"site-packages", "dist-packages", "__pycache__"}

        for path in sorted(root.rglob("*.py")):
            if not excluded & set(path.relative_to(root).parts):
                yield path.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class TextFiles:
    """Plain text: a file cut into documents, or a document per file below a folder, sorted."""

    path: Path

    num_shards = 1

    @property
    def name(self) -> str:
        # Two folders of one name must not share their token files.
        digest = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()

        return f"{self.path.resolve().stem or 'root'}-{digest[:8]}"

    @property
    def description(self) -> str:
        """The path and a digest of names, sizes and times, so that a change is noticed."""
        digest = hashlib.sha256()

        for path in self.files():
            status = path.stat()
            name = path.relative_to(self.path)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())

        return f"{self.path.resolve()} {digest.hexdigest()[:16]}"

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]

        paths = (path for path in self.path.rglob("*") if path.suffix.lower() in PLAIN_TEXT)

        return sorted(path for path in paths if path.is_file())

    def documents(self, shard: int) -> Iterator[str]:
        for path in self.files():
            text = path.read_text(encoding="utf-8", errors="replace")

            if path == self.path:
                yield from cut(text)
            else:
                yield text


def cut(text: str, size: int = 8192) -> Iterator[str]:
    """Cut a long text into documents of size characters or more, at blank lines if it has any.

    A lone file has to give both text to train on and text to test on.
    """
    document = ""

    for line in text.splitlines(keepends=True):
        document += line

        if len(document) >= (2 * size if line.strip() else size):
            yield document
            document = ""

    yield document


@dataclass(frozen=True)
class HubDataset:
    """The column `text` of a dataset on the Hugging Face Hub, streamed file by file."""

    repository: str
    config: str | None = None
    name: str = ""

    @property
    def description(self) -> str:
        return f"{self.repository}:{self.config}" if self.config else self.repository

    @functools.cached_property
    def stream(self):
        from datasets import load_dataset

        return load_dataset(self.repository, self.config, split="train", streaming=True)

    @property
    def num_shards(self) -> int:
        with self.reported_errors():
            return self.stream.num_shards

    def documents(self, shard: int) -> Iterator[str]:
        with self.reported_errors():
            for row in self.stream.shard(self.num_shards, shard):
                if "text" not in row:
                    raise DataError(f"{self.description} has no column `text`.")

                yield row["text"]

    @contextlib.contextmanager
    def reported_errors(self) -> Iterator[None]:
        """Turn whatever the client raises, dozens of types, into one line."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.description} cannot be read from the Hub: {first_line(error)}"
                " (--dataset=stdlib or a folder of your own needs no network)."
            ) from error


Source = StandardLibrary | TextFiles | HubDataset


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

    if match := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", value):
        name = re.sub(r"[/:]", "--", value)
        return HubDataset(match[1], match[2], name), weight

    raise ValueError(
        f"{value or 'nothing'} is neither openwebtext, stdlib, a file or folder that is there,"
        " nor owner/name"
    )


def resolve_weights(weights: Sequence[float | None], num_tokens: Sequence[int]) -> list[float]:
    """Turn the weights of `--dataset` into shares of the samples that add up to one.

    Sources without a weight divide what the others leave by their numbers of tokens.

    Raises:
        ValueError: when weights leave nothing for the sources that have none.
    """
    given = sum(weight for weight in weights if weight is not None)
    unweighted = sum(n for n, weight in zip(num_tokens, weights, strict=True) if weight is None)

    if not unweighted:
        return [weight / given for weight in weights]

    if given >= 1:
        raise ValueError(f"weights add up to {given:g}, which leaves nothing for the other sources")

    return [
        (1 - given) * n / unweighted if weight is None else weight
        for n, weight in zip(num_tokens, weights, strict=True)
    ]


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
    sidecar_path = folder / f"{source.name}.json"

    if not sidecar_path.exists():
        prepare(source, folder, num_processes)

    sidecar = read_sidecar(sidecar_path)

    if sidecar["source"] != source.description:
        print(f"{source.name}: prepared from {sidecar['source']}, which has changed; once more.")
        prepare(source, folder, num_processes)
        sidecar = read_sidecar(sidecar_path)

    verify(folder, source.name, sidecar)
    train, test = (
        np.memmap(token_path(folder, source.name, split), dtype=TOKEN_TYPE, mode="r")
        for split in SPLITS
    )

    return TokenDataset(source.name, train, test, sidecar["train"]["sha256"])


def token_path(folder: Path, name: str, split: str) -> Path:
    return folder / f"{name}-{split}.bin"


def read_sidecar(path: Path) -> dict:
    """Read what is known about a pair of token files, and refuse what this code cannot use."""
    remedy = f"delete {path} to have the dataset prepared again"

    try:
        sidecar = json.loads(path.read_text())
        version, encoding = sidecar["format_version"], sidecar["encoding"]
        [sidecar[split][key] for split in SPLITS for key in ("documents", "sha256")]
        [sidecar[split]["tokens"] + 0 for split in SPLITS]
        sidecar["source"]
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
    stamp_path = folder / f"{name}.verified"
    stamp = ""

    for split in SPLITS:
        path = token_path(folder, name, split)
        expected = sidecar[split]["tokens"] * TOKEN_TYPE.itemsize

        if not path.exists():
            raise DataError(f"{path} is missing; delete {name}.json to have it prepared again.")

        status = path.stat()
        stamp += f"{sidecar[split]['sha256']} {status.st_size} {status.st_mtime_ns}\n"

        if status.st_size != expected:
            raise DataError(
                f"{path} has {status.st_size:,} bytes where {expected:,} were written;"
                f" delete {name}.json to have it prepared again."
            )

    if stamp_path.exists() and stamp_path.read_text() == stamp:
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
        write_whole(stamp_path, stamp.encode())


def scan(path: Path) -> tuple[str, int]:
    """Return the sha256 of a token file and its largest id (-1 when it is empty)."""
    digest, largest = hashlib.sha256(), -1

    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype=TOKEN_TYPE).max()))

    return digest.hexdigest(), largest


def prepare(source: Source, folder: Path, num_processes: int) -> None:
    """Tokenize a source into its token files, the same bytes for any number of processes.

    Raises:
        DataError: when the source cannot be read, or is too small to train and test on.
        OSError: when the files cannot be written.
    """
    parts = folder / f"{source.name}.parts"

    try:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror}. Choose another --dataset_path."
        ) from error

    try:
        test_share = TEST_SHARES[0]
        counts = tokenize_shards(source, parts, test_share, num_processes)

        if (share := sufficient_share(counts.pop("tokens_by_share"))) != test_share:
            test_share = share
            counts = tokenize_shards(source, parts, test_share, num_processes)
            del counts["tokens_by_share"]

        for split in SPLITS:
            if not counts[split]["documents"]:
                raise DataError(
                    f"{source.name} has {counts['train']['documents']} documents to train on and"
                    f" {counts['test']['documents']} to test on; it takes at least one of each,"
                    " so give more documents."
                )

        for split in SPLITS:
            counts[split]["sha256"] = join_parts(parts, folder, source, split)
    finally:
        shutil.rmtree(parts, ignore_errors=True)

    sidecar = {
        "format_version": FORMAT_VERSION,
        "source": source.description,
        "encoding": ENCODING,
        "split": f"test: blake2b('shard row') below {test_share} of its range",
        **counts,
    }
    write_whole(folder / f"{source.name}.json", json.dumps(sidecar, indent=2).encode())


def sufficient_share(tokens_by_share: list[int]) -> float:
    """Choose the first share of the documents that is enough to test on, else the largest."""
    for share, tokens in zip(TEST_SHARES, tokens_by_share, strict=True):
        if tokens >= MIN_TEST_TOKENS:
            return share

    return TEST_SHARES[-1]


def tokenize_shards(source: Source, parts: Path, test_share: float, num_processes: int) -> dict:
    """Tokenize every shard of a source into part files, and add up what is in them.

    Returns:
        What tokenize_shard returns, for all shards together.
    """
    num_shards = source.num_shards
    num_workers = min(num_processes, num_shards, os.cpu_count() or 1)
    work = functools.partial(tokenize_shard, source, parts, test_share)
    totals = empty_counts()

    bar = {"desc": f"Tokenizing {source.name}", "unit": " tokens", "unit_scale": True}

    with tqdm(**bar, leave=False) as progress:
        for counts in map_in_processes(work, range(num_shards), num_workers):
            for split in SPLITS:
                for key, count in counts[split].items():
                    totals[split][key] += count

                progress.update(counts[split]["tokens"])

            totals["tokens_by_share"] = [
                sum(pair)
                for pair in zip(totals["tokens_by_share"], counts["tokens_by_share"], strict=True)
            ]

    return totals


def empty_counts() -> dict:
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}

    return {**counts, "tokens_by_share": [0] * len(TEST_SHARES)}


def map_in_processes(work, items: Iterable, num_workers: int) -> Iterator:
    """Apply work to all items, in this process where one is enough."""
    if num_workers == 1:
        yield from map(work, items)
        return

    context = multiprocessing.get_context("spawn")

    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def tokenize_shard(source: Source, parts: Path, test_share: float, shard: int) -> dict:
    """Write the tokens of one shard to its two part files.

    Returns:
        For each split the numbers of documents and tokens, and under `tokens_by_share` the number
        of tokens that each of TEST_SHARES would test on.
    """
    counts = empty_counts()

    with (
        open(part_path(parts, "train", shard), "wb") as train_file,
        open(part_path(parts, "test", shard), "wb") as test_file,
    ):
        for row, text in enumerate(source.documents(shard)):
            if not text:
                continue

            place = place_hash(shard, row)
            split = "test" if place < test_share else "train"
            tokens = np.append(encode(text), TOKEN_TYPE.type(END_OF_TEXT))

            (test_file if split == "test" else train_file).write(tokens.tobytes())
            counts[split]["documents"] += 1
            counts[split]["tokens"] += len(tokens)

            for i, share in enumerate(TEST_SHARES):
                counts["tokens_by_share"][i] += len(tokens) * (place < share)

    return counts


def part_path(parts: Path, split: str, shard: int) -> Path:
    return parts / f"{split}-{shard:05d}.bin"


def place_hash(shard: int, row: int) -> float:
    """Map the place of a document to [0, 1): its split depends on nothing else."""
    digest = hashlib.blake2b(f"{shard} {row}".encode(), digest_size=8).digest()

    return int.from_bytes(digest, "little") / 2**64


def join_parts(parts: Path, folder: Path, source: Source, split: str) -> str:
    """Append the parts of a split to one another, put the file in its place, return its sha256.

    Each part is deleted once it has been copied, so that the disk holds the tokens once.
    """
    digest = hashlib.sha256()
    joined = parts / f"{split}.bin"

    with open(joined, "wb") as output:
        for shard in range(source.num_shards):
            part = part_path(parts, split, shard)

            with open(part, "rb") as file:
                while chunk := file.read(1 << 24):
                    output.write(chunk)
                    digest.update(chunk)

            part.unlink()

        output.flush()
        os.fsync(output.fileno())

    os.replace(joined, token_path(folder, source.name, split))

    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is either complete or absent, whatever happens."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class SampleStream:
    """An endless sequence of training samples: sample number i is a pure function of (seed, i).

    A pass over a source cuts its tokens, taken as a ring, into windows at a random phase and visits
    them in a permuted order: each token is a target once before any is seen twice, except for fewer
    than block_size tokens that fill no window. Sources take turns by their weights.

    Args:
        sources: token ids of every source, uint16 (tokens).
        weights: the share of every source, above 0; they need not add up to one.
        block_size: the length T of a sample in tokens.
        seed: any integer from 0.

    Raises:
        DataError: when a source is shorter than one sample and its last target.
    """

    # Shares are kept in units of one sample in so many.
    PERIOD = 10_000

    def __init__(
        self, sources: Sequence[np.ndarray], weights: Sequence[float], block_size: int, seed: int
    ):
        for tokens in sources:
            if len(tokens) < block_size + 1:
                raise DataError(
                    f"The training data has {len(tokens):,} tokens, one sample takes"
                    f" {block_size + 1:,}; lower --block_size or give more text."
                )

        self.sources = sources
        self.weights = weights
        self.block_size = block_size
        self.seed = seed
        self.turns = take_turns(weights, self.PERIOD if len(sources) > 1 else 1)  # (period)
        # How often each source has had its turn before each place of the period.
        self.ranks = np.empty_like(self.turns)
        self.counts = np.bincount(self.turns, minlength=len(sources))  # (sources)

        for source in range(len(sources)):
            places = np.flatnonzero(self.turns == source)
            self.ranks[places] = np.arange(len(places))

    def batch(self, first: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return samples first to first + batch_size - 1.

        Returns:
            Token ids x and targets y, each int64 (B, T); y is x moved on by one token.
        """
        windows = np.stack([self.window(i) for i in range(first, first + batch_size)])  # (B, T + 1)

        return split_windows(windows)

    def window(self, sample: int) -> np.ndarray:
        """Return the tokens of one sample and its last target, uint16 (T + 1)."""
        period, place = divmod(sample, len(self.turns))
        source = int(self.turns[place])
        index = period * int(self.counts[source]) + int(self.ranks[place])

        tokens = self.sources[source]
        num_windows = len(tokens) // self.block_size
        number, index = divmod(index, num_windows)

        phase, *keys = random_numbers(self.seed, source, number, count=5)
        start = phase + permute(index, num_windows, keys) * self.block_size

        return read_ring(tokens, start % len(tokens), self.block_size + 1)


@functools.lru_cache(maxsize=64)
def random_numbers(*key: int, count: int) -> list[int]:
    """Return as many 64-bit numbers as asked for, a pure function of the key."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64).tolist()


def take_turns(weights: Sequence[float], period: int) -> np.ndarray:
    """Choose a source for every place of a period so that no share is ever off by one sample.

    Of the S sources, those that are behind by 1 / (2 S - 2) turns or more are due; the one that
    would be too far behind first has its turn (Tijdeman 1980, The chairman assignment problem).

    Returns:
        Indices of sources, int64 (period).
    """
    shares = [max(Fraction(1, period), Fraction(w) / Fraction(sum(weights))) for w in weights]
    shares = [share / sum(shares) for share in shares]
    slack = Fraction(1, max(2, 2 * len(shares) - 2))
    taken = [0] * len(shares)
    turns = np.empty(period, dtype=np.int64)

    for place in range(period):
        behind = [share * (place + 1) - t for share, t in zip(shares, taken, strict=True)]
        due = [s for s in range(len(shares)) if behind[s] >= slack]
        turns[place] = source = min(due, key=lambda s: (1 - slack - behind[s]) / shares[s])
        taken[source] += 1

    return turns


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Map index to its place in a pseudo-random permutation of range(size), in constant time.

    A Feistel network permutes the next power of four; places beyond size are walked on from (Black
    and Rogaway 2002, Ciphers with Arbitrary Finite Domains).

    Args:
        keys: one 64-bit number for each round.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1

    while True:
        left, right = index >> half_bits, index & mask

        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)

        index = left << half_bits | right

        if index < size:
            return index


def mix(value: int) -> int:
    """Spread the bits of a 64-bit number over all of it (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF

    return value ^ value >> 31


def read_ring(tokens: np.ndarray, start: int, length: int) -> np.ndarray:
    """Read length tokens from start, going on at the first after the last."""
    window = tokens[start : start + length]

    return np.concatenate([window, tokens[: length - len(window)]])


def split_windows(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn windows (B, T + 1) into inputs and targets, int64 (B, T)."""
    tokens = torch.from_numpy(windows.astype(np.int64))

    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class EvaluationWindows:
    """Fixed, evenly spaced windows of a test split: the same ones at every evaluation.

    Raises:
        DataError: when not even one window fits.
    """

    MAX_WINDOWS = 256

    def __init__(self, tokens: np.ndarray, block_size: int):
        available = (len(tokens) - 1) // block_size

        if available < 1:
            raise DataError(
                f"The test data has {len(tokens):,} tokens, one window takes {block_size + 1:,};"
                " lower --block_size or give more text."
            )

        self.tokens = tokens
        self.block_size = block_size
        self.starts = np.linspace(
            0, (available - 1) * block_size, min(available, self.MAX_WINDOWS), dtype=np.int64
        )

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield all windows as inputs and targets, int64 (B, T).

        All batches have one shape, so that a compiled network sees no other: the last one is filled
        up with windows whose targets are IGNORE_INDEX.
        """
        for first in range(0, len(self.starts), batch_size):
            starts = self.starts[first : first + batch_size]
            windows = [self.tokens[start : start + self.block_size + 1] for start in starts]
            padding = [windows[0]] * (batch_size - len(windows))

            x, y = split_windows(np.stack(windows + padding))
            y[len(windows) :] = IGNORE_INDEX

            yield x, y
