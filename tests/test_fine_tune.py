"""Whole runs of fine-tune.py: what a user does, and what happens to them."""

import csv
import hashlib
import importlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, finish, launch
from faults import KILL_AT, SIGNAL_AT, Payload, read
from hub_server import parquet_rows, serve
from vocabularies import END_OF_TEXT, GPT2_TOKENIZER

from processes import Group, assert_close_runs, finished
from training.checkpoint import build_model, load_checkpoint, save_checkpoint


@pytest.fixture
def small(base_path, rows_path, tmp_path):
    """Return a function that builds the command line of a run of seconds: 3 epochs of 6 updates."""

    def build(*extra: str, out: Path = tmp_path, dataset: Path | str = rows_path) -> list[str]:
        return [
            f"--base_model_path={base_path}",
            f"--dataset={dataset}",
            f"--checkpoint_path={out / 'lora.pt'}",
            f"--metrics_path={out / 'metrics.csv'}",
            "--rank=4",
            "--batch_size=2",
            "--gradient_accumulation_steps=4",
            "--num_epochs=3",
            "--learning_rate=0.01",
            "--device=cpu",
            "--precision=fp32",
            "--compile=False",
            "--seed=7",
            *extra,
        ]

    return build


@pytest.fixture
def folders(tmp_path):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()

    return tmp_path / "left", tmp_path / "right"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_run_learns_and_leaves_the_base_alone(fine_tune, small, base_path, tmp_path, capsys):
    before = digest(base_path)

    assert fine_tune.main(small("--num_epochs=4")) == 0

    output = capsys.readouterr().out
    state = read(tmp_path / "lora.pt")
    first = float(output.split("base model: ")[-1].split(")")[0])

    with open(tmp_path / "metrics.csv") as file:
        losses = [float(row["test_loss"]) for row in csv.DictReader(file)]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] < first
    assert digest(base_path) == before
    assert state["lora_args"] == {"rank": 4, "alpha": 2.0}
    assert set(state["lora"]) == {
        f"blocks.{number}.{layer}.lora_{matrix}"
        for number in range(2)
        for layer in ("attention.query_key_value", "attention.output", "mlp.hidden", "mlp.output")
        for matrix in "ab"
    }
    assert not {"model", "model_args"} & state.keys()
    # Kept for each weight of the adapter, and for each of its rows, and for nothing else.
    kept = [m for o in state["optimizer"] for s in o["state"].values() for m in s.values()]
    expected = sum(weight.numel() + len(weight) for weight in state["lora"].values())
    assert sum(m.numel() for m in kept if torch.is_tensor(m) and m.ndim) == expected
    assert "Next:   python generate.py" in output


def test_an_adapter_keeps_what_its_rows_began_with(fine_tune, small, tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [
        {"role": role, "content": "A ferryman."} for role in ("system", "user", "assistant")
    ]
    path.write_text(f"{json.dumps({'messages': messages})}\n" * 20)

    assert fine_tune.main(small("--num_epochs=1", dataset=path)) == 0
    assert read(tmp_path / "lora.pt")["introduction"] == "A ferryman."


def test_what_was_saved_is_what_was_tested(fine_tune, small, base_path, rows_path, tmp_path):
    """The base with the adapter merged has, by plain cross entropy, the loss that was written."""
    from text.rows import RowFile, load_examples
    from training.checkpoint import merge_lora_checkpoint
    from training.instruction_data import IGNORE_INDEX, collate

    fine_tune.main(small())
    model = build_model(load_checkpoint(base_path, ("model",)), base_path)
    state = load_checkpoint(tmp_path / "lora.pt", ("lora",))
    merge_lora_checkpoint(model, state, tmp_path / "lora.pt")
    total = count = 0

    for example in load_examples(RowFile(rows_path), GPT2_TOKENIZER, 64, True).test:
        x, y = collate([example], 1, 64, END_OF_TEXT)
        logits = model(x)
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        count += int((y != IGNORE_INDEX).sum())

    assert abs(total / count - state["metrics"][-1]["test_loss"]) < 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        ["--dropout=0.1"],
        ["--dropout=0.1", "--precision=bf16", "--optimizer=adamw"],
        pytest.param(["--dropout=0.1", "--compile=True"], marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "compiled"],
)
def test_killed_twice_and_resumed_it_ends_as_if_nothing_had_happened(
    fine_tune, small, folders, flags
):
    """Killed in the middle of an epoch, then at the boundary of one."""
    undisturbed, killed = folders
    fine_tune.main(small(*flags, out=undisturbed))
    argv = small(*flags, out=killed)

    for extra, step in (([], 8), (["--resume"], 12)):
        process = launch([*argv, *extra], KILL_AT.format(step), script="fine-tune")
        status, _, errors = finish(process)
        assert status == -signal.SIGKILL, errors

    assert read(killed / "lora.pt")["position"] == 12
    assert fine_tune.main([*argv, "--resume"]) == 0
    assert_same_run(undisturbed / "lora.pt", killed / "lora.pt")


