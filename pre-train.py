"""Pre-train a GPT-2-like model on OpenWebText, on the text that comes with Python, or on your own.

`python pre-train.py --preset=tiny` shows all of it in minutes on any machine.
"""

import functools
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, check_sizes
from system import threads  # noqa: F401, for what it does before torch is there
from system.devices import compile_model, peak_memory, product_format, sum_of_rates
from system.distributed import World
from text.token_files import TokenDataset
from text.tokenizer import VOCABULARY_SIZE
from training.arguments import (
    Parser,
    UsageError,
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
from training.checkpoint import (
    MODEL_KEYS,
    CheckpointError,
    CheckpointWriter,
    build_model,
    load_checkpoint,
)
from training.corpus import Corpus, Sources, gather, open_datasets, parse_sources, report_losses
from training.metrics import picture_path
from training.optimizers import Optimizers, Schedule, step_factors
from training.planning import describe_plan, make_plan
from training.session import (
    Session,
    begin,
    check_paths,
    check_resumable,
    check_same_data,
    choose_precision,
    describe_device,
    describe_resume,
    is_finished,
    recorded_by,
    run_script,
    written_by,
)
from training.trainer import (
    Step,
    Trainer,
    load_share,
    load_weights,
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

SIZES = ("block_size", "embedding_dimensions", "num_attention_heads", "num_hidden_layers")

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
        "--initial_checkpoint",
        help="The path to a checkpoint whose weights the run begins with; sizes that are not given,"
        " or by a preset alone, are those of its model.",
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
    add_flag(
        add,
        "--eval_only",
        False,
        "Print how well the checkpoint predicts the dataset: loss, perplexity and bits per byte,"
        " then stop.",
    )
    add(
        "--eval_split",
        choices=["test", "all"],
        default="test",
        help="What --eval_only reads of each source: what is held back to test on, or all of it.",
    )


def main(argv: list[str] | None = None) -> int:
    return run_script(build_parser(), PRESETS, argv, check_arguments, run)


def check_arguments(args: Namespace) -> Sources:
    """Return the sources with their weights; raise ValueError where values do not fit together."""
    check_paths(args)
    check_modes(args)

    if not args.eval_only:
        check_recipe(args)

    # What a run writes below a folder of text is none of it.
    outputs = [Path(path).resolve().parent for path in (args.checkpoint_path, args.metrics_path)]

    return parse_sources(args.dataset, (Path(args.dataset_path), *outputs))


def check_recipe(args: Namespace) -> None:
    """Raise ValueError where sizes or the numbers of a recipe do not fit together."""
    if not args.initial_checkpoint:
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

    if args.min_learning_rate > args.learning_rate:
        raise ValueError(
            f"--min_learning_rate {args.min_learning_rate} is above"
            f" --learning_rate {args.learning_rate}"
        )


def check_modes(args: Namespace) -> None:
    """Raise ValueError where flags name two things to do, or a file to be read and written over."""
    modes = [f"--{name}" for name in ("eval_only", "dry_run", "resume") if getattr(args, name)]

    if "eval_split" in args.given and not args.eval_only:
        raise ValueError("--eval_split: it says what --eval_only reads, which is not given")

    if args.eval_only and len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)}: give one of them")

    if (initial := args.initial_checkpoint) and not args.resume:
        if args.eval_only:
            raise ValueError("--initial_checkpoint: --eval_only reads --checkpoint_path")

        for flag, files in (
            ("checkpoint_path", written_by(args.checkpoint_path)),
            ("metrics_path", recorded_by(args.metrics_path)),
        ):
            if Path(initial).resolve() in files:
                raise ValueError(
                    f"--initial_checkpoint: {initial} would be written over; choose another"
                    f" --{flag} for the new run"
                )


def run(args: Namespace, sources: Sources, world: World, writer: CheckpointWriter) -> int:
    if args.eval_only:
        return evaluate(args, sources, world)

    libraries = peak_memory(world.device)
    args.bias = False
    is_chosen = args.precision == "auto"
    checkpoint = begin(args, world, ("model_args", "model"), args.dry_run)

    if checkpoint:
        args.bias = checkpoint["model_args"]["bias"]

    initial = read_initial_weights(args, checkpoint)

    if checkpoint:
        saved, wanted = checkpoint["model_args"], {**settings(args), **model_args(args)}
        shape = ("batch_size", "gradient_accumulation_steps")
        is_same = math.prod(checkpoint["settings"][f] for f in shape) == samples_per_step(args)
        # However an update is cut into batches, it has the same samples.
        free = FREE_FLAGS + shape if is_same else FREE_FLAGS
        check_resumable(args, checkpoint, saved, wanted, free)

    if is_finished(args, checkpoint):
        return 0

    corpus = gather(open_all(args, sources, world), sources, args.block_size, args.seed)
    trainer = build_trainer(args, world)

    if initial:
        load_weights(trainer.model.state_dict(), initial)
        print(f"Begin:  with the weights of {args.initial_checkpoint}")

    if checkpoint:
        check_same_data(corpus.fingerprint, checkpoint["dataset"])
        load_weights(trainer.model.state_dict(), checkpoint["model"])
        trainer.load_state_dict(checkpoint)
        checkpoint.clear()

    compiled = compile_model(trainer.model, world.device) if args.compile else "not compiled"
    describe(args, trainer, corpus, compiled)

    if args.dry_run:
        return estimate(args, trainer, corpus, libraries, is_chosen)

    status = build_session(args, trainer, corpus, writer).run()

    if status == 0:
        conclude(args, trainer)

    return status


