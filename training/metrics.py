"""Records the metrics of a run: a CSV table, a picture, TensorBoard, and a line to print.

A row is a dictionary of numbers, one an epoch; None where no test was due.
"""

import contextlib
import csv
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from system.files import replaced
from training.pictures import draw_curves

# Begins the names of columns that hold the test loss of one source.
SOURCE_LOSS = "test_loss_"


class MetricsFile:
    """The rows of a run as a CSV file, and as a picture beside it.

    Where TensorBoard is installed, it has them in `runs` beside both. None of these is worth a run:
    what fails is one note, and rows that could not be written come with the next one.
    """

    COLUMNS = (
        "epoch",
        "step",
        "tokens",
        "train_loss",
        "test_loss",
        "perplexity",
        "gradient_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "seconds",
    )

    def __init__(self, path: Path, rows: list[dict], sources: Iterable[str] = ()):
        """Begin a file with the rows that a resumed run has behind it: none twice, none lost.

        Args:
            sources: the names of those that have a column for their test loss.
        """
        self.path = path
        self.rows = list(rows)
        self.sources = {name: SOURCE_LOSS + name for name in sources}
        self.columns = [*self.COLUMNS, *self.sources.values()]
        self.is_whole = False
        self.notes: set[str] = set()
        self.write()
        self.draw()
        self.board = None
        with self.noted("TensorBoard gets no metrics"), contextlib.suppress(ModuleNotFoundError):
            from torch.utils.tensorboard import SummaryWriter

            folder = path.parent / "runs" / path.stem
            self.board = SummaryWriter(folder, purge_step=len(rows) + 1)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()
        if row["test_loss"] is not None:
            self.draw()

        board, self.board = self.board, None
        if board is not None:
            with self.noted("TensorBoard gets no more metrics"):
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        board.add_scalar(name, value, row["epoch"])

                board.flush()
                self.board = board

    def write(self) -> None:
        """Append the last row to the table; where that is not whole, write all rows anew."""
        is_whole, self.is_whole = self.is_whole, False
        with self.noted(f"{self.path} was not written"):
            if is_whole:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])
            else:
                with replaced(self.path, "w", newline="") as file:
                    writer = csv.DictWriter(file, self.columns)
                    writer.writeheader()
                    writer.writerows(self.rows)

            self.is_whole = True

    def draw(self) -> None:
        """Draw the curves of all rows."""
        picture = picture_path(self.path)
        with self.noted(f"{picture} was not drawn"):
            if not self.rows:
                # There may be one of an earlier run. Drawing nothing spares the start of a run
                # the import of matplotlib.
                picture.unlink(missing_ok=True)
                return

            content = draw_curves(self.rows, self.sources, self.path.stem)
            with replaced(picture, "w", newline="", encoding="utf-8") as file:
                file.write(content)

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Turn whatever is raised into a note, one a run for each thing that fails."""
        try:
            yield
        except Exception as error:
            if what not in self.notes:
                # Errors of matplotlib can have several lines.
                reason = " ".join(str(getattr(error, "strerror", None) or error).split())
                tqdm.write(f"Note:   {what}: {reason}", file=sys.stderr)

            self.notes.add(what)


def picture_path(metrics_path: Path) -> Path:
    """Return where the curves of a table are drawn."""
    name = metrics_path.name.removesuffix(".csv")
    return metrics_path.parent / f"{name}.svg"


def perplexity(loss: float) -> float:
    """Return exp(loss), as far as there are numbers."""
    return math.exp(min(loss, 700.0))


def describe_row(row: dict, num_epochs: int) -> str:
    """Put a row of the metrics into one line for people."""
    parts = [f"epoch {row['epoch']}/{num_epochs}", f"train loss {row['train_loss']:.3f}"]
    if row["test_loss"] is not None:
        by_source = ", ".join(
            f"{name.removeprefix(SOURCE_LOSS)} {loss:.3f}"
            for name, loss in row.items()
            if name.startswith(SOURCE_LOSS)
        )
        parts += [
            f"test loss {row['test_loss']:.3f}" + (f" ({by_source})" if by_source else ""),
            f"perplexity {row['perplexity']:,.1f}",
        ]

    parts += [
        f"gradient norm {row['gradient_norm']:.2f}",
        f"learning rate {row['learning_rate']:.1e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
    ]
    return ", ".join(parts)
