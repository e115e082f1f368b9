"""Pre-train a GPT-2-like model on OpenWebText, on the text that comes with Python, or on your own.

`python pre-train.py --preset=tiny` shows all of it in minutes on any machine.
"""

import sys
from pathlib import Path

# Not there with PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

import system.threads  # noqa: F401, sets environment variables that torch reads on import

import torch
from torch import Tensor

from data import Corpus, Sources, open_corpus, open_datasets, parse_sources
from model import GPT, check_sizes
from system.devices import compile_model, matmul_dtype, total_matmul_rate
from system.distributed import World
from text.token_files import NAMES
from training.arguments import (
    Parser,
    Settings,
    UsageError,
    add_flag,
    add_recipe,
    add_run,
    check_accumulation,
    dropout_float,
    encoding_str,
    non_negative_float,
    non_negative_int,
    path_str,
    positive_int,
    vocabulary_int,
)
from training.checkpoint import vocabulary_state
from training.evaluation import report_losses
from training.initial import load_initial_weights, read_model
from training.launch import Launch
from training.optimizers import Optimizers, step_factors
from training.outputs import check_outputs, names_by_folder, outputs_by_flag
from training.planning import dry_run
from training.recipe import build_schedule, model_args, num_updates, samples_per_update
from training.report import (
    conclude_pre_training,
    describe_device,
    describe_model,
    describe_pre_training,
)
from training.resume import check_resumable, choose_precision, is_finished, prepare_resume, restore
from training.run import Run
from training.trainer import Trainer, load_weights

