"""How much of the tiny models' Python is whole: functions that parse, and names that are kept.

    python benchmarks/functions.py                      # the model of pre-train.py --preset=tiny
    python benchmarks/functions.py --lora_path=out/lora.pt

The model writes behind `def NAME(`, for 100 names of functions in modules that were held back, at
temperature 0.8 and top_k 20. Counted are headers that are valid, first functions that have an end
and parse, and texts that parse up to their next line without indentation. With an adapter it
answers 200 rows that were held back, greedily; counted are answers that define a function of the
name that was asked for.
"""

import argparse
import ast
import json
import random
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from inference.decoding import generate
from inference.sampling import Sampler
from text.rows import StandardLibraryFunctions, load_examples
from text.sources import StandardLibrary
from text.splits import place_hash
from training.checkpoint import load_model_and_tokenizer, merge_adapter

TEST_SHARE = 0.02


def parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except (SyntaxError, ValueError):
        return False

    return True


def first_end(lines: list[str]) -> int | None:
    """Return the first line that is indented less than the body in front of it."""
    body = None
    for number, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if body is None and number and lines[number - 1].rstrip().endswith(":"):
            body = indentation
        elif body is not None and line.strip() and indentation < body:
            return number

    return None


def write(model, tokenizer, prompt: list[int], num_tokens: int, sampler: Sampler, seed: int) -> str:
    tokens = []
    for token in generate(model, torch.tensor([prompt]), num_tokens, sampler, seed):
        if token.item() == tokenizer.end_of_text:
            break

        tokens.append(token.item())

    return tokenizer.decode(tokens)


def held_back_names(number: int) -> list[str]:
    library, names = StandardLibrary(), set()
    for path in library.paths():
        if place_hash(path.relative_to(library.path).as_posix(), 0) < TEST_SHARE:
            names |= {*re.findall(r"def ([a-z]\w*)\(", path.read_text(errors="replace"))}

    return random.Random(0).sample(sorted(names), number)


def count_whole(model, tokenizer, seed: int, num_tokens: int) -> dict[str, int]:
    counts = dict.fromkeys(["headers_valid", "first_functions_whole", "texts_whole"], 0)
    for number, name in enumerate(held_back_names(100)):
        prompt, sampler = f"def {name}(", Sampler(0.8, 20)
        tokens = tokenizer.encode(prompt).tolist()
        text = write(model, tokenizer, tokens, num_tokens, sampler, 1000 * seed + number)
        lines = (prompt + text).split("\n")
        header = next((i for i, line in enumerate(lines) if line.rstrip().endswith(":")), None)
        if header is not None:
            counts["headers_valid"] += parses([*lines[: header + 1], "    pass"])

        last = next((i for i, line in enumerate(lines[1:], 1) if line[:1].strip()), None)
        for key, end in (("first_functions_whole", first_end(lines)), ("texts_whole", last)):
            counts[key] += end is not None and parses(lines[:end])

    return counts


def count_names(model, tokenizer, number: int) -> dict[str, int]:
    examples = load_examples(StandardLibraryFunctions(), tokenizer, model.block_size, True).test
    kept = 0
    for example in random.Random(0).sample(examples, number):
        prompt = example.tokens[: int(example.is_target.argmax())]
        name = re.findall(r"### Instruction:\n(\w+)\(", tokenizer.decode(prompt))[0]
        answer = write(model, tokenizer, prompt.tolist(), 24, Sampler(temperature=0), seed=0)
        kept += bool(re.match(rf"(@.*\n)*(async )?def {name}\(", answer))

    return {"answers": number, "names_kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, default=Path("out/checkpoint.pt"))
    parser.add_argument("--lora_path", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num_tokens", type=int, default=102, help="about 360 bytes of 3.5 each")
    args = parser.parse_args()

    # The parser warns of escapes in what the model writes.
    warnings.simplefilter("ignore")
    model, tokenizer = load_model_and_tokenizer(args.checkpoint_path)
    model.eval()
    if args.lora_path:
        merge_adapter(model, args.lora_path, is_needed=True)
        print(json.dumps(count_names(model, tokenizer, 200)))
        return

    for seed in args.seeds:
        print(json.dumps({"seed": seed, **count_whole(model, tokenizer, seed, args.num_tokens)}))


if __name__ == "__main__":
    main()
