"""The stream of samples and the windows to test on, against brute force."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    EvaluationWindows,
    SampleStream,
    permute,
    resolve_weights,
    take_turns,
)
from text.errors import DataError


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
