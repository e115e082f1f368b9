"""Faults at random moments and in all configurations: a sample here, all by `pytest -m slow`."""

import itertools
import math
import os
import pickle
import posix
import random
import re
import runpy
import shutil
import signal
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_ROWS, assert_same_run
from faults import KILL_AT, Payload, claim, files_in, with_right_checksum
from vocabularies import GPT2_TOKENIZER

from processes import CONTEXT, Group, finished
from text.errors import DataError
from text.preparation import load_or_prepare
from text.sources import TextFiles
from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    previous_path,
    save_checkpoint,
    temporary_path,
)


def sample(few, many):
    """Return a parameter for every run of the tests, and one for slow ones."""
    return [few, pytest.param(many, marks=pytest.mark.slow)]


# --- SIGKILL while saving ---


def save_for_ever(path: Path, begun) -> None:
    generator = torch.Generator().manual_seed(0)

    for number in itertools.count(1):
        weight = torch.randn(1 << 18, generator=generator)
        state = {"format_version": 1, "model": {"weight": weight}, "position": number}
        save_checkpoint(path, state, is_best=number % 3 == 0)
        begun.set()


@pytest.mark.parametrize("number", sample(10, 200))
def test_killed_at_random_moments_of_saving(tmp_path, number):
    """Whatever a move has left is whole, and the next run finds it and clears up."""
    path, moments = tmp_path / "checkpoint.pt", random.Random(0)
    num_cut = 0

    for _ in range(number):
        begun = CONTEXT.Event()
        process = CONTEXT.Process(target=save_for_ever, args=(path, begun))
        process.start()
        assert begun.wait(60)
        # A save takes some hundredths of a second.
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()

        num_cut += temporary_path(path).exists()
        assert load_checkpoint(path, ["model", "position"])["position"] > 0

        if previous_path(path).exists():
            load_checkpoint(previous_path(path), ["model", "position"])

        claim(path)
        assert not any(name.endswith(".tmp") for name in files_in(tmp_path))

    # The moments were those of saving.
    assert num_cut > number // 4


# --- SIGTERM while training ---


@pytest.fixture
def run(small, tmp_path):
    """Return a function that runs pre-training on some processes: 20 updates of 4 batches."""

    def start(size: int, *extra: str, name: str, patch: str = "") -> Group:
        out = tmp_path / name
        flags = ("--gradient_accumulation_steps=4", "--samples_per_epoch=40", "--num_epochs=4")

        return Group(small(*flags, *extra, out=out), size, out, patch=patch)

    return start


@pytest.mark.parametrize("number", sample(2, 12))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_signals_at_random_moments(run, tmp_path, size, number):
    """They come to the processes one after the other, as from torchrun."""
    finished(run(size, name="whole"))
    moments = random.Random(size)

    for _ in range(number):
        shutil.rmtree(tmp_path / "stopped", ignore_errors=True)
        delays = [moments.uniform(0, 0.1) for _ in range(size)]
        patch = f"""
import threading, time
take_step = trainer.Trainer.take_step
def signalled(self, *args):
    if self.step == {moments.randrange(20)}:
        send = lambda: os.kill(os.getpid(), signal.SIGTERM)
        timer = threading.Timer({delays}[rank], send)
        timer.daemon = True
        timer.start()
    # Long enough for the timer.
    time.sleep(0.01)
    return take_step(self, *args)
trainer.Trainer.take_step = signalled
"""
        group = run(size, "--checkpoint_interval=4", name="stopped", patch=patch)
        statuses = group.wait()

        # It may be that all was done by then.
        told = re.search(r"Stopped after update (\d+);", group.output())
        # One whose own signal comes when it has taken leave may end of it.
        assert set(statuses) <= {128 + signal.SIGTERM if told else 0, -signal.SIGTERM}

        if told:
            state = torch.load(group.folder / "checkpoint.pt", weights_only=True)
            assert state["position"] == int(told[1])
            finished(run(size, "--checkpoint_interval=4", "--resume", name="stopped"))

        assert_same_run(tmp_path / "whole" / "checkpoint.pt", group.folder / "checkpoint.pt")


# --- SIGKILL while training ---


