"""Vocabularies of your own: what they are trained on, and that they are the same again."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT
from tokenizers import decoders, models, pre_tokenizers

from system import locks
from text import token_files, vocabulary
from text.errors import DataError
from text.preparation import load_or_prepare
from text.sources import StandardLibrary, TextFiles
from text.splits import TEST_SHARES, place_hash
from text.vocabulary import byte_characters, open_tokenizer, sample

SIZE = 300


@pytest.fixture
def text(tmp_path) -> TextFiles:
    """Forty documents; each has a word of its own."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(
            f"word{number} " * 9 + "and all the others\n  too\n"
        )

    return TextFiles(folder)


def train(text: TextFiles, folder: Path, size: int = SIZE):
    return open_tokenizer([text], folder, size)


def test_it_is_trained_on_no_document_that_may_be_tested_on(text, tmp_path):
    names = [f"{number:02d}.txt" for number in range(40)]
    held = {name for name in names if place_hash(name, 0) < TEST_SHARES[-1]} | {names[0]}
    texts = list(sample(text, 1 << 20, tmp_path))

    assert held
    assert sorted(texts) == sorted((text.path / n).read_text() for n in names if n not in held)

    # However many documents end up in the test split, none of them is among those.
    ours = train(text, tmp_path / "dataset")
    dataset = load_or_prepare(text, tmp_path / "dataset", ours, 1)
    tested = ours.decode(dataset.test).split("<|endoftext|>")[:-1]
    assert tested
    assert not {*tested} & {*texts}


