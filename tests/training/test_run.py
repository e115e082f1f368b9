"""What a run is fed with."""

from types import SimpleNamespace

import pytest
import torch

from system.distributed import World
from training.run import prefetch


def data_of(batch):
    return SimpleNamespace(batch_numbers=lambda update: [update], batch=batch)


@pytest.mark.parametrize("updates", [range(0), range(1), range(3, 9)])
def test_prefetch_keeps_order_and_loses_nothing(updates):
    loaded = []

    def batch(number):
        loaded.append(number)
        return torch.tensor(number), torch.tensor(number)

    steps = prefetch(data_of(batch), updates, World())

    assert [number for ((number, _, _),) in steps] == list(updates) == loaded


def test_prefetch_is_one_update_ahead():
    loaded = []

    def batch(number):
        loaded.append(number)
        return torch.tensor(number), torch.tensor(number)

    updates = prefetch(data_of(batch), range(5), World())
    next(updates)
    updates.close()

    assert loaded == [0, 1]


def test_error_while_loading_is_not_lost():
    def batch(number):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(prefetch(data_of(batch), range(3), World()))
