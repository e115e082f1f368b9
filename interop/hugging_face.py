"""What a model and an adapter are called and how they are kept by Hugging Face's libraries.

transformers' GPT-2 is GPT with biases. Its linear layers keep their weights transposed, (in, out).
peft keeps an adapter's A and B as they are here, (R, in) and (out, R), and divides its own alpha by
the rank R.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, check_sizes
from text.instructions import LATER_TURN, WITHOUT_INPUT
from text.tokenizer import END_OF_TEXT, VOCABULARY_SIZE, load_encoding
from training.lora import lora_shapes

OUTSIDE_NAMES = {"token_embeddings": "wte", "position_embeddings": "wpe", "norm": "ln_f"}
BLOCK_NAMES = {
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.hidden": "mlp.c_fc",
    "mlp.output": "mlp.c_proj",
}
LINEAR_NAMES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# Causal masks, which old versions of transformers saved with the weights.
BUFFERS = r"h\.\d+\.attn\.(masked_)?bias"

# What the network here is: other values would be another function of the same weights.
ARCHITECTURE = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY_SIZE,
    "activation_function": "gelu_new",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
SIZES = {
    "block_size": "n_positions",
    "embedding_dimensions": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

CONFIG_FILE = "config.json"
# In this order: the first that is there is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARDS = r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)"
VOCABULARY_FILES = ("vocab.json", "tokenizer.json")
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Of peft's settings, those that are read here, and those that change nothing in a trained adapter.
# A setting that is not among them, of a later version perhaps, has to be off.
READ_SETTINGS = {
    "alpha_pattern",
    "exclude_modules",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
IDLE_SETTINGS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
IDLE_VALUES = (None, False, "none", "", {}, [])
# Other ways to begin change the weights of the base, too.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

SPECIAL_TOKEN = "<|endoftext|>"


class ConversionError(Exception):
    """What cannot be taken over; the message is one line for the user."""


def their_name(name: str) -> str:
    """Return what transformers calls a weight or a layer, without `transformer.` in front."""
    block = re.match(r"blocks\.(\d+)\.", name)
    names = BLOCK_NAMES if block else OUTSIDE_NAMES
    inner = name[block.end() :] if block else name
    # No two names begin alike up to a dot.
    ours = next(ours for ours in names if f"{inner}.".startswith(f"{ours}."))
    theirs = names[ours] + inner.removeprefix(ours)

    return f"h.{block[1]}.{theirs}" if block else theirs


def is_transposed(name: str, shape: Iterable[int]) -> bool:
    """Tell whether transformers keeps a weight of ours, with this shape, transposed."""
    return name.startswith("blocks.") and len(tuple(shape)) == 2


def shapes_with_biases(model_args: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights of a model, without rows that fill up, by our names."""
    with torch.device("meta"):
        model = GPT(**{**model_args, "bias": True})

    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    shapes["token_embeddings.weight"] = (model.vocabulary_size, model_args["embedding_dimensions"])

    return shapes


def export_weights(state: dict[str, Tensor], model_args: dict) -> dict[str, Tensor]:
    """Return the weights of a model as transformers keeps them; biases it has not are zero."""
    weights = {}

    for name, shape in shapes_with_biases(model_args).items():
        weight = state[name] if name in state else torch.zeros(shape)
        weight = weight[: shape[0]]
        weight = weight.T if is_transposed(name, shape) else weight
        # A copy, for a part of a larger tensor would be written with all of it.
        weights[f"transformer.{their_name(name)}"] = weight.to(
            torch.float32, copy=True, memory_format=torch.contiguous_format
        )

    return weights


