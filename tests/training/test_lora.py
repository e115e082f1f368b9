"""The adapter: against peft on the same weights, and against what Hu et al. 2021 promise."""

import copy

import peft
import pytest
import torch
from small_trainers import lora_state_dict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
from model import GPT
from training.lora import (
    LoraLinear,
    add_lora,
    linear_layers,
    lora_shapes,
    merge_lora,
)

RANK, ALPHA = 3, 0.5
SIZES = {
    "vocabulary_size": 300,
    "block_size": 32,
    "embedding_dimensions": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(params=[False, True], ids=["", "bias"])
def base(request):
    torch.manual_seed(0)

    return GPT(**SIZES, bias=request.param)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(300, (2, 20), generator=generator)
    y = torch.randint(300, (2, 20), generator=generator)
    y[:, :7] = -100

    return x, y


def tuned(base: GPT, **options) -> GPT:
    """Return a copy with an adapter whose B is not zero any more."""
    model = copy.deepcopy(base)
    torch.manual_seed(2)
    add_lora(model, RANK, ALPHA, **options)

    for name, weight in lora_state_dict(model).items():
        if name.endswith(".lora_b"):
            nn.init.normal_(weight, std=0.1)

    return model


def test_every_linear_layer_of_the_blocks_is_adapted_and_no_other(base):
    names = list(linear_layers(base))
    model = tuned(base)

    assert len(names) == 2 * 4
    assert all(isinstance(model.get_submodule(name), LoraLinear) for name in names)
    assert not isinstance(model.token_embeddings, LoraLinear)


def test_at_first_the_output_is_that_of_the_base(base, batch):
    model = copy.deepcopy(base)
    add_lora(model, RANK, ALPHA, dropout=0.5)

    assert torch.equal(model(batch[0]), base(batch[0]))
    assert model.blocks[0].mlp.hidden.lora_a.abs().sum() > 0


def test_a_is_drawn_uniformly_within_the_bound_of_kaiming(base):
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(1000, 10), 50, 1.0, 0.0, torch.float32)
    # With a = sqrt(5) the bound is 1 / sqrt(inputs).
    scaled = layer.lora_a.detach() * 1000**0.5

    assert scaled.abs().max() <= 1
    torch.testing.assert_close(scaled.var(), torch.tensor(1 / 3), atol=0.01, rtol=0)


def test_what_is_trained_is_what_is_saved_and_loaded(base):
    model = tuned(base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    assert trained == set(lora_state_dict(model)) == set(lora_shapes(base, RANK))
    assert {name: tuple(w.shape) for name, w in lora_state_dict(model).items()} == lora_shapes(
        base, RANK
    )


def test_equals_peft(base, batch):
    model = tuned(base)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK * ALPHA,
        lora_dropout=0.0,
        target_modules=["query_key_value", "attention.output", "mlp.hidden", "mlp.output"],
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    parameters = dict(theirs.named_parameters())
    pairs = {
        name: f"base_model.model.{name[:-1]}{name[-1].upper()}.default.weight"
        for name in lora_state_dict(model)
    }

    with torch.no_grad():
        for name, weight in lora_state_dict(model).items():
            parameters[pairs[name]].copy_(weight)

    torch.testing.assert_close(model(batch[0]), theirs(batch[0]), atol=1e-5, rtol=1e-5)

    model(*batch).backward()
    theirs(*batch).backward()
    ours = dict(model.named_parameters())

    assert {p for p in parameters if parameters[p].requires_grad} == set(pairs.values())

    for name, other in pairs.items():
        assert ours[name].grad.abs().sum() > 0
        torch.testing.assert_close(ours[name].grad, parameters[other].grad, atol=1e-5, rtol=1e-5)


def test_merged_it_is_the_same_model_and_unmerged_the_base(base, batch):
    model = tuned(base)
    merged = copy.deepcopy(base)
    merge_lora(merged, lora_state_dict(model), ALPHA)

    torch.testing.assert_close(merged(batch[0]), model(batch[0]), atol=1e-5, rtol=1e-5)
    assert not torch.equal(merged(batch[0]), base(batch[0]))

    merge_lora(merged, lora_state_dict(model), -ALPHA)

    for left, right in zip(merged.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_the_base_is_frozen_and_has_no_gradient(base, batch):
    model = tuned(base)
    before = copy.deepcopy(base.state_dict())
    model(*batch).backward()

    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".lora_a", ".lora_b"))

    assert all(torch.equal(base.state_dict()[name], weight) for name, weight in before.items())


def test_dropout_acts_on_the_input_of_the_adapter_alone(base, batch):
    model = tuned(base, dropout=0.5)
    layer = model.blocks[0].mlp.hidden
    z = torch.randn(4, 24)
    frozen = nn.functional.linear(z, layer.weight, layer.bias)
    torch.manual_seed(3)
    outputs = layer(z) - frozen
    torch.manual_seed(3)
    expected = nn.functional.dropout(z, 0.5) @ layer.lora_a.T @ layer.lora_b.T * ALPHA

    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)

    whole = z @ layer.lora_a.T @ layer.lora_b.T * ALPHA
    torch.testing.assert_close(layer.eval()(z) - frozen, whole, atol=1e-5, rtol=1e-5)


def test_frozen_weights_can_be_kept_in_half_the_memory(base, batch):
    model, exact = tuned(base, dtype=torch.bfloat16), tuned(base)
    layer = model.blocks[0].mlp.hidden

    assert layer.weight.dtype == torch.bfloat16
    assert layer.lora_a.dtype == torch.float32
    # Inside autocast a float32 weight is rounded to just this one.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(batch[0]), exact(batch[0]))


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_rank_that_makes_no_adapter_is_refused(base, rank):
    with pytest.raises(ValueError, match=f"from 1 to 24, .*{rank} given"):
        add_lora(base, rank, ALPHA)


@pytest.mark.parametrize("change", ["missing", "foreign", "shape", "empty"])
def test_an_adapter_that_is_not_whole_is_not_merged(base, change):
    adapter = lora_state_dict(tuned(base))
    name = next(iter(adapter))

    if change == "missing":
        adapter.pop(name)
    elif change == "foreign":
        adapter["token_embeddings.lora_a"] = torch.zeros(RANK, 24)
    elif change == "shape":
        adapter[name] = torch.zeros(RANK, 23)
    else:
        adapter.clear()

    before = copy.deepcopy(base.state_dict())

    with pytest.raises(ValueError, match="other layers or shapes"):
        merge_lora(base, adapter, ALPHA)

    assert all(torch.equal(base.state_dict()[key], weight) for key, weight in before.items())


def test_frozen_products_are_not_repeated(monkeypatch):
    """What is computed again for the backward pass is no large matrix product."""

    def count() -> int:
        adapted = GPT(300, 64, 64, 4, 2)
        add_lora(adapted, 4, 2.0)
        x = torch.randint(300, (2, 64))

        with FlopCounterMode(display=False) as counter:
            adapted(x, x).backward()

        return counter.get_total_flops()

    flops = count()
    monkeypatch.setattr(model, "recompute", lambda function, z: function(z))

    assert flops < 1.03 * count()
