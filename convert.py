"""Take models and adapters to Hugging Face's transformers and peft, and from there."""

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

# Not there with PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

from training.arguments import Parser, command, fail, path_str

EXTRAS = ("transformers", "peft")


def build_parser() -> Parser:
    parser = Parser(prog="convert.py", description=__doc__)

    add = parser.add_argument_group("what to do, one of these").add_argument
    add(
        "--to_hugging_face",
        type=path_str,
        metavar="DIR",
        help="Write the model, merged with its adapter if it has one, into a new folder that"
        " transformers loads.",
    )
    add(
        "--from_hugging_face",
        type=path_str,
        metavar="NAME_OR_DIR",
        help="Make a checkpoint of GPT-2 weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or another"
        " model on the Hugging Face Hub, or a folder.",
    )
    add(
        "--to_peft",
        type=path_str,
        metavar="DIR",
        help="Write the adapter into a new folder that peft loads.",
    )
    add(
        "--from_peft",
        type=path_str,
        metavar="DIR",
        help="Make a LoRA checkpoint of a peft adapter for the model.",
    )

    add = parser.add_argument_group("files").add_argument
    add(
        "--checkpoint_path",
        type=path_str,
        default="./out/checkpoint.pt",
        help="The path to the checkpoint file on disk; --from_hugging_face writes it.",
    )
    add(
        "--lora_path",
        type=path_str,
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
    from interop.outputs import ConversionError
    from system.devices import check_compiler_cache
    from system.memory import is_out_of_memory
    from system.streams import steady_output
    from text.errors import DataError
    from training.checkpoint import CheckpointError

    try:
        with steady_output():
            check_compiler_cache(is_wanted=False)
            action(args, given)
    except (CheckpointError, ConversionError, DataError, OSError) as error:
        return fail(error)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise

        return fail(f"the package {error.name} is missing: pip install 'transformers>=5,<6' peft")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise

        return fail("cpu is out of memory for the model; take a machine with more memory.")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130

    return 0


def chosen_action(args: Namespace, given: set[str]) -> Callable[[Namespace, set[str]], None]:
    """Return the function of the only action that is given.

    Raises:
        ValueError: when there is not exactly one, or it lacks a path.
    """
    actions = {
        action.__name__: action
        for action in (to_hugging_face, from_hugging_face, to_peft, from_peft)
    }
    chosen = [name for name in actions if name in given]
    if len(chosen) != 1:
        raise ValueError(f"one of --{', --'.join(actions)} is needed, {len(chosen)} given")

    if "lora_path" in given and chosen == ["from_hugging_face"]:
        raise ValueError("--lora_path: --from_hugging_face has no adapter")

    for name in [*chosen, "checkpoint_path", *["lora_path"] * chosen[0].endswith("peft")]:
        if not getattr(args, name):
            raise ValueError(f"--{name}: a path is needed, an empty one given")

    source = args.from_hugging_face
    if source and not (Path(source).is_dir() or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source)):
        raise ValueError(f"--from_hugging_face: there is no folder {source}")

    return actions[chosen[0]]


def to_hugging_face(args: Namespace, given: set[str]) -> None:
    from interop.outputs import new_folder
    from interop.transformers import export_model
    from training.checkpoint import load_model_and_tokenizer, merge_adapter

    folder, path, lora_path = Path(args.to_hugging_face), args.checkpoint_path, args.lora_path
    with new_folder(folder, "--to_hugging_face") as temporary:
        model, tokenizer = load_model_and_tokenizer(path)
        is_needed = "lora_path" in given
        introduction = merge_adapter(model, Path(lora_path), is_needed) if lora_path else None
        name = path if introduction is None else f"{path} with {lora_path}"
        print(f"Model:  {name}, {model.num_parameters:,} parameters")
        export_model(model, tokenizer, temporary, introduction)

    print_files(folder)
    print("Next:   from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print(f"        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})")


def from_hugging_face(args: Namespace, given: set[str]) -> None:
    from interop.outputs import new_checkpoint
    from interop.transformers import import_model, needed_files
    from text.hub import download_model
    from training.checkpoint import build_model

    source, path = args.from_hugging_face, Path(args.checkpoint_path)
    with new_checkpoint(path, "--checkpoint_path") as save:
        is_here = Path(source).is_dir()
        folder = Path(source) if is_here else download_model(source, needed_files)
        state = import_model(folder)
        model = build_model(state, folder)
        biases = "with biases" if state["model_args"]["bias"] else "without biases"
        print(f"Model:  {source}, {model.num_parameters:,} parameters, {biases}")
        save(state)

    print(f"Files:  {path}")
    print(f"Next:   {command('generate.py', f'--checkpoint_path={path}')}")
    print(f"        {command('fine-tune.py', f'--base_model_path={path}')}")


def to_peft(args: Namespace, given: set[str]) -> None:
    from interop.outputs import new_folder
    from interop.peft import export_adapter
    from training.checkpoint import LORA_KEYS, load_checkpoint, load_model, merge_lora_checkpoint

    folder, path, lora_path = map(Path, (args.to_peft, args.checkpoint_path, args.lora_path))
    with new_folder(folder, "--to_peft") as temporary:
        model = load_model(path)
        state = load_checkpoint(lora_path, LORA_KEYS)
        # What can be merged fits.
        merge_lora_checkpoint(model, state, lora_path)
        alpha = state["lora_args"]["alpha"]
        print(f"Model:  {lora_path} of {path}, alpha {alpha}")
        export_adapter(state["lora"], alpha, model, temporary)

    print_files(folder)
    flags = ("--to_hugging_face=base", f"--checkpoint_path={path}", "--lora_path=")
    print(f"Next:   {command('convert.py', *flags)}")
    print("        model = AutoModelForCausalLM.from_pretrained('base')")
    print(f"        model = peft.PeftModel.from_pretrained(model, {str(folder)!r})")


def from_peft(args: Namespace, given: set[str]) -> None:
    from interop.outputs import new_checkpoint
    from interop.peft import import_adapter

    folder, path, lora_path = map(Path, (args.from_peft, args.checkpoint_path, args.lora_path))
    with new_checkpoint(lora_path, "--lora_path", path) as save:
        state = import_adapter(folder, path)
        rank, alpha = state["lora_args"]["rank"], state["lora_args"]["alpha"]
        print(f"Model:  {folder} for {path}, rank {rank}, alpha {alpha}")
        save(state)

    print(f"Files:  {lora_path}")
    flags = (f"--checkpoint_path={path}", f"--lora_path={lora_path}", "--raw")
    print(f"Next:   {command('generate.py', *flags)}")


def print_files(folder: Path) -> None:
    print(f"Files:  {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main())
