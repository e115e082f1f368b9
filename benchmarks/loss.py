"""The output layer and its cross entropy, forward and backward, beside PyTorch's and the limit.

    python benchmarks/loss.py --embedding_dimensions=768 --num_tokens=4096

The limit is three matrix products of tokens, dimensions and vocabulary at the rate measured on the
spot. All take turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from loss import OutputLoss
from system.devices import PRECISIONS, autocast, resolve_device, resolve_precision, synchronize
from system.memory import tune_memory
from text.tokenizer import GPT2_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedding_dimensions", type=int, default=768)
    parser.add_argument("--num_tokens", type=int, default=4096)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    device = resolve_device(args.device)

    if device.type == "cpu":
        tune_memory()

    precision = resolve_precision(device) if args.precision == "auto" else args.precision
    num_rows = (GPT2_SIZE + 127) // 128 * 128
    z = torch.randn(1, args.num_tokens, args.embedding_dimensions, device=device)
    weight = torch.randn(num_rows, args.embedding_dimensions, device=device) * 0.02
    y = torch.randint(GPT2_SIZE, (1, args.num_tokens), device=device)
    z.requires_grad_()
    weight.requires_grad_()
    plain_loss, compiled_loss = OutputLoss(), OutputLoss()
    compiled_loss.compile(dynamic=False)
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    left, right = (each.to(PRECISIONS[precision]) for each in (left, right))

    def plain() -> torch.Tensor:
        logits = F.linear(z, weight)[..., :GPT2_SIZE]
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    candidates = {
        "ours": lambda: compiled_loss(z, weight, y, GPT2_SIZE),
        "ours, not compiled": lambda: plain_loss(z, weight, y, GPT2_SIZE),
        "cross_entropy(linear)": plain,
    }

    # From PyTorch 2.13.
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        candidates["torch's linear_cross_entropy, chunks of 512"] = lambda: F.linear_cross_entropy(
            z[0], weight, y[0], options=options
        )

    def seconds_of(action: Callable) -> float:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)

        return time.perf_counter() - start

    def train(loss: Callable) -> None:
        z.grad = weight.grad = None

        with autocast(device, precision):
            value = loss()

        value.backward()

    for loss in candidates.values():
        train(loss)

    limits, seconds = [], {name: [] for name in candidates}

    for _ in range(args.repeats):
        rate = 2 * size**3 / min(seconds_of(lambda: left @ right) for _ in range(3))
        limits.append(6 * args.num_tokens * weight.numel() / rate)

        for name, loss in candidates.items():
            seconds[name].append(seconds_of(lambda loss=loss: train(loss)))

    result = {
        "device": str(device),
        "precision": precision,
        "limit_seconds": round(statistics.median(limits), 3),
        "seconds": {name: round(statistics.median(each), 3) for name, each in seconds.items()},
        "share_of_limit": {
            name: round(statistics.median(a / b for a, b in zip(limits, each, strict=True)), 3)
            for name, each in seconds.items()
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
