"""The optimizers against those of PyTorch, and the learning rate against its formula."""

import copy
import math

import pytest
import torch

from model import GPT
from system.distributed import World
from training.muon import Muon, batches_of_one_shape, orthogonalize
from training.optimizers import Optimizers, Schedule, step_factors


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

    read, written = ({names[id(p)] for p in g["params"]} for g in optimizers[0].param_groups)
    assert read | written == hidden
    assert written == {name for name in hidden if name.endswith("output.weight")}


@pytest.mark.parametrize(
    ("first_step", "momenta"), [(0, (0.85, 0.85 + 1 / 3000, 0.85 + 2 / 3000)), (999, (0.95,) * 3)]
)
@pytest.mark.parametrize(
    ("width", "num_updates", "hidden_rate", "residual_rate", "rest_rate", "positions_rate"),
    [
        (16, 1, 80e-3, 80e-3, 320e-3, 80e-3),
        (64, 700, 40e-3, 20e-3, 80e-3, 20e-3),
        (64, 1575, 80e-3 / 3, 40e-3 / 3, 160e-3 / 3, 40e-3 / 3),
        (64, 2800, 20e-3, 10e-3, 40e-3, 10e-3),
        (64, 100_000, 20e-3, 10e-3, 40e-3, 10e-3),
    ],
)
def test_steps_go_by_the_width_of_the_model_and_the_length_of_the_run(
    first_step, momenta, width, num_updates, hidden_rate, residual_rate, rest_rate, positions_rate
):
    """Against the same optimizers, one at a time, at rates and momenta made by hand."""
    torch.manual_seed(0)
    model = GPT(300, 8, width, 2, 1)
    expected = copy.deepcopy(model)
    optimizers = Optimizers(model, "muon", 0.1, World(), factors=step_factors(width, num_updates))
    (block,) = expected.blocks
    read = [block.attention.query_key_value.weight, block.mlp.hidden.weight]
    written = [block.attention.output.weight, block.mlp.output.weight]
    positions = expected.position_embeddings.weight
    known = {id(p) for p in [*read, *written, positions]}
    rest = [p for p in expected.parameters() if id(p) not in known]
    hidden = [
        {"params": matrices, "lr": rate, "weight_decay": 0.1}
        for matrices, rate in [(read, hidden_rate), (written, residual_rate)]
    ]
    groups = [{"params": rest, "lr": rest_rate}, {"params": [positions], "lr": positions_rate}]
    theirs = [
        Muon(hidden, torch.float32),
        torch.optim.AdamW(groups, betas=(0.8, 0.99), weight_decay=0.0),
    ]

    for number, momentum in enumerate(momenta):
        for group in theirs[0].param_groups:
            group["momentum"] = momentum

        for left, right in zip(model.parameters(), expected.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()

        optimizers.step(1e-3, first_step + number)

        for each in theirs:
            each.step()

    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_weights_go_on_with_the_steps_that_they_began_with():
    """A state of fewer groups, in which positions were stepped like the embeddings of tokens."""
    model = GPT(300, 8, 16, 2, 1)
    optimizers = Optimizers(model, "muon", 0.1, World(), factors=step_factors(16, 1))
    muon, adamw = optimizers.state_dict()
    embeddings, positions, vectors = adamw["param_groups"]
    merged = {**embeddings, "params": embeddings["params"] + positions["params"], "factor": 7.0}
    optimizers.load_state_dict([muon, {**adamw, "param_groups": [merged, vectors]}])

    assert [group["factor"] for group in optimizers.parts[1].param_groups] == [7.0, 7.0, 320.0]
    assert [len(group["params"]) for group in optimizers.parts[1].param_groups] == [1, 1, 3]


def test_state_of_other_optimizers_is_refused():
    model = GPT(300, 8, 16, 2, 1)
    saved = Optimizers(model, "adamw", 0.1, World()).state_dict()

    for states in (saved, saved * 2):
        with pytest.raises(ValueError, match="zip|saved"):
            Optimizers(model, "muon", 0.1, World()).load_state_dict(states)


def test_frozen_weights_have_no_optimizer():
    model = GPT(300, 8, 16, 2, 1)
    model.token_embeddings.requires_grad_(False)
    groups = Optimizers(model, "adamw", 0.1, World()).parts[0].param_groups

    assert all(p.requires_grad for group in groups for p in group["params"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_is_that_of_pytorch_with_rows_of_one_size(shape, dtype):
    torch.manual_seed(0)
    weight, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    muon = Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.3}], dtype)
    pytorch = torch.optim.Muon([theirs], 1.0, 0.0, adjust_lr_fn="match_rms_adamw")
    expected = torch.zeros(shape)
    mean_squares = torch.zeros(shape[0])

    for _ in range(5):
        # Neurons whose gradients are of very different size, as those of an embedding's are.
        weight.grad = torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None]
        theirs.grad = weight.grad.clone()
        muon.step()
        pytorch.step()

        update = -theirs.detach().clone()
        theirs.data.zero_()

        for row in range(shape[0]):
            mean_squares[row] = 0.95 * mean_squares[row] + 0.05 * update[row].square().mean()
            update[row] /= mean_squares[row].sqrt()

        update *= 0.2 / update.square().mean().sqrt()
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * update

    # PyTorch's is in bf16 always.
    torch.testing.assert_close(weight.detach(), expected, atol=4e-3, rtol=0)
    momentum = muon.state[weight]["momentum_buffer"]
    assert torch.equal(momentum, pytorch.state[theirs]["momentum_buffer"])


