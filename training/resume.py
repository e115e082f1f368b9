"""Resumes a run: reads its checkpoint, compares its flags, and restores its state."""

import secrets
from collections.abc import Iterable
from pathlib import Path

from data import TrainingData
from system.devices import PRECISIONS, resolve_precision
from system.distributed import World
from training.arguments import Settings
from training.checkpoint import CheckpointError, load_checkpoint
from training.metrics import SOURCE_LOSS
from training.trainer import Trainer

# The keys in the checkpoint of every run; each script adds its own.
SHARED_KEYS = (
    "optimizer",
    "scaler",
    "position",
    "tokens",
    "seed",
    "precision",
    "encoding",
    "dataset",
    "settings",
    "metrics",
    "epoch",
)


def prepare_resume(
    settings: Settings, world: World, keys: tuple[str, ...]
) -> tuple[Settings, dict]:
    """Read the checkpoint of a resumed run, and choose the seed and the precision if not given.

    Args:
        keys: the keys that the checkpoint has to hold beside SHARED_KEYS.

    Returns:
        The settings, with a seed and a precision, and the checkpoint; empty for a new run.

    Raises:
        CheckpointError: when the checkpoint cannot be read.
    """
    path = Path(settings.checkpoint_path)
    # A dry run writes nothing, so what lies there is never its own.
    is_writer = not getattr(settings, "dry_run", False)
    if is_writer and not settings.resume and world.is_restarted():
        settings = settings.replace(resume=bool(world.broadcast(path.exists())))

    checkpoint = {}
    if settings.resume:
        checkpoint = load_checkpoint(path, (*keys, *SHARED_KEYS), is_mapped=world.size > 1)

    world.check_same("The checkpoints", checkpoint and (checkpoint["position"], checkpoint["seed"]))
    seed, precision = settings.seed, settings.precision
    if seed is None:
        drawn = world.broadcast(secrets.randbelow(2**31))
        seed = checkpoint["seed"] if checkpoint else drawn

    if precision == "auto":
        precision = checkpoint["precision"] if checkpoint else choose_precision(world)

    return settings.replace(seed=seed, precision=precision), checkpoint


def choose_precision(world: World) -> str:
    """Return the precision that is fast on the device of the first process, for all."""
    names = list(PRECISIONS)
    number = names.index(resolve_precision(world.device)) if world.is_first else 0
    return names[world.broadcast(number)]


def check_resumable(
    settings: Settings, checkpoint: dict, saved: dict, wanted: dict, free: Iterable[str]
) -> None:
    """Refuse to resume when a fixed flag differs; print the free flags that differ.

    Args:
        saved: values of the saved run that are not in its settings, by flag.
        wanted: the values of this run, by flag.
        free: the flags that may differ.

    Raises:
        CheckpointError: with both values of every flag that may not differ.
    """
    saved = {**checkpoint["settings"], **saved, "seed": checkpoint["seed"]}
    wanted = {**wanted, "seed": settings.seed}
    changes = {
        name: f"{name} {saved[name]} (saved) and {value} (given)"
        for name, value in wanted.items()
        if name in saved and saved[name] != value
    }
    refused = [text for name, text in changes.items() if name not in free]
    if refused:
        raise CheckpointError(
            f"{settings.checkpoint_path} belongs to another run: {'; '.join(refused)}."
            " Give the flags of that run, or leave out --resume to begin a new one."
        )

    for text in changes.values():
        print(f"Changed: {text}")


def is_finished(settings: Settings, checkpoint: dict) -> bool:
    """Tell whether a resumed run has no epoch left, and say so."""
    if not checkpoint or len(checkpoint["metrics"]) < settings.num_epochs:
        return False

    print(f"Nothing to do: all {settings.num_epochs} epochs are done (--num_epochs).")
    return True


def restore(trainer: Trainer, data: TrainingData, checkpoint: dict) -> None:
    """Restore the state of a checkpoint, and free its memory; a new run has an empty one.

    Raises:
        CheckpointError: when the data are not those that the run began with.
        TrainingError: when weights or optimizers are not those of this run.
    """
    if not checkpoint:
        return

    saved, found = checkpoint["dataset"], data.fingerprint
    if list(map(nameless, saved)) != list(map(nameless, found)):
        raise CheckpointError(
            f"The data changed since the checkpoint was saved: {saved} then, {found} now."
            " Restore the files, or leave out --resume to begin a new run."
        )

    # Sources that were moved have other names.
    names = {
        f"{SOURCE_LOSS}{old[0]}": f"{SOURCE_LOSS}{new[0]}"
        for old, new in zip(saved, found, strict=True)
        if isinstance(old, list)
    }
    checkpoint["metrics"] = [
        {names.get(key, key): value for key, value in row.items()} for row in checkpoint["metrics"]
    ]
    trainer.load_state_dict(checkpoint)
    checkpoint.clear()


def nameless(entry: list | str) -> list | str:
    """Return what a fingerprint says of a source without its name."""
    return entry[1:] if isinstance(entry, list) else entry
