"""To Hugging Face's libraries and back: their own clients are the truth."""

import contextlib
import hashlib
import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, finish, launch
from hub_server import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiktoken_ext import openai_public
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from inference.decoding import generate
from inference.sampling import Sampler
from interop import hugging_face
from model import GPT
from system.locks import Lock
from text.instructions import format_prompt, turns_of
from text.tokenizer import END_OF_TEXT, load_encoding
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


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("convert")


@pytest.fixture
def convert(script, capsys, tmp_path, monkeypatch):
    """Return a function that converts in a folder of its own; gives what is printed."""
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> str:
        status = script.main(list(map(str, argv)))
        output, errors = capsys.readouterr()
        assert status == 0, errors

        return output

    return run


@pytest.fixture
def refused(script, error_of, tmp_path, monkeypatch):
    """Return a function that converts what is to be refused, and checks that nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        found, line = error_of(list(map(str, argv)), script)
        # A folder for the results may stay, empty.
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] in (
            [],
            [tmp_path / "out"],
        )
        assert found == status, line
        assert line.endswith(".") or status == 2 or "pip install" in line

        return line

    return run


def new_gpt2(**options) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with random weights that are large enough to matter."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=128, n_embd=16, n_head=2, n_layer=2, **options)
    model = GPT2LMHeadModel(config).eval()

    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    return model


@pytest.fixture(scope="module")
def theirs():
    return new_gpt2()


@pytest.fixture(scope="module")
def gpt2_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)

    return folder


@pytest.fixture
def source(gpt2_folder, tmp_path):
    """A copy of transformers' model, to be changed."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "source"))


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


