"""Measures how well a model predicts a source: loss, perplexity, and bits a byte."""

import itertools
import math

from data import EvaluationWindows
from text.errors import DataError
from text.token_files import TokenDataset
from training.metrics import perplexity
from training.trainer import Trainer


def windows_of(dataset: TokenDataset, block_size: int, is_all: bool) -> list[EvaluationWindows]:
    """Return all windows of a source's test split, or of each split that has any.

    Raises:
        DataError: when there is none.
    """
    splits = [dataset.test, dataset.train] if is_all else [dataset.test]
    long = [split for split in splits if len(split) > block_size]
    if is_all and not long:
        # All of a short text is one short window.
        long = [max(splits, key=len)]
        block_size = max(1, len(long[0]) - 1)

    try:
        return [EvaluationWindows(split, block_size, None) for split in long or splits]
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from None


def report_losses(
    trainer: Trainer, datasets: list[TokenDataset], batch_size: int, is_all: bool
) -> None:
    """Print how well a model predicts each source: in nats a token, and in bits a byte.

    Bits a byte compare models whose tokens differ in length.

    Raises:
        Interrupted: when a signal has come.
    """
    windows = [windows_of(dataset, trainer.model.block_size, is_all) for dataset in datasets]
    with trainer.stoppable():
        for dataset, parts in zip(datasets, windows, strict=True):
            batches = itertools.chain(*(part.batches(batch_size) for part in parts))
            loss = trainer.evaluate(batches)
            num_tokens = sum(part.num_targets for part in parts)
            num_bytes = sum(part.num_bytes(dataset.tokenizer.token_sizes) for part in parts)
            bits = loss * num_tokens / num_bytes / math.log(2)

            print(
                f"Loss:   {dataset.name}, {loss:.4f} nats a token, perplexity"
                f" {perplexity(loss):,.2f}, {bits:.4f} bits a byte; {num_tokens:,} tokens,"
                f" {num_bytes:,} bytes"
            )
