"""Small models and adapters, ours and those of other libraries, to be converted."""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from inference.decoding import generate
from inference.sampling import Sampler
from model import GPT
from training.checkpoint import (
    FORMAT_VERSION,
    build_model,
    fingerprint,
    load_checkpoint,
    merge_lora_checkpoint,
    save_checkpoint,
)
from training.lora import lora_shapes

SIZES = {
    "vocabulary_size": 50257,
    "block_size": 128,
    "embedding_dimensions": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}


LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def new_gpt2(**options) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with random weights that are large enough to matter."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=128, n_embd=16, n_head=2, n_layer=2, **options)
    model = GPT2LMHeadModel(config).eval()

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    return model


def write_checkpoint(path: Path, bias: bool = False, **sizes) -> GPT:
    torch.manual_seed(1)
    model_args = {**SIZES, "bias": bias, **sizes}
    model = GPT(**model_args).eval()

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    with torch.no_grad():
        model.token_embeddings.weight[model.vocabulary_size :].zero_()

    state = {
        "format_version": FORMAT_VERSION,
        "encoding": "r50k_base",
        "model_args": model_args,
        "model": model.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state)

    return model


def write_adapter(path: Path, model: GPT, rank: int = 3, alpha: float = 0.7, **changes) -> dict:
    torch.manual_seed(2)
    state = {
        "format_version": FORMAT_VERSION,
        "encoding": "r50k_base",
        "lora_args": {"rank": rank, "alpha": alpha},
        "lora": {name: torch.randn(shape) / 3 for name, shape in lora_shapes(model, rank).items()},
        "base": fingerprint(model.state_dict()),
        **changes,
    }
    save_checkpoint(path, state)

    return state


def read_model(path: Path = Path("out/checkpoint.pt"), lora_path: Path | None = None) -> GPT:
    model = build_model(load_checkpoint(path, ["model"]), path).eval()

    if lora_path:
        merge_lora_checkpoint(model, load_checkpoint(lora_path, ["lora"]), lora_path)

    return model


def read_adapter(base, folder: Path):
    """Load an adapter with peft, which takes another base for each: it changes it."""
    return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_same_logits(ours: GPT, other) -> None:
    x = torch.randint(50257, (2, 128), generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        logits = other(x).logits
        torch.testing.assert_close(ours(x), logits, atol=1e-4, rtol=0)

    assert logits.abs().max() > 1


def assert_same_text(ours: GPT, other) -> None:
    """Compare a hundred tokens, each the most probable one."""
    assert_same_logits(ours, other)

    x = torch.randint(50257, (1, 24), generator=torch.Generator().manual_seed(4))
    tokens = [t.item() for t in generate(ours, x, 100, Sampler(temperature=0), seed=0)]
    text = other.generate(
        input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=100, do_sample=False
    )

    assert len(set(tokens)) > 1
    assert text[0, 24:].tolist() == tokens


def rewritten(folder: Path, change) -> None:
    """Change the weights of a folder, a dictionary of tensors by their names."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights = change(weights) or weights
    path.unlink()
    save_file({n: w.clone() for n, w in weights.items()}, path, metadata={"format": "pt"})


def write_peft(folder: Path, base, **options) -> None:
    """Save an adapter of random weights, none of them zero, with peft."""
    torch.manual_seed(4)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)

    model.save_pretrained(folder)


def edited(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
