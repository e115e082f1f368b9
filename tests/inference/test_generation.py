"""Decoding and sampling against the plain network, Hugging Face's generate and exact chances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from twins import hugging_face_pair

from inference.decoding import Decoder, generate
from inference.sampling import Sampler
from model import GPT

SMALL = {
    "vocabulary_size": 50,
    "block_size": 12,
    "embedding_dimensions": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(**SMALL).eval()

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    return model


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(1, 4),
    prompt_size=st.integers(1, 30),
    num_steps=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_the_cache_changes_no_logit(model, batch_size, prompt_size, num_steps, seed):
    """At every position, also past the block size, against the last block_size tokens as one."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(50, (batch_size, prompt_size + num_steps), generator=generator)
    decoder = Decoder(model, batch_size)
    sizes = [prompt_size] + [1] * num_steps
    end = 0

    for size in sizes:
        logits = decoder.read(text[:, end : end + size])
        end += size
        expected = model(text[:, max(0, end - 12) : end])[:, -1]

        assert logits.shape == (batch_size, 50)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_cache_keeps_its_place(model):
    decoder = Decoder(model, 2)
    pointers = [layer.keys_values.data_ptr() for layer in decoder.cache.layers]

    for _ in range(20):
        decoder.read(torch.ones(2, 1, dtype=torch.int64))

    assert pointers == [layer.keys_values.data_ptr() for layer in decoder.cache.layers]


@pytest.mark.parametrize("graph_step", [1, 4, 5, 100])
def test_the_step_that_graphs_record_gives_the_same_logits(model, monkeypatch, graph_step):
    """What a graph would replay is run here as it is: a fixed part of the cache, and a mask."""
    monkeypatch.setattr(Decoder, "GRAPH_STEP", graph_step)
    text = torch.randint(50, (3, 18), generator=torch.Generator().manual_seed(0))
    plain, recorded = Decoder(model, 3), Decoder(model, 3, use_graphs=True)

    class Step:
        """Stands in for a CUDA graph: replaying it runs the step once more."""

        def __init__(self, num_visible: int):
            self.num_visible = num_visible

        def replay(self) -> None:
            recorded.logits[self.num_visible] = recorded.step(self.num_visible)

    class Steps(dict):
        def __contains__(self, num_visible: int) -> bool:
            return True

        def __missing__(self, num_visible: int) -> Step:
            return Step(num_visible)

    recorded.graphs = Steps()

    for first, end in [(0, 3), *((t, t + 1) for t in range(3, 18))]:
        x = text[:, first:end]
        torch.testing.assert_close(recorded.read(x), plain.read(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt_size", [1, 5, 32])
def test_greedy_text_is_that_of_hugging_face(prompt_size):
    ours, theirs = hugging_face_pair()
    prompt = torch.randint(300, (3, prompt_size), generator=torch.Generator().manual_seed(2))
    num_tokens = max(1, 32 - prompt_size)
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config
    )
    tokens = list(generate(ours.eval(), prompt, num_tokens, Sampler(temperature=0.0), seed=0))

    assert torch.stack(tokens, dim=1).tolist() == expected[:, prompt_size:].tolist()


def test_texts_side_by_side_are_those_one_by_one(model):
    prompt = torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(3))
    greedy = Sampler(temperature=0.0)
    together = torch.stack(list(generate(model, prompt, 20, greedy, seed=0)), dim=1)

    for row, text in zip(prompt, together, strict=True):
        alone = torch.stack(list(generate(model, row[None], 20, greedy, seed=0)), dim=1)
        assert alone[0].tolist() == text.tolist()


def test_same_seed_same_text_other_seed_another(model):
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    texts = [
        torch.stack(list(generate(model, prompt, 30, Sampler(), seed))).tolist()
        for seed in (0, 0, 1)
    ]

    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0][0] != texts[0][0][1] or texts[0][1] != texts[0][2]


