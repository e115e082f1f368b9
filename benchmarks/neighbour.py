"""What another program on the same cores costs a training run on a CPU.

    python benchmarks/neighbour.py --turns 300000 2000 --repeats 3

The tokens a second of the last of --epochs epochs of `pre-train.py --preset=tiny`: alone, beside an
endless loop, and beside another training run of one thread; for every number of turns that a thread
is to spin before it sleeps (threads.py has ours; 300,000 are the library's own). Medians, and all
that was measured, one after the other.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOOP = [sys.executable, "-c", "while True: pass"]


def training(folder: str, num_epochs: int) -> list[str]:
    """Return the command of a training run that keeps its files in a folder."""
    return [
        sys.executable,
        str(ROOT / "pre-train.py"),
        "--preset=tiny",
        "--seed=1",
        "--device=cpu",
        f"--num_epochs={num_epochs}",
        f"--eval_interval={num_epochs}",
        f"--checkpoint_interval={num_epochs}",
        f"--checkpoint_path={folder}/checkpoint.pt",
        f"--metrics_path={folder}/metrics.csv",
    ]


def tokens_per_second(num_epochs: int, turns: int) -> float:
    """Return the speed of the last epoch of a run whose threads spin for so many turns."""
    environment = os.environ | {"GOMP_SPINCOUNT": str(turns)}

    with tempfile.TemporaryDirectory() as folder:
        command = training(folder, num_epochs)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)

        with open(f"{folder}/metrics.csv") as file:
            return float(list(csv.DictReader(file))[-1]["tokens_per_second"])


@contextlib.contextmanager
def neighbour(kind: str) -> Iterator[None]:
    """Let another program run meanwhile: none (alone), an endless loop, or a training run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    with tempfile.TemporaryDirectory() as folder:
        commands = {"alone": None, "loop": LOOP, "training": training(folder, 1000)}
        process = None

        if command := commands[kind]:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )

        try:
            if kind == "training":
                # It has begun when it has told of its first epoch.
                next(line for line in process.stdout if line.startswith("epoch 1/"))

            yield
        finally:
            if process:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("alone", "loop", "training")
    parser.add_argument("--beside", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--turns", nargs="+", type=int, default=[300_000, 2_000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    for kind in args.beside:
        rates = {turns: [] for turns in args.turns}

        with neighbour(kind):
            for _ in range(args.repeats):
                for turns, measured in rates.items():
                    measured.append(round(tokens_per_second(args.epochs, turns)))

        for turns, measured in rates.items():
            median = statistics.median(measured)
            row = {"beside": kind, "turns": turns, "tokens_per_second": median, "of": measured}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
