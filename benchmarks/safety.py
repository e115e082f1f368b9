"""What safety costs: a save beside PyTorch's own, and the guards of a training step.

    python benchmarks/safety.py

A save that is forced onto the disk, as PyTorch writes it, and ours, which adds a checksum, another
name and the previous file; for how long training waits for it; and reading the checksum. Then the
part of a training step that looks for signals and for numbers that are not finite.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import GPT
from system.devices import resolve_device, resolve_precision
from system.distributed import World
from system.memory import tune_memory
from trainers import make_trainer
from training.checkpoint import CheckpointWriter, save_checkpoint, verify_checksum
from training.trainer import Trainer


def seconds(function: Callable, *args) -> float:
    start = time.perf_counter()
    function(*args)

    return time.perf_counter() - start


def save_plainly(path: Path, state: dict) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def measure_saving(trainer: Trainer, repeats: int) -> dict:
    """Return medians in seconds, all of them measured in turns."""
    state = trainer.state_dict()
    times = {name: [] for name in ("plain", "ours", "waiting", "behind", "reading")}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        writer = CheckpointWriter(path)

        for _ in range(repeats + 1):
            times["plain"].append(seconds(save_plainly, Path(folder) / "plain.pt", state))
            times["ours"].append(seconds(save_checkpoint, path, state))
            times["waiting"].append(seconds(writer.save, state))
            times["behind"].append(seconds(writer.wait))
            times["reading"].append(seconds(verify_checksum, path))

        size = path.stat().st_size

    # The first has no file to keep.
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}

    return {
        "megabytes": round(size / 1e6),
        **medians,
        "ours_over_plain": round(medians["ours"] / medians["plain"], 2),
        "waiting_over_plain": round(medians["waiting"] / medians["plain"], 2),
    }


def measure_guards(trainer: Trainer, step: list, repeats: int) -> dict:
    """Return the share of training steps that goes into their guards."""
    spent = []

    def timed(guard: Callable) -> Callable:
        return lambda *args: spent.append(seconds(guard, *args))

    trainer.check_signals = timed(trainer.check_signals)
    trainer.check_finite = timed(trainer.check_finite)
    total = sum(seconds(trainer.take_step, step) for _ in range(repeats))

    return {
        "guards_us_a_step": round(1e6 * sum(spent) / repeats, 1),
        "step_ms": round(1e3 * total / repeats, 1),
        "guards_share": round(sum(spent) / total, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedding_dimensions", type=int, default=768)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4, help="in an update, of 4 x 64 tokens")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tune_memory()

    world = World(device=resolve_device(None))
    model = GPT(50257, 64, args.embedding_dimensions, 4, args.num_hidden_layers).to(world.device)
    trainer = make_trainer(model, model, world, resolve_precision(world.device), "muon")
    x = torch.randint(50257, (4, 64))
    step = [(number, x, x) for number in range(args.batches)]
    trainer.take_step(step)

    print(json.dumps(measure_saving(trainer, args.repeats)))
    print(json.dumps(measure_guards(trainer, step, args.repeats)))


if __name__ == "__main__":
    main()