def read_initial_weights(args: Namespace, checkpoint: dict) -> dict[str, Tensor]:
    """Return the weights that a new run begins with, by name; empty where they are to be drawn.

    Sizes that were not given become those of their model.

    Args:
        checkpoint: what a resumed run goes on from.

    Raises:
        CheckpointError: when they cannot be read.
        UsageError: when other sizes were given.
    """
    if not args.initial_checkpoint:
        return {}

    path = Path(args.initial_checkpoint)

    if checkpoint:
        adopt_sizes(args, checkpoint["model_args"], Path(args.checkpoint_path))
        return {}

    return read_model(args, path).state_dict()


def read_model(args: Namespace, path: Path) -> GPT:
    """Read the model of a checkpoint, for windows that may be shorter than its own.

    Sizes that were not given become its own.

    Raises:
        CheckpointError: when it cannot be read.
        UsageError: when other sizes were given.
    """
    state = load_checkpoint(path, MODEL_KEYS)
    model = build_model(state, path)

    if model.vocabulary_size != VOCABULARY_SIZE:
        raise CheckpointError(
            f"{path} has {model.vocabulary_size} tokens, the {VOCABULARY_SIZE} of GPT-2 are needed."
        )

    adopt_sizes(args, state["model_args"], path)
    model.crop(args.block_size)

    return model


def adopt_sizes(args: Namespace, model_args: dict, path: Path) -> None:
    """Put the sizes of a model into the arguments; raise UsageError where others were given."""
    args.bias = model_args.get("bias", False)

    for flag in SIZES:
        size, wanted = model_args[flag], getattr(args, flag)
        is_part = flag == "block_size" and wanted < size

        if flag in args.given and wanted != size and not is_part:
            raise UsageError(f"--{flag}: {wanted} given, {path} has {size}")

        if flag not in args.given:
            setattr(args, flag, size)


def build_session(
    args: Namespace, trainer: Trainer, corpus: Corpus, writer: CheckpointWriter
) -> Session:
    def content() -> dict:
        return {
            "model_args": model_args(args),
            "model": trainer.model.state_dict(),
            "dataset": corpus.fingerprint,
            "settings": settings(args),
        }

    return Session(
        args,
        trainer,
        step_loader(args, corpus, trainer.world),
        steps_per_epoch(args),
        trainer.model.flops_per_token(args.block_size),
        {
            name: functools.partial(windows.batches, args.batch_size)
            for name, windows in corpus.tests.items()
        },
        corpus.mean_loss,
        content,
        writer,
    )


def open_all(args: Namespace, sources: Sources, world: World) -> list[TokenDataset]:
    return open_datasets(sources, Path(args.dataset_path), args.num_dataset_processes, world)


def build_trainer(args: Namespace, world: World) -> Trainer:
    """Build the network with its first weights, and what trains it."""
    torch.manual_seed(args.seed)

    model = GPT(**model_args(args), dropout=args.dropout)
    model.activation_checkpointing = args.activation_checkpointing

    if args.optimizer == "muon":
        model.look_back()

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
            step_factors(args.embedding_dimensions, total_steps(args)),
        ),
        build_schedule(args),
        world,
        args.precision,
        args.seed,
        args.max_gradient_norm,
        peak_rate=sum_of_rates(world, args.precision),
    )


def step_loader(args: Namespace, corpus: Corpus, world: World) -> Callable[[int], Step]:
    """Return a function that reads this process's micro-batches of an update by its number."""

    def load(number: int) -> tuple[Tensor, Tensor]:
        return corpus.stream.batch(number * args.batch_size, args.batch_size)

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


def total_steps(args: Namespace) -> int:
    return args.num_epochs * steps_per_epoch(args)


