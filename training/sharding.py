"""Shards optimizers over processes: ZeRO-1 (Rajbhandari et al. 2020), and Muon under FSDP.

They save the state that a single process would have. The file is apart from optimizers.py because
its imports take longer than a small model needs to answer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from system.distributed import World, shard_like
from training.muon import Muon


class ZeroOptimizer(ZeroRedundancyOptimizer):
    """ZeRO-1: every process updates some of the weights, and has the state of these only.

    An elementwise optimizer gets large weights in blocks of rows, each as a weight of its own:
    token embeddings are a third of GPT-2, and would give one process most of the state.

    Args:
        is_elementwise: whether the optimizer treats each element of a weight on its own.
    """

    # A weight with more elements is cut into blocks.
    MAX_SIZE = 1 << 20

    def __init__(self, groups: list[dict], optimizer_class, is_elementwise: bool, **options):
        max_size = self.MAX_SIZE if is_elementwise else math.inf
        self.weights = [weight for group in groups for weight in group["params"]]
        self.blocks = [blocks_of(weight, max_size) for weight in self.weights]
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
        # Gradients are views of the buckets that are sent; None would allocate new ones beside.
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
        """Load the state of this process's blocks from that of whole weights."""
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


def blocks_of(weight: nn.Parameter, max_size: float) -> list[nn.Parameter]:
    """Return blocks of rows that share the memory of a weight, of max_size elements at most."""
    if weight.numel() <= max_size:
        return [weight]

    num_rows = max(1, int(max_size) // weight[0].numel())
    return [nn.Parameter(block) for block in weight.detach().split(num_rows)]


def join(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the states of the blocks of a weight into one."""
    return {
        name: torch.cat([state[name] for state in states]) if value.ndim else value
        for name, value in states[0].items()
    }


def split(state: dict[str, Tensor], blocks: list[nn.Parameter]) -> list[dict[str, Tensor]]:
    """Split the state of a weight into those of its blocks."""
    num_rows = len(blocks[0])

    # Scalars, the count of steps, are copied: each block has its own.
    return [
        {
            name: value[number * num_rows : (number + 1) * num_rows]
            if value.ndim
            else value.clone()
            for name, value in state.items()
        }
        for number in range(len(blocks))
    ]


class ShardedMuon(Muon):
    """Muon for matrices whose rows are sharded over processes (FSDP).

    An update can only be made orthogonal as a whole. So every matrix has an owner, which keeps its
    state. In each round every process gathers the gradient of one matrix that it owns, and
    broadcasts its update.

    Args:
        groups: as for Muon, with distributed tensors.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, world: World):
        super().__init__(groups, dtype)

        self.world = world
        self.is_begun = False

    @property
    def matrices(self) -> list[Tensor]:
        return [matrix for group in self.param_groups for matrix in group["params"]]

    @property
    def owners(self) -> Iterator[tuple[int, Tensor]]:
        """All matrices, in the order of their updates, with the processes that have their state."""
        for group in self.param_groups:
            for some in self.rounds(group["params"]):
                yield from enumerate(some)

    def rounds(self, matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Yield one matrix for each process, of similar sizes, so that all work equally long."""
        matrices = sorted(matrices, key=lambda matrix: -matrix.numel())
        for first in range(0, len(matrices), self.world.size):
            yield matrices[first : first + self.world.size]

    def updates(
        self, matrices: Iterable[Tensor], momentum: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.is_begun = True
        for some in self.rounds(matrices):
            for owner, matrix in enumerate(some):
                gradient = matrix.grad.full_tensor()
                if owner == self.world.rank:
                    own = self.update([matrix], [gradient], momentum)[0].contiguous()

            for owner, matrix in enumerate(some):
                is_own = owner == self.world.rank
                update = own if is_own else self.empty(matrix.shape, self.dtype)
                dist.broadcast(update, owner)
                yield matrix, shard_like(update, matrix)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.world.device)

    def state_dict(self) -> dict:
        """Return the state of all matrices, complete on the first process."""
        state = super().state_dict()
        numbers = {id(matrix): number for number, matrix in enumerate(self.matrices)}
        for owner, matrix in self.owners if self.is_begun else ():
            if owner == self.world.rank:
                values = self.state[matrix]
            else:
                values = {
                    name: self.empty(shape, matrix.dtype)
                    for name, shape in self.state_shapes(matrix).items()
                }

            for value in values.values():
                dist.broadcast(value, owner)

            if self.world.is_first:
                state["state"][numbers[id(matrix)]] = {
                    name: value.cpu() for name, value in values.items()
                }

        return {**state, "state": dict(sorted(state["state"].items()))}

    def load_state_dict(self, state: dict) -> None:
        """Load the state of this process's matrices from that of all."""
        self.is_begun = bool(state["state"])
        owned = {id(matrix) for owner, matrix in self.owners if owner == self.world.rank}
        own_state = {
            number: state["state"][number]
            for number, matrix in enumerate(self.matrices)
            if id(matrix) in owned and self.is_begun
        }

        super().load_state_dict({**state, "state": own_state})
