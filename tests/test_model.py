"""The network against Hugging Face's GPT-2 and PyTorch's own modules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from twins import SIZES, counterparts, hugging_face_pair

from loss import OutputLoss
from model import GPT, check_sizes
from system.distributed import World
from training.optimizers import Optimizers


@pytest.fixture
def model():
    torch.manual_seed(0)

    return GPT(**SIZES)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)

    return (torch.randint(300, (2, 32), generator=generator) for _ in range(2))


def test_equals_hugging_face(batch):
    ours, theirs = hugging_face_pair()
    x, _ = batch
    expected = theirs(x, labels=x)
    loss = ours(x[:, :-1], x[:, 1:])

    torch.testing.assert_close(ours(x), expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)

    loss.backward()
    expected.loss.backward()

    for name, gradient in counterparts(ours, theirs, lambda parameter: parameter.grad):
        given = ours.get_parameter(name).grad[: len(gradient)]
        torch.testing.assert_close(given, gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(pre_train, preset, num_parameters):
    with torch.device("meta"):
        model = GPT(50257, 1024, **pre_train.PRESETS[preset], bias=True)

    assert model.num_parameters == num_parameters


def test_attention_is_causal(model, batch):
    x, _ = batch
    changed = x.clone()
    changed[:, 20] = (x[:, 20] + 1) % 300
    difference = (model(x) - model(changed)).abs().amax(dim=(0, 2))

    assert torch.all(difference[:20] == 0)
    assert torch.all(difference[20:] > 0)


def test_output_layer_is_the_token_embedding(model, batch):
    x, _ = batch
    wide = [p for p in model.parameters() if p.shape[0] >= 300]

    assert len(wide) == 1
    assert len(model.state_dict()) == len(list(model.parameters()))

    before = model(x)
    with torch.no_grad():
        model.token_embeddings.weight[299 - x.max()] *= 2

    assert not torch.equal(model(x)[..., 299 - x.max()], before[..., 299 - x.max()])


def test_initial_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    model = GPT(50257, 16, 32, 2, 2)
    x, y = torch.randint(50257, (4, 16)), torch.randint(50257, (4, 16))

    assert model(x, y).item() == pytest.approx(math.log(50257), abs=0.05)


def test_initial_scales():
    torch.manual_seed(0)
    model = GPT(50257, 64, 128, 4, 8)

    assert model.token_embeddings.weight[:50257].std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].mlp.hidden.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[7].mlp.output.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert model.blocks[7].attention.output.weight.std().item() == pytest.approx(0.005, rel=0.02)


@pytest.mark.parametrize(
    ("block_size", "width", "num_heads"), [(256, 128, 4), (64, 96, 3), (1024, 768, 12)]
)
def test_heads_look_back(block_size, width, num_heads):
    """By a loop over positions and PyTorch's own product and softmax."""
    torch.manual_seed(0)
    model = GPT(300, block_size, width, num_heads, 2)
    x = torch.randint(300, (block_size,))
    model.look_back()

    attention = model.blocks[0].attention
    z = model.token_embeddings.weight[x] + model.position_embeddings.weight
    z = F.layer_norm(z, (width,))
    query, key, _ = (z @ attention.query_key_value.weight.T).split(width, dim=1)
    size = width // num_heads

    for head in range(num_heads):
        own = slice(head * size, (head + 1) * size)

        for position in range(num_heads, block_size, 7):
            scores = key[: position + 1, own] @ query[position, own] / math.sqrt(size)
            weights = torch.softmax(scores, dim=0)

            assert weights.argmax() == position - head - 1
            assert weights.max() > 0.3


def test_positions_begin_as_waves():
    """12 dimensions a head: six waves, of lengths from 2 to 64 in equal ratios."""
    model = GPT(300, 64, 48, 4, 2)
    model.look_back()
    size = 25 * math.sqrt(2) / math.sqrt(48 * 12)

    for position in range(64):
        for number in range(6):
            angle = 2 * math.pi * position / (2 * 2**number)
            expected = size * torch.tensor([math.cos(angle), math.sin(angle)])
            found = model.position_embeddings.weight[position, 2 * number : 2 * number + 2]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_looking_back_leaves_all_else_as_it_was():
    torch.manual_seed(0)
    model = GPT(300, 32, 48, 3, 2)
    before = copy.deepcopy(model.state_dict())
    model.look_back()
    changed = {
        name for name, weight in model.state_dict().items() if (weight != before[name]).any()
    }

    assert changed == {"position_embeddings.weight", "blocks.0.attention.query_key_value.weight"}
    # The values, and the dimensions of positions that hold no wave.
    name = "blocks.0.attention.query_key_value.weight"
    assert torch.equal(model.state_dict()[name][96:], before[name][96:])
    name = "position_embeddings.weight"
    assert torch.equal(model.state_dict()[name][:, 16:], before[name][:, 16:])


@pytest.mark.parametrize(("block_size", "width", "num_heads"), [(2, 8, 8), (8, 6, 2), (1, 4, 1)])
def test_narrow_heads_and_short_contexts_may_look_back(block_size, width, num_heads):
    model = GPT(300, block_size, width, num_heads, 1)
    model.look_back()

    assert torch.isfinite(model(torch.zeros(1, block_size, dtype=torch.int64))).all()
    # A query and a key that are both zero have no gradient, and would stay so.
    assert model.blocks[0].attention.query_key_value.weight.any(dim=1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_padded_rows_never_move_and_are_never_predicted(model, batch, optimizer):
    x, y = batch
    optimizers = Optimizers(model, optimizer, 0.1, World())

    for step in range(3):
        model(x, y).backward()
        optimizers.step(1e-3, step)
        optimizers.zero_grad()

    assert model.token_embeddings.weight.shape == (384, 48)
    assert torch.all(model.token_embeddings.weight[300:] == 0)
    assert torch.all(model.token_embeddings.weight[:300] != 0)
    assert model(x).shape == (2, 32, 300)


def reference_loss(z, weight, y):
    logits = F.linear(z, weight)[..., :300]

    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)


