"""Token files and the stream of samples against brute force and tiktoken's own definition."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public
from conftest import ROOT, finish, launch, write_documents
from hub import parquet, serve

import data
from data import (
    END_OF_TEXT,
    DataError,
    EvaluationWindows,
    HubDataset,
    SampleStream,
    StandardLibrary,
    TextFiles,
    encode,
    load_or_prepare,
    parse_source,
    permute,
    resolve_weights,
    take_turns,
)


def test_tokenizer_is_the_published_one(monkeypatch):
    monkeypatch.setattr(
        tiktoken_ext.openai_public,
        "load_tiktoken_bpe",
        lambda url, expected_hash: data.load_tiktoken_bpe(str(data.RANKS_PATH), expected_hash),
    )
    published = tiktoken_ext.openai_public.r50k_base()
    ours = data.load_encoding()

    assert ours._mergeable_ranks == published["mergeable_ranks"]
    assert ours._pat_str == published["pat_str"]
    assert ours._special_tokens == published["special_tokens"]
    assert ours.n_vocab == published["explicit_n_vocab"] == data.VOCABULARY_SIZE
    assert encode("Hello world").tolist() == [15496, 995]


def test_tokenizer_needs_no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the tokenizer asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    data.load_encoding.cache_clear()

    assert data.load_encoding().decode([15496, 995]) == "Hello world"


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"])
def test_damaged_ranks_are_refused(monkeypatch, tmp_path, content):
    path = tmp_path / "ranks"
    monkeypatch.setattr(data, "RANKS_PATH", path)
    data.load_encoding.cache_clear()

    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError, match="ranks is missing or damaged"):
        data.load_encoding()

    monkeypatch.undo()
    data.load_encoding.cache_clear()


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("a <|endoftext|> b", "a <|endoftext|> b"),
        ("naïve 日本語 👩‍🚀\r\n\t", "naïve 日本語 👩‍🚀\r\n\t"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("", ""),
    ],
)
def test_any_text_is_text(text, decoded):
    tokens = encode(text)

    assert tokens.dtype == np.dtype("<u2")
    assert END_OF_TEXT not in tokens
    assert data.load_encoding().decode(tokens.tolist()) == decoded


def documents_in(path: Path) -> list[str]:
    """Read a token file back into its documents."""
    documents, tokens = [], []

    for token in np.fromfile(path, dtype="<u2").tolist():
        if token == END_OF_TEXT:
            documents.append(data.load_encoding().decode(tokens))
            tokens = []
        else:
            tokens.append(token)

    assert not tokens, "the last document is not ended"

    return documents


def test_token_files_hold_every_document_once(text_folder, tmp_path):
    source = TextFiles(text_folder)
    load_or_prepare(source, tmp_path, 1)
    train, test = (documents_in(tmp_path / f"{source.name}-{split}.bin") for split in data.SPLITS)
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]

    assert sorted(train + test) == sorted(texts)
    assert 1 <= len(test) <= 20
    assert train == [text for text in texts if text in train]

    sidecar = json.loads((tmp_path / f"{source.name}.json").read_text())

    assert sidecar["encoding"] == "r50k_base"
    assert sidecar["train"]["documents"] == len(train)
    assert sidecar["train"]["tokens"] == sum(len(encode(text)) + 1 for text in train)
    assert not list(tmp_path.glob("*.parts"))


def test_test_split_is_a_two_hundredth_of_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIN_TEST_TOKENS", 1)
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 2000, num_words=2)
    source = TextFiles(tmp_path / "text")
    load_or_prepare(source, tmp_path / "dataset", 1)
    sidecar = json.loads((tmp_path / "dataset" / f"{source.name}.json").read_text())

    assert 3 <= sidecar["test"]["documents"] <= 20


def test_places_are_spread_evenly():
    places = [data.place_hash(0, row) for row in range(20_000)]

    assert sum(place < 0.005 for place in places) == pytest.approx(100, abs=40)
    assert places[:10] == [data.place_hash(0, row) for row in range(10)]
    assert data.place_hash(1, 0) != data.place_hash(0, 0)


def test_standard_library_is_found_without_its_tests():
    root = Path(data.sysconfig.get_path("stdlib"))
    documents = set(StandardLibrary().documents(0))
    tests = [*root.glob("test/test_d*.py"), *root.glob("*/test/test_*.py")]

    assert len(documents) > 300
    assert (root / "__future__.py").read_text() in documents
    assert (root / "json" / "decoder.py").read_text() in documents
    assert not any(path.read_text(errors="replace") in documents for path in tests)


def prepared(source, folder):
    load_or_prepare(source, folder, 1)

    return {split: folder / f"{source.name}-{split}.bin" for split in data.SPLITS}


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
@pytest.mark.parametrize("split", data.SPLITS)
def test_damaged_token_files_are_refused(text_folder, tmp_path, damage, split):
    source = TextFiles(text_folder)
    path = prepared(source, tmp_path)[split]
    load_or_prepare(source, tmp_path, 1)
    damage(path)

    with pytest.raises(DataError, match=rf"{path.name}.*delete {source.name}\.json"):
        load_or_prepare(source, tmp_path, 1)


def change_sidecar(folder: Path, source, change) -> None:
    path = folder / f"{source.name}.json"
    sidecar = json.loads(path.read_text())
    change(sidecar)
    path.write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sidecar: sidecar.update(encoding="cl100k_base"), "cl100k_base, r50k_base is"),
        (lambda sidecar: sidecar.update(format_version=9), "has format 9, format 1"),
        (lambda sidecar: sidecar.pop("train"), "is damaged"),
    ],
)
def test_foreign_sidecars_are_refused(text_folder, tmp_path, change, message):
    source = TextFiles(text_folder)
    prepared(source, tmp_path)
    change_sidecar(tmp_path, source, change)

    with pytest.raises(DataError, match=message):
        load_or_prepare(source, tmp_path, 1)


def test_ids_beyond_the_vocabulary_are_refused(text_folder, tmp_path):
    source = TextFiles(text_folder)
    path = prepared(source, tmp_path)["train"]
    tokens = np.fromfile(path, dtype="<u2")
    tokens[5] = 50257
    tokens.tofile(path)
    digest, _ = data.scan(path)
    change_sidecar(tmp_path, source, lambda sidecar: sidecar["train"].update(sha256=digest))

    with pytest.raises(DataError, match="holds token id 50257, r50k_base ends at 50256"):
        load_or_prepare(source, tmp_path, 1)


def test_files_are_hashed_once_and_again_after_a_change(text_folder, tmp_path, monkeypatch):
    source = TextFiles(text_folder)
    prepared(source, tmp_path)
    scanned = []
    scan = data.scan
    monkeypatch.setattr(data, "scan", lambda path: scanned.append(path) or scan(path))

    load_or_prepare(source, tmp_path, 1)
    assert not scanned

    path = tmp_path / f"{source.name}-train.bin"
    path.write_bytes(path.read_bytes())
    load_or_prepare(source, tmp_path, 1)
    assert path in scanned


def test_changed_text_is_prepared_again(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", 40)
    source = TextFiles(tmp_path / "text")
    before = load_or_prepare(source, tmp_path / "dataset", 1)
    (tmp_path / "text" / "999.txt").write_text("one more document")
    after = load_or_prepare(source, tmp_path / "dataset", 1)

    assert "has changed" in capsys.readouterr().out
    assert len(after.train) + len(after.test) > len(before.train) + len(before.test)
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("text", ["", "word " * 9000, "a\n\nb\n" * 9000, "line\n" * 9000])
def test_lone_file_is_cut_without_loss(text):
    documents = list(data.cut(text))

    assert "".join(documents) == text
    assert all(8192 <= len(document) <= 16_500 for document in documents[:-1] if " " not in text)


def test_odd_entries_of_a_folder_are_passed_over(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "dangling.md").symlink_to(tmp_path / "nothing")
    write_documents(tmp_path, 2)

    assert len(list(TextFiles(tmp_path).documents(0))) == 2
    assert TextFiles(tmp_path).description == TextFiles(tmp_path / ".." / tmp_path.name).description


@pytest.mark.parametrize("num_documents", [0, 1])
def test_too_few_documents_are_refused(tmp_path, num_documents):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", num_documents)

    with pytest.raises(DataError, match=r"0 to test on|to train on and"):
        load_or_prepare(TextFiles(tmp_path / "text"), tmp_path / "dataset", 1)

    assert not list((tmp_path / "dataset").iterdir())


def test_openwebtext_is_streamed_from_the_hub(tmp_path):
    """The real client, with a server on loopback: the same bytes for 1 and for 2 processes."""
    texts = [f"document {row} of the web, {'word ' * (row % 50)}" for row in range(90)]
    shards = {
        f"plain_text/train-{i:05d}-of-00003.parquet": parquet(texts[30 * i : 30 * i + 30])
        for i in range(3)
    }
    results = []

    with serve("Skylion007/openwebtext", shards) as (endpoint, requests):
        for num_processes in (1, 2):
            folder = tmp_path / str(num_processes)
            env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / f"home{num_processes}")}
            script = tmp_path / "prepare.py"
            script.write_text(
                f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import data
if __name__ == "__main__":
    source, _ = data.parse_source("openwebtext")
    data.load_or_prepare(source, Path({str(folder)!r}), {num_processes})
"""
            )
            subprocess.run(
                [sys.executable, script], env={**os.environ, **env}, check=True, timeout=120
            )
            results.append(
                [(folder / f"openwebtext-{split}.bin").read_bytes() for split in data.SPLITS]
            )

    assert results[0] == results[1]
    assert any(".parquet" in request for request in requests)
    train, test = (documents_in(tmp_path / "1" / f"openwebtext-{s}.bin") for s in data.SPLITS)
    assert sorted(train + test) == sorted(texts)
    assert train == [text for text in texts if text in train]


