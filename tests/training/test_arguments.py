"""The command line: the table of the README is true, and mistakes are answered in one line."""

import importlib
import re

import pytest
from conftest import ROOT

from training import arguments

TYPES = {
    arguments.positive_int: "int",
    arguments.non_negative_int: "int",
    arguments.seed_int: "int",
    arguments.vocabulary_int: "int",
    arguments.positive_float: "float",
    arguments.non_negative_float: "float",
    arguments.dropout_float: "float",
    arguments.share_float: "float",
    arguments.minutes_float: "float",
    arguments.parse_bool: "bool",
    arguments.path_str: "string",
    arguments.encoding_str: "string",
    None: "string",
}


def readme_table(script: str) -> dict[str, tuple[str, str, str]]:
    """Return default, type and description by flag from the table below a script's heading."""
    section = (ROOT / "README.md").read_text().split(f"### {script}")[1].split("\n#")[0]
    rows = re.findall(r"^\| (--\w+) \| (.*?) \| (.*?) \| (.*) \|$", section, re.MULTILINE)

    return {flag: (default, kind, text.replace("`", "")) for flag, default, kind, text in rows}


@pytest.mark.parametrize("script", ["pre-train", "fine-tune", "generate", "convert"])
def test_readme_has_the_arguments_of_the_parser(script):
    parser = importlib.import_module(script).build_parser()
    actions = [a for a in parser._actions if a.dest != "help"]
    expected = {}

    for action in actions:
        default = action.default if action.nargs != "+" else " ".join(action.default)
        kind = TYPES[action.type] + (", one or more" if action.nargs == "+" else "")
        expected[action.option_strings[0]] = (str(default), kind, action.help)

    assert readme_table(f"{script}.py") == expected


def test_defaults_of_the_seed_are_kept(pre_train):
    defaults = vars(pre_train.build_parser().parse([], pre_train.PRESETS))
    seed = {
        "batch_size": 4,
        "gradient_accumulation_steps": 32,
        "samples_per_epoch": 4096,
        "learning_rate": 5e-4,
        "dropout": 0.1,
        "max_gradient_norm": 1.0,
        "num_epochs": 2145,
        "eval_interval": 10,
        "block_size": 1024,
        "embedding_dimensions": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "checkpoint_interval": 20,
        "checkpoint_path": "./out/checkpoint.pt",
        "dataset_path": "./dataset",
        "num_dataset_processes": 8,
        "resume": False,
        "device": "cuda",
        "seed": None,
    }

    assert {name: defaults[name] for name in seed} == seed


def test_defaults_of_the_seed_are_kept_in_fine_tuning(fine_tune):
    defaults = vars(fine_tune.build_parser().parse([], fine_tune.PRESETS))
    seed = {
        "base_model_path": "./out/checkpoint.pt",
        "batch_size": 4,
        "mask_input": True,
        "gradient_accumulation_steps": 32,
        "learning_rate": 5e-4,
        "rank": 8,
        "alpha": 2.0,
        "num_epochs": 4,
        "eval_interval": 1,
        "checkpoint_interval": 1,
        "resume": False,
        "device": "cuda",
        "seed": None,
    }

    assert {name: defaults[name] for name in seed} == seed


INTEGERS = [
    "batch_size",
    "gradient_accumulation_steps",
    "samples_per_epoch",
    "num_epochs",
    "eval_interval",
    "checkpoint_interval",
    "block_size",
    "embedding_dimensions",
    "num_attention_heads",
    "num_hidden_layers",
    "num_dataset_processes",
]


@pytest.mark.parametrize("flag", INTEGERS)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_whole_numbers(error_of, flag, value):
    assert error_of([f"--{flag}={value}"]) == (
        2,
        f"error: --{flag}: must be a whole number above 0, {value} given",
    )


@pytest.mark.parametrize("flag", ["learning_rate", "max_gradient_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.1", "0", "high"])
def test_positive_numbers(error_of, flag, value):
    status, line = error_of([f"--{flag}={value}"])

    assert (status, line) == (2, f"error: --{flag}: must be a number above 0, {value} given")


@pytest.mark.parametrize("flag", ["weight_decay", "min_learning_rate"])
@pytest.mark.parametrize("value", ["nan", "inf", "-0.1"])
def test_numbers_from_zero(error_of, flag, value):
    assert error_of([f"--{flag}={value}"])[0] == 2


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "inf"])
def test_dropout(error_of, value):
    status, line = error_of([f"--dropout={value}"])

    assert (status, line) == (2, f"error: --dropout: must be from 0 to below 1, {value} given")


@pytest.mark.parametrize("value", ["-1", str(2**70), "1.5", "nan"])
def test_seeds(error_of, value):
    status, line = error_of([f"--seed={value}"])

    assert status == 2
    assert "--seed: must be a whole number from 0 to 2**63 - 1" in line


