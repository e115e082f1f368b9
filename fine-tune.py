"""Fine-tune a pre-trained model with LoRA, so that it answers instructions.

`python fine-tune.py --preset=tiny` does so in minutes with what `pre-train.py --preset=tiny` left.
"""

import sys
from pathlib import Path

# Not there with PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

import system.threads  # noqa: F401, sets environment variables that torch reads on import

import torch

from model import GPT
from system.devices import PRECISIONS, compile_model, matmul_dtype, total_matmul_rate
from system.distributed import World
from text.rows import RowSource, load_examples, parse_row_source
from text.tokenizer import Tokenizer
from training.arguments import (
    Parser,
    Settings,
    UsageError,
    add_flag,
    add_recipe,
    add_run,
    check_accumulation,
    dropout_float,
    path_str,
    positive_float,
    positive_int,
)
from training.checkpoint import (
    MODEL_KEYS,
    build_model,
    check_base,
    fingerprint,
    load_checkpoint,
    read_tokenizer,
)
from training.instruction_data import InstructionData
from training.launch import Launch
from training.lora import add_lora, check_rank
from training.optimizers import Optimizers, Schedule
from training.outputs import check_outputs, outputs_by_flag, written_by
from training.report import conclude_fine_tuning, describe_fine_tuning
from training.resume import check_resumable, is_finished, prepare_resume, restore
from training.run import Run
from training.trainer import Trainer

PRESETS = {
    "tiny": {
        "dataset": "stdlib",
        "rank": 64,
        "dropout": 0.0,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "learning_rate": 5e-3,
        # A compiler takes longer than it would save.
        "compile": False,
    },
}

# Flags that decide which examples come next and what the adapter is: a resumed run keeps them.
FIXED_FLAGS = (
    "batch_size",
    "gradient_accumulation_steps",
    "mask_input",
    "rank",
    "alpha",
    "optimizer",
)
# Flags that a resumed run may change; it prints the change.
FREE_FLAGS = ("learning_rate", "dropout", "max_gradient_norm", "precision", "num_epochs")


def main(argv: list[str] | None = None) -> int:
    with Launch(build_parser(), PRESETS, argv) as job:
        source = check_arguments(job.settings, job.world.size)
        world = job.connect()
        writer = job.claim_outputs()
        keys = ("lora_args", "lora", "base", "base_test_loss")
        settings, checkpoint = prepare_resume(job.settings, world, keys)
        check_same_run(settings, checkpoint)
        if is_finished(settings, checkpoint):
            return 0

        model, tokenizer, base = read_base(settings, checkpoint, world)
        data = open_data(settings, source, tokenizer, model.block_size, world)
        trainer = build_trainer(settings, model, data, world)
        base_loss = checkpoint.get("base_test_loss")
        restore(trainer, data, checkpoint)
        compiled = compile_model(model, world.device, settings.compile, is_dynamic=True)
        describe_fine_tuning(settings, trainer, data, compiled)
        if base_loss is None:
            # An untrained adapter adds zero.
            with trainer.stoppable():
                base_loss = data.mean_loss(trainer.test(data))

        metadata = checkpoint_metadata(settings, data, tokenizer, base, base_loss)
        run = Run(settings, trainer, data, writer, metadata)
        with run.saved_on_exit():
            for epoch in run.epochs():
                for batches in run.updates(epoch):
                    trainer.update(batches)

                run.finish(epoch)

        conclude_fine_tuning(settings, trainer, base_loss)

    return job.status


def read_base(settings: Settings, checkpoint: dict, world: World) -> tuple[GPT, Tokenizer, str]:
    """Read the base model, its tokenizer and its fingerprint.

    Raises:
        CheckpointError: when it cannot be read, or a resumed run began with another.
        UsageError: when the rank does not fit.
    """
    path = Path(settings.base_model_path)
    state = load_checkpoint(path, MODEL_KEYS)
    model = build_model(state, path)
    tokenizer = read_tokenizer(state, path)
    base = fingerprint(model.state_dict())
    world.check_same("The base models", base)
    try:
        check_rank(settings.rank, model.token_embeddings.embedding_dim)
    except ValueError as error:
        raise UsageError(f"--rank: {error}") from None

    if checkpoint:
        check_base(checkpoint, base, Path(settings.checkpoint_path))

    return model, tokenizer, base


