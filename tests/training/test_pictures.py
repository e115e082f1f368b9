"""The picture of a run, read back from what was drawn, and the record that it belongs to."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from training.metrics import SOURCE_LOSS, MetricsFile, picture_path
from training.pictures import LIGHT, SOURCE_COLORS, draw_curves

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parent.parent.parent
NAMES = [f"source-{number}" for number in range(12)]


def make_row(epoch: int, train_loss: float, test_loss: float | None = None, **others) -> dict:
    return {
        **dict.fromkeys(MetricsFile.COLUMNS, 1),
        "epoch": epoch,
        "tokens": 51200 * epoch,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "perplexity": None if test_loss is None else math.exp(test_loss),
        "learning_rate": 5e-4 / epoch,
        **others,
    }


def make_rows(num_rows: int, interval: int = 1) -> list[dict]:
    """Return rows of a run whose loss falls from 10.8 nats to 2.5."""
    losses = [2.5 + 8.3 * epoch**-0.7 for epoch in range(1, num_rows + 1)]

    return [
        make_row(epoch, loss, loss - 0.1 if epoch % interval == 0 else None)
        for epoch, loss in enumerate(losses, 1)
    ]


def with_sources(rows: list[dict], *names: str) -> tuple[list[dict], dict[str, str]]:
    """Give each source a test loss of its own, 0.1 nats above the source before."""
    columns = {name: SOURCE_LOSS + name for name in names}

    for row in rows:
        row |= {c: row["test_loss"] + 0.1 * number for number, c in enumerate(columns.values())}

    return rows, columns


def parse(rows: list[dict], sources: dict | None = None, title: str = "run"):
    return ElementTree.fromstring(draw_curves(rows, sources or {}, title).encode())


def texts(picture) -> list[str]:
    return [node.text or "" for node in picture.iter(f"{SVG}text")]


def labels_of(picture) -> list[list[str]]:
    """Return the last values of the lines and their names."""
    return [text.split(" ", 1) for text in texts(picture) if re.match(r"\d+\.\d{3} ", text)]


def scale(axes, letter: str):
    """Return the values of pixels, by a straight line through the first and the last grid line."""
    ticks = []

    for group in axes.iter(f"{SVG}g"):
        if group.get("id", "").startswith(f"{letter}tick"):
            _, x, y, *_ = group.find(f".//{SVG}path").get("d").split()
            label = group.find(f".//{SVG}text").text.replace("k", "e3").replace("M", "e6")
            ticks.append((float(x if letter == "x" else y), float(label)))

    (start, low), *_, (end, high) = ticks

    return lambda pixel: low + (pixel - start) * (high - low) / (end - start)


def points(picture, color: str) -> list[tuple[float, float]]:
    """Return tokens and values of all markers of a color, as somebody with a ruler reads them."""
    losses, rates = (picture.find(f".//{SVG}g[@id='axes_{number}']") for number in (1, 2))
    axes = rates if color == LIGHT["soft"] else losses
    x, y = scale(rates, "x"), scale(axes, "y")

    return [
        (x(float(node.get("x"))), y(float(node.get("y"))))
        for node in axes.findall(f"./{SVG}g/{SVG}g[@clip-path]/{SVG}use")
        if f"fill: {color}" in node.get("style")
    ]


@pytest.mark.parametrize(("num_rows", "interval"), [(1, 1), (2, 1), (14, 7)])
def test_points_are_where_the_ticks_say(num_rows, interval):
    rows = make_rows(num_rows, interval)
    picture = parse(rows)

    for column, name in (("train_loss", "train"), ("test_loss", "test"), ("learning_rate", "soft")):
        expected = [(row["tokens"], row[column]) for row in rows if row[column] is not None]
        found = points(picture, LIGHT[name])

        assert len(found) == len(expected)

        for point, pair in zip(found, expected, strict=True):
            assert point == pytest.approx(pair, rel=1e-4)


def test_title_has_the_last_and_the_best_test():
    rows = [make_row(1, 3.0, 2.5), make_row(2, 3.0, 2.0), make_row(3, 3.0, 2.25)]
    title = "run: test loss 2.250 (perplexity 9.5), best 2.000 (7.4) at 102.4k tokens"

    assert parse(rows).find(f"{SVG}title").text == title
    assert title in texts(parse(rows))
    assert "run: test loss 2.000 (perplexity 7.4), the best so far" in texts(parse(rows[:2]))
    assert "run: no test yet" in texts(parse([make_row(1, 3.0)]))


def test_high_losses_at_the_beginning_are_cut_off():
    rows = make_rows(2000, interval=10)
    rows[1000]["train_loss"] = 1e4
    picture = parse(rows)
    numbers = r"cut off above ([\d.]+), losses are up to ([\d.]+)"
    top, highest = re.search(numbers, " ".join(texts(picture))).groups()
    value = scale(picture.find(f".//{SVG}g[@id='axes_1']"), "y")

    assert float(highest) == 1e4
    assert 2.6 < float(top) < 4
    # The whole height of the picture.
    assert value(85) == pytest.approx(float(top), abs=0.01)
    assert value(358) > 2

    # Of few losses none is cut off.
    few = [make_row(1, 10.8), make_row(2, 3.1), make_row(3, 3.0)]
    assert "3 epochs, 153.6k tokens" in texts(parse(few))


def test_every_source_has_a_line_and_a_label():
    rows, sources = with_sources(make_rows(20), *NAMES)
    picture = parse(rows, sources)
    labels = {name: value for value, name in labels_of(picture)}
    columns = {"train": "train_loss", "test, mean": "test_loss", **sources}

    assert labels == {name: f"{rows[-1][column]:.3f}" for name, column in columns.items()}
    # The highest line has the highest label.
    assert [*labels.values()] == sorted(labels.values(), key=float, reverse=True)

    # Two sources share a color.
    for number in range(6):
        pair = [sources[NAMES[number]], sources[NAMES[number + 6]]]
        found = [value for _, value in points(picture, SOURCE_COLORS[number])]
        assert found == pytest.approx([row[column] for column in pair for row in rows], abs=1e-3)

    more = with_sources(rows, *NAMES, "a", "b")
    assert any("2 more sources are in the table" in text for text in texts(parse(*more)))


def test_names_come_out_as_they_are_as_far_as_xml_can_hold_them(recwarn):
    plain = ["<&\"'>", "]]>", "$x^2$", "$\\frac$", "_hidden", "%s {x}", "日本語", ""]
    replaced = {
        "bell\a\n": "bell\ufffd\ufffd",
        "half \ud800": "half \ufffd",
        "x" * 17: "x" * 15 + "…",
    }
    rows, sources = with_sources(make_rows(3), *plain, *replaced)
    picture = parse(rows, sources, "<$&\a>")
    found = {name for _, name in labels_of(picture)}

    assert found == {*plain, *replaced.values(), "train", "test, mean"}
    assert picture.find(f"{SVG}title").text.startswith("<$&\ufffd>: ")
    # Fonts lack some of these characters.
    assert not list(recwarn)


def test_values_that_are_missing_or_not_finite_leave_no_point():
    rows = make_rows(4)
    rows[1]["test_loss"], rows[2]["test_loss"] = math.nan, math.inf
    rows[3]["train_loss"], rows[3]["learning_rate"] = -math.inf, None
    picture = parse(rows, {"gone": "no such column"})

    assert [len(points(picture, LIGHT[name])) for name in ("test", "train", "soft")] == [2, 3, 3]
    assert "run: no test yet" in texts(parse([make_row(1, math.nan, learning_rate=math.nan)]))
    assert "1 epoch, 0 tokens" in texts(parse([make_row(1, 0.0, 0.0, tokens=0, learning_rate=0)]))
    assert "1 epoch, 2000T tokens" in texts(parse([make_row(1, 1e38, 650.0, tokens=2 * 10**15)]))


def test_a_long_run_is_a_small_file_and_the_same_twice():
    sizes = []
    for num_rows in (2000, 20_000):
        rows, sources = with_sources(make_rows(num_rows), *NAMES)
        for number, row in enumerate(rows):
            for column in ("train_loss", "test_loss", *sources.values()):
                row[column] += math.sin(number**2)

        sizes.append(len(draw_curves(rows, sources, "run").encode()))

    assert 100_000 < sizes[0] < 45_000 * (len(NAMES) + 3)
    assert sizes[1] < 45_000 * (len(NAMES) + 3)

    rows, sources = with_sources(make_rows(100), *NAMES)
    drawn = draw_curves(rows, sources, "run")
    assert draw_curves([dict(row) for row in rows], dict(sources), "run") == drawn


def test_dark_pages_have_the_same_hues_on_dark_paper():
    drawn = draw_curves(*with_sources(make_rows(3), *NAMES), "run")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))

    assert used == {"#ffffff", *LIGHT.values(), *SOURCE_COLORS}
    # The paper is a shape of its own, which the filter reaches.
    assert drawn.index("fill: #ffffff") < min(drawn.index(f": {color}") for color in LIGHT.values())
    assert "(prefers-color-scheme: dark) { :root { filter: invert(0.92) hue-rotate(180deg)" in drawn
    # Nothing comes from elsewhere.
    assert not re.search(r'href="(?!#)|@import|<script|url\((?!#)', drawn)


# --- The record of a run ---


def test_metrics_begin_with_the_rows_of_a_resumed_run(tmp_path):
    row = dict.fromkeys(MetricsFile.COLUMNS, 1)
    path = tmp_path / "metrics.csv"
    MetricsFile(path, []).add(row)
    MetricsFile(path, [{**row, "epoch": 1, "test_loss": None}]).add({**row, "epoch": 2})
    lines = path.read_text().splitlines()

    assert lines[0] == ",".join(MetricsFile.COLUMNS)
    assert lines[1].startswith("1,1,1,1,,1")
    assert lines[2].startswith("2,")
    assert len(lines) == 3


def test_picture_is_drawn_when_there_is_a_test(tmp_path):
    picture = tmp_path / "run.svg"
    picture.write_text("of an earlier run")
    record = MetricsFile(tmp_path / "run.csv", [])
    record.add(make_row(1, 3.0))
    assert not picture.exists()

    record.add(make_row(2, 2.9, 2.8))
    assert "2 epochs, 102.4k tokens" in picture.read_text()

    record.add(make_row(3, 2.8))
    assert "2 epochs, 102.4k tokens" in picture.read_text()

    record.draw()
    assert "3 epochs, 153.6k tokens" in picture.read_text()
    assert {path.name for path in tmp_path.iterdir()} - {"runs"} == {"run.csv", "run.svg"}


FIRST_TEST = """
import sys
from pathlib import Path
sys.modules["torch.utils.tensorboard"] = None
from training.metrics import MetricsFile
row = dict.fromkeys(MetricsFile.COLUMNS, 1)
record = MetricsFile(Path(sys.argv[1]), [])
record.add({**row, "test_loss": None})
assert "matplotlib" not in sys.modules
record.add(row)
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_is_imported_with_the_first_test_whatever_its_settings_are(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.bbox: tight\n")
    command = [sys.executable, "-c", FIRST_TEST, tmp_path / "run.csv"]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    row = dict.fromkeys(MetricsFile.COLUMNS, 1)
    drawn = draw_curves([{**row, "test_loss": None}, row], {}, "run")

    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "run.svg").read_text() == drawn


