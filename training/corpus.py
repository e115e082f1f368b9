"""The sources of a run, opened: what it trains on, what it is tested on, how well that goes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import EvaluationWindows, SampleStream, resolve_weights
from system.distributed import World
from text.preparation import load_or_prepare
from text.sources import Source, parse_source
from text.token_files import TokenDataset
from text.tokenizer import DataError
from training.pictures import perplexity
from training.trainer import StopSignal, Trainer

# Sources as `--dataset` names them, with their weights, if any.
Sources = list[tuple[Source, float | None]]


@dataclass
class Corpus:
    """Opened sources: what to train on, what to test on, and by which they are known."""

    datasets: list[TokenDataset]
    stream: SampleStream
    tests: dict[str, EvaluationWindows]

    @property
    def fingerprint(self) -> list[list]:
        """Name, weight and checksum of every source, by which a resumed run knows its data."""
        return [
            [dataset.name, weight, dataset.fingerprint]
            for dataset, weight in zip(self.datasets, self.stream.shares, strict=True)
        ]

    @property
    def num_tokens(self) -> int:
        """The tokens to train on."""
        return sum(len(dataset.train) for dataset in self.datasets)

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


def parse_sources(values: Sequence[str], written: tuple[Path, ...]) -> Sources:
    """Read the values of `--dataset`.

    Args:
        written: folders that are no part of a folder of text.

    Raises:
        ValueError: when one names no source, or weights or names do not go together.
    """
    try:
        sources = [parse_source(value, written) for value in values]
        resolve_weights([weight for _, weight in sources], [1] * len(sources))
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None

    if len({source.name for source, _ in sources}) < len(sources):
        raise ValueError("--dataset: a source is named twice")

    return sources


def open_datasets(
    sources: Sources, folder: Path, num_processes: int, world: World
) -> list[TokenDataset]:
    """Open the token files of sources, after preparing those that are not there.

    Raises:
        DataError: when files are damaged, or a source is unfit.
    """
    with world.one_per_machine_first():
        datasets = [load_or_prepare(source, folder, num_processes) for source, _ in sources]

    world.check_same("The data", [dataset.fingerprint for dataset in datasets])

    return datasets


def gather(datasets: list[TokenDataset], sources: Sources, block_size: int, seed: int) -> Corpus:
    """Put opened sources together.

    Raises:
        DataError: when one is too short.
    """
    trains = [dataset.train for dataset in datasets]
    weights = resolve_weights([weight for _, weight in sources], [len(t) for t in trains])

    return Corpus(
        datasets,
        SampleStream(trains, weights, block_size, seed),
        {dataset.name: EvaluationWindows(dataset.test, block_size) for dataset in datasets},
    )


def windows_of(dataset: TokenDataset, block_size: int, is_all: bool) -> list[EvaluationWindows]:
    """Return all windows of a source's test split, or of each split that has any.

    Raises:
        DataError: when there is none.
    """
    splits = [dataset.test, dataset.train] if is_all else [dataset.test]
    long = [split for split in splits if len(split) > block_size]

    try:
        return [EvaluationWindows(split, block_size, None) for split in long or splits]
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from None


def report_losses(
    trainer: Trainer, datasets: list[TokenDataset], batch_size: int, is_all: bool
) -> None:
    """Print how well a model predicts each source: in nats a token, and in bits a byte.

    Bits a byte compare models whose tokens differ in length.

    Args:
        is_all: whether all of a source is read, and not what is held back to test on alone.

    Raises:
        Interrupted: when a signal has come.
    """
    windows = [windows_of(dataset, trainer.model.block_size, is_all) for dataset in datasets]

    with StopSignal() as stop:
        for dataset, parts in zip(datasets, windows, strict=True):
            batches = itertools.chain(*(part.batches(batch_size) for part in parts))
            loss = trainer.evaluate(batches, stop)
            num_tokens = sum(part.num_targets for part in parts)
            num_bytes = sum(part.num_bytes for part in parts)
            bits = loss * num_tokens / num_bytes / math.log(2)

            print(
                f"Loss:   {dataset.name}, {loss:.4f} nats a token, perplexity"
                f" {perplexity(loss):,.2f}, {bits:.4f} bits a byte; {num_tokens:,} tokens,"
                f" {num_bytes:,} bytes"
            )