def test_a_neuron_without_gradient_stays_where_it_is():
    weight = torch.nn.Parameter(torch.randn(8, 24))
    before = weight.detach().clone()
    muon = Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], torch.float32)

    for is_zero in ([True] * 8, [True] + [False] * 7):
        weight.grad = torch.randn(8, 24)
        weight.grad[torch.tensor(is_zero)] = 0.0
        muon.step()

    assert torch.equal(weight[0], before[0])
    assert torch.isfinite(weight).all()
    assert not torch.isclose(weight[1:], before[1:]).all()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_updates_in_float32_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # The polynomial is one of the matrix: in its singular vectors, each value for itself.
    found = left.T @ orthogonalize(matrix[None])[0] @ right.T
    values = values / values.norm()

    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5

    torch.testing.assert_close(found, values.diag(), atol=1e-4, rtol=0)
    assert 0.3 < values.min() < values.max() < 1.3


def test_matrices_of_one_shape_are_stepped_together_as_if_alone():
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (8, 24), (24, 8)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = copy.deepcopy(together)
    steppers = [Muon(together, torch.float32), *(Muon([matrix], torch.float32) for matrix in alone)]

    for stepper in steppers:
        stepper.param_groups[0].update(lr=0.1, weight_decay=0.3)

    for number in range(3):
        for left, right in zip(together, alone, strict=True):
            # One of them has no gradient at first.
            if number or left is not together[2]:
                left.grad = torch.randn(left.shape) * 10 ** torch.randn(1)
                right.grad = left.grad.clone()

        for stepper in steppers:
            stepper.step()

    for left, right, stepper in zip(together, alone, steppers[1:], strict=True):
        torch.testing.assert_close(left, right)

        for name, value in stepper.state[right].items():
            torch.testing.assert_close(steppers[0].state[left][name], value)


@pytest.mark.parametrize(
    ("device", "lengths"), [("cpu", [32, 1, 1, 1, 8]), ("meta", [33, 3, 8])], ids=["cpu", "gpu"]
)
def test_lists_of_matrices_are_bounded(device, lengths):
    shapes = [(32, 64)] * 33 + [(512, 256)] * (2 if device == "cpu" else 3) + [(64, 32)] * 8
    matrices = [torch.empty(shape, device=device) for shape in shapes]
    lists = list(batches_of_one_shape(matrices))

    assert sorted(id(m) for some in lists for m in some) == sorted(id(m) for m in matrices)
    assert all(len({m.shape for m in some}) == 1 for some in lists)
    assert [len(some) for some in lists] == lengths


def test_matrices_that_were_saved_in_one_group_find_their_momentum():
    """A state of when Muon stepped all matrices alike, in the order of the network."""
    torch.manual_seed(0)
    model = GPT(300, 8, 16, 2, 2)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizers = Optimizers(model, "muon", 0.1, World(), factors=step_factors(16, 1))
    muon = Muon([{"params": matrices, "factor": 7.0}], torch.float32)

    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)

    muon.step()
    optimizers.load_state_dict([muon.state_dict(), optimizers.state_dict()[1]])

    for matrix in matrices:
        for name, value in muon.state[matrix].items():
            assert torch.equal(optimizers.parts[0].state[matrix][name], value)

    assert [group["factor"] for group in optimizers.parts[0].param_groups] == [7.0, 7.0]
