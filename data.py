"""Makes batches out of token files: the stream of training samples, and the windows to test on.

Position decides: sample number i is a pure function of (seed, i). A run resumes from one integer,
and the number of processes changes nothing but speed.

A run asks `Corpus.batch` for a micro-batch by its number; `SampleStream` cuts it from the tokens.

Axes of the tensors: B samples, T tokens (block_size).
"""

import functools
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from system.distributed import World
from text.errors import DataError
from text.preparation import load_or_prepare
from text.sources import Outputs, Source, parse_source
from text.token_files import TokenDataset
from text.tokenizer import TOKEN_TYPE, Tokenizer
from text.vocabulary import open_tokenizer

# Token ids and targets, int64 (B, T) each.
Batch = tuple[Tensor, Tensor]
# Sources as `--dataset` names them, with their weights, if any.
Sources = list[tuple[Source, float | None]]


class TrainingData(Protocol):
    """What a run needs of its data: Corpus in pre-training, InstructionData in fine-tuning."""

    @property
    def fingerprint(self) -> list:
        """Identifies the data: a resumed run compares it with the one in its checkpoint."""
        ...

    @property
    def updates_per_epoch(self) -> int: ...

    @property
    def mean_length(self) -> int:
        """The mean number of tokens in a sample."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """The names of the sources; each has a test loss of its own."""
        ...

    def batch_numbers(self, update: int) -> range:
        """Return the numbers of the micro-batches of an update."""
        ...

    def batch(self, number: int) -> Batch:
        """Return a micro-batch by its number."""
        ...

    def test_batches(self) -> dict[str, Iterable[Batch]]:
        """Return the batches to test on, by their source."""
        ...

    def mean_loss(self, losses: dict[str, float]) -> float:
        """Return the mean of the test losses of all sources."""
        ...


@dataclass
class Corpus:
    """The data of a pre-training run: its sources, opened.

    Args:
        stream: the samples to train on.
        test_windows: the windows to test on, by source.
        batches_per_update: micro-batches of batch_size samples.
    """

    datasets: list[TokenDataset]
    stream: "SampleStream"
    test_windows: dict[str, "EvaluationWindows"]
    batch_size: int
    batches_per_update: int
    updates_per_epoch: int

    @property
    def fingerprint(self) -> list[list]:
        """Name, weight and checksum of every source."""
        return [
            [dataset.name, weight, dataset.fingerprint]
            for dataset, weight in zip(self.datasets, self.stream.shares, strict=True)
        ]

    @property
    def sources(self) -> list[str]:
        return list(self.test_windows)

    @property
    def mean_length(self) -> int:
        return self.stream.block_size

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def num_tokens(self) -> int:
        """The tokens to train on."""
        return sum(len(dataset.train) for dataset in self.datasets)

    def batch_numbers(self, update: int) -> range:
        first = update * self.batches_per_update
        return range(first, first + self.batches_per_update)

    def batch(self, number: int) -> Batch:
        return self.stream.batch(number * self.batch_size, self.batch_size)

    def test_batches(self) -> dict[str, Iterable[Batch]]:
        return {
            name: windows.batches(self.batch_size) for name, windows in self.test_windows.items()
        }

    def mean_loss(self, losses: dict[str, float]) -> float:
        """Return the mean of the sources' losses by their weights."""
        pairs = zip(self.stream.shares, self.datasets, strict=True)
        return sum(weight * losses[dataset.name] for weight, dataset in pairs)

    def describe(self) -> None:
        for dataset, weight in zip(self.datasets, self.stream.shares, strict=True):
            share = f", {weight:.2%} of the samples" if weight < 1 else ""
            print(
                f"Data:   {dataset.name}, {len(dataset.train):,} tokens, {len(dataset.test):,} to"
                f" test{share}"
            )


def parse_sources(
    values: Sequence[str],
    excluded: Outputs,
    encoding: str = "",
    folder: Path | None = None,
) -> Sources:
    """Read the values of `--dataset`.

    Args:
        excluded: as TextFiles has them.
        encoding: of text that is neither UTF-8 nor marked as UTF-16.
        folder: that of the token files.

    Raises:
        ValueError: when a value names no source, a name is given twice, or weights do not fit.
    """
    try:
        sources = [parse_source(value, excluded, encoding, folder) for value in values]
        resolve_weights([weight for _, weight in sources], [1] * len(sources))
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None

    if len({source.name for source, _ in sources}) < len(sources):
        raise ValueError("--dataset: a source is named twice")

    return sources


