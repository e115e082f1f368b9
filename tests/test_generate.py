"""The script that generates: what goes in, what comes out, and where."""

import contextlib
import importlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from vocabularies import END_OF_TEXT, decode, encode

from model import GPT
from text.instructions import INTRODUCTION
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
    "block_size": 32,
    "embedding_dimensions": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "bias": False,
}


def write_model(path: Path, change=lambda state: None) -> dict:
    """Save a network of random weights as a checkpoint, after a change."""
    torch.manual_seed(0)
    model = GPT(**SIZES)
    state = {
        "format_version": FORMAT_VERSION,
        "model_args": SIZES,
        "encoding": "r50k_base",
        "model": model.state_dict(),
    }
    change(state)
    save_checkpoint(path, state)

    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "checkpoint.pt"
    write_model(path)

    return path


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("generate")


@pytest.fixture
def run(script, checkpoint, capsys, monkeypatch, tmp_path):
    """Return a function that runs the script; gives status, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def main(*argv: str, path: Path = checkpoint) -> tuple[int, str, str]:
        try:
            status = script.main([f"--checkpoint_path={path}", "--device=cpu", *argv])
        except SystemExit as exit_:
            status = exit_.code

        return status, *capsys.readouterr()

    return main


def tokens_of(script, monkeypatch, tokens: list[list[int]]) -> None:
    """Let the network choose given tokens, a list for each step."""
    from inference import continuation

    steps = [torch.tensor(step) for step in tokens]
    monkeypatch.setattr(continuation, "generate", lambda *_: iter(steps))


FAST = ("--precision=fp32", "--max_tokens=8", "--seed=3")


def test_the_prompt_is_continued_on_standard_output_alone(run):
    status, output, errors = run("--prompt=Once upon", *FAST)

    assert status == 0
    assert output.startswith("Once upon")
    assert len(output) > len("Once upon\n")
    assert "checkpoint.pt: 810,848 parameters, context 32, on cpu in fp32, --seed=3" in errors
    assert "8 tokens in" in errors
    assert "tokens/s" in errors


def test_same_seed_same_text(run):
    texts = {run("--prompt=a", *FAST)[1] for _ in range(2)}
    _, other, _ = run("--prompt=a", *FAST, "--seed=4")

    assert len(texts) == 1
    assert other not in texts


def test_greedy_text_needs_no_seed(run):
    argv = ("--prompt=a", "--temperature=0", "--precision=fp32", "--max_tokens=8")

    assert run(*argv)[1] == run(*argv)[1]


def test_several_samples_are_drawn_side_by_side(run):
    _, output, errors = run("--prompt=a b c", *FAST, "--num_samples=3")
    texts = output.split("\n---\n")

    assert len(texts) == 3
    assert len(set(texts)) == 3
    assert all(text.startswith("a b c") for text in texts)
    assert "24 tokens in" in errors


def test_a_text_ends_at_end_of_text(run, script, monkeypatch):
    [word] = encode(" word").tolist()
    tokens_of(
        script,
        monkeypatch,
        [[word, word], [END_OF_TEXT, word], [word, word], [word, END_OF_TEXT], [word, word]],
    )
    _, output, _ = run("--prompt=a", "--num_samples=2")

    assert output == "a word\n---\na word word word\n"


@pytest.mark.parametrize("text", ["naïve 日本語 👩‍🚀", "\ufeff", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"])
def test_characters_of_several_tokens_come_out_whole(run, script, monkeypatch, text):
    tokens = encode(text).tolist()
    tokens_of(script, monkeypatch, [[token] for token in tokens])
    written = []
    monkeypatch.setattr(script, "write", written.append)
    run("--prompt=a")

    assert len(tokens) > 1
    assert "".join(written) == f"a{text}\n"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in written)


def test_half_a_character_at_the_end_is_marked(run, script, monkeypatch):
    tokens_of(script, monkeypatch, [[token] for token in encode("日").tolist()[:1]])

    assert run("--prompt=a")[1] == "a\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize(
    "prompt", ["naïve 日本語 👩‍🚀", "a <|endoftext|> b", "<|endoftext|>", "\n\n", "\0"]
)
def test_any_text_may_be_a_prompt(run, prompt):
    status, output, _ = run(f"--prompt={prompt}", *FAST)

    assert status == 0
    assert output.startswith(prompt)


def test_a_prompt_of_another_encoding(run):
    status, output, _ = run("--prompt=a \udcff b", *FAST)

    assert status == 0
    assert output.startswith("a ? b")


def test_an_empty_prompt_begins_a_text(run):
    status, output, errors = run("--prompt=", *FAST)

    assert status == 0
    assert output.strip("\n")
    assert "Empty prompt" in errors


def test_of_a_long_prompt_the_last_tokens_are_read(run):
    words = " word" * 100
    _, output, errors = run(f"--prompt=x{words}", *FAST)
    _, expected, _ = run(f"--prompt={words[-5 * 32 :]}", *FAST)

    assert "The prompt has 101 tokens; the context of the model holds the last 32." in errors
    assert output.removeprefix(f"x{words}") == expected.removeprefix(words[-5 * 32 :])


def test_a_text_goes_on_past_the_context(run):
    status, _, errors = run("--prompt=a b c", "--max_tokens=60", "--seed=1", "--top_k=100000")

    assert status == 0
    assert "60 tokens in" in errors


class Piped(io.TextIOWrapper):
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))


def test_piped_input_is_one_prompt(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped(b"two\nlines\n"))
    status, output, errors = run(*FAST)

    assert status == 0
    assert output.startswith("two\nlines")
    assert errors.count("tokens in") == 1
    assert output == run("--prompt=two\nlines", *FAST)[1]


def test_piped_input_that_is_no_utf8(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped(b"a \xff b\n"))
    status, output, errors = run(*FAST)

    assert status == 0
    assert output.startswith("a \N{REPLACEMENT CHARACTER} b")
    assert "not valid UTF-8" in errors


@contextlib.contextmanager
def on_terminal(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run the script on a terminal of its own; it has asked for the first prompt then."""
    main, other = pty.openpty()
    argv = [f"--checkpoint_path={checkpoint}", "--device=cpu", *FAST]
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *argv],
        stdin=other,
        stdout=other,
        stderr=other,
        cwd=tmp_path,
    )
    os.close(other)

    try:
        read_until(main, b"> ")
        yield process, main
    finally:
        process.kill()
        process.wait()
        os.close(main)


