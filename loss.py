"""Computes the loss of a language model: output layer and cross entropy, a chunk at a time.

The logits of all positions would be the largest tensor of a training step: 4 x 1,024 positions of
50,304 float32 logits are 824 MB, and their gradient as much again. So each chunk of positions is
projected, measured and differentiated before the next one takes its memory.

Axes of the tensors: B batch, T tokens, N = B x T positions, n positions of a chunk, D dimensions of
a state, V vocabulary (padded).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OutputLoss:
    """Project states to logits and take their mean cross entropy, a chunk of positions at a time.

    The loss is that of `cross_entropy(linear(z, weight)[..., :vocabulary_size], y)`, but only the
    logits of one chunk are in memory. Its gradients can be taken once.
    """

    def __init__(self):
        self.exponentiate = exponentiate

    def compile(self, **kwargs) -> None:
        """Compile the element-wise part, with the arguments of torch.compile."""
        self.exponentiate = torch.compile(exponentiate, **kwargs)

    def __call__(self, z: Tensor, weight: Tensor, y: Tensor, vocabulary_size: int) -> Tensor:
        """Return the loss, a float32 scalar in nats per target (0 without any).

        Args:
            z: states, (B, T, D).
            weight: output layer, (V, D) with V >= vocabulary_size; further rows are never
                predicted.
            y: target ids, int64 (B, T); below 0 where a position is to have no loss.
        """
        # The matrix products have the precision of the surrounding autocast, as in a Linear.
        device = z.device.type
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else weight.dtype

        z, y = z.flatten(0, 1), y.flatten()  # (N, D), (N)

        # Drop unlabelled positions when fine-tuning; pre-training has none.
        if not weight.requires_grad:
            is_target = y >= 0
            z, y = z[is_target], y[is_target]

        return LinearCrossEntropy.apply(
            z, weight, y, vocabulary_size, dtype, torch.is_grad_enabled(), self
        )


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while the logits of a chunk are in memory.

    For one position with logits l = W z, target t and any shift m, let e = exp(l - m) and
    s = sum(e). Then loss = log(s) + m - l_t and d loss / d l = (e - s onehot(t)) / s = g / s, so
    d loss / d z = g W / s and d loss / d W = g^T (z / s): no tensor of width V is divided.
    """

    @staticmethod
    def forward(ctx, z, weight, y, vocabulary_size, dtype, is_grad_enabled, loss_function):
        z_low, weight_low = z.to(dtype), weight.to(dtype)  # (N, D), (V, D)
        loss = torch.zeros((), device=z.device)
        dz = dweight = None

        # needs_input_grad is also set where gradients are off.
        if is_grad_enabled and ctx.needs_input_grad[0]:
            dz = torch.empty_like(z, dtype=torch.float32)

        if is_grad_enabled and ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight, dtype=torch.float32)

        # fp16 loses digits below 6e-5, so there g is divided instead of z.
        is_normalized = dtype == torch.float16
        # One buffer for all chunks: new memory costs page faults.
        chunk_size = choose_chunk_size(z_low)
        buffer = z_low.new_empty(chunk_size, len(weight))
        for start in range(0, len(z), chunk_size):
            rows = slice(start, start + chunk_size)
            has_target = (y[rows] >= 0)[:, None]  # (n, 1)
            targets = y[rows].clamp(min=0)[:, None]  # (n, 1)
            n = len(targets)

            logits = torch.mm(z_low[rows], weight_low.T, out=buffer[:n])  # (n, V)
            logits[:, vocabulary_size:] = -math.inf
            target_logits = logits.gather(1, targets).float()  # (n, 1)
            # The whole buffer, even in a shorter last chunk: compiled code has one shape.
            shift, total = (each[:n] for each in loss_function.exponentiate(buffer))
            target_e = (target_logits - shift).exp()

            loss += (total.log() + shift - target_logits).where(has_target, 0.0).sum()
            if dz is not None or dweight is not None:
                if is_normalized:
                    logits /= total
                    target_e /= total
                    total = torch.ones_like(total)

                g = logits.scatter_(1, targets, (target_e - total).to(dtype))  # (n, V)
                scale = has_target / total  # (n, 1)
                if dz is not None:
                    dz[rows] = (g @ weight_low) * scale

                if dweight is not None:
                    add_product(dweight, g.T, (z[rows] * scale).to(dtype))

        count = (y >= 0).sum().clamp(min=1)
        ctx.save_for_backward(dz, dweight, count)
        ctx.dtypes = z.dtype, weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        dz, dweight, count = ctx.saved_tensors
        z_dtype, weight_dtype = ctx.dtypes
        scale = grad_output / count
        dz = None if dz is None else (dz * scale).to(z_dtype)
        dweight = None if dweight is None else dweight.mul_(scale).to(weight_dtype)
        return dz, dweight, None, None, None, None, None


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (n, V) by e = exp(logits - shift).

    Compiled, it reads the logits twice; uncompiled, five times.

    Returns:
        The shift, which is the greatest logit of a row, and the sum of e: float32 (n, 1) each.
    """
    # Without a copy where logits are in float32 already.
    exact = logits.float()
    shift = exact.amax(dim=-1, keepdim=True)
    total = exact.sub_(shift).exp_().sum(dim=-1, keepdim=True)
    logits.copy_(exact)
    return shift, total


def choose_chunk_size(z: Tensor) -> int:
    """Return how many of the states (N, D) to project at a time.

    On a CPU 128 rows of 50,304 float32 logits stay in the last-level cache; wide states make more
    rows faster still. A GPU wants large kernels.
    """
    num_rows, width = z.shape
    most = 4096 if z.is_cuda else min(max(128, 2 * width), 512) * 4 // z.element_size()
    num_chunks = math.ceil(num_rows / most)
    return math.ceil(num_rows / num_chunks) if num_rows else 1


def output_memory(weight: Tensor, num_positions: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the gradient of an output layer (V, D), and of the buffers for it.

    Args:
        dtype: the format of the matrix products.
    """
    gradient = 4 * weight.numel()
    states = weight.new_empty(num_positions, weight.size(1), dtype=dtype)
    logits = choose_chunk_size(states) * len(weight) * dtype.itemsize
    # One of the weights, and one of a chunk's part of their gradient.
    copies = 0 if dtype == torch.float32 else 2 * weight.numel() * dtype.itemsize
    return gradient, logits + copies


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a float32 total; without a copy when the factors are float32 too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
