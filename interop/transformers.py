"""Models in transformers' format: its GPT-2 is GPT with biases, and it reads and writes its files.

Its linear layers keep their weights transposed, (in, out).
"""

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2PreTrainedModel,
    GPT2Tokenizer,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from interop.outputs import ConversionError
from model import GPT
from text.errors import DataError
from text.instructions import GREETING, INTRODUCTION, TURN
from text.tokenizer import Tokenizer, format_ranks, gpt2_tokenizer
from text.vocabulary import byte_characters
from training.checkpoint import FORMAT_VERSION, vocabulary_state

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ConversionError(
        f"transformers {transformers.__version__} is too old: pip install 'transformers>=5,<6'."
    )

# Parts of names, to be replaced in this order.
NAMES = {
    "blocks.": "transformer.h.",
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.hidden": "mlp.c_fc",
    "mlp.output": "mlp.c_proj",
    "token_embeddings": "transformer.wte",
    "position_embeddings": "transformer.wpe",
    "norm.": "transformer.ln_f.",
}
EMBEDDINGS, OUTPUT = "transformer.wte.weight", "lm_head.weight"
# Causal masks, which old versions of transformers saved with the weights.
MASKS = r"(^|\.)attn\.(masked_)?bias$"

SIZES = {
    "block_size": "n_positions",
    "embedding_dimensions": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Other values of these settings make another function of the same weights.
ARCHITECTURE = (
    "vocab_size",
    "activation_function",
    "n_inner",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "tie_word_embeddings",
)

CONFIG_FILE = "config.json"
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
# The first kind that is there is read.
WEIGHT_FILES = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
)
SPECIAL_TOKEN = "<|endoftext|>"

# A card, to be filled in, and a conversation in Jinja.
CARD = Path(__file__).with_name("card.md")
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PLAIN = "It continues a text."
TUNED = (
    "It was fine-tuned on instructions: `tokenizer.apply_chat_template` puts a conversation into"
    " the form that it knows."
)


def export_model(model: GPT, tokenizer: Tokenizer, folder: Path, introduction: str | None) -> None:
    """Write a model, its tokenizer and a card into a folder, and read the weights back.

    Args:
        introduction: what its prompts begin with, empty for the template's own; None for a model
            that was not fine-tuned, which gets no template.

    Raises:
        ConversionError: when it cannot be written.
    """
    config = new_config(model)
    theirs = skeleton(config)
    weights = export_weights(model, theirs)
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.generation_config = GenerationConfig(
        **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], tokenizer.end_of_text)
    )
    their_tokenizer = new_tokenizer(tokenizer, model.block_size)
    is_tuned = introduction is not None
    their_tokenizer.chat_template = None if introduction is None else chat_template(introduction)
    card = CARD.read_text("utf-8").format(
        purpose=TUNED if is_tuned else PLAIN, parameters=theirs.num_parameters(), config=config
    )
    with convert_errors(folder, "written"):
        theirs.save_pretrained(folder)
        their_tokenizer.save_pretrained(folder)

    (folder / "README.md").write_text(card, "utf-8")
    check_written(weights, load(folder, config).state_dict(), folder)


def check_written(weights: dict[str, Tensor], found: dict[str, Tensor], folder: Path) -> None:
    """Raise ConversionError unless what was read back is what was written."""
    if found.keys() != weights.keys() or any(
        not torch.equal(found[name], weight) for name, weight in weights.items()
    ):
        raise ConversionError(f"{folder} is not what was written to it; look after the disk.")


def new_config(model: GPT) -> GPT2Config:
    return GPT2Config(
        vocab_size=model.vocabulary_size,
        # The library's own default is GPT-2's, whatever the size.
        **dict.fromkeys(["bos_token_id", "eos_token_id"], model.vocabulary_size - 1),
        n_positions=model.block_size,
        # Its name in older versions, which llama.cpp reads.
        n_ctx=model.block_size,
        n_embd=model.token_embeddings.embedding_dim,
        n_head=model.blocks[0].attention.num_attention_heads,
        n_layer=len(model.blocks),
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0),
    )