def export_config(model_args: dict) -> dict:
    """Return the contents of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **ARCHITECTURE,
        **{theirs: model_args[ours] for ours, theirs in SIZES.items()},
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0),
        "initializer_range": 0.02,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "use_cache": True,
        "torch_dtype": "float32",
    }


def export_generation_config() -> dict:
    return dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], END_OF_TEXT)


def import_config(config: dict, path: Path) -> dict:
    """Return the sizes of a model by the names of GPT's arguments.

    Args:
        config: the contents of config.json, at path.

    Raises:
        ConversionError: when it is not the architecture that GPT has.
    """
    if config.get("model_type") != "gpt2":
        raise ConversionError(f"{path}: model_type is {config.get('model_type')}, gpt2 is needed.")

    sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}

    for ours, theirs in SIZES.items():
        if type(sizes[ours]) is not int or sizes[ours] < 1:
            raise ConversionError(f"{path}: {theirs} is {sizes[ours]}, which is no size.")

    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * config["n_embd"]}

    for name, wanted in ARCHITECTURE.items():
        value = config.get(name, wanted)

        if value not in (wanted, same.get(name, wanted)):
            raise ConversionError(f"{path}: {name} is {value}, {wanted} is needed.")

    try:
        check_sizes(sizes["embedding_dimensions"], sizes["num_attention_heads"])
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None

    return {"vocabulary_size": VOCABULARY_SIZE, **sizes}


def import_weights(
    weights: dict[str, Tensor], sizes: dict, path: Path
) -> tuple[dict, dict[str, Tensor]]:
    """Return the arguments of a model and its weights by our names.

    A model whose biases are all zero becomes one without any.

    Args:
        weights: by the names of transformers, of any floating-point format.
        sizes: as import_config gives them.
        path: where they are from, for messages.

    Raises:
        ConversionError: when they are not exactly those of such a model.
    """
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    weights = {name: w for name, w in weights.items() if not re.fullmatch(BUFFERS, name)}
    output = weights.pop("lm_head.weight", None)
    shapes = shapes_with_biases(sizes)
    check_names(weights, map(their_name, shapes), path)
    state = {}

    for name, shape in shapes.items():
        theirs = their_name(name)
        weight = checked(weights[theirs], theirs, path)
        weight = weight.T if is_transposed(name, shape) and weight.ndim == 2 else weight
        check_shape(weight, shape, theirs, path)
        state[name] = weight.contiguous()

    embeddings = state["token_embeddings.weight"]

    if output is not None and not torch.equal(output.to(embeddings), embeddings):
        raise ConversionError(
            f"{path}: lm_head.weight is not the weight of the token embeddings, wte.weight."
        )

    biases = [name for name in state if name.endswith(".bias")]
    has_biases = any(state[name].any() for name in biases)

    if not has_biases:
        state = {name: weight for name, weight in state.items() if name not in biases}

    model_args = {**sizes, "bias": has_biases}

    with torch.device("meta"):
        num_rows = GPT(**model_args).token_embeddings.num_embeddings

    rows = embeddings.new_zeros(num_rows - len(embeddings), embeddings.size(1))
    state["token_embeddings.weight"] = torch.cat([embeddings, rows])

    return model_args, state


def check_names(found: Iterable[str], wanted: Iterable[str], path: Path) -> None:
    found, wanted = set(found), set(wanted)

    for names, what in ((wanted - found, "is missing"), (found - wanted, "has no place here")):
        if names:
            others = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConversionError(f"{path}: the weight {min(names)} {what}{others}.")


def checked(weight: Tensor, name: str, path: Path) -> Tensor:
    """Return a weight in float32, if it is numbers and nothing else."""
    if not weight.is_floating_point():
        raise ConversionError(
            f"{path}: {name} has the format {weight.dtype}, which is no weight's."
        )

    weight = weight.float()

    if not weight.isfinite().all():
        raise ConversionError(f"{path}: {name} holds values that are not finite numbers.")

    return weight


def check_shape(weight: Tensor, shape: tuple[int, ...], name: str, path: Path) -> None:
    if tuple(weight.shape) != shape:
        found = " x ".join(map(str, weight.shape)) or 1

        raise ConversionError(
            f"{path}: {name} has {found} values where the others, and the configuration, make"
            f" {' x '.join(map(str, shape))}."
        )


def needed_files(names: Iterable[str]) -> list[str]:
    """Choose, of the files of a model, those that are read here.

    Raises:
        ConversionError: when there are no weights, or it is not said of which network.
    """
    names = set(names)
    weights = next((name for name in WEIGHT_FILES if name in names), None)

    if CONFIG_FILE not in names or not weights:
        missing = CONFIG_FILE if CONFIG_FILE not in names else " or ".join(WEIGHT_FILES[::2])
        raise ConversionError(f"there is no {missing}")

    shards = [name for name in sorted(names) if re.fullmatch(SHARDS, name)]
    kind = weights.removesuffix(".index.json").rpartition(".")[2]
    parts = [name for name in shards if name.endswith(kind)] if "index" in weights else []

    return [CONFIG_FILE, *(n for n in VOCABULARY_FILES if n in names), weights, *parts]


def read_weights(folder: Path, files: Iterable[str]) -> tuple[Path, dict[str, Tensor]]:
    """Read the first of files that is there; an index names others, which are read together.

    Returns:
        The path of that file, and the weights.

    Raises:
        ConversionError: when there is none, or one that cannot be read.
    """
    path = next((folder / name for name in files if (folder / name).is_file()), None)

    if path is None:
        raise ConversionError(f"{folder} holds no weights: there is no {' or '.join(files)}.")

    if path.suffix != ".json":
        return path, load_file(path)

    places = read_json(path).get("weight_map")

    if not isinstance(places, dict) or not all(map(is_file_name, places.values())):
        raise ConversionError(f"{path} is damaged: it does not say which file holds which weight.")

    weights = {}

    for name in sorted(set(places.values())):
        weights |= load_file(folder / name)

    return path, weights


def is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", "..") and Path(name).name == name


def load_file(path: Path) -> dict[str, Tensor]:
    """Read named tensors, onto the CPU; nothing that a file says is run."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")

    try:
        if path.suffix == ".safetensors":
            return safetensors_package().load_file(path)

        weights = torch.load(path, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    except Exception as error:  # both loaders raise dozens of types, and advise what is unsafe
        raise ConversionError(f"{path} is damaged, or holds other things than weights.") from error

    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ConversionError(f"{path} holds other things than weights.")

    return weights


def safetensors_package():
    """Return the part of safetensors for PyTorch."""
    try:
        import safetensors.torch
    except ImportError:
        raise ConversionError(
            "The package safetensors is missing: pip install safetensors"
        ) from None

    return safetensors.torch


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is damaged: it is no JSON.") from error

    if not isinstance(content, dict):
        raise ConversionError(f"{path} is damaged: it holds no names.")

    return content


@functools.cache
def byte_characters() -> list[str]:
    """Return the printable characters by which GPT-2's files write the 256 bytes.

    A byte that is a printable character of Latin-1 is that one; others, in their order, are the
    characters from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), 256)} - {0xAD}
    others = (chr(256 + number) for number in range(256))

    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def spelled(token: bytes) -> str:
    characters = byte_characters()

    return "".join(characters[byte] for byte in token)


def ordered_ranks() -> list[tuple[bytes, int]]:
    encoding = load_encoding()

    return [(encoding.decode_single_token_bytes(rank), rank) for rank in range(END_OF_TEXT)]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Return the ids of all tokens, as vocab.json spells them."""
    return {**{spelled(token): rank for token, rank in ordered_ranks()}, SPECIAL_TOKEN: END_OF_TEXT}


@functools.cache
def merges() -> list[str]:
    """Return the two parts of every token of several bytes, in the order of merging.

    Ranks tell the order of merges but not their parts. What the merges before it make of a token's
    bytes is its two parts.
    """
    ranks = dict(ordered_ranks())
    pairs = (merge_below(rank, token, ranks) for token, rank in ranks.items() if len(token) > 1)

    return [" ".join(map(spelled, pair)) for pair in pairs]


def merge_below(limit: int, token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge bytes by the ranks below a limit, the lowest first (Sennrich et al. 2016)."""
    parts = [bytes([byte]) for byte in token]

    while True:
        pairs = [first + second for first, second in zip(parts, parts[1:], strict=False)]
        rank, place = min(
            ((ranks.get(pair, limit), place) for place, pair in enumerate(pairs)),
            default=(limit, 0),
        )

        if rank >= limit:
            return parts

        parts[place : place + 2] = [pairs[place]]


def tokenizer_files(block_size: int, has_template: bool) -> dict[str, str]:
    """Return the contents of the files of the tokenizer by their names.

    The ids are those of tokenizer.encode, but for a literal <|endoftext|> in a text: with
    transformers that is the special token, as its users expect.

    Args:
        has_template: whether the model was shown instructions, and is to be asked like that.
    """
    ids, pairs = vocabulary(), merges()
    marks = dict.fromkeys(["bos_token", "eos_token", "unk_token"], SPECIAL_TOKEN)
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **marks,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }

    if has_template:
        config["chat_template"] = chat_template()

    return {
        "vocab.json": json.dumps(ids),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]),
        "tokenizer.json": json.dumps(tokenizer_pipeline(ids, pairs), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(marks, indent=2),
    }


def tokenizer_pipeline(ids: dict[str, int], pairs: list[str]) -> dict:
    """Return the contents of tokenizer.json, which the package tokenizers reads."""
    # Its own pattern for bytes cuts where tiktoken's does, for every character of Unicode.
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_OF_TEXT,
                "content": SPECIAL_TOKEN,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": {**by_bytes, "trim_offsets": False},
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": pairs,
        },
    }


def chat_template() -> str:
    """Return the template of a conversation in Jinja, as instructions.turns_of has it.

    A question that has no answer yet stands at the end, behind it the heading of the answer if one
    is to be generated.
    """
    opening, closing = WITHOUT_INPUT.split("{instruction}")
    later, _ = LATER_TURN.split("{instruction}")
    texts = {"opening": opening, "closing": closing, "later": later}
    texts_set = "".join(
        f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in texts.items()
    )

    return texts_set + (
        "{%- macro prompt(question, introduction, number) -%}"
        "{%- if number -%}{{- later -}}"
        "{%- elif introduction -%}{{- introduction + later -}}"
        "{%- else -%}{{- opening -}}{%- endif -%}"
        "{{- question -}}"
        "{%- endmacro -%}"
        "{%- set now = namespace(introduction='', question=none, number=0) -%}"
        "{%- for message in messages -%}"
        "{%- set content = message['content'] or '' -%}"
        "{%- if message['role'] == 'system' -%}"
        "{%- set now.introduction = content -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- set now.question = content if now.question is none"
        " else now.question + '\\n\\n' + content -%}"
        "{%- elif message['role'] == 'assistant' and now.question is not none -%}"
        "{{- prompt(now.question, now.introduction, now.number) + closing -}}"
        "{{- content + eos_token -}}"
        "{%- set now.question = none -%}"
        "{%- set now.number = now.number + 1 -%}"
        "{%- else -%}"
        "{{- raise_exception('a message has the role ' + message['role']) -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if now.question is not none -%}"
        "{{- prompt(now.question, now.introduction, now.number) -}}"
        "{%- if add_generation_prompt -%}{{- closing -}}{%- endif -%}"
        "{%- endif -%}"
    )


def check_vocabulary(folder: Path) -> None:
    """Raise ConversionError when a folder holds another vocabulary than r50k_base."""
    for name in VOCABULARY_FILES:
        path = folder / name

        if not path.is_file():
            continue

        content = read_json(path)

        if name == "tokenizer.json":
            model = content.get("model")
            content = model.get("vocab") if isinstance(model, dict) else None

        # Some have the special token among those that they add.
        if not isinstance(content, dict) or {SPECIAL_TOKEN: END_OF_TEXT, **content} != vocabulary():
            raise ConversionError(f"{path} holds another vocabulary than GPT-2's, r50k_base.")


def export_adapter(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's weights as peft keeps them."""
    return {adapter_name(name, "transformer."): weight.float() for name, weight in lora.items()}


def adapter_name(name: str, prefix: str) -> str:
    """Return what peft calls a weight of an adapter, whose name here ends with lora_a or lora_b."""
    layer, _, kind = name.rpartition(".")

    return f"base_model.model.{prefix}{their_name(layer)}.lora_{kind[-1].upper()}.weight"


def export_adapter_config(rank: int, alpha: float) -> dict:
    """Return the contents of adapter_config.json."""
    scaled = rank * alpha

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(scaled) if scaled == int(scaled) else scaled,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": list(LINEAR_NAMES),
        "inference_mode": True,
    }


def import_adapter(
    config: dict, weights: dict[str, Tensor], model: GPT, path: Path
) -> tuple[dict, dict[str, Tensor]]:
    """Return lora_args and the weights of an adapter by our names.

    Layers without an adapter get one that is zero, and lower ranks are filled up with zeros. Where
    layers have several factors, alpha is 1 and each factor is taken into its B.

    Args:
        config: the contents of adapter_config.json, as check_adapter_config lets it pass.
        model: the base.
        path: where the weights are from, for messages.

    Raises:
        ConversionError: when they are not exactly those of the layers that config names.
    """
    is_whole = any(name.startswith("base_model.model.transformer.") for name in weights)
    prefix = "transformer." if is_whole else ""
    layers = [name.removesuffix(".lora_a") for name in lora_shapes(model, 1) if name[-1] == "a"]
    adapted = [name for name in layers if is_adapted(config, prefix + their_name(name))]
    check_names(weights, (adapter_name(f"{n}.{k}", prefix) for n in adapted for k in "ab"), path)

    if not adapted:
        raise ConversionError(f"{path} adapts no layer of this model.")

    scales = {name: rank_and_scale(config, prefix + their_name(name)) for name in adapted}
    rank = max(rank for rank, _ in scales.values())
    factors = {scale for _, scale in scales.values()}
    alpha = factors.pop() if len(factors) == 1 else 1.0
    lora = {name: torch.zeros(shape) for name, shape in lora_shapes(model, rank).items()}

    for layer, (own_rank, scale) in scales.items():
        shapes = lora_shapes(model, own_rank)

        for kind, factor in (("lora_a", 1.0), ("lora_b", scale / alpha if alpha else 1.0)):
            name = f"{layer}.{kind}"
            theirs = adapter_name(name, prefix)
            weight = checked(weights[theirs], theirs, path)
            check_shape(weight, shapes[name], theirs, path)
            lora[name][: weight.size(0), : weight.size(1)] = factor * weight

    return {"rank": rank, "alpha": alpha}, lora


@contextlib.contextmanager
def reported_damage(path: Path) -> Iterator[None]:
    """Turn what comes of settings that are of other types into one line."""
    try:
        yield
    except (AttributeError, TypeError, re.error) as error:
        raise ConversionError(f"{path} is damaged: {error}.") from error


def check_adapter_config(config: dict, path: Path) -> None:
    """Raise ConversionError unless an adapter is B A times a factor, and nothing else."""
    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is {config.get('peft_type')}, LORA is needed.")

    if config.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        raise ConversionError(
            f"{path}: init_lora_weights is {config['init_lora_weights']}, which changes the base"
            " model, too."
        )

    for name, value in config.items():
        if name not in READ_SETTINGS | IDLE_SETTINGS and value not in IDLE_VALUES:
            raise ConversionError(f"{path}: {name} is {value}, which has no counterpart here.")

    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]

    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise ConversionError(
            f"{path}: r and rank_pattern are {ranks}, numbers above 0 are needed."
        )

    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise ConversionError(f"{path}: lora_alpha and alpha_pattern are {alphas}: no factors.")