def test_picture_that_cannot_be_written_is_one_note(tmp_path, capsys):
    (tmp_path / "run.svg").mkdir()
    record = MetricsFile(tmp_path / "run.csv", [])
    record.add(make_row(1, 3.0, 2.9))
    record.add(make_row(2, 2.9, 2.8))
    lines = capsys.readouterr().err.splitlines()

    assert lines == [f"Note:   {tmp_path / 'run.svg'} was not drawn: Is a directory"]
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_run_without_matplotlib_has_one_note_and_no_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    record = MetricsFile(tmp_path / "run.csv", [])
    record.add(make_row(1, 3.0, 2.9))
    record.add(make_row(2, 2.9, 2.8))
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith(f"Note:   {tmp_path / 'run.svg'} was not drawn: import of matplotlib")
    assert not (tmp_path / "run.svg").exists()


def test_picture_that_was_cut_short_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    record = MetricsFile(tmp_path / "run.csv", [make_row(1, 3.0, 2.9)])
    before = (tmp_path / "run.svg").read_bytes()

    def replace(*_):
        raise OSError(28, "No space left on\ndevice")

    monkeypatch.setattr(os, "replace", replace)
    record.add(make_row(2, 2.9, 2.8))

    assert (tmp_path / "run.svg").read_bytes() == before
    assert "was not drawn: No space left on device\n" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("table", "picture"),
    [("out/a.csv", "out/a.svg"), ("a", "a.svg"), ("a.b.csv", "a.b.svg"), (".svg", ".svg.svg")],
)
def test_picture_has_the_name_of_its_table(table, picture):
    assert picture_path(Path(table)) == Path(picture)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()

    return {
        name: [(event.step, event.value) for event in board.Scalars(name)]
        for name in board.Tags()["scalars"]
    }