def skeleton(
    config: GPT2Config, kind: type[GPT2PreTrainedModel] = GPT2LMHeadModel
) -> GPT2PreTrainedModel:
    """Return a model whose weights are not set, and take no memory until they are."""
    with torch.device("meta"):
        model = kind(config)

    return model.to_empty(device="cpu")


def their_name(name: str) -> str:
    """Return what transformers calls a weight or a layer of ours."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)

    return name


def is_transposed(name: str, weight: Tensor) -> bool:
    return name.startswith("blocks.") and weight.ndim == 2


def export_weights(model: GPT, theirs: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Return the weights of a model as transformers keeps them; biases it has not are zero."""
    weights = {
        their_name(name): weight.T if is_transposed(name, weight) else weight
        for name, weight in model.state_dict().items()
    }
    # Without the rows that fill up.
    weights[EMBEDDINGS] = weights[OUTPUT] = weights[EMBEDDINGS][: model.vocabulary_size]
    return {
        name: weights[name].float().contiguous() if name in weights else torch.zeros(weight.shape)
        for name, weight in theirs.state_dict().items()
    }


def needed_files(names: list[str]) -> list[str]:
    """Choose, of the files of a model on the Hub, those that are read here.

    Raises:
        ConversionError: when there is no model.
    """
    kinds = ([name for name in names if re.fullmatch(kind, name)] for kind in WEIGHT_FILES)
    weights = next(filter(None, kinds), None)
    if CONFIG_FILE not in names or not weights:
        missing = "model.safetensors or pytorch_model.bin" if CONFIG_FILE in names else CONFIG_FILE
        raise ConversionError(f"there is no {missing}")

    return [CONFIG_FILE, *(name for name in VOCABULARY_FILES if name in names), *weights]


def import_model(folder: Path) -> dict:
    """Return the model in a folder as a checkpoint; biases that are all zero are left out.

    Raises:
        ConversionError: when it cannot be read, or is not exactly a GPT-2.
    """
    tokenizer = read_vocabulary(folder)
    config = read_config(folder, tokenizer.vocabulary_size)
    theirs = load(folder, config).state_dict()
    if not torch.equal(theirs[OUTPUT], theirs[EMBEDDINGS]):
        raise ConversionError(
            f"{folder}: {OUTPUT} is not the weight of the token embeddings, {EMBEDDINGS}."
        )

    model_args = {
        "vocabulary_size": config.vocab_size,
        **{ours: getattr(config, name) for ours, name in SIZES.items()},
        "bias": True,
    }
    with torch.device("meta"):
        shapes = GPT(**model_args).state_dict()

    weights = {name: theirs[their_name(name)] for name in shapes}
    biases = [name for name in weights if name.endswith(".bias")]
    if not any(weights[name].any() for name in biases):
        model_args["bias"] = False
        weights = {name: weight for name, weight in weights.items() if name not in biases}

    for name, weight in weights.items():
        weight = weight.T if is_transposed(name, weight) else weight
        # The rows that fill up the vocabulary.
        num_rows = len(shapes[name]) - len(weight)
        weights[name] = F.pad(weight, (0, 0, 0, num_rows)) if num_rows else weight.contiguous()

    return {
        "format_version": FORMAT_VERSION,
        **vocabulary_state(tokenizer),
        "model_args": model_args,
        "model": weights,
    }


def read_config(folder: Path, vocabulary_size: int) -> GPT2Config:
    """Return a new configuration with the sizes of one in a folder.

    Nothing else in that file, such as code to fetch, reaches the library.

    Raises:
        ConversionError: when it is not the architecture that GPT has.
    """
    path = folder / CONFIG_FILE

    # Elsewhere the library would look for it on the Hub.
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")

    with convert_errors(path):
        content, _ = GPT2Config.get_config_dict(folder, local_files_only=True)
        theirs = GPT2Config.from_dict(content)

    if (kind := content.get("model_type")) != "gpt2":
        raise ConversionError(f"{path}: model_type is {kind}, gpt2 is needed.")

    sizes = {name: getattr(theirs, name) for name in SIZES.values()}
    config = GPT2Config(vocab_size=vocabulary_size, **sizes)
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * config.n_embd}
    for name in ARCHITECTURE:
        value, wanted = getattr(theirs, name), getattr(config, name)
        if value not in (wanted, same.get(name, wanted)):
            raise ConversionError(f"{path}: {name} is {value}, {wanted} is needed.")

    return config


