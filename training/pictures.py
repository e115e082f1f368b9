"""Draws the losses and the learning rate of a run over its tokens, by matplotlib as SVG.

The SVG has the colors of light pages; its style sheet inverts them where pages are dark.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator

LIGHT = {
    "ink": "#1c2128",
    "soft": "#5b6470",
    "grid": "#e4e7eb",
    "train": "#6b7583",
    "test": "#0065a3",
}
SOURCE_COLORS = ("#c04a00", "#00765a", "#9c3d78", "#7a6100", "#b3202c", "#4b4fb8")
# Each color serves two sources; the line of the second one is dashed.
SOURCE_STYLES: list[dict] = [
    {"color": color, "linestyle": dash, "linewidth": 1.8}
    for dash in ("-", "--")
    for color in SOURCE_COLORS
]

# More markers would hide the line.
MAX_MARKERS = 40
# Fewer losses are all shown, however high the first one is.
MIN_LOSSES_TO_CUT = 40

# One point of matplotlib is one unit of the SVG.
SIZE = (800 / 72, 500 / 72)
# Turned by half a circle after they are inverted, colors keep their hue.
STYLE = """<style>
text { font-family: system-ui, sans-serif !important }
@media (prefers-color-scheme: dark) { :root { filter: invert(0.92) hue-rotate(180deg) } }
</style>"""
SETTINGS = {
    "axes.edgecolor": LIGHT["grid"],
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["soft"],
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "font.size": 12,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.markersize": 4.5,
    # Drop the points of a long run that nobody would see.
    "path.simplify_threshold": 1.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "curves",
    "text.color": LIGHT["ink"],
    # A name with dollar signs is no formula.
    "text.parse_math": False,
    "xtick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.color": LIGHT["soft"],
    "ytick.major.size": 0,
}

Points = list[tuple[float, float]]


def draw_curves(rows: list[dict], sources: dict[str, str], title: str) -> str:
    """Draw the losses and the learning rate of a run over its tokens.

    Args:
        rows: of the metrics, one an epoch; values that are missing or not finite leave no point.
        sources: the columns with the test losses of several sources, by their names.

    Returns:
        An SVG document, of at most 45 KB a line, however long the run; the same for the same rows.
    """
    title = f"{shorten(title)}: {summarize(rows)}"
    note = f"{len(rows):,} epoch{'s' * (len(rows) > 1)}, {count_text(rows[-1]['tokens'])} tokens"
    with settings():
        from matplotlib.figure import Figure

        figure = Figure(SIZE)
        losses, rates = figure.subplots(2, sharex=True, height_ratios=(6, 1))
        figure.subplots_adjust(left=0.09, right=0.75, bottom=0.07, top=0.83, hspace=0.28)
        note += draw_losses(losses, rows, sources)
        draw_rates(rates, rows)
        figure.text(0.02, 0.94, title, fontsize=14, fontweight="bold")
        figure.text(0.02, 0.895, note, color=LIGHT["soft"])
        return to_svg(figure, title)


def draw_losses(axes, rows: list[dict], sources: dict[str, str]) -> str:
    """Draw all losses, the test loss on top; return a note of what the picture leaves out."""
    shown = list(zip(sources.items(), SOURCE_STYLES, strict=False))
    name = "test, mean" if sources else "test"
    lines = [
        ("train", "train_loss", {"color": LIGHT["train"], "linewidth": 1.3}),
        *((name, column, style) for (name, column), style in shown),
        (name, "test_loss", {"color": LIGHT["test"], "linewidth": 2.8}),
    ]
    losses, note = [], ""
    for name, column, style in lines:
        if points := points_of(rows, column):
            losses += [loss for _, loss in points]
            plot(axes, points, label=f"{points[-1][1]:.3f} {shorten(name)}", **style)

    axes.set_title("loss, nats per token")
    if losses:
        low, high = min(losses), max(losses)
        if (top := highest_to_show(losses)) < high:
            axes.set_ylim(low - 0.05 * (top - low), top)
            note += f"; cut off above {top:.3f}, losses are up to {high:.3f}"

        # The highest line comes first.
        handles = sorted(axes.lines, key=lambda line: line.get_ydata()[-1], reverse=True)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)

    if num_hidden := len(sources) - len(shown):
        note += f"; {num_hidden} more sources are in the table"

    return note


def draw_rates(axes, rows: list[dict]) -> None:
    """Draw the learning rate, and below it the tokens."""
    rates = points_of(rows, "learning_rate")
    plot(axes, rates, color=LIGHT["soft"], linewidth=1.3, markersize=2.5)
    axes.set_title("learning rate")
    axes.set_ylim(0, 1.1 * max((rate for _, rate in rates), default=0))
    axes.set_xlim(0, 1.01 * rows[-1]["tokens"])
    axes.locator_params(axis="y", nbins=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
    # Beside the numbers.
    axes.text(1.04, -0.06, "tokens", va="top", color=LIGHT["soft"], transform=axes.transAxes)


def plot(axes, points: Points, **style) -> None:
    """Draw a line, with markers when its points are few."""
    marker = "o" if len(points) <= MAX_MARKERS else None
    axes.plot(*zip(*points, strict=True), marker=marker, **style)


def points_of(rows: list[dict], column: str) -> Points:
    """Return the finite values of a column over the tokens of their rows."""
    pairs = [(row["tokens"], row.get(column)) for row in rows]
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def highest_to_show(losses: list[float]) -> float:
    """Return the greatest loss, or one a little above 95 % of them.

    A run begins at 10.8 nats, and can leap there again: that would squash all else.
    """
    low, high = min(losses), max(losses)
    usual = sorted(losses)[int(0.95 * (len(losses) - 1))]
    if len(losses) >= MIN_LOSSES_TO_CUT and high - low > 3 * (usual - low) > 0:
        return low + 1.33 * (usual - low)

    return high


def summarize(rows: list[dict]) -> str:
    """Return the last and the best test loss, as far as there are any."""
    tested = [row for row in rows if points_of([row], "test_loss")]
    if not tested:
        return "no test yet"

    last, best = tested[-1], min(tested, key=lambda row: row["test_loss"])
    text = f"test loss {last['test_loss']:.3f} (perplexity {last['perplexity']:,.1f})"
    if last["test_loss"] == best["test_loss"]:
        return f"{text}, the best so far"

    tokens = count_text(best["tokens"])
    return f"{text}, best {best['test_loss']:.3f} ({best['perplexity']:,.1f}) at {tokens} tokens"


def count_text(count: float) -> str:
    """Write a number of tokens in thousands, millions, billions or trillions."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.4g}{suffix}"

    return f"{count:.4g}"


def shorten(name: str) -> str:
    """Return at most 16 characters of a name, all of which XML can hold."""
    name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    return name if len(name) <= 16 else f"{name[:15]}…"


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Make matplotlib draw by SETTINGS alone, whatever a matplotlibrc says.

    Its warnings, of the cache of fonts or of missing glyphs, are silenced.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import matplotlib.style

        with matplotlib.style.context(["default", SETTINGS]):
            yield


def to_svg(figure, title: str) -> str:
    """Return a figure as an SVG document that is readable in light and dark."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Creator": None, "Date": None})
    return file.getvalue().replace("</svg>", f"{STYLE}</svg>")
