"""Surroundings that are broken or unusual: the right thing is blamed, or it works all the same."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch
from faults import read
from vocabularies import GPT2_TOKENIZER

from text import preparation, workers
from text.errors import DataError
from text.preparation import load_or_prepare
from text.sources import TextFiles

GENERATE = ["--prompt=a", "--max_tokens=2", "--device=cpu", "--precision=fp32"]


@pytest.mark.parametrize("compiles", [False, True])
def test_cache_of_the_compiler_that_cannot_be_made(small, tmp_path, compiles):
    (tmp_path / "file").write_text("")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    argv = small("--num_epochs=1", f"--compile={compiles}")
    status, output, errors = finish(launch(argv, env=env))

    assert status == 0, errors
    assert ("TORCHINDUCTOR_CACHE_DIR" in output) == compiles
    assert ("fp32, compiled," in output) == compiles

    path = f"--checkpoint_path={tmp_path / 'checkpoint.pt'}"
    status, _, errors = finish(launch([path, *GENERATE], env=env, script="generate"))
    assert status == 0, errors


def test_where_processes_share_no_locks_one_tokenizes(text_folder, tmp_path, monkeypatch, capsys):
    """As where /dev/shm cannot be written."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preparation, "MIN_SIZE_PER_PROCESS", 1)
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    dataset = load_or_prepare(TextFiles(text_folder), tmp_path, GPT2_TOKENIZER, 2)

    assert len(dataset.train) > 1000
    assert "Note:   a single process tokenizes; processes cannot share" in capsys.readouterr().err
    assert not workers.can_share_locks()


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """An administrator may read all, so the system's answer is put in its place."""
    (tmp_path / "a" / "private").mkdir(parents=True)
    (tmp_path / "a" / "text.txt").write_text("text")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", os.fspath(path))

        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"/a/private cannot be read: Permission denied\.$"):
        TextFiles(tmp_path).listing()


def test_error_behind_a_progress_bar_has_its_own_line_in_a_log(pre_train, small, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "short.txt").write_text("short")

    assert pre_train.main(small(dataset=tmp_path / "text")) == 1
    assert "\nerror: text-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "env"),
    [(["-OO"], {}), ([], {"PYTHONSAFEPATH": "1"})],
    ids=["without docstrings", "safe path"],
)
def test_python_with_other_options(small, options, env):
    for script in ("pre-train", "fine-tune", "generate", "convert"):
        command = [sys.executable, *options, str(ROOT / f"{script}.py"), "--help"]
        environment = {**os.environ, **env}
        output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert b"usage: " in output

    argv = [sys.executable, *options, str(ROOT / "pre-train.py"), *small("--num_epochs=1")]
    subprocess.run(argv, env=environment, capture_output=True, check=True)


def test_closed_streams(small, tmp_path):
    """What is opened next would have their numbers, and what is printed."""
    checkpoint = f"--checkpoint_path={tmp_path / 'checkpoint.pt'}"
    arguments = [
        [str(ROOT / "pre-train.py"), *small("--num_epochs=1")],
        [str(ROOT / "generate.py"), checkpoint, *GENERATE],
        [str(ROOT / "generate.py"), checkpoint, *GENERATE[1:]],
    ]
    for argv in arguments:
        command = shlex.join([sys.executable, *argv])
        subprocess.run(f"{command} <&- >&- 2>&-", shell=True, check=True)

    assert read(tmp_path / "checkpoint.pt")["position"] == 3


def test_run_in_a_thread(pre_train, small, tmp_path):
    """Only the main thread may ask for signals."""
    with ThreadPoolExecutor() as pool:
        assert pool.submit(pre_train.main, small("--num_epochs=1")).result() == 0

    assert read(tmp_path / "checkpoint.pt")["position"] == 3
