"""Rows of instructions: their forms, their sources, and what a model is shown of them."""

import ast
import bz2
import gzip
import io
import json
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from vocabularies import END_OF_TEXT, GPT2_TOKENIZER, decode, encode

from text import rows
from text.errors import DataError
from text.instructions import Turn, encode_turns, format_prompt, turns_of
from text.rows import RowFile, StandardLibraryFunctions, load_examples, parse_row_source

ROWS = [
    {"instruction": f"Say {number}.", "input": "", "output": f"{number} it is."}
    for number in range(60)
]


def write(folder: Path, name: str, rows: list) -> Path:
    path = folder / name
    buffer = io.BytesIO()

    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    elif ".csv" in name:
        lines = [",".join(rows[0])] + [
            ",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows
        ]
        buffer.write("\n".join(lines).encode())
    elif ".jsonl" in name:
        buffer.write("\n".join(map(json.dumps, rows)).encode())
    else:
        buffer.write(json.dumps(rows).encode())

    content = buffer.getvalue()

    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".bz2"):
        content = bz2.compress(content)

    path.write_bytes(content)

    return path


def decoded(example) -> tuple[str, str]:
    """Return all of an example, and what of it is to be predicted."""
    targets = example.tokens[example.is_target]

    return decode(example.tokens.tolist()), decode(targets.tolist())


# --- Forms ---


def test_templates_are_those_of_alpaca():
    assert format_prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    # Braces in a text are no places to fill.
    assert format_prompt("Do {input}.", "{instruction}").endswith(
        "paired with an input that provides further context. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nDo {input}.\n\n### Input:\n{instruction}"
        "\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "I", "input": "", "output": "O"}, format_prompt("I"), "O"),
        ({"instruction": "I", "input": None, "output": "O"}, format_prompt("I"), "O"),
        ({"instruction": "I", "output": "O", "other": 1}, format_prompt("I"), "O"),
        ({"instruction": "I", "input": "X", "output": "O"}, format_prompt("I", "X"), "O"),
        ({"prompt": "I", "completion": "O"}, format_prompt("I"), "O"),
        (
            {
                "messages": [
                    {"role": "user", "content": "I"},
                    {"role": "assistant", "content": "O"},
                ]
            },
            format_prompt("I"),
            "O",
        ),
        # Databricks' Dolly, then ShareGPT, TRL and OpenAI's parts.
        ({"instruction": "I", "context": "", "response": "O"}, format_prompt("I"), "O"),
        ({"instruction": "I", "context": "X", "response": "O"}, format_prompt("I", "X"), "O"),
        ({"question": "I", "answer": "O"}, format_prompt("I"), "O"),
        (
            {"conversations": [{"from": "human", "value": "I"}, {"from": "gpt", "value": "O"}]},
            format_prompt("I"),
            "O",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "I"}],
                "completion": [{"role": "assistant", "content": "O"}],
            },
            format_prompt("I"),
            "O",
        ),
        (
            {"prompt": "I", "completion": [{"role": "assistant", "content": "O"}]},
            format_prompt("I"),
            "O",
        ),
        (
            {
                "messages": [
                    {
                        "role": "User",
                        "content": [{"type": "text", "text": "I"}, {"type": "text", "text": "!"}],
                    },
                    {"role": "ASSISTANT", "content": "O"},
                ]
            },
            format_prompt("I!"),
            "O",
        ),
    ],
)
def test_forms_of_rows(row, prompt, answer):
    assert turns_of(row) == [Turn(prompt, answer)]


def test_messages_become_turns():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": "D"},
        {"role": "user", "content": "nobody answers"},
    ]
    expected = [
        Turn("Be kind.\n\n### Instruction:\nA\n\n### Response:\n", "B", "Be kind."),
        Turn("\n\n### Instruction:\nC\n\n### Response:\n", "D", "Be kind."),
    ]

    assert turns_of({"messages": messages}) == expected
    assert turns_of({"messages": json.dumps(messages)}) == expected


