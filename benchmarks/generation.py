"""Generating text with a GPT-2 of 124 M parameters, beside nanoGPT's and Hugging Face's generate.

    python benchmarks/generation.py --nanogpt=PATH --num_tokens=500

All have random weights of the same sizes, start from one token and take the most probable next.
Prints tokens a second; the limit, measured on the spot: how often the weights and the cache that a
token needs can be read from memory; the time to the first token behind a prompt of 512; and a batch
of 8.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from inference.cache import KeyValueCache
from inference.decoding import generate
from inference.sampling import Sampler
from model import GPT
from system.devices import PRECISIONS, resolve_device, resolve_precision, synchronize

SIZES = {
    "vocabulary_size": 50257,
    "block_size": 1024,
    "embedding_dimensions": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}


def seconds_of(action, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)

    return time.perf_counter() - start


def bandwidth(numbers: torch.Tensor) -> float:
    """Return how many bytes a second are read from memory, by the median of several sums."""
    seconds = statistics.median(seconds_of(numbers.sum, numbers.device) for _ in range(7))

    return numbers.nbytes / seconds


def ours(device: torch.device, precision: str):
    model = GPT(**SIZES).to(device, PRECISIONS[precision]).eval()
    sampler = Sampler(temperature=0.0)

    def run(batch_size: int, num_prompt: int, num_tokens: int) -> float:
        prompt = torch.zeros(batch_size, num_prompt, dtype=torch.int64, device=device)
        use_graphs = device.type == "cuda"

        return seconds_of(
            lambda: list(generate(model, prompt, num_tokens, sampler, 0, use_graphs)), device
        )

    return model, run


def nanogpt(path: str, device: torch.device):
    sys.path.insert(0, path)
    del sys.modules["model"]

    from model import GPT as Theirs  # noqa: N811
    from model import GPTConfig

    model = Theirs(GPTConfig(dropout=0.0, bias=False, vocab_size=50257)).to(device).eval()

    def run(num_tokens: int) -> float:
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=device)

        return seconds_of(lambda: model.generate(prompt, num_tokens, top_k=1), device)

    return run


def hugging_face(device: torch.device, precision: str):
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).to(device, PRECISIONS[precision]).eval()

    def run(num_tokens: int) -> float:
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=device)
        config = GenerationConfig(
            min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        mask = torch.ones_like(prompt)

        return seconds_of(
            lambda: model.generate(prompt, attention_mask=mask, generation_config=config), device
        )

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--num_tokens", type=int, default=500)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    device = resolve_device(args.device)
    precision = resolve_precision(device) if args.precision == "auto" else args.precision
    model, run = ours(device, precision)
    # A token reads all rows of the output layer, and the keys and values of half the text.
    num_bytes = sum(p.nbytes for p in model.parameters()) - model.position_embeddings.weight.nbytes
    num_bytes += (
        sum(layer.keys_values.nbytes for layer in KeyValueCache(model, 1).layers)
        * args.num_tokens
        // (2 * model.block_size)
    )
    numbers = torch.ones(1 << 28, dtype=torch.float32, device=device)
    run(1, 1, 20)

    # In turns, for the memory of a shared machine has its moods.
    pairs = [
        (bandwidth(numbers) / num_bytes, args.num_tokens / run(1, 1, args.num_tokens))
        for _ in range(args.repeats)
    ]
    limit, rate = map(statistics.median, zip(*pairs, strict=True))
    rates = {"ours": rate}
    rates["ours, 8 texts"] = 8 * args.num_tokens / run(8, 1, args.num_tokens)
    first = statistics.median(run(1, 512, 1) for _ in range(args.repeats))

    if args.nanogpt:
        rates["nanoGPT"] = args.num_tokens / nanogpt(args.nanogpt, device)(args.num_tokens)

    rates["Hugging Face"] = args.num_tokens / hugging_face(device, precision)(args.num_tokens)

    result = {
        "device": str(device),
        "precision": precision,
        "limit_tokens_per_second": round(limit, 1),
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "share_of_limit": round(rate / limit, 3),
        "ours_is_faster_by": {name: round(rates["ours"] / rate, 1) for name, rate in rates.items()},
        "seconds_to_first_token_after_512": round(first, 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
