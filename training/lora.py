"""Adds LoRA adapters to a model (Hu et al. 2021): small trained additions to frozen weights.

Every adapted weight W, (out, in), becomes W + alpha B A with A, (R, in), and B, (out, R). Alpha is
the factor itself; libraries that divide by the rank R call R x alpha what is alpha here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Linear


class LoraLinear(Linear):
    """A frozen linear layer and its adapter, (W + alpha B A) z, with dropout in front of A.

    A is drawn and B is zero, so that at first the layer gives what the frozen one gives.

    Args:
        frozen: the layer that is adapted; its weight is taken over.
        dtype: the format of this weight. A half-size format saves memory and loses nothing where
            matrix products use it anyway.
    """

    def __init__(
        self, frozen: nn.Linear, rank: int, alpha: float, dropout: float, dtype: torch.dtype
    ):
        nn.Module.__init__(self)

        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight = nn.Parameter(frozen.weight.to(dtype), requires_grad=False)
        self.bias = frozen.bias
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)

        # The adapter is float32, whatever the format of the frozen weights.
        device = frozen.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, z: Tensor) -> Tensor:
        low = F.linear(self.dropout(z), self.lora_a)  # (…, R)

        # In this order: where the backward pass computes states again, it stops at the last that it
        # needs, which is low, and leaves the frozen product out.
        return F.linear(low, self.alpha * self.lora_b) + super().forward(z)


def add_lora(
    model: GPT,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Freeze a model and give every linear layer of its blocks an adapter to train.

    The frozen weights of these layers are kept in dtype.

    The output layer gets none: it shares its weight with the token embeddings, which merging would
    change as well.

    Raises:
        ValueError: when the rank is not between 1 and the width of the model.
    """
    check_rank(rank, model.embedding_dimensions)
    model.requires_grad_(False)
    for name, layer in linear_layers(model).items():
        parent, _, child = name.rpartition(".")
        adapted = LoraLinear(layer, rank, alpha, dropout, dtype)
        setattr(model.get_submodule(parent), child, adapted)


def linear_layers(model: GPT) -> dict[str, nn.Linear]:
    """Return all linear layers by their names; only blocks have any."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def check_rank(rank: int, embedding_dimensions: int) -> None:
    """Raise ValueError unless the rank is from 1 to the width of the model."""
    if not 1 <= rank <= embedding_dimensions:
        raise ValueError(
            f"The rank must be from 1 to {embedding_dimensions}, the dimensions of the model;"
            f" {rank} given."
        )


def lora_shapes(model: GPT, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a model's adapter, by layer and `.lora_a` or `.lora_b`."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in linear_layers(model).items():
        rows, columns = layer.weight.shape
        shapes |= {f"{name}.lora_a": (rank, columns), f"{name}.lora_b": (rows, rank)}

    return shapes


@torch.no_grad()
def merge_lora(model: GPT, adapter: dict[str, Tensor], alpha: float) -> None:
    """Add alpha B A to the weights of a model, in place; with -alpha, take it off again.

    Args:
        adapter: its weights by the names of lora_shapes.

    Raises:
        ValueError: when it is not exactly an adapter of this model.
    """
    rank = next((len(a) for name, a in adapter.items() if name.endswith(".lora_a")), 0)
    if {name: tuple(weight.shape) for name, weight in adapter.items()} != lora_shapes(model, rank):
        raise ValueError("The adapter has other layers or shapes than the model.")

    for name, layer in linear_layers(model).items():
        product = adapter[f"{name}.lora_b"].float() @ adapter[f"{name}.lora_a"].float()
        layer.weight.add_(product.to(layer.weight), alpha=alpha)
