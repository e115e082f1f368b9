"""`--initial_checkpoint`: a run that begins with given weights."""

import importlib
import os
import weakref

import pytest
import torch
from conftest import ROOT, assert_same, assert_same_run, finish, launch

from model import GPT
from training.checkpoint import CheckpointError, load_checkpoint, load_model, save_checkpoint

SIZES = {
    "vocabulary_size": 50257,
    "block_size": 24,
    "embedding_dimensions": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "bias": True,
}
# So small a step that no weight changes.
FROZEN = ("--num_epochs=1", "--learning_rate=1e-30")


@pytest.fixture
def initial(tmp_path):
    """A checkpoint of a model with biases, as another project's weights would make one."""
    torch.manual_seed(0)
    model = GPT(**SIZES)

    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.02)

    state = {
        "format_version": 1,
        "encoding": "r50k_base",
        "model_args": SIZES,
        "model": model.state_dict(),
    }
    path = tmp_path / "initial.pt"
    save_checkpoint(path, state)

    return path


def flags(small, initial, *extra, out) -> list[str]:
    sizes = ("--block_size", "--embedding", "--num_attention", "--num_hidden")
    others = [arg for arg in small(out=out) if not arg.startswith(sizes)]

    return [*others, f"--initial_checkpoint={initial}", *extra]


@pytest.mark.parametrize("block_size", [None, 16])
def test_run_begins_with_the_weights_and_sizes(pre_train, small, initial, tmp_path, block_size):
    extra = [f"--block_size={block_size}"] * bool(block_size)

    assert pre_train.main(flags(small, initial, *FROZEN, *extra, out=tmp_path)) == 0

    expected, found = (load_checkpoint(p, ()) for p in (initial, tmp_path / "checkpoint.pt"))
    positions = "position_embeddings.weight"
    expected["model"][positions] = expected["model"][positions][: block_size or 24]
    assert_same(found["model"], expected["model"])
    assert found["model_args"] == {**SIZES, "block_size": block_size or 24}
    # The run is a new one.
    assert found["position"] == 3
    assert [row["epoch"] for row in found["metrics"]] == [1]


def test_the_weights_are_not_held_during_the_run(pre_train, small, initial, tmp_path, monkeypatch):
    load_initial_weights, references, alive = pre_train.load_initial_weights, [], []

    def beginning(*args):
        settings, weights, tokenizer = load_initial_weights(*args)
        references.extend(map(weakref.ref, weights.values()))

        return settings, weights, tokenizer

    def finish(self, *args):
        alive.extend(name for reference in references if (name := reference()) is not None)

        return real(self, *args)

    real = pre_train.Run.finish
    monkeypatch.setattr(pre_train, "load_initial_weights", beginning)
    monkeypatch.setattr(pre_train.Run, "finish", finish)

    assert pre_train.main(flags(small, initial, *FROZEN, out=tmp_path)) == 0
    assert references
    assert not alive


def test_resumed_it_ends_as_if_nothing_had_happened(pre_train, small, initial, tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    assert pre_train.main(flags(small, initial, out=left)) == 0

    # Killed behind the first epoch; what it began with is not needed any more.
    patch = (
        "from training import run\nreal = run.Run.save\n"
        "def save(self, *args):\n"
        "    real(self, *args); self.writer.wait(); os.kill(os.getpid(), 9)\n"
        "run.Run.save = save"
    )
    status, _, _ = finish(launch(flags(small, initial, out=right), patch))
    assert status == -9
    os.rename(initial, tmp_path / "elsewhere.pt")
    assert pre_train.main(flags(small, initial, "--resume", out=right)) == 0

    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_plan_of_such_a_run(pre_train, small, initial, tmp_path, capsys):
    assert pre_train.main(flags(small, initial, "--dry_run", out=tmp_path / "out")) == 0
    sizes = "3 layers, 4 heads, 16 dimensions, vocabulary 50,257, context 24"
    assert sizes in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--num_hidden_layers=2", "--num_hidden_layers: 2 given, "),
        ("--block_size=25", "--block_size: 25 given, "),
    ],
)
def test_other_sizes_are_refused(small, initial, tmp_path, error_of, extra, message):
    status, line = error_of(flags(small, initial, extra, out=tmp_path))

    assert status == 2
    assert f"{message}{initial} has " in line


@pytest.mark.parametrize("flag", ["checkpoint_path", "metrics_path"])
def test_weights_that_the_run_would_write_over_are_refused(small, initial, error_of, flag):
    content = initial.read_bytes()
    status, line = error_of(flags(small, initial, f"--{flag}={initial}", out=initial.parent))

    assert status == 2
    assert line.endswith(f"choose another --{flag} for the new run")
    assert initial.read_bytes() == content


def test_weights_of_another_vocabulary_are_refused(small, initial, tmp_path, error_of):
    sizes = {**SIZES, "vocabulary_size": 100}
    state = {
        "format_version": 1,
        "encoding": "r50k_base",
        "model_args": sizes,
        "model": GPT(**sizes).state_dict(),
    }
    save_checkpoint(initial, state)

    status, line = error_of(flags(small, initial, out=tmp_path / "out"))
    assert status == 1
    assert f"{initial} has 100 tokens, the 50257 of r50k_base are needed." in line


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 and no more"])
def test_weights_that_cannot_be_read(small, initial, tmp_path, error_of, content):
    initial.unlink()

    if content is not None:
        initial.write_bytes(content)

    status, line = error_of(flags(small, initial, out=tmp_path / "out"))
    assert status == 1
    assert str(initial) in line


def test_model_in_a_notebook(initial, capsys):
    model = load_model(initial).eval()
    x = torch.arange(20)[None]

    assert not model.training
    assert_same(model.state_dict(), load_checkpoint(initial, ())["model"])
    assert model(x).shape == (1, 20, 50257)

    with pytest.raises(CheckpointError, match="There is no checkpoint at nowhere.pt"):
        load_model("nowhere.pt")


def test_lines_for_a_notebook_in_the_readme(initial, capsys):
    section = (ROOT / "README.md").read_text().split("**In Python**")[1]
    lines = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in lines.splitlines() if line and line[0] != "#"]) <= 8

    exec(lines.replace("out/checkpoint.pt", str(initial)), {})

    # What generate.py makes of the same model, prompt and seed.
    script = importlib.import_module("generate")
    written = capsys.readouterr().out
    argv = [f"--checkpoint_path={initial}", "--prompt=def fibonacci(", "--lora_path="]
    options = ["--max_tokens=60", "--temperature=0.8", "--seed=6", "--precision=fp32"]
    assert script.main([*argv, *options, "--device=cpu"]) == 0
    assert capsys.readouterr().out == f"def fibonacci({written}"
