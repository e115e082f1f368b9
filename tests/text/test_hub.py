"""Datasets of the Hub, by the real client from a server on loopback that can fail in every way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch
from hub_server import CONVERTED_COMMIT, parquet, serve
from token_folders import contents, documents_in

from text.hub import DamagedDownloadError, check_download, is_passing

TEXTS = [f"document {row} of the web, {'word ' * (row % 50)}" for row in range(90)]
SHARDS = {
    f"plain_text/train-{i:05d}-of-00003.parquet": parquet(TEXTS[30 * i : 30 * i + 30])
    for i in range(3)
}
SECOND = list(SHARDS)[1]
CONFIGS = """---
configs:
- config_name: large
  data_files: [{split: train, path: large/*}]
- config_name: small
  data_files: [{split: train, path: small/*}, {split: test, path: test/*}]
---
"""

SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from text import hub, preparation, sources
from text.tokenizer import gpt2_tokenizer

hub.RETRY_PAUSES = hub.FIRST_RETRY_PAUSES = (0.01, 0.02, 0.04)
preparation.MIN_SIZE_PER_PROCESS = 1
preparation.UNIT_SIZE = 1
# The client itself waits a second before it asks for the rest of a file.
time.sleep = lambda seconds: None

# Faults

if __name__ == "__main__":
    source, _ = sources.parse_source(sys.argv[1])

    try:
        tokenizer = gpt2_tokenizer()
        preparation.load_or_prepare(source, Path(sys.argv[2]), tokenizer, int(sys.argv[3]))
    except preparation.DataError as error:
        sys.exit(f"error: {{error}}")
"""


def prepare(source: str, folder: Path, endpoint: str, num_processes: int = 1, patch: str = ""):
    """Prepare in a new process, with a cache of its own: the client reads its settings once.

    Args:
        patch: Python statements that inject a fault.
    """
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
    script = folder / "prepare.py"
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT.replace("# Faults", patch))

    return subprocess.run(
        [sys.executable, script, source, folder / "dataset", str(num_processes)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def prepared_documents(folder: Path) -> list[str]:
    return sorted(text for path in folder.glob("dataset/*.bin") for text in documents_in(path))


# Tells what is on the disk whenever a reader has been opened.
LISTING = """
from text import readers
init = readers.Reader.__init__
def listed(self, file, *args):
    init(self, file, *args)
    parts = Path(sys.argv[2]).glob("*.parts/*.download/**/*.parquet")
    print("on the disk:", *[path.name for path in parts], flush=True)
readers.Reader.__init__ = listed
"""


def test_a_vocabulary_is_trained_on_the_first_files_of_the_hub_and_these_go(tmp_path):
    own = (
        "from text import vocabulary\n"
        "vocabulary.SAMPLE_SIZE = 1000\n"
        "source, _ = sources.parse_source(sys.argv[1])\n"
        "gpt2_tokenizer = lambda: vocabulary.open_tokenizer([source], Path(sys.argv[2]), 280)\n"
    )
    with serve("Skylion007/openwebtext", SHARDS) as (endpoint, requests):
        result = prepare("openwebtext", tmp_path, endpoint, 1, own)

    assert result.returncode == 0, result.stderr
    first, second, third = (sum("resolve" in r and n in r for r in requests) for n in SHARDS)
    assert first == 2 * second == 2 * third > 0
    names = [path.name for path in (tmp_path / "dataset").iterdir()]
    assert "openwebtext.280.vocabulary" in names
    assert sum(name.startswith("openwebtext.bpe-280-") for name in names) == len(names) - 1 == 4

    # Once it is there, the Hub is not asked for it again.
    result = prepare("openwebtext", tmp_path, "http://127.0.0.1:9", 1, own)
    assert result.returncode == 0, result.stderr


def test_openwebtext_is_downloaded_one_shard_at_a_time(tmp_path):
    with serve("Skylion007/openwebtext", SHARDS) as (endpoint, _):
        for num_processes in (1, 2):
            folder = tmp_path / str(num_processes)
            result = prepare("openwebtext", folder, endpoint, num_processes, LISTING)
            lines = [line for line in result.stdout.splitlines() if line.startswith("on the disk")]

            assert result.returncode == 0, result.stderr
            assert len(lines) == 3
            assert all(1 <= line.count(".parquet") <= num_processes for line in lines)

    assert contents(tmp_path / "1" / "dataset") == contents(tmp_path / "2" / "dataset")
    assert prepared_documents(tmp_path / "1") == sorted(TEXTS)

    sidecar = json.loads((tmp_path / "1" / "dataset" / "openwebtext.json").read_text())
    assert sidecar["source"] == "Skylion007/openwebtext"
    assert sidecar["revision"] == "0" * 40
    assert not list(tmp_path.rglob("*.parquet")), "files were kept on the disk"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()),
        ("data.csv", b"text\n" + "\n".join(f'"{text}"' for text in TEXTS).encode()),
    ],
)
def test_other_formats(tmp_path, name, content):
    with serve("someone/texts", {name: content}) as (endpoint, _):
        result = prepare("someone/texts", tmp_path, endpoint)

    assert result.returncode == 0, result.stderr
    assert prepared_documents(tmp_path) == sorted(TEXTS)


def test_a_configuration_is_chosen_by_its_name(tmp_path):
    files = {
        "README.md": CONFIGS.encode(),
        "large/a.parquet": parquet(TEXTS),
        "small/a.parquet": parquet(TEXTS[:40]),
        "test/a.parquet": parquet(TEXTS[40:]),
    }

    with serve("someone/texts", files) as (endpoint, _):
        result = prepare("someone/texts:small", tmp_path, endpoint)
        unnamed = prepare("someone/texts", tmp_path / "unnamed", endpoint)
        wrong = prepare("someone/texts:medium", tmp_path / "wrong", endpoint)

    assert result.returncode == 0, result.stderr
    assert prepared_documents(tmp_path) == sorted(TEXTS[:40])
    assert "large" in unnamed.stderr
    assert "small" in unnamed.stderr
    assert "medium" in wrong.stderr


@pytest.mark.parametrize("folder", ["train", "partial-train"])
def test_a_loading_script_is_not_run_its_conversion_is_taken(tmp_path, folder):
    files = {"README.md": b"", "openwebtext.py": b"raise SystemExit('run')"}
    converted = {
        f"plain_text/{folder}/000{i}.parquet": content for i, content in enumerate(SHARDS.values())
    }

    with serve("Skylion007/openwebtext", files, converted) as (endpoint, _):
        result = prepare("openwebtext", tmp_path, endpoint)

    assert result.returncode == 0, result.stderr
    assert prepared_documents(tmp_path) == sorted(TEXTS)
    assert "holds a loading script, which is not run" in result.stdout
    assert ("partial" in result.stdout) == (folder == "partial-train")

    sidecar = json.loads((tmp_path / "dataset" / "openwebtext.json").read_text())
    assert sidecar["revision"] == f"refs/convert/parquet@{CONVERTED_COMMIT}"


def test_a_script_with_several_configurations_asks_for_one(tmp_path):
    converted = {f"{name}/train/0000.parquet": parquet(TEXTS) for name in ("large", "small")}

    with serve("someone/texts", {"texts.py": b""}, converted) as (endpoint, _):
        result = prepare("someone/texts", tmp_path, endpoint)
        chosen = prepare("someone/texts:small", tmp_path / "chosen", endpoint)

    assert "its configurations are large, small" in result.stderr
    assert "--dataset=someone/texts:NAME" in result.stderr
    assert chosen.returncode == 0, chosen.stderr


@pytest.mark.parametrize(
    ("fault", "num_lines"),
    [
        ("500", 2),
        # The client itself asks for the rest.
        ("cut", 0),
        # The first answer, of two, is about the file, and holds nothing of it.
        ("damage", 1),
    ],
)
def test_a_network_that_fails_twice_is_waited_for(tmp_path, fault, num_lines):
    def fail_twice(path: str, number: int) -> str | None:
        return fault if path == SECOND and number <= 2 else None

    with serve("Skylion007/openwebtext", SHARDS, fault=fail_twice) as (endpoint, _):
        result = prepare("openwebtext", tmp_path, endpoint)

    assert result.returncode == 0, result.stderr
    assert prepared_documents(tmp_path) == sorted(TEXTS)
    assert result.stderr.count("again in") == num_lines


@pytest.mark.parametrize(
    ("fault", "message"),
    [("500", "500"), ("cut", "708"), ("damage", "checksum")],
)
def test_a_network_that_stays_broken_is_one_line_and_then_goes_on(tmp_path, fault, message):
    is_broken = True

    def fail(path: str, _) -> str | None:
        return fault if path == SECOND and is_broken else None

    with serve("Skylion007/openwebtext", SHARDS, fault=fail) as (endpoint, requests):
        result = prepare("openwebtext", tmp_path, endpoint)
        error = result.stderr.splitlines()[-1]

        assert result.returncode == 1
        assert error.startswith(f"error: Skylion007/openwebtext/{SECOND}")
        assert message in error
        assert "Traceback" not in result.stderr
        assert not list((tmp_path / "dataset").glob("*.bin"))
        assert not list(tmp_path.rglob("*.parquet"))

        is_broken = False
        requests.clear()
        again = prepare("openwebtext", tmp_path, endpoint)

    assert again.returncode == 0, again.stderr
    assert "going on with 1 parts" in again.stdout
    assert not any(list(SHARDS)[0] in request for request in requests), "downloaded twice"
    assert prepared_documents(tmp_path) == sorted(TEXTS)


# The process is killed when the second file is on the disk.
KILL_IN_SHARD = """
from text import hub
check_download = hub.check_download
def killed(path, digest):
    if "00001-of" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    check_download(path, digest)
hub.check_download = killed
"""


def test_the_download_of_a_killed_preparation_is_removed(tmp_path):
    with serve("Skylion007/openwebtext", SHARDS) as (endpoint, requests):
        killed = prepare("openwebtext", tmp_path, endpoint, patch=KILL_IN_SHARD)
        left = list((tmp_path / "dataset").rglob("*.parquet"))
        # Another process was killed in the third file.
        stray = tmp_path / "dataset" / "openwebtext.parts" / "00000002.download"
        stray.mkdir()
        (stray / "stray.parquet").touch()
        requests.clear()
        again = prepare("openwebtext", tmp_path, endpoint, patch=LISTING)

    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in left] == [SECOND.split("/")[1]]
    assert again.returncode == 0, again.stderr
    assert "going on with 1 parts" in again.stdout
    assert not any(list(SHARDS)[0] in request for request in requests), "downloaded twice"
    assert re.findall("on the disk: (.*)", again.stdout) == [
        path.split("/")[1] for path in list(SHARDS)[1:]
    ]
    assert prepared_documents(tmp_path) == sorted(TEXTS)


def test_downloads_of_workers_that_are_given_up_are_removed(tmp_path):
    """One process waits behind its download while another one fails."""
    pause = """
from text import hub
hub.check_download = lambda path, digest: signal.pause()
"""
    first = list(SHARDS)[0]

    def fail(path: str, _) -> str | None:
        while path == first and not list((tmp_path / "dataset").rglob("*00001-of*.parquet")):
            threading.Event().wait(0.01)

        return "500" if path == first else None

    with serve("Skylion007/openwebtext", SHARDS, fault=fail) as (endpoint, _):
        result = prepare("openwebtext", tmp_path, endpoint, 2, pause)

    assert result.stderr.splitlines()[-1].startswith(f"error: Skylion007/openwebtext/{first}")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_disk_that_is_full_of_downloads_is_one_line(tmp_path, num_processes):
    """Files may not grow beyond a limit, which stands in for the disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))"
    files = {"a.parquet": parquet(TEXTS), "b.parquet": parquet([random_text(1 << 17)])}

    with serve("someone/texts", files) as (endpoint, _):
        result = prepare("someone/texts", tmp_path, endpoint, num_processes, limit)

    error = result.stderr.splitlines()[-1]

    assert result.returncode == 1
    assert "cannot be written: File too large. Make room; what is whole is kept" in error
    assert "again in" not in result.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def random_text(size: int) -> str:
    return random.Random(0).randbytes(size).hex()


