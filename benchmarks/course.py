"""Whole runs by pre-train.py's recipe and by nanoGPT's: test loss over tokens, and a picture.

    python benchmarks/course.py TEXT --updates 640 --peak_rates 6e-4 1.2e-3 -- --preset=gpt2

All runs are without dropout and see the same windows in the same order; flags of pre-train.py
behind `--` hold for all of them. nanoGPT's recipe is AdamW with a warm-up over a tenth and cosine
decay to a tenth, once for every peak rate. One JSON line a run: its end, and how ours stood at the
same loss and at the same time. Tables and `course.svg` come into a folder; checkpoints are removed.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.pictures import (  # noqa: E402
    LIGHT,
    SOURCE_STYLES,
    count_text,
    settings,
    to_svg,
)

# Test losses in a run.
NUM_TESTS = 16
# Ours first.
STYLES = ({"color": LIGHT["test"], "linewidth": 2.8}, *SOURCE_STYLES)


def learn(args: argparse.Namespace, name: str, flags: list[str]) -> list[dict]:
    """Return the table of a run, one row a test; what there is of it when the run fails."""
    table = args.out / f"{name.replace(' ', '-')}.csv"
    table.unlink(missing_ok=True)

    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        subprocess.run(
            [
                sys.executable,
                ROOT / "pre-train.py",
                f"--dataset={args.text}",
                "--dropout=0",
                f"--batch_size={args.batch_size}",
                "--gradient_accumulation_steps=1",
                f"--samples_per_epoch={args.updates // NUM_TESTS * args.batch_size}",
                f"--num_epochs={NUM_TESTS}",
                "--eval_interval=1",
                f"--checkpoint_interval={NUM_TESTS}",
                f"--checkpoint_path={folder}/checkpoint.pt",
                f"--metrics_path={table}",
                f"--seed={args.seed}",
                *flags,
                *args.flags,
            ],
            stdout=sys.stderr,
            check=False,
        )

    if not table.exists():
        return []

    with open(table) as file:
        rows = csv.DictReader(file)

        return [{column: float(value) for column, value in row.items()} for row in rows]


def compare(name: str, rows: list[dict], ours: list[dict]) -> dict:
    """Describe the end of a run, and where ours first was as good, and last as early."""
    last = rows[-1]
    as_good = next((row for row in ours if row["test_loss"] <= last["test_loss"]), None)
    as_early = [row for row in ours if row["seconds"] <= last["seconds"]][-1:]
    limits = [row["tokens_per_second"] / row["mfu"] for row in rows]
    rate = last["tokens"] / last["seconds"]

    return {
        "run": name,
        "tokens": int(last["tokens"]),
        "test_loss": round(last["test_loss"], 3),
        # Of training alone, with the compilation of the first update.
        "seconds": round(last["seconds"], 1),
        "tokens_per_second": round(rate),
        "share_of_limit": round(rate * len(limits) / sum(limits), 3),
        "ours_is_as_good_after_tokens": int(as_good["tokens"]) if as_good else None,
        "and_after_seconds": round(as_good["seconds"], 1) if as_good else None,
        "ours_by_then": [round(row["test_loss"], 3) for row in as_early],
    }


def draw(runs: dict[str, list[dict]], title: str) -> str:
    """Draw the test losses of runs over their tokens."""
    with settings():
        from matplotlib.figure import Figure

        figure = Figure((800 / 72, 430 / 72))
        axes = figure.add_axes((0.09, 0.08, 0.66, 0.76))

        for (name, rows), style in zip(runs.items(), STYLES, strict=False):
            tokens, losses = zip(*((row["tokens"], row["test_loss"]) for row in rows), strict=True)
            axes.plot(tokens, losses, marker="o", label=f"{losses[-1]:.3f} {name}", **style)

        axes.set_title("test loss, nats per token, over tokens")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
        figure.text(0.02, 0.93, title, fontsize=14, fontweight="bold")

        return to_svg(figure, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--updates", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=32, help="windows of an update")
    parser.add_argument("--peak_rates", nargs="*", default=["6e-4"], help="of nanoGPT's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--title", default="Test loss by recipe")
    parser.add_argument("--out", type=Path, default=Path("./out/course"))
    # Behind options argparse takes no list of positional arguments.
    argv = [*sys.argv[1:], "--"]
    end = argv.index("--")
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 : -1]

    if args.updates % NUM_TESTS:
        parser.error(f"--updates must be a multiple of {NUM_TESTS}.")

    if len(args.peak_rates) >= len(STYLES):
        parser.error(f"--peak_rates takes {len(STYLES) - 1} at most.")

    args.out.mkdir(parents=True, exist_ok=True)
    recipes = {"ours": []} | {
        f"nanoGPT {rate}": [
            "--optimizer=adamw",
            "--lr_schedule=cosine",
            f"--learning_rate={rate}",
            f"--min_learning_rate={float(rate) / 10}",
            f"--warmup_steps={args.updates // 10}",
        ]
        for rate in args.peak_rates
    }
    runs = {}

    for name, flags in recipes.items():
        if rows := learn(args, name, flags):
            runs[name] = rows
            print(json.dumps(compare(name, rows, runs.get("ours", []))), flush=True)
            (args.out / "course.svg").write_text(draw(runs, args.title))


if __name__ == "__main__":
    main()
