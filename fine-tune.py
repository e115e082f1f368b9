"""Fine-tune a pre-trained model with LoRA, so that it answers instructions.

`python fine-tune.py --preset=tiny` does so in minutes with what `pre-train.py --preset=tiny` left.
"""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from data import InstructionBatches, ordered_batches
from model import GPT
from system import threads  # noqa: F401, for what it does before torch is there
from system.devices import PRECISIONS, compile_model, product_format, sum_of_rates
from system.distributed import World
from text.rows import Examples, RowSource, load_examples, parse_row_source
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
    positive_float,
    positive_int,
)
from training.checkpoint import (
    MODEL_KEYS,
    CheckpointWriter,
    build_model,
    check_base,
    fingerprint,
    load_checkpoint,
)
from training.lora import add_lora, check_rank, lora_state_dict
from training.metrics import picture_path
from training.optimizers import Optimizers, Schedule
from training.session import (
    Session,
    begin,
    check_paths,
    check_resumable,
    check_same_data,
    describe_device,
    describe_resume,
    is_finished,
    recorded_by,
    run_script,
    written_by,
)
from training.trainer import Step, Trainer, load_share, load_weights

PRESETS = {
    "tiny": {
        "dataset": "stdlib",
        "rank": 64,
        "dropout": 0.0,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "learning_rate": 1e-2,
        # A compiler takes longer than it would save.
        "compile": False,
    },
}

EXAMPLE = "read(path): Read a file and return its text."

# What decides which examples come next, and what the adapter is: has to stay in a resumed run.
FIXED_FLAGS = (
    "batch_size",
    "gradient_accumulation_steps",
    "mask_input",
    "rank",
    "alpha",
    "optimizer",
)
# What may change then, and is said.
FREE_FLAGS = ("learning_rate", "dropout", "max_gradient_norm", "precision", "num_epochs")


def build_parser() -> Parser:
    parser = Parser(prog="fine-tune.py", description=__doc__.splitlines()[0])

    add_data_arguments(parser)
    add_recipe_arguments(parser)
    add_run_arguments(parser)

    return parser


def add_data_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("model and data").add_argument

    add(
        "--base_model_path",
        default="./out/checkpoint.pt",
        help="The path to the checkpoint of the pre-trained model.",
    )
    add(
        "--preset",
        choices=list(PRESETS),
        help="Named defaults that single flags still override.",
    )
    add(
        "--dataset",
        default="alpaca",
        metavar="SOURCE",
        help="What to learn from: alpaca, stdlib, a .json, .jsonl, .csv or .parquet file of your"
        " own, or a dataset on the Hugging Face Hub (owner/name or owner/name:config).",
    )
    add_flag(
        add, "--mask_input", True, "Should the answers alone be learned, and not the instructions?"
    )
    add(
        "--rank",
        type=positive_int,
        default=8,
        help="The rank of the adapter's matrices.",
    )
    add(
        "--alpha",
        type=positive_float,
        default=2.0,
        help="The factor of the adapter's output.",
    )
    add(
        "--dropout",
        type=dropout_float,
        default=0.1,
        help="The proportion of the adapter's inputs to send to zero during training.",
    )


def add_recipe_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("recipe").add_argument

    add_batches(add)
    add(
        "--num_epochs",
        type=positive_int,
        default=4,
        help="The number of passes over the training rows.",
    )
    add_optimizer(add)
    add(
        "--learning_rate",
        type=positive_float,
        default=5e-4,
        help="The global step size taken after every gradient accumulation step.",
    )
    add_seed(add)


def add_run_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument

    add(
        "--eval_interval",
        type=positive_int,
        default=1,
        help="Evaluate the model after this many epochs on the testing rows.",
    )
    add(
        "--checkpoint_interval",
        type=positive_int,
        default=1,
        help="Save the adapter to disk every this many epochs.",
    )
    add(
        "--checkpoint_path",
        default="./out/lora.pt",
        help="The path to the LoRA checkpoint.",
    )
    add(
        "--metrics_path",
        default="./out/fine-tune.csv",
        help="The path to the table of metrics, one row an epoch.",
    )
    add_flag(add, "--resume", False, "Should we resume training from the last checkpoint?")
    add_device(add, "the frozen weights and the matrix products")
    add_processes(add)
    add_flag(add, "--compile", True, "Compile the network, where a compiler works.")