def test_same_seed_same_text_without_the_cache(model):
    """The same chances, with the whole context computed for each token."""
    prompt = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(4))
    sampler = Sampler(temperature=0.8, top_k=10, top_p=0.9)
    chances = torch.rand(40, 2, generator=torch.Generator().manual_seed(5))
    text = prompt

    for uniform in chances:
        tokens = sampler(model(text[:, -12:])[:, -1].float(), uniform)
        text = torch.cat([text, tokens[:, None]], dim=1)

    cached = torch.stack(list(generate(model, prompt, 40, sampler, seed=5)), dim=1)

    assert cached.tolist() == text[:, 3:].tolist()


def test_tokens_that_may_come_cost_nothing_before(model):
    """Chances for all of them would take more memory than there is."""
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    first = list(generate(model, prompt, 5, Sampler(), seed=3))
    endless = generate(model, prompt, 10**15, Sampler(), seed=3)

    for tokens in first:
        assert next(endless).tolist() == tokens.tolist()


def exact_chances(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Return the probabilities by the definitions, in float64, one after the other."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()) / temperature)
    weights[order[top_k:]] = 0
    chances = weights / weights.sum()
    kept, total = [], 0.0

    for token in order[:top_k]:
        if total < top_p:
            kept.append(token)
        total += chances[token]

    result = np.zeros_like(chances)
    result[kept] = chances[kept]

    return result / result.sum()


SAMPLERS = [
    (1.0, 300, 1.0),
    (1.0, 20, 1.0),
    (0.7, 5, 1.0),
    (1.5, 20, 0.5),
    (1.0, 300, 0.9),
    (2.0, 1, 1.0),
    (1.0, 20, 1e-6),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLERS)
def test_tokens_are_as_frequent_as_they_are_probable(temperature, top_k, top_p):
    """Pearson's chi-squared test at 1 in 10,000, by the Wilson-Hilferty approximation."""
    num_draws = 200_000
    logits = torch.randn(300, generator=torch.Generator().manual_seed(6)) * 2
    uniform = torch.rand(num_draws, generator=torch.Generator().manual_seed(7))
    sampler = Sampler(temperature, top_k, top_p)
    draws = sampler(logits.expand(num_draws, -1), uniform)
    counts = np.bincount(draws.numpy(), minlength=300)
    expected = exact_chances(logits.double().numpy(), temperature, top_k, top_p) * num_draws
    possible = expected > 0

    assert counts[~possible].sum() == 0

    # The test asks for five at least in every class: the rare ones are one.
    rare = possible & (expected < 5)
    observed = np.append(counts[possible & ~rare], counts[rare].sum())
    expected = np.append(expected[possible & ~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(observed) - 1

    if degrees:
        variance = 2 / (9 * degrees)
        score = ((statistic / degrees) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
        assert score < 3.72
    else:
        assert observed.tolist() == [num_draws]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-24])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_any_chance_gives_a_token_that_may_be_taken(uniform, top_p):
    logits = torch.tensor([[5.0, 4.0, -math.inf, 3.0]])
    token = Sampler(1.0, 4, top_p)(logits, torch.tensor([uniform]))

    assert token.item() in (0, 1, 3)


def test_more_than_the_vocabulary_is_all_of_it():
    logits = torch.randn(2, 30)
    uniform = torch.tensor([0.3, 0.8])

    assert (
        Sampler(top_k=10**6)(logits, uniform).tolist()
        == Sampler(top_k=30)(logits, uniform).tolist()
    )


def test_padded_rows_of_the_vocabulary_are_never_taken(model):
    with torch.no_grad():
        model.token_embeddings.weight[50:] = 100.0

    tokens = generate(model, torch.zeros(4, 1, dtype=torch.int64), 20, Sampler(3.0, 1000), seed=0)

    assert max(int(token.max()) for token in tokens) < 50

    with torch.no_grad():
        model.token_embeddings.weight[50:] = 0.0
