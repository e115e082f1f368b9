"""What a pass over OpenWebText takes on many GPUs, computed from what was measured on one.

    python benchmarks/scale.py --tflops=790 --efficiency=0.4

Time is that of the operations at the given share of the matrix products' rate, of Muon's, and of
what an update sends; as if nothing ran at the same time, which is the worst case.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import GPT
from text.tokenizer import GPT2_SIZE

PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NUM_GPUS = (1, 8, 64)
GPUS_PER_MACHINE = 8


def muon_flops(model: GPT) -> int:
    """Count the operations of an update: five Newton-Schulz steps for every hidden matrix."""
    shapes = [sorted(p.shape) for p in model.blocks.parameters() if p.ndim == 2]

    # Two products of m x m with m x n, and one of m x m with itself.
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)


def bytes_sent(num_weights: int, num_gpus: int) -> float:
    """Return what a GPU sends in an update: gradients added up, stepped weights handed out."""
    return 12 * num_weights * (num_gpus - 1) / num_gpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tflops", type=float, default=790, help="of a GPU's bf16 matrix products, measured")
    add("--efficiency", type=float, default=0.4, help="the share of it that training reaches")
    add("--machine_bandwidth", type=float, default=300, help="GB/s of a GPU in its machine")
    add("--network_bandwidth", type=float, default=50, help="GB/s of a GPU between machines")
    add("--price", type=float, default=3.0, help="dollars for an hour of a GPU")
    add("--tokens", type=float, default=9.0e9)
    add("--tokens_per_update", type=int, default=512 * 1024)
    add("--block_size", type=int, default=1024)
    args = parser.parse_args()
    rate = args.tflops * 1e12 * args.efficiency

    print("| Preset | GPUs | Compute, ms | Muon, ms | Sending, ms | Tokens/s | Hours | Cost, $ |")
    print("|---|---|---|---|---|---|---|---|")

    for preset in PRESETS:
        sizes = importlib.import_module("pre-train").PRESETS[preset]

        with torch.device("meta"):
            model = GPT(GPT2_SIZE, args.block_size, **sizes)

        flops = model.flops_per_token(args.block_size) * args.tokens_per_update

        for num_gpus in NUM_GPUS:
            is_one_machine = num_gpus <= GPUS_PER_MACHINE
            bandwidth = args.machine_bandwidth if is_one_machine else args.network_bandwidth
            compute = flops / num_gpus / rate
            muon = muon_flops(model) / num_gpus / rate
            sending = bytes_sent(model.num_parameters, num_gpus) / (bandwidth * 1e9)
            update = compute + muon + sending
            hours = args.tokens / args.tokens_per_update * update / 3600

            print(
                f"| {preset} | {num_gpus} | {compute * 1e3:,.0f} | {muon * 1e3:,.1f}"
                f" | {sending * 1e3:,.0f} | {args.tokens_per_update / update:,.0f}"
                f" | {hours:,.2f} | {hours * num_gpus * args.price:,.0f} |"
            )


if __name__ == "__main__":
    main()