def test_the_first_document_may_be_tested_on_where_no_share_has_any(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [row for row in range(9) if place_hash(".", row) >= TEST_SHARES[-1]]
    lines = ["" if row not in rows else json.dumps({"text": f"{row}"}) for row in range(9)]
    path.write_text("\n".join(lines))

    assert [*sample(TextFiles(path), 1 << 20, tmp_path)] == [f"{row}" for row in rows[1:]]


def test_the_ids_are_those_of_hugging_faces_library(text, tmp_path):
    ours = train(text, tmp_path)
    names = {value: character for character, value in byte_characters().items()}
    tokens = {"".join(names[bytes([b])] for b in token): id for token, id in ours.tokens.items()}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(tokens, key=tokens.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    ]
    theirs = tokenizers.Tokenizer(models.BPE(tokens, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()

    for path in text.paths():
        content = path.read_text() + " Ünïcode \n\n\t1234 'LL  "
        assert theirs.encode(content).ids == ours.encode(content).tolist()
        assert ours.decode(ours.encode(content)) == theirs.decode(theirs.encode(content).ids)


@pytest.mark.parametrize("num_threads", ["1", "2"])
def test_the_same_text_gives_the_same_vocabulary(text, tmp_path, num_threads):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from text.sources import TextFiles\n"
        "from text.vocabulary import open_tokenizer\n"
        f"print(open_tokenizer([TextFiles(Path({str(text.path)!r}))], Path('a'), {SIZE}).encoding)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAYON_NUM_THREADS": num_threads, "PYTHONHASHSEED": num_threads},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.splitlines()[-1] == train(text, tmp_path / "here").encoding


def test_it_is_trained_once_and_again_when_the_text_changes(text, tmp_path, monkeypatch, capsys):
    first = train(text, tmp_path / "dataset")
    real = vocabulary.train_vocabulary
    monkeypatch.setattr(vocabulary, "train_vocabulary", lambda *_: pytest.fail("trained again"))

    assert train(text, tmp_path / "dataset").ranks == first.ranks
    for path in text.paths():
        os.utime(path, (1, 1))
    assert train(text, tmp_path / "dataset").ranks == first.ranks

    monkeypatch.setattr(vocabulary, "train_vocabulary", real)
    (text.path / "new.txt").write_text("zzzzzz yyyyyy " * 1000)
    assert train(text, tmp_path / "dataset").ranks != first.ranks
    assert "the text has changed since" in capsys.readouterr().out


def test_text_that_is_gone_has_its_vocabulary_still(text, tmp_path):
    first = train(text, tmp_path / "dataset")
    shutil.rmtree(text.path)

    assert train(text, tmp_path / "dataset").ranks == first.ranks


def test_several_sources_share_one_whatever_their_order(text, tmp_path):
    (tmp_path / "other.txt").write_text("other words altogether, \n\n" * 4000)
    other = TextFiles(tmp_path / "other.txt")
    both = open_tokenizer([text, other], tmp_path / "dataset", SIZE)

    assert both.ranks == open_tokenizer([other, text], tmp_path / "other", SIZE).ranks
    assert both.ranks != train(text, tmp_path / "dataset").ranks
    assert len([*(tmp_path / "dataset").glob("*.vocabulary")]) == 2


def test_token_files_of_two_vocabularies_lie_side_by_side(text, tmp_path):
    folder = tmp_path / "dataset"
    own, gpt2 = train(text, folder), train(text, folder, vocabulary.GPT2_SIZE)
    datasets = [load_or_prepare(text, folder, ours, 1) for ours in (own, gpt2, own, gpt2)]

    assert [dataset.name for dataset in datasets] == [text.name] * 4
    assert len([*folder.glob("*-train.bin")]) == 2
    for ours, dataset in zip((own, gpt2) * 2, datasets, strict=True):
        tokens = [*dataset.train, *dataset.test]
        documents = ours.decode(tokens).split("<|endoftext|>")[:-1]
        assert sorted(documents) == sorted(path.read_text() for path in text.paths())


def test_it_is_no_text_where_it_lies_among_the_text(text):
    source = TextFiles(text.path, excluded=((text.path, token_files.NAMES),))
    ours = train(source, text.path)
    load_or_prepare(source, text.path, ours, 1)

    both = open_tokenizer([source, StandardLibrary()], text.path, 1000)

    assert both.encoding != ours.encoding
    assert len([*text.path.glob("*.vocabulary")]) == 2
    assert len(source.paths()) == 40
    assert train(source, text.path).encoding == ours.encoding


def test_of_a_large_folder_the_sample_comes_from_everywhere(text, tmp_path, monkeypatch):
    size = text.listing().size
    names = {texts.split()[0] for texts in sample(text, size // 4, tmp_path)}

    assert 5 <= len(names) <= 11
    assert {name[:5] for name in names} >= {"word1", "word2", "word3"}


# --- What can go wrong ---


def test_too_little_text(text, tmp_path):
    with pytest.raises(DataError, match="too little text for a vocabulary of 5,000 tokens, it giv"):
        train(text, tmp_path / "dataset", 5000)

    assert not [*(tmp_path / "dataset").iterdir()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: b"{}",
        lambda content: content.replace(b"bpe-300", b"bpe-301"),
        lambda content: content.replace(b"MTI", b"MTM", 1) if b"MTI" in content else b"7",
        lambda content: content.replace(b'"format_version": 1', b'"format_version": 2'),
    ],
)
def test_a_damaged_file_is_one_line(text, tmp_path, damage):
    train(text, tmp_path / "dataset")
    [path] = (tmp_path / "dataset").glob("*.vocabulary")
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DataError, match="vocabulary is damaged; delete it to have it made again"):
        train(text, tmp_path / "dataset")


def test_a_kill_in_the_middle_leaves_nothing_and_the_next_run_makes_it(text, tmp_path):
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from text import vocabulary, sources\n"
        "vocabulary.merge = lambda texts, size: [*texts] and os.kill(os.getpid(), 9)\n"
        f"text = sources.TextFiles(Path({str(text.path)!r}))\n"
        f"vocabulary.open_tokenizer([text], Path('a'), {SIZE})"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)

    assert killed.returncode == -9
    assert not [*(tmp_path / "a").glob("*.vocabulary")]
    assert train(text, tmp_path / "a").ranks == train(text, tmp_path / "b").ranks
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".vocabulary"]


def test_two_runs_at_once_make_it_once(text, tmp_path, monkeypatch):
    folder, said, told = tmp_path / "dataset", [], threading.Event()
    folder.mkdir()
    # Our parent lives, and so does its lock.
    parent = os.getppid()
    owner = {"host": locks.host_name(), "process": parent, "started": locks.start_of(parent)}
    lock = folder / f"{text.name}.{SIZE}.vocabulary.lock"
    lock.write_text(json.dumps(owner))

    def say(line: str, **_) -> None:
        said.append(line)
        told.set()

    monkeypatch.setattr(vocabulary, "print", say, raising=False)
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(train(text, folder)))
    waiting.start()

    assert told.wait(timeout=60)
    assert list(folder.iterdir()) == [lock]

    # The other run ends, and leaves its vocabulary.
    shutil.copy(train_elsewhere(text, tmp_path), folder)
    monkeypatch.setattr(vocabulary, "train_vocabulary", lambda *_: "made twice")
    lock.unlink()
    waiting.join()

    assert found[0].vocabulary_size == SIZE
    assert f"is being made by process {parent}" in said[0]


def train_elsewhere(text: TextFiles, tmp_path: Path) -> Path:
    train(text, tmp_path / "elsewhere")
    [path] = (tmp_path / "elsewhere").glob("*.vocabulary")
    return path


def test_a_full_disk_is_one_line(text, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="Not a directory. Choose another --dataset_path"):
        train(text, tmp_path / "file" / "dataset")
