"""Derives the numbers of a pre-training run from its flags: updates, tokens, the schedule."""

from text.tokenizer import VOCABULARY_SIZE
from training.arguments import Settings
from training.optimizers import Schedule

SIZES = ("block_size", "embedding_dimensions", "num_attention_heads", "num_hidden_layers")


def model_args(settings: Settings) -> dict:
    """Return what decides the shapes of the weights, by the names of GPT's arguments."""
    return {"vocabulary_size": VOCABULARY_SIZE, **settings.select((*SIZES, "bias"))}


def samples_per_update(settings: Settings) -> int:
    return settings.batch_size * settings.gradient_accumulation_steps


def tokens_per_update(settings: Settings) -> int:
    return samples_per_update(settings) * settings.block_size


def updates_per_epoch(settings: Settings) -> int:
    """Return the whole updates in an epoch; the next epoch starts with the next sample."""
    return settings.samples_per_epoch // samples_per_update(settings)


def num_updates(settings: Settings) -> int:
    return settings.num_epochs * updates_per_epoch(settings)


def build_schedule(settings: Settings) -> Schedule:
    total, warmup = num_updates(settings), settings.warmup_steps
    if warmup is None:
        warmup = 0 if settings.lr_schedule == "constant" else min(1000, total // 20)

    return Schedule(
        settings.lr_schedule, settings.learning_rate, settings.min_learning_rate, warmup, total
    )