def open_corpus(
    settings: Namespace,
    sources: Sources,
    world: World,
    tokenizer: Tokenizer | None = None,
    saved: Sequence[list] = (),
) -> Corpus:
    """Open the sources of a run, for training and for testing.

    Args:
        tokenizer: that of a checkpoint; None for the one of --vocabulary_size.
        saved: the fingerprint of a run that is resumed, whose token files are not replaced.

    Raises:
        DataError: when files are damaged, or a source is unfit or too short.
    """
    kept = [checksum for *_, checksum in saved]
    datasets = open_datasets(settings, sources, world, tokenizer, kept=kept)
    trains = [dataset.train for dataset in datasets]
    weights = resolve_weights([weight for _, weight in sources], [len(t) for t in trains])
    samples_per_update = settings.batch_size * settings.gradient_accumulation_steps
    return Corpus(
        datasets,
        SampleStream(trains, weights, settings.block_size, settings.seed),
        {each.name: EvaluationWindows(each.test, settings.block_size) for each in datasets},
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.samples_per_epoch // samples_per_update,
    )


def open_datasets(
    settings: Namespace,
    sources: Sources,
    world: World,
    tokenizer: Tokenizer | None = None,
    is_split: bool = True,
    kept: Sequence[str] = (),
) -> list[TokenDataset]:
    """Open the token files of sources; prepare those that are missing.

    Args:
        tokenizer: as open_corpus has it.
        is_split, kept: as load_or_prepare has them.

    Raises:
        DataError: when files are damaged, or a source is unfit.
    """
    folder, num_processes = Path(settings.dataset_path), settings.num_dataset_processes
    with world.one_per_machine_first():
        if tokenizer is None:
            some = [source for source, _ in sources]
            tokenizer = open_tokenizer(some, folder, settings.vocabulary_size)

        datasets = [
            load_or_prepare(source, folder, tokenizer, num_processes, is_split, kept)
            for source, _ in sources
        ]

    world.check_same("The vocabularies", tokenizer.encoding)
    world.check_same("The data", [dataset.fingerprint for dataset in datasets])
    return datasets


class SampleStream:
    """An endless sequence of training samples: sample number i is a pure function of (seed, i).

    In each pass a source is a ring of tokens. The pass starts at a random token, cuts the ring into
    windows and visits them in a permuted order. So each token is a target once before any is seen
    twice, except for a rest of fewer than block_size tokens. Sources take turns by their weights.

    Args:
        sources: token ids of every source, uint16 (tokens).
        weights: the share of every source, above 0, exact or not; they need not add up to one.
        block_size: the length T of a sample in tokens.
        seed: any integer from 0.

    Raises:
        DataError: when a source is shorter than one sample and its last target.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray],
        weights: Sequence[Fraction | float],
        block_size: int,
        seed: int,
    ):
        for tokens in sources:
            if len(tokens) < block_size + 1:
                raise DataError(
                    f"The training data has {len(tokens):,} tokens, one sample takes"
                    f" {block_size + 1:,}; lower --block_size or give more text."
                )

        # Slicing a plain array is faster than slicing a memory-mapped one.
        self.sources = [np.asarray(tokens) for tokens in sources]
        self.block_size = block_size
        self.seed = seed
        self.turns = take_turns(weights)  # (period)
        # For each place of the period: how many turns its source has had before it.
        self.ranks = np.empty_like(self.turns)
        self.counts = np.bincount(self.turns, minlength=len(sources))  # (sources)

        # Each source's share of the samples, after rounding to the period.
        self.shares = (self.counts / len(self.turns)).tolist()
        for source in range(len(sources)):
            places = np.flatnonzero(self.turns == source)
            self.ranks[places] = np.arange(len(places))

    def batch(self, first: int, batch_size: int) -> Batch:
        """Return samples first to first + batch_size - 1.

        Returns:
            Token ids x and targets y, each int64 (B, T); y is x shifted by one token.
        """
        windows = np.empty((batch_size, self.block_size + 1), dtype=TOKEN_TYPE)  # (B, T + 1)
        for row, sample in enumerate(range(first, first + batch_size)):
            tokens, start = self.locate(sample)
            window = tokens[start : start + self.block_size + 1]
            windows[row, : len(window)] = window
            # Tokens are a ring: the first follows the last.
            windows[row, len(window) :] = tokens[: self.block_size + 1 - len(window)]

        return split_windows(windows)

    def locate(self, sample: int) -> tuple[np.ndarray, int]:
        """Return the source of a sample and where in it the sample begins."""
        period, place = divmod(sample, len(self.turns))
        source = int(self.turns[place])
        index = period * int(self.counts[source]) + int(self.ranks[place])

        tokens = self.sources[source]
        num_windows = len(tokens) // self.block_size
        number, index = divmod(index, num_windows)

        phase, *keys = random_numbers(self.seed, source, number, count=5)
        start = phase + permute(index, num_windows, keys) * self.block_size
        return tokens, start % len(tokens)


class EvaluationWindows:
    """Fixed, evenly spaced windows of a test split: the same ones at every evaluation.

    Args:
        max_windows: the most windows to take, evenly spaced; None takes all, side by side.

    Raises:
        DataError: when not even one window fits.
    """

    MAX_WINDOWS = 256

    def __init__(self, tokens: np.ndarray, block_size: int, max_windows: int | None = MAX_WINDOWS):
        available = (len(tokens) - 1) // block_size
        if available < 1:
            raise DataError(
                f"The test data has {len(tokens):,} tokens, one window takes {block_size + 1:,};"
                " lower --block_size or give more text."
            )

        self.tokens = tokens
        self.block_size = block_size
        self.starts = np.linspace(
            0,
            (available - 1) * block_size,
            min(available, max_windows or available),
            dtype=np.int64,
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_targets(self) -> int:
        return len(self) * self.block_size

    def num_bytes(self, token_sizes: np.ndarray) -> int:
        """Return the bytes of the text of all targets.

        Args:
            token_sizes: the bytes of each token, int64 (V).
        """
        return sum(
            int(token_sizes[self.tokens[start + 1 : start + self.block_size + 1]].sum())
            for start in self.starts
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all windows as inputs and targets, int64 (B, T); the last batch may be smaller."""
        for first in range(0, len(self.starts), batch_size):
            starts = self.starts[first : first + batch_size]
            windows = [self.tokens[start : start + self.block_size + 1] for start in starts]
            yield split_windows(np.stack(windows))


