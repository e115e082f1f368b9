"""Imports run one way: a file may import what is below it, and nothing imports a script."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# From the bottom up: what each folder or file of the root may import of ours beside itself.
MAY_IMPORT = {
    "system": set(),
    "loss": set(),
    "model": {"loss"},
    "text": {"system"},
    "data": {"system", "text"},
    "inference": {"model", "system", "text"},
    "training": {"data", "loss", "model", "system", "text"},
    "interop": {"model", "system", "text", "training"},
}
SCRIPTS = ("pre-train", "fine-tune", "generate", "convert")


def modules_of(root: Path) -> dict[str, Path]:
    """Return the modules of the project by their dotted names."""
    files = [*root.glob("*.py"), *(f for name in MAY_IMPORT for f in root.glob(f"{name}/*.py"))]

    return {
        file.relative_to(root).with_suffix("").as_posix().replace("/", "."): file for file in files
    }


def imports_of(file: Path, names: set[str]) -> set[str]:
    """Return which of these modules a file imports, also inside of functions."""
    found = set()

    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}

    return found & names


def broken_rules(root: Path) -> list[str]:
    modules = modules_of(root)
    arrows = {name: imports_of(file, set(modules)) for name, file in modules.items()}
    broken = []

    for name, imported in arrows.items():
        room = name.partition(".")[0]

        for other in sorted(imported):
            target = other.partition(".")[0]

            if target in SCRIPTS:
                broken.append(f"{name} imports the script {other}")
            elif room not in SCRIPTS and target not in MAY_IMPORT[room] | {room}:
                broken.append(f"{name} imports {other}")

    # What is left when modules that import nothing are taken away again and again is in a circle.
    while free := [name for name, imported in arrows.items() if not imported & arrows.keys()]:
        for name in free:
            del arrows[name]

    return broken + [f"{name} is in a circle of imports" for name in sorted(arrows)]


def test_imports_run_one_way():
    assert broken_rules(ROOT) == []


def test_root_has_what_a_reader_came_for():
    assert {file.stem for file in ROOT.glob("*.py")} == {*SCRIPTS, "model", "loss", "data"}


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("model.py", "from text import tokenizer", "model imports text.tokenizer"),
        ("text/hub.py", "import data", "text.hub imports data"),
        ("training/run.py", "def f():\n    import generate", "imports the script generate"),
        ("system/locks.py", "from system.files import x", "system.locks is in a circle of imports"),
    ],
)
def test_a_broken_direction_is_found(tmp_path, file, line, message):
    for name in ("text/tokenizer", "data", "generate", "system/files"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("from system import locks\n" if name == "system/files" else "")

    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line + "\n")

    assert message in "; ".join(broken_rules(tmp_path))


@pytest.mark.parametrize("file", sorted(modules_of(ROOT).values()), ids=lambda file: file.name)
def test_every_module_opens_with_its_job(file):
    assert ast.get_docstring(ast.parse(file.read_text())), "no docstring"
