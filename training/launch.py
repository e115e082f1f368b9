"""Starts and ends a training script: flags, processes, device, locks, errors, exit status.

with Launch(parser, presets, argv) as job:
    check_arguments(job.settings)
    job.connect()
    ...
return job.status
"""

import contextlib
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from tqdm import tqdm

from system.devices import (
    DeviceError,
    check_compiler_cache,
    limit_threads,
    own_device,
    resolve_device,
)
from system.distributed import ProcessError, World
from system.memory import describe_shortage, is_out_of_memory, peak_memory, tune_memory
from system.signals import Interrupted
from system.streams import steady_output
from text.errors import DataError
from training.arguments import Parser, Settings, UsageError, fail
from training.checkpoint import CheckpointError, CheckpointWriter
from training.outputs import claimed
from training.trainer import TrainingError

# Their messages are one line for the user.
EXPECTED = (DataError, DeviceError, TrainingError, CheckpointError, ProcessError, OSError)


class Launch:
    """Run the body of a script: what it raises becomes one line and an exit status.

    Attributes:
        settings: the flags.
        world: the processes of the run, which meet in connect.
        libraries: the memory of the process after connect, before there is a model, in bytes.
        status: the exit status, 0 unless something was raised.

    Raises:
        SystemExit: at once, with status 2, when the command line cannot be read.
    """

    def __init__(self, parser: Parser, presets: dict[str, dict], argv: list[str] | None):
        self.world = World()
        # One process speaks for all before they meet, too. What is wrong here connect raises.
        with contextlib.suppress(ProcessError):
            self.world = World.from_environment()

        parser.is_heard = self.world.is_first
        self.settings: Settings = parser.parse(argv, presets)
        self.libraries = 0
        self.status = 0
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(steady_output())

    def __enter__(self) -> "Launch":
        return self

    def connect(self) -> World:
        """Meet the other processes of the run, on the device that each has.

        Raises:
            UsageError: when flags, devices and processes do not fit together.
            DeviceError, ProcessError: when there is no such device, or processes do not meet.
        """
        settings = self.settings
        self.world = world = World.from_environment()
        try:
            device = resolve_device(settings.device if "device" in settings.given else None)
            world.device = own_device(device, world)
        except ValueError as error:
            raise UsageError(str(error)) from None

        limit_threads()
        if device.type == "cpu":
            tune_memory()

        world.sharding = settings.sharding
        world.timeout = timedelta(minutes=settings.process_timeout)

        # One process speaks for all.
        if not world.is_first:
            silence = self.stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115
            self.stack.enter_context(contextlib.redirect_stdout(silence))

        check_compiler_cache(settings.compile)
        world.connect()
        world.check_same("The flags", shared_flags(settings))
        self.libraries = peak_memory(device)
        return world

    def claim_outputs(self) -> CheckpointWriter:
        """Prove that the files of the run can be written, and keep other runs off them.

        Returns:
            What writes the checkpoints of the run.

        Raises:
            CheckpointError: when they cannot be written, or another run writes them.
        """
        flags = ("checkpoint_path", "metrics_path") if self.world.is_first else ()
        locks = [
            self.stack.enter_context(claimed(Path(getattr(self.settings, flag)), f"--{flag}"))
            for flag in flags
        ]
        writer = CheckpointWriter(Path(self.settings.checkpoint_path), locks)
        self.stack.callback(wait_for_last_write, writer)
        return writer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Print an expected error as one line; raise any other one again."""
        with self.stack:
            is_leaving = error is None
            try:
                if error is None:
                    self.world.disconnect()
                    return False
            except (Exception, KeyboardInterrupt) as lost:
                error = lost

            self.status, message = self.explain(error)
            if message and self.world.is_first_to_fail():
                fail(message)

            # Exit at once: other processes, or a thread of a library, may not answer any more.
            # When leaving them failed, the script may have said `return 0` already.
            may_hang = isinstance(error, ProcessError) or dist.is_initialized()
            if self.world.size > 1 and (is_leaving or may_hang):
                try:
                    self.stack.close()
                    sys.stdout.flush()
                finally:
                    os._exit(self.status)

        return True

    def explain(self, error: BaseException) -> tuple[int, str]:
        """Return the exit status and the line for what ended the script, empty for none.

        Raises any unexpected error again.
        """
        world = self.world
        if isinstance(error, Interrupted):
            return 128 + error.number, ""

        if isinstance(error, KeyboardInterrupt):
            return 130, ""

        if isinstance(error, UsageError):
            return 2, str(error)

        if isinstance(error, EXPECTED):
            return 1, str(error)

        if world.is_lost_process(error):
            return 1, world.describe_lost_process(lambda: False)

        if is_out_of_memory(error):
            return 1, advise_on_memory(error, world.device, self.settings)

        if world.size == 1:
            raise error

        if world.is_first_to_fail():
            traceback.print_exception(error)

        return 1, ""


def wait_for_last_write(writer: CheckpointWriter) -> None:
    """Wait for a checkpoint that is being written; print its failure as a note."""
    try:
        writer.wait()
    except Exception as error:  # whatever it is, what ended the run comes first
        tqdm.write(f"Note:   {error}", file=sys.stderr)


def advise_on_memory(error: BaseException, device: torch.device, settings: Settings) -> str:
    """Return a message that names the flags which save memory."""
    size = settings.batch_size
    shortage = describe_shortage(error, device, f"the model and a batch of {size}")
    cures = ["halve --batch_size and double --gradient_accumulation_steps"] * (size > 1)
    if not getattr(settings, "activation_checkpointing", True):
        cures.append("add --activation_checkpointing")

    cures.append("take a smaller model, or a device with more memory")
    return f"{shortage}; {', or '.join(cures)}."


def shared_flags(settings: Settings) -> dict:
    """Return the arguments that have to be the same on all machines."""
    own = ("device", "num_dataset_processes", "given", "argv")
    return {
        name: value
        for name, value in vars(settings).items()
        if name not in own and not name.endswith("_path")
    }
