"""The picture of a run, read back from what was drawn, and the record that it belongs to."""

import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from training import metrics
from training.metrics import SOURCE_LOSS, MetricsFile, picture_path
from training.pictures import HEIGHT, WIDTH, draw_curves, thin

SVG = "{http://www.w3.org/2000/svg}"
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def make_row(epoch: int, train_loss: float, test_loss: float | None = None, **others) -> dict:
    row = dict.fromkeys(MetricsFile.COLUMNS, 1)
    perplexity = None if test_loss is None else math.exp(test_loss)

    return {
        **row,
        "epoch": epoch,
        "tokens": 51200 * epoch,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "perplexity": perplexity,
        "learning_rate": 5e-4 / epoch,
        **others,
    }


def make_rows(num_rows: int, interval: int = 1) -> list[dict]:
    def loss(epoch: int) -> float:
        return 2.5 + 8.3 * epoch**-0.7

    return [
        make_row(epoch, loss(epoch), loss(epoch) - 0.1 if epoch % interval == 0 else None)
        for epoch in range(1, num_rows + 1)
    ]


def parse(rows: list[dict], sources: dict | None = None, title: str = "run"):
    return ElementTree.fromstring(draw_curves(rows, sources or {}, title))


def texts(picture, style: str = "") -> list:
    nodes = picture.iter(f"{SVG}text")

    return [node for node in nodes if not style or style in node.get("class").split()]


def value_of(label: str) -> float:
    return float(label.rstrip("kMBT")) * SUFFIXES.get(label[-1], 1)


def axis(picture, style: str, position: str):
    """Return the values of pixels, by a straight line through the first and the last tick."""
    first, *_, last = texts(picture, style)
    ends = [(float(node.get(position)), value_of(node.text)) for node in (first, last)]
    (start, low), (end, high) = ends

    return lambda pixel: low + (pixel - start) * (high - low) / (end - start)


def points(picture, style: str, y_style: str = "y") -> list[tuple[float, float]]:
    """Return the tokens and values of a line, as somebody with a ruler reads them."""
    x, y = axis(picture, "x", "x"), axis(picture, y_style, "y")
    # Beside a tick stands its number, whose base line is lower.
    shift = 4.5
    line = next(n for n in picture.iter(f"{SVG}polyline") if n.get("class").split()[0] == style)
    pairs = [map(float, pair.split(",")) for pair in line.get("points").split()]

    return [(x(across), y(down + shift)) for across, down in pairs]


def test_lines_are_where_the_ticks_say():
    rows = make_rows(14, interval=7)
    picture = parse(rows)
    lines = (("train", "train_loss"), ("test", "test_loss"), ("rate", "learning_rate"))

    for style, column in lines:
        expected = [(row["tokens"], row[column]) for row in rows if row[column] is not None]
        found = points(picture, style, "rate-y" if style == "rate" else "y")
        tolerance = 2e-6 if style == "rate" else 0.02

        assert [tokens for tokens, _ in found] == pytest.approx([t for t, _ in expected], abs=300)
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], abs=tolerance
        )

    assert len(list(picture.iter(f"{SVG}circle"))) == 2


def test_title_has_the_last_and_the_best_test():
    rows = [make_row(1, 3.0, 2.5), make_row(2, 3.0, 2.0), make_row(3, 3.0, 2.25)]
    told = "run: test loss 2.250 (perplexity 9.5), best 2.000 (7.4) at 102.4k"

    assert parse(rows).find(f"{SVG}title").text == told
    assert texts(parse(rows), "head")[0].text == told
    assert texts(parse(rows[:2]), "head")[0].text.endswith(
        "2.000 (perplexity 7.4), the best so far"
    )
    assert texts(parse([make_row(1, 3.0)]), "head")[0].text == "run: train loss 3.000, no test yet"
    assert "no epoch has ended" in texts(parse([]), "head")[0].text


def test_high_losses_at_the_beginning_are_cut_off_and_counted():
    rows = make_rows(500, interval=10)
    picture = parse(rows)
    note = next(node.text for node in texts(picture, "soft") if "cut off" in node.text)
    top, cut, total, highest = re.search(
        r"above ([\d.]+): (\d+) of (\d+) losses, up to ([\d.]+)", note
    ).groups()
    losses = [r["train_loss"] for r in rows] + [r["test_loss"] for r in rows if r["test_loss"]]

    assert int(cut) == sum(loss > float(top) for loss in losses) > 0
    assert int(total) == len(losses)
    assert float(highest) == round(max(losses), 3)
    assert float(top) < 4 < max(losses)
    assert not any("cut off" in node.text for node in texts(parse(make_rows(14)), "soft"))


def box(node) -> tuple[float, float, float, float]:
    """Return left, right, top and bottom of a text, by the width of common letters."""
    size = 16 if "head" in node.get("class") else 13
    x, y, width = float(node.get("x")), float(node.get("y")), 0.58 * size * len(node.text)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[node.get("text-anchor")]

    return left, left + width, y - 0.75 * size, y + 0.2 * size


def many_sources(num_sources: int) -> tuple[list[dict], dict[str, str]]:
    names = [f"a-source-with-a-long-name-{number}" for number in range(num_sources)]
    columns = {name: SOURCE_LOSS + name for name in names}
    rows = [
        {
            **row,
            **{column: row["test_loss"] + 0.001 * n for n, column in enumerate(columns.values())},
        }
        for row in make_rows(20)
    ]

    return rows, columns