def main(argv: list[str] | None = None) -> int:
    return run_script(build_parser(), PRESETS, argv, check_arguments, run)


def check_arguments(args: Namespace) -> RowSource:
    """Return the source of rows; raise ValueError where values do not fit together."""
    check_paths(args)

    # Neither what is read may be written over, nor what is kept beside it.
    outputs = {
        "checkpoint_path": {*written_by(args.checkpoint_path)},
        "metrics_path": {*recorded_by(args.metrics_path)},
    }
    inputs = {
        "the base model": {*written_by(args.base_model_path)},
        "the dataset": {Path(args.dataset[:255]).absolute().resolve()},
    }

    for flag, files in outputs.items():
        for name, read in inputs.items():
            if files & read:
                raise ValueError(f"--{flag}: this is the path of {name}")

    try:
        return parse_row_source(args.dataset)
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None


def run(args: Namespace, source: RowSource, world: World, writer: CheckpointWriter) -> int:
    checkpoint = begin(args, world, ("lora_args", "lora", "base", "base_test_loss"))
    base_path = Path(args.base_model_path)
    base = load_checkpoint(base_path, MODEL_KEYS)

    if checkpoint:
        check_resumable(args, checkpoint, checkpoint["lora_args"], settings(args), FREE_FLAGS)

    if is_finished(args, checkpoint):
        return 0

    model = build_model(base, base_path)
    base_fingerprint = fingerprint(model.state_dict())
    world.check_same("The base models", base_fingerprint)

    try:
        check_rank(args.rank, model.token_embeddings.embedding_dim)
    except ValueError as error:
        raise UsageError(f"--rank: {error}") from None

    if checkpoint:
        check_base(checkpoint, base_fingerprint, Path(args.checkpoint_path))

    with world.one_per_machine_first():
        examples = load_examples(source, model.block_size, args.mask_input)

    world.check_same("The data", examples.fingerprint)
    trainer = build_trainer(args, model, world, len(examples.train))
    batches = InstructionBatches(examples.train, args.batch_size, model.block_size, args.seed)

    # What the checkpoint says of the base.
    base_state = {"base": base_fingerprint}

    if checkpoint:
        check_same_data([examples.fingerprint], checkpoint["dataset"])
        load_weights(lora_state_dict(model), checkpoint["lora"])
        trainer.load_state_dict(checkpoint)
        base_state["base_test_loss"] = checkpoint["base_test_loss"]
        checkpoint.clear()

    compiled = (
        compile_model(model, world.device, is_dynamic=True) if args.compile else "not compiled"
    )
    describe(args, trainer, examples, batches, compiled)

    session = build_session(args, trainer, examples, batches, base_state, writer)

    if "base_test_loss" not in base_state:
        with session.stoppable() as stop:
            base_state["base_test_loss"] = session.mean_loss(session.evaluate(stop))

    status = session.run()

    if status == 0:
        conclude(args, trainer, base_state["base_test_loss"])

    return status