def open_data(
    settings: Settings, source: RowSource, tokenizer: Tokenizer, block_size: int, world: World
) -> InstructionData:
    """Read and tokenize the rows to learn from.

    Raises:
        DataError: when the source cannot be read, or has too few rows.
    """
    with world.one_per_machine_first():
        examples = load_examples(source, tokenizer, block_size, settings.mask_input)

    world.check_same("The data", examples.fingerprint)
    return InstructionData(
        settings.dataset,
        examples,
        settings.batch_size,
        settings.gradient_accumulation_steps,
        block_size,
        tokenizer.end_of_text,
        settings.seed,
    )


def build_trainer(settings: Settings, model: GPT, data: InstructionData, world: World) -> Trainer:
    """Freeze the model, add the adapter, and build its optimizers and the trainer."""
    torch.manual_seed(settings.seed)
    precision = PRECISIONS[settings.precision]
    add_lora(model, settings.rank, settings.alpha, settings.dropout, precision)
    network = world.wrap(model, model.blocks)

    total = settings.num_epochs * data.updates_per_epoch
    schedule = Schedule("linear", settings.learning_rate, 0.0, min(100, total // 20), total)
    return Trainer(
        model,
        network,
        Optimizers(model, settings.optimizer, 0.0, world, matmul_dtype(settings.precision)),
        schedule,
        world,
        settings.precision,
        settings.seed,
        settings.max_gradient_norm,
        peak_rate=total_matmul_rate(world, settings.precision),
        trained="lora",
    )


def checkpoint_metadata(
    settings: Settings, data: InstructionData, tokenizer: Tokenizer, base: str, base_loss: float
) -> dict:
    """Return the entries of a checkpoint beside the state of the trainer."""
    return {
        "encoding": tokenizer.encoding,
        "lora_args": settings.select(("rank", "alpha")),
        "base": base,
        "base_test_loss": base_loss,
        "dataset": data.fingerprint,
        "introduction": data.examples.introduction,
        "settings": settings.select(FIXED_FLAGS + FREE_FLAGS),
    }


def check_arguments(settings: Settings, num_processes: int) -> RowSource:
    """Return the source of rows; raise UsageError where values do not fit together."""
    check_outputs(settings)
    check_accumulation(settings, num_processes)

    # No output may overwrite an input, or a file that is kept beside it.
    inputs = {
        "the base model": {*written_by(settings.base_model_path)},
        "the dataset": {Path(settings.dataset[:255]).absolute().resolve()},
    }
    for flag, files in outputs_by_flag(settings).items():
        for name, read in inputs.items():
            if read & {*files}:
                raise UsageError(f"--{flag}: this is the path of {name}")

    try:
        return parse_row_source(settings.dataset)
    except ValueError as error:
        raise UsageError(f"--dataset: {error}") from None


def check_same_run(settings: Settings, checkpoint: dict) -> None:
    """Raise CheckpointError when a resumed run has other examples or another adapter."""
    if checkpoint:
        wanted = settings.select(FIXED_FLAGS + FREE_FLAGS)
        check_resumable(settings, checkpoint, checkpoint["lora_args"], wanted, FREE_FLAGS)


# --- Flags ---


def build_parser() -> Parser:
    parser = Parser(prog="fine-tune.py", description=(__doc__ or "").partition("\n")[0])

    add = parser.add_argument_group("model and data").add_argument
    add(
        "--base_model_path",
        type=path_str,
        default="./out/checkpoint.pt",
        help="Checkpoint of the base model.",
    )
    add("--preset", choices=list(PRESETS), help="Named defaults; single flags override them.")
    add(
        "--dataset",
        type=path_str,
        default="alpaca",
        metavar="SOURCE",
        help="What to learn from: alpaca, stdlib, a .json, .jsonl, .csv or .parquet file of your"
        " own, or a dataset on the Hugging Face Hub (owner/name or owner/name:config).",
    )
    add_flag(add, "--mask_input", True, "Compute the loss on the answers only.")
    add("--rank", type=positive_int, default=8, help="Rank of the adapter's matrices.")
    add("--alpha", type=positive_float, default=2.0, help="Factor of the adapter's output.")
    add("--dropout", type=dropout_float, default=0.1, help="Dropout on the adapter's inputs.")

    add = add_recipe(parser)
    add("--num_epochs", type=positive_int, default=4, help="Passes over the training rows.")

    add_run(
        parser,
        "the frozen weights and the matrix products",
        checkpoint_path="./out/lora.pt",
        metrics_path="./out/fine-tune.csv",
        eval_interval=1,
        checkpoint_interval=1,
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
