"""Micro-batches of instruction rows."""

import numpy as np
import pytest
import torch
from vocabularies import END_OF_TEXT

from text.instructions import Example
from text.rows import Examples
from training.instruction_data import IGNORE_INDEX, InstructionData, collate


def make_examples(num_rows: int = 101, seed: int = 0) -> list[Example]:
    """Rows of all lengths, each of one token id of its own, the second half to be predicted."""
    generator = np.random.default_rng(seed)

    return [
        Example(np.full(n, row + 1, dtype=np.uint16), np.arange(n) >= n // 2)
        for row, n in enumerate(generator.integers(2, 42, num_rows))
    ]


def make_data(examples, batch_size=4, batches_per_update=3, seed=3) -> InstructionData:
    examples = Examples(examples, examples, [])

    return InstructionData("rows", examples, batch_size, batches_per_update, 41, END_OF_TEXT, seed)


def rows_of(x: torch.Tensor) -> list[int]:
    return [row - 1 for row in x[:, 0].tolist() if row != END_OF_TEXT]


def test_an_epoch_has_every_row_once():
    batches = make_data(make_examples())
    orders = []

    for epoch in range(3):
        numbers = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
        orders.append([row for number in numbers for row in rows_of(batches.batch(number)[0])])

    assert all(sorted(order) == list(range(101)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_a_function_of_seed_and_number():
    examples = make_examples()
    one, two = (make_data(examples) for _ in range(2))
    other = make_data(examples, seed=4)
    numbers = [60, 3, 27, 3]
    backwards = {number: two.batch(number) for number in sorted(numbers, reverse=True)}

    for number in numbers:
        for left, right in zip(one.batch(number), backwards[number], strict=True):
            assert torch.equal(left, right)

    assert any(rows_of(one.batch(n)[0]) != rows_of(other.batch(n)[0]) for n in range(5))


def test_rows_are_padded_at_the_right_and_padding_is_no_target():
    examples = make_examples()
    x, y = collate(examples[:5], 8, 41, END_OF_TEXT)

    assert x.shape == y.shape
    assert x.shape[0] == 8
    assert x.shape[1] % 8 == 0 or x.shape[1] == 41
    assert (y[5:] == IGNORE_INDEX).all()

    for row, (tokens, is_target, _) in enumerate(examples[:5]):
        n = len(tokens) - 1
        assert x[row, :n].tolist() == tokens[:-1].tolist()
        assert (x[row, n:] == END_OF_TEXT).all()
        assert (y[row, n:] == IGNORE_INDEX).all()
        expected = [
            int(t) if on else IGNORE_INDEX for t, on in zip(tokens, is_target, strict=True)
        ][1:]
        assert y[row, :n].tolist() == expected


@pytest.mark.parametrize("block_size", [41, 44])
def test_no_batch_is_longer_than_the_context(block_size):
    examples = [Example(np.ones(block_size + 1, dtype=np.uint16), np.ones(block_size + 1, bool))]

    assert collate(examples, 1, block_size, END_OF_TEXT)[0].shape == (1, block_size)


def test_rows_of_like_length_are_put_together():
    examples = make_examples(4000)
    grouped = make_data(examples, batch_size=8)
    alone = make_data(examples, batch_size=8)
    alone.POOL = 1

    # Of the padding that is left nearly all fills up to a multiple of 8.
    assert grouped.padding < 0.17
    assert alone.padding > 0.4


def test_batches_to_test_on_have_every_row_once():
    examples = make_examples()
    data = make_data(examples)
    rows = [row for x, _ in data.test_batches()["rows"] for row in rows_of(x)]
    widths = [x.shape[1] for x, _ in data.test_batches()["rows"]]

    assert sorted(rows) == list(range(101))
    assert widths == sorted(widths, reverse=True)


def test_updates_have_every_batch_of_an_epoch_once():
    data = make_data(make_examples())
    numbers = [[*data.batch_numbers(update)] for update in range(2 * data.updates_per_epoch)]

    assert sum(numbers, []) == list(range(2 * data.batches_per_epoch))
    # The last update of an epoch has what is left.
    assert {len(update) for update in numbers} == {3, data.batches_per_epoch % 3}
