"""What is learned from the same tokens: pre-train.py beside nanoGPT's recipe.

    python benchmarks/learning.py TEXT --steps 500 --seeds 1 2 3
    python benchmarks/learning.py TEXT --steps 1500 --learning_rates --peak_rates 1.5e-3 3e-3 6e-3

TEXT is any source of pre-train.py, best a file or folder; 5 % of its documents are tested on. The
model has 4 layers, 256 dimensions and a context of 256; a step has 16 windows. For every length,
each with its own schedule, every recipe and every rate this prints the test loss in nats a token
over all of the test documents, and the largest rise of the training loss, as means of 10 steps,
above what it had been. Flags of pre-train.py behind `--` change its recipe.

nanoGPT's recipe runs on our network, which computes the same: weights from N(0, 0.02), those that
write to the residual stream smaller; AdamW with betas 0.9 and 0.95 and weight decay 0.1 on the
matrices; warm-up over a tenth, cosine decay to a tenth, clipping at 1; windows with replacement.

A large vocabulary is most of a small model's work: with --vocabulary_size=8192 a step takes 0.37 of
the time on a CPU; losses are then nats per such token, and compare among themselves.
"""

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data import EvaluationWindows, split_windows
from model import GPT
from system.devices import compile_model, resolve_device, resolve_precision
from system.distributed import World
from system.memory import tune_memory
from text import parts
from text.preparation import load_or_prepare
from text.sources import Source, parse_source
from text.token_files import TokenDataset
from text.tokenizer import GPT2_SIZE
from text.vocabulary import open_tokenizer
from trainers import make_trainer
from training.checkpoint import load_model
from training.optimizers import Schedule

BLOCK_SIZE, BATCH_SIZE = 256, 16
# Training losses are means of as many steps.
EPOCH = 10
TEST_SHARE = 0.05
ROOT = Path(__file__).resolve().parent.parent


def prepare(source: Source, folder: Path, vocabulary_size: int) -> TokenDataset:
    """Return the token files of a source, with TEST_SHARE of its documents to test on."""
    number = parts.TEST_SHARES.index(TEST_SHARE) + 1
    parts.JoinedFiles.choose_share = lambda self: setattr(self, "num_test_classes", number)
    return load_or_prepare(source, folder, open_tokenizer([source], folder, vocabulary_size), 2)


def ours(
    args: argparse.Namespace, data: TokenDataset, num_steps: int, seed: int, rate: float
) -> tuple[float, list[float]]:
    """Return the test loss and the course of the training loss of pre-train.py."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, metrics = Path(folder) / "checkpoint.pt", Path(folder) / "metrics.csv"
        subprocess.run(
            [
                sys.executable,
                ROOT / "pre-train.py",
                f"--vocabulary_size={args.vocabulary_size}",
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
                f"--checkpoint_path={checkpoint}",
                f"--metrics_path={metrics}",
                f"--learning_rate={rate}",
                f"--seed={seed}",
                *args.flags,
            ],
            stdout=subprocess.DEVNULL,
            check=True,
        )

        with open(metrics) as file:
            course = [float(row["train_loss"]) for row in csv.DictReader(file)]

        return evaluate(load_model(checkpoint).eval(), data), course


def nanogpt(
    args: argparse.Namespace, data: TokenDataset, num_steps: int, seed: int, rate: float
) -> tuple[float, list[float]]:
    """Return the test loss and the course of the training loss of nanoGPT's recipe."""
    torch.manual_seed(seed)
    world = World(device=resolve_device(None))
    model = GPT(
        args.vocabulary_size,
        BLOCK_SIZE,
        args.embedding_dimensions,
        args.num_attention_heads,
        args.num_hidden_layers,
    ).to(world.device)
    torch.compiler.reset()
    compile_model(model, world.device)
    trainer = make_trainer(model, model, world, resolve_precision(world.device))
    trainer.schedule = Schedule("cosine", rate, rate / 10, num_steps // 10, num_steps)

    random = np.random.default_rng(seed)
    losses = []
    model.train()

    for _ in range(num_steps):
        starts = random.integers(len(data.train) - BLOCK_SIZE, size=BATCH_SIZE)
        windows = np.stack([data.train[start : start + BLOCK_SIZE + 1] for start in starts])
        losses.append(trainer.take_step([(trainer.step, *split_windows(windows))])[0])

    course = [statistics.mean(part) for part in zip(*[iter(losses)] * EPOCH, strict=False)]

    return evaluate(model, data), course


def evaluate(model: GPT, data: TokenDataset) -> float:
    """Return the mean loss over all windows to test on, in nats a token."""
    world = World(device=resolve_device(None))
    trainer = make_trainer(model.to(world.device), model, world, resolve_precision(world.device))

    return trainer.evaluate(EvaluationWindows(data.test, BLOCK_SIZE, None).batches(BATCH_SIZE))


def spike(course: list[float]) -> float:
    """Return by how much the loss has been above its lowest so far."""
    lowest = itertools.accumulate(course, min)

    return max(loss - low for loss, low in zip(course, lowest, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--dataset_path", type=Path, default=Path("./dataset/learning"))
    parser.add_argument("--vocabulary_size", type=int, default=GPT2_SIZE)
    parser.add_argument("--steps", type=int, nargs="+", default=[750])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--learning_rates", type=float, nargs="*", default=[5e-4], help="of ours")
    parser.add_argument("--peak_rates", type=float, nargs="*", default=[], help="of nanoGPT's")
    parser.add_argument("--embedding_dimensions", type=int, default=256)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    # Behind options argparse takes no list of positional arguments.
    argv = [*sys.argv[1:], "--"]
    end = argv.index("--")
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 : -1]

    if any(num_steps % EPOCH for num_steps in args.steps):
        parser.error(f"--steps must be multiples of {EPOCH}.")

    tune_memory()

    source, _ = parse_source(args.text)
    args.dataset_path.mkdir(parents=True, exist_ok=True)
    data = prepare(source, args.dataset_path, args.vocabulary_size)
    recipes = [(" ".join(["ours", *args.flags]), ours, rate) for rate in args.learning_rates]
    recipes += [("nanoGPT's", nanogpt, rate) for rate in args.peak_rates]

    for num_steps, (name, learn, rate) in itertools.product(args.steps, recipes):
        losses, spikes = [], []

        for seed in args.seeds:
            loss, course = learn(args, data, num_steps, seed, rate)
            losses.append(round(loss, 4))
            spikes.append(spike(course))

        line = {
            "recipe": name,
            "rate": rate,
            "steps": num_steps,
            "tokens": num_steps * BATCH_SIZE * BLOCK_SIZE,
            "test_loss": round(statistics.mean(losses), 4),
            "of_seeds": losses,
            "spread": round(max(losses) - min(losses), 4),
            "spike": round(max(spikes), 3),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