def test_any_order_of_messages():
    """Two in a row are joined, a first answer is context, a late system message is text."""
    roles = ("assistant", "system", "developer", "user", "user", "assistant", "assistant", "system")
    messages = [{"role": role, "content": str(n)} for n, role in enumerate((*roles, "assistant"))]
    opening = "1\n\n2\n\n### Response:\n0"

    assert turns_of({"messages": messages}) == [
        Turn(f"{opening}\n\n### Instruction:\n3\n\n4\n\n### Response:\n", "5\n\n6", "1\n\n2"),
        Turn("\n\n### Instruction:\n7\n\n### Response:\n", "8", "1\n\n2"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        None,
        "text",
        [1],
        {},
        {"instruction": "I"},
        {"output": "O"},
        {"instruction": 1, "output": "O"},
        {"instruction": "I", "output": ["O"]},
        {"messages": []},
        {"messages": 3},
        {"messages": "no JSON"},
        {"messages": [{"role": "user", "content": "I"}]},
        {"messages": [{"role": "assistant", "content": "O"}]},
        {"messages": ["I", "O"]},
        {"messages": [{"role": "tool", "content": "I"}]},
        {"messages": [{"role": ["user"], "content": "I"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        {"prompt": "I", "completion": [{"role": "user", "content": "O"}]},
    ],
)
def test_malformed_rows_are_told(row):
    with pytest.raises(ValueError):  # noqa: PT011
        turns_of(row)


# --- Tokens and targets ---


def test_answers_alone_are_predicted_and_end_with_end_of_text():
    turns = [Turn("one? ", "yes"), Turn("two? ", "no")]
    text, targets = decoded(encode_turns(turns, GPT2_TOKENIZER, 100, mask_input=True))

    assert text == "one? yes<|endoftext|>two? no<|endoftext|>"
    assert targets == "yes<|endoftext|>no<|endoftext|>"


def test_all_is_predicted_without_a_mask():
    text, targets = decoded(
        encode_turns([Turn("one? ", "yes")], GPT2_TOKENIZER, 100, mask_input=False)
    )

    assert text == targets == "one? yes<|endoftext|>"


def test_text_of_an_answer_is_never_a_special_token():
    example = encode_turns([Turn("a", "<|endoftext|>")], GPT2_TOKENIZER, 100, mask_input=True)

    assert example.tokens.tolist().count(END_OF_TEXT) == 1


def test_a_prompt_is_encoded_as_in_generation():
    turns = turns_of(ROWS[7])
    prompt = encode(turns[0].prompt)

    assert (
        encode_turns(turns, GPT2_TOKENIZER, 100, True).tokens[: len(prompt)].tolist()
        == prompt.tolist()
    )


# --- Splits, and rows that are left out ---


@pytest.mark.parametrize(
    "name",
    [
        "rows.json",
        "rows.jsonl",
        "rows.csv",
        "rows.parquet",
        "rows.json.gz",
        "rows.jsonl.bz2",
        "rows.csv.gz",
        "rows.parquet.gz",
    ],
)
def test_rows_of_any_file(tmp_path, name):
    examples = load_examples(RowFile(write(tmp_path, name, ROWS)), GPT2_TOKENIZER, 128, True)
    answers = {decoded(example)[1] for example in examples.train + examples.test}

    assert answers == {f"{number} it is.<|endoftext|>" for number in range(60)}
    assert examples.notes == []


def test_examples_know_what_most_of_them_begin_with(tmp_path):
    def messages(introduction: str) -> dict:
        system = [{"role": "system", "content": introduction}] if introduction else []
        question = {"role": "user", "content": "I"}
        return {"messages": [*system, question, {"role": "assistant", "content": "O"}]}

    rare, often = messages("You are a judge."), messages("You are a ferryman \ud800.")
    path = write(tmp_path, "a.jsonl", [rare, *ROWS[:2], often, often, often])
    assert (
        load_examples(RowFile(path), GPT2_TOKENIZER, 64, True).introduction
        == "You are a ferryman ?."
    )

    path = write(tmp_path, "b.jsonl", [rare, *ROWS[:2]])
    assert load_examples(RowFile(path), GPT2_TOKENIZER, 64, True).introduction == ""


def test_a_tenth_is_set_aside_by_place_alone(tmp_path):
    many = [{"prompt": "?", "completion": f"{number}"} for number in range(2000)]
    other = [{"prompt": "!", "completion": f"{number} too"} for number in range(2000)]
    splits = []

    for name, rows_ in (("a.jsonl", many), ("b.jsonl", other)):
        examples = load_examples(RowFile(write(tmp_path, name, rows_)), GPT2_TOKENIZER, 64, True)
        assert len(examples.train) + len(examples.test) == 2000
        assert 160 <= len(examples.test) <= 240
        splits.append({decoded(e)[1].split("<")[0].split()[0] for e in examples.test})

    assert splits[0] == splits[1]


@pytest.mark.parametrize("num_rows", [2, 3, 7])
def test_few_rows_are_split_all_the_same(tmp_path, num_rows):
    examples = load_examples(
        RowFile(write(tmp_path, "a.jsonl", ROWS[:num_rows])), GPT2_TOKENIZER, 64, True
    )

    assert examples.train
    assert examples.test
    assert len(examples.train) + len(examples.test) == num_rows


def test_rows_that_are_no_use_are_counted_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    prompt = len(encode(format_prompt("I")))
    lines = [
        *map(json.dumps, ROWS),
        "no JSON",
        json.dumps({"prompt": "P"}),
        json.dumps({"prompt": "P", "completion": " \n"}),
        json.dumps({"instruction": "I", "output": "word " * 200}),
        json.dumps({"instruction": "I " * 200, "output": "O"}),
    ]
    path.write_text("\n\n".join(lines))
    examples = load_examples(RowFile(path), GPT2_TOKENIZER, prompt + 10, True)

    assert len(examples.train) + len(examples.test) == 61
    assert [note.split(" (")[0] for note in examples.notes] == [
        "2 rows are malformed and left out",
        "1 rows have an empty answer and are left out",
        f"1 rows have no room for an answer in {prompt + 10} tokens and are left out",
        f"1 rows are cut at {prompt + 10} tokens",
    ]
    assert "line 121: this is no JSON; line 123: there is neither" in examples.notes[0]

    for example in examples.train + examples.test:
        assert 2 <= len(example.tokens) <= prompt + 11
        assert example.is_target[1:].any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "0 rows"),
        (
            "a.jsonl",
            b'{"prompt": "P"}',
            "0 rows to train and test on, 2 are needed; 1 rows are malformed",
        ),
        ("a.json", b"[1, 2", "cannot be read"),
        ("a.parquet", b"nothing", "cannot be read"),
        ("a.json.gz", b"nothing", "cannot be read"),
        ("a.csv", b"a,b\n1,2\n", "neither `instruction` and `output`"),
        ("a.csv", b"prompt,completion\na,b,c\nd\n", "2 rows are malformed .*as many values"),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', "line 2: a quote is opened"),
    ],
)
def test_a_file_without_rows_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message.replace("`", ".")) as caught:
        load_examples(RowFile(tmp_path / name), GPT2_TOKENIZER, 64, True)

    assert len(str(caught.value).splitlines()) == 1


