"""Token files: exact, restartable, guarded; damaged ones are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, finish, launch, write_documents
from token_folders import contents, documents_in
from vocabularies import END_OF_TEXT, GPT2_TOKENIZER, encode

from processes import CONTEXT
from system import locks
from text import blocks, parts, preparation, token_files, workers
from text.errors import DataError
from text.parts import JoinedFiles, place_hash
from text.preparation import load_or_prepare
from text.prepared import prepared_name
from text.sources import TextFiles, parse_source
from text.token_files import SPLITS
from text.tokenizer import GPT2, Tokenizer


def test_token_files_hold_every_document_once(text_folder, tmp_path):
    source = TextFiles(text_folder)
    load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)
    train, test = (documents_in(tmp_path / f"{source.name}-{split}.bin") for split in SPLITS)
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]

    assert sorted(train + test) == sorted(texts)
    assert 1 <= len(test) <= 20

    sidecar = json.loads((tmp_path / f"{source.name}.json").read_text())

    assert sidecar["encoding"] == "r50k_base"
    assert sidecar["train"]["documents"] == len(train)
    assert sidecar["train"]["tokens"] == sum(len(encode(text)) + 1 for text in train)
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json", ".verified"}


@pytest.mark.parametrize(
    ("min_tokens", "num_tests"),
    [(1, range(3, 20)), (100, range(20, 60)), (200, range(40, 110)), (10**9, range(150, 250))],
)
def test_no_more_documents_are_tested_on_than_it_takes(
    tmp_path, monkeypatch, min_tokens, num_tests
):
    monkeypatch.setattr(parts, "MIN_TEST_TOKENS", min_tokens)
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 2000, num_words=2)
    source = TextFiles(tmp_path / "text")
    dataset = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert (dataset.test == END_OF_TEXT).sum() in num_tests
    assert len(dataset.test) >= min_tokens or min_tokens == 10**9


def test_places_are_spread_evenly():
    places = [place_hash("a", row) for row in range(20_000)]

    assert sum(place < 0.005 for place in places) == pytest.approx(100, abs=40)
    assert places[:10] == [place_hash("a", row) for row in range(10)]
    assert place_hash("b", 0) != place_hash("a", 0)


def test_a_new_document_moves_no_other_between_the_splits(tmp_path):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 60)
    source = TextFiles(tmp_path / "text")
    path = tmp_path / "dataset" / f"{source.name}-test.bin"
    load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)
    before = set(documents_in(path))
    (tmp_path / "text" / "000 before all.txt").write_text("one more document")
    load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert before
    assert before <= set(documents_in(path)) <= before | {"one more document"}


def test_changed_text_is_prepared_again_and_it_says_why(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 40)
    source = TextFiles(tmp_path / "text")
    before = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)
    (tmp_path / "text" / "999.txt").write_text("one more document")
    after = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)
    [note] = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]

    assert "prepared again, for the text has changed" in note
    assert "40 files" in note
    assert "41 files" in note
    assert len(after.train) + len(after.test) > len(before.train) + len(before.test)
    assert after.fingerprint != before.fingerprint


@pytest.fixture
def no_second_preparation(tmp_path, monkeypatch):
    """Prepare text, and return it; whoever prepares it again fails."""
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 40)
    before = load_or_prepare(TextFiles(tmp_path / "text"), tmp_path / "dataset", GPT2_TOKENIZER, 1)
    monkeypatch.delattr(preparation, "prepare_parts")

    return tmp_path / "text", before


def test_text_that_was_only_touched_is_the_same(no_second_preparation, tmp_path, capsys):
    text, before = no_second_preparation
    os.utime(text / "000.txt", (0, 0))
    after = load_or_prepare(TextFiles(text), tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert (after.name, after.fingerprint) == (before.name, before.fingerprint)
    assert "changed" not in capsys.readouterr().out


def test_text_that_was_moved_keeps_its_token_files(no_second_preparation, tmp_path):
    """Wherever it lies then, and also when it is gone after that."""
    text, before = no_second_preparation
    moved = text.rename(tmp_path / "elsewhere")
    after = load_or_prepare(TextFiles(moved), tmp_path / "dataset", GPT2_TOKENIZER, 1)
    moved.rename(tmp_path / "a third place")
    source, _ = parse_source(str(moved), folder=tmp_path / "dataset")
    gone = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert (after.name, after.fingerprint) == (before.name, before.fingerprint)
    assert (gone.name, gone.fingerprint) == (before.name, before.fingerprint)


def test_text_that_is_gone_is_read_from_its_token_files(no_second_preparation, tmp_path, capsys):
    text, before = no_second_preparation
    shutil.rmtree(text)
    source, _ = parse_source(str(text), folder=tmp_path / "dataset")
    after = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert after.fingerprint == before.fingerprint
    assert "is not there; its token files are read" in capsys.readouterr().out

    with pytest.raises(ValueError, match="is neither"):
        parse_source(str(text / "other"), folder=tmp_path / "dataset")


def test_other_ids_than_tiktokens_are_refused(text_folder, tmp_path, monkeypatch):
    real = Tokenizer.encode_documents

    def wrong(self, texts) -> list:
        return [document[::-1] for document in real(self, texts)]

    monkeypatch.setattr(Tokenizer, "encode_documents", wrong)

    with pytest.raises(DataError, match="gigatoken and tiktoken give different tokens here"):
        load_or_prepare(TextFiles(text_folder), tmp_path / "dataset", GPT2_TOKENIZER, 1)

    monkeypatch.undo()
    load_or_prepare(TextFiles(text_folder), tmp_path / "dataset", GPT2_TOKENIZER, 1)


def test_without_gigatoken_the_files_are_the_same(text_folder, tmp_path, monkeypatch, capsys):
    load_or_prepare(TextFiles(text_folder), tmp_path / "fast", GPT2_TOKENIZER, 1)
    assert "gigatoken" not in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "gigatoken", None)
    plain = Tokenizer(GPT2_TOKENIZER.ranks)
    load_or_prepare(TextFiles(text_folder), tmp_path / "plain", plain, 1)
    assert contents(tmp_path / "fast") == contents(tmp_path / "plain")
    assert "gigatoken is not installed; tiktoken tokenizes" in capsys.readouterr().out


def test_a_changed_letter_is_a_change(no_second_preparation, tmp_path):
    text, _ = no_second_preparation
    content = (text / "000.txt").read_text()
    (text / "000.txt").write_text(content[:-1] + "!")

    assert prepared_name(TextFiles(text), tmp_path / "dataset", GPT2) is None


def test_a_copy_has_token_files_of_its_own(no_second_preparation, tmp_path):
    text, _ = no_second_preparation
    shutil.copytree(text, tmp_path / "copy")

    assert prepared_name(TextFiles(tmp_path / "copy"), tmp_path / "dataset", GPT2) is None


def prepared(source, folder):
    load_or_prepare(source, folder, GPT2_TOKENIZER, 1)

    return {split: folder / f"{source.name}-{split}.bin" for split in SPLITS}


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def damage_odd(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path):
    path.write_bytes(b"")


def damage_zero_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def damage_extra_tail(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def damage_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_odd,
        damage_empty,
        damage_zero_tail,
        damage_extra_tail,
        damage_flipped_bit,
        Path.unlink,
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_damaged_token_files_are_refused(text_folder, tmp_path, damage, split):
    source = TextFiles(text_folder)
    path = prepared(source, tmp_path)[split]
    load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)
    damage(path)

    with pytest.raises(DataError, match=rf"{path.name}.*delete {source.name}\.json"):
        load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)


def change_sidecar(folder: Path, source, change) -> None:
    path = folder / f"{source.name}.json"
    sidecar = json.loads(path.read_text())
    change(sidecar)
    path.write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sidecar: sidecar.update(encoding="cl100k_base"), "cl100k_base, r50k_base is"),
        (lambda sidecar: sidecar.update(format_version=9), "has format 9, format 2"),
        (lambda sidecar: sidecar.pop("train"), "is damaged"),
    ],
)
def test_foreign_sidecars_are_refused(text_folder, tmp_path, change, message):
    source = TextFiles(text_folder)
    prepared(source, tmp_path)
    change_sidecar(tmp_path, source, change)

    with pytest.raises(DataError, match=message):
        load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)


def test_ids_beyond_the_vocabulary_are_refused(text_folder, tmp_path):
    source = TextFiles(text_folder)
    path = prepared(source, tmp_path)["train"]
    tokens = np.fromfile(path, dtype="<u2")
    tokens[5] = 50257
    tokens.tofile(path)
    digest, _ = token_files.scan(path)
    change_sidecar(tmp_path, source, lambda sidecar: sidecar["train"].update(sha256=digest))

    with pytest.raises(DataError, match="holds token id 50257, r50k_base ends at 50256"):
        load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)


def test_files_are_hashed_once_and_again_after_a_change(text_folder, tmp_path, monkeypatch):
    source = TextFiles(text_folder)
    prepared(source, tmp_path)
    scanned = []
    scan = token_files.scan
    monkeypatch.setattr(token_files, "scan", lambda path: scanned.append(path) or scan(path))

    load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)
    assert not scanned

    path = tmp_path / f"{source.name}-train.bin"
    path.write_bytes(path.read_bytes())
    load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)
    assert path in scanned


@pytest.mark.parametrize("num_documents", [0, 1])
def test_too_few_documents_are_refused(tmp_path, num_documents):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", num_documents)

    with pytest.raises(DataError, match=r"0 to test on|to train on and"):
        load_or_prepare(TextFiles(tmp_path / "text"), tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert not list((tmp_path / "dataset").iterdir())


def test_two_documents_are_enough_whatever_their_places(tmp_path):
    """Where no share has a document to test on, the first is."""
    (tmp_path / "text").mkdir()
    for name in "ab":
        assert place_hash(f"{name}.txt", 0) > 0.1
        (tmp_path / "text" / f"{name}.txt").write_text(f"text {name}")

    source = TextFiles(tmp_path / "text")
    load_or_prepare(source, tmp_path, GPT2_TOKENIZER, 1)

    assert documents_in(tmp_path / f"{source.name}-test.bin") == ["text a"]
    assert documents_in(tmp_path / f"{source.name}-train.bin") == ["text b"]
    assert "the first document" in (tmp_path / f"{source.name}.json").read_text()


def test_a_lone_document_is_enough_where_nothing_is_split(tmp_path):
    (tmp_path / "a.txt").write_text("A short text.")
    source = TextFiles(tmp_path / "a.txt")
    dataset = load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1, is_split=False)

    assert len(dataset.train) + len(dataset.test) == len(encode("A short text.")) + 1

    with pytest.raises(DataError, match="at least one of each"):
        load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)


def test_single_rows_that_are_malformed_are_counted(tmp_path, capsys):
    rows = [json.dumps({"text": f"text {number}"}) for number in range(60)]
    rows[30:30] = ['{"text": 7}', '{"no": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    dataset = load_or_prepare(
        TextFiles(tmp_path / "a.jsonl"), tmp_path / "dataset", GPT2_TOKENIZER, 1
    )

    assert sum((tokens == END_OF_TEXT).sum() for tokens in (dataset.train, dataset.test)) == 60
    assert "2 of 62 rows are malformed and left out; the first is" in (
        output := capsys.readouterr().out
    )
    assert "a.jsonl, line 31: `text` is no text" in output


def test_a_little_damage_is_a_note_and_much_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 60)
    (tmp_path / "text" / "000.txt").write_bytes("naïve".encode("latin-1"))
    source = TextFiles(tmp_path / "text")
    load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

    assert "1 of " in (output := capsys.readouterr().out)
    assert "cannot be decoded, the first in" in output

    for number in range(20):
        (tmp_path / "text" / f"{number:03}.txt").write_bytes("größe ".encode("latin-1") * 50)

    # At once, or when all is read.
    for min_checked in (1, 1 << 24):
        monkeypatch.setattr(preparation, "MIN_CHECKED", min_checked)
        with pytest.raises(DataError, match="cannot be decoded.*--text_encoding"):
            load_or_prepare(source, tmp_path / "dataset", GPT2_TOKENIZER, 1)

        assert not list((tmp_path / "dataset").glob("*.parts"))


# --- Any number of processes, and any number of restarts ---


@pytest.fixture(scope="module")
def large_text(tmp_path_factory):
    """Text of several chunks: one large file, and a folder of small ones."""
    folder = tmp_path_factory.mktemp("large")
    write_documents(folder, 300, num_words=4000)
    rows = (json.dumps({"text": path.read_text()}) for path in sorted(folder.iterdir()))
    (folder / "rows.jsonl").write_text("\n".join(rows))

    return folder


def test_the_same_bytes_from_any_number_of_processes(large_text, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "MIN_SIZE_PER_PROCESS", 1 << 17)
    monkeypatch.setattr(preparation, "num_cores", lambda: 8)
    started = []
    worker_processes = workers.worker_processes
    monkeypatch.setattr(
        workers, "worker_processes", lambda n, work: started.append(n) or worker_processes(n, work)
    )

    for num_processes in (1, 2, 8):
        load_or_prepare(
            TextFiles(large_text), tmp_path / str(num_processes), GPT2_TOKENIZER, num_processes
        )

    assert started == [2, 8]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "8")
    assert len(contents(tmp_path / "1")) == 3


# Small chunks make many parts, some of which are joined while others are still to come.
CHUNK_SIZE, UNIT_SIZE, MIN_TEST_TOKENS, MIN_WAITING = 1 << 9, 1 << 10, 20, 1 << 10
SCRIPT = f"""
import multiprocessing, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from text import blocks, parts, preparation, sources, tokenizer

