"""A model with a vocabulary of its own: from its text to every place that it goes to."""

import importlib
import json
import math
import random
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, finish, launch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import own_tokenizer

from inference.decoding import generate
from inference.sampling import Sampler
from processes import Group
from training.checkpoint import load_checkpoint, load_model_and_tokenizer, save_checkpoint

SIZE = "--vocabulary_size=280"


@pytest.fixture
def trained(pre_train, small, tmp_path, capsys, monkeypatch):
    """A run's checkpoint alone in a folder, where we are; token files are elsewhere."""
    assert pre_train.main(small(SIZE, "--block_size=256")) == 0
    (tmp_path / "alone").mkdir()
    path = Path(shutil.move(tmp_path / "checkpoint.pt", tmp_path / "alone"))
    monkeypatch.chdir(path.parent)
    capsys.readouterr()
    return path


def any_text(number: int) -> str:
    """Return a document of any Unicode."""
    generator = random.Random(number)
    kinds = [range(128), range(0x3000), range(0x110000), b" \n\t\r'", range(ord("a"), 123)]
    points = (generator.choice(generator.choice(kinds)) for _ in range(generator.randrange(60)))
    characters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return unicodedata.normalize("NFC", "".join(characters)) if number % 2 else "".join(characters)


def test_the_checkpoint_carries_it(trained):
    state = load_checkpoint(trained, ["vocabulary"])
    model, tokenizer = load_model_and_tokenizer(trained)

    assert model.vocabulary_size == tokenizer.vocabulary_size == 280
    assert tokenizer.encoding == state["encoding"]
    assert re.fullmatch("bpe-280-[0-9a-f]{12}", tokenizer.encoding)
    assert tokenizer.decode(tokenizer.encode("the cat, déjà vu")) == "the cat, déjà vu"
    # Chance is that of its own tokens.
    assert state["metrics"][0]["train_loss"] == pytest.approx(math.log(280), abs=0.5)


def test_generated_text_has_whole_characters(trained, capsys):
    state = load_checkpoint(trained, [])
    tokenizer = load_model_and_tokenizer(trained)[1]
    # Of nothing but the bytes of é, which are two tokens here.
    first, second = tokenizer.encode("é").tolist()
    weights = {name: torch.zeros_like(weight) for name, weight in state["model"].items()}
    weights["norm.weight"] += 1
    weights["token_embeddings.weight"][[first, second], 0] = 1
    state["model"] = weights
    save_checkpoint(trained, state)
    script = importlib.import_module("generate")
    flags = ("--temperature=1", "--top_k=2", "--max_tokens=40", "--seed=1", "--device=cpu")

    assert script.main([f"--checkpoint_path={trained}", "--prompt=é", *flags]) == 0
    output = capsys.readouterr().out
    assert output.startswith("é")
    # No half of a character is shown before it is known that its other half does not come.
    assert set(output) <= {"é", "\N{REPLACEMENT CHARACTER}", "\n"}
    assert output.count("é") > 3