def test_hub_that_cannot_be_reached_is_one_line(tmp_path, small):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    argv = [arg for arg in small() if not arg.startswith("--dataset=")]
    status, _, errors = finish(launch([*argv, "--dataset", "someone/something"], env=env))

    assert status == 1
    assert errors.startswith("error: someone/something cannot be read")
    assert "--dataset=stdlib" in errors
    assert len(errors.splitlines()) == 1


def test_hub_dataset_without_text_is_refused(tmp_path, monkeypatch):
    class Stream:
        num_shards = 1

        def shard(self, num_shards, index):
            return [{"content": "no text"}]

    monkeypatch.setattr(HubDataset, "stream", Stream())

    with pytest.raises(DataError, match="a/b has no column `text`"):
        load_or_prepare(HubDataset("a/b", name="a--b"), tmp_path, 1)


def test_sources_are_told_apart(text_folder):
    assert parse_source("openwebtext") == (
        HubDataset("Skylion007/openwebtext", name="openwebtext"), None
    )  # fmt: skip
    assert parse_source("stdlib=2") == (StandardLibrary(), 2.0)
    assert parse_source(f"{text_folder}=0.1") == (TextFiles(text_folder), 0.1)

    source, weight = parse_source("HuggingFaceFW/fineweb:sample-10BT=0.5")
    assert (source.repository, source.config, weight) == (
        "HuggingFaceFW/fineweb", "sample-10BT", 0.5
    )  # fmt: skip
    assert source.name == "HuggingFaceFW--fineweb--sample-10BT"


