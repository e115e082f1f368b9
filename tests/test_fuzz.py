"""Anything at all on the command lines and in the files: an answer in one line, or it works.

`pytest -m slow tests/test_fuzz.py` tries as much as the README says, the other runs a sample.
"""

import csv
import gzip
import importlib
import io
import json
import lzma
import os
import random
import re

import pytest
from faults import with_right_checksum
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trainers import lora_state_dict
from vocabularies import GPT2_TOKENIZER

from model import GPT
from text.damage import Damage
from text.errors import DataError
from text.readers import Reader
from text.sources import TextFiles
from text.tokenizer import GPT2
from training.checkpoint import (
    CheckpointError,
    build_model,
    fingerprint,
    load_checkpoint,
    merge_lora_checkpoint,
    save_checkpoint,
)
from training.lora import add_lora

# --- Command lines ---

WORDS = ["", "0", "-1", "1", "2", "3.5", "1e-4", "nan", "inf", "-inf", "1e400", "2**70", "True"]
WORDS += ["False", "maybe", "None", "stdlib", "cpu", "cuda", "cuda:9", "mps", "tpu", "tiny", "auto"]
WORDS += ["adamw", "muon", "linear", "full", ".", "/", "=", "a=b=c", "owner/name", "--", "-", "٣"]

# All that a system can hand to a program: bytes that are no UTF-8 become surrogates.
values = st.one_of(
    st.sampled_from(WORDS),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20),
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
)


def command_lines(flags: list[str]) -> st.SearchStrategy[list[str]]:
    # What is written stays in the folder of the test.
    def assigned(pair: tuple[str, str]) -> tuple[str, str]:
        return pair[0], f"./{pair[1]}" if pair[0].endswith("_path") else pair[1]

    pairs = st.tuples(st.sampled_from(flags), values).map(assigned)
    argument = st.one_of(
        pairs.map(lambda pair: ["=".join(pair)]),
        pairs.map(list),
        st.sampled_from(flags).map(lambda flag: [flag]),
        values.map(lambda value: [value]),
    )

    return st.lists(argument, max_size=6).map(lambda parts: [x for part in parts for x in part])


def check_many(number: int, strategy: st.SearchStrategy, check) -> None:
    """Call check with examples of a strategy, and with those that once failed."""
    options = {"deadline": None, "suppress_health_check": list(HealthCheck)}

    settings(max_examples=number, **options)(given(strategy)(check))()


