"""Samples the next token from logits: temperature, top-k, top-p.

Axes of the tensors: B batch, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens by their probabilities.

    Args:
        temperature: what logits are divided by; 0 takes the most probable token.
        top_k: keep only the k most probable tokens.
        top_p: of these keep the smallest set with this probability (Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_k: int = 20
    top_p: float = 1.0

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Choose a token for each text.

        Args:
            logits: float32 (B, V).
            uniform: random numbers in [0, 1), float32 (B): the only source of randomness.

        Returns:
            Token ids, int64 (B).
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)

        logits, tokens = logits.topk(min(self.top_k, logits.size(-1)))  # (B, k), falling
        sums = (logits / self.temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, k)
        # As many as it takes to reach top_p, so one at least.
        num_kept = (sums < self.top_p).sum(dim=-1, keepdim=True).clamp(max=sums.size(-1) - 1)
        target = uniform[:, None] * sums.gather(1, num_kept)  # (B, 1)
        choice = (sums <= target).sum(dim=-1, keepdim=True).clamp(max=sums.size(-1) - 1)
        return tokens.gather(1, choice).squeeze(1)