def test_signal_saves_and_loses_no_update(fine_tune, small, folders):
    undisturbed, stopped = folders
    fine_tune.main(small(out=undisturbed))
    argv = small(out=stopped)
    patch = SIGNAL_AT.format(7, [int(signal.SIGTERM)])
    status, output, _ = finish(launch(argv, patch, script="fine-tune"))

    assert status == 143
    assert "Stopped after update 7" in output
    assert fine_tune.main([*argv, "--resume"]) == 0
    assert_same_run(undisturbed / "lora.pt", stopped / "lora.pt")

    of_the_base = [read(folder / "lora.pt")["base_test_loss"] for folder in folders]
    assert of_the_base[0] == of_the_base[1]


def test_an_epoch_ends_with_the_batches_that_are_left(fine_tune, small, tmp_path, capsys):
    fine_tune.main(small("--batch_size=3", "--gradient_accumulation_steps=5", "--num_epochs=2"))
    num_train = int(capsys.readouterr().out.split(", ")[1].split(" rows")[0])

    assert read(tmp_path / "lora.pt")["position"] == 2 * -(-num_train // 15)


def test_accumulation_and_batch_size_are_one_product(fine_tune, small, folders):
    """The mean is over the tokens of a step, however they are spread over batches."""
    left, right = folders
    # One update, so that both have the same rows in it.
    flags = ["--num_epochs=1", "--dropout=0"]
    fine_tune.main(small("--batch_size=50", "--gradient_accumulation_steps=1", *flags, out=left))
    fine_tune.main(small("--batch_size=1", "--gradient_accumulation_steps=50", *flags, out=right))
    row, other = (read(folder / "lora.pt")["metrics"][0] for folder in folders)

    assert abs(row["train_loss"] - other["train_loss"]) < 1e-5
    assert abs(row["gradient_norm"] / other["gradient_norm"] - 1) < 1e-4


def test_other_data_cannot_be_resumed(fine_tune, small, rows_path, tmp_path, error_of):
    fine_tune.main(small("--num_epochs=1"))
    other = tmp_path / "other.jsonl"
    other.write_text(rows_path.read_text().replace("Count", "Go"))

    assert error_of([*small(dataset=other), "--resume"], fine_tune)[0] == 1
    assert "The data changed" in error_of([*small(dataset=other), "--resume"], fine_tune)[1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rank=3", "rank 4 (saved) and 3 (given)"),
        ("--alpha=1", "alpha 2.0 (saved) and 1.0 (given)"),
        ("--mask_input=False", "mask_input True (saved) and False (given)"),
        ("--batch_size=4", "batch_size 2 (saved) and 4 (given)"),
        ("--seed=8", "seed 7 (saved) and 8 (given)"),
    ],
)
def test_another_run_cannot_be_resumed(fine_tune, small, error_of, flag, message):
    fine_tune.main(small("--num_epochs=1"))
    status, error = error_of([*small(flag), "--resume"], fine_tune)

    assert status == 1
    assert message in error


