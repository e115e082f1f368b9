"""Continue a text, as a trained model would have written it."""

import contextlib
import os
import secrets
import sys
import time
from argparse import Namespace
from pathlib import Path

# Not there with PYTHONSAFEPATH.
sys.path.insert(0, str(Path(__file__).parent))

from system import threads  # noqa: F401, sets environment variables that torch reads on import
from training.arguments import (
    Parser,
    add_device,
    add_flag,
    add_seed,
    fail,
    non_negative_float,
    path_str,
    positive_int,
    share_float,
)


def build_parser() -> Parser:
    parser = Parser(prog="generate.py", description=__doc__)

    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint_path",
        type=path_str,
        default="./out/checkpoint.pt",
        help="Checkpoint of the model.",
    )
    add(
        "--lora_path",
        type=path_str,
        default="./out/lora.pt",
        help="Adapter; by default used if it is there and of this base; empty for none.",
    )
    add_flag(add, "--raw", False, "Give a fine-tuned model the prompt without a template.")

    add = parser.add_argument_group("text").add_argument
    add(
        "--prompt",
        help="Text to continue; without it standard input if that is a pipe, else prompts are asked"
        " for.",
    )
    add("--max_tokens", type=positive_int, default=500, help="Tokens to generate at most.")
    add("--num_samples", type=positive_int, default=1, help="Continuations, drawn side by side.")
    add(
        "--temperature",
        type=non_negative_float,
        default=1.0,
        help="Sampling temperature; 0 is greedy.",
    )
    add("--top_k", type=positive_int, default=20, help="Sample from the k most probable tokens.")
    add(
        "--top_p",
        type=share_float,
        default=1.0,
        help="Nucleus sampling: keep the smallest set whose probability reaches this.",
    )
    add_seed(add)

    add = parser.add_argument_group("run").add_argument
    add_device(add, "the weights")
    add_flag(add, "--compile", True, "On a GPU, record a step once and replay it as a CUDA graph.")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse(argv)

    # Imported late: a wrong flag is reported at once.
    from system.devices import (
        DeviceError,
        check_compiler_cache,
        limit_threads,
        resolve_device,
    )
    from system.memory import describe_shortage, is_out_of_memory
    from text.errors import DataError
    from training.checkpoint import CheckpointError

    check_compiler_cache(is_wanted=False)
    limit_threads()
    try:
        device = resolve_device(args.device if "device" in args.given else None)
        generator = TextGenerator(args, device, "lora_path" in args.given)
        answer_all(args, generator)
    except ValueError as error:
        return fail(error, status=2)
    except (CheckpointError, DataError, DeviceError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has closed the pipe: discard what Python still buffers for it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

        return fail(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise

        shortage = describe_shortage(error, device, "the model and the text")
        cure = "lower --num_samples, or " * (args.num_samples > 1)
        return fail(f"{shortage}; {cure}take a smaller model, or a device with more memory.")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130

    return 0


class TextGenerator:
    """A model that continues texts, with the settings of the arguments.

    Args:
        needs_lora: whether a flag named the adapter, which then has to exist.

    Raises:
        CheckpointError: when a checkpoint is missing, damaged or of the wrong kind.
    """

    def __init__(self, args: Namespace, device, needs_lora: bool):
        from system.devices import PRECISIONS, resolve_precision
        from training.checkpoint import load_model_and_tokenizer, merge_adapter

        self.args = args
        self.device = device
        self.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
        self.num_answers = 0

        path, lora_path = Path(args.checkpoint_path), Path(args.lora_path)
        model, self.tokenizer = load_model_and_tokenizer(path)
        # What prompts of a fine-tuned model begin with.
        self.introduction = merge_adapter(model, lora_path, needs_lora) if args.lora_path else None

        precision = resolve_precision(device) if args.precision == "auto" else args.precision
        self.model = model.to(device, PRECISIONS[precision]).eval()
        self.uses_template = self.introduction is not None and not args.raw
        name = str(path) if self.introduction is None else f"{path} with {lora_path}"
        note(
            f"{name}: {model.num_parameters:,} parameters, context {model.block_size}, on"
            f" {device} in {precision}, --seed={self.seed}"
        )

    def answer(self, prompt: str, is_echoed: bool) -> None:
        """Write continuations of a prompt to standard output; stream it if there is only one."""
        from inference.continuation import continue_text
        from inference.sampling import Sampler

        args = self.args
        pieces = continue_text(
            self.model,
            self.tokenizer,
            self.tokens(prompt),
            args.num_samples,
            args.max_tokens,
            Sampler(args.temperature, args.top_k, args.top_p),
            self.seed + self.num_answers,
            use_graphs=args.compile and self.device.type == "cuda",
        )
        echo = prompt if is_echoed and not self.uses_template else ""
        start = time.perf_counter()
        num_tokens, first_after = 0, 0.0
        texts = [echo] * args.num_samples
        for row in pieces:
            first_after = first_after or time.perf_counter() - start
            num_tokens += sum(piece is not None for piece in row)
            texts = [text + (piece or "") for text, piece in zip(texts, row, strict=True)]
            if len(texts) == 1:
                write(texts[0])
                texts = [""]

        seconds = time.perf_counter() - start
        for number, text in enumerate(texts):
            write(f"{text}\n" if number + 1 == len(texts) else f"{text}\n---\n")

        note(
            f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / max(seconds, 1e-9):,.1f}"
            f" tokens/s, the first after {first_after:.2f} s"
        )
        self.num_answers += 1

    def tokens(self, prompt: str) -> list[int]:
        """Tokenize a prompt: its last block_size tokens, or end-of-text for an empty one."""
        from text.instructions import format_prompt

        if self.uses_template:
            prompt = format_prompt(prompt, introduction=self.introduction)

        tokens = self.tokenizer.encode(prompt).tolist()
        if not tokens:
            note("Empty prompt: starting a new text.")
            return [self.tokenizer.end_of_text]

        if len(tokens) > self.model.block_size:
            note(
                f"The prompt has {len(tokens):,} tokens; the context of the model holds the last"
                f" {self.model.block_size:,}."
            )

        return tokens[-self.model.block_size :]


def answer_all(args: Namespace, generator: TextGenerator) -> None:
    """Answer --prompt, or standard input, or prompts that are typed one by one."""
    from text.errors import without_surrogates

    if args.prompt is not None:
        generator.answer(without_surrogates(args.prompt), is_echoed=True)
    elif not sys.stdin.isatty():
        generator.answer(read_piped_prompt(), is_echoed=True)
    else:
        # Gives input() line editing and a history.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401

        while (prompt := ask()) is not None:
            # A terminal may send bytes that are not in its encoding.
            generator.answer(without_surrogates(prompt), is_echoed=False)


def read_piped_prompt() -> str:
    """Read standard input as one prompt, without the line end that most commands add."""
    content = sys.stdin.buffer.read().removesuffix(b"\n")
    prompt = content.decode("utf-8", errors="replace")
    if prompt.encode() != content:
        note("The prompt is not valid UTF-8; invalid bytes become \N{REPLACEMENT CHARACTER}.")

    return prompt


def ask() -> str | None:
    """Ask for a prompt on the terminal; None when there are no more."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a note on standard error: it is not part of the text."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
