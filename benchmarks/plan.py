"""What `pre-train.py --dry_run` foretells, beside the run itself: memory and seconds.

    python benchmarks/plan.py -- --preset=tiny --seed=1

The flags behind `--` are those of pre-train.py. The run goes into a folder that is deleted; its
seconds are those from the first line that it prints to its end.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "pre-train.py"
UNITS = {"MB": 1e6, "GB": 1e9, "seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


def run(flags: list[str]) -> tuple[str, float, int]:
    """Return what a run prints, its seconds, and the most memory in bytes that it had."""
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, text=True)
    output, start = process.stdout.readline(), time.perf_counter()
    output += process.stdout.read()
    seconds = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)

    if status:
        sys.exit(f"pre-train.py {' '.join(flags)} failed")

    # In kilobytes, but on macOS in bytes.
    return output, seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def find(pattern: str, output: str) -> float:
    number, unit = re.search(f"{pattern} *([0-9.]+) ([A-Za-z]+)", output).groups()

    return float(number) * UNITS[unit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flags", nargs="*", help="of pre-train.py, behind --")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"--checkpoint_path={folder}/checkpoint.pt", f"--metrics_path={folder}/run.csv"]
        # The first one may have to prepare the text, and would have more memory by that.
        run([*args.flags, *paths, "--dry_run"])
        plan, *_ = run([*args.flags, *paths, "--dry_run"])
        _, seconds, peak = run([*args.flags, *paths])

    memory, duration = find("Memory:", plan), find("Time:", plan)
    line = {
        "foretold_gb": round(memory / 1e9, 3),
        "measured_gb": round(peak / 1e9, 3),
        "memory_ratio": round(memory / peak, 3),
        "foretold_seconds": round(duration, 1),
        "measured_seconds": round(seconds, 1),
        "time_ratio": round(duration / seconds, 3),
    }
    print(plan, json.dumps(line), sep="")


if __name__ == "__main__":
    main()
