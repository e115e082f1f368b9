"""Take models and adapters to Hugging Face's transformers and peft, and from there."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from training.arguments import Parser, fail

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# A language model of GPT-2's architecture

{purpose} What it says may be wrong.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

| | |
|---|---|
| Parameters | {parameters:,} |
| Layers | {num_hidden_layers} |
| Attention heads | {num_attention_heads} |
| Embedding dimensions | {embedding_dimensions} |
| Context | {block_size} tokens |
| Vocabulary | {vocabulary_size:,} tokens of GPT-2's encoding, r50k_base |
"""
# Of all files of an export.
SUFFIXES = {".json", ".txt", ".md", ".safetensors"}

PLAIN = "It continues a text."
TUNED = (
    "It was fine-tuned on instructions: `tokenizer.apply_chat_template` puts a conversation into"
    " the form that it knows."
)


def build_parser() -> Parser:
    parser = Parser(prog="convert.py", description=__doc__)

    add = parser.add_argument_group("what to do, one of these").add_argument
    add(
        "--to_hugging_face",
        metavar="DIR",
        help="Write the model, merged with its adapter if it has one, into a new folder that"
        " transformers loads.",
    )
    add(
        "--from_hugging_face",
        metavar="NAME_OR_DIR",
        help="Make a checkpoint of GPT-2 weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or another"
        " model on the Hugging Face Hub, or a folder.",
    )
    add(
        "--to_peft",
        metavar="DIR",
        help="Write the adapter into a new folder that peft loads.",
    )
    add(
        "--from_peft",
        metavar="DIR",
        help="Make a LoRA checkpoint of a peft adapter for the model.",
    )

    add = parser.add_argument_group("files").add_argument
    add(
        "--checkpoint_path",
        default="./out/checkpoint.pt",
        help="The path to the checkpoint file on disk; --from_hugging_face writes it.",
    )
    add(
        "--lora_path",
        default="./out/lora.pt",
        help="The path to the LoRA checkpoint; --from_peft writes it. To --to_hugging_face, without"
        " the flag it is merged if it is there and of this base; empty for none.",
    )

    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse(argv)
    given = args.given

    try:
        action = chosen_action(args, given)
    except ValueError as error:
        return fail(error, status=2)

    # Only now, so that a wrong flag is answered at once.
    from interop.hugging_face import ConversionError
    from text.errors import DataError
    from training.checkpoint import CheckpointError

    try:
        action(args, given)
    except (CheckpointError, ConversionError, DataError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130

    return 0


def chosen_action(args: Namespace, given: set[str]) -> Callable[[Namespace, set[str]], None]:
    """Return what is to be done.

    Raises:
        ValueError: when that is not one thing, or lacks a path.
    """
    actions = {
        "to_hugging_face": to_hugging_face,
        "from_hugging_face": from_hugging_face,
        "to_peft": to_peft,
        "from_peft": from_peft,
    }
    flags = [name for name in actions if name in given]

    if len(flags) != 1:
        raise ValueError(f"one of --{', --'.join(actions)} is needed, {len(flags)} given")

    if "lora_path" in given and flags == ["from_hugging_face"]:
        raise ValueError("--lora_path: --from_hugging_face has no adapter")

    needed = [flags[0], "checkpoint_path"] + ["lora_path"] * flags[0].endswith("peft")

    for name in needed:
        if not getattr(args, name):
            raise ValueError(f"--{name}: a path is needed, an empty one given")

    if flags == ["from_hugging_face"]:
        check_source(args.from_hugging_face)

    return actions[flags[0]]


def check_source(source: str) -> None:
    """Raise ValueError when a model is neither in a folder nor, by its name, on the Hub."""
    if not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise ValueError(f"--from_hugging_face: there is no folder {source}")


def to_hugging_face(args: Namespace, given: set[str]) -> None:
    from generate import add_adapter
    from interop import hugging_face
    from training.checkpoint import MODEL_KEYS, build_model, load_checkpoint

    hugging_face.safetensors_package()
    folder, path, lora_path = map(
        Path, (args.to_hugging_face, args.checkpoint_path, args.lora_path)
    )

    with new_folder(folder, "--to_hugging_face") as temporary:
        state = load_checkpoint(path, MODEL_KEYS)
        model = build_model(state, path)
        check_vocabulary_size(model, path)
        is_tuned = bool(args.lora_path) and add_adapter(model, lora_path, "lora_path" in given)
        print(
            f"Model:  {path}{f' with {lora_path}' * is_tuned}, {model.num_parameters:,} parameters"
        )

        model_args = state["model_args"]
        weights = hugging_face.export_weights(model.state_dict(), model_args)
        texts = {
            hugging_face.CONFIG_FILE: hugging_face.export_config(model_args),
            "generation_config.json": hugging_face.export_generation_config(),
            **hugging_face.tokenizer_files(model.block_size, has_template=is_tuned),
            "README.md": CARD.format(
                purpose=TUNED if is_tuned else PLAIN,
                parameters=sum(weight.numel() for weight in weights.values()),
                **model_args,
            ),
        }
        write_files(temporary, texts, hugging_face.WEIGHT_FILES[0], weights)

    print(f"Files:  {folder}: {hugging_face.WEIGHT_FILES[0]}, {', '.join(texts)}")
    print("Next:   from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print(f"        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})")


