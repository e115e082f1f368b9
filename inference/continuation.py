"""Continues a prompt as text: whole characters, as soon as they are complete."""

import codecs
from collections.abc import Iterator

import torch

from inference.decoding import generate
from inference.sampling import Sampler
from model import GPT
from text.tokenizer import Tokenizer


def continue_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    num_samples: int,
    max_tokens: int,
    sampler: Sampler,
    seed: int,
    use_graphs: bool = False,
) -> Iterator[list[str | None]]:
    """Continue a prompt several times, side by side; a text ends at end-of-text.

    Args:
        prompt: token ids, one at least.

    Yields:
        What each new token adds to each text; None for a text that has ended.
    """
    device = model.token_embeddings.weight.device
    x = torch.tensor([prompt] * num_samples, device=device)  # (B, T)
    running = [True] * num_samples
    # A character may have its bytes in several tokens.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in running]
    for tokens in generate(model, x, max_tokens, sampler, seed, use_graphs):
        row: list[str | None] = [None] * num_samples
        for number, token in enumerate(tokens.tolist()):
            if running[number]:
                running[number] = token != tokenizer.end_of_text
                content = tokenizer.decode_bytes(token) if running[number] else b""
                row[number] = decoders[number].decode(content, final=not running[number])

        yield row
        if not any(running):
            return

    yield [decoder.decode(b"", final=True) or None for decoder in decoders]