def loss_and_gradients(function, z, weight, y):
    z, weight = z.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(z, weight, y)
    # As under a loss scaler, the gradient that comes back is not 1.
    (loss * 3).backward()

    return loss.detach(), z.grad, weight.grad


@pytest.mark.parametrize("num_tokens", [1, 128, 150])
def test_chunked_loss_equals_cross_entropy(num_tokens):
    torch.manual_seed(0)
    z, weight = torch.randn(2, num_tokens, 8), torch.randn(384, 8)
    y = torch.randint(300, (2, num_tokens))
    y[0, num_tokens // 2 :] = -100

    given = loss_and_gradients(lambda z, w, y: OutputLoss()(z, w, y, 300), z, weight, y)
    expected = loss_and_gradients(reference_loss, z, weight, y)

    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_half_precision_is_as_exact_as_the_plain_path(dtype):
    torch.manual_seed(0)
    z, weight = torch.randn(2, 128, 64), torch.randn(384, 64) * 0.3
    y = torch.randint(300, (2, 128))
    truth = loss_and_gradients(reference_loss, z.double(), weight.double(), y)

    with torch.autocast("cpu", dtype):
        plain = loss_and_gradients(reference_loss, z, weight, y)
        given = loss_and_gradients(lambda z, w, y: OutputLoss()(z, w, y, 300), z, weight, y)

    def distance(left, right):
        return ((left.double() - right).norm() / right.norm()).item()

    for mine, theirs, true in zip(given, plain, truth, strict=True):
        assert distance(mine, true) <= max(1.1 * distance(theirs, true), 1e-4)


def test_loss_without_targets_is_zero(model, batch):
    x, y = batch
    loss = model(x, torch.full_like(y, -100))
    loss.backward()

    assert loss.item() == 0
    assert all(torch.all(p.grad == 0) for p in model.parameters())


class LargestTensor(TorchDispatchMode):
    """Note the most elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))

        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())

        return result


def test_logits_are_never_whole_in_memory():
    model = GPT(1000, 64, 8, 2, 1)
    x = torch.randint(1000, (16, 64))

    with LargestTensor() as watch:
        model(x, x).backward()

    assert watch.largest <= 128 * 1024
    assert watch.largest < 16 * 64 * 1000 / 4


def test_loss_alone_computes_no_gradient(model, batch):
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "mm" in func.name()
            return func(*args, **(kwargs or {}))

    z, weight = torch.randn(1, 16, 48), model.token_embeddings.weight

    with torch.no_grad(), Products() as products:
        OutputLoss()(z, weight, torch.zeros(1, 16, dtype=torch.int64), 300)

    assert products.count == 1


def test_dropout_takes_elements_and_not_positions(batch):
    x, _ = batch
    model = GPT(**SIZES, dropout=0.5).train()
    seen = []
    model.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    zeros = seen[0] == 0  # (B, T, D)

    assert 0.4 < zeros.float().mean() < 0.6
    assert not zeros.all(dim=-1).any()


def test_activation_checkpointing_changes_nothing(batch):
    x, y = batch
    model = GPT(**SIZES, dropout=0.2).train()
    results = []

    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])

    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_compiled_network_equals_eager(model, batch):
    x, y = batch
    names = list(model.state_dict())
    expected = model(x, y)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    model.compile(dynamic=False)
    loss = model(x, y)
    loss.backward()

    assert list(model.state_dict()) == names
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_too_long_a_text_is_refused(model):
    with pytest.raises(ValueError, match="At most 32 tokens fit in the context, 33 given"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_sizes_that_make_no_heads_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"770 and 12 given.*768 and 780"):
        check_sizes(770, 12)

    with pytest.raises(ValueError, match=r"dimensions are 12\."):
        GPT(300, 32, 8, 12, 1)

    check_sizes(768, 12)


def test_flops_of_gpt2():
    # 6 x 123.6 M weights and 12 x 12 layers x 1024 x 768, as for PaLM's utilisation.
    with torch.device("meta"):
        model = GPT(50257, 1024, 768, 12, 12)

    assert model.flops_per_token(1024) == pytest.approx(0.855e9, rel=0.01)


def test_compiled_without_a_break(model, batch):
    """The compiler gives up on nothing in a block, in training or testing."""
    x, y = batch
    expected = model(x, y)
    model.compile(dynamic=False, fullgraph=True, backend="aot_eager")

    model(x, y).backward()
    torch.testing.assert_close(model(x, y), expected)

    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, y), expected)


@pytest.mark.parametrize("frozen", ["weight", "states"])
def test_loss_gives_gradients_to_what_wants_them(frozen):
    torch.manual_seed(0)
    z, weight = torch.randn(2, 150, 8), torch.randn(128, 8)
    y = torch.randint(100, (2, 150))
    y[:, ::3] = -100
    wanted = z if frozen == "weight" else weight
    wanted.requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        (z @ weight.T)[..., :100].flatten(0, 1), y.flatten()
    )
    (expected_gradient,) = torch.autograd.grad(expected, wanted)
    loss = OutputLoss()(z, weight, y, 100)
    (gradient,) = torch.autograd.grad(loss, wanted)

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def test_frozen_weights_need_fewer_operations(model):
    trained = model.flops_per_token(32)
    model.requires_grad_(False)
    attention = 12 * 3 * 32 * 48

    assert (trained - attention) * 4 == (model.flops_per_token(32) - attention) * 6
