"""Checkpoints: whole or absent, whatever happens to the process or to the file."""

import contextlib
import errno
import lzma
import os
import random
import struct
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, launch
from faults import claim, files_in

from data import Corpus
from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    best_path,
    build_model,
    load_checkpoint,
    merge_lora_checkpoint,
    previous_path,
    save_checkpoint,
    temporary_path,
)
from training.outputs import claimed, set_aside


def state_of(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)

    return {
        "format_version": 1,
        "model": {"weight": torch.randn(64, 64, generator=generator)},
        "position": number,
        "metrics": [{"test_loss": None, "train_loss": 0.5}],
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state_of(1))

    return path


def load(path: Path) -> dict:
    return load_checkpoint(path, ["model", "position"])


def test_what_is_saved_is_loaded(path):
    state = load(path)

    assert torch.equal(state["model"]["weight"], state_of(1)["model"]["weight"])
    assert {**state, "model": None} == {**state_of(1), "model": None}
    assert files_in(path.parent) == ["checkpoint.pt"]


def test_checkpoint_stays_an_ordinary_file_of_torch(path):
    assert torch.load(path, weights_only=True)["position"] == 1
    assert torch.load(path, weights_only=True, mmap=True)["position"] == 1
    assert "archive/data.pkl" in zipfile.ZipFile(path).namelist()
    # What others save keeps its checksums.
    assert torch.serialization.get_crc32_options()


def test_last_previous_and_best_stay_side_by_side(path):
    save_checkpoint(path, state_of(2), is_best=True)
    save_checkpoint(path, state_of(3))

    assert [load(p)["position"] for p in (path, previous_path(path), best_path(path))] == [3, 2, 2]
    assert files_in(path.parent) == ["checkpoint.best.pt", "checkpoint.previous.pt", path.name]


