"""The optimizers against those of PyTorch, and the learning rate against its formula."""

import copy
import math

import pytest
import torch

from distributed import World
from model import GPT
from optimizers import Muon, Optimizers, Schedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedule(kind):
    schedule = Schedule(kind, peak=1.0, minimum=0.1, warmup_steps=4, total_steps=104)
    rates = [schedule(step) for step in range(105)]

    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4] == 1.0
    middle = {"linear": 0.55, "cosine": 0.55, "constant": 1.0}[kind]
    assert rates[54] == pytest.approx(middle)
    assert rates[29] == pytest.approx(
        {"linear": 0.775, "cosine": 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, "constant": 1.0}[kind]
    )
    assert rates[104] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert schedule(9999) == rates[104]


def test_every_weight_has_one_optimizer_and_its_decay():
    model = GPT(300, 8, 16, 2, 2, bias=True)
    names = {id(p): name for name, p in model.named_parameters()}

    for optimizer in ("adamw", "muon"):
        optimizers = Optimizers(model, optimizer, 0.1, World()).parts
        groups = [group for each in optimizers for group in each.param_groups]
        found = sorted(names[id(p)] for group in groups for p in group["params"])
        decayed = {
            names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]
        }
        matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
        hidden = {name for name in matrices if name.startswith("blocks")}

        assert found == sorted(names.values())
        assert decayed == (matrices if optimizer == "adamw" else hidden)

    muon, _ = optimizers
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == hidden


def test_steps_go_by_the_width_of_the_model():
    """Against the same optimizers, one at a time, at rates made by hand."""
    torch.manual_seed(0)
    model = GPT(300, 8, 16, 2, 1)
    expected = copy.deepcopy(model)
    optimizers = Optimizers(model, "muon", 0.1, World(), width=16)
    hidden = [p for p in expected.blocks.parameters() if p.ndim == 2]
    rest = [p for p in expected.parameters() if id(p) not in {id(p) for p in hidden}]
    theirs = [
        Muon([{"params": hidden, "lr": 80e-3, "weight_decay": 0.1}], torch.float32),
        torch.optim.AdamW(rest, lr=320e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    for _ in range(3):
        for left, right in zip(model.parameters(), expected.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()

        optimizers.step(torch.amp.GradScaler(enabled=False), 1e-3)

        for each in theirs:
            each.step()

    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_frozen_weights_have_no_optimizer():
    model = GPT(300, 8, 16, 2, 1)
    model.token_embeddings.requires_grad_(False)
    groups = Optimizers(model, "adamw", 0.1, World()).parts[0].param_groups

    assert all(p.requires_grad for group in groups for p in group["params"])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_muon_is_that_of_pytorch(shape, num_steps):
    torch.manual_seed(0)
    left, right = (torch.nn.Parameter(torch.randn(shape)) for _ in range(2))
    right.data.copy_(left)
    ours = Muon([{"params": [left], "lr": 0.1, "weight_decay": 0.3}], torch.bfloat16)
    theirs = torch.optim.Muon([right], 0.1, 0.3, adjust_lr_fn="match_rms_adamw")

    for _ in range(num_steps):
        left.grad = torch.randn(shape)
        right.grad = left.grad.clone()
        ours.step()
        theirs.step()

    assert torch.equal(left, right)
    assert torch.equal(ours.state[left]["momentum_buffer"], theirs.state[right]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_updates_in_float32_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    muon = Muon([{"params": [weight], "lr": 1.0}], torch.float32)
    weight.grad = torch.randn(shape)
    muon.step()
    left, values, right = torch.linalg.svd(weight.grad, full_matrices=False)
    # The polynomial is one of the matrix: in its singular vectors, each value for itself.
    found = left.T @ weight.detach() @ right.T / -(0.2 * math.sqrt(max(shape)))
    values = values / values.norm()

    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5

    torch.testing.assert_close(found, values.diag(), atol=1e-4, rtol=0)
    assert 0.3 < values.min() < values.max() < 1.3
