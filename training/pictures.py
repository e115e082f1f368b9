"""The curves of a run as a picture (SVG) that a browser shows, drawn without any package.

rows of the metrics -> lines of points -> scales with round ticks -> losses, learning rate below
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 500
# The edges of both plots; the labels of the lines stand to the right of them.
LEFT, RIGHT = 66, 620
TOP, BOTTOM = 92, 386
RATE_TOP, RATE_BOTTOM = 420, 464

DESCRIPTION = (
    "Train and test loss in nats per token, and below them the learning rate, over the tokens that"
    " were trained on."
)

# More lines could not be told apart.
MAX_SOURCES = 8
# Points in a line, and in all: some 13 bytes each.
MAX_POINTS, MAX_ALL_POINTS = 1000, 8000
# Fewer losses are all shown, however high the first one is.
MIN_LOSSES_TO_CUT = 40
# Beyond so many tests their dots would hide the line.
MAX_DOTS = 60

# By class: in light and in dark. The hues differ in brightness too, for the colour-blind.
COLORS = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1c2128", "#eceff3"),
    "soft": ("#5b6470", "#a2abb7"),
    "grid": ("#e4e7eb", "#2b3038"),
    "train": ("#6b7583", "#8f99a7"),
    "test": ("#0065a3", "#5cb8ee"),
    "rate": ("#5b6470", "#a2abb7"),
    "source0": ("#c04a00", "#f5a04c"),
    "source1": ("#00765a", "#35c9a0"),
    "source2": ("#9c3d78", "#e79ac6"),
    "source3": ("#7a6100", "#e2cd5a"),
}
NUM_SOURCE_COLORS = sum(name.startswith("source") for name in COLORS)

RULES = """\
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.head{font-size:16px;font-weight:600}
text,rect,circle{fill:currentColor}
polyline,line{fill:none;stroke:currentColor;stroke-linejoin:round;stroke-linecap:round}
polyline{stroke-width:1.8}
polyline.train,polyline.rate{stroke-width:1.3}
polyline.test{stroke-width:2.8}
polyline.again{stroke-dasharray:5 4}"""

Points = list[tuple[float, float]]


@dataclass
class Line:
    """Losses in nats over tokens, under a name, and the class that gives it its colour."""

    name: str
    points: Points
    style: str


@dataclass
class Scale:
    """Values from low to high, on pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, kept near the picture however far that is out."""
        share = (value - self.low) / (self.high - self.low)

        return self.start + min(max(share, -9.0), 9.0) * (self.end - self.start)


def draw_curves(rows: list[dict], sources: dict[str, str], title: str) -> str:
    """Draw the losses and the learning rate of a run over its tokens.

    Args:
        rows: of the metrics, one an epoch; values that are missing or not finite leave no point.
        sources: the columns with the test losses of several sources, by their names.

    Returns:
        An SVG document of less than 200 KB; the same for the same rows.
    """
    head = summarize(rows, shorten(title, 16))
    lines = loss_lines(rows, sources)
    rates = points_of(rows, "learning_rate")

    if not lines:
        return document(
            head,
            [text(WIDTH / 2, HEIGHT / 2, "The curves come with the first test.", "soft", "middle")],
            DESCRIPTION,
        )

    losses = [loss for line in lines for _, loss in line.points]
    x = Scale(0.0, max(1.0, *(line.points[-1][0] for line in lines)), LEFT, RIGHT)
    y = Scale(*visible_range(losses), BOTTOM, TOP)
    note = describe_extent(rows, losses, y.high, len(sources) - MAX_SOURCES)

    return document(
        head,
        [
            text(16, 52, note, "soft"),
            *draw_axes(x, y, RATE_BOTTOM),
            *draw_losses(lines, x, y),
            *draw_rates(rates, x),
        ],
        DESCRIPTION,
    )


# --- What is shown ---


def loss_lines(rows: list[dict], sources: dict[str, str]) -> list[Line]:
    """Return what has points to draw; what matters most comes last, and so on top."""
    shown = list(sources.items())[:MAX_SOURCES]
    lines = [Line("train", points_of(rows, "train_loss"), "train")]

    for number, (name, column) in enumerate(shown):
        again = " again" if number >= NUM_SOURCE_COLORS else ""
        style = f"source{number % NUM_SOURCE_COLORS}{again}"
        lines.append(Line(shorten(name, 13), points_of(rows, column), style))

    name = "test, mean" if sources else "test"
    lines.append(Line(name, points_of(rows, "test_loss"), "test"))

    return [line for line in lines if line.points]


def points_of(rows: list[dict], column: str) -> Points:
    """Return the finite values of a column over the tokens of their rows."""
    pairs = [(row["tokens"], row.get(column)) for row in rows]

    return [(tokens, value) for tokens, value in pairs if value is not None and is_finite(value)]


def is_finite(value: float) -> bool:
    # Far from all losses, and from where differences overflow.
    return math.isfinite(value) and abs(value) < 1e100


def visible_range(losses: list[float]) -> tuple[float, float]:
    """Return the least and the greatest loss to show.

    A run begins at 10.8 nats, and can leap there again; where that would squash all else, the
    picture ends a little above 95 % of the losses.
    """
    low, high = min(losses), max(losses)
    usual = sorted(losses)[int(0.95 * (len(losses) - 1))]

    if len(losses) >= MIN_LOSSES_TO_CUT and high - low > 3 * (usual - low) > 0:
        high = low + 1.25 * (usual - low)

    # What hardly differs is not blown up.
    margin = max(0.06 * (high - low), 0.005 * abs(high)) or 1.0
    bottom = low - margin

    return (max(0.0, bottom) if low >= 0 else bottom), high + margin


def summarize(rows: list[dict], title: str) -> str:
    """Return the last and the best test loss, as far as there are any."""
    tests, trained = points_of(rows, "test_loss"), points_of(rows, "train_loss")

    if not tests:
        state = f"train loss {loss_text(trained[-1][1])}, no test yet" if trained else ""

        return f"{title}: {state or 'no epoch has ended yet'}"

    (_, last), (tokens, best) = tests[-1], min(tests, key=lambda point: point[1])
    told = f"{title}: test loss {loss_text(last)} (perplexity {perplexity_text(last)})"

    if loss_text(last) == loss_text(best):
        return f"{told}, the best so far"

    return f"{told}, best {loss_text(best)} ({perplexity_text(best)}) at {count_text(tokens)}"


def describe_extent(rows: list[dict], losses: list[float], top: float, num_hidden: int) -> str:
    """Say how much there is, and honestly what of it is not to be seen."""
    epochs = "1 epoch" if len(rows) == 1 else f"{len(rows):,} epochs"
    told = f"{epochs}, {count_text(rows[-1]['tokens'])} tokens"
    cut = sum(loss > top for loss in losses)

    if cut:
        told += (
            f"; cut off above {loss_text(top)}: {cut:,} of {len(losses):,} losses,"
            f" up to {loss_text(max(losses))}"
        )

    return f"{told}; {num_hidden} sources are in the table alone" if num_hidden > 0 else told


# --- How it is drawn ---


def draw_axes(x: Scale, y: Scale, floor: float) -> list[str]:
    """Draw the grid, the numbers beside it, and what they count."""
    parts = [text(16, TOP - 14, "loss, nats per token", "soft")]

    for value, label in ticks(y, 5):
        parts.append(rule(LEFT, y(value), RIGHT, y(value), "grid"))
        parts.append(text(LEFT - 8, y(value) + 4.5, label, "soft y", "end"))

    for value, label in ticks(x, 6, count_text, least=1.0):
        parts.append(rule(x(value), TOP, x(value), floor, "grid"))
        parts.append(text(x(value), floor + 20, label, "soft x", "middle"))

    return [*parts, text(RIGHT + 36, floor + 20, "tokens", "soft")]


def draw_losses(lines: list[Line], x: Scale, y: Scale) -> list[str]:
    """Draw the lines, and at their ends what they are and where they have come to."""
    limit = min(MAX_POINTS, MAX_ALL_POINTS // len(lines))
    parts = ['<g clip-path="url(#plot)">']

    for line in lines:
        parts += draw_line(thin(line.points, limit), line.style, x, y)

        if len(line.points) == 1 or line.style != "train":
            radius = 3.6 if line.style == "test" else 2.6
            few = len(line.points) <= MAX_DOTS
            parts += draw_dots(line.points if few else line.points[-1:], line.style, radius, x, y)

    parts.append("</g>")
    ends = [min(max(y(line.points[-1][1]), TOP), BOTTOM) for line in lines]

    for line, end, height in zip(lines, ends, spread(ends, 18, BOTTOM), strict=True):
        label = f"{line.name} {loss_text(line.points[-1][1])}"
        parts.append(rule(RIGHT + 5, end, RIGHT + 15, height, line.style))
        parts.append(text(RIGHT + 20, height + 4.5, label, f"{line.style} end"))

    return parts


def draw_rates(rates: Points, x: Scale) -> list[str]:
    """Draw the learning rate in a strip of its own, below the losses."""
    if not rates:
        return []

    y = Scale(0.0, 1.1 * max(rate for _, rate in rates) or 1.0, RATE_BOTTOM, RATE_TOP)
    parts = [text(16, RATE_TOP - 12, "learning rate", "soft")]

    for value, label in ticks(y, 3, "{:g}".format):
        parts.append(rule(LEFT, y(value), RIGHT, y(value), "grid"))
        parts.append(text(LEFT - 8, y(value) + 4.5, label, "soft rate-y", "end"))

    parts += draw_line(thin(rates, MAX_POINTS), "rate", x, y)

    if len(rates) == 1:
        parts += draw_dots(rates, "rate", 2.6, x, y)

    label, height = f"{rates[-1][1]:.2g}", y(rates[-1][1])

    return [*parts, text(RIGHT + 20, height + 4.5, label, "rate end")]


def draw_line(points: Points, style: str, x: Scale, y: Scale) -> list[str]:
    pairs = " ".join(f"{x(tokens):.1f},{y(value):.1f}" for tokens, value in points)

    return [f'<polyline class="{style}" points="{pairs}"/>']


def draw_dots(points: Points, style: str, radius: float, x: Scale, y: Scale) -> list[str]:
    """Draw dots that tell their values to who points at them."""
    return [
        f'<circle class="{style}" cx="{x(tokens):.1f}" cy="{y(value):.1f}"'
        f' r="{radius}"><title>{value:.6g} at {count_text(tokens)} tokens</title></circle>'
        for tokens, value in points
    ]


def thin(points: Points, limit: int) -> Points:
    """Return at most limit points: the first, the last, and of each stretch least and greatest."""
    if len(points) <= limit:
        return points

    inner, num_stretches = points[1:-1], limit // 2 - 1
    bounds = [number * len(inner) // num_stretches for number in range(num_stretches + 1)]
    kept = [points[0]]

    for start, end in zip(bounds, bounds[1:], strict=False):
        stretch = range(start, end)
        extremes = {
            min(stretch, key=lambda index: inner[index][1]),
            max(stretch, key=lambda index: inner[index][1]),
        }
        kept += [inner[index] for index in sorted(extremes)]

    return [*kept, points[-1]]


def spread(heights: list[float], gap: float, bottom: float) -> list[float]:
    """Move labels apart, in their order, until each has its gap; none goes below the bottom."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed, least = list(heights), -math.inf

    for index in order:
        placed[index] = least = max(heights[index], least + gap)

    most = bottom + gap

    for index in reversed(order):
        placed[index] = most = min(placed[index], most - gap)

    return placed


