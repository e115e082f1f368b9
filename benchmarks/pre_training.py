"""A training step of pre-train.py beside nanoGPT's, and beside the limit of the hardware.

    python benchmarks/pre_training.py --nanogpt=PATH --preset=gpt2

A step is the same work for all: one micro-batch forward and backward, clipping, and an update by
AdamW, without dropout. Each has a process of its own, and they take steps in turns. nanoGPT runs as
it ships (float32 on a CPU; bf16 and compiled on a GPU), compiled, and compiled under bf16 autocast.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)

# Between the tiny preset and GPT-2: what a laptop trains in an evening.
SMALL = {
    "embedding_dimensions": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "block_size": 256,
    "batch_size": 16,
}


def ours(args: argparse.Namespace, optimizer: str) -> Callable[[], float]:
    sys.path.insert(0, ROOT)

    import torch

    from model import GPT
    from system.devices import compile_model
    from system.distributed import World
    from system.memory import tune_memory
    from text.tokenizer import GPT2_SIZE
    from trainers import make_trainer

    if args.device == "cpu":
        tune_memory()

    torch.manual_seed(0)
    world = World(device=torch.device(args.device))
    sizes = {
        name: getattr(args, name)
        for name in (
            "block_size",
            "embedding_dimensions",
            "num_attention_heads",
            "num_hidden_layers",
        )
    }
    model = GPT(GPT2_SIZE, **sizes, dropout=args.dropout)
    model.activation_checkpointing = args.activation_checkpointing
    network = world.wrap(model, model.blocks)

    if args.compile:
        compile_model(model, world.device)

    trainer = make_trainer(model, network, world, args.precision, optimizer)
    x = torch.randint(GPT2_SIZE, (args.batch_size, args.block_size))
    model.train()

    return lambda: trainer.take_step([(0, x, x)])[0]


def nanogpt(args: argparse.Namespace, mode: str) -> Callable[[], float]:
    sys.path.insert(0, args.nanogpt)

    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    # As its own scripts do.
    torch.backends.cuda.matmul.allow_tf32 = True
    kind = args.device.partition(":")[0]
    is_low = mode == "bf16" or kind == "cuda"
    config = GPTConfig(
        block_size=args.block_size,
        vocab_size=50304,
        n_layer=args.num_hidden_layers,
        n_head=args.num_attention_heads,
        n_embd=args.embedding_dimensions,
        dropout=args.dropout,
        bias=False,
    )

    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(config).to(args.device)
        optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), kind)

    network = torch.compile(model) if mode != "ships" or kind == "cuda" else model
    x = torch.randint(50257, (args.batch_size, args.block_size), device=args.device)

    def step() -> float:
        with torch.autocast(kind, torch.bfloat16, enabled=is_low):
            _, loss = network(x, x)

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        return loss.item()

    return step


def limit(args: argparse.Namespace) -> Callable[[], float]:
    """Return a step that measures the hardware: operations and bytes a second."""
    import torch

    sys.path.insert(0, ROOT)

    from system.devices import PRECISIONS, synchronize

    device = torch.device(args.device)
    size = 8192 if device.type == "cuda" else 2048
    left, right = (
        torch.randn(size, size, device=device).to(PRECISIONS[args.precision]) for _ in range(2)
    )
    numbers = torch.ones(1 << 27, device=device)
    copy = torch.empty_like(numbers)

    def fastest(action: Callable, times: int) -> float:
        seconds = []

        for _ in range(times):
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            seconds.append(time.perf_counter() - start)

        return min(seconds)

    def step() -> tuple[float, float]:
        return (
            2 * size**3 / fastest(lambda: left @ right, 5),
            2 * numbers.nbytes / fastest(lambda: copy.copy_(numbers), 3),
        )

    return step


def serve(connection, args: argparse.Namespace, name: str, prepare: Callable, *rest) -> None:
    """Take a step whenever asked; answer with its result, its seconds and the peak memory."""
    try:
        started = time.perf_counter()
        step = prepare(args, *rest)
        prepared = time.perf_counter() - started

        sys.path.insert(0, ROOT)

        import torch

        from system.devices import synchronize
        from system.memory import peak_memory

        device = torch.device(args.device)

        while connection.recv():
            synchronize(device)
            start = time.perf_counter()
            result = step()
            synchronize(device)
            connection.send((result, time.perf_counter() - start, peak_memory(device), prepared))
    except EOFError:
        pass
    except BaseException:
        print(f"{name} failed", file=sys.stderr)
        raise


class Contestant:
    """A process that takes steps when it is asked to."""

    def __init__(self, args: argparse.Namespace, name: str, *work):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=serve, args=(remote, args, name, *work))
        self.process.start()
        remote.close()
        self.seconds: list[float] = []
        self.results: list = []
        self.peak = 0
        self.first = 0.0

    def step(self, is_timed: bool = True) -> None:
        self.connection.send(True)
        result, seconds, self.peak, prepared = self.connection.recv()

        if is_timed:
            self.seconds.append(seconds)
            self.results.append(result)
        elif not self.first:
            self.first = prepared + seconds

    def end(self) -> None:
        self.connection.send(False)
        self.process.join()


def compete(args: argparse.Namespace) -> dict:
    names = {"ours": (ours, "adamw")}

    if args.muon:
        names["ours with muon"] = (ours, "muon")

    if args.nanogpt:
        # On a GPU it ships compiled, in bf16.
        modes = args.modes if args.device == "cpu" else ["ships"]
        names |= {f"nanoGPT {mode}": (nanogpt, mode) for mode in modes}

    hardware = Contestant(args, "limit", limit)
    contestants = []

    # One after the other, so that none compiles while another does.
    for name, work in names.items():
        contestants.append(Contestant(args, name, *work))
        contestants[-1].step(is_timed=False)

    for turn in range(-args.warmup, args.steps):
        for contestant in (hardware, *contestants):
            contestant.step(is_timed=turn >= 0)

    for contestant in (hardware, *contestants):
        contestant.end()

    return report(args, hardware, contestants)


def report(args: argparse.Namespace, hardware: Contestant, contestants: list[Contestant]) -> dict:
    rates, bandwidths = zip(*hardware.results, strict=True)
    num_tokens = args.batch_size * args.block_size
    flops = flops_per_token(args)
    limits = [rate / flops for rate in rates]
    first = contestants[0]

    return {
        "device": args.device,
        "precision": args.precision,
        "tokens_per_micro_batch": num_tokens,
        "limit": {
            "matrix_products_tflops": round(statistics.median(rates) / 1e12, 3),
            "copy_gb_per_second": round(statistics.median(bandwidths) / 1e9, 1),
            "tokens_per_second": round(statistics.median(limits), 1),
        },
        "contestants": {
            other.name: {
                "tokens_per_second": round(num_tokens / statistics.median(other.seconds), 1),
                "share_of_limit": round(
                    statistics.median(
                        num_tokens / seconds / limit
                        for seconds, limit in zip(other.seconds, limits, strict=True)
                    ),
                    3,
                ),
                "ours_is_faster_by": round(
                    statistics.median(
                        theirs / own
                        for theirs, own in zip(other.seconds, first.seconds, strict=True)
                    ),
                    2,
                ),
                "peak_gb": round(other.peak / 1e9, 2),
                "seconds_to_first_step": round(other.first, 1),
                "seconds": [round(seconds, 2) for seconds in other.seconds],
            }
            for other in contestants
        },
    }


def flops_per_token(args: argparse.Namespace) -> int:
    """Count 6 operations a weight, and attention, as GPT.flops_per_token does."""
    layer = 12 * args.embedding_dimensions**2
    weights = args.num_hidden_layers * layer + 50257 * args.embedding_dimensions
    attention = args.num_hidden_layers * args.block_size * args.embedding_dimensions

    return 6 * weights + 12 * attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument(
        "--modes", nargs="*", choices=["ships", "compiled", "bf16"], default=["ships", "bf16"]
    )
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--block_size", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    args = parser.parse_args()
    complete(args)

    print(json.dumps(compete(args), indent=2))


def complete(args: argparse.Namespace) -> None:
    """Fill in what is not given. In a process of its own, which leaves the memory to the others."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, value in pool.apply(resolve, (args.preset, args.device, args.precision)).items():
            if getattr(args, name, None) in (None, "auto"):
                setattr(args, name, value)


def resolve(preset: str, device: str | None, precision: str) -> dict:
    sys.path.insert(0, ROOT)

    from system.devices import resolve_device, resolve_precision

    device = resolve_device(device)
    sizes = SMALL if preset == "small" else importlib.import_module("pre-train").PRESETS[preset]

    return {
        "batch_size": 4,
        "block_size": 1024,
        **sizes,
        "device": str(device),
        "precision": resolve_precision(device) if precision == "auto" else precision,
    }


if __name__ == "__main__":
    main()
