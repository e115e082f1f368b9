"""Decides when a run trains, tests, saves and stops; `prefetch` brings its batches.

    run = Run(settings, trainer, data, writer, metadata)
    with run.saved_on_exit():
        for epoch in run.epochs():
            for batches in run.updates(epoch):
                trainer.update(batches)

            run.finish(epoch)

It saves at intervals, when a signal comes, when an update or anything else fails, and at the end.
"""

import contextlib
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from data import TrainingData
from system.distributed import World, unshard
from system.memory import is_out_of_memory
from system.signals import Interrupted
from training.arguments import Settings
from training.checkpoint import FORMAT_VERSION, CheckpointError, CheckpointWriter
from training.metrics import MetricsFile, describe_row, picture_path
from training.outputs import set_aside
from training.trainer import MicroBatches, Trainer, TrainingError


class Run:
    """The remaining epochs of a run.

    Args:
        metadata: what a checkpoint holds beside the state of the trainer.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: Trainer,
        data: TrainingData,
        writer: CheckpointWriter,
        metadata: dict,
    ):
        self.settings = settings
        self.trainer = trainer
        self.world = trainer.world
        self.data = data
        self.writer = writer
        self.metadata = metadata
        self.flops_per_token = trainer.model.flops_per_token(data.mean_length)
        # The sources with a column of their own; a single source needs none.
        self.columns = data.sources if len(data.sources) > 1 else []
        self.saved_step = trainer.step
        # Only on the first process, and only once it trains.
        self.metrics: MetricsFile | None = None

    @contextlib.contextmanager
    def saved_on_exit(self) -> Iterator[None]:
        """Save all finished updates when the run ends early.

        Raises:
            Interrupted: on leaving, when a signal has come.
            LostProcessError: when another process is lost.
        """
        table = Path(self.settings.metrics_path)
        if self.world.is_first and not self.settings.resume:
            aside = set_aside(self.writer.path, table, picture_path(table))
            if aside:
                print(f"Kept:   an earlier run, as {aside}")

        self.world.mark_started()
        with self.trainer.stoppable():
            try:
                yield
            except Interrupted:
                self.save()
                self.close()
                print(
                    f"Stopped after update {self.trainer.step}; saved as {self.writer.path}."
                    " --resume continues there."
                )
                raise
            except TrainingError:
                self.save()
                self.close()
                raise
            except CheckpointError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    # Otherwise what was computed stays as long as the error.
                    traceback.clear_frames(error.__traceback__)

                self.rescue()
                raise

            self.close()

    # --- Epochs and updates ---

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the remaining epochs; the first epoch is 1."""
        if self.world.is_first:
            table = Path(self.settings.metrics_path)
            self.metrics = MetricsFile(table, self.trainer.metrics, self.columns)

        yield from range(len(self.trainer.metrics) + 1, self.settings.num_epochs + 1)

    def updates(self, epoch: int) -> Iterator[MicroBatches]:
        """Yield this process's micro-batches for each remaining update of an epoch.

        The time between two yields counts as training.
        """
        trainer = self.trainer
        updates = range(trainer.step, epoch * self.data.updates_per_epoch)
        started = before = time.perf_counter()
        tokens_before = trainer.tokens
        with trainer.progress(updates, f"Epoch {epoch}", "step") as progress:
            for batches in prefetch(self.data, updates, self.world):
                yield batches

                now = time.perf_counter()
                trainer.seconds += now - before
                before = now

                rate = (trainer.tokens - tokens_before) / (now - started)
                loss = trainer.last_loss
                progress.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
                progress.update()

    def finish(self, epoch: int) -> None:
        """Close an epoch: record it; test and save at their intervals and after the last epoch."""
        settings, trainer = self.settings, self.trainer
        is_last = epoch == settings.num_epochs
        losses = {}
        if epoch % settings.eval_interval == 0 or is_last:
            losses = trainer.test(self.data)

        test_loss = self.data.mean_loss(losses) if losses else None
        is_best = test_loss is not None and test_loss < trainer.best_test_loss
        by_source = {name: losses[name] for name in self.columns if losses}
        row = trainer.finish_epoch(test_loss, self.flops_per_token, by_source)
        if self.metrics:
            self.writer.check_owner()
            self.metrics.add(row)
            tqdm.write(describe_row(row, settings.num_epochs))

        is_due = epoch % settings.checkpoint_interval == 0 or is_best or is_last

        # Only the first process knows whether a save has failed; if so, save now.
        if self.world.max(is_due or self.writer.has_failed):
            self.save(is_best)

    # --- What is saved ---

    def save(self, is_best: bool = False) -> None:
        """Gather the state of all processes; the first one writes it in the background."""
        state = {
            "format_version": FORMAT_VERSION,
            **self.metadata,
            **unshard(self.trainer.state_dict()),
        }
        if self.world.is_first:
            self.writer.save(state, is_best)

        self.saved_step = self.trainer.step
        # The write before may take long; nobody counts as lost while the others wait here.
        self.world.barrier()

    def rescue(self) -> None:
        """Save updates that no checkpoint has yet, behind an error that nobody expected.

        Only a single process can: several save together, and the others do not know of the error.
        """
        trainer = self.trainer
        is_saved = trainer.step == self.saved_step and not self.writer.has_failed
        if is_saved or self.world.size > 1 or trainer.is_updating:
            return

        try:
            self.save()
            self.close()
            print(f"Saved after update {trainer.step} as {self.writer.path}.")
        except Exception as error:  # what ended the run comes first
            tqdm.write(f"Note:   {error}", file=sys.stderr)

    def close(self) -> None:
        """Wait until everything is on the disk, then disconnect from the other processes."""
        if self.world.is_first:
            self.writer.wait()

        if self.metrics:
            self.metrics.draw()

        self.world.barrier()
        # While signals are held back: a process that a signal ended now would count as lost.
        self.world.disconnect()


def prefetch(data: TrainingData, updates: Iterable[int], world: World) -> Iterator[MicroBatches]:
    """Yield the micro-batches of each update; a thread loads the next ones meanwhile."""
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number in updates:
            pending.append(pool.submit(load_micro_batches, data, number, world))
            if len(pending) == 2:
                yield pending.popleft().result()

        while pending:
            yield pending.popleft().result()


def load_micro_batches(data: TrainingData, update: int, world: World) -> MicroBatches:
    """Load this process's share of the micro-batches of an update.

    All processes get the same number; a micro-batch that only fills up has no targets.
    """
    batches = []
    for number, is_own in world.shard(data.batch_numbers(update)):
        x, y = data.batch(number)
        y = y if is_own else torch.full_like(y, -1)
        if world.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()

        batches.append((number, x, y))

    return batches
