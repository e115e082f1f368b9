"""A run of a training script, from its flags to its files: what pre-training and fine-tuning share.

begin -> Session.train, epoch by epoch -> saved at intervals, at a signal, and at the end
"""

import contextlib
import os
import secrets
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from system.devices import (
    PRECISIONS,
    DeviceError,
    is_out_of_memory,
    own_device,
    release,
    resolve_device,
    resolve_precision,
    tune_memory,
)
from system.distributed import LostProcessError, NoAnswerError, ProcessError, World, whole
from text.tokenizer import ENCODING, DataError
from training.arguments import Parser, UsageError, fail
from training.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointWriter,
    best_path,
    claimed,
    load_checkpoint,
    lock_path,
    previous_path,
    set_aside,
    temporary_path,
)
from training.metrics import MetricsFile, describe_row, picture_path
from training.trainer import (
    Interrupted,
    Step,
    StopSignal,
    Trainer,
    TrainingError,
)

T = TypeVar("T")

# What the checkpoint of any run holds: the script's own keys come on top.
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

# Yields the micro-batches of a test: token ids and targets, int64 (B, T).
Test = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass
class Session:
    """A run that is ready to go.

    Args:
        load_step: returns the micro-batches of an update by its number.
        steps_per_epoch: updates.
        flops_per_token: operations.
        tests: by the name of their source.
        mean_loss: the mean of the losses of all tests.
        content: what its checkpoints hold, beside the state of the trainer.
        writer: of its checkpoints.
    """

    args: Namespace
    trainer: Trainer
    load_step: Callable[[int], Step]
    steps_per_epoch: int
    flops_per_token: float
    tests: dict[str, Test]
    mean_loss: Callable[[dict[str, float]], float]
    content: Callable[[], dict]
    writer: CheckpointWriter
    # Of the first process, once it trains.
    metrics: MetricsFile | None = None

    @property
    def world(self) -> World:
        return self.trainer.world

    def run(self) -> int:
        """Train up to the last epoch, or a signal; return the exit status."""
        args = self.args
        is_new = not args.resume and self.world.is_first
        table = Path(args.metrics_path)

        if is_new and (aside := set_aside(self.writer.path, table, picture_path(table))):
            print(f"Kept:   an earlier run, as {aside}")

        self.world.note_beginning()

        with self.stoppable() as stop:
            status = self.train_and_keep(stop)
            # While signals wait: whoever ended of one now would count as lost to the others.
            self.world.disconnect()

        return status

    def train_and_keep(self, stop: StopSignal) -> int:
        """Train, and save what there is when that ends early; return the exit status."""
        try:
            self.train(stop)
            self.finish_files()
        except Interrupted as interruption:
            self.save()
            self.finish_files()
            print(
                f"Stopped after update {self.trainer.step}; saved as {self.writer.path}."
                " --resume goes on there."
            )
            return 128 + interruption.number
        except TrainingError:
            self.save()
            self.finish_files()
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise

            release(error)
            raise TrainingError(self.advise_on_memory()) from None

        return 0

    def advise_on_memory(self) -> str:
        """Say which flags make a run fit that has run out of memory."""
        args, device, told = self.args, self.world.device, f"{self.world.device} is out of memory"
        can_recompute = not vars(args).get("activation_checkpointing", True)
        recompute = ", or add --activation_checkpointing" if can_recompute else ""

        # Where weights are spread, no process can try anything alone. A system that runs out of
        # memory ends the process that tries.
        if self.world.has_sharded_weights or device.type == "cpu":
            return f"{told}; halve --batch_size, double --gradient_accumulation_steps{recompute}."

        if size := self.trainer.fitting_batch_size(args.batch_size):
            batches = args.gradient_accumulation_steps * args.batch_size // size
            flags = f"--batch_size={size} --gradient_accumulation_steps={batches}"

            return f"{told}; {flags} fits{recompute}."

        return f"{told} with a single window; take a smaller model{recompute}."

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[StopSignal]:
        """Remember signals meanwhile, and find out what it means when a process is lost.

        Raises:
            LostProcessError: without a message when this process is to end, too.
        """
        with StopSignal() as stop:
            try:
                yield stop
            except (RuntimeError, NoAnswerError) as error:
                if not self.world.is_loss(error):
                    raise

                message = self.world.describe_loss(lambda: stop.number is not None)

                raise LostProcessError(message) from error

    def train(self, stop: StopSignal) -> None:
        """Run all epochs that are left, evaluating and saving at their intervals."""
        args, trainer = self.args, self.trainer
        # The loss of a single source is that of all.
        columns = list(self.tests) if len(self.tests) > 1 else []

        if self.world.is_first:
            self.metrics = MetricsFile(Path(args.metrics_path), trainer.metrics, columns)

        for epoch in range(len(trainer.metrics) + 1, args.num_epochs + 1):
            is_last = epoch == args.num_epochs
            losses = {}

            trainer.train_epoch(self.load_step, epoch * self.steps_per_epoch, stop)

            if epoch % args.eval_interval == 0 or is_last:
                losses = self.evaluate(stop)

            test_loss = self.mean_loss(losses) if losses else None
            is_best = losses and test_loss < trainer.best_test_loss
            by_source = {name: losses[name] for name in columns if losses}
            row = trainer.finish_epoch(test_loss, self.flops_per_token, by_source)

            if self.world.is_first:
                self.writer.check_owner()
                self.metrics.add(row)
                tqdm.write(describe_row(row, args.num_epochs))

            is_due = epoch % args.checkpoint_interval == 0 or is_best or is_last

            # The first process alone knows; a save that has failed is made up for.
            if self.world.max(is_due or self.writer.has_failed):
                self.save(bool(is_best))

    def evaluate(self, stop: StopSignal) -> dict[str, float]:
        return {name: self.trainer.evaluate(test(), stop) for name, test in self.tests.items()}

    def save(self, is_best: bool = False) -> None:
        """Put the state of all processes together; the first one writes it meanwhile."""
        state = {
            "format_version": FORMAT_VERSION,
            "encoding": ENCODING,
            **whole(self.content()),
            **self.trainer.state_dict(),
        }

        if self.world.is_first:
            self.writer.save(state, is_best)

        # However long the one before takes, nobody counts as lost meanwhile.
        self.world.wait_for_all()

    def finish_files(self) -> None:
        """Return when all that there is to keep is on the disk."""
        if self.world.is_first:
            self.writer.wait()
            self.metrics.draw()

        self.world.wait_for_all()


