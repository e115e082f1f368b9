"""Adapters to peft and back: its own classes are the truth."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    LAYERS,
    assert_same_logits,
    assert_same_text,
    edited,
    new_gpt2,
    read_adapter,
    read_model,
    write_adapter,
    write_checkpoint,
    write_peft,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Model

from training.checkpoint import (
    load_checkpoint,
)


@pytest.mark.parametrize("bias", [False, True])
def test_peft_loads_an_exported_adapter(convert, bias):
    base = write_checkpoint(Path("out/checkpoint.pt"), bias)
    write_adapter(Path("out/lora.pt"), base)
    convert("--to_hugging_face=base", "--lora_path=")
    output = convert("--to_peft=adapter")
    other = AutoModelForCausalLM.from_pretrained("base")
    model = read_adapter(other, "adapter")

    assert {name.split(".lora_")[0] for name in model.state_dict() if ".lora_" in name} == {
        f"base_model.model.transformer.h.{layer}.{name}" for layer in range(2) for name in LAYERS
    }
    assert_same_text(read_model(lora_path=Path("out/lora.pt")), model)
    # peft would put it right, but with a warning.
    assert json.loads(Path("adapter/adapter_config.json").read_text())["fan_in_fan_out"]
    assert "peft.PeftModel.from_pretrained(model, 'adapter')" in output


def test_an_adapter_there_and_back_is_exact(convert):
    base = write_checkpoint(Path("out/checkpoint.pt"))
    before = write_adapter(Path("out/lora.pt"), base, rank=4, alpha=1.7)
    convert("--to_peft=adapter")
    convert("--from_peft=adapter", "--lora_path=back.pt")
    after = load_checkpoint(Path("back.pt"), ["lora"])

    assert after["lora_args"] == before["lora_args"]
    assert after["base"] == before["base"]
    assert after["lora"].keys() == before["lora"].keys()
    assert all(torch.equal(after["lora"][n], w) for n, w in before["lora"].items())


ADAPTERS = {
    "default": {},
    "factor": {"r": 4, "lora_alpha": 6, "target_modules": list(LAYERS)},
    "one block": {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1]},
    "one block by number": {"target_modules": ["c_fc"], "layers_to_transform": 0},
    "all": {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.5},
    "pattern": {"target_modules": r".*\.0\.(attn|mlp)\.c_proj"},
    "full name": {
        "target_modules": ["transformer.h.1.attn.c_proj", "c_fc"],
        "layers_to_transform": [0],
    },
    "excluded": {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "ranks": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": list(LAYERS),
        "rank_pattern": {"c_fc": 2, r"h\.1\.attn\.c_proj": 7},
        "alpha_pattern": {"h.0.attn.c_attn": 9, "proj": 100},
    },
    "root": {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["c_attn", "c_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "nothing": {"r": 2, "lora_alpha": 0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_of_peft_becomes_ours(convert, gpt2_folder, options):
    convert(f"--from_hugging_face={gpt2_folder}")
    write_peft(Path("adapter"), new_gpt2(), **options)
    output = convert("--from_peft=adapter")
    model = read_adapter(new_gpt2(), "adapter")

    assert_same_logits(read_model(lora_path=Path("out/lora.pt")), model)
    assert "Next:   python generate.py --checkpoint_path=out/checkpoint.pt --lora_path" in output


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_an_output_layer_becomes_ours(convert, gpt2_folder, capsys):
    convert(f"--from_hugging_face={gpt2_folder}")
    write_adapter(Path("out/lora.pt"), read_model())
    write_peft(Path("adapter"), GPT2Model.from_pretrained(gpt2_folder), target_modules=["c_proj"])
    output = convert("--from_peft=adapter")
    model = read_adapter(GPT2Model.from_pretrained(gpt2_folder), "adapter")
    x = torch.arange(20)[None]

    with torch.no_grad():
        ours = read_model(lora_path=Path("out/lora.pt")).hidden_states(x)
        torch.testing.assert_close(ours, model(x).last_hidden_state, atol=1e-4, rtol=0)

    assert "Kept:   an earlier one, as out/lora.2" in output
    speak = importlib.import_module("generate")
    assert speak.main(["--device=cpu", "--max_tokens=2", "--prompt=a", "--raw"]) == 0
    assert "with out/lora.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, LORA is needed"),
        ({"use_dora": True}, "use_dora is True, which has no counterpart here"),
        ({"bias": "all"}, "bias is all"),
        ({"megatron_config": {"a": 1}}, "megatron_config is {'a': 1}"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["wte"]}, "modules_to_save is ['wte']"),
        ({"target_parameters": ["wte.weight"]}, "target_parameters is ['wte.weight']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base"),
        ({"r": 0}, "should be a positive integer value but the value passed is 0"),
        ({"lora_alpha": "high"}, "unsupported operand type"),
        ({"r": 4}, "size mismatch for base_model.model.transformer.h.0.attn.c_attn"),
        ({"rank_pattern": 4}, "'int' object has no attribute 'keys'"),
        ({"target_modules": "("}, "missing ), unterminated subpattern"),
        (
            {"target_modules": ["c_attn", "c_fc"]},
            "c_fc.lora_A.default.weight is missing, and 3",
        ),
        ({"layers_to_transform": [0]}, "h.1.attn.c_attn.lora_A.weight has no place here, and 1"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_without_a_counterpart_are_refused(refused, tmp_path, adapter, changes, expected):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    shutil.copytree(adapter, tmp_path / "adapter")
    edited(tmp_path / "adapter" / "adapter_config.json", **changes)

    assert expected in refused("--from_peft=adapter")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_peft(folder, new_gpt2())

    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_adapters_of_the_embeddings_are_refused(refused, tmp_path, target):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    write_peft(tmp_path / "adapter", new_gpt2(), target_modules=["c_attn", target])

    assert f"{target}." in (line := refused("--from_peft=adapter"))
    assert "has no place here" in line


@pytest.mark.parametrize("name", ["wte.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.lora_B.bias"])
def test_an_adapter_with_weights_of_the_base_is_refused(refused, tmp_path, adapter, name):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    path = Path(shutil.copytree(adapter, tmp_path / "adapter")) / "adapter_model.safetensors"
    weights = load_file(path)
    weights[f"base_model.model.transformer.{name}"] = torch.ones(16)
    save_file({name: weight.clone() for name, weight in weights.items()}, path)

    assert f"{name} has no place here" in refused("--from_peft=adapter")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_no_numbers_is_refused(refused, tmp_path, adapter, value):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edited(folder / "adapter_config.json", lora_alpha=float(value))
    assert "values that are not finite numbers" in refused("--from_peft=adapter")

    shutil.copy(adapter / "adapter_config.json", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = value
    save_file(weights, folder / "adapter_model.safetensors")
    assert "values that are not finite numbers" in refused("--from_peft=adapter")


def test_adapters_that_are_missing_or_of_another_model_are_refused(refused, tmp_path, adapter):
    path = tmp_path / "out" / "checkpoint.pt"

    assert "adapter_config.json is missing" in refused("--from_peft=none")
    (tmp_path / "empty").mkdir()
    shutil.copy(adapter / "adapter_config.json", tmp_path / "empty")
    assert "There is no checkpoint at out/checkpoint.pt" in refused(f"--from_peft={adapter}")

    write_checkpoint(path, embedding_dimensions=32)
    assert "empty holds no weights: adapter_model.safetensors or" in refused("--from_peft=empty")
    assert "size mismatch for" in refused(f"--from_peft={adapter}")
    assert "There is no checkpoint at out/lora.pt" in refused("--to_peft=new")

    write_adapter(tmp_path / "out" / "lora.pt", write_checkpoint(tmp_path / "out" / "other.pt"))
    assert "was trained on another base model than this" in refused("--to_peft=new")
    assert "path of the base model" in refused(
        f"--from_peft={adapter}", "--lora_path=out/checkpoint.previous.pt"
    )
