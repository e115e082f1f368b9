"""Makes batches out of instruction rows: what fine-tuning trains and tests on.

Axes of the tensors: B rows, T tokens.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from data import Batch
from text.instructions import Example
from text.rows import Examples

# The target of a position without loss; the value that torch's cross entropy ignores.
IGNORE_INDEX = -100


class InstructionData:
    """Rows to fine-tune on, in endless micro-batches.

    An epoch visits every example once in a random order. To save padding, the examples of POOL
    batches are sorted by length and cut into batches, which then come in a random order.

    Args:
        name: of the source.
        examples: of 2 to block_size + 1 tokens each.
        padding_token: fills batches up; it is never a target.
        batches_per_update: micro-batches of batch_size examples.
    """

    POOL = 64

    def __init__(
        self,
        name: str,
        examples: Examples,
        batch_size: int,
        batches_per_update: int,
        block_size: int,
        padding_token: int,
        seed: int,
    ):
        self.name = name
        self.examples = examples
        self.batch_size = batch_size
        self.batches_per_update = batches_per_update
        self.block_size = block_size
        self.padding_token = padding_token
        self.seed = seed
        self.lengths = np.array([len(example.tokens) for example in examples.train])
        self.batches_per_epoch = math.ceil(len(examples.train) / batch_size)
        # The last one has the batches that are left.
        self.updates_per_epoch = math.ceil(self.batches_per_epoch / batches_per_update)
        self.fingerprint = [examples.fingerprint]
        self.sources = [name]
        self.mean_length = int(self.lengths.mean())

    def batch_numbers(self, update: int) -> range:
        epoch, update = divmod(update, self.updates_per_epoch)
        first = update * self.batches_per_update
        last = min(first + self.batches_per_update, self.batches_per_epoch)
        before = epoch * self.batches_per_epoch
        return range(before + first, before + last)

    def batch(self, number: int) -> Batch:
        """Return a micro-batch by its number, with IGNORE_INDEX where there is no target."""
        epoch, index = divmod(number, self.batches_per_epoch)
        examples = [self.examples.train[i] for i in self.plan(epoch)[index]]
        return self.collate(examples)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the examples of every batch of an epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.examples.train))
        batches = []
        for pool in in_parts(order, self.POOL * self.batch_size):
            ordered = pool[np.argsort(self.lengths[pool], kind="stable")]
            some = list(in_parts(ordered, self.batch_size))
            batches += [some[i] for i in generator.permutation(len(some))]

        return batches

    def test_batches(self) -> dict[str, Iterable[Batch]]:
        """Return the examples to test on, from the longest to the shortest."""
        ordered = sorted(self.examples.test, key=lambda example: -len(example.tokens))
        parts = in_parts(ordered, self.batch_size)
        return {self.name: map(self.collate, parts)}

    def mean_loss(self, losses: dict[str, float]) -> float:
        return losses[self.name]

    @property
    def padding(self) -> float:
        """The share of the first epoch's tokens that are padding."""
        sizes = [self.batch(number)[0].numel() for number in range(self.batches_per_epoch)]
        return 1 - float((self.lengths - 1).sum()) / sum(sizes)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.batch_size, self.block_size, self.padding_token)


def in_parts(values, size: int) -> Iterator:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def collate(
    examples: Sequence[Example], batch_size: int, block_size: int, padding_token: int
) -> Batch:
    """Put examples into one batch, padded at the right, and filled up with empty rows.

    Returns:
        Token ids x and targets y, int64 (B, T); y is IGNORE_INDEX at positions without loss.
        T is a multiple of 8, as matrix units like it, or block_size.
    """
    longest = max(len(example.tokens) for example in examples) - 1
    length = min(math.ceil(longest / 8) * 8, block_size)
    x = np.full((batch_size, length), padding_token, dtype=np.int64)
    y = np.full((batch_size, length), IGNORE_INDEX, dtype=np.int64)
    for row, (tokens, is_target, _) in enumerate(examples):
        num_tokens = len(tokens) - 1
        x[row, :num_tokens] = tokens[:-1]
        y[row, :num_tokens] = np.where(is_target[1:], tokens[1:].astype(np.int64), IGNORE_INDEX)

    return torch.from_numpy(x), torch.from_numpy(y)
