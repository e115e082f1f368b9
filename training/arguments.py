"""Parses the command line: presets, types of values, and the flags that scripts share.

Nothing here imports torch: a wrong flag is reported at once.
"""

import argparse
import codecs
import difflib
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from system.streams import open_closed_streams


class UsageError(ValueError):
    """Arguments do not fit together, or do not fit the files that they name."""


class Settings(argparse.Namespace):
    """The values of all arguments. They are settled once: `replace` makes other settings.

    Attributes:
        given: the names of the arguments that the command line gave, as a set.
        argv: the command line.
    """

    def __init__(self, **values):
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Settings do not change, {name} was assigned to.")

    def replace(self, **changes) -> "Settings":
        return Settings(**{**vars(self), **changes})

    def select(self, names: Iterable[str]) -> dict:
        """Return some of the values by their names."""
        return {name: getattr(self, name) for name in names}


class Parser(argparse.ArgumentParser):
    """A parser that knows presets and answers a mistake in one line, with exit status 2."""

    # False in all but one of the processes of a run.
    is_heard = True

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def parse(self, argv: list[str] | None, presets: dict[str, dict] | None = None) -> Settings:
        """Read the arguments: given ones win over those of `--preset`, and these over defaults."""
        open_closed_streams()

        # A path may hold bytes that no terminal can show.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

        dests = [action.dest for action in self._actions if action.dest != "help"]
        parsed, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(dests)))
        if unknown:
            self.reject_unknown(unknown)

        given = {dest: value for dest, value in vars(parsed).items() if value is not None}
        defaults = {dest: self.get_default(dest) for dest in dests}
        preset = presets[given["preset"]] if presets and "preset" in given else {}
        argv = sys.argv[1:] if argv is None else argv
        return Settings(**{**defaults, **preset, **given}, given=frozenset(given), argv=[*argv])

    def reject_unknown(self, unknown: list[str]) -> None:
        flag = unknown[0].split("=")[0]
        flags = [option for action in self._actions for option in action.option_strings]
        known = [option for option in flags if option.startswith(flag)]
        known = known or difflib.get_close_matches(flag, flags, n=1)
        hint = f"; did you mean {' or '.join(known)}?" if known and flag != "--" else ""

        self.error(f"unknown argument {unknown[0]}{hint}")

    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')}\n" if self.is_heard else None)


def add_flag(add: Callable, name: str, default: bool, text: str) -> None:
    """Add an argument that is True, False, or True when it is named alone."""
    add(name, type=parse_bool, nargs="?", const=True, default=default, help=text)


def add_seed(add: Callable) -> None:
    add("--seed", type=seed_int, help="Seed of all random numbers; None draws one.")


def add_recipe(parser: Parser) -> Callable:
    """Add the group of flags that decide what is learned; return what adds more to it."""
    add = parser.add_argument_group("recipe").add_argument
    add("--batch_size", type=positive_int, default=4, help="Samples in a micro-batch.")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=32,
        help="Micro-batches in an update, of all processes together.",
    )
    add(
        "--optimizer",
        choices=["adamw", "muon"],
        default="muon",
        help="adamw, or muon for the hidden matrices with adamw for the rest.",
    )
    add(
        "--max_gradient_norm",
        type=positive_float,
        default=1.0,
        help="Clip the norm of the gradient to this.",
    )
    add("--learning_rate", type=positive_float, default=5e-4, help="Peak of the learning rate.")
    add_seed(add)
    return add


def add_run(
    parser: Parser,
    formatted: str,
    *,
    checkpoint_path: str,
    metrics_path: str,
    eval_interval: int,
    checkpoint_interval: int,
) -> Callable:
    """Add the group of flags that decide where, when and how a run works; return what adds more.

    Args:
        formatted: what has the number format; the others are defaults.
    """
    add = parser.add_argument_group("run").add_argument
    add(
        "--checkpoint_path",
        type=path_str,
        default=checkpoint_path,
        help="Where the checkpoint is saved.",
    )
    add(
        "--metrics_path",
        type=path_str,
        default=metrics_path,
        help="Table of metrics, one row an epoch.",
    )
    add("--eval_interval", type=positive_int, default=eval_interval, help="Epochs between tests.")
    add(
        "--checkpoint_interval",
        type=positive_int,
        default=checkpoint_interval,
        help="Epochs between checkpoints.",
    )
    add_flag(add, "--resume", False, "Resume from the checkpoint.")
    add_device(add, formatted)
    add_flag(add, "--compile", True, "Compile the network, where a compiler works.")
    add(
        "--sharding",
        choices=["optimizer", "full"],
        default="optimizer",
        help="What processes shard: the optimizer state (ZeRO-1), or full: weights and gradients"
        " too (FSDP).",
    )
    add(
        "--process_timeout",
        type=minutes_float,
        default=10.0,
        help="Minutes to wait for a process that does not answer.",
    )
    return add


