"""Models to transformers and back: its own classes are the truth."""

import hashlib
import importlib
import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from conversions import (
    SIZES,
    assert_same_logits,
    assert_same_text,
    edited,
    read_model,
    rewritten,
    write_adapter,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiktoken_ext import openai_public
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import END_OF_TEXT, GPT2_TOKENIZER

from text.instructions import format_prompt, turns_of
from training.checkpoint import (
    fingerprint,
    load_checkpoint,
)


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_what_is_exported(convert, bias):
    ours = write_checkpoint(Path("out/checkpoint.pt"), bias)
    output = convert("--to_hugging_face=new/model")
    model, report = AutoModelForCausalLM.from_pretrained("new/model", output_loading_info=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert json.loads(Path("new/model/config.json").read_text())["n_ctx"] == 128
    assert len({path.stat().st_mode for path in Path("new/model").iterdir()}) == 1
    assert model.generation_config.eos_token_id == END_OF_TEXT
    assert model.get_input_embeddings().weight.shape == (50257, 16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_text(ours, model.eval())
    assert "Next:   from transformers import AutoModelForCausalLM, AutoTokenizer" in output
    assert [path.name for path in Path("new").iterdir()] == ["model"]


def test_weights_of_gpt2_become_a_checkpoint(convert, theirs, gpt2_folder):
    output = convert(f"--from_hugging_face={gpt2_folder}")
    state = load_checkpoint(Path("out/checkpoint.pt"), ["model_args"])

    assert state["model_args"] == {**SIZES, "bias": True}
    assert not state["model"]["token_embeddings.weight"][50257:].any()
    assert_same_text(read_model(), theirs)
    assert "with biases" in output
    assert f"python {ROOT / 'fine-tune.py'} --base_model_path=out/checkpoint.pt\n" in output


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A fine-tuned model in a folder, of which only the tokenizer is of interest."""
    folder = tmp_path_factory.mktemp("exported")
    path = folder / "checkpoint.pt"
    write_adapter(folder / "lora.pt", write_checkpoint(path))
    argv = [f"--checkpoint_path={path}", f"--lora_path={folder / 'lora.pt'}"]
    script = importlib.import_module("convert")
    assert script.main([f"--to_hugging_face={folder / 'model'}", *argv]) == 0

    return folder / "model"


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported)


def test_the_vocabulary_is_the_published_one(exported, monkeypatch):
    """tiktoken knows the checksum of OpenAI's file."""
    published = {}
    monkeypatch.setattr(
        openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **known: published.update(known)
    )
    openai_public.gpt2()
    vocabulary = json.loads((exported / "tokenizer.json").read_text())["model"]["vocab"]
    content = json.dumps(vocabulary).encode()

    assert hashlib.sha256(content).hexdigest() == published["encoder_json_hash"]


def documents() -> list[str]:
    """Documents of any Unicode: all characters, few, blanks, Latin; and long runs of one or two."""
    draw = random.Random(0)
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]
    blanks = [c for c in assigned if c.isspace()]
    few = [*"aZ é1²٣'.-\n\t\r", "'s", "'LL", "'ll", "'ve", "日本", "👩‍🚀", "e\u0301", *blanks]
    pools = (assigned, few, blanks + ["x", "'"], [chr(c) for c in range(0x180)])

    mixed = ["".join(draw.choices(pools[n % 4], k=draw.randrange(120))) for n in range(1000)]
    # Where the order of merges shows.
    runs = [pair * n for pair in ("a", "=", "-", "\n", "ab", "Aa") for n in range(1, 100)]

    return mixed + runs


def test_tokens_are_tiktokens_on_any_document(tokenizer, exported):
    texts = documents()
    found = tokenizer(texts)["input_ids"]
    # Versions of transformers before 5 take all from this file.
    pipeline = Tokenizer.from_file(str(exported / "tokenizer.json"))

    assert found == GPT2_TOKENIZER.tiktoken.encode_ordinary_batch(texts)
    assert found == [encoding.ids for encoding in pipeline.encode_batch(texts)]
    assert tokenizer.batch_decode(found) == pipeline.decode_batch(found) == texts


def test_tokens_are_tiktokens_for_every_character(tokenizer):
    """Between a letter, a digit and a sign, it shows of which kind a character is taken to be."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    known = [c for c in characters if unicodedata.category(c) not in ("Co", "Cn")]
    other = random.Random(0).sample(sorted(set(characters) - set(known)), 2000)
    texts = [f"a{c} {c}1" for c in known + other]
    texts = ["\n\n".join(texts[first : first + 500]) for first in range(0, len(texts), 500)]

    assert tokenizer(texts)["input_ids"] == GPT2_TOKENIZER.tiktoken.encode_ordinary_batch(texts)


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_the_vocabulary_of_a_folder_has_to_be_this_one(convert, refused, source, tokenizer, files):
    if files == "tokenizer.json":
        padded = AutoTokenizer.from_pretrained(tokenizer.name_or_path, pad_token="[PAD]")
        assert len(padded) == 50258
        padded.save_pretrained(source)
        # Of a model on the Hub it is not fetched.
        (source / "tokenizer_config.json").unlink()
    else:
        tokenizer.backend_tokenizer.model.save(str(source))

    convert("--from_hugging_face=source")

    path = source / files.split()[0]
    content = json.loads(path.read_text())
    vocabulary = content
    if files == "tokenizer.json":
        vocabulary = content["model"]["vocab"]
        # No order of tokens gives these merges.
        content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])

    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))

    line = refused("--from_hugging_face=source", "--checkpoint_path=out/other.pt")
    assert "source holds another vocabulary than GPT-2's, r50k_base, or one" in line


def test_end_of_text_is_special_and_added_nowhere(tokenizer):
    assert tokenizer("a<|endoftext|>")["input_ids"] == [64, END_OF_TEXT]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == END_OF_TEXT
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == 50257


def test_texts_are_padded_without_a_token_more(tokenizer):
    batch = tokenizer(["a", "a a"], padding=True)

    assert batch["input_ids"] == [[64, END_OF_TEXT], [64, 257]]
    assert batch["attention_mask"] == [[1, 0], [1, 1]]
    assert len(tokenizer) == 50257


TEXT = st.text(st.sampled_from('a {}\n"\\%#'), max_size=6)


PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2)


ROLE = st.sampled_from(["system", "developer", "user", "User", "assistant", "ASSISTANT"])


MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT | st.none() | PARTS})


LAST = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@settings(max_examples=100, deadline=None)
@given(st.lists(MESSAGE, max_size=8))
def test_the_chat_template_is_ours(tokenizer, messages):
    """Any order of roles, written in any way, with content as text or in parts."""
    messages = [*messages, *LAST]
    turns = turns_of({"messages": messages})
    expected = "".join(f"{turn.prompt}{turn.answer}<|endoftext|>" for turn in turns)

    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected

    last = turns[-1]
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

    with pytest.raises(Exception, match="a part of a message has the type image"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], tokenize=False
        )


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
        ({"n_layer": "two"}, "Field 'n_layer' expected int, got str"),
        ({"n_head": True}, "Field 'n_head' expected int, got bool"),
        ({"n_head": 3}, "`embed_dim` must be divisible by num_heads"),
        ({"n_positions": 64}, "wpe.weight has the shape (128, 16), (64, 16) is needed"),
        ({"n_layer": 1}, "h.1.attn.c_attn.weight has no place here, and 10 more"),
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


def test_nothing_that_a_folder_says_is_run_or_fetched(convert, source, theirs):
    edited(
        source / "config.json",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        attn_implementation="someone/kernel",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
    )

    for name in ("code.py", "custom_generate/generate.py"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("open('run', 'w')\ndef generate(model):\n    pass\n")

    convert("--from_hugging_face=source")
    assert_same_logits(read_model(), theirs)
    assert not Path("run").exists()


NORM = "transformer.h.1.ln_1.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop(NORM) is None, "h.1.ln_1.weight is missing."),
        (lambda w: w.update(score=w[NORM]), "the weight score has no place here."),
        (
            lambda w: w.update({NORM: torch.ones(15)}),
            "ln_1.weight has the shape (15,), (16,) is",
        ),
        (
            lambda w: w.update({NORM: torch.ones(())}),
            "ln_1.weight has the shape (), (16,) is",
        ),
        (
            lambda w: w[NORM].fill_(torch.nan) is None,
            "attention_norm.weight holds values that are not",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}),
            "lm_head.weight is not the weight of the token embeddings",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(3)}),
            # The rest of the line is the library's.
            "error: source",
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
        (
            lambda s: (s / "model.safetensors").unlink(),
            "no file named model.safetensors, or",
        ),
        (lambda s: cut(s / "model.safetensors"), "cannot be read: Error while deserial"),
        (lambda s: (s / "config.json").unlink(), "config.json is missing"),
        (lambda s: cut(s / "config.json", 20), "config.json' is not a valid JSON"),
        (lambda s: (s / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda s: (s / "config.json").write_bytes(b"\xff"), "config.json' is not a valid JSON"),
        (index, "there is no 'weight_map'"),
        (lambda s: index(s, metadata={}, weight_map={"a": "a.safetensors"}), "a.safetensors"),
        (lambda s: pickled(s, {"a": Dangerous()}), "source holds other things than weights"),
        (lambda s: pickled(s, {"a": 1}), "the weight a has no place here, and 29 more"),
        (lambda s: pickled(s, [torch.ones(1)]), "source cannot be read: "),
        (
            lambda s: (s / "adapter_config.json").touch(),
            "source holds an adapter; --from_peft",
        ),
        (lambda s: (s / "vocab.json").write_text("{}"), "cannot be read for its vocabulary"),
        (lambda s: (s / "tokenizer.json").write_text("{}"), "cannot be read for its vocabulary"),
    ],
)
def test_damaged_folders_are_refused(refused, source, damage, expected):
    damage(source)

    assert expected in refused("--from_hugging_face=source")
    assert not Path("run").exists()
