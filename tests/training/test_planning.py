"""Plans before runs: what `--dry_run` says, beside what a run then takes."""

import re

import pytest
import torch
from conftest import launch
from small_trainers import make_trainer
from torch import nn
from vocabularies import GPT2_TOKENIZER

from loss import output_memory
from model import GPT
from processes import Group
from text.preparation import load_or_prepare
from text.sources import parse_source
from training import planning
from training.planning import Plan, count_parameters, kept_memory, time_updates

SIZES = {
    "vocabulary_size": 1000,
    "block_size": 32,
    "embedding_dimensions": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
}


def build_plan(activations: int, **figures) -> Plan:
    return Plan({"activations": activations}, start=1.0, update=1.0, test=1.0, **figures)


@pytest.mark.parametrize("bias", [False, True])
def test_parts_hold_all_parameters_once(bias):
    model = GPT(**SIZES, bias=bias)
    parts = count_parameters(model)

    assert sum(parts.values()) == model.num_parameters
    assert parts["token embeddings"] == 1000 * 16
    assert parts["attention"] == 3 * (4 * 16 * 16 + bias * 4 * 16)
    assert parts["MLP"] == 3 * (8 * 16 * 16 + bias * 5 * 16)
    assert parts["normalisation"] == (2 * 3 + 1) * 16 * (1 + bias)


def test_as_many_samples_fit_as_their_activations_have_room():
    # 4 samples take 400 bytes, all else 600.
    assert build_plan(activations=400, peak=1000, available=2650).largest_batch_size(4) == 20
    assert build_plan(activations=400, peak=1000, available=500).largest_batch_size(4) == 0


def test_kept_memory_is_what_the_backward_pass_reads():
    trainer = make_trainer(Squares())
    x = torch.zeros(64, 1000, dtype=torch.int64)

    # Of a million numbers, x is there already; its copy in float32 and the square are kept.
    kept = kept_memory(trainer, (0, x, x))
    assert kept == pytest.approx(2 * 4 * x.numel(), abs=100)


@pytest.mark.parametrize(("dropout", "recomputed"), [(0.1, False), (0.1, True), (0.0, True)])
def test_kept_memory_is_that_of_training(dropout, recomputed):
    kept = []

    for options in ((0.0, False), (dropout, recomputed)):
        model = GPT(**SIZES, dropout=options[0])
        model.activation_checkpointing = options[1]
        trainer = make_trainer(model.eval())
        x = torch.zeros(8, 32, dtype=torch.int64)
        kept.append(kept_memory(trainer, (0, x, x)) - model.token_embeddings.weight.nbytes)

    # Dropout keeps what it has dropped; a block that is computed again keeps its input alone.
    assert kept[1] < 0.5 * kept[0] if recomputed else kept[1] > 1.05 * kept[0]


class Squares(nn.Module):
    """Keeps two tensors of the size of x."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x, y):
        scaled = x.float() * self.factor

        return scaled.square().sum()


def test_memory_of_the_loss_is_that_of_its_buffers(monkeypatch):
    sizes = []
    weight = torch.randn(1024, 16, requires_grad=True)
    z, y = torch.randn(1, 300, 16, requires_grad=True), torch.zeros(1, 300, dtype=torch.int64)
    real = torch.Tensor.new_empty

    def new_empty(self, *size, **options):
        sizes.append(result := real(self, *size, **options))

        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    planning_gradient, buffers = output_memory(weight, 300, torch.float32)
    sizes.clear()

    from loss import OutputLoss

    OutputLoss()(z, weight, y, 1000).backward()
    assert planning_gradient == weight.grad.nbytes
    assert buffers == sum(tensor.nbytes for tensor in sizes)


@pytest.mark.parametrize("num_batches", [1, 2, 32])
def test_time_of_an_update_is_that_of_its_batches_and_what_comes_once(monkeypatch, num_batches):
    now = [0.0]

    def take_step(batches):
        now[0] += 3.0 + 0.25 * len(batches)

    trainer = make_trainer()
    monkeypatch.setattr(trainer, "take_step", take_step)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: now[0])
    x = torch.zeros(2, 4, dtype=torch.int64)

    seconds = time_updates(trainer, [(n, x, x) for n in range(num_batches)])

    assert seconds == pytest.approx(3.0 + 0.25 * num_batches)


def test_dry_run_estimates_and_writes_nothing(pre_train, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)

    assert pre_train.main(small("--dry_run", "--precision=auto")) == 0

    output = capsys.readouterr().out
    assert "Parts:  token embeddings 804,112, positions 256, attention 2,048, MLP 4,096," in output
    assert re.search(r"Chosen: (bf16|fp32), since bf16 multiplies [0-9.]+ times as fast as", output)
    assert "gradients 3.2 MB, optimizer " in output
    assert re.search(r"Batch:  --batch_size=[1-9][0-9]+ is the largest that fits", output)
    assert re.search(r"Speed:  [0-9,]+ tokens/s", output)
    assert "in all: 9 updates of" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_plan_of_processes_whose_clocks_differ(small, tmp_path, sharding):
    patch = """
from training import planning
planning.TIMED_SECONDS = 1.0
seconds_of = planning.seconds_of
planning.seconds_of = lambda *args: seconds_of(*args) * (1 + 2 * rank)
"""
    argv = small("--dry_run", f"--sharding={sharding}", "--dropout=0.1")
    tmp_path.joinpath("out").mkdir()
    group = Group(argv, 2, tmp_path / "out", patch=patch)

    assert group.wait() == [0, 0]
    assert "is the largest that fits" in group.output()


def test_dry_run_of_a_resumed_run_counts_what_is_left(
    pre_train, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(planning, "TIMED_SECONDS", 0.0)

    assert pre_train.main(small("--num_epochs=1")) == 0
    content = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert pre_train.main(small("--dry_run", "--resume")) == 0
    assert "in all: 6 updates of" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


MEASURE = """
import atexit, torch
from system import memory
from training import planning
planning.TIMED_SECONDS = 0.0
atexit.register(lambda: print(memory.peak_memory(torch.device("cpu"))))
"""


@pytest.mark.parametrize("batches", [1, 2])
def test_memory_of_a_run_is_what_was_foretold(small, text_folder, dataset_path, batches):
    # Who prepares text has more memory from then on, and one of the two would do so alone.
    load_or_prepare(parse_source(str(text_folder))[0], dataset_path, GPT2_TOKENIZER, 1)
    argv = small(
        "--block_size=64",
        "--embedding_dimensions=64",
        "--num_hidden_layers=32",
        "--batch_size=24",
        f"--gradient_accumulation_steps={batches}",
        f"--samples_per_epoch={2 * 24 * batches}",
        "--num_epochs=1",
    )
    output, _ = run_and_measure([*argv, "--dry_run"])
    foretold = 1e6 * in_megabytes(re.search(r"Memory: ([0-9.]+ [GM]B) at the peak", output)[1])
    activations = 1e6 * in_megabytes(re.search(r"activations ([0-9.]+ [GM]B)", output)[1])
    _, peak = run_and_measure(argv)

    assert foretold == pytest.approx(peak, rel=0.1)
    # They are more than the tolerance, so that it says something of them.
    assert activations > 0.1 * peak


def in_megabytes(words: str) -> float:
    number, unit = words.split()

    return float(number) * {"GB": 1000, "MB": 1}[unit]


def run_and_measure(argv: list[str]) -> tuple[str, int]:
    """Run pre-train.py; return what it prints, and the most memory in bytes that it had."""
    process = launch(argv, MEASURE)
    output, errors = process.communicate()
    assert process.returncode == 0, errors

    return output, int(output.split()[-1])
