"""What moves the weights: AdamW and Muon, each process with its share of them; the learning rate.

On several processes each keeps the optimizer's state of its share alone (ZeRO, Rajbhandari et al.
2020). What is saved is always what a single process would have.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from distributed import World, is_sharded, spread_like, whole


class Optimizers:
    """AdamW for all weights of a model, or Muon for the hidden matrices and AdamW for the rest.

    AdamW decays matrices only (Loshchilov and Hutter 2019).

    Args:
        dtype: the format of matrix products.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weight_decay: float,
        world: World,
        dtype: torch.dtype = torch.float32,
    ):
        embeddings = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hidden = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
        rest = [p for p in trained if p.ndim == 2 and id(p) in embeddings]

        self.parts: list[Optimizer] = []

        is_shared = world.size > 1 and not is_sharded(model)

        if name == "muon":
            groups = [{"params": hidden, "weight_decay": weight_decay}]
            hidden = []

            if is_sharded(model):
                self.parts.append(ShardedMuon(groups, dtype, world))
            elif is_shared:
                muon = functools.partial(Muon, dtype=dtype)
                self.parts.append(SharedOptimizer(groups, muon, is_elementwise=False))
            else:
                self.parts.append(Muon(groups, dtype))

        groups = [
            {"params": hidden + rest, "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
        ]
        options = {"betas": (0.9, 0.95), "fused": world.device.type in ("cpu", "cuda")}

        if groups := [group for group in groups if group["params"]]:
            if is_shared:
                self.parts.append(SharedOptimizer(groups, AdamW, is_elementwise=True, **options))
            else:
                self.parts.append(AdamW(groups, **options))

    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        for part in self.parts:
            if isinstance(part, SharedOptimizer):
                part.take_gradients()

            scaler.unscale_(part)

    def step(self, scaler: torch.amp.GradScaler, learning_rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate

            scaler.step(part)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """Return the state of all weights as torch's optimizers do, complete on the first process.

        All processes have to call it.
        """
        return [whole(part.state_dict()) for part in self.parts]

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Go back to what state_dict has returned; it may live on any device.

        Raises:
            ValueError: when it comes from other optimizers.
        """
        if len(states) != len(self.parts):
            raise ValueError(f"{len(states)} optimizers were saved, here are {len(self.parts)}")

        for part, state in zip(self.parts, states, strict=True):
            # What is set by flags and by the device is that of this run.
            chosen = [
                {key: value for key, value in group.items() if key != "params"}
                for group in part.param_groups
            ]
            part.load_state_dict(state if isinstance(part, ShardedMuon) else spread(state, part))

            for group, values in zip(part.param_groups, chosen, strict=True):
                group.update(values)


def spread(state: dict, optimizer: Optimizer) -> dict:
    """Cut the state of an optimizer like its weights, where these are spread over processes."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    return {
        **state,
        "state": {
            index: {
                name: spread_like(value, weights[index]) if value.ndim else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        },
    }


class SharedOptimizer(ZeroRedundancyOptimizer):
    """An optimizer of which every process steps some weights, and has the state of these alone.

    What treats each element alone gets large weights in blocks of rows, as weights of their own:
    GPT-2's token embeddings are a third of it, and would leave one process with most of the state.

    Args:
        is_elementwise: whether the optimizer does so.
    """

    # The elements above which a weight is cut.
    MAX_SIZE = 1 << 20

    def __init__(self, groups: list[dict], optimizer_class, is_elementwise: bool, **options):
        max_size = self.MAX_SIZE if is_elementwise else math.inf
        self.weights = [weight for group in groups for weight in group["params"]]
        self.blocks = [cut(weight, max_size) for weight in self.weights]
        self.group_sizes = [len(group["params"]) for group in groups]
        blocks = iter(self.blocks)

        super().__init__(
            [
                {**group, "params": [b for _ in group["params"] for b in next(blocks)]}
                for group in groups
            ],
            optimizer_class,
            **options,
        )

    def take_gradients(self) -> None:
        """Give the blocks of every weight their parts of its gradient."""
        for weight, blocks in zip(self.weights, self.blocks, strict=True):
            if len(blocks) > 1:
                gradients = weight.grad.split(len(blocks[0]))

                for block, gradient in zip(blocks, gradients, strict=True):
                    block.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        # Gradients lie where they are sent from; without them others would be made beside.
        torch._foreach_zero_([weight.grad for weight in self.weights])

    def state_dict(self) -> dict:
        """Return the state of whole weights on the first process, and nothing on the others."""
        self.consolidate_state_dict()

        if self.rank:
            return {}

        state = super().state_dict()
        values = iter([state["state"].get(i, {}) for i in range(sum(map(len, self.blocks)))])
        joined = [join([next(values) for _ in blocks]) for blocks in self.blocks]
        numbers = iter(range(len(joined)))

        return {
            "state": {number: value for number, value in enumerate(joined) if value},
            "param_groups": [
                {**group, "params": [next(numbers) for _ in range(size)]}
                for group, size in zip(state["param_groups"], self.group_sizes, strict=True)
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Take the state of the own blocks out of that of whole weights."""
        parts = [
            part
            for number, blocks in enumerate(self.blocks)
            for part in split(state["state"].get(number, {}), blocks)
        ]
        numbers = iter(range(len(parts)))

        super().load_state_dict(
            {
                "state": {number: part for number, part in enumerate(parts) if part},
                "param_groups": [
                    {**group, "params": [next(numbers) for _ in own["params"]]}
                    for group, own in zip(state["param_groups"], self.param_groups, strict=True)
                ],
            }
        )


def cut(weight: nn.Parameter, max_size: float) -> list[nn.Parameter]:
    """Return blocks of rows that share the memory of a weight, of max_size elements at most."""
    if weight.numel() <= max_size:
        return [weight]

    num_rows = max(1, int(max_size) // weight[0].numel())

    return [nn.Parameter(block) for block in weight.detach().split(num_rows)]


def join(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make one state of those of the blocks of a weight."""
    return {
        name: torch.cat([state[name] for state in states]) if value.ndim else value
        for name, value in states[0].items()
    }


def split(state: dict[str, Tensor], blocks: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    """Make states for the blocks of a weight of its own."""
    num_rows = len(blocks[0])

    # Each has its own count of steps.
    return [
        {
            name: value[number * num_rows : (number + 1) * num_rows]
            if value.ndim
            else value.clone()
            for name, value in state.items()
        }
        for number in range(len(blocks))
    ]


class Muon(Optimizer):
    """Momentum whose updates of a matrix are made nearly orthogonal (Jordan et al. 2024).

    They have the root mean square of an update of AdamW (Liu et al. 2025), so that one learning
    rate serves both. Gives what torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does, which
    knows bf16 alone: in float32 it is as exact as the rest, and faster where bf16 is emulated.

    Args:
        dtype: the format of the matrix products; the momentum has that of the weights.
    """

    MOMENTUM = 0.95
    # The size of AdamW's updates, as a root mean square, when gradients are mostly noise.
    SIZE = 0.2

    def __init__(self, params, dtype: torch.dtype):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})

        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix, update in self.updates(group["params"]):
                size = self.SIZE * math.sqrt(max(matrix.shape))

                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * size)

    def updates(self, matrices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield matrices with their updates, of singular values near one."""
        for matrix in matrices:
            if matrix.grad is not None:
                yield matrix, self.update(matrix, matrix.grad)

    def update(self, matrix: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[matrix]

        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)

        momentum = state["momentum_buffer"].lerp_(gradient, 1 - self.MOMENTUM)

        return orthogonalize(gradient.lerp(momentum, self.MOMENTUM).to(self.dtype))


def orthogonalize(z: Tensor) -> Tensor:
    """Move the singular values of a matrix to about one, 0.7 to 1.2, by five Newton-Schulz steps.

    With z = U S V^T each step gives U f(S) V^T, f(s) = a s + b s^3 + c s^5; the coefficients make f
    as steep at zero as convergence allows (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = z.size(0) > z.size(1)

    # The product of the matrix with itself is smaller that way.
    if is_tall:
        z = z.T

    # No singular value is greater than the norm.
    z = z / z.norm().clamp(min=1e-7)

    for _ in range(5):
        gram = z @ z.T
        z = torch.addmm(z, torch.addmm(gram, gram, gram, beta=b, alpha=c), z, beta=a)

    return z.T if is_tall else z


class ShardedMuon(Muon):
    """Muon for matrices that are spread over processes by their rows.

    To make an update orthogonal takes the whole of it. So every matrix has an owner, which keeps
    its momentum. In each round all processes bring the gradient of one of their own together and
    hand its update out.

    Args:
        groups: as for Muon, of distributed tensors.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, world: World):
        super().__init__(groups, dtype)

        self.world = world
        self.is_begun = False

    @property
    def matrices(self) -> list[Tensor]:
        return [matrix for group in self.param_groups for matrix in group["params"]]

    def rounds(self) -> Iterator[list[Tensor]]:
        """Yield matrices, one for each process, of like size, so that all work equally long."""
        matrices = sorted(self.matrices, key=lambda matrix: -matrix.numel())

        for first in range(0, len(matrices), self.world.size):
            yield matrices[first : first + self.world.size]

    def updates(self, matrices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        self.is_begun = True

        for some in self.rounds():
            for owner, matrix in enumerate(some):
                gradient = matrix.grad.full_tensor()

                if owner == self.world.rank:
                    own = self.update(matrix, gradient).contiguous()

            for owner, matrix in enumerate(some):
                is_own = owner == self.world.rank
                update = own if is_own else self.empty_like(matrix, self.dtype)
                dist.broadcast(update, owner)

                yield matrix, spread_like(update, matrix)

    def empty_like(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(matrix.shape, dtype=dtype, device=self.world.device)

    def state_dict(self) -> dict:
        """Return the state of all matrices, complete on the first process."""
        state = super().state_dict()
        numbers = {id(matrix): number for number, matrix in enumerate(self.matrices)}

        for some in self.rounds() if self.is_begun else ():
            for owner, matrix in enumerate(some):
                if owner == self.world.rank:
                    momentum = self.state[matrix]["momentum_buffer"]
                else:
                    momentum = self.empty_like(matrix, matrix.dtype)

                dist.broadcast(momentum, owner)

                if self.world.is_first:
                    state["state"][numbers[id(matrix)]] = {"momentum_buffer": momentum.cpu()}

        return {**state, "state": dict(sorted(state["state"].items()))}

    def load_state_dict(self, state: dict) -> None:
        """Take the state of the own matrices out of that of all."""
        self.is_begun = bool(state["state"])
        owned = {id(some[self.world.rank]) for some in self.rounds() if self.world.rank < len(some)}
        own_state = {
            number: state["state"][number]
            for number, matrix in enumerate(self.matrices)
            if id(matrix) in owned and self.is_begun
        }

        super().load_state_dict({**state, "state": own_state})


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