def test_an_adapter_of_another_base_cannot_be_resumed(
    fine_tune, small, base_path, tmp_path, error_of
):
    fine_tune.main(small("--num_epochs=1"))
    state = read(base_path)
    state["model"]["norm.weight"] += 1
    save_checkpoint(tmp_path / "base.pt", state)
    argv = [*small(f"--base_model_path={tmp_path / 'base.pt'}"), "--resume"]
    status, error = error_of(argv, fine_tune)

    assert status == 1
    assert "was trained on another base model" in error


def test_what_is_no_adapter_cannot_be_resumed(fine_tune, small, base_path, tmp_path, error_of):
    (tmp_path / "lora.pt").write_bytes(base_path.read_bytes())
    status, error = error_of([*small(), "--resume"], fine_tune)

    assert status == 1
    assert "it has no lora_args, lora, base, base_test_loss" in error


def test_code_in_an_adapter_is_not_run(fine_tune, small, tmp_path, error_of):
    """Its checksum is right, so it is the loader that has to refuse it."""
    payload = Payload(os.system, f"touch {tmp_path / 'mark'}")
    save_checkpoint(tmp_path / "lora.pt", {"format_version": 1, "lora": payload})
    status, error = error_of([*small(), "--resume"], fine_tune)

    assert status == 1
    assert "is not a checkpoint of this project" in error
    assert "weights_only" not in error
    assert not (tmp_path / "mark").exists()


def test_nothing_to_do(fine_tune, small, tmp_path, capsys):
    fine_tune.main(small())
    before = digest(tmp_path / "lora.pt")

    assert fine_tune.main([*small(), "--resume"]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert digest(tmp_path / "lora.pt") == before


def test_nothing_to_do_whatever_the_base_is_by_now(fine_tune, small, base_path, tmp_path, capsys):
    fine_tune.main(small())
    state = read(base_path)
    state["model"]["norm.weight"] += 1
    save_checkpoint(tmp_path / "base.pt", state)
    argv = small("--resume", f"--base_model_path={tmp_path / 'base.pt'}")

    assert fine_tune.main(argv) == 0
    assert "Nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "status", "message"),
    [
        ("--rank=0", 2, "--rank: must be a whole number above 0"),
        ("--rank=17", 2, "--rank: The rank must be from 1 to 16"),
        ("--mask_input=maybe", 2, "must be True or False"),
        ("--dataset=nobody", 2, "nobody is neither alpaca"),
        ("--base_model_path=missing.pt", 1, "There is no checkpoint at missing.pt"),
        ("--checkpoint_path=BASE", 2, "this is the path of the base model"),
        ("--metrics_path=LORA", 2, "is the path of a checkpoint"),
    ],
)
def test_wrong_arguments(fine_tune, small, base_path, tmp_path, error_of, flag, status, message):
    before = digest(base_path)
    flag = flag.replace("BASE", f"{base_path.parent}/./{base_path.name}")
    flag = flag.replace("LORA", str(tmp_path / "lora.pt"))
    found, error = error_of(small(flag), fine_tune)

    assert found == status
    assert message in error
    assert digest(base_path) == before
    assert not (tmp_path / "lora.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--metrics_path=BASE/checkpoint.pt"],
        ["--base_model_path=OUT/lora.previous.pt"],
        ["--base_model_path=OUT/lora.best.pt"],
        ["--base_model_path=OUT/lora.pt.tmp"],
        ["--checkpoint_path=BASE/checkpoint.previous.pt"],
        ["--metrics_path=BASE/checkpoint.best.pt"],
        ["--metrics_path=ROWS"],
        ["--base_model_path=OUT/base.svg", "--metrics_path=OUT/base.csv"],
        ["--checkpoint_path=ROWS"],
    ],
)
def test_nothing_that_is_read_is_written_over(
    fine_tune, small, base_path, rows_path, tmp_path, error_of, flags
):
    for name in ("lora.previous.pt", "lora.best.pt", "lora.pt.tmp", "base.svg"):
        (tmp_path / name).write_bytes(base_path.read_bytes())

    before = {path: digest(path) for path in (base_path, rows_path, *tmp_path.iterdir())}
    places = {"BASE": base_path.parent, "OUT": tmp_path, "ROWS": rows_path}

    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]

    assert error_of(small(*flags), fine_tune)[0] == 2
    assert {path: digest(path) for path in before} == before