@pytest.mark.parametrize(
    ("rows", "sources"),
    [
        (make_rows(14, 7), {}),
        (make_rows(1), {}),
        (make_rows(2000, 10), {}),
        ([], {}),
        many_sources(3),
        many_sources(30),
        ([make_row(n, 1e-7 * n, 1e-9, tokens=n) for n in (1, 2)], {}),
        ([make_row(n, 1e30 * n, 650.0, tokens=n * 10**15) for n in (1, 2)], {}),
        ([make_row(1, 0.0, 0.0, tokens=0, learning_rate=0.0)], {}),
    ],
)
def test_texts_stay_inside_and_apart(rows, sources):
    boxes = [box(node) for node in texts(parse(rows, sources, "a-title-of-more-than-a-line" * 9))]

    assert len(boxes) >= 2

    for left, right, top, bottom in boxes:
        assert left >= 0
        assert right <= WIDTH
        assert top >= 0
        assert bottom <= HEIGHT

    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            is_beside = one[1] <= other[0] or other[1] <= one[0]
            assert is_beside or one[3] <= other[2] or other[3] <= one[2], (one, other)


def test_every_source_has_a_line_and_a_label():
    rows, sources = many_sources(3)
    picture = parse(rows, sources)
    labels = [node.text for node in texts(picture, "end")]

    for number, column in enumerate(sources.values()):
        found = [value for _, value in points(picture, f"source{number}")]
        assert found == pytest.approx([row[column] for row in rows], abs=0.03)
        assert any(label.endswith(f" {rows[-1][column]:.3f}") for label in labels)

    assert any(label.startswith("test, mean ") for label in labels)
    told = [node.text for node in texts(parse(*many_sources(30)), "soft")]
    assert any("22 sources are in the table alone" in line for line in told)


def test_names_with_marks_of_xml_come_out_as_they_are():
    names = ["<&\"'>", "]]>", "bell\a", "half \ud800"]
    sources = {name: SOURCE_LOSS + name for name in names}
    rows = [{**make_row(n, 3.0, 2.5), **dict.fromkeys(sources.values(), 2.0)} for n in (1, 2)]
    drawn = draw_curves(rows, sources, "<&>")
    labels = [node.text for node in texts(ElementTree.fromstring(drawn.encode()), "end")]

    assert [label.rsplit(" ", 1)[0] for label in labels if label.endswith(" 2.000")] == [
        "<&\"'>",
        "]]>",
        "bell\N{REPLACEMENT CHARACTER}",
        "half \N{REPLACEMENT CHARACTER}",
    ]


def test_values_that_are_none_leave_no_point():
    rows = make_rows(4)
    rows[1]["test_loss"], rows[2]["test_loss"] = math.nan, math.inf
    drawn = draw_curves(rows, {"gone": "no such column"}, "run")

    assert not re.search(r"\b(nan|inf)\b", drawn)
    assert len(points(ElementTree.fromstring(drawn), "test")) == 2


def test_thinning_keeps_ends_and_extremes():
    values = [math.sin(n / 50) for n in range(30_000)]
    values[12_345], values[23_456] = 9.0, -9.0
    kept = thin(list(enumerate(values)), 1000)

    assert len(kept) <= 1000
    assert kept == sorted(set(kept))
    assert set(kept) < set(enumerate(values))
    assert kept[0] == (0, values[0])
    assert kept[-1] == (29_999, values[-1])
    assert {(12_345, 9.0), (23_456, -9.0)} < set(kept)
    assert thin(kept, 1000) == kept


def test_a_long_run_is_a_small_file_and_the_same_twice():
    rows, sources = many_sources(30)
    rows = [{**rows[n % 20], "tokens": 4096 * 1024 * n} for n in range(20_000)]
    drawn = draw_curves(rows, sources, "run")

    assert len(drawn.encode()) < 200_000
    assert draw_curves([dict(row) for row in rows], dict(sources), "run") == drawn


def test_picture_needs_nothing_from_elsewhere():
    drawn = draw_curves(make_rows(3), {}, "run")
    root = ElementTree.fromstring(drawn)

    assert root.get("role") == "img"
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    assert root.find(f"{SVG}desc").text
    assert "@media (prefers-color-scheme:dark)" in drawn
    assert not re.search(r"href|@import|<script|url\((?!#)", drawn)


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
    record = MetricsFile(tmp_path / "run.csv", [])
    picture = tmp_path / "run.svg"
    before = picture.read_bytes()

    record.add(make_row(1, 3.0))
    assert picture.read_bytes() == before

    record.add(make_row(2, 2.9, 2.8))
    assert len(points(ElementTree.parse(picture).getroot(), "train")) == 2

    record.add(make_row(3, 2.8))
    record.draw()
    assert len(points(ElementTree.parse(picture).getroot(), "train")) == 3
    assert {path.name for path in tmp_path.iterdir()} - {"runs"} == {"run.csv", "run.svg"}


def test_picture_that_cannot_be_written_is_one_note(tmp_path, capsys):
    (tmp_path / "run.svg").mkdir()
    record = MetricsFile(tmp_path / "run.csv", [])
    record.add(make_row(1, 3.0, 2.9))
    record.add(make_row(2, 2.9, 2.8))
    lines = capsys.readouterr().err.splitlines()

    assert lines == [f"Note:   {tmp_path / 'run.svg'} was not drawn: Is a directory"]
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_picture_that_was_cut_short_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    record = MetricsFile(tmp_path / "run.csv", [make_row(1, 3.0, 2.9)])
    before = (tmp_path / "run.svg").read_bytes()

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "replace", replace)
    record.add(make_row(2, 2.9, 2.8))

    assert (tmp_path / "run.svg").read_bytes() == before
    assert "was not drawn: No space left on device" in capsys.readouterr().err
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