@pytest.fixture
def check_answer(capsys):
    """Return a function that calls a script: it works, or says in one line why not."""

    def check(main, argv: list[str]) -> None:
        try:
            status = main(argv)
        except SystemExit as exit_:
            status = exit_.code

        errors = capsys.readouterr().err
        lines = [line for line in re.split(r"[\r\n]", errors) if line.startswith("error: ")]

        assert "Traceback" not in errors
        assert status in (0, 1, 2)
        assert len(lines) == (1 if status else 0)

    return check


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["pre-train", "fine-tune", "generate"])
def test_any_command_line(monkeypatch, tmp_path, check_answer, name, number):
    """In front of what the scripts do."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)

    if name == "generate":
        monkeypatch.setattr(script, "TextGenerator", lambda *args: None)
        monkeypatch.setattr(script, "answer_all", lambda *args: None)
    else:
        # As a run that has no epoch left.
        monkeypatch.setattr(script, "prepare_resume", lambda settings, *_: (settings, {}))
        monkeypatch.setattr(script, "is_finished", lambda *_: True)

    actions = script.build_parser()._actions
    flags = [option for action in actions for option in action.option_strings]

    check_many(number, command_lines(flags), lambda argv: check_answer(script.main, argv))


def runs() -> st.SearchStrategy[list[str]]:
    """Command lines of small runs, right and wrong."""
    numbers = st.sampled_from([1, 2, 3, 4, 7])
    rates = st.sampled_from(["1e-9", "5e-4", "1", "1e30"])
    options = {
        "block_size": st.sampled_from([1, 2, 16, 10**6]),
        "embedding_dimensions": st.sampled_from([1, 2, 4, 6]),
        "num_attention_heads": numbers,
        "num_hidden_layers": numbers,
        "dropout": st.sampled_from([0, 0.5, 0.999]),
        "batch_size": numbers,
        "gradient_accumulation_steps": numbers,
        "samples_per_epoch": st.sampled_from([1, 8, 12, 50]),
        "num_epochs": numbers,
        "optimizer": st.sampled_from(["adamw", "muon"]),
        "max_gradient_norm": rates,
        "learning_rate": rates,
        "lr_schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "warmup_steps": st.sampled_from([0, 1, 100, 10**12]),
        "min_learning_rate": st.sampled_from(["0", "1e-5", "2"]),
        "weight_decay": rates,
        "seed": st.sampled_from([0, 2**63 - 1]),
        "eval_interval": numbers,
        "checkpoint_interval": numbers,
        "resume": st.booleans(),
        "precision": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
        "activation_checkpointing": st.booleans(),
        "dry_run": st.booleans(),
    }

    return st.fixed_dictionaries({}, optional=options).map(
        lambda chosen: [f"--{name}={value}" for name, value in chosen.items()]
    )


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_any_small_run(pre_train, small, check_answer, number):
    """One after the other in the same folder, so that there may be something to resume."""
    base = small("--num_hidden_layers=1", "--samples_per_epoch=8")

    check_many(number, runs(), lambda flags: check_answer(pre_train.main, [*base, *flags]))


# --- Files ---


def damage(content: bytes, generator: random.Random) -> bytes:
    """Change some bytes, take some out, put some in or repeat some."""
    damaged = bytearray(content)

    for _ in range(generator.choice([1, 1, 2, 8, 40])):
        # What says how the rest is to be read is at the beginning, and at the end.
        end = generator.choice([1000, len(damaged), len(damaged)])
        place = generator.randrange(max(1, min(len(damaged), end)))
        place = generator.choice([place, max(0, len(damaged) - 1 - place)])
        size = generator.choice([1, 1, 4, 100])
        new = generator.choice([generator.randbytes(size), bytes(size), b"\xff" * size])
        way = generator.randrange(4)

        if way == 0:
            damaged[place : place + size] = new[: len(damaged) - place]
        elif way == 1:
            del damaged[place : place + size]
        elif way == 2:
            damaged[place:place] = new
        else:
            damaged[place:place] = damaged[place : place + 200]

    return bytes(damaged)


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_summed", [False, True])
@pytest.mark.parametrize("kind", ["model", "lora"])
def test_any_damage_of_a_checkpoint(tmp_path, kind, is_summed, number):
    """With a checksum that is right, what does not make a model is refused all the same."""
    path = tmp_path / "checkpoint.pt"
    model_args = {"vocabulary_size": 20, "block_size": 4, "embedding_dimensions": 4}
    model_args |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    model = GPT(**model_args)
    state = {"format_version": 1, "encoding": GPT2, "model_args": model_args}
    save_checkpoint(path, {**state, "model": model.state_dict()})

    if kind == "lora":
        base = fingerprint(model.state_dict())
        add_lora(model, 2, 2.0, 0.0)
        lora = {"lora_args": {"rank": 2, "alpha": 2.0}, "lora": lora_state_dict(model)}
        save_checkpoint(path, {"format_version": 1, "base": base, **lora})

    whole, generator = path.read_bytes(), random.Random(0)
    num_refused = 0

    for _ in range(number):
        content = damage(whole, generator)
        path.write_bytes(with_right_checksum(content) if is_summed else content)

        try:
            if kind == "model":
                build_model(load_checkpoint(path, ("model_args", "model", "encoding")), path)
            else:
                base = GPT(**model_args)
                lora = load_checkpoint(path, ("lora_args", "lora", "base"))
                merge_lora_checkpoint(base, lora, path)
        except CheckpointError:
            num_refused += 1
        else:
            assert is_summed or content == whole

    assert num_refused > 0.5 * number


TEXTS = ["the cat sat on the mat " * 9, "", None, "\N{GRINNING FACE}\u0301 ß", 'a,b\n"c" '] * 9


def files_of_text() -> dict[str, bytes]:
    """Return a file of every kind, by its name."""
    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table, row_group_size=10)
    rows = io.StringIO()
    csv.writer(rows).writerows([["text"], *([text] for text in TEXTS)])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)

    return {
        "a.txt": "\n\n".join(map(str, TEXTS)).encode(),
        "utf16.txt": "\n".join(map(str, TEXTS)).encode("utf-16"),
        "a.jsonl": lines.encode(),
        "a.csv": rows.getvalue().encode(),
        "a.parquet": table.getvalue(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.csv.xz": lzma.compress(rows.getvalue().encode()),
        "a.txt.zst": pyarrow.compress(lines.encode(), "zstd", asbytes=True),
    }


@pytest.mark.parametrize("number", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(files_of_text()))
def test_any_damage_of_a_text(tmp_path, name, number):
    """Also files that are random from end to end."""
    path, whole = tmp_path / name, files_of_text()[name]
    generator = random.Random(0)

    for turn in range(number):
        content = generator.randbytes(turn) if turn % 4 == 0 else damage(whole, generator)
        path.write_bytes(content)

        try:
            for file in TextFiles(path).listing().files:
                with Reader(file) as reader:
                    while not reader.is_finished:
                        for documents in reader.chunk(Damage()):
                            found = GPT2_TOKENIZER.encode_documents(documents.texts)
                            assert len(found) == len(documents.texts)
        except DataError:
            pass