def run_script(
    parser: Parser,
    presets: dict[str, dict],
    argv: list[str] | None,
    check: Callable[[Namespace], T],
    run: Callable[..., int],
) -> int:
    """Read the command line and do what it says; answer what goes wrong in one line.

    Args:
        check: looks at the arguments together, and raises ValueError where they do not fit.
        run: takes the arguments, what check returned, the processes, and the writer of
            checkpoints; returns the exit status.
    """
    args, given = parser.parse(argv, presets)
    args.given = given
    world = World()

    try:
        world = World.from_environment()
        checked = check(args)

        if not vars(args).get("eval_only"):
            check_accumulation(args, world)

        device = resolve_device(args.device if "device" in given else None)
        world.device = own_device(device, world)
    except ValueError as error:
        return fail(error, status=2) if world.is_first else 2
    except (DeviceError, ProcessError) as error:
        return fail(error) if world.is_first else 1

    if device.type == "cpu":
        tune_memory()

    world.sharding = args.sharding
    world.timeout = timedelta(minutes=args.process_timeout)

    with contextlib.ExitStack() as stack:
        # One process speaks for all.
        if not world.is_first:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))

        try:
            world.connect()
            world.check_same("The flags", shared_flags(args))
            writer = stack.enter_context(claim(args, world))
            status = run(args, checked, world, writer)
            world.disconnect()
        except (Exception, KeyboardInterrupt) as error:
            status, message = explain(error, args, world)

            if message and world.is_first_to_fail():
                fail(message)

            # Nothing is waited for that others would have to answer.
            if world.size > 1:
                try:
                    stack.close()
                finally:
                    os._exit(status)

    return status