def test_other_rows_have_another_fingerprint(tmp_path):
    source = RowFile(write(tmp_path, "a.jsonl", ROWS))
    before = load_examples(source, GPT2_TOKENIZER, 64, True).fingerprint

    assert load_examples(source, GPT2_TOKENIZER, 64, True).fingerprint == before
    assert load_examples(source, GPT2_TOKENIZER, 64, False).fingerprint != before

    write(tmp_path, "a.jsonl", [*ROWS[:-1], {**ROWS[-1], "output": "another"}])
    assert load_examples(source, GPT2_TOKENIZER, 64, True).fingerprint != before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "nothing is neither"),
        ("a" * 5000, "File name too long"),
        ("data/rows.jsonl", "no file"),
        ("data/rows.txt", "no file"),
        ("nobody", "nobody is neither"),
        ("tests", "is no .json"),
    ],
)
def test_what_is_no_source_is_refused(value, message, monkeypatch):
    monkeypatch.chdir(ROOT)

    with pytest.raises(ValueError, match=message):
        parse_row_source(value)


# --- The standard library ---


def test_functions_of_the_standard_library(monkeypatch):
    found = list(StandardLibraryFunctions().rows())

    assert len(found) > 2000
    assert len({place for place, _ in found}) == len(found)

    for place, row in found[::50]:
        name = row["instruction"].split("(")[0]
        node = ast.parse(row["output"]).body[0]
        assert node.name == name, place
        assert ast.get_docstring(node) is None
        assert len(row["output"]) <= StandardLibraryFunctions.MAX_SIZE


