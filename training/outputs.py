"""Lists the files that a run writes, and checks that they do not overwrite each other."""

import re
from pathlib import Path

from system.files import lock_path, temporary_path
from training.arguments import Settings, UsageError
from training.checkpoint import best_path, previous_path
from training.metrics import picture_path


def outputs_by_flag(settings: Settings) -> dict[str, list[Path]]:
    """Return all files that a run writes, by the flags that name them."""
    return {
        "checkpoint_path": written_by(settings.checkpoint_path),
        "metrics_path": metrics_files(settings.metrics_path),
    }


def written_by(checkpoint_path: str) -> list[Path]:
    """Return all files that a run with this --checkpoint_path writes or moves."""
    path = Path(checkpoint_path).resolve()
    files = [path, previous_path(path), best_path(path)]
    return [*files, *map(temporary_path, files), lock_path(path)]


def metrics_files(metrics_path: str) -> list[Path]:
    """Return all files that a run with this --metrics_path writes: its table, then the others."""
    table = Path(metrics_path).resolve()
    picture = picture_path(Path(metrics_path)).resolve()
    return [table, picture, *map(temporary_path, (table, picture)), lock_path(table)]


def names_by_folder(settings: Settings) -> tuple[tuple[Path, str], ...]:
    """Return the folders that a run writes to, and a regular expression of its names in each."""
    checkpoint, table = Path(settings.checkpoint_path), Path(settings.metrics_path)
    names = [(path, name_pattern(path)) for path in (checkpoint, table, picture_path(table))]
    return tuple((path.resolve().parent, pattern) for path, pattern in names)


def name_pattern(path: Path) -> str:
    """Match the name of a file, of earlier ones of it, and of what is temporary."""
    return rf"{re.escape(path.stem)}(\..+)?{re.escape(path.suffix)}(\..+)?"


def check_outputs(settings: Settings) -> None:
    """Raise UsageError when metrics, picture and checkpoint would overwrite each other."""
    table, *others = metrics_files(settings.metrics_path)
    checkpoints = written_by(settings.checkpoint_path)
    if table in checkpoints:
        raise UsageError("--metrics_path: this is the path of a checkpoint")

    for file in others:
        if file in checkpoints:
            raise UsageError(f"--metrics_path: {file.name} beside it is the path of a checkpoint")

    if Path(settings.metrics_path).suffix.lower() == ".svg":
        raise UsageError(
            "--metrics_path must not end in .svg, as the picture of the table does;"
            f" {settings.metrics_path} given"
        )