def write_adapter(path: Path, model: GPT, rank: int = 3, alpha: float = 0.7) -> dict:
    torch.manual_seed(2)
    state = {
        "format_version": FORMAT_VERSION,
        "encoding": "r50k_base",
        "lora_args": {"rank": rank, "alpha": alpha},
        "lora": {name: torch.randn(shape) / 3 for name, shape in lora_shapes(model, rank).items()},
        "base": fingerprint(model.state_dict()),
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


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_what_is_exported(convert, bias):
    ours = write_checkpoint(Path("out/checkpoint.pt"), bias)
    output = convert("--to_hugging_face=new/model")
    model, report = AutoModelForCausalLM.from_pretrained("new/model", output_loading_info=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert model.generation_config.eos_token_id == END_OF_TEXT
    assert model.get_input_embeddings().weight.shape == (50257, 16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_text(ours, model.eval())
    assert "Next:   from transformers import AutoModelForCausalLM, AutoTokenizer" in output
    assert [path.name for path in Path("new").iterdir()] == ["model"]


def test_the_card_loads_the_model(convert, monkeypatch):
    write_checkpoint(Path("out/checkpoint.pt"))
    convert("--to_hugging_face=model")
    card = Path("model/README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    names = {}
    monkeypatch.chdir("model")
    exec(lines, names)

    assert len(lines.splitlines()) == 4
    assert f"| Parameters | {names['model'].num_parameters():,} |" in card
    assert "| Context | 128 tokens |" in card


@pytest.mark.parametrize("flag", ["--lora_path=out/lora.pt", "", "--lora_path="])
def test_an_adapter_is_merged_as_in_generate(convert, flag):
    base = write_checkpoint(Path("out/checkpoint.pt"))
    write_adapter(Path("out/lora.pt"), base)
    output = convert("--to_hugging_face=model", *filter(None, [flag]))
    is_merged = flag != "--lora_path="

    ours = read_model(lora_path=Path("out/lora.pt") if is_merged else None)
    assert_same_text(ours, AutoModelForCausalLM.from_pretrained("model").eval())
    assert bool(AutoTokenizer.from_pretrained("model").chat_template) == is_merged
    assert ("with out/lora.pt" in output) == is_merged


def test_an_adapter_of_another_base_is_left_out_or_refused(convert, refused, capsys):
    base = write_checkpoint(Path("out/checkpoint.pt"))
    write_adapter(Path("out/lora.pt"), write_checkpoint(Path("out/other.pt"), bias=True))
    line = refused("--to_hugging_face=model", "--lora_path=out/lora.pt")
    convert("--to_hugging_face=model")

    assert "was trained on another base model than this" in line
    assert_same_logits(base, AutoModelForCausalLM.from_pretrained("model").eval())


def test_weights_of_gpt2_become_a_checkpoint(convert, theirs, gpt2_folder):
    output = convert(f"--from_hugging_face={gpt2_folder}")
    state = load_checkpoint(Path("out/checkpoint.pt"), ["model_args"])

    assert state["model_args"] == {**SIZES, "bias": True}
    assert not state["model"]["token_embeddings.weight"][50257:].any()
    assert_same_text(read_model(), theirs)
    assert "with biases" in output
    assert "Next:   python generate.py\n        python fine-tune.py\n" in output


@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back_is_exact(convert, bias):
    ours = write_checkpoint(Path("out/checkpoint.pt"), bias)
    convert("--to_hugging_face=model")
    convert("--from_hugging_face=model", "--checkpoint_path=back.pt")
    convert("--to_hugging_face=again", "--checkpoint_path=back.pt")
    state = load_checkpoint(Path("back.pt"), ["model"])

    assert state["model_args"] == {**SIZES, "bias": bias}
    assert state["model"].keys() == ours.state_dict().keys()
    assert all(torch.equal(state["model"][n], w) for n, w in ours.state_dict().items())

    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("model", name).read_bytes() == Path("again", name).read_bytes()


def test_here_and_back_is_exact(convert, theirs, gpt2_folder):
    convert(f"--from_hugging_face={gpt2_folder}")
    convert("--to_hugging_face=model")
    found, wanted = (
        load_file("model/model.safetensors"),
        load_file(gpt2_folder / "model.safetensors"),
    )

    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert_same_text(read_model(), AutoModelForCausalLM.from_pretrained("model").eval())


def rewritten(folder: Path, change) -> None:
    """Change the weights of a folder, a dictionary of tensors by their names."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights = change(weights) or weights
    path.unlink()
    save_file({n: w.clone() for n, w in weights.items()}, path, metadata={"format": "pt"})


def test_names_without_a_prefix_masks_and_a_tied_output_are_taken(convert, source):
    def change(weights):
        weights["lm_head.weight"] = weights["transformer.wte.weight"]

        for layer in range(2):
            weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128)
            weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

        return {name.removeprefix("transformer."): weight for name, weight in weights.items()}

    convert("--from_hugging_face=source", "--checkpoint_path=plain.pt")
    rewritten(source, change)
    convert("--from_hugging_face=source", "--checkpoint_path=changed.pt")

    assert fingerprint(read_model(Path("plain.pt")).state_dict()) == fingerprint(
        read_model(Path("changed.pt")).state_dict()
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_files_of_all_kinds_are_read(convert, theirs, source, kind):
    stem = "pytorch_model" if "bin" in kind else "model"
    suffix = kind.split()[-1]
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"{stem}.{suffix}": names}

    if "sharded" in kind:
        shards = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
        places = {name: file for file, some in shards.items() for name in some}
        index = {"metadata": {}, "weight_map": places}
        (source / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))

    for file, some in shards.items():
        save = torch.save if suffix == "bin" else save_file
        save({name: weights[name] for name in some}, source / file)

    convert("--from_hugging_face=source")
    assert_same_logits(read_model(), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(convert, source, dtype):
    rewritten(source, lambda weights: {name: w.to(dtype) for name, w in weights.items()})
    convert("--from_hugging_face=source")
    other = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    assert_same_logits(read_model(), other)


def test_an_earlier_checkpoint_is_kept(convert, gpt2_folder):
    earlier = write_checkpoint(Path("out/checkpoint.pt"))
    output = convert(f"--from_hugging_face={gpt2_folder}")
    [kept] = Path("out").glob("checkpoint.2*.pt")

    assert f"Kept:   an earlier one, as {kept}" in output
    assert fingerprint(read_model(kept).state_dict()) == fingerprint(earlier.state_dict())


def test_an_imported_model_with_biases_speaks_and_learns(
    convert, gpt2_folder, fine_tune, rows_path, capsys
):
    convert(f"--from_hugging_face={gpt2_folder}")
    generate_ = importlib.import_module("generate")
    run = ["--device=cpu", "--seed=1"]

    for precision in ("fp32", "bf16"):
        tune = [f"--dataset={rows_path}", "--num_epochs=1", "--compile=False", "--rank=2"]
        argv = [*run, *tune, f"--precision={precision}", "--metrics_path=out/metrics.csv"]
        assert fine_tune.main(argv) == 0
        assert (
            generate_.main([*run, f"--precision={precision}", "--max_tokens=4", "--prompt=a"]) == 0
        )

    assert "with out/lora.pt" in capsys.readouterr().err
    convert("--to_hugging_face=tuned")
    convert("--to_hugging_face=base", "--lora_path=")
    convert("--to_peft=adapter")
    ours = read_model(lora_path=Path("out/lora.pt"))
    base = AutoModelForCausalLM.from_pretrained("base")

    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained("tuned").eval())
    assert_same_logits(ours, read_adapter(base, "adapter"))


@pytest.fixture(scope="module")
def exported(script, tmp_path_factory):
    """A fine-tuned model in a folder, of which only the tokenizer is of interest."""
    folder = tmp_path_factory.mktemp("exported")
    path = folder / "checkpoint.pt"
    write_adapter(folder / "lora.pt", write_checkpoint(path))
    argv = [f"--checkpoint_path={path}", f"--lora_path={folder / 'lora.pt'}"]
    assert script.main([f"--to_hugging_face={folder / 'model'}", *argv]) == 0

    return folder / "model"


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported)


def test_vocabulary_and_merges_are_the_published_ones(exported, monkeypatch):
    """tiktoken knows the checksums of OpenAI's files."""
    published = {}
    monkeypatch.setattr(
        openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **known: published.update(known)
    )
    openai_public.gpt2()

    for name, key in (("merges.txt", "vocab_bpe_hash"), ("vocab.json", "encoder_json_hash")):
        content = (exported / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == published[key]


def documents() -> list[str]:
    """A thousand documents of any Unicode: all characters, few, blanks, Latin."""
    draw = random.Random(0)
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]
    blanks = [c for c in assigned if c.isspace()]
    few = [*"aZ é1²٣'.-\n\t\r", "'s", "'LL", "'ll", "'ve", "日本", "👩‍🚀", "e\u0301", *blanks]
    pools = (assigned, few, blanks + ["x", "'"], [chr(c) for c in range(0x180)])

    return ["".join(draw.choices(pools[n % 4], k=draw.randrange(120))) for n in range(1000)]


def test_tokens_are_tiktokens_on_any_document(tokenizer, exported):
    texts = documents()
    found = tokenizer(texts)["input_ids"]
    # Versions of transformers before 5 take all from this file.
    pipeline = Tokenizer.from_file(str(exported / "tokenizer.json"))

    assert len(texts) == 1000
    assert found == load_encoding().encode_ordinary_batch(texts)
    assert found == [encoding.ids for encoding in pipeline.encode_batch(texts)]
    assert tokenizer.batch_decode(found) == pipeline.decode_batch(found) == texts


def test_tokens_are_tiktokens_for_every_character(tokenizer):
    """Between a letter, a digit and a sign, it shows of which kind a character is taken to be."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    known = [c for c in characters if unicodedata.category(c) not in ("Co", "Cn")]
    other = random.Random(0).sample(sorted(set(characters) - set(known)), 2000)
    texts = [f"a{c} {c}1" for c in known + other]
    texts = ["\n\n".join(texts[first : first + 500]) for first in range(0, len(texts), 500)]

    assert tokenizer(texts)["input_ids"] == load_encoding().encode_ordinary_batch(texts)


def test_end_of_text_is_special_and_added_nowhere(tokenizer):
    assert tokenizer("a<|endoftext|>")["input_ids"] == [64, END_OF_TEXT]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_OF_TEXT
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == 50257


TEXT = st.text(st.sampled_from('a {}\n"\\%#'), max_size=6)
SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": TEXT})
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT | st.none()})
ANSWER = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT})
TURN = st.tuples(st.lists(SYSTEM, max_size=1), st.lists(USER, min_size=1, max_size=2), ANSWER)


@settings(max_examples=100, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=3))
def test_the_chat_template_is_ours(tokenizer, turns):
    messages = [m for system, users, answer in turns for m in (*system, *users, answer)]
    expected = "".join(
        f"{prompt}{answer}<|endoftext|>" for prompt, answer in turns_of({"messages": messages})
    )

    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected

    last = turns_of({"messages": messages})[-1]
    question = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert question + f"{last.answer}<|endoftext|>" == expected


def test_a_question_is_put_as_generate_does(tokenizer):
    messages = [{"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == format_prompt("Who?")
    assert text.startswith(tokenizer.apply_chat_template(messages, tokenize=False))

    with pytest.raises(Exception, match="a message has the role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


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


def write_peft(folder: Path, base, **options) -> None:
    """Save an adapter of random weights, none of them zero, with peft."""
    torch.manual_seed(4)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)

    model.save_pretrained(folder)


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
    assert "Next:   python generate.py --raw" in output


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_an_output_layer_becomes_ours(convert, gpt2_folder, capsys):
    convert(f"--from_hugging_face={gpt2_folder}")
    write_adapter(Path("out/lora.pt"), read_model())
    write_peft(Path("adapter"), GPT2Model.from_pretrained(gpt2_folder), target_modules=["c_proj"])
    output = convert("--from_peft=adapter")
    model = read_adapter(GPT2Model.from_pretrained(gpt2_folder), "adapter")
    x = torch.arange(20)[None]

    with torch.no_grad():
        ours = read_model(lora_path=Path("out/lora.pt")).encode(x)
        torch.testing.assert_close(ours, model(x).last_hidden_state, atol=1e-4, rtol=0)

    assert "Kept:   an earlier one, as out/lora.2" in output
    speak = importlib.import_module("generate")
    assert speak.main(["--device=cpu", "--max_tokens=2", "--prompt=a", "--raw"]) == 0
    assert "with out/lora.pt" in capsys.readouterr().err


def edited(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt_neo"}, "model_type is gpt_neo, gpt2 is needed"),
        ({"model_type": None}, "model_type is None"),
        ({"activation_function": "relu"}, "activation_function is relu, gelu_new is needed"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 32}, "n_inner is 32"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"vocab_size": 50258}, "vocab_size is 50258, 50257 is needed"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_layer": "two"}, "n_layer is two, which is no size"),
        ({"n_head": True}, "n_head is True, which is no size"),
        ({"n_head": 3}, "divisible by the number of attention heads, 16 and 3 given"),
        ({"n_positions": 64}, "wpe.weight has 128 x 16 values"),
        ({"n_layer": 1}, "h.1.attn.c_attn.bias has no place here, and 11 more"),
        ({"n_layer": 3}, "h.2.attn.c_attn.bias is missing, and 11 more"),
    ],
)
def test_other_architectures_are_refused(refused, source, changes, expected):
    edited(source / "config.json", **changes)

    assert expected in refused("--from_hugging_face=source")


@pytest.mark.parametrize("changes", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 64}])
def test_other_names_for_the_same_are_taken(convert, source, theirs, changes):
    edited(source / "config.json", **changes)
    convert("--from_hugging_face=source")

    assert_same_logits(read_model(), theirs)


NORM = "transformer.h.1.ln_1.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop(NORM) is None, "the weight h.1.ln_1.weight is missing."),
        (lambda w: w.update(score=w[NORM]), "the weight score has no place here."),
        (lambda w: w.update({NORM: torch.ones(15)}), "h.1.ln_1.weight has 15 values"),
        (lambda w: w.update({NORM: torch.ones(())}), "h.1.ln_1.weight has 1 values"),
        (lambda w: w[NORM].fill_(torch.nan) is None, "h.1.ln_1.weight holds values that are not"),
        (lambda w: w.update({NORM: w[NORM].int()}), "h.1.ln_1.weight has the format torch.int32"),
        (
            lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}),
            "lm_head.weight is not the weight of the token embeddings",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(3)}),
            "lm_head.weight is not the weight of the token embeddings",
        ),
    ],
)
def test_weights_that_are_not_whole_are_refused(refused, source, change, expected):
    rewritten(source, change)

    assert expected in refused("--from_hugging_face=source")


def cut(path: Path, size: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:size])


def index(source: Path, **places) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(places))


class Dangerous:
    def __reduce__(self):
        return (Path.touch, (Path("run"),))


def pickled(source: Path, value) -> None:
    (source / "model.safetensors").unlink()
    torch.save(value, source / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: (s / "model.safetensors").unlink(), "holds no weights: there is no model.safet"),
        (lambda s: cut(s / "model.safetensors"), "model.safetensors is damaged"),
        (lambda s: (s / "config.json").unlink(), "config.json is missing"),
        (lambda s: cut(s / "config.json", 20), "config.json is damaged: it is no JSON"),
        (lambda s: (s / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda s: (s / "config.json").write_bytes(b"\xff"), "config.json is damaged"),
        (index, "index.json is damaged: it does not say which file"),
        (lambda s: index(s, weight_map={"a": "../a.safetensors"}), "index.json is damaged"),
        (lambda s: index(s, weight_map={"a": "a.safetensors"}), "a.safetensors is missing"),
        (lambda s: pickled(s, {"a": Dangerous()}), "bin is damaged, or holds other things than"),
        (lambda s: pickled(s, {"a": 1}), "bin holds other things than weights"),
        (lambda s: pickled(s, [torch.ones(1)]), "bin holds other things than weights"),
        (lambda s: (s / "vocab.json").write_text('{"a": 0}'), "vocab.json holds another vocab"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), "tokenizer.json holds another"),
    ],
)
def test_damaged_folders_are_refused(refused, source, damage, expected):
    damage(source)

    assert expected in refused("--from_hugging_face=source")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, LORA is needed"),
        ({"use_dora": True}, "use_dora is True, which has no counterpart here"),
        ({"bias": "all"}, "bias is all"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["wte"]}, "modules_to_save is ['wte']"),
        ({"target_parameters": ["wte.weight"]}, "target_parameters is ['wte.weight']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"of_a_later_version": 3}, "of_a_later_version is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base"),
        ({"r": 0}, "r and rank_pattern are [0], numbers above 0 are needed"),
        ({"lora_alpha": "high"}, "lora_alpha and alpha_pattern are ['high']"),
        ({"r": 4}, "lora_A.weight has 8 x 16 values"),
        ({"rank_pattern": 4}, "adapter_config.json is damaged"),
        ({"target_modules": "("}, "adapter_config.json is damaged"),
        ({"target_modules": ["c_attn", "c_fc"]}, "mlp.c_fc.lora_A.weight is missing, and 3 more"),
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


def test_adapters_that_are_missing_or_of_another_model_are_refused(refused, tmp_path, adapter):
    path = tmp_path / "out" / "checkpoint.pt"

    assert "adapter_config.json is missing" in refused("--from_peft=none")
    assert "There is no checkpoint at out/checkpoint.pt" in refused(f"--from_peft={adapter}")

    write_checkpoint(path, embedding_dimensions=32)
    assert "lora_A.weight has 8 x 16 values" in refused(f"--from_peft={adapter}")
    assert "There is no checkpoint at out/lora.pt" in refused("--to_peft=new")

    write_adapter(tmp_path / "out" / "lora.pt", write_checkpoint(tmp_path / "out" / "other.pt"))
    assert "was trained on another base model than this" in refused("--to_peft=new")
    assert "path of the base model" in refused(
        f"--from_peft={adapter}", "--lora_path=out/checkpoint.previous.pt"
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "one of --to_hugging_face, --from_hugging_face, --to_peft, --from_peft is needed, 0"),
        (["--to_hugging_face=a", "--to_peft=b"], "is needed, 2 given"),
        (["--to_hugging_face="], "--to_hugging_face: a path is needed"),
        (["--from_hugging_face=a", "--checkpoint_path="], "--checkpoint_path: a path is needed"),
        (["--to_peft=a", "--lora_path="], "--lora_path: a path is needed"),
        (["--from_hugging_face=a", "--lora_path=b"], "--lora_path: --from_hugging_face has no"),
        (["--from_hugging_face=./none"], "--from_hugging_face: there is no folder ./none"),
        (["--to_huggingface=a"], "did you mean --to_hugging_face?"),
    ],
)
def test_wrong_command_lines(refused, argv, expected):
    assert expected in refused(*argv, status=2)


def test_a_wrong_command_line_is_answered_without_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = None\n"
        "import convert; sys.exit(convert.main(['--to_peft=a', '--from_peft=b']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_a_folder_that_is_there_is_refused_and_an_empty_one_filled(convert, refused):
    write_checkpoint(Path("out/checkpoint.pt"))
    Path("full").mkdir()
    Path("full/file").touch()
    Path("empty").mkdir()

    assert "full is there already" in refused("--to_hugging_face=full")
    assert "file is there already" in refused("--to_hugging_face=full/file")
    assert "cannot be written: " in refused("--to_hugging_face=full/file/new")

    convert("--to_hugging_face=empty")
    assert "empty is there already" in refused("--to_hugging_face=empty")


def test_checkpoints_that_are_no_model_of_gpt2_are_refused(refused, tmp_path):
    path = tmp_path / "out" / "checkpoint.pt"
    path.parent.mkdir()

    assert "There is no checkpoint at out/checkpoint.pt" in refused("--to_hugging_face=new")
    path.write_bytes(b"PK\x03\x04")
    assert "is damaged, or not of this project" in refused("--to_hugging_face=new")
    write_checkpoint(path, vocabulary_size=300)
    assert "has 300 tokens, the 50257 of GPT-2 are needed" in refused("--to_hugging_face=new")


def test_a_killed_export_leaves_nothing_under_its_name_and_the_next_one_is_whole(convert, refused):
    write_checkpoint(Path("out/checkpoint.pt"))
    kill = (
        "import os, hugging_face\n"
        f"hugging_face.load_file = lambda _: os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    status, _, _ = finish(launch(["--to_hugging_face=new"], kill, script="convert"))

    assert status == -signal.SIGKILL
    assert not Path("new").exists()
    assert Path("new.tmp/model.safetensors").exists()

    Path("new.tmp/.tmp123456").touch()
    convert("--to_hugging_face=new")
    assert sorted(path.name for path in Path().iterdir()) == ["new", "out"]
    AutoModelForCausalLM.from_pretrained("new")

    # What no export has made is not removed.
    Path("other.tmp").mkdir()
    Path("other.tmp/photo.jpg").touch()
    assert "other.tmp is in the way" in refused("--to_hugging_face=other")


@pytest.mark.parametrize("kind", ["full", "changed", "interrupted"])
def test_a_failing_export_leaves_nothing(script, capsys, monkeypatch, tmp_path, kind):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)

    def fail(*_, **__):
        if kind == "interrupted":
            raise KeyboardInterrupt

        raise OSError(28, "No space left on device")

    if kind == "changed":
        monkeypatch.setattr(hugging_face, "load_file", lambda path: {})
    else:
        monkeypatch.setattr("safetensors.torch.save_file", fail)

    status = script.main(["--to_hugging_face=new"])
    line = capsys.readouterr().err
    told = {
        "full": "new cannot be written: No space left on device.",
        "changed": "is not what was written to it; look after the disk.",
        "interrupted": "\n",
    }

    assert status == (130 if kind == "interrupted" else 1)
    assert told[kind] in line
    assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_safetensors_one_line_says_how_to_get_it(refused, tmp_path, source, monkeypatch):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)

    for argv in ("--to_hugging_face=new", "--to_peft=new", "--from_hugging_face=source"):
        assert "safetensors is missing: pip install safetensors" in refused(argv)


def test_one_process_at_a_time_writes_a_folder(refused, tmp_path):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")

    with Lock(tmp_path / "new.lock"):
        assert "is being written by" in refused("--to_hugging_face=new")


FAST = "from text import hub; hub.RETRY_PAUSES = hub.FIRST_RETRY_PAUSES = (0.01, 0.02)"


def download(tmp_path: Path, name: str, endpoint: str) -> tuple[int, str, str]:
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    argv = [f"--from_hugging_face={name}", f"--checkpoint_path={tmp_path / 'checkpoint.pt'}"]
    status, output, errors = finish(launch(argv, FAST, env, "convert"))

    return status, output, errors


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_of_the_hub_is_downloaded(tmp_path, gpt2_folder, theirs):
    files = {**files_of(gpt2_folder), "pytorch_model.bin": b"", "onnx/model.onnx": b""}

    with serve("gpt2", files, fault=lambda path, number: "500" if number == 1 else None) as (
        endpoint,
        requests,
    ):
        status, _, errors = download(tmp_path, "gpt2", endpoint)

    assert status == 0, errors
    assert_same_logits(read_model(tmp_path / "checkpoint.pt"), theirs)
    fetched = {line.rpartition("/")[2] for line in requests if "/resolve/" in line}
    assert fetched == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("fault", ["damage", "none", "no weights", "no network"])
def test_a_download_that_fails_is_told_in_one_line(tmp_path, gpt2_folder, fault):
    files = files_of(gpt2_folder)
    told = {
        "damage": "does not have the checksum that the Hub gives for it, and is removed",
        "none": "someone/none cannot be read from the Hub",
        "no weights": "someone/model cannot be read from the Hub: there is no model.safetensors or",
        "no network": "The same command goes on where this one stopped. A folder that holds the",
    }

    if fault == "no weights":
        del files["model.safetensors"]

    def break_(path, _):
        return "damage" if fault == "damage" and path == "model.safetensors" else None

    with serve("someone/model", files, fault=break_) as (endpoint, _):
        name = "someone/none" if fault == "none" else "someone/model"
        endpoint = "http://127.0.0.1:9" if fault == "no network" else endpoint
        status, _, errors = download(tmp_path, name, endpoint)

    [line] = [line for line in errors.splitlines() if "error" in line and "again in" not in line]
    assert status == 1
    assert line.startswith("error: ")
    assert told[fault] in line
    assert not (tmp_path / "checkpoint.pt").exists()

    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "home").rglob("model.safetensors"))