def explain(error: BaseException, args: Namespace, world: World) -> tuple[int, str]:
    """Return the exit status and the line for what ended a run; raise again what nobody expected.

    The line is empty where nothing is to be said.
    """
    expected = (DataError, TrainingError, CheckpointError, ProcessError, OSError)
    status, message = 1, ""

    if isinstance(error, Interrupted):
        status = 128 + error.number
    elif isinstance(error, KeyboardInterrupt):
        status = 130
    elif isinstance(error, UsageError):
        status, message = 2, str(error)
    elif isinstance(error, expected):
        message = str(error)
    elif world.is_loss(error):
        message = world.describe_loss(lambda: False)
    elif is_out_of_memory(error):
        message = f"{world.device} is out of memory; lower --batch_size, or take a smaller model."
    elif world.size == 1:
        raise error
    elif world.is_first_to_fail():
        traceback.print_exception(error)

    return status, message


@contextlib.contextmanager
def claim(args: Namespace, world: World) -> Iterator[CheckpointWriter]:
    """Prove that the files of a run can be written, and keep other runs off them.

    Yields:
        What writes its checkpoints.

    Raises:
        CheckpointError: when they cannot be written, or another run does.
    """
    # Who only looks writes nothing.
    is_writer = world.is_first and not any(vars(args).get(f) for f in ("dry_run", "eval_only"))

    with contextlib.ExitStack() as stack:
        flags = ("--checkpoint_path", "--metrics_path") if is_writer else ()
        paths = {flag: Path(getattr(args, flag[2:])) for flag in flags}
        locks = [stack.enter_context(claimed(path, flag)) for flag, path in paths.items()]
        writer = CheckpointWriter(Path(args.checkpoint_path), locks)

        try:
            yield writer
        finally:
            # Of a run that fails; others have asked.
            try:
                writer.wait()
            except Exception as error:
                tqdm.write(f"Note:   {error}", file=sys.stderr)


def check_accumulation(args: Namespace, world: World) -> None:
    """Raise ValueError when an update has no batch for every process."""
    if args.gradient_accumulation_steps < world.size:
        raise ValueError(
            f"--gradient_accumulation_steps must be at least {world.size}, one batch for each"
            f" process; {args.gradient_accumulation_steps} given"
        )


def shared_flags(args: Namespace) -> dict:
    """Return the arguments that have to be the same on all machines."""
    own = ("device", "num_dataset_processes", "given")

    return {
        name: value
        for name, value in vars(args).items()
        if name not in own and not name.endswith("_path")
    }


def check_paths(args: Namespace) -> None:
    """Raise ValueError when the metrics would be written over a checkpoint or their picture."""
    table, *others = recorded_by(args.metrics_path)
    checkpoints = written_by(args.checkpoint_path)

    if table in checkpoints:
        raise ValueError("--metrics_path: this is the path of a checkpoint")

    for file in others:
        if file in checkpoints:
            raise ValueError(f"--metrics_path: {file.name} beside it is the path of a checkpoint")

    if Path(args.metrics_path).suffix.lower() == ".svg":
        raise ValueError(
            "--metrics_path must not end in .svg, as the picture of the table does;"
            f" {args.metrics_path} given"
        )


def recorded_by(metrics_path: str) -> list[Path]:
    """Return all files that a run with this --metrics_path writes: its table, then the others."""
    table = Path(metrics_path).resolve()
    picture = picture_path(Path(metrics_path)).resolve()

    return [table, picture, *map(temporary_path, (table, picture)), lock_path(table)]


def written_by(checkpoint_path: str) -> list[Path]:
    """Return all files that a run with this --checkpoint_path writes or moves."""
    path = Path(checkpoint_path).resolve()
    files = [path, previous_path(path), best_path(path)]

    return [*files, *map(temporary_path, files), lock_path(path)]


