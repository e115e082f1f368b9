"""Chooses the sizes and the first weights of a model: from flags, or from a checkpoint."""

from pathlib import Path

from torch import Tensor

from model import GPT
from text.tokenizer import VOCABULARY_SIZE
from training.arguments import Settings, UsageError
from training.checkpoint import MODEL_KEYS, CheckpointError, build_model, load_checkpoint
from training.recipe import SIZES


def load_initial_weights(
    settings: Settings, checkpoint: dict
) -> tuple[Settings, dict[str, Tensor]]:
    """Choose the sizes of the model, and read the weights of --initial_checkpoint if it is given.

    Args:
        checkpoint: the checkpoint of a resumed run; empty for a new run.

    Returns:
        The settings, and the weights of --initial_checkpoint by name, empty without one.

    Raises:
        CheckpointError: when they cannot be read.
        UsageError: when other sizes were given.
    """
    if checkpoint and settings.initial_checkpoint:
        path = Path(settings.checkpoint_path)
        return adopt_sizes(settings, checkpoint["model_args"], path), {}

    if checkpoint:
        return settings.replace(bias=checkpoint["model_args"]["bias"]), {}

    if settings.initial_checkpoint:
        settings, model = read_model(settings, Path(settings.initial_checkpoint))
        print(f"Start:  from the weights of {settings.initial_checkpoint}")
        return settings, model.state_dict()

    return settings.replace(bias=False), {}


def read_model(settings: Settings, path: Path) -> tuple[Settings, GPT]:
    """Read the model of a checkpoint, for windows that may be shorter than its own.

    Returns:
        The settings, in which sizes that were not given are its own, and the model.

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

    settings = adopt_sizes(settings, state["model_args"], path)
    model.crop(settings.block_size)
    return settings, model


def adopt_sizes(settings: Settings, model_args: dict, path: Path) -> Settings:
    """Return settings with the sizes of a model; raise UsageError where others were given."""
    sizes = {"bias": model_args.get("bias", False)}
    for flag in SIZES:
        size, wanted = model_args[flag], getattr(settings, flag)
        is_part = flag == "block_size" and wanted < size
        if flag in settings.given and wanted != size and not is_part:
            raise UsageError(f"--{flag}: {wanted} given, {path} has {size}")

        if flag not in settings.given:
            sizes[flag] = size

    return settings.replace(**sizes)