def test_file_system_without_links(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(path, state_of(2), is_best=True)

    assert [load(p)["position"] for p in (path, previous_path(path), best_path(path))] == [2, 1, 2]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(path, share):
    save_checkpoint(path, state_of(2))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(CheckpointError, match=r"is damaged.*checkpoint\.previous\.pt is there"):
        load(path)

    assert load(previous_path(path))["position"] == 1


def test_empty_file_is_refused(path):
    path.write_bytes(b"")

    with pytest.raises(CheckpointError, match="is damaged"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [bytes(5000), b"<!DOCTYPE html><html>404</html>" * 50, struct.pack("<2000H", *range(2000))],
    ids=["zeros", "html", "tokens"],
)
def test_foreign_file_is_refused(path, content):
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(path)


def test_every_flipped_bit_is_caught(path):
    content = path.read_bytes()
    generator = random.Random(0)
    places = {generator.randrange(len(content)) for _ in range(100)} | {0, len(content) - 1}

    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)

        with pytest.raises(CheckpointError, match=r"is damaged|is not a checkpoint"):
            load(path)

    path.write_bytes(content)
    assert load(path)["position"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("format_version"), "no format_version"),
        (lambda state: state.update(format_version=2), "has format 2, this version reads 1"),
        (lambda state: state.pop("position"), "it has no position"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(path, change, message):
    state = state_of(1)
    change(state)
    save_checkpoint(path, state)

    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.fixture
def version_1(tmp_path):
    """A model and its adapter, both in the middle of their runs, as format version 1 wrote them.

    They are of 3 epochs of 3 updates that a signal has stopped after the fourth, and of 9 updates;
    tables of tokens hold few values, so that they are small when packed.
    """
    for name in ("model", "lora"):
        content = lzma.decompress(
            (ROOT / "tests" / "fixtures" / f"{name}-version-1.pt.xz").read_bytes()
        )
        (tmp_path / f"{name}.pt").write_bytes(content)

    return tmp_path / "model.pt", tmp_path / "lora.pt"


def test_version_1_is_read(version_1):
    model_path, lora_path = version_1
    model = build_model(
        load_checkpoint(model_path, ("model_args", "model", "encoding")), model_path
    )
    tokens = torch.arange(1, 18)[None] * 1000
    loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    lora = load_checkpoint(lora_path, ("lora_args", "lora", "base"))
    merge_lora_checkpoint(model, lora, lora_path)

    assert loss == pytest.approx(9.53875, abs=1e-4)
    assert model(tokens[:, :-1], tokens[:, 1:]).item() != loss


def test_version_1_is_gone_on_with(version_1, pre_train, small, monkeypatch, capsys):
    model_path, _ = version_1
    # Text is told apart by its place, which is another one here.
    saved = torch.load(model_path, weights_only=True)["dataset"]
    monkeypatch.setattr(Corpus, "fingerprint", saved)
    flags = ["--block_size=64", "--embedding_dimensions=4", "--num_hidden_layers=1"]
    argv = small(*flags, "--dropout=0.1", f"--checkpoint_path={model_path}", "--resume")

    assert pre_train.main(argv) == 0
    assert "Resume: epoch 2, update 4" in capsys.readouterr().out

    state = torch.load(model_path, weights_only=True)
    assert state["position"] == 9
    assert len(state["metrics"]) == 3


def test_bare_weights_are_refused(path):
    save_checkpoint(path, torch.randn(3))

    with pytest.raises(CheckpointError, match="no format_version"):
        load(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        load(tmp_path / "checkpoint.pt")

    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        load(tmp_path)


def test_full_disk_leaves_everything_as_it_was(path):
    """A limit on the size of files stands for the disk; it takes a process of its own."""
    before = path.read_bytes()
    patch = f"""
import resource, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save_checkpoint(Path({str(path)!r}), {{"format_version": 1, "x": torch.randn(9999)}})
except checkpoint.CheckpointError as error:
    print(error)
sys.exit()
"""
    status, output, _ = finish(launch([], patch))

    assert status == 0
    assert "could not be saved: File too large. Earlier checkpoints are untouched" in output
    assert path.read_bytes() == before
    assert files_in(path.parent) == [path.name]


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.link", "os.replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_saving(path, place, when):
    """SIGKILL in front of and behind every move of a save."""
    module, name = place.split(".")
    patch = f"""
import torch
from pathlib import Path
path = Path({str(path)!r})
real = {module}.{name}
def move(*args, **kwargs):
    if {when == "after"}: real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{name} = move
checkpoint.save_checkpoint(path, {{"format_version": 1, "model": {{}}, "position": 2}})
"""
    status, _, _ = finish(launch([], patch))

    assert status == -9
    assert load(path)["position"] in (1, 2)

    claim(path)
    save_checkpoint(path, state_of(3))
    assert load(path)["position"] == 3
    assert set(files_in(path.parent)) <= {path.name, previous_path(path).name}


def test_output_folder_is_made_and_proved(tmp_path):
    path = tmp_path / "a" / "b" / "checkpoint.pt"
    claim(path)

    assert files_in(path.parent) == []

    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"file/checkpoint\.pt cannot be written: (Not|File)"):
        claim(tmp_path / "file" / "checkpoint.pt")

    with pytest.raises(CheckpointError, match="cannot be written: Is a directory"):
        claim(tmp_path)


def test_what_a_killed_run_has_left_is_removed(path):
    temporary_path(path).write_bytes(b"half")
    claim(path)

    assert files_in(path.parent) == [path.name]


def test_what_another_run_is_writing_is_left_alone(path):
    with claimed(path, "--checkpoint_path"):
        temporary_path(path).write_bytes(b"half")

        with pytest.raises(CheckpointError, match="another --checkpoint_path"):
            claim(path)

        assert temporary_path(path).read_bytes() == b"half"


def test_earlier_run_is_set_aside(path):
    aside = set_aside(path)

    assert not path.exists()
    assert load(aside)["position"] == 1
    assert set_aside(path) is None


# --- Behind the next steps ---


@pytest.fixture
def writer(path):
    writer = CheckpointWriter(path)
    yield writer
    writer.executor.shutdown()


def held_back(monkeypatch, place: str):
    """Let a function wait until it is told; return what tells it."""
    release = threading.Event()
    real = getattr(checkpoint, place)

    def wait(*args):
        assert release.wait(60)

        return real(*args)

    monkeypatch.setattr(checkpoint, place, wait)

    return release


def test_what_is_written_is_what_was_saved(writer, path, monkeypatch):
    """However much of it the next steps have changed meanwhile."""
    release = held_back(monkeypatch, "save_checkpoint")
    state = {**state_of(2), "optimizer": [{"state": {0: torch.zeros(3)}}]}
    writer.save(state)
    state["model"]["weight"].zero_()
    state["optimizer"][0]["state"][0] += 1
    state["metrics"].append({})

    assert load(path)["position"] == 1

    release.set()
    writer.wait()
    saved = load(path)

    assert torch.equal(saved["model"]["weight"], state_of(2)["model"]["weight"])
    assert torch.equal(saved["optimizer"][0]["state"][0], torch.zeros(3))
    assert saved["metrics"] == state_of(2)["metrics"]


def test_checkpoints_are_written_one_after_the_other(writer, path):
    for number in range(2, 12):
        writer.save(state_of(number), is_best=number == 7)

    writer.wait()

    places = (path, previous_path(path), best_path(path))
    assert [load(place)["position"] for place in places] == [11, 10, 7]


@pytest.fixture
def full_disk():
    """A context in which nothing can be saved."""

    @contextlib.contextmanager
    def full(writer):
        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as context:
            context.setattr(os, "fsync", refuse)
            yield
            writer.executor.submit(lambda: None).result()

    return full


@pytest.mark.parametrize("last", ["save", "wait"])
def test_a_save_that_failed_is_told_at_the_next_move(writer, full_disk, last):
    with full_disk(writer):
        writer.save(state_of(2))

        with pytest.raises(CheckpointError, match="could not be saved: No space left"):
            writer.wait() if last == "wait" else writer.save(state_of(3))

    writer.wait()
    assert load(writer.path)["position"] == 1


def test_a_save_that_failed_is_made_up_for(writer, full_disk):
    with full_disk(writer):
        writer.save(state_of(2))

    assert writer.has_failed

    writer.save(state_of(3))

    assert not writer.has_failed
    assert load(writer.path)["position"] == 3


def test_where_memory_is_short_nothing_is_copied(writer, path, monkeypatch):
    state = state_of(2)
    monkeypatch.setattr(checkpoint, "copy_to_cpu", None)
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 2 * 64 * 64 * 4)
    writer.save(state)

    assert load(path)["position"] == 2


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 8000 * 1024),
        ({"a/b": ("5000000", 4000000, 500000), "a": ("max", 9, 0)}, 1500000),
        ({"a/b": ("max", 4000000, 0), "a": ("7000000", 6000000, 0)}, 1000000),
        ({"": ("3000000", 1000000, 0)}, 2000000),
    ],
)
def test_available_memory_is_that_of_the_narrowest_group(monkeypatch, tmp_path, groups, expected):
    files = {
        "/proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n",
        "/proc/self/cgroup": "1:name=x:/y\n0::/a/b\n",
    }

    for name, (limit, used, cached) in groups.items():
        folder = Path("/sys/fs/cgroup") / name
        files[str(folder / "memory.max")] = limit
        files[str(folder / "memory.current")] = str(used)
        files[str(folder / "memory.stat")] = f"anon 5\ninactive_file {cached}\n"

    def read_text(path):
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError from None

    monkeypatch.setattr(Path, "read_text", read_text)

    assert checkpoint.available_memory() == expected


def test_killed_while_writing_behind(path):
    """The process that dies has gone on already."""
    patch = f"""
import threading
from pathlib import Path
begun = threading.Event()
def wait(*_):
    begun.set()
    threading.Event().wait()
os.fsync = wait
writer = checkpoint.CheckpointWriter(Path({str(path)!r}))
writer.save({{"format_version": 1, "model": {{}}, "position": 2}})
begun.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
    status, _, _ = finish(launch([], patch))

    assert status == -9
    assert load(path)["position"] == 1
    assert temporary_path(path).exists()