@pytest.mark.parametrize(
    "value", ["./missing", "stdlib=0", "stdlib=-1", "stdlib=nan", "stdlib=x", "", "a/b/c"]
)
def test_what_is_no_source_is_refused(value):
    with pytest.raises(ValueError, match="weight must be|is neither"):
        parse_source(value)


def test_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "a=1"
    folder.mkdir()

    assert parse_source(str(folder)) == (TextFiles(folder), None)


def test_weights():
    assert resolve_weights([None, None], [300, 100]) == [0.75, 0.25]
    assert resolve_weights([None, 0.1], [300, 100]) == [0.9, 0.1]
    assert resolve_weights([3.0, 1.0], [5, 5]) == [0.75, 0.25]

    with pytest.raises(ValueError, match="leaves nothing"):
        resolve_weights([None, 1.5], [1, 1])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000])
def test_permutations_are_bijections(size):
    keys = [3, 1, 4, 1]
    order = [permute(i, size, keys) for i in range(size)]

    assert sorted(order) == list(range(size))

    if size > 100:
        assert order != [permute(i, size, [2, 7, 1, 8]) for i in range(size)]
        assert sum(a + 1 == b for a, b in zip(order, order[1:], strict=False)) < size / 3


@pytest.mark.parametrize(("num_tokens", "block_size"), [(9, 8), (64, 8), (100, 8), (103, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_token_is_a_target_once_a_pass(num_tokens, block_size, seed):
    tokens = np.arange(num_tokens, dtype="<u2")
    stream = SampleStream([tokens], [1.0], block_size, seed)
    num_windows = num_tokens // block_size

    for number in range(3):
        x, y = stream.batch(number * num_windows, num_windows)
        targets = Counter(y.flatten().tolist())

        assert set(targets.values()) == {1}
        assert len(targets) == num_windows * block_size > num_tokens - block_size
        assert ((x + 1) % num_tokens == y).all()


def test_samples_are_a_pure_function_of_seed_and_place():
    tokens = np.arange(5000, dtype="<u2")
    stream = SampleStream([tokens], [1.0], 16, 3)
    x, y = stream.batch(0, 700)
    again, _ = SampleStream([tokens], [1.0], 16, 3).batch(350, 7)
    other, _ = SampleStream([tokens], [1.0], 16, 4).batch(0, 700)

    assert (x[350:357] == again).all()
    assert not (x == other).all()
    assert (x[:312].sort(dim=0)[0] != x[312:624].sort(dim=0)[0]).any(), "every pass is cut anew"
    assert x.dtype == y.dtype == data.torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()


@pytest.mark.parametrize("weights", [[0.9, 0.1], [1, 1, 1], [0.5, 0.3, 0.15, 0.05], [0.999, 0.001]])
def test_shares_are_exact_to_one_sample(weights):
    turns = take_turns(weights, 10_000)
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, 10_001)[:, None] * shares

    assert np.abs(counts - due).max() < 1


def test_sources_are_mixed_and_each_is_read_without_replacement():
    sources = [np.full(64, 1, "<u2"), np.arange(100, 180, dtype="<u2")]
    stream = SampleStream(sources, [0.75, 0.25], 8, 0)
    x, y = stream.batch(0, 40)
    from_second = x[:, 0] >= 100

    assert from_second.sum() == 10
    assert sorted(y[from_second].flatten().tolist()) == list(range(100, 180))


def test_a_source_below_one_sample_is_refused():
    with pytest.raises(DataError, match="has 8 tokens, one sample takes 9"):
        SampleStream([np.zeros(8, "<u2")], [1.0], 8, 0)

    with pytest.raises(DataError, match="has 8 tokens, one window takes 9"):
        EvaluationWindows(np.zeros(8, "<u2"), 8)


@pytest.mark.parametrize("num_tokens", [9, 33, 400, 20_000])
def test_test_windows_are_fixed_and_evenly_spaced(num_tokens):
    windows = EvaluationWindows(np.arange(num_tokens, dtype="<u2"), 8)
    batches = list(windows.batches(3))
    targets = [row for x, y in batches for row in y.tolist() if row[0] >= 0]
    starts = [row[0] - 1 for row in targets]

    assert len(targets) == len(windows) == min(256, (num_tokens - 1) // 8)
    assert {x.shape for x, _ in batches} == {y.shape for _, y in batches} == {(3, 8)}
    assert starts[0] == 0
    assert num_tokens - 9 - 8 < starts[-1] <= num_tokens - 9
    assert {round(b - a) for a, b in zip(starts, starts[1:], strict=False)} <= set(
        range(8, max(9, num_tokens // 200 + 2))
    )
    assert [row.tolist() for _, batch in batches for row in batch] == [
        row.tolist() for _, batch in windows.batches(3) for row in batch
    ]