def test_bits_a_byte_are_those_of_the_text(pre_train, trained, text_folder, tmp_path, capsys):
    flags = ["--device=cpu", "--precision=fp32"]
    look = ["--eval_only", f"--dataset={text_folder}", f"--checkpoint_path={trained}"]
    assert pre_train.main([*look, f"--dataset_path={tmp_path / 'new'}", *flags]) == 0
    output = capsys.readouterr().out
    loss, bits, num_tokens, num_bytes = (
        float(number.replace(",", ""))
        for number in re.search(
            r"([\d.]+) nats .*, ([\d.]+) bits a byte; ([\d,]+) tokens, ([\d,]+) bytes", output
        ).groups()
    )

    model, tokenizer = load_model_and_tokenizer(trained)
    [path] = (tmp_path / "new").glob("*-test.bin")
    tokens = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint16).long()
    count = (len(tokens) - 1) // 256
    nats = bytes_ = 0
    for window in range(count):
        x = tokens[window * 256 : window * 256 + 257]
        logits = model.eval()(x[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits[:, :280], x[1:], reduction="sum").item()
        targets = [token for token in x[1:].tolist() if token != tokenizer.end_of_text]
        bytes_ += len(b"".join(map(tokenizer.decode_bytes, targets)))

    assert (num_tokens, num_bytes) == (count * 256, bytes_)
    assert loss == pytest.approx(nats / num_tokens, abs=2e-4)
    assert bits == pytest.approx(nats / bytes_ / math.log(2), abs=2e-4)
    # It is the checkpoint's vocabulary, so none is trained.
    assert not [*(tmp_path / "new").glob("*.vocabulary")]


def test_transformers_has_the_same_ids_and_the_same_text(convert, trained):
    convert("--to_hugging_face=new", f"--checkpoint_path={trained}")
    model, tokenizer = load_model_and_tokenizer(trained)
    theirs = AutoModelForCausalLM.from_pretrained("new").eval()
    their_tokenizer = AutoTokenizer.from_pretrained("new")
    texts = [text for text in map(any_text, range(1000)) if text]

    assert their_tokenizer(texts)["input_ids"] == [tokenizer.encode(t).tolist() for t in texts]
    assert their_tokenizer("a<|endoftext|>")["input_ids"][-1] == tokenizer.end_of_text
    assert theirs.config.vocab_size == len(their_tokenizer) == 280
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 279

    x = torch.tensor([tokenizer.encode("the cat sees").tolist()])
    ours = [t.item() for t in generate(model.eval(), x, 40, Sampler(temperature=0), seed=0)]
    text = theirs.generate(x, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert text[0, x.shape[1] :].tolist() == ours


def test_it_comes_back_from_transformers(convert, refused, trained):
    convert("--to_hugging_face=new", f"--checkpoint_path={trained}")
    convert("--from_hugging_face=new", "--checkpoint_path=back.pt")
    before, after = load_checkpoint(trained, []), load_checkpoint(Path("back.pt"), [])

    assert after["vocabulary"] == before["vocabulary"]
    assert after["encoding"] == before["encoding"]

    # With another pattern the same tokens are another vocabulary.
    path = Path("new/tokenizer.json")
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(content))
    message = refused("--from_hugging_face=new", "--checkpoint_path=again.pt")
    assert "new holds another vocabulary than GPT-2's, r50k_base, or one of this project" in message


def test_it_is_fine_tuned_and_the_adapter_goes_with_it(
    fine_tune, trained, rows_path, convert, capsys
):
    flags = ["--num_epochs=1", "--device=cpu", "--compile=False", "--precision=fp32", "--seed=1"]
    paths = ["--checkpoint_path=lora.pt", "--metrics_path=lora.csv"]
    base = f"--base_model_path={trained}"
    assert fine_tune.main([base, f"--dataset={rows_path}", *paths, *flags]) == 0

    adapter = load_checkpoint(Path("lora.pt"), ["lora"])
    assert adapter["encoding"] == load_checkpoint(trained, [])["encoding"]

    script = importlib.import_module("generate")
    where = [f"--checkpoint_path={trained}", "--lora_path=lora.pt", "--prompt=Count to 3."]
    capsys.readouterr()
    assert script.main([*where, "--max_tokens=5", "--device=cpu", "--seed=1"]) == 0
    assert f"{trained} with lora.pt" in capsys.readouterr().err
    convert("--to_peft=adapter", f"--checkpoint_path={trained}", "--lora_path=lora.pt")
    convert("--from_peft=adapter", f"--checkpoint_path={trained}", "--lora_path=back.pt")


def test_a_run_that_was_killed_ends_the_same(pre_train, small, tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    assert pre_train.main(small(SIZE, out=left)) == 0
    patch = (
        "from training import run\nreal = run.Run.save\n"
        "def save(self, *args):\n"
        "    real(self, *args); self.writer.wait(); os.kill(os.getpid(), 9)\n"
        "run.Run.save = save"
    )
    status, _, _ = finish(launch(small(SIZE, out=right), patch))
    assert status == -9

    # The size need not be given again.
    assert pre_train.main(small("--resume", out=right)) == 0
    assert_same_run(left / "checkpoint.pt", right / "checkpoint.pt")


def test_two_processes_train_on_the_same_samples(small, tmp_path, pre_train, text_folder):
    extra = (SIZE, f"--dataset_path={tmp_path / 'new'}")
    group = Group(small(*extra, out=tmp_path / "two"), 2, tmp_path / "two")
    assert group.wait() == [0, 0]
    assert pre_train.main(small(SIZE, out=tmp_path / "one")) == 0
    one, two = (load_checkpoint(tmp_path / n / "checkpoint.pt", []) for n in ("one", "two"))

    assert one["vocabulary"] == two["vocabulary"]
    assert one["dataset"] == two["dataset"]
    for left, right in zip(one["metrics"], two["metrics"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "--vocabulary_size=281"], "--vocabulary_size: 281 given, "),
        (["--resume", "--vocabulary_size=50257"], "--vocabulary_size: 50257 given, "),
        (["--eval_only", "--vocabulary_size=281"], "--vocabulary_size: 281 given, "),
        (["--vocabulary_size=256"], "--vocabulary_size: must be a whole number from 257 to 65536"),
        (["--vocabulary_size=65537"], "must be a whole number from 257 to 65536, 65537 given"),
    ],
)
def test_a_size_that_contradicts_is_one_line(small, trained, error_of, flags, message):
    status, line = error_of([*small("--block_size=256"), f"--checkpoint_path={trained}", *flags])

    assert status == 2
    assert message in line


def test_weights_of_another_run_bring_their_vocabulary(
    pre_train, small, trained, tmp_path, error_of
):
    initial = f"--initial_checkpoint={trained}"
    out = tmp_path / "out"
    status, line = error_of([*small("--block_size=256", initial, "--vocabulary_size=281", out=out)])
    assert (status, "--vocabulary_size: 281 given, " in line) == (2, True)

    assert pre_train.main(small("--block_size=256", initial, out=out)) == 0
    left, right = load_checkpoint(trained, []), load_checkpoint(out / "checkpoint.pt", [])
    assert left["vocabulary"] == right["vocabulary"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": None}, "is missing"),
        ({"vocabulary": "IQ== 0\n"}, "the vocabulary is damaged: tokens are missing"),
        ({"vocabulary": own_tokenizer().ranks}, "the vocabulary is damaged: its digest is another"),
        ({"encoding": "r50k_base"}, "has 280 tokens, the 50257 of r50k_base are needed"),
        ({"encoding": "p50k_base"}, "its vocabulary is p50k_base, r50k_base or one of this"),
    ],
)
def test_a_damaged_vocabulary_in_a_checkpoint_is_one_line(trained, error_of, change, message):
    state = {**load_checkpoint(trained, []), **change}
    save_checkpoint(trained, state)

    for name in ("generate", "pre-train", "fine-tune", "convert"):
        flags = {
            "generate": ["--prompt=a", "--device=cpu", f"--checkpoint_path={trained}"],
            "pre-train": ["--eval_only", "--device=cpu", f"--checkpoint_path={trained}"],
            "fine-tune": [f"--base_model_path={trained}", "--dataset=stdlib", "--device=cpu"],
            "convert": ["--to_hugging_face=new", f"--checkpoint_path={trained}"],
        }
        status, line = error_of(flags[name], importlib.import_module(name))

        assert status == 1
        assert message in line
