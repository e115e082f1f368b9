"""The moves of training against plain PyTorch."""

import copy
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from small_trainers import Line, build, make_trainer
from torch import nn
from twins import counterparts, hugging_face_pair

from model import GPT
from system import devices
from system.devices import DeviceError, compile_model, own_device, resolve_device, resolve_precision
from system.distributed import World
from training.optimizers import Schedule
from training.trainer import (
    Interrupted,
    StopSignal,
    TrainingError,
    load_weights,
    random_seed,
)

CPU = torch.device("cpu")


def make_step(num_batches=3, first=0):
    generator = torch.Generator().manual_seed(first)

    return [
        (
            first + i,
            torch.randint(5, (2, 4), generator=generator),
            torch.randint(5, (2, 4), generator=generator),
        )
        for i in range(num_batches)
    ]


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """Also where micro-batches have different numbers of targets."""
    step = make_step()
    step[0][2][0] = -100
    step[2][2][1, 3] = -100
    trainer = make_trainer()
    loss, num_tokens = trainer.accumulate_gradient(step)
    given = [p.grad.clone() for p in trainer.model.parameters()]

    trainer.model.zero_grad()
    whole = trainer.model(torch.cat([x for _, x, _ in step]), torch.cat([y for _, _, y in step]))
    whole.backward()

    torch.testing.assert_close(loss, whole.detach())
    assert num_tokens == 24
    for gradient, parameter in zip(given, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_step_equals_plain_pytorch():
    trainer, plain = make_trainer(), make_trainer().model
    optimizer = torch.optim.AdamW(
        [
            {"params": [plain.table.weight], "weight_decay": 0.1},
            {"params": [plain.table.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )

    for number in range(3):
        step = make_step(1, number)
        loss, norm = trainer.take_step(step)

        expected = plain(*step[0][1:])
        expected.backward()
        expected_norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert norm == pytest.approx(expected_norm.item(), rel=1e-5)

    assert trainer.step == 3
    for left, right in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_random_numbers_depend_on_seed_and_place_alone():
    assert random_seed(0, 5) == random_seed(0, 5)
    assert len({random_seed(seed, place) for seed in range(10) for place in range(10)}) == 100
    assert all(0 <= random_seed(0, place) < 2**63 for place in range(100))


def test_evaluation_weighs_targets_and_changes_nothing():
    trainer = make_trainer(GPT(300, 8, 16, 2, 1, dropout=0.5))
    batches = [(x, y) for _, x, y in make_step(3)]
    batches[1][1][1] = -100
    state = torch.get_rng_state()
    loss = trainer.evaluate(batches)
    again = trainer.evaluate(batches)

    logits = trainer.model(torch.cat([x for x, _ in batches]))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.cat([y for _, y in batches]).flatten())

    assert loss == again == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_finite_never_reaches_the_weights(kind, value, precision):
    class Faulty(Line):
        def forward(self, x, y):
            loss = super().forward(x, y)
            if kind == "loss":
                return loss * value
            self.table.weight.register_hook(lambda gradient: gradient * value)
            return loss

    trainer = make_trainer(precision=precision)
    trainer.take_step(make_step())
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.model.__class__ = Faulty

    with pytest.raises(TrainingError, match=r"in epoch 1, step 1; the weights were not changed"):
        trainer.take_step(make_step())

    assert trainer.step == 1
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_fp16_skips_an_overflow_and_scales_less():
    trainer = make_trainer(precision="fp16")
    before = [p.clone() for p in trainer.model.parameters()]
    scale = trainer.scaler.get_scale()
    hook = trainer.model.table.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer.take_step(make_step())
    hook.remove()

    assert trainer.scaler.get_scale() == scale / 2
    assert all(
        torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True)
    )

    trainer.take_step(make_step())
    assert not torch.equal(trainer.model.table.weight, before[0])


@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.mlp.hidden.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fp16_overflow_in_one_optimizer_stops_the_others(name, value):
    torch.manual_seed(0)
    model = GPT(300, 8, 16, 2, 1)
    trainer = build(model, "muon", Schedule("constant", 0.1, 0.0, 0, 10), "fp16")
    before = [p.clone() for p in model.parameters()]
    model.get_parameter(name).register_hook(lambda gradient: gradient * value)
    trainer.take_step(make_step())

    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_fp16_gives_up_when_scaling_does_not_help():
    trainer = make_trainer(precision="fp16")
    trainer.model.table.weight.register_hook(lambda gradient: gradient * math.nan)

    with pytest.raises(TrainingError, match="not changed"):
        [trainer.take_step(make_step()) for _ in range(40)]


def test_signal_drops_the_running_step():
    trainer = make_trainer()
    trainer.take_step(make_step())
    before = [p.clone() for p in trainer.model.parameters()]
    real = trainer.model.forward

    def interrupt(x, y):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(x, y)

    trainer.model.forward = interrupt

    with trainer.stoppable(), pytest.raises(Interrupted) as caught:
        trainer.take_step(make_step())

    assert caught.value.number == signal.SIGTERM
    assert trainer.step == 1
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(
        torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True)
    )


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)

    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before

    assert signal.getsignal(signal.SIGTERM) == before