def read_until(terminal: int, mark: bytes) -> bytes:
    """Read up to a mark, or to the end of what is written."""
    content = b""

    with contextlib.suppress(OSError):
        while not content.endswith(mark):
            content += os.read(terminal, 1)

    return content


def test_on_a_terminal_it_asks_again_and_again(checkpoint, tmp_path):
    answers = []

    with on_terminal(checkpoint, tmp_path) as (process, terminal):
        for prompt in (b"first\n", b"second\n", b"\n"):
            os.write(terminal, prompt)
            answers.append(read_until(terminal, b"> "))

        os.write(terminal, b"\x04")
        rest = read_until(terminal, b"no such end")

        assert process.wait(timeout=60) == 0

    assert all(answer.count(b"tokens in") == 1 for answer in answers)
    assert len(set(answers)) == 3
    assert b"Traceback" not in b"".join([*answers, rest])


def test_ctrl_c_at_the_prompt_leaves_quietly(checkpoint, tmp_path):
    with on_terminal(checkpoint, tmp_path) as (process, terminal):
        # One that comes between the prompt and the wait for a key is not heard before the next.
        while process.poll() is None:
            process.send_signal(signal.SIGINT)

            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)

        rest = read_until(terminal, b"no such end")

        assert process.returncode == 130

    assert b"Traceback" not in rest