source, folder = sys.argv[1:3]
num_processes, kill_at, min_waiting = map(int, sys.argv[3:])
events = 0

# Die at a certain one of all moves in the folder of the dataset.
def count(event, arguments):
    global events

    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        if str(arguments[0]).startswith(folder):
            events += 1

            if events == kill_at:
                for child in multiprocessing.active_children():
                    print(child.pid, flush=True)

                os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if num_processes == 1:
        blocks.CHUNK_SIZE = {CHUNK_SIZE}
        preparation.UNIT_SIZE = {UNIT_SIZE}

    parts.MIN_TEST_TOKENS = {MIN_TEST_TOKENS}
    parts.JoinedFiles.MIN_WAITING = min_waiting
    preparation.MIN_SIZE_PER_PROCESS = 1
    sys.addaudithook(count)
    text, ours = sources.TextFiles(Path(source)), tokenizer.gpt2_tokenizer()
    preparation.load_or_prepare(text, Path(folder), ours, num_processes)
    print(events)
"""


def prepare_in_process(
    source: Path,
    folder: Path,
    num_processes: int,
    kill_at: int = 0,
    min_waiting: int = MIN_WAITING,
) -> subprocess.CompletedProcess:
    """Prepare in a process that kills itself at a certain move in the folder."""
    numbers = map(str, (num_processes, kill_at, min_waiting))

    return subprocess.run(
        [sys.executable, "-c", SCRIPT, source, folder, *numbers],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def undisturbed(text_folder, tmp_path_factory):
    """Return the files of a preparation that nobody killed, and in how many moves it made them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = prepare_in_process(text_folder, folder, 1)

    return contents(folder), int(result.stdout)