def read_vocabulary(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model in a folder; without files it is GPT-2's.

    Raises:
        ConversionError: when its vocabulary is neither GPT-2's nor one that this project wrote.
    """
    gpt2 = gpt2_tokenizer()
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return gpt2

    with convert_errors(folder, "read for its vocabulary"):
        vocabulary = GPT2Tokenizer.from_pretrained(folder, local_files_only=True).get_vocab()

    # A token that was added behind these has no row of the embeddings.
    known = {token: id for token, id in vocabulary.items() if id < gpt2.vocabulary_size}
    if known == new_tokenizer(gpt2, block_size=1).get_vocab():
        return gpt2

    with contextlib.suppress(DataError, KeyError, OSError, ValueError):
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        alphabet = byte_characters()
        tokens = {
            b"".join(map(alphabet.__getitem__, token)): id
            for token, id in content["model"]["vocab"].items()
            if token != SPECIAL_TOKEN
        }
        own = Tokenizer(format_ranks(tokens))
        # What it does with text has to be the same in all else, too.
        wanted = json.loads(new_tokenizer(own, block_size=1).backend_tokenizer.to_str())
        if all(content[key] == wanted[key] for key in ("model", "pre_tokenizer", "normalizer")):
            return own

    raise ConversionError(
        f"{folder} holds another vocabulary than GPT-2's, r50k_base, or one of this project."
    )


def load(folder: Path, config: GPT2Config) -> GPT2LMHeadModel:
    """Read a model in float32, onto the CPU; nothing that its files say is run.

    Raises:
        ConversionError: when a weight is missing, unknown or of another shape.
    """
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder} holds an adapter; --from_peft reads it.")

    with convert_errors(folder):
        model, report = GPT2LMHeadModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            weights_only=True,
            trust_remote_code=False,
            # Reported below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    problems = {f"{name} is missing" for name in report["missing_keys"]}
    others = (name for name in report["unexpected_keys"] if not re.search(MASKS, name))
    problems |= {f"{name} has no place here" for name in others}
    problems |= {
        f"{name} has the shape {tuple(found)}, {tuple(wanted)} is needed"
        for name, found, wanted in report["mismatched_keys"]
    }
    report_problems(problems, folder)
    return model


def report_problems(problems: set[str], folder: Path) -> None:
    """Raise ConversionError with the first of several problems, if there are any."""
    if problems:
        others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConversionError(f"{folder}: the weight {min(problems)}{others}.")


@contextlib.contextmanager
def convert_errors(path: Path, action: str = "read") -> Iterator[None]:
    """Silence the libraries, and put what they raise into one line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:  # which advises what is unsafe
        raise ConversionError(f"{path} holds other things than weights.") from error
    except Exception as error:  # they raise dozens of types
        if isinstance(error, OSError) and error.strerror:
            raise

        text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        text = " ".join(text.split())[:300].rstrip(".")
        raise ConversionError(f"{path} cannot be {action}: {text}.") from error


def new_tokenizer(tokenizer: Tokenizer, block_size: int) -> GPT2Tokenizer:
    """Return transformers' tokenizer with the ids of a tokenizer of ours.

    A literal <|endoftext|> in a text is the special token there, as its users expect.
    """
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: tokenizer.tokens
    vocabulary, merges = converter.extract_vocab_merges_from_model("")
    return GPT2Tokenizer(
        vocab={**vocabulary, SPECIAL_TOKEN: tokenizer.end_of_text},
        merges=merges,
        model_max_length=block_size,
        pad_token=SPECIAL_TOKEN,
    )


def chat_template(introduction: str) -> str:
    """Return the template of a conversation in Jinja, as text.instructions.turns_of has it.

    Args:
        introduction: what prompts begin with; empty for the template's own.
    """
    question, answer = TURN.split("{instruction}")
    texts = {
        "default_introduction": introduction or INTRODUCTION,
        "before_greeting": GREETING.removesuffix("{greeting}"),
        "before_question": question,
        "before_answer": answer,
    }
    # Jinja reads no pairs of surrogates.
    lines = [
        f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n"
        for name, text in texts.items()
    ]
    return "".join(lines) + TEMPLATE.read_text("utf-8")
