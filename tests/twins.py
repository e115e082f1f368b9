"""Our network and that of transformers with the same weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT

SIZES = {
    "vocabulary_size": 300,
    "block_size": 32,
    "embedding_dimensions": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}


def hugging_face_pair() -> tuple[GPT, GPT2LMHeadModel]:
    """Return our network and Hugging Face's with the same random weights, biases included."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=48, n_head=4, n_layer=3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    ours = GPT(**SIZES, bias=True)

    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    with torch.no_grad():
        for name, tensor in counterparts(ours, theirs):
            target = dict(ours.named_parameters())[name]
            target[: len(tensor)] = tensor

    return ours, theirs


def counterparts(ours: GPT, theirs: GPT2LMHeadModel, of=lambda parameter: parameter.data):
    """Yield our names with a property of their parameters, in the shape that ours have."""
    names = {
        "token_embeddings": "transformer.wte",
        "position_embeddings": "transformer.wpe",
        "norm": "transformer.ln_f",
        "attention_norm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.hidden": "mlp.c_fc",
        "mlp.output": "mlp.c_proj",
    }

    for name, _ in ours.named_parameters():
        module, kind = name.rsplit(".", 1)

        if module.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            theirs_name = f"transformer.h.{number}.{names[inner]}.{kind}"
        else:
            theirs_name = f"{names[module]}.{kind}"

        tensor = of(theirs.get_parameter(theirs_name))
        # Their linear layers keep weights transposed.
        yield name, tensor.T if ".c_" in theirs_name and tensor.ndim == 2 else tensor
