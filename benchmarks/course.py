"""Whole runs by pre-train.py's recipe and by nanoGPT's: test loss over tokens, and a picture.

    python benchmarks/course.py TEXT --updates 640 --peak_rates 6e-4 1.5e-3 3e-3 -- --preset=gpt2

Flags of pre-train.py behind `--` hold for all runs, which are without dropout and see the same
windows in the same order. nanoGPT's recipe is AdamW with a warm-up over a tenth and cosine decay to
a tenth, once for every peak rate. One JSON line a run; tables and `course.svg` come into a folder,
and a run whose table is there is not repeated.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from curves import (  # noqa: E402
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Line,
    Scale,
    document,
    draw_axes,
    draw_losses,
    text,
    visible_range,
)

# Test losses in a run.
NUM_TESTS = 16


def learn(args: argparse.Namespace, name: str, flags: list[str]) -> list[dict]:
    """Return the table of a run, one row a test."""
    table = args.out / f"{name}.csv"

    if not table.exists() or len(read(table)) < NUM_TESTS:
        subprocess.run(
            [
                sys.executable,
                ROOT / "pre-train.py",
                f"--dataset={args.text}",
                "--dropout=0",
                *args.flags,
                f"--batch_size={args.batch_size}",
                "--gradient_accumulation_steps=1",
                f"--samples_per_epoch={args.updates // NUM_TESTS * args.batch_size}",
                f"--num_epochs={NUM_TESTS}",
                "--eval_interval=1",
                f"--checkpoint_interval={NUM_TESTS}",
                f"--checkpoint_path={args.out / name}.pt",
                f"--metrics_path={table}",
                f"--seed={args.seed}",
                *flags,
            ],
            stdout=sys.stderr,
            check=True,
        )

    return read(table)


def read(table: Path) -> list[dict]:
    with open(table) as file:
        rows = csv.DictReader(file)

        return [{column: float(value) for column, value in row.items()} for row in rows]


def first_below(rows: list[dict], loss: float) -> dict | None:
    return next((row for row in rows if row["test_loss"] <= loss), None)


def draw(runs: dict[str, list[dict]], title: str) -> str:
    """Draw the test losses of runs over their tokens."""
    styles = ["source0", "source1", "source2", "source3"]
    lines = [
        Line(name, [(row["tokens"], row["test_loss"]) for row in rows], style)
        for (name, rows), style in zip(runs.items(), ["test", *styles], strict=False)
    ]
    losses = [loss for line in lines for _, loss in line.points]
    x = Scale(0.0, max(line.points[-1][0] for line in lines), LEFT, RIGHT)
    y = Scale(*visible_range(losses), BOTTOM, TOP)

    return document(title, [*draw_axes(x, y, BOTTOM), *draw_losses(lines, x, y)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--updates", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=32, help="windows of an update")
    parser.add_argument("--peak_rates", type=float, nargs="*", default=[6e-4], help="of nanoGPT's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("./out/course"))
    # Behind options argparse takes no list of positional arguments.
    argv = [*sys.argv[1:], "--"]
    end = argv.index("--")
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 : -1]

    if args.updates % NUM_TESTS:
        parser.error(f"--updates must be a multiple of {NUM_TESTS}.")

    args.out.mkdir(parents=True, exist_ok=True)
    runs = {"ours": learn(args, "ours", [])}

    for rate in args.peak_rates:
        name = f"nanoGPT {rate:g}"
        schedule = [
            "--optimizer=adamw",
            "--lr_schedule=cosine",
            f"--learning_rate={rate}",
            f"--min_learning_rate={rate / 10}",
            f"--warmup_steps={args.updates // 10}",
        ]
        runs[name] = learn(args, name.replace(" ", "-"), schedule)

    for name, rows in runs.items():
        last = rows[-1]
        passed = first_below(runs["ours"], last["test_loss"])
        line = {
            "run": name,
            "tokens": int(last["tokens"]),
            "test_loss": round(last["test_loss"], 4),
            "seconds": round(last["seconds"], 1),
            "tokens_per_second": round(last["tokens"] / last["seconds"]),
            "share_of_limit": round(last["mfu"], 3),
            "ours_is_there_after_tokens": int(passed["tokens"]) if passed else None,
            "and_after_seconds": round(passed["seconds"], 1) if passed else None,
        }
        print(json.dumps(line), flush=True)

    num_tokens = int(runs["ours"][-1]["tokens"])
    picture = draw(runs, f"Test loss over {num_tokens / 1e6:.0f} million tokens")
    (args.out / "course.svg").write_text(picture)


if __name__ == "__main__":
    main()
