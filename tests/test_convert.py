"""The script that converts: its flags, and what it writes from beginning to end."""

import contextlib
import importlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, launch
from conversions import (
    SIZES,
    assert_same_logits,
    assert_same_text,
    read_adapter,
    read_model,
    rewritten,
    write_adapter,
    write_checkpoint,
)
from hub_server import serve
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop import transformers
from system.locks import Lock
from text.instructions import format_prompt
from training.checkpoint import (
    fingerprint,
    load_checkpoint,
)


def test_the_card_loads_the_model(convert, monkeypatch):
    write_checkpoint(Path("out/checkpoint.pt"))
    convert("--to_hugging_face=model")
    card = Path("model/README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    names = {}
    monkeypatch.chdir("model")
    exec(lines, names)

    assert len(lines.split("\n")) < 8
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
    assert ("out/lora.pt, " in output) == is_merged


def test_a_chat_template_begins_as_the_rows_of_the_adapter(convert):
    introduction = 'You say "{{ 1 }}" %} in \N{BRIDGE AT NIGHT}.\n'
    base = write_checkpoint(Path("out/checkpoint.pt"))
    write_adapter(Path("out/lora.pt"), base, introduction=introduction)
    convert("--to_hugging_face=model")
    text = AutoTokenizer.from_pretrained("model").apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )

    assert text == format_prompt("Who?", introduction=introduction)


def test_an_adapter_of_another_base_is_left_out_or_refused(convert, refused):
    base = write_checkpoint(Path("out/checkpoint.pt"))
    write_adapter(Path("out/lora.pt"), write_checkpoint(Path("out/other.pt"), bias=True))
    line = refused("--to_hugging_face=model", "--lora_path=out/lora.pt")
    convert("--to_hugging_face=model")

    assert "was trained on another base model than this" in line
    assert_same_logits(base, AutoModelForCausalLM.from_pretrained("model").eval())


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

    assert "full cannot be written: it is there already" in refused("--to_hugging_face=full")
    assert "file cannot be written: it is there already" in refused("--to_hugging_face=full/file")
    assert "cannot be written: " in refused("--to_hugging_face=full/file/new")

    convert("--to_hugging_face=empty")
    assert "empty cannot be written: it is there already" in refused("--to_hugging_face=empty")


def test_checkpoints_that_are_no_model_of_gpt2_are_refused(refused, tmp_path):
    path = tmp_path / "out" / "checkpoint.pt"
    path.parent.mkdir()

    assert "There is no checkpoint at out/checkpoint.pt" in refused("--to_hugging_face=new")
    path.write_bytes(b"PK\x03\x04")
    assert "is damaged, or not of this project" in refused("--to_hugging_face=new")
    write_checkpoint(path, vocabulary_size=300)
    assert "has 300 tokens, the 50257 of r50k_base are needed" in refused("--to_hugging_face=new")


def test_a_killed_export_leaves_nothing_under_its_name_and_the_next_one_is_whole(convert, refused):
    write_checkpoint(Path("out/checkpoint.pt"))
    kill = (
        "from interop import transformers\n"
        f"transformers.load = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    status, _, _ = finish(launch(["--to_hugging_face=new"], kill, script="convert"))

    assert status == -signal.SIGKILL
    assert not Path("new").exists()
    assert Path("new.tmp/model.safetensors").exists()

    convert("--to_hugging_face=new")
    assert sorted(path.name for path in Path().iterdir()) == ["new", "out"]
    AutoModelForCausalLM.from_pretrained("new")

    # What no export has made is not removed.
    shutil.copytree("new", "other.tmp")
    assert "other.tmp is in the way; remove it" in refused("--to_hugging_face=other")
    assert Path("other.tmp/model.safetensors").exists()


LIMIT = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
"""


def test_an_export_that_no_disk_holds_leaves_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    status, _, errors = finish(launch(["--to_hugging_face=new"], LIMIT, script="convert"))

    assert status == 1
    assert "new.tmp cannot be written: " in errors
    assert "File too large" in errors
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["changed", "interrupted"])
def test_a_failing_export_leaves_nothing(capsys, monkeypatch, tmp_path, kind):
    write_checkpoint(tmp_path / "out" / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    load = transformers.load

    def fail(*_):
        if kind == "interrupted":
            raise KeyboardInterrupt

        model = load(*_)
        torch.nn.init.zeros_(model.transformer.h[1].ln_1.weight[3:4])

        return model

    monkeypatch.setattr(transformers, "load", fail)
    status = importlib.import_module("convert").main(["--to_hugging_face=new"])
    line = capsys.readouterr().err

    assert status == (130 if kind == "interrupted" else 1)
    assert ("look after the disk." if kind == "changed" else "\n") in line
    assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_without_a_package_one_line_says_how_to_get_it(tmp_path, package):
    hide = f"sys.modules[{package!r}] = None"
    flag = "--to_peft=new" if package == "peft" else "--to_hugging_face=new"
    argv = [flag, f"--checkpoint_path={tmp_path / 'checkpoint.pt'}"]
    status, _, errors = finish(launch(argv, hide, script="convert"))

    assert status == 1
    line = f"error: the package {package} is missing: pip install 'transformers>=5,<6' peft\n"
    assert errors == line


def test_nothing_but_our_own_lines_is_printed(tmp_path, source, monkeypatch):
    # transformers would report that it has no place for it.
    rewritten(source, lambda weights: {**weights, "h.0.attn.masked_bias": torch.zeros(1)})
    write_adapter(tmp_path / "lora.pt", write_checkpoint(tmp_path / "checkpoint.pt"))
    monkeypatch.chdir(tmp_path)
    paths = ["--checkpoint_path=checkpoint.pt", "--lora_path=lora.pt"]
    argvs = [
        ["--to_hugging_face=model", *paths],
        ["--from_hugging_face=source", "--checkpoint_path=back.pt"],
        ["--to_peft=adapter", *paths],
    ]
    before = "\n".join(f"assert script.main({argv}) == 0" for argv in argvs)
    process = launch(["--from_peft=adapter", *paths], before, script="convert")
    status, output, errors = finish(process)

    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert all(line.startswith(("Model:", "Files:", "Next:", "Kept:", "  ")) for line in lines)


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
