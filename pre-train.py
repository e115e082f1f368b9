"""Pre-train a GPT-2-like model on OpenWebText, on the text that comes with Python, or on your own.

`python pre-train.py --preset=tiny` shows all of it in minutes on any machine.
"""

import functools
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arguments import (
    Parser,
    add_batches,
    add_device,
    add_flag,
    add_optimizer,
    add_processes,
    add_seed,
    dropout_float,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from checkpoint import CheckpointWriter
from data import EvaluationWindows, SampleStream, resolve_weights
from distributed import World
from model import GPT, check_sizes
from optimizers import Optimizers, Schedule
from preparation import Source, load_or_prepare, parse_source
from session import (
    Session,
    begin,
    check_paths,
    check_resumable,
    check_same_data,
    describe_device,
    describe_resume,
    is_finished,
    run_script,
)
from token_files import TokenDataset
from tokenizer import VOCABULARY_SIZE
from training import (
    Step,
    Trainer,
    compile_model,
    load_share,
    load_weights,
    peak_memory,
    product_format,
    sum_of_rates,
    time_steps,
)

# Sizes of GPT-2 (Radford et al. 2019, table 2), and one that learns on a laptop while you watch.
PRESETS = {
    "tiny": {
        "dataset": ["stdlib"],
        "block_size": 256,
        "embedding_dimensions": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "dropout": 0.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "samples_per_epoch": 200,
        "num_epochs": 14,
        "eval_interval": 7,
        "checkpoint_interval": 7,
    },
    "gpt2": {"embedding_dimensions": 768, "num_attention_heads": 12, "num_hidden_layers": 12},
    "gpt2-medium": {
        "embedding_dimensions": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
    "gpt2-large": {
        "embedding_dimensions": 1280,
        "num_attention_heads": 20,
        "num_hidden_layers": 36,
    },
    "gpt2-xl": {"embedding_dimensions": 1600, "num_attention_heads": 25, "num_hidden_layers": 48},
}

# What decides which samples come next, and so has to stay when a run is resumed.
FIXED_FLAGS = (
    "batch_size",
    "gradient_accumulation_steps",
    "samples_per_epoch",
    "optimizer",
)
# What may change then, and is said.
FREE_FLAGS = (
    "learning_rate",
    "min_learning_rate",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "dropout",
    "max_gradient_norm",
    "precision",
    "num_epochs",
)


@dataclass
class Data:
    """The opened sources: what to train on, what to test on, and by which they are known."""

    datasets: list[TokenDataset]
    stream: SampleStream
    tests: dict[str, EvaluationWindows]

    @property
    def fingerprint(self) -> list[list]:
        """Name, weight and checksum of every source, by which a resumed run knows its data."""
        return [
            [dataset.name, weight, dataset.fingerprint]
            for dataset, weight in zip(self.datasets, self.stream.shares, strict=True)
        ]

    def mean_loss(self, losses: dict[str, float]) -> float:
        """Return the mean of the sources' losses by their weights."""
        pairs = zip(self.stream.shares, self.datasets, strict=True)

        return sum(weight * losses[dataset.name] for weight, dataset in pairs)


def build_parser() -> Parser:
    parser = Parser(prog="pre-train.py", description=__doc__.splitlines()[0])

    add_data_arguments(parser)
    add_model_arguments(parser)
    add_recipe_arguments(parser)
    add_run_arguments(parser)

    return parser


def add_data_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument

    add(
        "--dataset",
        nargs="+",
        action="extend",
        default=["openwebtext"],
        metavar="SOURCE",
        help="Sources to train on, each SOURCE or SOURCE=WEIGHT: openwebtext, stdlib, a file or a"
        " folder of your own text, or a dataset on the Hugging Face Hub (owner/name or"
        " owner/name:config).",
    )
    add(
        "--dataset_path",
        default="./dataset",
        help="The path to the dataset files on disk.",
    )
    add(
        "--num_dataset_processes",
        type=positive_int,
        default=8,
        help="The number of processes (CPUs) to use to process the dataset.",
    )


def add_model_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument

    add(
        "--preset",
        choices=list(PRESETS),
        help="Named defaults that single flags still override.",
    )
    add(
        "--block_size",
        type=positive_int,
        default=1024,
        help="The number of tokens within the context window for every sample.",
    )
    add(
        "--embedding_dimensions",
        type=positive_int,
        default=768,
        help="The dimensionality of the token embeddings.",
    )
    add(
        "--num_attention_heads",
        type=positive_int,
        default=12,
        help="The number of attention heads within every block.",
    )
    add(
        "--num_hidden_layers",
        type=positive_int,
        default=12,
        help="The number of attention/MLP blocks within the hidden layer of the network.",
    )
    add(
        "--dropout",
        type=dropout_float,
        default=0.1,
        help="The proportion of signals to send to zero during training as regularization.",
    )


def add_recipe_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("recipe").add_argument

    add_batches(add)
    add(
        "--samples_per_epoch",
        type=positive_int,
        default=4096,
        help="The number of training samples to pass through the network every epoch.",
    )
    add(
        "--num_epochs",
        type=positive_int,
        default=2145,
        help="The number of epochs to train for.",
    )
    add_optimizer(add)
    add(
        "--learning_rate",
        type=positive_float,
        default=5e-4,
        help="The global step size taken after every gradient accumulation step (the peak of the"
        " schedule).",
    )
    add(
        "--lr_schedule",
        choices=["linear", "cosine", "constant"],
        default="linear",
        help="How the step size goes from its peak to its minimum.",
    )
    add(
        "--warmup_steps",
        type=non_negative_int,
        help="The number of updates over which the step size grows to its peak; None takes"
        " a twentieth of all, at most 1,000, and none with a constant step size.",
    )
    add(
        "--min_learning_rate",
        type=non_negative_float,
        default=0.0,
        help="The step size at the end of the schedule.",
    )
    add(
        "--weight_decay",
        type=non_negative_float,
        default=0.1,
        help="The proportion of the matrices (with muon the hidden ones), times the step size, to"
        " take away at an update.",
    )
    add_seed(add)


def add_run_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument

    add(
        "--eval_interval",
        type=positive_int,
        default=10,
        help="Evaluate the model after this many epochs on the testing set.",
    )
    add(
        "--checkpoint_interval",
        type=positive_int,
        default=20,
        help="Save the model parameters to disk every this many epochs.",
    )
    add(
        "--checkpoint_path",
        default="./out/checkpoint.pt",
        help="The path to the checkpoint file on disk.",
    )
    add(
        "--metrics_path",
        default="./out/pre-train.csv",
        help="The path to the table of metrics, one row an epoch.",
    )
    add_flag(
        add,
        "--resume",
        False,
        "Should we resume training from the last checkpoint?",
    )
    add_device(add, "the matrix products")
    add_processes(add)
    add_flag(
        add,
        "--compile",
        True,
        "Compile the network, where a compiler works.",
    )
    add_flag(
        add,
        "--activation_checkpointing",
        False,
        "Trade compute for memory: compute activations a second time instead of keeping them.",
    )
    add_flag(
        add,
        "--dry_run",
        False,
        "Print parameters, memory, data, speed and the time that the whole run would take,"
        " then stop.",
    )


def main(argv: list[str] | None = None) -> int:
    return run_script(build_parser(), PRESETS, argv, check_arguments, run)


def check_arguments(args: Namespace) -> list[tuple[Source, float | None]]:
    """Return the sources with their weights; raise ValueError where values do not fit together."""
    try:
        check_sizes(args.embedding_dimensions, args.num_attention_heads)
    except ValueError as error:
        raise ValueError(f"--embedding_dimensions: {error}") from None

    if args.samples_per_epoch < samples_per_step(args):
        raise ValueError(
            f"--samples_per_epoch must be at least {samples_per_step(args)}, one update of"
            f" {args.gradient_accumulation_steps} batches of {args.batch_size};"
            f" {args.samples_per_epoch} given"
        )

    check_paths(args)

    if args.min_learning_rate > args.learning_rate:
        raise ValueError(
            f"--min_learning_rate {args.min_learning_rate} is above"
            f" --learning_rate {args.learning_rate}"
        )

    try:
        # What a run writes below a folder of text is none of it.
        written = (
            Path(args.dataset_path),
            Path(args.checkpoint_path).resolve().parent,
            Path(args.metrics_path).resolve().parent,
        )
        sources = [parse_source(value, written) for value in args.dataset]
        resolve_weights([weight for _, weight in sources], [1] * len(sources))
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None

    if len({source.name for source, _ in sources}) < len(sources):
        raise ValueError("--dataset: a source is named twice")

    return sources


def run(
    args: Namespace,
    sources: list[tuple[Source, float | None]],
    world: World,
    writer: CheckpointWriter,
) -> int:
    checkpoint = begin(args, world, ("model_args", "model"), args.dry_run)

    if checkpoint:
        saved, wanted = checkpoint["model_args"], {**settings(args), **model_args(args)}
        shape = ("batch_size", "gradient_accumulation_steps")
        is_same = math.prod(checkpoint["settings"][f] for f in shape) == samples_per_step(args)
        # However an update is cut into batches, it has the same samples.
        free = FREE_FLAGS + shape if is_same else FREE_FLAGS
        check_resumable(args, checkpoint, saved, wanted, free)

    if is_finished(args, checkpoint):
        return 0

    data = open_data(args, sources, world)
    trainer = build_trainer(args, world)

    if checkpoint:
        check_same_data(data.fingerprint, checkpoint["dataset"])
        load_weights(trainer.model.state_dict(), checkpoint["model"])
        trainer.load_state_dict(checkpoint)
        checkpoint.clear()

    compiled = compile_model(trainer.model, world.device) if args.compile else "not compiled"
    describe(args, trainer, data, compiled)

    if args.dry_run:
        return estimate(args, trainer, data)

    status = build_session(args, trainer, data, writer).run()

    if status == 0:
        conclude(args, trainer)

    return status


def build_session(
    args: Namespace, trainer: Trainer, data: Data, writer: CheckpointWriter
) -> Session:
    def content() -> dict:
        return {
            "model_args": model_args(args),
            "model": trainer.model.state_dict(),
            "dataset": data.fingerprint,
            "settings": settings(args),
        }

    return Session(
        args,
        trainer,
        step_loader(args, data, trainer.world),
        steps_per_epoch(args),
        trainer.model.flops_per_token(args.block_size),
        {
            name: functools.partial(windows.batches, args.batch_size)
            for name, windows in data.tests.items()
        },
        data.mean_loss,
        content,
        writer,
    )


def open_data(args: Namespace, sources: list[tuple[Source, float | None]], world: World) -> Data:
    """Open the token files of all sources, after preparing those that are not there."""
    with world.one_per_machine_first():
        datasets = [
            load_or_prepare(source, Path(args.dataset_path), args.num_dataset_processes)
            for source, _ in sources
        ]

    trains = [dataset.train for dataset in datasets]
    weights = resolve_weights([weight for _, weight in sources], [len(t) for t in trains])

    data = Data(
        datasets,
        SampleStream(trains, weights, args.block_size, args.seed),
        {data.name: EvaluationWindows(data.test, args.block_size) for data in datasets},
    )
    world.check_same("The data", data.fingerprint)

    return data


def build_trainer(args: Namespace, world: World) -> Trainer:
    """Build the network with its first weights, and what trains it."""
    torch.manual_seed(args.seed)

    model = GPT(**model_args(args), dropout=args.dropout)
    model.activation_checkpointing = args.activation_checkpointing
    network = world.prepare(model, model.blocks)

    return Trainer(
        model,
        network,
        Optimizers(
            model,
            args.optimizer,
            args.weight_decay,
            world,
            product_format(args.precision),
            args.embedding_dimensions,
        ),
        build_schedule(args),
        world,
        args.precision,
        args.seed,
        args.max_gradient_norm,
        peak_rate=sum_of_rates(world, args.precision),
    )


def step_loader(args: Namespace, data: Data, world: World) -> Callable[[int], Step]:
    """Return a function that reads this process's micro-batches of an update by its number."""

    def load(number: int) -> tuple[Tensor, Tensor]:
        return data.stream.batch(number * args.batch_size, args.batch_size)

    def load_step(step: int) -> Step:
        first = step * args.gradient_accumulation_steps

        return load_share(range(first, first + args.gradient_accumulation_steps), load, world)

    return load_step


def steps_per_epoch(args: Namespace) -> int:
    """Return the whole updates in an epoch; the stream of samples goes on behind them."""
    return args.samples_per_epoch // samples_per_step(args)


def samples_per_step(args: Namespace) -> int:
    return args.batch_size * args.gradient_accumulation_steps


def tokens_per_step(args: Namespace) -> int:
    return samples_per_step(args) * args.block_size


def build_schedule(args: Namespace) -> Schedule:
    total_steps = args.num_epochs * steps_per_epoch(args)
    warmup_steps = args.warmup_steps

    if warmup_steps is None:
        warmup_steps = 0 if args.lr_schedule == "constant" else min(1000, total_steps // 20)

    return Schedule(
        args.lr_schedule, args.learning_rate, args.min_learning_rate, warmup_steps, total_steps
    )


def model_args(args: Namespace) -> dict:
    """Return what decides the shapes of the weights, by the names of GPT's arguments."""
    return {
        "vocabulary_size": VOCABULARY_SIZE,
        "block_size": args.block_size,
        "embedding_dimensions": args.embedding_dimensions,
        "num_attention_heads": args.num_attention_heads,
        "num_hidden_layers": args.num_hidden_layers,
        "bias": False,
    }


def settings(args: Namespace) -> dict:
    return {flag: getattr(args, flag) for flag in FIXED_FLAGS + FREE_FLAGS}


def describe(args: Namespace, trainer: Trainer, data: Data, compiled: str) -> None:
    """Print what is about to run, and what was chosen for it."""
    tokens = args.num_epochs * steps_per_epoch(args) * tokens_per_step(args)
    available = sum(len(dataset.train) for dataset in data.datasets)

    for dataset, weight in zip(data.datasets, data.stream.shares, strict=True):
        share = f", {weight:.2%} of the samples" if weight < 1 else ""
        print(
            f"Data:   {dataset.name}, {len(dataset.train):,} tokens, {len(dataset.test):,} to"
            f" test{share}"
        )

    print(
        f"Model:  {trainer.model.num_parameters:,} parameters, {args.num_hidden_layers} layers,"
        f" {args.num_attention_heads} heads, {args.embedding_dimensions} dimensions,"
        f" context {args.block_size}"
    )
    describe_device(args, trainer, compiled)
    print(
        f"Run:    {args.num_epochs} epochs of {steps_per_epoch(args)} updates of"
        f" {tokens_per_step(args):,} tokens, {tokens / available:.2f} passes over the data,"
        f" --seed={trainer.seed}"
    )

    if args.samples_per_epoch % samples_per_step(args):
        print("Note:   an epoch holds whole updates alone; its other samples open the next one")
    describe_resume(trainer)


def estimate(args: Namespace, trainer: Trainer, data: Data) -> int:
    """Time a few micro-batches and print what the whole run would take."""
    seconds = time_steps(trainer, step_loader(args, data, trainer.world))
    num_steps = args.num_epochs * steps_per_epoch(args) - trainer.step
    rate = tokens_per_step(args) / seconds
    utilization = rate * trainer.model.flops_per_token(args.block_size) / trainer.peak_rate

    print(f"Memory: {peak_memory(trainer.device) / 1e9:.2f} GB at the peak of an update")
    print(f"Speed:  {rate:,.0f} tokens/s, {utilization:.0%} of the matrix products' rate")
    print(f"Time:   {seconds:.2f} s an update, {num_steps * seconds / 3600:,.2f} hours in all")

    return 0


def conclude(args: Namespace, trainer: Trainer) -> None:
    """Say what was learned, and which command comes next."""
    row = trainer.metrics[-1]

    print(
        f"Done:   {row['tokens']:,} tokens in {row['seconds'] / 60:.1f} minutes. Test loss"
        f" {row['test_loss']:.3f} nats a token, from {math.log(VOCABULARY_SIZE):.3f} for a guess:"
        f" as unsure as between {row['perplexity']:,.0f} tokens instead of {VOCABULARY_SIZE:,}."
    )
    print(f"Files:  {args.checkpoint_path}, {args.metrics_path}")

    longer = shlex.join([*sys.argv, "--resume", f"--num_epochs={2 * args.num_epochs}"])
    speak = ["generate.py"]

    if args.checkpoint_path != build_parser().get_default("checkpoint_path"):
        speak.append(f"--checkpoint_path={args.checkpoint_path}")

    if args.dataset == ["stdlib"]:
        speak.append("--prompt=def fibonacci(")

    print(f"Next:   python {shlex.join(speak)}")
    print(f"        python {longer}")


if __name__ == "__main__":
    sys.exit(main())