def from_hugging_face(args: Namespace, given: set[str]) -> None:
    from interop import hugging_face
    from text.tokenizer import ENCODING
    from training.checkpoint import FORMAT_VERSION, build_model

    source, path = args.from_hugging_face, Path(args.checkpoint_path)

    with new_checkpoint(path, "--checkpoint_path") as save:
        folder = find_model(source)
        config_path = folder / hugging_face.CONFIG_FILE
        sizes = hugging_face.import_config(hugging_face.read_json(config_path), config_path)
        hugging_face.check_vocabulary(folder)
        found, weights = hugging_face.read_weights(folder, hugging_face.WEIGHT_FILES)
        model_args, weights = hugging_face.import_weights(weights, sizes, found)
        state = {
            "format_version": FORMAT_VERSION,
            "encoding": ENCODING,
            "model_args": model_args,
            "model": weights,
        }
        model = build_model(state, path)
        biases = "with biases" if model_args["bias"] else "without biases"
        print(f"Model:  {source}, {model.num_parameters:,} parameters, {biases}")
        save(state)

    print(f"Files:  {path}")
    print(f"Next:   {command('generate.py', args, checkpoint_path='checkpoint_path')}")
    print(f"        {command('fine-tune.py', args, base_model_path='checkpoint_path')}")


def to_peft(args: Namespace, given: set[str]) -> None:
    from interop import hugging_face
    from training.checkpoint import load_checkpoint, load_model, merge_lora_checkpoint

    hugging_face.safetensors_package()
    folder, path, lora_path = map(Path, (args.to_peft, args.checkpoint_path, args.lora_path))

    with new_folder(folder, "--to_peft") as temporary:
        model = load_model(path)
        state = load_checkpoint(lora_path, ("lora_args", "lora", "base"))
        # What can be merged fits.
        merge_lora_checkpoint(model, state, lora_path)
        lora, alpha = state["lora"], state["lora_args"]["alpha"]
        rank = next(len(weight) for name, weight in lora.items() if name.endswith(".lora_a"))
        print(f"Model:  {lora_path} of {path}, rank {rank}, alpha {alpha}")

        config = hugging_face.export_adapter_config(rank, alpha)
        name, weights = hugging_face.ADAPTER_WEIGHT_FILES[0], hugging_face.export_adapter(lora)
        write_files(temporary, {hugging_face.ADAPTER_CONFIG_FILE: config}, name, weights)

    base = command("convert.py", args, checkpoint_path="checkpoint_path")
    print(f"Files:  {folder}: {name}, {hugging_face.ADAPTER_CONFIG_FILE}")
    print(f"Next:   {base} --to_hugging_face=base --lora_path=")
    print("        model = AutoModelForCausalLM.from_pretrained('base')")
    print(f"        model = peft.PeftModel.from_pretrained(model, {str(folder)!r})")


def from_peft(args: Namespace, given: set[str]) -> None:
    from interop import hugging_face
    from text.tokenizer import ENCODING
    from training.checkpoint import FORMAT_VERSION, fingerprint, load_model

    folder, path, lora_path = map(Path, (args.from_peft, args.checkpoint_path, args.lora_path))

    with new_checkpoint(lora_path, "--lora_path", path) as save:
        config_path = folder / hugging_face.ADAPTER_CONFIG_FILE
        config = hugging_face.read_json(config_path)

        with hugging_face.reported_damage(config_path):
            hugging_face.check_adapter_config(config, config_path)

        found, weights = hugging_face.read_weights(folder, hugging_face.ADAPTER_WEIGHT_FILES)
        model = load_model(path)

        with hugging_face.reported_damage(config_path):
            lora_args, lora = hugging_face.import_adapter(config, weights, model, found)

        print(f"Model:  {folder} for {path}, rank {lora_args['rank']}, alpha {lora_args['alpha']}")
        save(
            {
                "format_version": FORMAT_VERSION,
                "encoding": ENCODING,
                "lora_args": lora_args,
                "lora": lora,
                "base": fingerprint(model.state_dict()),
            }
        )

    speak = command("generate.py", args, checkpoint_path="checkpoint_path", lora_path="lora_path")
    print(f"Files:  {lora_path}")
    print(f"Next:   {speak} --raw")