def test_a_link_to_the_base_is_no_place_for_the_adapter(
    fine_tune, small, base_path, tmp_path, error_of
):
    (tmp_path / "lora.pt").symlink_to(base_path)

    assert error_of(small(), fine_tune)[0] == 2


def test_rows_without_an_answer_are_left_out_and_the_loss_stays_finite(
    fine_tune, small, rows_path, tmp_path, capsys
):
    path = tmp_path / "rows.jsonl"
    extra = [
        {"instruction": "I " * 200, "output": "cut away"},
        {"instruction": "I", "output": ""},
        {"instruction": 1, "output": ""},
    ]
    path.write_text("\n".join([rows_path.read_text(), *map(json.dumps, extra)]))

    assert fine_tune.main(small("--num_epochs=1", dataset=path)) == 0

    output = capsys.readouterr().out
    assert output.count("Note:   1 rows") == 3
    assert read(tmp_path / "lora.pt")["metrics"][-1]["train_loss"] < 20


def test_alpaca_comes_from_the_hub(fine_tune, small, tmp_path):
    """The columns of the original; `text` is what we make ourselves."""
    rows = [
        {
            "instruction": f"Name a thing, {number}.",
            "input": "Anything." if number % 2 else "",
            "output": f"Thing {number}.",
            "text": "not read",
        }
        for number in range(40)
    ]
    files = {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet_rows(rows)}

    with serve("tatsu-lab/alpaca", files) as (endpoint, requests):
        env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        argv = small("--num_epochs=1", dataset="alpaca")
        status, output, errors = finish(launch(argv, env=env, script="fine-tune"))
        num_requests = len(requests)

    assert status == 0, errors
    assert num_requests > 0
    assert "Data:   alpaca, " in output

    # Once here, it needs no network.
    env["HF_HUB_OFFLINE"] = "1"
    status, _, errors = finish(launch(argv, env=env, script="fine-tune"))
    assert status == 0, errors