def test_state_goes_out_and_in():
    trainer, other = make_trainer(), make_trainer()
    trainer.take_step(make_step())
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))

    for each in (trainer, other):
        each.take_step(make_step(first=3))

    assert other.step == 2
    for left, right in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("table.bias"),
            r"shape None for table\.bias, \(5,\) is needed",
        ),
        (
            lambda weights: weights.update(more=torch.zeros(1)),
            r"shape \(1,\) for more, None is needed",
        ),
        (
            lambda weights: weights.update({"table.bias": torch.zeros(4)}),
            r"shape \(4,\) for table\.bias, \(5,\) is needed",
        ),
    ],
)
def test_foreign_weights_leave_the_model_untouched(change, message):
    model = make_trainer().model
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(weights)

    with pytest.raises(TrainingError, match=message):
        load_weights(model.state_dict(), weights)

    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_weights_are_copied_by_name():
    model = make_trainer().model
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    load_weights(model.state_dict(), weights)

    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


def test_state_of_another_optimizer_is_refused():
    trainer = make_trainer()
    state = trainer.state_dict()
    state["optimizer"].append({})

    with pytest.raises(TrainingError, match="another --optimizer"):
        trainer.load_state_dict(state)


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None).type in ("cpu", "mps")

    with pytest.raises(DeviceError, match="no CUDA device was found; --device=cpu"):
        resolve_device("cuda")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device(None) == torch.device("cuda")

    with pytest.raises(ValueError, match="cuda:9 given, there are 2 GPUs"):
        resolve_device("cuda:9")

    with pytest.raises(ValueError, match="must be cuda"):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("device", "size", "message"),
    [
        ("cuda", 4, "--nproc-per-node=4 given, there are 2 GPUs"),
        ("cuda:1", 2, "--device=cuda:1 given with 2 processes"),
        ("mps", 2, "--device=mps given with 2 processes"),
    ],
)
def test_more_processes_than_can_run_are_refused(monkeypatch, device, size, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(ValueError, match=message):
        own_device(torch.device(device), World(0, size, 0, size))


def test_every_process_has_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert own_device(torch.device("cuda:1"), World()) == torch.device("cuda:1")
    assert own_device(torch.device("cuda"), World(3, 4, 1, 2)) == torch.device("cuda:1")
    assert own_device(CPU, World(1, 4, 1, 4)) == CPU


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((7, 5), "fp16")])
def test_precision_on_a_gpu_goes_by_capability(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert resolve_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize(("bf16_rate", "precision"), [(6.0, "bf16"), (0.3, "fp32"), (1.0, "fp32")])
def test_precision_on_a_cpu_goes_by_measurement(monkeypatch, bf16_rate, precision):
    rates = {"bf16": bf16_rate, "fp32": 1.0}
    monkeypatch.setattr(devices, "matmul_rate", lambda device, name: rates[name])

    assert resolve_precision(CPU) == precision


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3), ("fp16", 1e-3)]
)
def test_compiled_training_learns_what_the_plain_network_does(precision, tolerance):
    """100 updates of 2 micro-batches: Hugging Face's network, eager and in float32, beside ours."""
    ours, theirs = hugging_face_pair()
    ours.initialize()

    with torch.no_grad():
        for name, tensor in counterparts(ours, theirs):
            tensor.copy_(ours.get_parameter(name)[: len(tensor)])

    decayed = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.95),
    )
    trainer = build(ours, "adamw", Schedule("constant", 2e-3, 0.0, 0, 100), precision)
    assert compile_model(ours, CPU) == "compiled"
    generator = torch.Generator().manual_seed(0)
    losses = []

    for number in range(100):
        # What follows a token is one of two.
        tokens = [torch.randint(300, (8, 1), generator=generator)]

        for _ in range(32):
            coin = torch.randint(2, (8, 1), generator=generator)
            tokens.append((7 * tokens[-1] + coin) % 300)

        x, y = (torch.cat(part, dim=1) for part in (tokens[:-1], tokens[1:]))
        step = [(2 * number + i, x[4 * i :][:4], y[4 * i :][:4]) for i in range(2)]
        loss, _ = trainer.take_step(step)

        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        expected.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss, expected.item()))

    assert losses[-1][1] < 5.0 < losses[0][1]
    assert max(abs(loss - expected) for loss, expected in losses) < tolerance


@pytest.mark.skipif(sys.platform != "linux", reason="the library is Linux's")
@pytest.mark.parametrize(
    ("script", "given", "turns"),
    [
        ("pre-train.py", {}, "2000"),
        ("fine-tune.py", {}, "2000"),
        ("generate.py", {}, "2000"),
        ("generate.py", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("generate.py", {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_waiting_threads_let_others_run(script, given, turns, tmp_path):
    """The library itself tells how long its threads spin, unless the user has chosen."""
    settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    environment |= given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    flag = "--checkpoint_path=missing.pt" if script == "generate.py" else "--help"
    command = [sys.executable, ROOT / script, flag]
    result = subprocess.run(
        command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True
    )

    assert f"GOMP_SPINCOUNT = '{turns}'" in result.stderr


def test_freed_memory_is_kept():
    """Memory that is taken again costs no page faults."""
    code = """
import ctypes, resource, sys
sys.path.insert(0, sys.argv[1])
from system.memory import tune_memory
tune_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free.restype = None
size = 1 << 27
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults, size // resource.getpagesize())
"""
    command = [sys.executable, "-c", code, ROOT]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    faults, num_pages = map(int, result.stdout.split())

    assert num_pages > 1000
    assert faults < num_pages / 100 or not sys.platform.startswith("linux")


def test_peak_memory_is_that_of_the_process_alone():
    """Launched, as from a notebook, by a process with a gigabyte of its own."""
    own = "import torch; from system import memory; print(memory.peak_memory(torch.device('cpu')))"
    code = f"""
import subprocess, sys
held = b"x" * (1 << 30)
print(subprocess.check_output([sys.executable, "-c", {own!r}], text=True))
"""
    peak = int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))

    assert 1 << 26 < peak < 1 << 30