# Sizes of GPT-2 (Radford et al. 2019, table 2), and one that learns on a laptop while you watch.
PRESETS = {
    "tiny": {
        "dataset": ["stdlib"],
        "vocabulary_size": 4096,
        "block_size": 256,
        "embedding_dimensions": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "dropout": 0.0,
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
        "samples_per_epoch": 640,
        "num_epochs": 12,
        "eval_interval": 6,
        "checkpoint_interval": 6,
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

# Flags that decide which samples come next: a resumed run has to keep them.
FIXED_FLAGS = ("batch_size", "gradient_accumulation_steps", "samples_per_epoch", "optimizer")
# Flags that a resumed run may change; it prints the change.
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


def main(argv: list[str] | None = None) -> int:
    with Launch(build_parser(), PRESETS, argv) as job:
        sources = check_arguments(job.settings, job.world.size)
        world = job.connect()
        if job.settings.eval_only:
            evaluate(job.settings, sources, world)
            return 0

        writer = None if job.settings.dry_run else job.claim_outputs()
        settings, checkpoint = prepare_resume(job.settings, world, ("model_args", "model"))
        settings, weights, tokenizer = load_initial_weights(settings, checkpoint)
        check_same_run(settings, checkpoint)
        if is_finished(settings, checkpoint):
            return 0

        saved = checkpoint.get("dataset", ())
        corpus = open_corpus(settings, sources, world, tokenizer, saved)
        trainer = build_trainer(settings, weights, world)
        # Copied by now: otherwise the run would hold them to its end.
        weights.clear()
        restore(trainer, corpus, checkpoint)
        compiled = compile_model(trainer.model, world.device, settings.compile)
        describe_pre_training(settings, trainer, corpus, compiled)
        if writer is None:
            dry_run(settings, trainer, corpus, job.libraries, job.settings.precision == "auto")
            return 0

        metadata = checkpoint_metadata(settings, corpus)
        run = Run(settings, trainer, corpus, writer, metadata)
        with run.saved_on_exit():
            for epoch in run.epochs():
                for batches in run.updates(epoch):
                    trainer.update(batches)

                run.finish(epoch)

        conclude_pre_training(settings, trainer)

    return job.status


def build_trainer(settings: Settings, weights: dict[str, Tensor], world: World) -> Trainer:
    """Build the model, its optimizers and the trainer.

    Args:
        weights: first weights by name; empty to draw them at random.
    """
    torch.manual_seed(settings.seed)

    model = GPT(**model_args(settings), dropout=settings.dropout)
    model.activation_checkpointing = settings.activation_checkpointing
    if settings.optimizer == "muon":
        model.look_back()

    network = world.wrap(model, model.blocks)
    trainer = Trainer(
        model,
        network,
        Optimizers(
            model,
            settings.optimizer,
            settings.weight_decay,
            world,
            matmul_dtype(settings.precision),
            step_factors(settings.embedding_dimensions, num_updates(settings)),
        ),
        build_schedule(settings),
        world,
        settings.precision,
        settings.seed,
        settings.max_gradient_norm,
        peak_rate=total_matmul_rate(world, settings.precision),
    )
    if weights:
        load_weights(trainer.trained_weights(), weights)

    return trainer


def checkpoint_metadata(settings: Settings, corpus: Corpus) -> dict:
    """Return the entries of a checkpoint beside the state of the trainer."""
    return {
        **vocabulary_state(corpus.tokenizer),
        "model_args": model_args(settings),
        "dataset": corpus.fingerprint,
        "settings": settings.select(FIXED_FLAGS + FREE_FLAGS),
    }


def evaluate(settings: Settings, sources: Sources, world: World) -> None:
    """Print the loss of a checkpoint on each source: --eval_only."""
    settings, model, tokenizer = read_model(settings, Path(settings.checkpoint_path))
    is_open = settings.precision == "auto"
    precision = choose_precision(world) if is_open else settings.precision
    settings = settings.replace(seed=0, precision=precision)
    trainer = build_trainer(settings, model.state_dict(), world)
    is_all = settings.eval_split == "all"
    datasets = open_datasets(settings, sources, world, tokenizer, is_split=not is_all)
    describe_model(settings, trainer)
    describe_device(settings, trainer, "not compiled")
    report_losses(trainer, datasets, settings.batch_size, is_all)


# --- Flags ---


def build_parser() -> Parser:
    parser = Parser(prog="pre-train.py", description=(__doc__ or "").partition("\n")[0])

    add_data_arguments(parser)
    add_model_arguments(parser)
    add_recipe_arguments(parser)
    add_run_arguments(parser)
    return parser


def add_data_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        type=path_str,
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
        type=path_str,
        default="./dataset",
        help="Folder of the token files.",
    )
    add(
        "--vocabulary_size",
        type=vocabulary_int,
        default=50257,
        help="Vocabulary size: 50257 is GPT-2's; any other from 257 to 65536 is trained on the"
        " text.",
    )
    add(
        "--text_encoding",
        type=encoding_str,
        help="Encoding of your own text, such as cp1252 or gb18030; None is UTF-8, or UTF-16 where"
        " the text says so.",
    )
    add(
        "--num_dataset_processes",
        type=positive_int,
        default=8,
        help="Processes that tokenize, at most one a core.",
    )


def add_model_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(PRESETS), help="Named defaults; single flags override them.")
    add(
        "--initial_checkpoint",
        type=path_str,
        help="Checkpoint whose weights the run begins with; sizes that are not given are those of"
        " its model.",
    )
    add("--block_size", type=positive_int, default=1024, help="Context length in tokens.")
    add("--embedding_dimensions", type=positive_int, default=768, help="Width of the network.")
    add("--num_attention_heads", type=positive_int, default=12, help="Attention heads in a block.")
    add("--num_hidden_layers", type=positive_int, default=12, help="Blocks of attention and MLP.")
    add("--dropout", type=dropout_float, default=0.1, help="Share of activations set to zero.")


def add_recipe_arguments(parser: Parser) -> None:
    add = add_recipe(parser)
    add("--samples_per_epoch", type=positive_int, default=4096, help="Samples in an epoch.")
    add("--num_epochs", type=positive_int, default=2145, help="Epochs to train for.")
    add(
        "--lr_schedule",
        choices=["linear", "cosine", "constant"],
        default="linear",
        help="How the learning rate decays to its minimum.",
    )
    add(
        "--warmup_steps",
        type=non_negative_int,
        help="Updates of linear warm-up; by default a twentieth of all, at most 1,000, none with"
        " constant.",
    )
    add(
        "--min_learning_rate",
        type=non_negative_float,
        default=0.0,
        help="Learning rate at the end of the schedule.",
    )
    add(
        "--weight_decay",
        type=non_negative_float,
        default=0.1,
        help="Decay of the matrices (with muon the hidden ones), times the learning rate.",
    )


