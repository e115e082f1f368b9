"""What the benchmarks train with: a Trainer at a constant rate."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn  # noqa: E402

from system.devices import matmul_dtype  # noqa: E402
from system.distributed import World  # noqa: E402
from training.optimizers import Optimizers, Schedule  # noqa: E402
from training.trainer import Trainer  # noqa: E402


def make_trainer(
    model: nn.Module, network: nn.Module, world: World, precision: str, optimizer: str = "adamw"
) -> Trainer:
    """Return a trainer; network is the model, or what World.wrap has made of it."""
    return Trainer(
        model,
        network,
        Optimizers(model, optimizer, 0.1, world, matmul_dtype(precision)),
        Schedule("constant", 5e-4, 0.0, 0, 1),
        world,
        precision,
        seed=0,
        max_gradient_norm=1.0,
        peak_rate=1.0,
    )