def is_adapted(config: dict, key: str) -> bool:
    """Tell whether peft adapts the layer of GPT-2 with this name."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    places = config.get("layers_to_transform")

    if excluded and is_named(key, excluded):
        return False

    if targets is None:
        # What peft takes for GPT-2.
        targets = ["c_attn"]

    if isinstance(targets, str):
        return targets.lower() == "all-linear" or is_named(key, targets)

    is_place = places in (None, []) or int(re.search(r"h\.(\d+)\.", key)[1]) in (
        places if isinstance(places, list) else [places]
    )

    # What is named in full, peft adapts wherever it is.
    return key in targets or (is_named(key, targets) and is_place)


def is_named(key: str, targets: str | list[str]) -> bool:
    """Tell whether a layer is one of targets: a pattern of whole names, or the ends of names."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, key))

    return any(f".{key}".endswith(f".{target}") for target in targets)


def rank_and_scale(config: dict, key: str) -> tuple[int, float]:
    """Return the rank of a layer's adapter, and the factor of its output."""
    rank = value_of(config.get("rank_pattern"), key, config["r"])
    alpha = value_of(config.get("alpha_pattern"), key, config["lora_alpha"])

    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def value_of(pattern: dict | None, key: str, default: float) -> float:
    """Return the value of the first expression that matches the end of a layer's name."""
    values = (v for name, v in (pattern or {}).items() if re.match(rf"(.*\.)?({name})$", key))

    return next(values, default)
