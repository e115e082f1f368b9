"""Generates tokens one by one, with the key-value cache or as a CUDA graph.

Axes of the tensors: B batch, T tokens, S tokens in the cache, D embedding_dimensions, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from inference.cache import KeyValueCache
from inference.sampling import Sampler
from model import GPT


class Decoder:
    """Reads tokens, and predicts the next one after each reading.

    While a text fits the context, only new tokens are computed. Beyond it the context slides: every
    token has another position then, so the last block_size tokens are computed anew for each.

    Args:
        batch_size: how many texts are read side by side.
        use_graphs: whether a step is recorded once and replayed as a CUDA graph.
    """

    # A graph sees a fixed part of the cache: the next multiple of so many tokens.
    GRAPH_STEP = 256

    def __init__(self, model: GPT, batch_size: int, use_graphs: bool = False):
        self.model = model
        self.cache = KeyValueCache(model, batch_size)
        self.text = torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)  # (B, T)
        self.use_graphs = use_graphs
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.logits: dict[int, Tensor] = {}
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)  # (B, 1)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.model.token_embeddings.weight.device

    @torch.inference_mode()
    def read(self, x: Tensor) -> Tensor:
        """Read tokens behind those read before.

        Args:
            x: token ids, int64 (B, T) with T > 0; T = 1 but for the first reading.

        Returns:
            The logits of the next token, float32 (B, vocabulary_size).
        """
        first, block_size = self.text.size(1), self.model.block_size
        self.text = torch.cat([self.text, x], dim=1)
        if self.text.size(1) > block_size:
            self.text = self.text[:, -block_size:]
            return self.predict(self.model.hidden_states(self.text))

        if self.use_graphs and first:
            return self.replay(x, first)

        self.cache.positions = torch.arange(first, self.text.size(1), device=self.device)
        self.cache.num_visible = self.text.size(1)
        self.cache.mask = None
        return self.predict(self.model.hidden_states(x, self.cache))

    def predict(self, z: Tensor) -> Tensor:
        """Turn states (B, T, D) into the logits behind the last one, float32 (B, V)."""
        return self.model.project(z[:, -1]).float()

    def replay(self, x: Tensor, position: int) -> Tensor:
        """Read one token of each text, (B, 1), by a graph of all kernels that this takes."""
        num_visible = min(
            self.model.block_size, math.ceil((position + 1) / self.GRAPH_STEP) * self.GRAPH_STEP
        )
        if num_visible not in self.graphs:
            self.record(num_visible)

        self.token.copy_(x)
        self.position.fill_(position)
        self.graphs[num_visible].replay()
        return self.logits[num_visible]

    def record(self, num_visible: int) -> None:
        """Record a step as a graph; every tensor that it reads or writes stays where it is."""
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())

        # Kernels choose their workspaces the first time, which must not be recorded.
        with torch.cuda.stream(side_stream):
            self.step(num_visible)

        torch.cuda.current_stream().wait_stream(side_stream)
        self.graphs[num_visible] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[num_visible]):
            self.logits[num_visible] = self.step(num_visible)

    def step(self, num_visible: int) -> Tensor:
        """Read self.token at self.position, with a fixed part of the cache behind a mask."""
        places = torch.arange(num_visible, device=self.device)
        self.cache.positions = self.position
        self.cache.num_visible = num_visible
        self.cache.mask = (places <= self.position)[None]  # (1, S)
        return self.predict(self.model.hidden_states(self.token, self.cache))


def generate(
    model: GPT,
    prompt: Tensor,
    num_tokens: int,
    sampler: Sampler,
    seed: int,
    use_graphs: bool = False,
) -> Iterator[Tensor]:
    """Continue a prompt, token by token.

    Args:
        prompt: token ids, int64 (B, T) with T > 0; of a long one the last block_size are read.

    Yields:
        The next token of each text, int64 (B).
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(num_tokens, len(prompt), generator=generator).to(prompt.device)
    decoder = Decoder(model, len(prompt), use_graphs)
    x = prompt[:, -model.block_size :]
    for uniform in chance:
        tokens = sampler(decoder.read(x), uniform)  # (B)
        yield tokens

        x = tokens[:, None]