def build_trainer(args: Namespace, model: GPT, world: World, num_examples: int) -> Trainer:
    """Freeze the model, add the adapter with its first weights, and what trains it."""
    torch.manual_seed(args.seed)
    add_lora(model, args.rank, args.alpha, args.dropout, PRECISIONS[args.precision])
    network = world.prepare(model, model.blocks)

    total_steps = args.num_epochs * steps_per_epoch(args, num_examples)
    schedule = Schedule("linear", args.learning_rate, 0.0, min(100, total_steps // 20), total_steps)

    return Trainer(
        model,
        network,
        Optimizers(model, args.optimizer, 0.0, world, product_format(args.precision)),
        schedule,
        world,
        args.precision,
        args.seed,
        args.max_gradient_norm,
        peak_rate=sum_of_rates(world, args.precision),
    )


def steps_per_epoch(args: Namespace, num_examples: int) -> int:
    """Return the updates of an epoch; the last one has the batches that are left."""
    return math.ceil(num_examples / (args.batch_size * args.gradient_accumulation_steps))


def step_loader(
    args: Namespace, batches: InstructionBatches, world: World
) -> Callable[[int], Step]:
    """Return a function that builds this process's micro-batches of an update by its number."""

    def load_step(step: int) -> Step:
        epoch, step = divmod(step, steps_per_epoch(args, len(batches.examples)))
        first = step * args.gradient_accumulation_steps
        last = min(first + args.gradient_accumulation_steps, len(batches))
        numbers = range(epoch * len(batches) + first, epoch * len(batches) + last)

        return load_share(numbers, batches.batch, world)

    return load_step


def build_session(
    args: Namespace,
    trainer: Trainer,
    examples: Examples,
    batches: InstructionBatches,
    base_state: dict,
    writer: CheckpointWriter,
) -> Session:
    model = trainer.model

    def content() -> dict:
        return {
            "lora_args": {"rank": args.rank, "alpha": args.alpha},
            "lora": lora_state_dict(model),
            **base_state,
            "dataset": [examples.fingerprint],
            "settings": settings(args),
        }

    def test():
        return ordered_batches(examples.test, args.batch_size, model.block_size)

    return Session(
        args,
        trainer,
        step_loader(args, batches, trainer.world),
        steps_per_epoch(args, len(examples.train)),
        model.flops_per_token(int(batches.lengths.mean())),
        {args.dataset: test},
        lambda losses: losses[args.dataset],
        content,
        writer,
    )


def settings(args: Namespace) -> dict:
    return {flag: getattr(args, flag) for flag in FIXED_FLAGS + FREE_FLAGS}


def describe(
    args: Namespace,
    trainer: Trainer,
    examples: Examples,
    batches: InstructionBatches,
    compiled: str,
) -> None:
    """Print what is about to run, and what was chosen for it."""
    adapter = sum(weight.numel() for weight in lora_state_dict(trainer.model).values())

    for note in examples.notes:
        print(f"Note:   {note}")

    print(
        f"Data:   {args.dataset}, {len(examples.train):,} rows, {len(examples.test):,} to test,"
        f" {batches.padding:.1%} of a batch is padding"
    )
    print(
        f"Model:  {args.base_model_path}, {trainer.model.num_parameters - adapter:,} parameters,"
        f" frozen; {adapter:,} in adapters of rank {args.rank}"
    )
    describe_device(args, trainer, compiled)
    print(
        f"Run:    {args.num_epochs} epochs of {steps_per_epoch(args, len(examples.train))} updates,"
        f" --seed={trainer.seed}"
    )
    describe_resume(trainer)


def conclude(args: Namespace, trainer: Trainer, before: float) -> None:
    """Say what was learned, and which command comes next."""
    row, picture = trainer.metrics[-1], picture_path(Path(args.metrics_path))
    speak = ["generate.py"]

    defaults = build_parser()

    for flag, name in (("base_model_path", "checkpoint_path"), ("checkpoint_path", "lora_path")):
        if getattr(args, flag) != defaults.get_default(flag):
            speak.append(f"--{name}={getattr(args, flag)}")

    if args.dataset == "stdlib":
        speak.append(f"--prompt={EXAMPLE}")

    print(
        f"Done:   {row['tokens']:,} tokens in {row['seconds'] / 60:.1f} minutes. Test loss"
        f" {row['test_loss']:.3f} nats a token of the answers, from {before:.3f}."
    )
    print(f"Files:  {args.checkpoint_path}, {args.metrics_path}, {picture}")
    print(f"Next:   python {shlex.join(speak)}")


if __name__ == "__main__":
    sys.exit(main())