def ticks(
    scale: Scale, count: int, label: Callable[[float], str] | None = None, least: float = 0.0
) -> Iterator[tuple[float, str]]:
    """Yield round values on a scale, about as many as wanted, and how they are written.

    Args:
        label: writes a value; None gives all as many decimals as they need.
        least: the smallest distance between two.
    """
    rough = max((scale.high - scale.low) / count, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))

    for number in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1):
        value = number * step

        if label:
            yield value, label(value)
        else:
            plain = step > 1e-5 and abs(value) < 1e5
            yield value, f"{value:.{decimals}f}" if plain else f"{value:.3g}"


def count_text(count: float) -> str:
    """Write a number of tokens in thousands, millions, billions or trillions."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.4g}{suffix}"

    return f"{count:.4g}"


def loss_text(loss: float) -> str:
    return f"{loss:.3f}" if loss == 0 or 0.001 <= abs(loss) < 1000 else f"{loss:.3g}"


def perplexity_text(loss: float) -> str:
    value = perplexity(loss)

    return f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def perplexity(loss: float) -> float:
    """Return exp(loss), as far as there are numbers."""
    return math.exp(min(loss, 700.0))


def shorten(name: str, limit: int) -> str:
    """Return what XML can hold of a name, and no more columns of it than limit."""
    name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    widths = [1 + (unicodedata.east_asian_width(char) in "WF") for char in name]

    if sum(widths) <= limit:
        return name

    kept = sum(sum(widths[: end + 1]) < limit for end in range(len(name)))

    return f"{name[:kept]}…"


# --- SVG ---


def document(head: str, parts: list[str], description: str, height: int = HEIGHT) -> str:
    """Return a picture with its title, its colours and its parts.

    Args:
        description: for who cannot see it.
    """
    light, dark = (
        "".join(f".{name}{{color:{pair[theme]}}}" for name, pair in COLORS.items())
        + f"svg{{background:{COLORS['paper'][theme]}}}"
        for theme in (0, 1)
    )
    plot_height = BOTTOM - TOP

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
            ' aria-labelledby="title desc">',
            f'<title id="title">{escape(head)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>\n{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n{RULES}\n</style>",
            f'<clipPath id="plot"><path d="M{LEFT - 5} {TOP}h{RIGHT - LEFT + 10}v{plot_height + 5}'
            f'H{LEFT - 5}z"/></clipPath>',
            f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
            text(16, 30, head, "ink head"),
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
