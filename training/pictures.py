"""Draws the losses and the learning rate of a run over its tokens, by matplotlib as SVG.

The SVG has the colors of light pages; its style sheet replaces them where pages are dark.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator

# In light and in dark.
COLORS = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1c2128", "#eceff3"),
    "soft": ("#5b6470", "#a2abb7"),
    "grid": ("#e4e7eb", "#2b3038"),
    "train": ("#6b7583", "#8f99a7"),
    "test": ("#0065a3", "#5cb8ee"),
    "source0": ("#c04a00", "#f5a04c"),
    "source1": ("#00765a", "#35c9a0"),
    "source2": ("#9c3d78", "#e79ac6"),
    "source3": ("#7a6100", "#e2cd5a"),
    "source4": ("#b3202c", "#ff7d7d"),
    "source5": ("#4b4fb8", "#a9acff"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}
# Each color serves two sources; the line of the second one is dashed.
SOURCE_STYLES: list[dict] = [
    {"color": color, "linestyle": dash, "linewidth": 1.8}
    for dash in ("-", "--")
    for name, color in LIGHT.items()
    if name.startswith("source")
]

# More markers would hide the line.
MAX_MARKERS = 40
# Points in all lines together: some 25 bytes each.
MAX_POINTS = 7000
# Fewer losses are all shown, however high the first one is.
MIN_LOSSES_TO_CUT = 40

# One point of matplotlib is one unit of the SVG.
SIZE = (800 / 72, 500 / 72)
FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
SETTINGS = {
    "axes.edgecolor": LIGHT["grid"],
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["soft"],
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": LIGHT["paper"],
    "font.size": 12,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.markersize": 4.5,
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
        An SVG document of less than 250 KB; the same for the same rows.
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
            label = f"{points[-1][1]:.3f} {shorten(name)}"
            plot(axes, points, MAX_POINTS // len(lines), label=label, **style)

    axes.set_title("loss, nats per token")
    if losses:
        bottom, top = visible_range(losses)
        axes.set_ylim(bottom, top)
        # The highest line comes first.
        handles = sorted(axes.lines, key=lambda line: line.get_ydata()[-1], reverse=True)
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
        if cut := sum(loss > top for loss in losses):
            note += f"; cut off above {top:.3f}: {cut:,} of {len(losses):,} losses"
            note += f", up to {max(losses):.3f}"

    if num_hidden := len(sources) - len(shown):
        note += f"; {num_hidden} more sources are in the table"

    return note


def draw_rates(axes, rows: list[dict]) -> None:
    """Draw the learning rate, and below it the tokens."""
    rates = points_of(rows, "learning_rate")
    style = {"color": LIGHT["soft"], "linewidth": 1.3, "markersize": 2.5}
    plot(axes, rates, MAX_POINTS // 10, **style)
    axes.set_title("learning rate")
    axes.set_ylim(0, 1.1 * max((rate for _, rate in rates), default=0))
    axes.set_xlim(0, 1.01 * rows[-1]["tokens"])
    axes.locator_params(axis="y", nbins=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(lambda tokens, _: count_text(tokens))
    # Beside the numbers.
    axes.text(1.04, -0.06, "tokens", va="top", color=LIGHT["soft"], transform=axes.transAxes)


def plot(axes, points: Points, limit: int, **style) -> None:
    """Draw a line through at most limit points, with markers when they are few."""
    marker = "o" if len(points) <= MAX_MARKERS else None
    axes.plot(*zip(*thin(points, limit), strict=True), marker=marker, **style)


def points_of(rows: list[dict], column: str) -> Points:
    """Return the finite values of a column over the tokens of their rows."""
    pairs = [(row["tokens"], row.get(column)) for row in rows]

    # Differences of greater values would overflow.
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y) and abs(y) < 1e100]


def thin(points: Points, limit: int) -> Points:
    """Return about limit points: the least and the greatest of each stretch, and both ends."""
    if len(points) <= limit:
        return points

    size = math.ceil(2 * len(points) / limit)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {choose(stretch, key=lambda point: point[1]) for choose in (min, max)}

    return sorted(kept)


def visible_range(losses: list[float]) -> tuple[float, float]:
    """Return the least and the greatest loss to show.

    A run begins at 10.8 nats, and can leap there again. Where that would squash all else, the
    picture ends a little above 95 % of the losses.
    """
    low, high = min(losses), max(losses)
    usual = sorted(losses)[int(0.95 * (len(losses) - 1))]
    if len(losses) >= MIN_LOSSES_TO_CUT and high - low > 3 * (usual - low) > 0:
        high = low + 1.25 * (usual - low)

    # Tiny differences are not magnified.
    margin = max(0.06 * (high - low), 0.005 * abs(high))
    return max(low - margin, min(low, 0)), high + margin


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
    """Return a figure in colors of LIGHT as an SVG document that is readable in light and dark."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Creator": None, "Date": None})
    light_paper, dark_paper = COLORS["paper"]
    dark_rules = "".join(
        f'[style*="{name}: {light}"]{{{name}:{dark}!important}}'
        for light, dark in COLORS.values()
        for name in ("fill", "stroke")
    )
    style = (
        f"<style>text{{font-family:{FONTS}!important}}svg{{background:{light_paper}}}"
        f"@media (prefers-color-scheme:dark){{svg{{background:{dark_paper}}}{dark_rules}}}</style>"
    )
    return file.getvalue().replace("</svg>", f"{style}</svg>")
