"""The stream of samples and the windows to test on, against brute force."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    IGNORE_INDEX,
    EvaluationWindows,
    InstructionBatches,
    SampleStream,
    collate,
    ordered_batches,
    permute,
    resolve_weights,
    take_turns,
)
from text.instructions import Example
from text.tokenizer import END_OF_TEXT, DataError


def test_weights():
    assert resolve_weights([None, None], [300, 100]) == [Fraction(3, 4), Fraction(1, 4)]
    assert resolve_weights([None, 0.1], [300, 100]) == [Fraction(9, 10), Fraction(1, 10)]
    assert resolve_weights([1.0, 5.0], [5, 5]) == [Fraction(1, 6), Fraction(5, 6)]

    with pytest.raises(ValueError, match="leaves nothing"):
        resolve_weights([None, 1.5], [1, 1])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000])
def test_permutations_are_bijections(size):
    keys = [3, 1, 4, 1]
    order = [permute(i, size, keys) for i in range(size)]

    assert sorted(order) == list(range(size))

    if size > 100:
        assert order != [permute(i, size, [2, 7, 1, 8]) for i in range(size)]
        assert sum(a + 1 == b for a, b in zip(order, order[1:], strict=False)) < size / 3


@pytest.mark.parametrize(("num_tokens", "block_size"), [(9, 8), (64, 8), (100, 8), (103, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_is_a_target_once_a_pass(num_tokens, block_size, seed):
    tokens = np.arange(num_tokens, dtype="<u2")
    stream = SampleStream([tokens], [1.0], block_size, seed)
    num_windows = num_tokens // block_size

    for number in range(3):
        x, y = stream.batch(number * num_windows, num_windows)
        targets = Counter(y.flatten().tolist())

        assert set(targets.values()) == {1}
        assert len(targets) == num_windows * block_size > num_tokens - block_size
        assert ((x + 1) % num_tokens == y).all()


def test_samples_are_a_pure_function_of_seed_and_place():
    tokens = np.arange(5000, dtype="<u2")
    stream = SampleStream([tokens], [1.0], 16, 3)
    x, y = stream.batch(0, 700)
    again, _ = SampleStream([tokens], [1.0], 16, 3).batch(350, 7)
    other, _ = SampleStream([tokens], [1.0], 16, 4).batch(0, 700)

    assert (x[350:357] == again).all()
    assert not (x == other).all()
    assert (x[:312].sort(dim=0)[0] != x[312:624].sort(dim=0)[0]).any(), "every pass is cut anew"
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()


@pytest.mark.parametrize("weights", [[0.9, 0.1], [1, 1, 1], [0.5, 0.3, 0.15, 0.05], [0.999, 0.001]])
def test_shares_are_exact_to_one_sample(weights):
    turns = take_turns(weights)
    turns = np.tile(turns, 1 + 20_000 // len(turns))
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, len(turns) + 1)[:, None] * shares

    assert np.abs(counts - due).max() < 1


@pytest.mark.parametrize(
    ("weights", "period"),
    [([1.0, 5.0], 6), ([3.0, 5.0, 6.0], 14), ([None, 0.1], 10), ([0.3, 0.7], 10)],
)
def test_shares_are_those_that_were_asked_for(weights, period):
    shares = resolve_weights(weights, [100] * len(weights))
    stream = SampleStream([np.zeros(20, "<u2")] * len(weights), shares, 4, 0)

    assert len(stream.turns) == period
    assert stream.shares == [float(share) for share in shares]


def test_sources_are_mixed_and_each_is_read_without_replacement():
    sources = [np.full(64, 1, "<u2"), np.arange(100, 180, dtype="<u2")]
    stream = SampleStream(sources, [0.75, 0.25], 8, 0)
    x, y = stream.batch(0, 40)
    from_second = x[:, 0] >= 100

    assert from_second.sum() == 10
    assert sorted(y[from_second].flatten().tolist()) == list(range(100, 180))


def test_a_source_below_one_sample_is_refused():
    with pytest.raises(DataError, match="has 8 tokens, one sample takes 9"):
        SampleStream([np.zeros(8, "<u2")], [1.0], 8, 0)

    with pytest.raises(DataError, match="has 8 tokens, one window takes 9"):
        EvaluationWindows(np.zeros(8, "<u2"), 8)


@pytest.mark.parametrize("num_tokens", [9, 33, 400, 20_000])
def test_test_windows_are_fixed_and_evenly_spaced(num_tokens):
    windows = EvaluationWindows(np.arange(num_tokens, dtype="<u2"), 8)
    batches = list(windows.batches(3))
    targets = [row for _, y in batches for row in y.tolist()]
    starts = [row[0] - 1 for row in targets]

    assert len(targets) == len(windows) == min(256, (num_tokens - 1) // 8)
    assert all(x.shape == y.shape == (len(x), 8) for x, y in batches)
    assert all(len(x) == 3 for x, _ in batches[:-1])
    assert starts[0] == 0
    assert num_tokens - 9 - 8 < starts[-1] <= num_tokens - 9
    assert {round(b - a) for a, b in zip(starts, starts[1:], strict=False)} <= set(
        range(8, max(9, num_tokens // 200 + 2))
    )
    assert [row.tolist() for _, batch in batches for row in batch] == [
        row.tolist() for _, batch in windows.batches(3) for row in batch
    ]


@settings(max_examples=60, deadline=None)
@given(
    block_size=st.integers(1, 9),
    num_tokens=st.lists(st.integers(20, 120), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    num_processes=st.integers(1, 4),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_a_pass_meets_every_token_once_whatever_runs_it(
    block_size, num_tokens, weights, num_processes, batch_size, seed
):
    """Brute force over two passes of every source, its samples shared out over processes."""
    sources = []

    for n in num_tokens:
        first = sum(map(len, sources))
        sources.append(np.arange(first, first + n, dtype="<u2"))

    weights = weights[: len(sources)]
    counts = [2 * (n // block_size) for n in num_tokens]
    # So many samples that every source has had its two passes.
    num_samples = max(2 + count * sum(weights) for count in counts)
    num_batches = -(-num_samples // batch_size)
    rows: dict[int, list[int]] = {}

    for rank in range(num_processes):
        stream = SampleStream(sources, weights, block_size, seed)

        for number in range(rank, num_batches, num_processes):
            _, y = stream.batch(number * batch_size, batch_size)
            rows.update(enumerate(y.tolist(), start=number * batch_size))

    for source, tokens in enumerate(sources):
        start, end, count = tokens[0], tokens[-1] + 1, counts[source]
        samples = [rows[i] for i in sorted(rows) if start <= rows[i][0] < end][:count]
        share = sum(start <= row[0] < end for row in rows.values())

        assert abs(share - len(rows) * weights[source] / sum(weights)) < 1

        for half in (samples[: count // 2], samples[count // 2 :]):
            targets = Counter(token for row in half for token in row)

            assert set(targets.values()) == {1}
            assert len(tokens) - len(targets) < block_size


# --- Instructions in batches ---


def make_examples(num_rows: int = 101, seed: int = 0) -> list[Example]:
    """Rows of all lengths, each of one token id of its own, the second half to be predicted."""
    generator = np.random.default_rng(seed)

    return [
        Example(np.full(n, row + 1, dtype=np.uint16), np.arange(n) >= n // 2)
        for row, n in enumerate(generator.integers(2, 42, num_rows))
    ]


def rows_of(x: torch.Tensor) -> list[int]:
    return [row - 1 for row in x[:, 0].tolist() if row != END_OF_TEXT]


def test_an_epoch_has_every_row_once():
    batches = InstructionBatches(make_examples(), batch_size=4, block_size=41, seed=3)
    orders = []

    for epoch in range(3):
        numbers = range(epoch * len(batches), (epoch + 1) * len(batches))
        orders.append([row for number in numbers for row in rows_of(batches.batch(number)[0])])

    assert all(sorted(order) == list(range(101)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_a_function_of_seed_and_number():
    examples = make_examples()
    one, two = (InstructionBatches(examples, 4, 41, seed=3) for _ in range(2))
    other = InstructionBatches(examples, 4, 41, seed=4)
    numbers = [60, 3, 27, 3]
    backwards = {number: two.batch(number) for number in sorted(numbers, reverse=True)}

    for number in numbers:
        for left, right in zip(one.batch(number), backwards[number], strict=True):
            assert torch.equal(left, right)

    assert any(rows_of(one.batch(n)[0]) != rows_of(other.batch(n)[0]) for n in range(5))


def test_rows_are_padded_at_the_right_and_padding_is_no_target():
    examples = make_examples()
    x, y = collate(examples[:5], batch_size=8, block_size=41)

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

    assert collate(examples, 1, block_size)[0].shape == (1, block_size)


def test_rows_of_like_length_are_put_together():
    examples = make_examples(4000)
    grouped = InstructionBatches(examples, 8, 41, seed=1)
    alone = InstructionBatches(examples, 8, 41, seed=1)
    alone.POOL = 1

    # Of the padding that is left nearly all fills up to a multiple of 8.
    assert grouped.padding < 0.17
    assert alone.padding > 0.4


def test_batches_to_test_on_have_every_row_once():
    examples = make_examples()
    rows = [row for x, _ in ordered_batches(examples, 4, 41) for row in rows_of(x)]
    widths = [x.shape[1] for x, _ in ordered_batches(examples, 4, 41)]

    assert sorted(rows) == list(range(101))
    assert widths == sorted(widths, reverse=True)
