"""What fetching a batch of training samples costs, from a token file of OpenWebText's size or less.

python benchmarks/stream.py --num_tokens=1000000000 --batch_size=64 --block_size=1024
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data import SampleStream
from text.tokenizer import TOKEN_TYPE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_tokens", type=int, default=1_000_000_000)
    parser.add_argument("--num_sources", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()

    with tempfile.NamedTemporaryFile() as file:
        for _ in range(0, args.num_tokens, 1 << 24):
            file.write(np.random.default_rng(0).integers(0, 50257, 1 << 24, TOKEN_TYPE).tobytes())

        tokens = np.memmap(file.name, dtype=TOKEN_TYPE, mode="r")
        weights = [1.0 / (number + 1) for number in range(args.num_sources)]
        stream = SampleStream([tokens] * args.num_sources, weights, args.block_size, seed=0)
        seconds = []

        for number in range(args.repeats):
            start = time.perf_counter()
            stream.batch(number * args.batch_size, args.batch_size)
            seconds.append(time.perf_counter() - start)

    print(f"{statistics.median(seconds) * 1000:.2f} ms a batch, at most {max(seconds) * 1000:.2f}")


if __name__ == "__main__":
    main()