def add_run_arguments(parser: Parser) -> None:
    add = add_run(
        parser,
        "the matrix products",
        checkpoint_path="./out/checkpoint.pt",
        metrics_path="./out/pre-train.csv",
        eval_interval=10,
        checkpoint_interval=20,
    )
    add_flag(
        add,
        "--activation_checkpointing",
        False,
        "Recompute activations in the backward pass: less memory, more time.",
    )
    add_flag(add, "--dry_run", False, "Print what the run would take (memory, time), then stop.")
    add_flag(
        add,
        "--eval_only",
        False,
        "Print the checkpoint's loss, perplexity and bits per byte on the dataset, then stop.",
    )
    add(
        "--eval_split",
        choices=["test", "all"],
        default="test",
        help="What --eval_only reads of each source: the test split, or all of it.",
    )


def check_arguments(settings: Settings, num_processes: int) -> Sources:
    """Return the sources with their weights; raise UsageError where values do not fit together."""
    check_outputs(settings)
    check_modes(settings)
    if not settings.eval_only:
        check_recipe(settings)
        check_accumulation(settings, num_processes)

    try:
        return parse_sources(
            settings.dataset,
            # A folder of text may contain what the run writes.
            ((Path(settings.dataset_path), NAMES), *names_by_folder(settings)),
            settings.text_encoding or "",
            Path(settings.dataset_path),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_modes(settings: Settings) -> None:
    """Raise UsageError where flags name two modes, or would overwrite --initial_checkpoint."""
    modes = [f"--{n}" for n in ("eval_only", "dry_run", "resume") if getattr(settings, n)]
    if "eval_split" in settings.given and not settings.eval_only:
        raise UsageError("--eval_split needs --eval_only")

    if settings.eval_only and len(modes) > 1:
        raise UsageError(f"{' and '.join(modes)}: give one of them")

    if settings.initial_checkpoint and not settings.resume:
        if settings.eval_only:
            raise UsageError("--initial_checkpoint: --eval_only reads --checkpoint_path")

        for flag, files in outputs_by_flag(settings).items():
            if Path(settings.initial_checkpoint).resolve() in files:
                raise UsageError(
                    f"--initial_checkpoint: {settings.initial_checkpoint} would be overwritten;"
                    f" choose another --{flag} for the new run"
                )


def check_recipe(settings: Settings) -> None:
    """Raise UsageError where sizes, batches or learning rates do not fit together."""
    if not settings.initial_checkpoint:
        try:
            check_sizes(settings.embedding_dimensions, settings.num_attention_heads)
        except ValueError as error:
            raise UsageError(f"--embedding_dimensions: {error}") from None

    if settings.samples_per_epoch < samples_per_update(settings):
        raise UsageError(
            f"--samples_per_epoch must be at least {samples_per_update(settings)}, one update of"
            f" {settings.gradient_accumulation_steps} batches of {settings.batch_size};"
            f" {settings.samples_per_epoch} given"
        )

    if settings.min_learning_rate > settings.learning_rate:
        raise UsageError(
            f"--min_learning_rate {settings.min_learning_rate} is above"
            f" --learning_rate {settings.learning_rate}"
        )


def check_same_run(settings: Settings, checkpoint: dict) -> None:
    """Raise CheckpointError when the checkpoint has other samples or another model."""
    if not checkpoint:
        return

    wanted = {**settings.select(FIXED_FLAGS + FREE_FLAGS), **model_args(settings)}
    saved, batches = checkpoint["settings"], ("batch_size", "gradient_accumulation_steps")
    # However an update is cut into batches, it has the same samples.
    is_same = saved[batches[0]] * saved[batches[1]] == samples_per_update(settings)
    free = FREE_FLAGS + batches if is_same else FREE_FLAGS
    check_resumable(settings, checkpoint, checkpoint["model_args"], wanted, free)


if __name__ == "__main__":
    sys.exit(main())
