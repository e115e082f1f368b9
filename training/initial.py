"""Chooses the sizes and the first weights of a model: from flags, or from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from model import GPT
from text.tokenizer import Tokenizer
from training.arguments import Settings, UsageError
from training.checkpoint import MODEL_KEYS, build_model, load_checkpoint, read_tokenizer
from training.recipe import SIZES


def load_initial_weights(
    settings: Settings, checkpoint: dict
) -> tuple[Settings, dict[str, Tensor], Tokenizer | None]:
    """Choose the sizes of the model, and read the weights of --initial_checkpoint if it is given.

    Args:
        checkpoint: the checkpoint of a resumed run; empty for a new run.

    Returns:
        The settings, the weights of --initial_checkpoint by name, empty without one, and the
        tokenizer of the checkpoint, if there is one.

    Raises:
        CheckpointError: when they cannot be read.
        UsageError: when other sizes were given.
    """
    if checkpoint:
        path = Path(settings.checkpoint_path)
        # All sizes are those of --initial_checkpoint; otherwise the flags have to fit.
        names = SIZES if settings.initial_checkpoint else ("vocabulary_size",)
        settings = adopt_sizes(settings, checkpoint["model_args"], path, names)
        return settings, {}, read_tokenizer(checkpoint, path)

    if settings.initial_checkpoint:
        settings, model, tokenizer = read_model(settings, Path(settings.initial_checkpoint))
        print(f"Start:  from the weights of {settings.initial_checkpoint}")
        return settings, model.state_dict(), tokenizer

    return settings.replace(bias=False), {}, None


def read_model(settings: Settings, path: Path) -> tuple[Settings, GPT, Tokenizer]:
    """Read the model of a checkpoint, for windows that may be shorter than its own.

    Returns:
        The settings, in which sizes that were not given are its own, the model and its tokenizer.

    Raises:
        CheckpointError: when it cannot be read.
        UsageError: when other sizes were given.
    """
    state = load_checkpoint(path, MODEL_KEYS)
    model = build_model(state, path)
    tokenizer = read_tokenizer(state, path)
    settings = adopt_sizes(settings, state["model_args"], path)
    model.crop(settings.block_size)
    return settings, model, tokenizer


def adopt_sizes(
    settings: Settings, model_args: dict, path: Path, names: Sequence[str] = SIZES
) -> Settings:
    """Return settings with sizes of a model; raise UsageError where others were given."""
    sizes = {"bias": model_args.get("bias", False)}
    for flag in names:
        size, wanted = model_args[flag], getattr(settings, flag)
        is_part = flag == "block_size" and wanted < size
        if flag in settings.given and wanted != size and not is_part:
            raise UsageError(f"--{flag}: {wanted} given, {path} has {size}")

        if flag not in settings.given:
            sizes[flag] = size

    return settings.replace(**sizes)