def test_what_a_restart_goes_on_with_is_the_revision_it_began_with(tmp_path):
    """Between two attempts the dataset changes; the first one's files are still asked for."""

    def fail(path: str, _) -> str | None:
        return "500" if path == SECOND else None

    with serve("Skylion007/openwebtext", SHARDS, fault=fail) as (endpoint, _):
        assert prepare("openwebtext", tmp_path, endpoint).returncode == 1

    with serve("Skylion007/openwebtext", SHARDS) as (endpoint, requests):
        assert prepare("openwebtext", tmp_path, endpoint).returncode == 0

    assert any(f"/api/datasets/Skylion007/openwebtext/revision/{'0' * 40}" in r for r in requests)
    assert not any(r.endswith("/api/datasets/Skylion007/openwebtext") for r in requests)


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("someone/else", {}, "someone/else cannot be read from the Hub"),
        ("someone/texts", {"a.parquet": parquet(TEXTS, "content")}, "no column `text`"),
        ("someone/texts", {"test/a.parquet": parquet(TEXTS)}, "no split train"),
        ("someone/texts", {"train/picture.png": b"\x89PNG"}, "its format is imagefolder"),
    ],
)
def test_what_is_no_dataset_of_text_is_one_line(tmp_path, source, files, message):
    with serve("someone/texts", files or SHARDS) as (endpoint, _):
        result = prepare(source, tmp_path, endpoint)

    error = result.stderr.splitlines()[-1]

    assert result.returncode == 1
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_prepared_files_need_no_network(tmp_path, small):
    with serve("Skylion007/openwebtext", SHARDS) as (endpoint, requests):
        prepare("openwebtext", tmp_path, endpoint)
        requests.clear()
        argv = [arg for arg in small() if not arg.startswith("--dataset")]
        argv += ["--dataset=openwebtext", f"--dataset_path={tmp_path / 'dataset'}"]
        status, _, errors = finish(launch(argv, env={"HF_ENDPOINT": endpoint}))

    assert status == 0, errors
    assert requests == []


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="offline by choice"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, id="nobody there"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, small, env):
    argv = [arg for arg in small() if not arg.startswith("--dataset=")]
    env = {**env, "HF_HOME": str(tmp_path / "home")}
    pauses = "from text import hub; hub.FIRST_RETRY_PAUSES = (0.01, 0.02)"
    status, _, errors = finish(launch([*argv, "--dataset", "someone/texts"], pauses, env))
    *retries, error = errors.splitlines()

    assert status == 1
    assert error.startswith("error: someone/texts cannot be read")
    assert "--dataset=stdlib" in error
    assert all("again in" in line for line in retries)
    assert len(retries) == (0 if "HF_HUB_OFFLINE" in env else 2)


class Response:
    def __init__(self, status_code: int):
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (ValueError(), False),
        (OSError("file should be of size 2 but has size 1"), True),
        (OSError(28, "No space left on device"), False),
        *((status, True) for status in (408, 429, 500, 502, 503, 504)),
        *((status, False) for status in (400, 401, 403, 404, 416)),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    if isinstance(error, int):
        response, error = Response(error), Exception()
        error.response = response

    assert is_passing(error) == expected


def test_the_digest_of_a_file_outside_of_large_storage_is_that_of_git(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"some content")
    command = ["git", "hash-object", path]
    blob = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    check_download(path, f"git:{blob}")

    with pytest.raises(DamagedDownloadError, match="file does not have the checksum"):
        check_download(path, "git:" + "0" * 40)

    assert not path.exists()