def test_network_that_fails_is_one_line(small, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    patch = "import time; time.sleep = lambda seconds: None"
    process = launch(small(dataset="alpaca"), patch, env=env, script="fine-tune")
    status, _, errors = finish(process)

    assert status == 1
    # The client has tried often enough; nobody waits for all of that again.
    assert "again in" not in errors
    assert "tatsu-lab/alpaca cannot be read from the Hub" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_compiled_without_a_break(base_path):
    """One graph for blocks of all lengths: the compiler gives up on nothing."""
    from training.lora import add_lora

    model = build_model(load_checkpoint(base_path, ("model",)), base_path)
    add_lora(model, 4, 2.0)
    expected = model(torch.arange(40)[None])
    model.compile(dynamic=True, fullgraph=True, backend="aot_eager")

    for length in (24, 40):
        x = torch.arange(length)[None]
        model(x, x).backward()

    torch.testing.assert_close(model(torch.arange(40)[None]), expected)


def test_tiny_preset_is_offline_and_small(fine_tune):
    args = fine_tune.build_parser().parse(["--preset=tiny"], fine_tune.PRESETS)

    assert args.dataset == "stdlib"
    assert set(fine_tune.PRESETS["tiny"]) <= vars(args).keys()
    assert importlib.import_module("pre-train").PRESETS["tiny"]["embedding_dimensions"] >= args.rank


def test_masked_loss_equals_hugging_face():
    """The same rows, with our labels in theirs."""
    from twins import hugging_face_pair

    from text.instructions import Example
    from training.instruction_data import IGNORE_INDEX, collate

    ours, theirs = hugging_face_pair()
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(
            torch.randint(300, (n,), generator=generator).numpy(),
            (torch.rand(n, generator=generator) < 0.5).numpy(),
        )
        for n in (9, 20, 30)
    ]
    x, y = collate(examples, 3, 32, END_OF_TEXT)
    x = x.clamp(max=299)
    # Their labels stand at the place of the token itself, and are moved on inside.
    labels = torch.full_like(x, IGNORE_INDEX)
    labels[:, 1:] = y[:, :-1]
    last = torch.where(y[:, -1] >= 0)[0]
    assert not len(last), "the last target of a full row has no place in their labels"

    torch.testing.assert_close(ours(x, y), theirs(x, labels=labels).loss, atol=1e-5, rtol=1e-5)

    ours.requires_grad_(False)
    torch.testing.assert_close(ours(x, y), theirs(x, labels=labels).loss, atol=1e-5, rtol=1e-5)


def test_a_loading_script_is_not_run_and_its_conversion_taken(small, tmp_path):
    rows = [{"prompt": f"Name {number}.", "completion": f"{number}"} for number in range(30)]
    mark = tmp_path / "mark"
    files = {"rows.py": f"open({str(mark)!r}, 'w')".encode()}
    converted = {"default/train/0000.parquet": parquet_rows(rows)}

    with serve("some/rows", files, converted) as (endpoint, _):
        env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        argv = small("--num_epochs=1", dataset="some/rows")
        status, output, errors = finish(launch(argv, env=env, script="fine-tune"))

    assert status == 0, errors
    assert "Data:   some/rows, " in output
    assert not mark.exists()


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        pytest.param(2, ["--optimizer=adamw", "--mask_input=False"], marks=pytest.mark.slow),
        (3, []),
        pytest.param(3, ["--sharding=full"], marks=pytest.mark.slow),
        (2, ["--sharding=full", "--optimizer=adamw"]),
    ],
    ids=["adamw", "muon", "muon-full", "adamw-full"],
)
def test_any_number_of_processes_learns_the_same(small, folders, size, flags):
    """The last update of an epoch has a single batch."""
    left, right = folders
    flags = [*flags, "--learning_rate=1e-3"]
    one = finished(Group(small(*flags, out=left), 1, left, "fine-tune"), "lora.pt")
    many = finished(Group(small(*flags, out=right), size, right, "fine-tune"), "lora.pt")

    assert_close_runs(one, many)
    assert one["base_test_loss"] == pytest.approx(many["base_test_loss"], abs=1e-5)


@pytest.mark.parametrize("sharding", [pytest.param("optimizer", marks=pytest.mark.slow), "full"])
def test_stopped_and_resumed_on_two_processes(small, folders, sharding):
    """A base in bf16, beside an adapter in float32; bit for bit."""
    left, right = folders
    flags = [f"--sharding={sharding}", "--precision=bf16"]
    stop = """
take_step = trainer.Trainer.take_step
def stopping(self, *args):
    if self.step == 9 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take_step(self, *args)
trainer.Trainer.take_step = stopping
"""
    finished(Group(small(*flags, out=left), 2, left, "fine-tune"), "lora.pt")
    group = Group(small(*flags, out=right), 2, right, "fine-tune", patch=stop)
    assert group.wait() == [128 + signal.SIGTERM] * 2
    group = Group(small(*flags, "--resume", out=right), 2, right, "fine-tune")
    assert finished(group, "lora.pt")["position"] == 18

    assert_same_run(left / "lora.pt", right / "lora.pt")