@pytest.mark.parametrize("twentieth", range(20))
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    text_folder, tmp_path, monkeypatch, undisturbed, twentieth
):
    expected, num_events = undisturbed
    kill_at = 1 + twentieth * (num_events - 1) // 19
    result = prepare_in_process(text_folder, tmp_path, 1, kill_at)

    assert result.returncode == -signal.SIGKILL
    assert num_events > 100

    monkeypatch.setattr(blocks, "CHUNK_SIZE", CHUNK_SIZE)
    monkeypatch.setattr(preparation, "UNIT_SIZE", UNIT_SIZE)
    monkeypatch.setattr(parts, "MIN_TEST_TOKENS", MIN_TEST_TOKENS)
    monkeypatch.setattr(JoinedFiles, "MIN_WAITING", MIN_WAITING)
    load_or_prepare(TextFiles(text_folder), tmp_path, GPT2_TOKENIZER, 1)

    assert contents(tmp_path) == expected


def test_workers_of_a_killed_preparation_end_and_the_next_goes_on(large_text, tmp_path):
    undisturbed = prepare_in_process(large_text, tmp_path / "undisturbed", 2)
    num_events = int(undisturbed.stdout)
    killed = prepare_in_process(large_text, tmp_path / "killed", 2, num_events // 3)

    assert killed.returncode == -signal.SIGKILL
    assert len(killed.stdout.split()) == 2
    # That its output has ended means that no process holds the other end of it.
    assert not any(Path(f"/proc/{pid}/fd/1").exists() for pid in killed.stdout.split())

    result = prepare_in_process(large_text, tmp_path / "killed", 2)

    assert "going on with" in result.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_parts_of_other_text_are_not_gone_on_with(tmp_path, undisturbed):
    _, num_events = undisturbed
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 80)
    prepare_in_process(tmp_path / "text", tmp_path / "dataset", 1, num_events // 2, 1 << 20)

    assert list((tmp_path / "dataset").glob("*.parts/*.part"))

    (tmp_path / "text" / "000.txt").write_text("another beginning")
    result = prepare_in_process(tmp_path / "text", tmp_path / "dataset", 1)
    files = (tmp_path / "dataset").glob("*.bin")
    documents = [text for path in files for text in documents_in(path)]

    assert "going on" not in result.stdout
    assert sorted(documents) == sorted(p.read_text() for p in (tmp_path / "text").iterdir())


@pytest.mark.parametrize("damage", [Path.unlink, damage_truncate, damage_flipped_bit])
def test_parts_that_were_damaged_meanwhile_are_made_again(
    text_folder, tmp_path, undisturbed, damage
):
    expected, num_events = undisturbed
    prepare_in_process(text_folder, tmp_path, 1, num_events // 2, 1 << 20)
    left = sorted(tmp_path.glob("*.parts/*.part"))

    assert left

    damage(left[-1])
    prepare_in_process(text_folder, tmp_path, 1)

    assert contents(tmp_path) == expected


def test_text_that_changes_before_the_last_move_is_prepared_again(tmp_path, undisturbed):
    """All is done but the renaming when the text changes."""
    _, num_events = undisturbed
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 80)

    for kill_at in range(num_events, 0, -1):
        prepare_in_process(tmp_path / "text", tmp_path / str(kill_at), 1, kill_at)

        if list((tmp_path / str(kill_at)).glob("*.parts/sidecar.json")):
            break

    (tmp_path / "text" / "000.txt").write_text("another beginning")
    prepare_in_process(tmp_path / "text", tmp_path / str(kill_at), 1)
    files = (tmp_path / str(kill_at)).glob("*.bin")

    assert "another beginning" in [text for path in files for text in documents_in(path)]


def test_the_disk_holds_the_tokens_about_once(large_text, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr(parts, "MIN_TEST_TOKENS", 3000)
    monkeypatch.setattr(JoinedFiles, "MIN_WAITING", 1 << 14)
    force, sizes = JoinedFiles.force, []

    def measure(self):
        sizes.append(sum(path.stat().st_size for path in self.folder.iterdir()))
        force(self)

    monkeypatch.setattr(JoinedFiles, "force", measure)
    dataset = load_or_prepare(TextFiles(large_text), tmp_path, GPT2_TOKENIZER, 1)

    assert len(sizes) > 20
    assert max(sizes) < 1.05 * 2 * (len(dataset.train) + len(dataset.test))


# --- One process prepares ---


def prepare_and_count(source: TextFiles, folder: Path, barrier, calls) -> None:
    prepare_parts = preparation.prepare_parts

    def counted(*arguments):
        with calls.get_lock():
            calls.value += 1

        prepare_parts(*arguments)

    preparation.prepare_parts = counted
    barrier.wait()
    load_or_prepare(source, folder, GPT2_TOKENIZER, 1)


def test_several_processes_at_once_prepare_once(text_folder, tmp_path):
    barrier, calls = CONTEXT.Barrier(4), CONTEXT.Value("i", 0)
    arguments = (TextFiles(text_folder), tmp_path, barrier, calls)
    processes = [CONTEXT.Process(target=prepare_and_count, args=arguments) for _ in range(4)]

    for process in processes:
        process.start()

    for process in processes:
        process.join(timeout=60)

    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.value == 1
    assert not list(tmp_path.glob("*.lock*"))


def test_who_waits_for_another_process_says_so(text_folder, tmp_path, monkeypatch):
    source = TextFiles(text_folder)
    lock = tmp_path / f"{source.name}.lock"
    # Our parent lives, and so does its lock.
    owner = {
        "host": locks.host_name(),
        "process": os.getppid(),
        "started": locks.start_of(os.getppid()),
    }
    lock.write_text(json.dumps(owner))
    said, told = [], threading.Event()

    def say(text: str, **_) -> None:
        said.append(text)
        told.set()

    monkeypatch.setattr(preparation, "print", say, raising=False)
    waiting = threading.Thread(target=load_or_prepare, args=(source, tmp_path, GPT2_TOKENIZER, 1))
    waiting.start()

    assert told.wait(timeout=60)
    assert list(tmp_path.iterdir()) == [lock]

    lock.unlink()
    waiting.join()

    assert f"is being prepared by process {os.getppid()}" in said[0]
    assert len(contents(tmp_path)) == 3


# --- Disks ---


def test_a_full_disk_is_one_line_and_what_is_whole_is_kept(large_text, tmp_path, small):
    """Files may not grow beyond a limit, which stands in for the disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    folder = tmp_path / "dataset"
    argv = [*small(dataset=large_text), f"--dataset_path={folder}"]
    status, _, errors = finish(launch(argv, patch=limit))
    error = errors.splitlines()[-1].rpartition("\r")[2]

    assert status == 1
    assert "error: " in error
    assert "File too large" in error
    assert "Make room; what is whole is kept" in error
    assert "Traceback" not in errors
    assert not [*folder.glob("*.bin"), *folder.glob("*.json"), *folder.glob("*.lock")]
    assert not list(folder.glob("*.parts/*.tmp"))

    status, output, _ = finish(launch(argv))

    assert status == 0
    assert "going on with" in output


@pytest.mark.parametrize("place", ["/dev/null/dataset", "{}/file/dataset"])
def test_a_folder_that_cannot_be_made_is_one_line(text_folder, tmp_path, place):
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match=r"cannot be written: Not a directory.*--dataset_path"):
        load_or_prepare(TextFiles(text_folder), Path(place.format(tmp_path)), GPT2_TOKENIZER, 1)