def resolve_weights(weights: Sequence[float | None], num_tokens: Sequence[int]) -> list[Fraction]:
    """Turn the weights of `--dataset` into shares of the samples that add up to one.

    Sources without a weight share the rest in proportion to their numbers of tokens.

    Raises:
        ValueError: when weights leave nothing for the sources that have none.
    """
    # Exact: 0.1 means one tenth, not the nearest binary fraction.
    exact = [None if weight is None else Fraction(str(weight)) for weight in weights]
    given = sum(weight for weight in exact if weight is not None)
    unweighted = sum(n for n, weight in zip(num_tokens, exact, strict=True) if weight is None)
    if not unweighted:
        return [weight / given for weight in exact if weight is not None]

    if given >= 1:
        raise ValueError(
            f"weights add up to {float(given):g}, which leaves nothing for the other sources"
        )

    return [
        (1 - given) * Fraction(n, unweighted) if weight is None else weight
        for n, weight in zip(num_tokens, exact, strict=True)
    ]


@functools.lru_cache(maxsize=64)
def random_numbers(*key: int, count: int) -> list[int]:
    """Return count random 64-bit numbers, a pure function of the key."""
    return np.random.SeedSequence(key).generate_state(count, np.uint64).tolist()


def take_turns(weights: Sequence[Fraction | float], max_period: int = 10_000) -> np.ndarray:
    """Choose a source for every place of a period so that no share is ever off by one sample.

    The shares are multiples of one in period: exact where a period of at most max_period allows
    it, else rounded to it. Of the S sources, those that are behind by 1 / (2 S - 2) turns or more
    are due; the one that would be too far behind first has its turn (Tijdeman 1980, The chairman
    assignment problem).

    Returns:
        Indices of sources, int64 (period).
    """
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int64)

    counts = np.array(count_turns(weights, max_period))  # (S)
    period, slack = int(counts.sum()), 2 * len(weights) - 2
    behind = np.zeros(len(weights), dtype=np.int64)  # in turns times period
    turns = np.empty(period, dtype=np.int64)
    for place in range(period):
        behind += counts
        is_due = behind * slack >= period
        deadline = (period * (slack - 1) - behind * slack) / counts
        turns[place] = source = np.where(is_due, deadline, np.inf).argmin()
        behind[source] -= period

    return turns


def count_turns(weights: Sequence[Fraction | float], max_period: int) -> list[int]:
    """Return how many turns of a period each source has, in proportion to its weight."""
    fractions = [Fraction(str(weight)) for weight in weights]
    shares = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= max_period:
        return [int(share * period) for share in shares]

    counts = [max(1, math.floor(share * max_period)) for share in shares]
    # The turns that rounding down has left go to the sources that lost most.
    losses = [share * max_period - count for share, count in zip(shares, counts, strict=True)]
    for source in sorted(range(len(shares)), key=lambda source: -losses[source]):
        counts[source] += sum(counts) < max_period

    return counts


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Map index to its place in a pseudo-random permutation of range(size), in constant time.

    A Feistel network permutes the next power of four; a place beyond size is permuted again (cycle
    walking: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains).

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
    """Hash a 64-bit number (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def split_windows(windows: np.ndarray) -> Batch:
    """Turn windows (B, T + 1) into inputs and targets, int64 (B, T)."""
    x, y = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
    return torch.from_numpy(x), torch.from_numpy(y)