def test_row_of_a_function():
    source = textwrap.dedent('''
        class Shelf:
            @property
            def size(self, unit="m"):
                """Return how long it is.

                Nobody reads on.
                """
                text = """two
            lines"""
                return self.books * text


        def empty():
            """Nothing but this."""


        def silent():
            return 1


        async def two(): """On one line."""; return 2
    ''')
    tree = ast.parse(source)
    found = [rows.row_of_function(node, owner, source) for node, owner in rows.functions_of(tree)]

    assert found[1:] == [None, None, None]
    assert found[0]["instruction"] == (
        "size(self, unit='m'): Return how long it is. (a method of Shelf)"
    )
    assert found[0]["output"].startswith('@property\ndef size(self, unit="m"):\n    text = ')
    assert found[0]["output"].endswith("    return self.books * text")


def test_hostile_text_is_text(tmp_path):
    lines = [
        *map(json.dumps, ROWS),
        json.dumps({"prompt": "a" * 1_000_000, "completion": "b"}),
        json.dumps({"prompt": "c", "completion": "a" * 1_000_000}),
        json.dumps({"prompt": "<|endoftext|>", "completion": "<|endoftext|>"}),
        json.dumps({"prompt": "d", "completion": "a" + " " * 1_000_000 + "b"}),
        json.dumps({"prompt": "e", "completion": "two\u2028lines"}, ensure_ascii=False),
        json.dumps({"messages": [{"role": "\ud800\n" * 1000, "content": ""}]}),
        json.dumps({"messages": "[" * 100_000}),
        '{"prompt": "lone \\ud800", "completion": "half \\udc00"}',
        '{"prompt": "number", "completion": NaN}',
        "[]",
        "3",
        "[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    examples = load_examples(RowFile(tmp_path / "a.jsonl"), GPT2_TOKENIZER, 64, True)
    targets = [decoded(example)[1] for example in examples.train + examples.test]

    assert len(targets) == 65
    assert "half ?<|endoftext|>" in targets
    assert max(len(example.tokens) for example in examples.train + examples.test) <= 65
    assert sum(e.tokens.tolist().count(END_OF_TEXT) for e in examples.train + examples.test) == 63
    assert [note.split(" (")[0] for note in examples.notes] == [
        "6 rows are malformed and left out",
        "1 rows have no room for an answer in 64 tokens and are left out",
        "2 rows are cut at 64 tokens",
    ]
    assert "two\u2028lines<|endoftext|>" in targets
    assert all(len(note) < 600 and note.isprintable() for note in examples.notes)


def test_an_answer_cut_behind_an_earlier_one_is_counted(tmp_path):
    messages = [{"role": role, "content": role} for role in ("user", "assistant")] * 2
    turns = turns_of({"messages": messages})
    size = len(encode_turns(turns[:1], GPT2_TOKENIZER, 1000, True).tokens) - 1

    assert not encode_turns(turns[:1], GPT2_TOKENIZER, size, True).is_cut
    assert encode_turns(turns, GPT2_TOKENIZER, size, True).is_cut