def begin(args: Namespace, world: World, keys: tuple[str, ...], is_dry: bool = False) -> dict:
    """Read the checkpoint to go on from, and settle open choices.

    Args:
        keys: what the checkpoint has to hold beside SHARED_KEYS.
        is_dry: whether nothing is going to be written.

    Returns:
        The checkpoint; empty for a run that begins.
    """
    path = Path(args.checkpoint_path)

    if not (is_dry or args.resume) and world.is_started_again():
        args.resume = bool(world.from_first(path.exists()))

    checkpoint = {}

    if args.resume:
        checkpoint = load_checkpoint(path, (*keys, *SHARED_KEYS), is_mapped=world.size > 1)

    world.check_same("The checkpoints", checkpoint and (checkpoint["position"], checkpoint["seed"]))

    if args.seed is None:
        args.seed = checkpoint["seed"] if checkpoint else draw_seed(world)

    if args.precision == "auto":
        args.precision = checkpoint["precision"] if checkpoint else choose_precision(world)

    return checkpoint


def draw_seed(world: World) -> int:
    return world.from_first(secrets.randbelow(2**31))


def choose_precision(world: World) -> str:
    """Return what is fast on the device of the first process, for all."""
    names = list(PRECISIONS)
    number = names.index(resolve_precision(world.device)) if world.is_first else 0

    return names[world.from_first(number)]


def check_resumable(
    args: Namespace, checkpoint: dict, saved: dict, wanted: dict, free: Iterable[str]
) -> None:
    """Refuse to go on with what cannot change; say what else has changed.

    Args:
        saved: by the names of flags, what the checkpoint was made with, beside its settings.
        wanted: what this run is to have.
        free: the flags that may change.

    Raises:
        CheckpointError: with both values of everything that differs and may not.
    """
    saved = {
        **checkpoint["settings"],
        **saved,
        "encoding": checkpoint["encoding"],
        "seed": checkpoint["seed"],
    }
    wanted = {**wanted, "encoding": ENCODING, "seed": args.seed}
    changes = {
        name: f"{name} {saved[name]} (saved) and {value} (given)"
        for name, value in wanted.items()
        if name in saved and saved[name] != value
    }
    refused = [text for name, text in changes.items() if name not in free]

    if refused:
        raise CheckpointError(
            f"{args.checkpoint_path} belongs to another run: {'; '.join(refused)}."
            " Give the flags of that run, or leave out --resume to begin a new one."
        )

    for text in changes.values():
        print(f"Changed: {text}")


def is_finished(args: Namespace, checkpoint: dict) -> bool:
    """Tell whether a resumed run has no epoch left, and say so."""
    if not checkpoint or len(checkpoint["metrics"]) < args.num_epochs:
        return False

    print(f"Nothing to do: all {args.num_epochs} epochs are done (--num_epochs).")

    return True


def check_same_data(found: list, saved: list) -> None:
    """Raise CheckpointError when the data are not those that the run began with."""
    if found != saved:
        raise CheckpointError(
            f"The data changed since the checkpoint was saved: {saved} then, {found} now."
            " Restore the files, or leave out --resume to begin a new run."
        )


def describe_device(args: Namespace, trainer: Trainer, compiled: str) -> None:
    world = trainer.world
    processes = ""

    if world.size > 1:
        shared = "all state" if world.sharding == "full" else "the optimizer's state"
        processes = f"{world.size} processes that share {shared}, each "

    print(
        f"Device: {processes}{trainer.device}, {trainer.precision}, {compiled},"
        f" matrix products at {trainer.peak_rate / 1e12:.2f} TFLOP/s{' in all' * bool(processes)}"
    )

    if args.gradient_accumulation_steps % world.size:
        print(
            f"Note:   an update's {args.gradient_accumulation_steps} batches are no multiple of"
            f" {world.size} processes; some wait while others do the last ones"
        )


def describe_resume(trainer: Trainer) -> None:
    if trainer.step:
        print(f"Resume: epoch {len(trainer.metrics) + 1}, update {trainer.step}")
