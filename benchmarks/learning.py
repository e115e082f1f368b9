"""What is learned from the same tokens: pre-train.py beside nanoGPT's recipe.

    python benchmarks/learning.py TEXT --steps 500 1500 --seeds 1 2 3 --peak_rates 1e-3 3e-3

TEXT is any source of pre-train.py, best a file or folder. The model has 4 layers, 256 dimensions
and a context of 256; a step has 16 windows. Prints the test loss in nats a token over all of the
test documents after runs of each length, every one with its own schedule, and the largest rise of
the training loss above what it had been. Flags of pre-train.py behind `--` change its recipe.

nanoGPT's recipe runs on our network, which computes the same: weights from N(0, 0.02), those that
write to the residual stream smaller; AdamW with betas 0.9 and 0.95 and weight decay 0.1 on the
matrices; warm-up over a tenth, cosine decay to a tenth, clipping at 1; windows with replacement.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from data import EvaluationWindows, split_windows
from devices import compile_model, resolve_device, resolve_precision, tune_memory
from distributed import World
from model import GPT
from optimizers import Schedule
from preparation import load_or_prepare, parse_source
from tokenizer import VOCABULARY_SIZE
from trainers import make_trainer, never

SCRIPT = Path(__file__).resolve().parent.parent / "pre-train.py"
BLOCK_SIZE, BATCH_SIZE = 256, 16
# Training losses are means of as many steps.
EPOCH = 10


def ours(args: argparse.Namespace, num_steps: int, seed: int) -> tuple[float, list[float]]:
    """Return the test loss and the course of the training loss of pre-train.py."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.csv"
        subprocess.run(
            [
                sys.executable,
                SCRIPT,
                f"--dataset={args.text}",
                f"--dataset_path={args.dataset_path}",
                f"--block_size={BLOCK_SIZE}",
                f"--embedding_dimensions={args.embedding_dimensions}",
                f"--num_attention_heads={args.num_attention_heads}",
                f"--num_hidden_layers={args.num_hidden_layers}",
                "--dropout=0",
                f"--batch_size={BATCH_SIZE}",
                "--gradient_accumulation_steps=1",
                f"--samples_per_epoch={BATCH_SIZE * EPOCH}",
                f"--num_epochs={num_steps // EPOCH}",
                f"--eval_interval={num_steps}",
                f"--checkpoint_interval={num_steps}",
                f"--checkpoint_path={folder}/checkpoint.pt",
                f"--metrics_path={metrics}",
                f"--seed={seed}",
                *args.flags,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if args.quiet else None,
            check=True,
        )

        with open(metrics) as file:
            rows = list(csv.DictReader(file))

        return float(rows[-1]["test_loss"]), [float(row["train_loss"]) for row in rows]


def nanogpt(
    args: argparse.Namespace, num_steps: int, seed: int, peak_rate: float
) -> tuple[float, list[float]]:
    """Return the test loss and the course of the training loss of nanoGPT's recipe."""
    torch.manual_seed(seed)
    world = World(device=resolve_device(None))
    model = GPT(
        VOCABULARY_SIZE,
        BLOCK_SIZE,
        args.embedding_dimensions,
        args.num_attention_heads,
        args.num_hidden_layers,
    ).to(world.device)
    initialize(model)
    compile_model(model, world.device)
    trainer = make_trainer(model, model, world, resolve_precision(world.device))
    trainer.schedule = Schedule("cosine", peak_rate, peak_rate / 10, num_steps // 10, num_steps)

    source, _ = parse_source(args.text)
    data = load_or_prepare(source, Path(args.dataset_path), 2)
    random = np.random.default_rng(seed)
    losses = []
    model.train()

    for _ in range(num_steps):
        starts = random.integers(len(data.train) - BLOCK_SIZE, size=BATCH_SIZE)
        windows = np.stack([data.train[start : start + BLOCK_SIZE + 1] for start in starts])
        losses.append(trainer.take_step([(trainer.step, *split_windows(windows))], never())[0])

    batches = EvaluationWindows(data.test, BLOCK_SIZE).batches(BATCH_SIZE)
    course = [statistics.mean(part) for part in zip(*[iter(losses)] * EPOCH, strict=False)]

    return trainer.evaluate(batches, never()), course


@torch.no_grad()
def initialize(model: GPT) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            is_residual = name.endswith("output.weight")
            scale = math.sqrt(2 * len(model.blocks)) if is_residual else 1.0
            nn.init.normal_(weight, std=0.02 / scale)

    model.token_embeddings.weight[VOCABULARY_SIZE:].zero_()


def spike(course: list[float]) -> float:
    """Return by how much the loss has been above its lowest so far."""
    lowest = itertools.accumulate(course, min)

    return max(loss - low for loss, low in zip(course, lowest, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--dataset_path", default="./dataset")
    parser.add_argument("--steps", type=int, nargs="+", default=[750])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--peak_rates", type=float, nargs="*", default=[], help="of nanoGPT's")
    parser.add_argument("--ours", type=int, default=1, help="0 leaves out pre-train.py")
    parser.add_argument("--embedding_dimensions", type=int, default=256)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("flags", nargs="*", help="of pre-train.py, behind --")
    args = parser.parse_args()
    tune_memory()

    recipes = {"ours": ours} if args.ours else {}

    for rate in args.peak_rates:
        recipes[f"nanoGPT's, {rate:g}"] = lambda *key, rate=rate: nanogpt(*key, rate)

    for num_steps in args.steps:
        for name, learn in recipes.items():
            runs = [learn(args, num_steps, seed) for seed in args.seeds]
            losses = [loss for loss, _ in runs]
            line = {
                "recipe": " ".join([name, *args.flags]) if name == "ours" else name,
                "steps": num_steps,
                "tokens": num_steps * BATCH_SIZE * BLOCK_SIZE,
                "test_loss": round(statistics.mean(losses), 4),
                "spread": round(max(losses) - min(losses), 4),
                "seeds": len(losses),
                "spike": round(max(spike(course) for _, course in runs), 3),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