# By the number of updates in an epoch.
KILLED_AT = {
    "middle": lambda updates: [updates + updates // 2],
    "boundary": lambda updates: [2 * updates],
    "twice": lambda updates: [updates + 1, 3 * updates],
}

CONFIGURATIONS = [
    (script, precision, size, accumulation, dropout)
    for script in ("pre-train", "fine-tune")
    for precision in ("fp32", "bf16")
    for size in (1, 2, 4)
    for accumulation in (1, 4)
    for dropout in (0.0, 0.1)
]


@pytest.mark.parametrize(
    ("configuration", "place"),
    [
        pytest.param(
            configuration,
            place,
            id="-".join(map(str, (*configuration, place))),
            marks=() if number % 16 == 5 else pytest.mark.slow,
        )
        for number, (configuration, place) in enumerate(
            zip(CONFIGURATIONS, itertools.cycle(KILLED_AT), strict=False)
        )
    ],
)
def test_killed_and_resumed_to_the_same_bits(
    small, base_path, rows_path, tmp_path, configuration, place
):
    """All processes are killed in front of an update, in the middle of an epoch or between two."""
    script, precision, size, accumulation, dropout = configuration
    num_batches = size * accumulation

    if script == "pre-train":
        updates = 5
        argv = small(f"--samples_per_epoch={updates * 2 * num_batches}")
    else:
        # A tenth of the rows is to test on; the last update of an epoch may be a smaller one.
        updates = math.ceil(math.ceil(0.9 * NUM_ROWS) / (2 * num_batches))
        argv = [f"--base_model_path={base_path}", f"--dataset={rows_path}", "--rank=4"]
        argv += ["--batch_size=2", "--checkpoint_interval=1", "--device=cpu", "--seed=7"]
        argv += ["--compile=False"]

    argv += [f"--precision={precision}", f"--gradient_accumulation_steps={num_batches}"]
    argv += [f"--dropout={dropout}", "--num_epochs=4"]
    name = "checkpoint.pt"

    def start(folder: Path, *extra: str, patch: str = "") -> Group:
        paths = (f"--checkpoint_path={folder / name}", f"--metrics_path={folder / 'metrics.csv'}")

        return Group([*argv, *paths, *extra], size, folder, script=script, patch=patch)

    whole = finished(start(tmp_path / "whole"))
    assert whole["position"] == 4 * updates

    for number, step in enumerate(KILLED_AT[place](updates)):
        patch = KILL_AT.format(step)
        group = start(tmp_path / "killed", *(["--resume"] if number else []), patch=patch)
        assert group.wait() == [-signal.SIGKILL] * size

    finished(start(tmp_path / "killed", "--resume"))
    assert_same_run(tmp_path / "whole" / name, tmp_path / "killed" / name)


# --- Damage and malice ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_flipped_bit_of_a_token_file_is_caught(text_folder, tmp_path, split):
    dataset = load_or_prepare(TextFiles(text_folder), tmp_path, GPT2_TOKENIZER, 1)
    path = tmp_path / f"{dataset.name}-{split}.bin"
    content, places = path.read_bytes(), random.Random(0)

    for _ in range(100):
        damaged = bytearray(content)
        damaged[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)

        with pytest.raises(DataError, match=r"is damaged|holds token id"):
            load_or_prepare(TextFiles(text_folder), tmp_path, GPT2_TOKENIZER, 1)

    path.write_bytes(content)
    load_or_prepare(TextFiles(text_folder), tmp_path, GPT2_TOKENIZER, 1)


PAYLOADS = ["system", "posix", "subprocess", "exec", "eval", "open", "runpy", "numpy", "nested"]


def payload_of(name: str, folder: Path, mark: Path) -> Payload:
    """Return what makes a file, the mark, by being unpickled."""
    code = f"open({str(mark)!r}, 'w').close()"
    shell = f"touch '{mark}'"
    script, array = folder / "script.py", folder / "array.npy"
    script.write_text(code)
    np.save(array, np.array([Payload(os.system, shell)], dtype=object))

    return {
        "system": Payload(os.system, shell),
        "posix": Payload(posix.system, shell),
        "subprocess": Payload(subprocess.getoutput, shell),
        "exec": Payload(exec, code),
        "eval": Payload(eval, f"open({str(mark)!r}, 'w')"),
        "open": Payload(open, str(mark), "w"),
        "runpy": Payload(runpy.run_path, str(script)),
        "numpy": Payload(np.load, str(array), None, True),
        "nested": Payload(OrderedDict, [("key", Payload(exec, code))]),
    }[name]


CONTAINERS = {
    "archive": lambda path, payload: save_checkpoint(path, {"format_version": 1, "x": payload}),
    "key": lambda path, payload: save_checkpoint(path, {"format_version": 1, (payload,): 1}),
    "bare": save_checkpoint,
    "old": lambda path, payload: torch.save(payload, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "summed": lambda path, payload: path.write_bytes(
        with_right_checksum(pickle.dumps(payload) + checkpoint.checksum_comment(0))
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_is_run(tmp_path, name, container):
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "mark"
    payload = payload_of(name, tmp_path, mark)
    CONTAINERS[container](path, payload)

    with pytest.raises(CheckpointError, match="is not a checkpoint") as failure:
        load_checkpoint(path, ["model"])

    assert "weights_only" not in str(failure.value)
    assert not mark.exists()

    # The control: it would have worked.
    pickle.loads(pickle.dumps(payload))
    assert mark.exists()
