"""Adapters in peft's format, which it reads and writes itself.

peft keeps A and B as they are here, (R, in) and (out, R), and divides its own alpha by the rank R.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Model

from interop.outputs import ConversionError
from interop.transformers import (
    check_written,
    convert_errors,
    new_config,
    report_problems,
    skeleton,
    their_name,
)
from model import GPT
from training.checkpoint import (
    FORMAT_VERSION,
    check_finite,
    fingerprint,
    load_model_and_tokenizer,
)
from training.lora import linear_layers, lora_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TARGETS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
PREFIX = "base_model.model."
ADAPTER = "default"

# Settings that may differ from peft's defaults: the adapter is still B A times a factor.
PLAIN_SETTINGS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Other ways to begin change the weights of the base, too.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def export_adapter(lora: dict[str, Tensor], alpha: float, model: GPT, folder: Path) -> None:
    """Write an adapter into a folder, and read it back.

    Args:
        lora: as training.lora.lora_state_dict gives it.
        model: its base.

    Raises:
        ConversionError: when it cannot be written.
    """
    rank = next(len(weight) for name, weight in lora.items() if name.endswith(".lora_a"))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank * alpha,
        target_modules=TARGETS,
        fan_in_fan_out=True,
    )
    weights = {their_adapter_name(name): weight.float() for name, weight in lora.items()}
    with convert_errors(folder, "written"):
        theirs = PeftModel(skeleton(new_config(model)), config)
        set_peft_model_state_dict(theirs, weights)
        theirs.save_pretrained(folder, save_embedding_layers=False)
        # Its headings have nothing below them.
        (folder / "README.md").unlink(missing_ok=True)
        found = load_peft_weights(str(folder), device="cpu")

    check_written(weights, found, folder)


def their_adapter_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{PREFIX}{their_name(layer)}.lora_{kind[-1].upper()}.weight"


def import_adapter(folder: Path, base_path: Path) -> dict:
    """Return the adapter in a folder as a LoRA checkpoint.

    Layers without an adapter get one that is zero, and lower ranks are filled up with zeros. Where
    layers have several factors, alpha is 1 and each factor is taken into its B.

    Args:
        base_path: the checkpoint of its base.

    Raises:
        CheckpointError, ConversionError: when it cannot be read, or is not exactly an adapter of
            this model.
    """
    config = read_config(folder)
    model, tokenizer = load_model_and_tokenizer(base_path)
    layers = read_layers(folder, config, model)
    names = {their_name(name): name for name in linear_layers(model)}
    others = {f"of {name} has no place here" for name in layers.keys() - names.keys()}
    report_problems(others, folder)

    scales = {layer.scaling[ADAPTER] for layer in layers.values()}
    rank = max(layer.r[ADAPTER] for layer in layers.values())
    alpha = scales.pop() if len(scales) == 1 else 1.0

    lora = {name: torch.zeros(shape) for name, shape in lora_shapes(model, rank).items()}
    for name, layer in layers.items():
        factor = layer.scaling[ADAPTER] / alpha if alpha else 1.0
        a, b = (module[ADAPTER].weight.detach() for module in (layer.lora_A, layer.lora_B))
        lora[f"{names[name]}.lora_a"][: len(a)] = a
        lora[f"{names[name]}.lora_b"][:, : len(a)] = factor * b

    # Also where alpha is none: B is not a number then.
    check_finite(lora, folder)
    return {
        "format_version": FORMAT_VERSION,
        "encoding": tokenizer.encoding,
        "lora_args": {"rank": rank, "alpha": alpha},
        "lora": lora,
        "base": fingerprint(model.state_dict()),
    }


def read_config(folder: Path) -> LoraConfig:
    """Return the settings of an adapter, which leave B A times a factor and nothing else.

    Raises:
        ConversionError: when they do more, or are damaged.
    """
    path = folder / CONFIG_FILE

    # Elsewhere the library would look for it on the Hub.
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")

    with convert_errors(path):
        settings, defaults = LoraConfig.from_json_file(str(path)), vars(LoraConfig())
        changed = {
            name: value
            for name, value in settings.items()
            if name not in PLAIN_SETTINGS and value and value != defaults.get(name)
        }

    if settings.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is {settings.get('peft_type')}, LORA is needed.")

    for name, value in changed.items():
        raise ConversionError(f"{path}: {name} is {value}, which has no counterpart here.")

    if (beginning := settings.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
        raise ConversionError(
            f"{path}: init_lora_weights is {beginning}, which changes the base model, too."
        )

    with convert_errors(path):
        return LoraConfig.from_pretrained(str(folder))


def read_layers(folder: Path, config: LoraConfig, model: GPT) -> dict[str, LoraLayer]:
    """Return the layers of an adapter, by the names that they have in GPT2LMHeadModel.

    Raises:
        ConversionError: when its weights are not exactly those of the layers that config chooses.
    """
    # Elsewhere the library would look for them on the Hub.
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ConversionError(f"{folder} holds no weights: {' or '.join(WEIGHT_FILES)} is missing.")

    with convert_errors(folder):
        weights = load_peft_weights(str(folder), device="cpu")
        # Others would take the place of the base's own weights.
        ends = (".lora_A.weight", ".lora_B.weight")
        others = {f"{name} has no place here" for name in weights if not name.endswith(ends)}
        report_problems(others, folder)
        is_whole = any(name.startswith(f"{PREFIX}transformer.") for name in weights)
        base = skeleton(new_config(model), GPT2LMHeadModel if is_whole else GPT2Model)
        theirs = PeftModel(base, config, ADAPTER)
        report = set_peft_model_state_dict(theirs, weights, ADAPTER)

    problems = {f"{name} is missing" for name in report.missing_keys if ".lora_" in name}
    problems |= {f"{name} has no place here" for name in report.unexpected_keys}
    report_problems(problems, folder)
    prefix = "" if is_whole else "transformer."
    return {
        prefix + name.removeprefix(PREFIX): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