def build_schedule(args: Namespace) -> Schedule:
    num_steps = total_steps(args)
    warmup_steps = args.warmup_steps

    if warmup_steps is None:
        warmup_steps = 0 if args.lr_schedule == "constant" else min(1000, num_steps // 20)

    return Schedule(
        args.lr_schedule, args.learning_rate, args.min_learning_rate, warmup_steps, num_steps
    )


def model_args(args: Namespace) -> dict:
    """Return what decides the shapes of the weights, by the names of GPT's arguments."""
    return {
        "vocabulary_size": VOCABULARY_SIZE,
        "block_size": args.block_size,
        "embedding_dimensions": args.embedding_dimensions,
        "num_attention_heads": args.num_attention_heads,
        "num_hidden_layers": args.num_hidden_layers,
        "bias": args.bias,
    }


def settings(args: Namespace) -> dict:
    return {flag: getattr(args, flag) for flag in FIXED_FLAGS + FREE_FLAGS}


def describe(args: Namespace, trainer: Trainer, corpus: Corpus, compiled: str) -> None:
    """Print what is about to run, and what was chosen for it."""
    tokens = total_steps(args) * tokens_per_step(args)

    corpus.describe()
    describe_model(args, trainer)
    describe_device(args, trainer, compiled)
    print(
        f"Run:    {args.num_epochs} epochs of {steps_per_epoch(args)} updates of"
        f" {tokens_per_step(args):,} tokens, {tokens / corpus.num_tokens:.2f} passes over the data,"
        f" --seed={trainer.seed}"
    )

    if args.samples_per_epoch % samples_per_step(args):
        print("Note:   an epoch holds whole updates alone; its other samples open the next one")
    describe_resume(trainer)


def describe_model(args: Namespace, trainer: Trainer) -> None:
    print(
        f"Model:  {trainer.model.num_parameters:,} parameters, {args.num_hidden_layers} layers,"
        f" {args.num_attention_heads} heads, {args.embedding_dimensions} dimensions,"
        f" context {args.block_size}"
    )


def estimate(
    args: Namespace, trainer: Trainer, corpus: Corpus, libraries: int, is_chosen: bool
) -> int:
    """Take a few updates, and print what the whole run would take."""
    num_updates = total_steps(args) - trainer.step
    tests = [windows.batches(args.batch_size) for windows in corpus.tests.values()]
    plan = make_plan(trainer, step_loader(args, corpus, trainer.world), next(tests[0]), libraries)
    epochs = range(len(trainer.metrics) + 1, args.num_epochs + 1)
    num_tests = sum(e % args.eval_interval == 0 or e == args.num_epochs for e in epochs)
    num_batches = sum(math.ceil(len(each) / args.batch_size) for each in corpus.tests.values())

    describe_plan(
        plan,
        trainer,
        is_chosen,
        args.batch_size,
        tokens_per_step(args),
        num_updates,
        num_tests * math.ceil(num_batches / trainer.world.size),
    )

    return 0


def evaluate(args: Namespace, sources: Sources, world: World) -> int:
    """Print how well a checkpoint predicts text."""
    model = read_model(args, Path(args.checkpoint_path))
    args.seed = 0

    if args.precision == "auto":
        args.precision = choose_precision(world)

    trainer = build_trainer(args, world)
    load_weights(trainer.model.state_dict(), model.state_dict())
    datasets = open_all(args, sources, world)
    describe_model(args, trainer)
    describe_device(args, trainer, "not compiled")
    report_losses(trainer, datasets, args.batch_size, args.eval_split == "all")

    return 0


def conclude(args: Namespace, trainer: Trainer) -> None:
    """Say what was learned, and which command comes next."""
    row, picture = trainer.metrics[-1], picture_path(Path(args.metrics_path))

    print(
        f"Done:   {row['tokens']:,} tokens in {row['seconds'] / 60:.1f} minutes. Test loss"
        f" {row['test_loss']:.3f} nats a token, from {math.log(VOCABULARY_SIZE):.3f} for a guess:"
        f" as unsure as between {row['perplexity']:,.0f} tokens instead of {VOCABULARY_SIZE:,}."
    )
    print(f"Files:  {args.checkpoint_path}, {args.metrics_path}, {picture}")

    is_given = any(arg.partition("=")[0] == "--resume" for arg in sys.argv)
    resume = [] if is_given else ["--resume"]
    longer = shlex.join([*sys.argv, *resume, f"--num_epochs={2 * args.num_epochs}"])
    speak = ["generate.py"]

    if args.checkpoint_path != build_parser().get_default("checkpoint_path"):
        speak.append(f"--checkpoint_path={args.checkpoint_path}")

    if args.dataset == ["stdlib"]:
        speak.append("--prompt=def fibonacci(")

    print(f"Next:   python {shlex.join(speak)}")
    print(f"        python {longer}")


if __name__ == "__main__":
    sys.exit(main())
