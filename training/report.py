"""Prints what a run is about to do at its start, and what it achieved at its end."""

import math
from pathlib import Path

from data import Corpus
from training.arguments import Settings, command
from training.instruction_data import InstructionData
from training.metrics import picture_path
from training.recipe import num_updates, tokens_per_update, updates_per_epoch
from training.trainer import Trainer


def describe_pre_training(
    settings: Settings, trainer: Trainer, corpus: Corpus, compiled: str
) -> None:
    """Print what is about to run, and what was chosen for it."""
    tokens = num_updates(settings) * tokens_per_update(settings)

    corpus.describe()
    describe_model(settings, trainer)
    describe_device(settings, trainer, compiled)
    print(
        f"Run:    {settings.num_epochs} epochs of {updates_per_epoch(settings)} updates of"
        f" {tokens_per_update(settings):,} tokens, {tokens / corpus.num_tokens:.2f} passes over the"
        f" data, --seed={trainer.seed}"
    )
    describe_resume(trainer)


def describe_fine_tuning(
    settings: Settings, trainer: Trainer, data: InstructionData, compiled: str
) -> None:
    """Print what is about to run, and what was chosen for it."""
    adapter = sum(weight.numel() for weight in trainer.trained_weights().values())
    examples = data.examples
    for note in examples.notes:
        print(f"Note:   {note}")

    print(
        f"Data:   {settings.dataset}, {len(examples.train):,} rows, {len(examples.test):,} to test,"
        f" {data.padding:.1%} of a batch is padding"
    )
    print(
        f"Model:  {settings.base_model_path}, {trainer.model.num_parameters - adapter:,}"
        f" parameters, frozen; {adapter:,} in adapters of rank {settings.rank}"
    )
    describe_device(settings, trainer, compiled)
    print(
        f"Run:    {settings.num_epochs} epochs of {data.updates_per_epoch} updates,"
        f" --seed={trainer.seed}"
    )
    describe_resume(trainer)


def describe_model(settings: Settings, trainer: Trainer) -> None:
    print(
        f"Model:  {trainer.model.num_parameters:,} parameters, {settings.num_hidden_layers} layers,"
        f" {settings.num_attention_heads} heads, {settings.embedding_dimensions} dimensions,"
        f" vocabulary {settings.vocabulary_size:,}, context {settings.block_size}"
    )


def describe_device(settings: Settings, trainer: Trainer, compiled: str) -> None:
    world = trainer.world
    processes = ""
    if world.size > 1:
        sharded = "all state" if world.sharding == "full" else "the optimizer state"
        processes = f"{world.size} processes that shard {sharded}, each "

    print(
        f"Device: {processes}{trainer.device}, {trainer.precision}, {compiled},"
        f" matrix products at {trainer.peak_rate / 1e12:.2f} TFLOP/s{' in all' * bool(processes)}"
    )
    if settings.gradient_accumulation_steps % world.size:
        print(
            f"Note:   an update's {settings.gradient_accumulation_steps} batches are not a multiple"
            f" of {world.size} processes; some wait while others finish"
        )


def describe_resume(trainer: Trainer) -> None:
    if trainer.step:
        print(f"Resume: epoch {len(trainer.metrics) + 1}, update {trainer.step}")


def conclude_pre_training(settings: Settings, trainer: Trainer) -> None:
    """Say what was learned, and which commands come next."""
    row, size = trainer.metrics[-1], settings.vocabulary_size

    print(
        f"Done:   {row['tokens']:,} tokens in {row['seconds'] / 60:.1f} minutes. Test loss"
        f" {row['test_loss']:.3f} nats a token (chance: {math.log(size):.3f}), perplexity"
        f" {row['perplexity']:,.0f} (chance: {size:,})."
    )
    resume = [] if settings.resume and "resume" in settings.given else ["--resume"]
    flags = [*settings.argv, *resume, f"--num_epochs={2 * settings.num_epochs}"]
    prompt = "def fibonacci(" if settings.dataset == ["stdlib"] else None

    describe_files(settings)
    print(f"Next:   {generate_command(settings, prompt, checkpoint_path='checkpoint_path')}")
    print(f"        {command('pre-train.py', *flags)}")


def conclude_fine_tuning(settings: Settings, trainer: Trainer, base_loss: float) -> None:
    """Say what was learned, and which command comes next."""
    row = trainer.metrics[-1]
    is_stdlib = settings.dataset == "stdlib"
    prompt = "read(path): Read a file and return its text." if is_stdlib else None

    print(
        f"Done:   {row['tokens']:,} tokens in {row['seconds'] / 60:.1f} minutes. Test loss"
        f" {row['test_loss']:.3f} nats a token of the answers (base model: {base_loss:.3f})."
    )
    describe_files(settings)
    flags = {"checkpoint_path": "base_model_path", "lora_path": "checkpoint_path"}
    print(f"Next:   {generate_command(settings, prompt, **flags)}")


def describe_files(settings: Settings) -> None:
    picture = picture_path(Path(settings.metrics_path))
    print(f"Files:  {settings.checkpoint_path}, {settings.metrics_path}, {picture}")


def generate_command(settings: Settings, prompt: str | None, **names: str) -> str:
    """Return the command that generates text with what a run has made.

    Args:
        names: by flags of generate.py, the flags of this script for the same files.
    """
    words = [
        f"--{flag}={getattr(settings, own)}" for flag, own in names.items() if own in settings.given
    ]
    if prompt is not None:
        words.append(f"--prompt={prompt}")

    return command("generate.py", *words)
