"""Defines the network: GPT-2, from token ids to logits or to the loss.

Axes of the tensors: B batch, T tokens, S tokens in the cache, D embedding_dimensions, H attention
heads, K = D / H.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss import OutputLoss


class GPT(nn.Module):
    """Predict the next token with a stack of attention and MLP blocks.

    The architecture of Radford et al. 2019 (GPT-2): learned positions, normalisation in front of
    every sublayer, and an output layer that shares its weights with the token embeddings (Press
    and Wolf 2017). Biases are left out unless asked for.

    Raises:
        ValueError: when a size, or a combination of sizes, is not valid.
    """

    def __init__(
        self,
        vocabulary_size: int,
        block_size: int,
        embedding_dimensions: int,
        num_attention_heads: int,
        num_hidden_layers: int,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__()

        check_sizes(embedding_dimensions, num_attention_heads)

        # Matrix units are fastest with a multiple of 128 rows. The padding rows stay zero.
        num_rows = math.ceil(vocabulary_size / 128) * 128

        self.vocabulary_size = vocabulary_size
        self.block_size = block_size
        self.embedding_dimensions = embedding_dimensions
        self.num_attention_heads = num_attention_heads
        self.activation_checkpointing = False
        self.output_loss = OutputLoss()

        self.token_embeddings = nn.Embedding(num_rows, embedding_dimensions)
        self.position_embeddings = nn.Embedding(block_size, embedding_dimensions)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embedding_dimensions, num_attention_heads, dropout, bias)
            for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(embedding_dimensions, bias=bias)

        self.initialize()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the token after every position, or measure how well it is predicted.

        Args:
            x: token ids, int64 (B, T) with T <= block_size.
            y: target ids, int64 (B, T); below 0 at positions without loss.

        Returns:
            Without y the logits, (B, T, vocabulary_size); with y the mean cross entropy in nats
            per target, a float32 scalar (0 without any target).

        Raises:
            ValueError: when T exceeds block_size.
        """
        z = self.hidden_states(x)  # (B, T, D)
        if y is None:
            return self.project(z)

        return self.output_loss(z, self.token_embeddings.weight, y, self.vocabulary_size)

    def hidden_states(self, x: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Turn token ids (B, T) into the input of the output layer, (B, T, D).

        Args:
            cache: keys and values of the tokens before x; those of x are added to it.
        """
        if x.size(1) > self.block_size:
            raise ValueError(
                f"At most {self.block_size} tokens fit in the context, {x.size(1)} given."
            )

        positions = cache.positions if cache else torch.arange(x.size(1), device=x.device)

        z = self.token_embeddings(x) + self.position_embeddings(positions)  # (B, T, D)
        z = self.dropout(z)
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                z = recompute(block, z)
            else:
                z = block(z, cache and cache.layers[number])

        return self.norm(z)

    def project(self, z: Tensor) -> Tensor:
        """Turn states (…, D) into logits (…, vocabulary_size)."""
        weight = self.token_embeddings.weight
        product = few_rows_product if is_generating(z) else F.linear
        return product(z, weight)[..., : self.vocabulary_size]

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights from N(0, 0.02), smaller where they write to the residual stream.

        2 x num_hidden_layers sublayers add to the stream; dividing their scale by the root of that
        number keeps its variance (Radford et al. 2019, section 2.3).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

        for block in self.blocks:
            for projection in (block.attention.output, block.mlp.output):
                projection.weight.div_(math.sqrt(2 * len(self.blocks)))

        self.token_embeddings.weight[self.vocabulary_size :].zero_()

    @torch.no_grad()
    def look_back(self) -> None:
        """Initialize the first block so that head h attends to the token h + 1 places before.

        A model otherwise spends its first hundreds of updates on learning that. Positions become
        sines and cosines (Vaswani et al. 2017), of wavelengths from 2 to block_size, in as many
        dimensions as a head has; fewer than about 8 cannot separate distances. Their size, 25 /
        sqrt(D K) as a root mean square, keeps up with token embeddings, which training moves
        further in a narrow model, see optimizers.step_factors.
        """
        positions = self.position_embeddings.weight
        num_dimensions = self.embedding_dimensions
        head_size = num_dimensions // self.num_attention_heads
        frequencies = math.pi * (2 / self.block_size) ** torch.linspace(0, 1, head_size // 2)
        angles = torch.arange(self.block_size)[:, None] * frequencies  # (T, K / 2)
        scale = 25 * math.sqrt(2 / (num_dimensions * head_size))
        waves = torch.view_as_real(torch.polar(torch.full_like(angles, scale), angles)).flatten(1)
        positions[:, : waves.size(1)] = waves

        self.blocks[0].attention.look_back(frequencies)

    def crop(self, block_size: int) -> None:
        """Shorten the context: drop the positions beyond block_size."""
        positions = self.position_embeddings
        positions.weight = nn.Parameter(positions.weight[:block_size].detach())
        self.block_size = positions.num_embeddings = len(positions.weight)

    def compile(self, **kwargs) -> None:
        """Compile the blocks and the loss in place, with the arguments of torch.compile.

        All blocks run the same code, so one compilation serves them all. Parameters keep their
        names.
        """
        for block in self.blocks:
            block.compile(**kwargs)

        self.output_loss.compile(**kwargs)

    @property
    def num_parameters(self) -> int:
        """The number of weights: padding rows do not count, tied weights count once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        num_padded = self.token_embeddings.num_embeddings - self.vocabulary_size
        return total - num_padded * self.embedding_dimensions

    def flops_per_token(self, num_tokens: int) -> int:
        """Count the operations to train on one token in a window of num_tokens tokens.

        6 for every weight that is multiplied (4 for a frozen one, which needs no gradient), and
        12 x T x D for every layer's attention (Chowdhery et al. 2022, appendix B).
        """
        num_weights = self.num_parameters - self.position_embeddings.weight.numel()
        per_weight = 6 if self.token_embeddings.weight.requires_grad else 4

        per_layer = 12 * num_tokens * self.embedding_dimensions
        return per_weight * num_weights + len(self.blocks) * per_layer


class Block(nn.Module):
    """Attention, then an MLP, each normalised at its input and added to the residual stream."""

    def __init__(
        self, embedding_dimensions: int, num_attention_heads: int, dropout: float, bias: bool
    ):
        super().__init__()

        self.attention_norm = nn.LayerNorm(embedding_dimensions, bias=bias)
        self.attention = CausalSelfAttention(embedding_dimensions, num_attention_heads, bias)
        self.mlp_norm = nn.LayerNorm(embedding_dimensions, bias=bias)
        self.mlp = MLP(embedding_dimensions, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        z = z + self.dropout(self.attention(self.attention_norm(z), cache))  # (B, T, D)
        return z + self.dropout(self.mlp(self.mlp_norm(z)))  # (B, T, D)


class CausalSelfAttention(nn.Module):
    """Let every position attend to itself and to those before it (Vaswani et al. 2017).

    softmax(Q K^T / sqrt(K)) V for each head, by the fastest kernel of the device. Attention
    weights have no dropout: on some devices those kernels do not support it.
    """

    def __init__(self, embedding_dimensions: int, num_attention_heads: int, bias: bool):
        super().__init__()

        self.num_attention_heads = num_attention_heads
        self.query_key_value = Linear(embedding_dimensions, 3 * embedding_dimensions, bias=bias)
        self.output = Linear(embedding_dimensions, embedding_dimensions, bias=bias)

    def forward(self, z: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        # Without contiguous() attention takes a slow path on a CPU.
        parts = self.query_key_value(z).contiguous()  # (B, T, 3 D)
        parts = parts.view(*z.shape[:2], 3, self.num_attention_heads, -1)  # (B, T, 3, H, K)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, K) each
        mask = None
        if cache is not None:
            key, value, mask = cache.add(parts)  # (B, H, S, K)

        # With a cache, a single token attends to all of it; a prompt needs the causal mask.
        is_causal = cache is None or query.size(2) > 1
        z = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        return self.output(z.transpose(1, 2).flatten(2))  # from (B, H, T, K) to (B, T, D)

    def look_back(self, frequencies: Tensor) -> None:
        """Initialize head h to attend to the token h + 1 places before.

        The first dimensions of the input hold waves of the position. The keys of head h are the
        waves, and its queries the waves turned back by h + 1 places. Where waves
        outweigh the tokens, as they do up to some 768 dimensions, scores differ by up to 2.25
        sqrt(K) of a head's K dimensions. Wider models begin less sharply; at 1,024 dimensions a
        short run learned less with sharper scores, see benchmarks/README.md.

        Args:
            frequencies: of the waves, in radians a place, (K / 2); dimensions 2 i and 2 i + 1 hold
                the cosine and the sine of wave i.
        """
        num_dimensions, size = self.output.in_features, 2 * len(frequencies)
        heads = self.query_key_value.weight.view(3, self.num_attention_heads, -1, num_dimensions)
        scale = 1.5 * math.sqrt(heads.size(2) / num_dimensions)
        identity = torch.eye(size) * scale
        pairs = torch.view_as_complex(identity.view(size, size // 2, 2))
        heads[:2, :, :size] = 0.0
        for distance, (query, key, _) in enumerate(heads.transpose(0, 1), 1):
            turn = torch.polar(torch.ones_like(frequencies), frequencies * distance)
            query[:size, :size] = torch.view_as_real(pairs * turn).flatten(1)
            key[:size, :size] = identity


class MLP(nn.Module):
    """Two linear layers, 4 D wide in between, around a GELU (its tanh form, as in GPT-2)."""

    def __init__(self, embedding_dimensions: int, bias: bool):
        super().__init__()

        self.hidden = Linear(embedding_dimensions, 4 * embedding_dimensions, bias=bias)
        self.output = Linear(4 * embedding_dimensions, embedding_dimensions, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        return recompute(self.gelu_and_project, self.hidden(z))

    def gelu_and_project(self, z: Tensor) -> Tensor:
        return self.output(gelu(z))


def gelu(z: Tensor) -> Tensor:
    """Return GELU in its tanh form, z sigmoid(2 u) = z (1 + tanh(u)) / 2.

    Compiled, the first form is twice as fast on a CPU; uncompiled, PyTorch has a kernel of its own.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(z, approximate="tanh")

    return z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))


class Linear(nn.Linear):
    """A linear layer that is fast for the few rows of a generation step.

    For a few rows, W z^T reads the weights up to twice as fast as z W^T (float32 on a CPU).
    """

    FEW_ROWS = range(3, 17)

    def forward(self, z: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if bias is None and is_generating(z):
            return few_rows_product(z, weight)

        return F.linear(z, weight, bias)


def recompute(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Call a function of states without keeping its activations: the backward pass recomputes them.

    It recomputes only what it needs: a matrix product at the end is not repeated.
    """
    if not torch.is_grad_enabled():
        return function(z)

    return checkpoint(function, z, use_reentrant=False)


def is_generating(z: Tensor) -> bool:
    """Tell whether states (…, D) are a few rows on a CPU, without gradients."""
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and z.is_cpu
        and z.numel() // z.size(-1) in Linear.FEW_ROWS
        and z.dtype == torch.float32
    )


def few_rows_product(z: Tensor, weight: Tensor) -> Tensor:
    """Return z W^T for states (…, in) and weights (out, in)."""
    product = weight @ z.flatten(0, -2).T.contiguous()  # (out, N)
    return product.T.unflatten(0, z.shape[:-1])


def check_sizes(embedding_dimensions: int, num_attention_heads: int) -> None:
    """Raise ValueError with the nearest valid values unless the heads divide the dimensions."""
    if embedding_dimensions % num_attention_heads:
        below = embedding_dimensions // num_attention_heads * num_attention_heads
        nearest = [str(below)] * (below > 0) + [str(below + num_attention_heads)]
        raise ValueError(
            "Embedding dimensions must be divisible by the number of attention heads,"
            f" {embedding_dimensions} and {num_attention_heads} given;"
            f" the nearest valid dimensions are {' and '.join(nearest)}."
        )


class LayerCache(Protocol):
    """Keys and values of one layer, of the tokens before."""

    def add(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add those of new tokens, (B, T, 3, H, K); return all, (B, H, S, K), and the mask."""
        ...


class Cache(Protocol):
    """Keys and values of the tokens before, see inference/cache.py.

    Attributes:
        positions: the positions of the tokens that are read next, int64 (T).
        layers: one cache for each block.
    """

    positions: Tensor

    @property
    def layers(self) -> Sequence[LayerCache]: ...
