"""Print the memory that training takes on each GPU, by formula; with --measure, beside this CPU's.

`torchrun --standalone --nproc-per-node=2 benchmarks/memory.py --measure` does so for two processes.
The formula leaves out what libraries take for themselves: about 1 GB on a GPU.
"""

import argparse
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT  # noqa: E402
from system.devices import compile_model  # noqa: E402
from system.distributed import World  # noqa: E402
from system.memory import peak_memory, tune_memory  # noqa: E402
from text.tokenizer import GPT2_SIZE  # noqa: E402
from trainers import make_trainer  # noqa: E402

PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# For every dimension of a token, the bytes that a compiled layer with dropout keeps for its
# backward pass.
ACTIVATION_SIZE = {"fp32": 50, "bf16": 28}


@dataclass
class Plan:
    """The bytes that training takes on each GPU, in bf16 or fp32."""

    embedding_dimensions: int
    num_hidden_layers: int
    batch_size: int
    block_size: int = 1024
    num_gpus: int = 1
    sharding: str = "optimizer"
    precision: str = "bf16"
    activation_checkpointing: bool = False
    # The most positions whose logits are in memory at a time.
    chunk_size: int = 4096

    def __post_init__(self):
        self.num_rows = math.ceil(GPT2_SIZE / 128) * 128
        self.is_full = self.sharding == "full" and self.num_gpus > 1
        self.is_low = self.precision == "bf16"
        self.block = 12 * self.embedding_dimensions**2
        self.matrices = self.num_hidden_layers * self.block
        self.embeddings = (self.num_rows + self.block_size) * self.embedding_dimensions

    @property
    def weights(self) -> float:
        return self.part(self.matrices + self.embeddings)

    @property
    def gradients(self) -> float:
        return self.part(self.matrices + self.embeddings)

    def part(self, num_weights: int) -> float:
        """What this GPU has of something in float32: all, or its part and what is in use."""
        if not self.is_full:
            return 4 * num_weights

        return 4 * (num_weights / self.num_gpus + self.embeddings + 2 * self.block)

    @property
    def optimizer(self) -> float:
        """Muon keeps one number for a weight, AdamW two."""
        return (4 * self.matrices + 8 * self.embeddings) / self.num_gpus

    @property
    def activations(self) -> float:
        token = self.embedding_dimensions * self.batch_size * self.block_size
        # Copies in bf16 of the weights; that of the MLP's second layer is made again.
        copies = 2 * self.block * 2 / 3 * self.is_low
        layer = token * ACTIVATION_SIZE[self.precision] + copies

        if self.activation_checkpointing:
            return layer + 4 * token * self.num_hidden_layers

        return layer * self.num_hidden_layers

    @property
    def loss(self) -> float:
        """Logits, and the gradient of the output layer: in bf16 with copies of both."""
        output = self.num_rows * self.embedding_dimensions
        chunk = self.num_rows * min(self.chunk_size, self.batch_size * self.block_size)

        return output * (8 if self.is_low else 4) + chunk * (2 if self.is_low else 4)

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def sizes_of(preset: str) -> dict[str, int]:
    return importlib.import_module("pre-train").PRESETS[preset]


def print_table(args: argparse.Namespace) -> None:
    columns = ["weights", "gradients", "optimizer", "activations", "loss", "total"]
    print(f"| Model | GPUs | --sharding | {' | '.join(columns)} | with checkpointing |")
    print("|" + "---|" * (len(columns) + 4))

    for preset in PRESETS:
        sizes = {key: value for key, value in sizes_of(preset).items() if "heads" not in key}

        for num_gpus, sharding in ((1, "optimizer"), (8, "optimizer"), (8, "full"), (64, "full")):
            options = {"num_gpus": num_gpus, "sharding": sharding, "precision": args.precision}
            plan = Plan(**sizes, batch_size=args.batch_size, **options)
            less = Plan(
                **sizes, batch_size=args.batch_size, **options, activation_checkpointing=True
            )
            values = [getattr(plan, name) for name in columns] + [less.total]
            cells = " | ".join(f"{value / 1e9:.1f}" for value in values)
            print(f"| {preset} | {num_gpus} | {sharding if num_gpus > 1 else ''} | {cells} |")


def measure(args: argparse.Namespace) -> None:
    """Take two updates of a micro-batch, and compare the memory that this process came to have."""
    world = World.from_environment()
    world.sharding = args.sharding
    tune_memory()
    world.connect()
    sizes = sizes_of(args.measure)
    before = peak_memory(world.device)
    model = GPT(GPT2_SIZE, args.block_size, **sizes, dropout=0.1)
    model.activation_checkpointing = args.activation_checkpointing
    network = world.wrap(model, model.blocks)
    compile_model(model, world.device)
    trainer = make_trainer(model, network, world, args.precision, "muon")
    x = torch.randint(GPT2_SIZE, (args.batch_size, args.block_size))

    for number in range(2):
        trainer.update([(number, x, x)])

    plan = Plan(
        sizes["embedding_dimensions"],
        sizes["num_hidden_layers"],
        args.batch_size,
        args.block_size,
        world.size,
        args.sharding,
        args.precision,
        args.activation_checkpointing,
        chunk_size=512 if args.precision == "fp32" else 1024,
    )
    measured = peak_memory(world.device) - before

    if world.is_first:
        print(
            json.dumps(
                {
                    "measured_gb": round(measured / 1e9, 2),
                    "formula_gb": round(plan.total / 1e9, 2),
                    "ratio": round(measured / plan.total, 3),
                }
            )
        )

    world.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=PRESETS, nargs="?", const="gpt2")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--precision", choices=list(ACTIVATION_SIZE), default="bf16")
    parser.add_argument("--sharding", choices=["optimizer", "full"], default="optimizer")
    parser.add_argument("--activation_checkpointing", action="store_true")
    args = parser.parse_args()

    if args.measure:
        measure(args)
    else:
        print_table(args)


if __name__ == "__main__":
    main()
