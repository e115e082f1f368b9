"""Measure two processes of one thread each against one process with two threads, on one machine.

Both train the same model on the same global batch, in turns. Also what goes over the network in an
update, and the bytes of optimizer state that each of several processes keeps.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUM_EPOCHS = 4

SIZES = {
    "small": ["--embedding_dimensions=256", "--num_attention_heads=4", "--num_hidden_layers=4"],
    "gpt2": ["--preset=gpt2"],
}

# Runs pre-training and tells at its end what this process keeps.
REPORT = """
import importlib, sys
sys.path.insert(0, {root!r})
script, training = importlib.import_module("pre-train"), importlib.import_module("training")

class Trainer(trainer.Trainer):
    def finish_epoch(self, *args):
        parts = [getattr(part, "optim", part) for part in self.optimizers.parts]
        states = [tensor for part in parts for state in part.state.values() for tensor in
                  state.values()]
        local = [getattr(tensor, "_local_tensor", tensor) for tensor in states]
        size = sum(tensor.numel() * tensor.element_size() for tensor in local)
        print(f"rank {{self.world.rank}} state {{size}}", file=sys.stderr, flush=True)
        return super().finish_epoch(*args)

script.Trainer = Trainer
sys.exit(script.main())
"""


def train(args: argparse.Namespace, num_processes: int, num_threads: int) -> dict:
    """Return the median tokens a second of the epochs behind the first, and what was sent."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "report.py"
        script.write_text(REPORT.format(root=str(ROOT)))
        metrics = Path(folder) / "metrics.csv"
        command = [sys.executable, str(script)]

        if num_processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc-per-node={num_processes}", str(script)]

        samples = args.batch_size * args.accumulation * args.steps_per_epoch
        before = loopback_bytes()
        errors = subprocess.run(
            [
                *command,
                *SIZES[args.size],
                "--dataset=stdlib",
                f"--dataset_path={args.dataset_path}",
                f"--block_size={args.block_size}",
                f"--batch_size={args.batch_size}",
                f"--gradient_accumulation_steps={args.accumulation}",
                f"--samples_per_epoch={samples}",
                f"--num_epochs={NUM_EPOCHS}",
                "--eval_interval=1000",
                "--checkpoint_interval=1000",
                f"--checkpoint_path={folder}/checkpoint.pt",
                f"--metrics_path={metrics}",
                "--device=cpu",
                f"--precision={args.precision}",
                f"--sharding={args.sharding}",
                "--seed=0",
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr

        with open(metrics) as file:
            rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]

        states = dict(re.findall(r"rank (\d+) state (\d+)", errors))

        return {
            "tokens_per_second": statistics.median(rates[1:]),
            "bytes": loopback_bytes() - before,
            "state": [int(states[str(rank)]) for rank in range(num_processes)],
        }


def loopback_bytes() -> int:
    """Return the bytes that this machine has sent to itself."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=32)
    parser.add_argument("--steps_per_epoch", type=int, default=2)
    parser.add_argument("--num_turns", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sharding", default="optimizer")
    parser.add_argument("--processes", type=int, nargs="*", default=[4], help="also their state")
    parser.add_argument("--dataset_path", default="./dataset")
    args = parser.parse_args()
    turns = [(train(args, 1, 2), train(args, 2, 1)) for _ in range(args.num_turns)]
    rates = [[result["tokens_per_second"] for result in pair] for pair in turns]
    num_steps = NUM_EPOCHS * args.steps_per_epoch
    states = {1: turns[0][0]["state"], 2: turns[0][1]["state"]}

    for size in args.processes:
        states[size] = train(args, size, 1)["state"]

    print(
        json.dumps(
            {
                "one_process_tokens_per_second": statistics.median(one for one, _ in rates),
                "two_processes_tokens_per_second": statistics.median(two for _, two in rates),
                "ratio": round(statistics.median(two / one for one, two in rates), 3),
                "sent_bytes_per_update": turns[0][1]["bytes"] // num_steps,
                "optimizer_state_bytes_by_rank": states,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
