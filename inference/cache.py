"""Keeps the keys and values of the tokens read so far: each is computed once.

Axes of the tensors: B batch, T tokens, S tokens in the cache, H attention heads, K size of a head.
"""

import torch
from torch import Tensor

from model import GPT


class KeyValueCache:
    """Keys and values of a batch of texts, in tensors that are allocated once.

    Args:
        batch_size: how many texts are read side by side.
    """

    def __init__(self, model: GPT, batch_size: int):
        weight = model.token_embeddings.weight
        num_heads = model.num_attention_heads
        size = (len(model.blocks), 2, batch_size, num_heads, model.block_size)

        # Zeros: masked values are multiplied by zero, which makes NaN of an uninitialized NaN.
        storage = weight.new_zeros(*size, model.embedding_dimensions // num_heads)
        self.layers = [LayerCache(self, keys_values) for keys_values in storage]

        # Of the tokens to be read next: their positions, how many entries of the cache they attend
        # to, and the mask when some of these are not before them.
        self.positions = torch.zeros(1, dtype=torch.int64, device=weight.device)  # (T)
        self.num_visible = 0
        self.mask: Tensor | None = None  # bool (T, S)


class LayerCache:
    """The part of one layer: keys and values, (2, B, H, block_size, K)."""

    def __init__(self, cache: KeyValueCache, keys_values: Tensor):
        self.cache = cache
        self.keys_values = keys_values

    def add(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add those of new tokens, which follow their queries in (B, T, 3, H, K).

        Returns:
            All that are visible, (B, H, S, K) each, and the mask.
        """
        new = parts[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, B, H, T, K)
        self.keys_values.index_copy_(3, self.cache.positions, new)

        keys, values = self.keys_values.narrow(3, 0, self.cache.num_visible).unbind()
        return keys, values, self.cache.mask