def add_device(add: Callable, formatted: str) -> None:
    """Add where to compute, and in which number format.

    Args:
        formatted: what has that format.
    """
    add("--device", default="cuda", help="Where to compute: cuda, cuda:N, mps or cpu.")
    add(
        "--precision",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help=f"Number format of {formatted}; auto takes what is fast on the device.",
    )


def check_accumulation(settings: Settings, num_processes: int) -> None:
    """Raise UsageError when an update has no batch for every process."""
    if settings.gradient_accumulation_steps < num_processes:
        raise UsageError(
            f"--gradient_accumulation_steps must be at least {num_processes}, one batch for each"
            f" process; {settings.gradient_accumulation_steps} given"
        )


def parse_bool(value: str) -> bool:
    """Read True or False, also as yes, no, 1 or 0."""
    if value.lower() in ("true", "yes", "1"):
        return True

    if value.lower() in ("false", "no", "0"):
        return False

    raise argparse.ArgumentTypeError(f"must be True or False, {value} given")


def path_str(value: str) -> str:
    """Put the user's home in the place of ~, which no shell does behind an equals sign."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        name = path.split("/")[0]
        raise argparse.ArgumentTypeError(f"{name} is no home of a user; ./{name} is a folder")

    return path


def encoding_str(value: str) -> str:
    """Read the name of an encoding of text that Python has."""
    try:
        "".encode(value)
        name = codecs.lookup(value).name
    except LookupError:
        raise argparse.ArgumentTypeError(
            f"{value} is no encoding of text; some are cp1252, gb18030, shift_jis, koi8-r"
        ) from None

    # A mark at the beginning is no text.
    return "utf-8-sig" if name == "utf-8" else name


def positive_int(value: str) -> int:
    return parse_number(int, value, lambda number: number > 0, "a whole number above 0")


def non_negative_int(value: str) -> int:
    return parse_number(int, value, lambda number: number >= 0, "a whole number from 0")


def seed_int(value: str) -> int:
    return parse_number(
        int, value, lambda number: 0 <= number < 2**63, "a whole number from 0 to 2**63 - 1"
    )


def vocabulary_int(value: str) -> int:
    return parse_number(
        int, value, lambda number: 257 <= number <= 65536, "a whole number from 257 to 65536"
    )


def positive_float(value: str) -> float:
    return parse_number(float, value, lambda number: 0 < number < math.inf, "a number above 0")


def non_negative_float(value: str) -> float:
    return parse_number(float, value, lambda number: 0 <= number < math.inf, "a number from 0")


def minutes_float(value: str) -> float:
    return parse_number(
        float, value, lambda number: 0 < number <= 525_600, "above 0 and at most a year, 525600"
    )


def share_float(value: str) -> float:
    return parse_number(float, value, lambda number: 0 < number <= 1, "above 0 and at most 1")


def dropout_float(value: str) -> float:
    return parse_number(float, value, lambda number: 0 <= number < 1, "from 0 to below 1")


def parse_number(kind: type, value: str, is_valid: Callable, description: str):
    try:
        number = kind(value)
    except ValueError:
        number = math.nan

    if not is_valid(number):
        raise argparse.ArgumentTypeError(f"must be {description}, {value} given")

    return number


def command(script: str, *arguments: str) -> str:
    """Return a command line to copy, which runs a script of this repository from where one is."""
    path = Path(__file__).parents[1] / script
    if path.parent == Path.cwd():
        path = Path(script)

    return shlex.join(["python", str(path), *arguments])


def fail(message: object, status: int = 1) -> int:
    """Print one line on standard error and return the exit status."""
    print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    return status
