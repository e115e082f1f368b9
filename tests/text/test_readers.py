"""Rows of files: the same for documents and for instructions, with places, and errors as values."""

import io
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import parquet_rows

from text import blocks
from text.local_files import LocalFile
from text.readers import Reader
from text.rows import RowFile

ROWS = [{"prompt": "a", "text": "one"}, {"prompt": "b\nc", "text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def reader_of(path, content: bytes, **options) -> Reader:
    path.write_bytes(content)

    return Reader(LocalFile(path, path.name, len(content), path.suffix[1:]), **options)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.json", LINES, ["line 1", "line 2"]),
        ("a.json", b"\n" + LINES.replace(b"\n", b"\n\n"), ["line 2", "line 4"]),
        ("a.csv", b'prompt,text\na,one\n"b\nc",two\n', ["line 2", "line 4"]),
        ("a.parquet", parquet_rows(ROWS), ["row 0", "row 1"]),
    ],
)
@pytest.mark.parametrize("is_text", [True, False])
def test_rows_and_their_places_are_the_same_for_both_uses(tmp_path, name, content, places, is_text):
    options = {"columns": ("text", "prompt"), "is_text": is_text}

    with reader_of(tmp_path / name, content, **options) as reader:
        found = [(place, row) for place, row in reader.rows() if row is not None]

    assert found == list(zip(places, ROWS, strict=True))


def test_a_list_of_rows_is_read_as_one(tmp_path):
    content = b"\n \n" + json.dumps(ROWS, indent=1).encode()

    with reader_of(tmp_path / "a.json", content, is_text=False) as reader:
        assert list(reader.rows()) == [("row 0", ROWS[0]), ("row 1", ROWS[1])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"text": "x"}\nnothing\n{"text": "y"}\n', "this is no JSON"),
        ("a.csv", b'text,n\nx,1\n"a"b,2\ny,3\n', "expected after"),
        ("a.csv", b"text,n\nx,1\n2\ny,3\n", "not as many values"),
    ],
)
def test_a_bad_row_is_an_error_among_good_ones(tmp_path, name, content, message):
    with reader_of(tmp_path / name, content, is_text=False) as reader:
        first, bad, last = (row for _, row in reader.rows())

    assert (first["text"], last["text"]) == ("x", "y")
    assert isinstance(bad, ValueError)
    assert message in str(bad)


def test_instructions_that_are_no_utf8_in_parquet_are_read(tmp_path):
    binary = pyarrow.array([b"good", b"b\xffd"])
    texts = pyarrow.StringArray.from_buffers(2, *binary.buffers()[1:])
    table = pyarrow.table({"prompt": texts, "completion": texts, "picture": [b"\xff", b"\0"]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())

    assert list(RowFile(tmp_path / "a.parquet").rows()) == [
        ("row 0", {"prompt": "good", "completion": "good"}),
        ("row 1", {"prompt": "b�d", "completion": "b�d"}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_instructions_take_the_memory_of_a_chunk(tmp_path, monkeypatch, name):
    monkeypatch.setattr(blocks, "CHUNK_SIZE", 1 << 16)
    rows = [{"prompt": f"{number} ", "completion": "x" * 1000} for number in range(8000)]
    content = {
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "a.csv": "\n".join(["prompt,completion", *(",".join(r.values()) for r in rows)]).encode(),
        "a.parquet": parquet_rows(rows),
    }[name]
    (tmp_path / name).write_bytes(content)
    del rows, content
    tracemalloc.start()
    num_rows = sum(1 for _ in RowFile(tmp_path / name).rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert num_rows == 8000
    assert peak < 4 << 20