def find_model(source: str) -> Path:
    """Return the folder of a model, which is downloaded if it is on the Hub."""
    from interop import hugging_face
    from text.hub import download_model

    if Path(source).is_dir():
        return Path(source)

    hugging_face.safetensors_package()

    return download_model(source, hugging_face.needed_files)


def check_vocabulary_size(model, path: Path) -> None:
    from interop.hugging_face import ConversionError
    from text.tokenizer import VOCABULARY_SIZE

    if model.vocabulary_size != VOCABULARY_SIZE:
        raise ConversionError(
            f"{path} has {model.vocabulary_size} tokens, the {VOCABULARY_SIZE} of GPT-2 are needed."
        )


@contextlib.contextmanager
def new_folder(path: Path, flag: str) -> Iterator[Path]:
    """Let a folder be filled under a temporary name; it is whole then, or else absent.

    Args:
        flag: that named it.

    Raises:
        ConversionError: when there is something at path already, or it cannot be written.
    """
    from interop.hugging_face import ConversionError
    from system.files import sync_folder, temporary_path
    from training.checkpoint import lock_output

    path = path.resolve()
    temporary = temporary_path(path)

    try:
        check_absent(path, flag)
        path.parent.mkdir(parents=True, exist_ok=True)

        with lock_output(path, flag):
            remove_left_over(temporary, flag)
            temporary.mkdir()

            try:
                yield temporary
                sync_folder(temporary)
                os.replace(temporary, path)
                sync_folder(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConversionError(
            f"{flag}: {path} cannot be written: {error.strerror}. Choose another folder."
        ) from error


def check_absent(path: Path, flag: str) -> None:
    from interop.hugging_face import ConversionError

    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConversionError(f"{flag}: {path} is there already; remove it, or choose another one.")


def remove_left_over(temporary: Path, flag: str) -> None:
    """Remove what a killed run has left, and nothing that another program has made."""
    from interop.hugging_face import ConversionError

    if not temporary.exists():
        return

    # Weights are written under a name that begins with .tmp.
    if not temporary.is_dir() or any(
        file.suffix not in SUFFIXES and not file.name.startswith(".tmp")
        for file in temporary.iterdir()
    ):
        raise ConversionError(
            f"{flag}: {temporary} is in the way; remove it, or choose another one."
        )

    shutil.rmtree(temporary)


@contextlib.contextmanager
def new_checkpoint(path: Path, flag: str, base_path: Path | None = None) -> Iterator[Callable]:
    """Claim a checkpoint's path, and yield a function that saves there, an earlier one kept.

    Args:
        flag: that named it.
        base_path: of the checkpoint that is read, which it must not be.
    """
    from training.checkpoint import CheckpointError, claimed, save_checkpoint, set_aside
    from training.outputs import written_by

    if base_path and path.resolve() in written_by(str(base_path)):
        raise CheckpointError(f"{flag}: this is the path of the base model.")

    def save(state: dict) -> None:
        if aside := set_aside(path):
            print(f"Kept:   an earlier one, as {aside}")

        save_checkpoint(path, state)

    with claimed(path, flag):
        yield save


def write_files(folder: Path, texts: dict[str, str | dict], name: str, weights: dict) -> None:
    """Write texts, and weights of this name; force all to the disk, and read the weights back.

    Args:
        texts: by the names of their files; what is no text is written as JSON.

    Raises:
        ConversionError: when the weights are not there as they should be.
    """
    import torch
    from safetensors import SafetensorError

    from interop.hugging_face import ConversionError, load_file, safetensors_package

    path = folder / name

    for file, text in texts.items():
        text = text if isinstance(text, str) else json.dumps(text, indent=2) + "\n"
        (folder / file).write_text(text, "utf-8", newline="\n")

    try:
        # Without this mark transformers does not read them.
        safetensors_package().save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error

    # It lets nobody else read them.
    shutil.copymode(folder / file, path)

    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())

    found = load_file(path)

    if found.keys() != weights.keys() or any(
        not torch.equal(found[key], weight) for key, weight in weights.items()
    ):
        raise ConversionError(f"{path} is not what was written to it; look after the disk.")


def command(script: str, args: Namespace, **flags: str) -> str:
    """Return a command line of a script, with those of its flags that differ from the defaults.

    Args:
        flags: the names of arguments of ours by those of the script.
    """
    defaults = build_parser()
    given = {
        flag: name
        for flag, name in flags.items()
        if getattr(args, name) != defaults.get_default(name)
    }

    return shlex.join(
        ["python", script, *(f"--{flag}={getattr(args, name)}" for flag, name in given.items())]
    )


if __name__ == "__main__":
    sys.exit(main())