def test_a_reader_that_leaves_ends_it_quietly(checkpoint, tmp_path):
    command = f"{sys.executable} {ROOT / 'generate.py'} --checkpoint_path={checkpoint} --device=cpu"
    result = subprocess.run(
        [
            "bash",
            "-c",
            f"{command} --prompt=$'a\\nb' --max_tokens=2000 | head -1; echo ${{PIPESTATUS[0]}}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=True,
    )

    assert result.stdout == "a\n141\n"
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def run_code(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]

    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "argv",
    [
        ["--top_k=0"],
        ["--top_k=-3"],
        ["--top_p=0"],
        ["--top_p=1.1"],
        ["--top_p=nan"],
        ["--temperature=-1"],
        ["--temperature=nan"],
        ["--temperature=inf"],
        ["--max_tokens=0"],
        ["--num_samples=0"],
        ["--seed=-1"],
        ["--raw=maybe"],
        ["--precision=int4"],
        ["--promt=a"],
    ],
)
def test_a_wrong_value_is_one_line_and_needs_no_torch(argv):
    """Whether torch is imported tells how long it takes, on any machine."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate\n"
        f"try: generate.main({argv!r})\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == "False\n"


def test_help_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate\n"
        "try: generate.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


def remove(key: str):
    return lambda state: state.pop(key)


def put_nan(state: dict) -> None:
    state["model"]["norm.weight"][3] = float("nan")


def misfit(state: dict) -> None:
    state["model_args"] = {**SIZES, "block_size": 64}


def other_tokenizer(state: dict) -> None:
    state["encoding"] = "cl100k_base"


def unknown_size(state: dict) -> None:
    state["model_args"] = {**SIZES, "num_experts": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("model"), "it has no model"),
        (remove("model_args"), "it has no model_args"),
        (put_nan, "norm.weight holds values that are not finite"),
        (misfit, "does not describe a valid model"),
        (unknown_size, "does not describe a valid model"),
        (other_tokenizer, "its vocabulary is cl100k_base"),
    ],
)
def test_a_checkpoint_that_is_of_no_use_is_one_line(run, tmp_path, change, message):
    write_model(tmp_path / "other.pt", change)
    status, output, errors = run("--prompt=a", path=tmp_path / "other.pt")

    assert status == 1
    assert output == ""
    assert errors.startswith("error: ")
    assert message in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_one_line(run, tmp_path, content):
    if content is not None:
        (tmp_path / "other.pt").write_bytes(content)

    status, output, errors = run("--prompt=a", path=tmp_path / "other.pt")

    assert status == 1
    assert output == ""
    assert "other.pt" in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_that_wrappers_have_prefixed_are_understood(tmp_path, prefix):
    def add_prefix(state: dict) -> None:
        state["model"] = {prefix + name: weight for name, weight in state["model"].items()}

    expected = write_model(tmp_path / "plain.pt")
    write_model(tmp_path / "other.pt", add_prefix)
    state = load_checkpoint(tmp_path / "other.pt", ("model",))
    model = build_model(state, tmp_path / "other.pt")

    for name, weight in expected["model"].items():
        assert torch.equal(model.state_dict()[name], weight)


# --- Adapters ---


def write_lora(path: Path, checkpoint: dict, **changes) -> dict:
    generator = torch.Generator().manual_seed(1)
    shapes = lora_shapes(GPT(**checkpoint["model_args"]), rank=4)
    lora = {
        "format_version": FORMAT_VERSION,
        "lora_args": {"rank": 4, "alpha": 2.0},
        "base": fingerprint(checkpoint["model"]),
        "lora": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        **changes,
    }
    save_checkpoint(path, lora)

    return lora


def test_an_adapter_is_used_when_it_is_there(run, checkpoint, tmp_path):
    base = load_checkpoint(checkpoint, ("model",))
    _, alone, _ = run("--prompt=a", *FAST)
    (tmp_path / "out").mkdir()
    write_lora(tmp_path / "out" / "lora.pt", base)
    _, raw, errors = run("--prompt=a", *FAST, "--raw")
    _, answer, _ = run("--prompt=a", *FAST)

    assert "with out/lora.pt" in errors
    assert raw.startswith("a")
    assert raw != alone
    assert answer not in (alone, raw)


def test_an_adapter_adds_the_product_of_its_matrices(checkpoint, tmp_path):
    base = load_checkpoint(checkpoint, ("model",))
    model = build_model(load_checkpoint(checkpoint, ("model",)), checkpoint)
    lora = write_lora(tmp_path / "lora.pt", base)
    merge_lora_checkpoint(model, lora, tmp_path / "lora.pt")
    changed = set()

    for key, weight in model.state_dict().items():
        expected = base["model"][key]
        name = key.removesuffix(".weight")

        if f"{name}.lora_a" in lora["lora"]:
            product = lora["lora"][f"{name}.lora_b"] @ lora["lora"][f"{name}.lora_a"]
            expected = expected + 2.0 * product
            changed.add(name)

        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)

    assert len(changed) == 4 * len(model.blocks)


@pytest.mark.parametrize(
    ("changes", "introduction"),
    [({}, INTRODUCTION), ({"introduction": "You are a ferryman."}, "You are a ferryman.")],
)
def test_the_template_is_put_around_an_instruction(
    run, script, checkpoint, tmp_path, monkeypatch, changes, introduction
):
    """It begins as the rows of the adapter began."""
    (tmp_path / "out").mkdir()
    write_lora(tmp_path / "out" / "lora.pt", load_checkpoint(checkpoint, ("model",)), **changes)
    prompts = []
    tokens = script.TextGenerator.tokens

    def tokens_of(self, prompt):
        prompts.append(tokens(self, prompt))
        return prompts[-1]

    monkeypatch.setattr(script.TextGenerator, "tokens", tokens_of)
    run("--prompt=Say {input}", *FAST)
    run("--prompt=Say {input}", *FAST, "--raw")
    wrapped, raw = (decode(prompt) for prompt in prompts)

    # The context may not hold all of it.
    expected = f"{introduction}\n\n### Instruction:\nSay {{input}}\n\n### Response:\n"
    assert expected.endswith(wrapped)
    assert len(wrapped) > 60
    assert raw == "Say {input}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "0" * 64}, "was trained on another base model"),
        ({"lora": {"blocks.9.mlp.hidden.lora_a": torch.ones(2, 2)}}, "does not fit"),
        (
            {
                "lora": {
                    "blocks.0.mlp.hidden.lora_a": torch.ones(2, 3),
                    "blocks.0.mlp.hidden.lora_b": torch.ones(3, 2),
                }
            },
            "does not fit",
        ),
        ({"lora": {"blocks.0.mlp.hidden.lora_a": torch.full((2, 2), float("inf"))}}, "not finite"),
        ({"lora_args": {}}, "does not fit"),
        ({"introduction": 3}, "its introduction is no text"),
    ],
)
def test_an_adapter_of_another_model_is_refused(run, checkpoint, tmp_path, changes, message):
    write_lora(tmp_path / "other.pt", load_checkpoint(checkpoint, ("model",)), **changes)
    status, output, errors = run("--prompt=a", f"--lora_path={tmp_path / 'other.pt'}")

    assert status == 1
    assert output == ""
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_an_adapter_of_another_model_is_passed_over_unless_named(run, checkpoint, tmp_path):
    _, alone, _ = run("--prompt=a", *FAST)
    (tmp_path / "out").mkdir()
    base = load_checkpoint(checkpoint, ("model",))
    write_lora(tmp_path / "out" / "lora.pt", base, base="0" * 64)
    _, output, errors = run("--prompt=a", *FAST)

    assert output == alone
    assert "out/lora.pt was trained on another base model; it is ignored" in errors


def test_an_adapter_can_be_left_out(run, checkpoint, tmp_path):
    _, alone, _ = run("--prompt=a", *FAST)
    (tmp_path / "out").mkdir()
    write_lora(tmp_path / "out" / "lora.pt", load_checkpoint(checkpoint, ("model",)))

    assert run("--prompt=a", *FAST, "--lora_path=")[1] == alone


def test_an_adapter_that_was_asked_for_has_to_be_there(run):
    status, _, errors = run("--prompt=a", "--lora_path=out/lora.pt")

    assert status == 1
    assert errors == "error: There is no checkpoint at out/lora.pt.\n"


def test_out_of_memory_is_one_line(run, monkeypatch):
    from inference import continuation

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(continuation, "generate", fail)
    status, _, errors = run("--prompt=a")

    assert status == 1
    message = "error: cpu is out of memory for the model and the text; "
    assert f"{message}take a smaller model, or a device" in errors

    status, _, errors = run("--prompt=a", "--num_samples=3")
    assert f"{message}lower --num_samples, or take" in errors

    monkeypatch.setattr("training.checkpoint.load_model_and_tokenizer", fail)
    status, _, errors = run("--prompt=a")
    assert f"{message}take a smaller model" in errors
