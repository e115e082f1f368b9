"""Implements Muon: momentum whose update of a matrix is made nearly orthogonal.

Axes of the tensors: N matrices, R rows, C columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Momentum whose updates of a matrix are made nearly orthogonal (Jordan et al. 2024).

    Each row of an update, one for each neuron, is divided by the running root mean square of that
    row (NorMuon, Li et al. 2025). The whole has the root mean square of an update of AdamW (Liu et
    al. 2025): one learning rate serves both.

    Args:
        dtype: the format of the matrix products; the momentum has that of the weights.
    """

    # The decay of the running mean squares of rows.
    MEMORY = 0.95
    # The size of AdamW's updates, as a root mean square, when gradients are mostly noise.
    SIZE = 0.2

    def __init__(self, params, dtype: torch.dtype):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.95})

        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix, update in self.updates(group["params"], group["momentum"]):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"])

    @staticmethod
    def state_shapes(matrix: Tensor) -> dict[str, tuple[int, int]]:
        """Return the shapes of the state of a matrix (R, C), by name."""
        num_rows, num_columns = matrix.shape
        return {"momentum_buffer": (num_rows, num_columns), "mean_squares": (num_rows, 1)}

    def updates(
        self, matrices: Iterable[Tensor], momentum: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield matrices with their updates, of root mean square SIZE."""
        gradients = {matrix: matrix.grad for matrix in matrices if matrix.grad is not None}
        for some in batches_of_one_shape(gradients):
            updates = self.update(some, [gradients[matrix] for matrix in some], momentum)
            yield from zip(some, updates, strict=True)

    def update(
        self, matrices: Sequence[Tensor], gradients: list[Tensor], momentum: float
    ) -> Tensor:
        """Return the updates of N matrices of one shape (R, C), as (N, R, C)."""
        states = [self.state[matrix] for matrix in matrices]
        for state, matrix, gradient in zip(states, matrices, gradients, strict=True):
            if not state:
                for name, shape in self.state_shapes(matrix).items():
                    state[name] = gradient.new_zeros(shape)

        means = [state["momentum_buffer"] for state in states]
        mean_squares = [state["mean_squares"] for state in states]

        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = orthogonalize(
            torch.stack(torch._foreach_lerp(gradients, means, momentum)).to(self.dtype)
        )

        squares = updates.float().square().mean(dim=-1, keepdim=True)  # (N, R, 1)
        torch._foreach_lerp_(mean_squares, squares.unbind(), 1 - self.MEMORY)
        # A row of zeros, whose neuron has no gradient, stays one.
        scale = torch.stack(mean_squares).clamp(min=1e-30).rsqrt()
        mean = (squares * scale.square()).mean(dim=(-2, -1), keepdim=True)
        scale *= self.SIZE / mean.clamp(min=1e-30).sqrt()
        return updates * scale.to(updates.dtype)


def batches_of_one_shape(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of matrices of one shape, to be updated together.

    One by one, a GPU would wait for launches; on a CPU large matrices are faster alone.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)

    for shape, same in by_shape.items():
        # The most elements in a list of several bounds their memory.
        max_size = 1 << 16 if same[0].is_cpu else 1 << 25
        length = max(1, max_size // shape.numel())
        for first in range(0, len(same), length):
            yield same[first : first + length]


def orthogonalize(z: Tensor) -> Tensor:
    """Move the singular values of matrices (N, R, C) to about one, 0.7 to 1.2, by five steps.

    With z = U S V^T each step of Newton and Schulz gives U f(S) V^T, f(s) = a s + b s^3 + c s^5;
    the coefficients make f as steep at zero as convergence allows (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    shape = z.shape
    is_tall = z.size(-2) > z.size(-1)
    add_product: Callable[..., Tensor] = torch.baddbmm

    # For one matrix a CPU has a faster product.
    if len(z) == 1:
        (z,), add_product = z, torch.addmm

    # Wide, for the smaller Gram matrix.
    if is_tall:
        z = z.mT

    # No singular value is greater than the norm.
    z = z / z.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = z @ z.mT
        z = add_product(z, add_product(gram, gram, gram, beta=b, alpha=c), z, beta=a)

    return (z.mT if is_tall else z).view(shape)


def momentum(step: int) -> float:
    """Return the momentum of Muon, which rises while early gradients soon go out of date."""
    return 0.85 + 0.1 * min(1.0, step / 300)