def test_tensorboard_has_the_rows_once_after_resuming(tmp_path, capfd):
    names = ("left", "right")
    columns = [SOURCE_LOSS + name for name in names]
    rows = [
        {
            **make_row(n, 3.0 - n / 8, 2.5 - n / 8 if n > 1 else None),
            **dict.fromkeys(columns, n / 4),
        }
        for n in range(1, 5)
    ]
    killed = MetricsFile(tmp_path / "run.csv", [], names)

    for row in rows[:3]:
        killed.add(row)

    # The third row was in no checkpoint.
    resumed = MetricsFile(tmp_path / "run.csv", rows[:2], names)

    for row in rows[2:]:
        resumed.add(row)

    found = scalars(tmp_path / "runs" / "run")
    assert found.keys() == {*MetricsFile.COLUMNS, *columns} - {"epoch"}

    for name, events in found.items():
        expected = [(row["epoch"], row[name]) for row in rows if row[name] is not None]
        assert [step for step, _ in events] == [step for step, _ in expected]
        assert [value for _, value in events] == pytest.approx([value for _, value in expected])

    assert capfd.readouterr() == ("", "")


def test_nothing_is_said_or_written_without_tensorboard(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    MetricsFile(tmp_path / "run.csv", []).add(make_row(1, 3.0, 2.9))

    assert {path.name for path in tmp_path.iterdir()} == {"run.csv", "run.svg"}
    assert capfd.readouterr() == ("", "")
