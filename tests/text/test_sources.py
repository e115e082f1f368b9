"""Text of every kind and packing, read as it was written."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import write_documents
from hub_server import parquet
from vocabularies import END_OF_TEXT, GPT2_TOKENIZER, encode

from text import blocks, preparation, readers
from text.damage import Damage
from text.errors import DataError
from text.hub import HubDataset
from text.preparation import load_or_prepare
from text.readers import Reader, cut
from text.sources import StandardLibrary, TextFiles, parse_source

TEXTS = [
    "plain",
    "",
    None,
    'quotes " and, commas\nand lines\r\n',
    "naïve 日本語 👩‍🚀",
    "a literal <|endoftext|> in it",
    "x" * 100_000,
]
PRESENT = [text for text in TEXTS if text]


def zstd(content: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()

    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)

    return buffer.getvalue().to_pybytes()


PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def jsonl(texts: list[str | None]) -> bytes:
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]

    return "\n".join([*rows, "", ""]).encode()


def csv_rows(texts: list[str | None]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))

    return buffer.getvalue().encode()


def documents_of(reader: Reader) -> list[tuple[int, str]]:
    """Return the documents of the next chunk, each with the number of its row."""
    return [
        pair
        for numbers, texts in reader.chunk(Damage())
        for pair in zip(numbers.tolist(), texts.to_pylist(), strict=True)
    ]


def texts_of(file) -> list[str]:
    found, damage = [], Damage()

    with Reader(file) as reader:
        while not reader.is_finished:
            found += [text for each in reader.chunk(damage) for text in each.texts.to_pylist()]
            assert 0 <= reader.position <= file.size

    damage.check(file.description)

    return found


def texts_in(source) -> list[str]:
    """Read all documents of a source, file by file."""
    return [text for file in source.listing().files for text in texts_of(file)]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", jsonl), (".csv", csv_rows), (".parquet", parquet)]
)
def test_rows_are_read_from_every_format(tmp_path, suffix, write, packing):
    path = tmp_path / f"rows{suffix}{packing}"
    path.write_bytes(PACKINGS[packing](write(TEXTS)))

    # What programs write as CSV has the line ends of a system.
    present = [text.replace("\r\n", "\n") if suffix == ".csv" else text for text in PRESENT]
    assert texts_in(TextFiles(path)) == present
    assert texts_in(TextFiles(tmp_path)) == present


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "README", "d.adoc"])
def test_plain_text_is_read_under_any_name(tmp_path, name, packing):
    text = "some text, naïve 日本語\n"
    (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](text.encode()))

    assert texts_in(TextFiles(tmp_path)) == [text]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("naïve".encode("utf-8-sig"), "naïve"),
        ("naïve".encode("utf-16"), "naïve"),
        (b"one\xff" + b"word " * 100, "one�" + "word " * 100),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
    ],
)
def test_encodings_of_plain_text(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)

    assert texts_in(TextFiles(tmp_path)) == [text]


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path, capsys):
    for name in ("b/2.txt", "b/1.md", "a.txt", "c/d/e.txt", ".hidden/x.txt", "c/.secret.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "dangling.md").symlink_to(tmp_path / "nothing")
    (tmp_path / "more.jsonl").write_bytes(jsonl(["from a row"]))

    assert texts_in(TextFiles(tmp_path)) == [
        "a.txt", "b/1.md", "b/2.txt", "c/d/e.txt", "from a row",
    ]  # fmt: skip
    assert f"1 files in {tmp_path} are not text: picture.png" in capsys.readouterr().out


def test_a_file_with_several_names_is_read_once(tmp_path):
    """As in the cache of the Hub; the name of a table says how it is read."""
    for number, name in enumerate(("a.txt", "b.jsonl")):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "snapshots").mkdir(exist_ok=True)
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(jsonl(["a row"]) if number else b"text")
        (tmp_path / "snapshots" / name).symlink_to(blob)

    assert texts_in(TextFiles(tmp_path)) == ["text", "a row"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]).encode()),
        ("a.json", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.json.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0)),
        ("a.ndjson", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'.encode("utf-16")),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]).encode("utf-16")),
        ("a.csv", "text\none\ntwo\n".encode("utf-16")),
    ],
)
def test_rows_of_any_json_and_of_utf16(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    assert texts_in(TextFiles(tmp_path)) == ["one", "two"]


def test_json_that_holds_no_rows_is_text(tmp_path):
    text = json.dumps({"name": "text", "text": "of a program"}, indent=2)
    (tmp_path / "package.json").write_text(text)

    assert texts_in(TextFiles(tmp_path)) == [text]


def test_tables_of_something_else_are_left_out_of_a_folder(tmp_path, capsys):
    (tmp_path / "a.md").write_text("a note")
    (tmp_path / "expenses.csv").write_text("date,amount\n2024-01-01,3\n")
    (tmp_path / "log.jsonl").write_text('{"level": "info"}\n')
    (tmp_path / "none.parquet").write_bytes(parquet([None, None]))

    assert texts_in(TextFiles(tmp_path)) == ["a note"]
    assert "expenses.csv has no column `text`" in (output := capsys.readouterr().out)
    assert "and 1 more tables" in output


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_text_of_an_encoding_that_is_named(tmp_path, name, encoding):
    text = "天地玄黄\n" if name == "a.txt" else "天地玄黄"
    content = {"a.jsonl": json.dumps({"text": text}, ensure_ascii=False), "a.csv": f"text\n{text}"}
    (tmp_path / name).write_bytes(content.get(name, text).encode(encoding))

    assert texts_in(TextFiles(tmp_path, encoding=encoding)) == [text]
    assert TextFiles(tmp_path, encoding=encoding).revision() != TextFiles(tmp_path).revision()


@pytest.mark.parametrize("num_files", range(1, 9))
def test_few_files_give_both_splits(tmp_path, num_files):
    (tmp_path / "text").mkdir()
    for number in range(num_files):
        (tmp_path / "text" / f"book{number}.txt").write_text("A line of a book.\n\n" * 3000)

    dataset = load_or_prepare(TextFiles(tmp_path / "text"), tmp_path / "dataset", GPT2_TOKENIZER, 1)
    num_tests = (dataset.test == END_OF_TEXT).sum()

    assert 1 <= num_tests < num_files * 6
    assert len(dataset.test) > 1000


def test_links_are_followed_once(tmp_path):
    (tmp_path / "text" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("elsewhere")
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "sub" / "loop").symlink_to(tmp_path / "text")

    assert texts_in(TextFiles(tmp_path / "text")) == ["elsewhere"]


def test_what_a_run_writes_below_its_text_is_none_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("epoch\n1\n")
    source = TextFiles(tmp_path, ((tmp_path / "out", "x"), (tmp_path, "x")))
    before = source.revision()
    (tmp_path / "out" / "metrics.csv").write_text("epoch\n1\n2\n")

    assert texts_in(source) == ["text"]
    assert source.revision() == before


def test_names_that_are_no_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path)

    for name, content in ((b"\xff.txt", b"text"), (b"\xfe.png", b"\0")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)

    assert texts_in(TextFiles(tmp_path)) == ["text"]
    assert TextFiles(tmp_path).revision()
    assert "are not text: ?.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.bz2", "a.xz", "a.gz"])
def test_empty_files_are_no_documents(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")

    assert texts_in(TextFiles(tmp_path)) == ["text"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_files_of_several_chunks(tmp_path, monkeypatch, kind, packing):
    """All that is cut into chunks, by the way of a preparation: from open to the last position."""
    monkeypatch.setattr(blocks, "CHUNK_SIZE", 1000)
    monkeypatch.setattr("text.parquet.MAX_LAZY_GROUP", 0)
    monkeypatch.setattr(preparation, "UNIT_SIZE", 10)
    texts = [f"text {i} {'x' * i}\n" for i in range(200)]
    write = {".jsonl": jsonl, ".csv": csv_rows, ".parquet": parquet}
    path = tmp_path / f"a{kind}{packing}"
    texts *= 30 if kind == ".txt" else 1
    content = write[kind](texts) if kind in write else "".join(texts).encode()
    path.write_bytes(PACKINGS[packing](content))
    dataset = load_or_prepare(TextFiles(path), tmp_path / "dataset", GPT2_TOKENIZER, 1)
    tokens = np.concatenate([dataset.train, dataset.test])

    if kind == ".txt":
        texts = list(cut(iter(["".join(texts)])))

    assert len(tokens) == sum(len(encode(text)) + 1 for text in texts)


def test_rows_without_text_come_to_an_end_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n' * 300_000)
    [file] = TextFiles(tmp_path).listing().files

    with Reader(file) as reader:
        reader.skip()

        assert not reader.is_finished


def test_a_small_file_of_large_rows_is_decoded_a_few_at_a_time(tmp_path):
    """Equal rows are stored once: 33 kB become 300 MB."""
    (tmp_path / "a.parquet").write_bytes(parquet(["x" * 1000] * 300_000))
    [file] = TextFiles(tmp_path).listing().files

    with Reader(file) as reader:
        blocks = reader.skip()

    assert sum(block.num_rows for block in blocks) < 10_000 or len(blocks) == 1


def test_the_description_of_a_folder_is_its_place(tmp_path):
    twin = tmp_path / ".." / tmp_path.name

    assert TextFiles(tmp_path).description == TextFiles(twin).description
    assert TextFiles(tmp_path).name == TextFiles(twin).name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", parquet(["x"], column="content"), "no column `text`, it has content"),
        ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 200_000, "line 1: this is no JSON"),
        ("a.parquet", parquet([1, 2]), "the column `text` holds int64, not text"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.parquet", parquet(["x" * 1000])[:-50], "cannot be read"),
        ("a.csv", b"id,content\n1,x\n", "no column `text`, it has id, content"),
        ("a.csv", b"\n", "no column `text`, it has none"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "x"}\n', "line 2: there is no `text`"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: this is no JSON"),
        ("a.jsonl", b"[1, 2]\n", "row 0: there is no `text`"),
        ("a.json", b'[{"content": "x"}]', "1 of 1 rows are malformed.*row 0: there is no `text`"),
        ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n4,d\n', "line 3: a quote is opened and never closed"),
        ("a.txt", "größe, naïve".encode("latin-1"), "3 of 12 characters .*--text_encoding=cp1252"),
        ("a.jsonl", b'{"text": ["x"]}\n', "line 1: `text` is no text"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"x" * 5000)[:-9], "cannot be read"),
        ("a.txt.zst", b"no zstd at all", "cannot be read"),
        ("a.bin", b"\0\1\2", "is not text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message) as error:
        texts_in(TextFiles(tmp_path / name))

    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
)
@pytest.mark.parametrize("row_group_size", [3, 100])
@pytest.mark.parametrize("max_lazy_group", [0, 1 << 25])
def test_parquet_in_small_and_large_row_groups(
    tmp_path, monkeypatch, kind, row_group_size, max_lazy_group
):
    monkeypatch.setattr("text.parquet.MAX_LAZY_GROUP", max_lazy_group)
    texts = [f"text {i}" for i in range(200)]
    content = parquet(pyarrow.array(texts, kind), row_group_size=row_group_size)
    (tmp_path / "a.parquet").write_bytes(content)

    assert texts_in(TextFiles(tmp_path)) == texts


def test_text_that_is_no_utf8_in_parquet_goes_on(tmp_path):
    binary = pyarrow.array([b"good", b"b\xffd", None])
    texts = pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:], binary.buffers()[0])
    (tmp_path / "a.parquet").write_bytes(parquet(texts))

    assert texts_in(TextFiles(tmp_path)) == ["good", "b�d"]


def test_chunks_are_the_same_for_who_skips_and_who_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_SIZE", 1000)
    monkeypatch.setattr("text.parquet.MAX_LAZY_GROUP", 0)

    for suffix, write in ((".jsonl", jsonl), (".csv", csv_rows), (".parquet", parquet)):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(write([f"text {i} {'x' * i}" for i in range(200)]))
        [file] = TextFiles(path).listing().files
        chunks = []

        with Reader(file) as reader:
            while not reader.is_finished:
                chunks.append(documents_of(reader))

        assert len(chunks) > 3

        for number, chunk in enumerate(chunks):
            with Reader(file) as reader:
                for _ in range(number):
                    reader.skip()

                assert documents_of(reader) == chunk


DOCUMENTS = {
    "lone surrogate": "a \ud800 b",
    "a million letters": "a" * 10**6,
    "10 MB": "some words, " * 850_000,
    "literal end of text": "a <|endoftext|> b <|endoftext|>",
    "zero bytes": "a\0b",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_document_becomes_its_tokens_and_one_end(tmp_path, name):
    texts = ["before", DOCUMENTS[name], "", None, "after", *map(str, range(60))]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    dataset = load_or_prepare(
        TextFiles(tmp_path / "a.jsonl"), tmp_path / "dataset", GPT2_TOKENIZER, 1
    )
    tokens = np.concatenate([dataset.train, dataset.test])
    present = [text for text in texts if text]

    assert len(tokens) == sum(len(encode(text)) + 1 for text in present)
    assert (tokens == END_OF_TEXT).sum() == len(present)


@pytest.mark.parametrize("text", ["", "word " * 9000, "a\n\nb\n" * 9000, "line\n" * 9000])
@pytest.mark.parametrize("block", [100, 7777, 10**6])
def test_lone_file_is_cut_without_loss(text, block):
    documents = list(cut(text[i : i + block] for i in range(0, len(text), block)))

    assert "".join(documents) == text
    assert documents == list(cut(iter([text])))
    assert all(8192 <= len(document) <= 16_500 for document in documents[:-1] if " " not in text)


def test_a_large_file_of_a_folder_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 20_000)
    text = "line\n" * 9000
    (tmp_path / "large.txt").write_text(text)
    (tmp_path / "small.txt").write_text("small")
    documents = texts_in(TextFiles(tmp_path))

    assert len(documents) > 3
    assert documents[-1] == "small"
    assert "".join(documents[:-1]) == text


def test_standard_library_is_found_without_its_tests():
    root = StandardLibrary().path
    documents = set(texts_in(StandardLibrary()))
    tests = [*root.glob("test/test_d*.py"), *root.glob("*/test/test_*.py")]

    assert len(documents) > 300
    assert (root / "__future__.py").read_text() in documents
    assert (root / "json" / "decoder.py").read_text() in documents
    assert not any(path.read_text(errors="replace") in documents for path in tests)


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
    "value",
    [
        "./missing",
        "stdlib=0",
        "stdlib=-1",
        "stdlib=nan",
        "stdlib=x",
        "",
        "a/b/c",
        "a/b--c",
        "a" * 300,
    ],
)
def test_what_is_no_source_is_refused(value):
    with pytest.raises(ValueError, match="weight must be|is neither"):
        parse_source(value)


@pytest.mark.parametrize("value", ["corpus/trian.txt", "corpus/trian", "./a=b.txt", "x/a.csv.gz=2"])
def test_a_mistyped_path_is_told_at_once(tmp_path, monkeypatch, value):
    """It might be a dataset of the Hub, which is not asked."""
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="there is no file or folder [cx.]"):
        parse_source(value)

    assert parse_source("corpus/another")[0].is_hub
    assert parse_source("someone/v1.5")[0].is_hub


def test_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "a=1"
    folder.mkdir()

    assert parse_source(str(folder)) == (TextFiles(folder), None)


def test_writing_into_a_folder_changes_its_revision(tmp_path):
    write_documents(tmp_path, 2)
    before = TextFiles(tmp_path).revision()
    (Path(tmp_path) / "000.txt").write_text("changed")

    assert TextFiles(tmp_path).revision() != before