def test_heads_that_do_not_divide_the_dimensions(error_of):
    status, line = error_of(["--embedding_dimensions=770"])

    assert status == 2
    assert "770 and 12 given; the nearest valid dimensions are 768 and 780" in line


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--batch", "; did you mean --batch_size?"),
        ("--batchsize=4", "; did you mean --batch_size?"),
        ("--learning_rat", "; did you mean --learning_rate?"),
        ("--batch_sizee", "; did you mean --batch_size?"),
        ("--xyzzy", ""),
        ("something", ""),
    ],
)
def test_unknown_arguments(error_of, argument, hint):
    assert error_of([argument, "4"] if "--" in argument else [argument]) == (
        2,
        f"error: unknown argument {argument}{hint}",
    )


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--seed=1"], True),
        (["--resume=True"], True),
        (["--resume", "False"], False),
        (["--resume=no"], False),
        (["--resume=1"], True),
    ],
)
def test_booleans(pre_train, argv, value):
    assert pre_train.build_parser().parse(argv).resume is value


def test_what_is_no_boolean(error_of):
    assert error_of(["--compile=maybe"]) == (
        2,
        "error: --compile: must be True or False, maybe given",
    )


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", ""])
def test_unknown_devices(error_of, device):
    status, line = error_of([f"--device={device}"])

    assert status == 2
    assert "--device must be cuda, cuda:N, mps or cpu" in line


def test_epoch_below_one_update(error_of):
    status, line = error_of(["--samples_per_epoch=100"])

    assert status == 2
    assert "--samples_per_epoch must be at least 128" in line


def test_minimum_above_the_peak(error_of):
    assert error_of(["--min_learning_rate=0.1"])[0] == 2


@pytest.mark.parametrize(
    "dataset", [["./missing"], ["stdlib=0"], ["stdlib", "stdlib"], ["stdlib", "a/b=1.5"]]
)
def test_sources_that_are_none(error_of, dataset):
    status, line = error_of(["--dataset", *dataset])

    assert status == 2
    assert "--dataset" in line


@pytest.mark.parametrize("flag", ["preset", "optimizer", "lr_schedule", "precision"])
def test_choices(error_of, flag):
    status, line = error_of([f"--{flag}=other"])

    assert status == 2
    assert f"--{flag}: invalid choice" in line


def test_metrics_do_not_share_a_path_with_a_checkpoint(error_of):
    for name in ("a.pt", "a.best.pt", "x/../a.previous.pt"):
        status, line = error_of(["--checkpoint_path=a.pt", f"--metrics_path={name}"])

        assert status == 2
        assert "--metrics_path" in line


@pytest.mark.parametrize(
    ("checkpoint", "table", "message"),
    [
        ("a.svg", "a.csv", "--metrics_path: a.svg is the path of a checkpoint"),
        ("a.previous.svg", "x/../a.previous.csv", "a.previous.svg is"),
        ("a.csv.tmp", "a.csv", "a.csv.tmp is"),
    ],
)
def test_nothing_else_is_where_the_picture_of_the_metrics_goes(
    error_of, checkpoint, table, message
):
    status, line = error_of([f"--checkpoint_path={checkpoint}", f"--metrics_path={table}"])

    assert status == 2
    assert message in line


def test_sources_add_up_over_repeated_flags(pre_train):
    argv = ["--dataset", "a/b", "--dataset", "stdlib=2", "c/d"]

    assert pre_train.build_parser().parse(argv).dataset == ["a/b", "stdlib=2", "c/d"]


def test_help_has_a_line_for_every_flag(pre_train, capsys):
    with pytest.raises(SystemExit) as exit_:
        pre_train.main(["--help"])

    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(a.help and a.option_strings[0] in text for a in pre_train.build_parser()._actions)


def test_presets_fill_in_and_flags_override(pre_train):
    args = pre_train.build_parser().parse(
        ["--preset=gpt2-xl", "--num_hidden_layers=2"], pre_train.PRESETS
    )

    assert (args.embedding_dimensions, args.num_hidden_layers) == (1600, 2)
    assert args.given == {"preset", "num_hidden_layers"}


@pytest.mark.parametrize("script", ["pre-train", "fine-tune", "generate", "convert"])
def test_a_tilde_is_the_home_of_the_user(script, monkeypatch, capsys):
    """Behind an equals sign the shell leaves it as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = importlib.import_module(script).build_parser()
    for action in parser._actions:
        is_path = action.type is arguments.path_str
        is_other_text = action.choices or action.dest in ("help", "prompt", "device")
        assert is_path or action.type or is_other_text, f"--{action.dest} may be a path"

        if is_path:
            flag = f"--{action.dest}"
            given = getattr(parser.parse([f"{flag}=~/x"]), action.dest)
            assert given in ("/home/me/x", ["/home/me/x"])

            with pytest.raises(SystemExit, match="2"):
                parser.parse([f"{flag}=~nobody-of-this-name/x"])

            assert f"{flag}: ~nobody-of-this-name is no home" in capsys.readouterr().err
