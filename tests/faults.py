"""Faults to inject, and what is left of a run afterwards."""

import zlib
from pathlib import Path

import torch
from conftest import SAVE_AT_ONCE

from training import checkpoint
from training.outputs import claimed


def claim(path: Path) -> None:
    """Begin a run, and end it."""
    with claimed(path, "--checkpoint_path"):
        pass


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def with_right_checksum(content: bytes) -> bytes:
    """Give what is in front of the checksum the one that it should have."""
    size = len(checkpoint.checksum_comment(0))
    archive = content[:-size] + checkpoint.NO_COMMENT

    return content[:-size] + checkpoint.checksum_comment(zlib.crc32(archive))


KILL_AT = f"""{SAVE_AT_ONCE}
real = trainer.Trainer.take_step
def take_step(self, step):
    if self.step == {{}}: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, step)
trainer.Trainer.take_step = take_step
"""


SIGNAL_AT = """
real = trainer.Trainer.accumulate_gradient
def accumulate_gradient(self, step):
    if self.step == {}:
        for number in {}: os.kill(os.getpid(), number)
    return real(self, step)
trainer.Trainer.accumulate_gradient = accumulate_gradient
"""


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


class Payload:
    """What is run by whoever unpickles it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments
