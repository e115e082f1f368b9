"""Updates the weights: AdamW, or Muon with AdamW, on any number of processes; the schedule."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from system.distributed import World, own_part, shard_like, unshard
from training.muon import Muon, momentum
from training.sharding import ShardedMuon, ZeroAdamW


class Optimizers:
    """AdamW for all weights of a model, or Muon for the hidden matrices and AdamW for the rest.

    AdamW decays matrices only (Loshchilov and Hutter 2019); Muon's alone decay where it is chosen.

    Args:
        dtype: the format of Muon's matrix products.
        factors: what step_factors returns; Muon's steps and those of its AdamW are multiplied by
            it. None means 1 everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weight_decay: float,
        world: World,
        dtype: torch.dtype = torch.float32,
        factors: dict[str, float] | None = None,
    ):
        is_muon = name == "muon"
        kinds = weights_by_kind(model, is_muon)
        muon_kinds = ("hidden", "residual") if is_muon else ()
        decayed = muon_kinds or [kind for kind in kinds if kind != "vectors"]
        factors = factors if factors and is_muon else {}
        groups = {
            kind: {
                "params": weights,
                "weight_decay": weight_decay if kind in decayed else 0.0,
                "factor": factors.get(kind, 1.0),
            }
            for kind, weights in kinds.items()
            if weights
        }
        # All weights, for what is done to their gradients.
        trained = [weight for weights in kinds.values() for weight in weights]
        self.weights = Optimizer(trained, {"foreach": True})
        self.parts: list[Optimizer] = []
        self.uses_zero = world.size > 1 and not world.has_sharded_weights
        if own := [group for kind, group in groups.items() if kind in muon_kinds]:
            is_single = world.size == 1
            self.parts.append(Muon(own, dtype) if is_single else ShardedMuon(own, dtype, world))

        # Beside Muon, AdamW learns more with a shorter memory of directions and a longer one of
        # sizes, see benchmarks/README.md.
        betas = (0.8, 0.99) if is_muon else (0.9, 0.95)
        options: dict = {"betas": betas, "fused": world.device.type in ("cpu", "cuda")}
        if rest := [group for kind, group in groups.items() if kind not in muon_kinds]:
            adamw = ZeroAdamW(rest, world, **options) if self.uses_zero else AdamW(rest, **options)
            self.parts.append(adamw)

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        scaler.unscale_(self.weights)

    def step(self, learning_rate: float, step: int) -> None:
        """Update the weights.

        Args:
            step: the number of updates before this one.
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group["factor"]
                if "momentum" in group:
                    group["momentum"] = momentum(step)

            part.step()

    def zero_grad(self) -> None:
        # In DDP gradients are views of the buckets that are sent; None would allocate new ones.
        self.weights.zero_grad(set_to_none=not self.uses_zero)

    @property
    def num_bytes(self) -> int:
        """The bytes of the optimizer state that this process holds."""
        states = [state for part in self.parts for state in part.state.values()]
        tensors = [tensor for state in states for tensor in state.values()]
        return sum(own_part(tensor).nbytes for tensor in tensors)

    def state_dict(self) -> list[dict]:
        """Return the state of all weights, as torch's optimizers do.

        All processes have to call it; only the first one gets all of the state.
        """
        return [unshard(part.state_dict()) for part in self.parts]

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Go back to what state_dict has returned; it may live on any device.

        Raises:
            ValueError: when it comes from other optimizers.
        """
        for part, state in zip(self.parts, states, strict=True):
            state = regroup(state, part)
            part.load_state_dict(shard_state(state, part) if isinstance(part, AdamW) else state)


def regroup(saved: dict, optimizer: Optimizer) -> dict:
    """Fit a saved state to the groups of an optimizer, which has the settings of this run.

    Raises:
        ValueError: when the number of weights differs.
    """
    groups = saved["param_groups"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    # A resumed run keeps the factors that it began with, whatever step_factors returns now.
    factors = [group.get("factor", 1.0) for group in groups for _ in group["params"]]
    if len(factors) != sum(sizes):
        raise ValueError(f"the state of {len(factors)} weights was saved, here are {sum(sizes)}")

    # Files of version 1 have all matrices in one group of Muon, in the order of the network: one
    # that reads the residual stream, one that writes to it, and so on.
    order = list(range(len(factors)))
    if "momentum" in optimizer.param_groups[0] and len(groups) < len(sizes):
        order = order[::2] + order[1::2]

    numbers = iter(range(len(order)))
    shares = [list(itertools.islice(numbers, size)) for size in sizes]
    return {
        "state": {
            new: saved["state"][old] for new, old in enumerate(order) if old in saved["state"]
        },
        "param_groups": [
            {**group, "params": share, "factor": factors[order[share[0]]]}
            for group, share in zip(optimizer.param_groups, shares, strict=True)
        ],
    }


def weights_by_kind(model: nn.Module, is_muon: bool) -> dict[str, list[nn.Parameter]]:
    """Sort trained weights by kind, as in step_factors; AdamW has all hidden matrices in one."""
    kinds: dict[str, list[nn.Parameter]] = {
        kind: [] for kind in ("hidden", "residual", "embeddings", "positions", "vectors")
    }
    tables = {"token_embeddings.weight": "embeddings", "position_embeddings.weight": "positions"}
    for name, weight in model.named_parameters():
        is_residual = is_muon and name.endswith("output.weight")
        kind = tables.get(name, "residual" if is_residual else "hidden")
        if weight.requires_grad:
            kinds[kind if weight.ndim == 2 else "vectors"].append(weight)

    return kinds


def step_factors(width: int, num_updates: int) -> dict[str, float]:
    """Return the factor of the learning rate for each kind of weights, in pre-training with Muon.

    `residual` are the hidden matrices that write to the residual stream.

    With them one rate, 5e-4, serves any width D: a step should change the output of a layer as much
    in a wide model as in a narrow one (Yang et al. 2022, muP). An update of Muon with the root
    mean square of AdamW's stretches states by sqrt(D); one of AdamW moves logits, sums over D, by
    D. So the embeddings, which begin the residual stream, move less in wide models. What blocks add
    has to grow as slowly, or it drowns them. Positions begin as waves that are worth keeping.

    They also make one rate serve runs of any length: the noise of T updates adds up to sqrt(T)
    steps. The size of an update matters little: in one comparison 16,384 tokens instead of 4,096
    raised the best rate by a quarter. From 2,800 updates on the steps stay at a half: runs of more
    than 3,000 have not been tried.

    The constants are from runs at 128 wide, the 32 from 128 to 512, the 700 at 256, see
    benchmarks/README.md.
    """
    length = 1 / min(2.0, max(1.0, math.sqrt(num_updates / 700)))
    muon, adamw = 320 / math.sqrt(width) * length, 5120 / width * length
    return {
        "hidden": muon,
        "residual": muon * min(1.0, 32 / width),
        "embeddings": adamw,
        "positions": adamw / 4,
        "vectors": adamw,
    }


def shard_state(state: dict, optimizer: Optimizer) -> dict:
    """Shard the state of an optimizer like its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        **state,
        "state": {
            index: {
                name: shard_like(value, weights[index]) if value.ndim else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        },
    }


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: a linear warm-up to the peak, then a decay to the minimum.

    Args:
        kind: `linear` or `cosine` decay, or `constant`.
    """

    kind: str
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)

        if self.kind == "constant":
            return self.peak

        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        progress = min(progress, 1.0)
        remaining = (
            1 - progress if self.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        )
        return self.minimum + (self.peak - self.minimum) * remaining
