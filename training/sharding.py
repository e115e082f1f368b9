"""Shards the work and the state of optimizers over processes: ZeRO-1 (Rajbhandari et al. 2020).

What they save is the state that a single process would have.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from system.distributed import World, shard_like, whole
from training.muon import Muon


class ZeroAdamW(AdamW):
    """AdamW whose processes each update some rows of every weight, and have the state of these.

    Args:
        groups: as for AdamW, with weights that every process has as a whole.
    """

    def __init__(self, groups: list[dict], world: World, **options):
        self.world = world
        self.weights = [weight for group in groups for weight in group["params"]]
        super().__init__(
            [
                {**g, "params": [nn.Parameter(self.own_rows(w)) for w in g["params"]]}
                for g in groups
            ],
            **options,
        )

    @property
    def parts(self) -> list[nn.Parameter]:
        """The own rows of all weights, in their memory."""
        return [part for group in self.param_groups for part in group["params"]]

    def own_rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().tensor_split(self.world.size)[self.world.rank]

    def step(self) -> None:  # type: ignore[override]
        for weight, part in zip(self.weights, self.parts, strict=True):
            part.grad = self.own_rows(weight.grad)

        super().step()
        self.gather([weight.detach() for weight in self.weights])

    def gather(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the rows of tensors that others have."""
        parts = [enumerate(tensor.tensor_split(self.world.size)) for tensor in tensors]
        sent = [
            dist.broadcast(part, rank, async_op=True)
            for rank, part in itertools.chain(*parts)
            if part.numel()
        ]
        for work in sent:
            work.wait()

    def state_dict(self) -> dict:
        """Return the state of whole weights on the first process; others get no tensors."""
        state = super().state_dict()
        states: dict[int, dict] = {}
        for number, values in state["state"].items():
            weight, states[number] = self.weights[number], {}
            for name, value in values.items():
                if value.ndim:
                    joined = torch.empty_like(weight, dtype=value.dtype).detach()
                    self.own_rows(joined).copy_(value)
                    self.gather([joined])
                    value = joined.cpu() if self.world.is_first else None

                states[number][name] = value

        return {**state, "state": states}

    def load_state_dict(self, state: dict) -> None:
        """Load the state of this process's rows from that of whole weights."""
        own = {
            number: {n: self.own_rows(v) if v.ndim else v for n, v in values.items()}
            for number, values in state["state"].items()
        }
        super().load_state_dict({**state, "state": own})


class ShardedMuon(Muon):
    """Muon for several processes.

    An update can only be made orthogonal as a whole. So every matrix has an owner, which keeps its
    state. In each round every process takes the gradient of one matrix that it owns, gathered where
    its rows are sharded (FSDP), and broadcasts its update.
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
                gradient = whole(matrix.grad)  # type: ignore[arg-type]
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
