"""The look of the figures: colours, line styles, and SVG that fits a light and a dark page.

Only this file, forest.py, figures.py, gradient_growth.py, probe_figures.py, ranking_figure.py, scales.py and
search_figures.py touch matplotlib.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import TICKDOWN, MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

#: Stands for the colour of text and axes until the SVG is finished; no arm has it.
INK = "#010203"
#: The colour of text and axes in a file: a grey with the same contrast on a white and on a nearly black page.
FILE_INK = "#6e7b88"

#: In CSS pixels; a figure fits a phone at nearly this size, so that its text stays readable.
WIDTH = 400.0

#: Hues of Okabe & Ito (2008), apart for colour-blind eyes, shifted to show on white and on black.
_COLOURS = ("#2f7fc1", "#d55e00", "#0a9b6f", "#c2609a", "#b87c00", "#7a6fd0", "#2f97c9", "#8c7853")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.3, 1.3)), (0, (6, 1.6, 1.3, 1.6)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

DECISION_COLOURS = {
    "SUPPORTED": "#0a8f6a",
    "REFUTED": "#d55e00",
    "INCONCLUSIVE": "#7d8893",
    "MIXED": "#9a6cc0",
}

#: The SVG of a marker's shape, and of a mark that has it, which may be a link.
_SHAPE = r"(?: *<defs> *<path [^>]*/> *</defs>)"
_MARK = r" *(?:<a [^>]*>)? *<use [^>]*/> *(?:</a>)?"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bnbench",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10.5,
    # Names of arms and cells may hold dollar signs.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.4,
}


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn in every figure of a report."""

    colour: str
    dashes: Any
    marker: str


@dataclass(frozen=True)
class Dot:
    """One training in a figure: `url` is the page that shows it, if there is one."""

    x: float
    y: float
    diverged: bool = False
    url: str = ""


@dataclass(frozen=True)
class Drawing:
    """A finished figure: `name` is its file's stem, `title` what it shows in words.

    `svg` is made for a page: text and axes have the colour and font of what is around it, and its ids are its
    own. `key` stands for all that it was drawn from, where somebody keeps count of that.
    """

    name: str
    title: str
    svg: str
    key: str = ""

    @property
    def file(self) -> str:
        """The SVG as a file that can be read on a white and on a dark background."""
        return file_head(self.key) + self.svg.removeprefix("<svg ") + "\n"


def file_head(key: str) -> str:
    """How the file of a figure with this key begins, and no other."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" data-drawn-from="{key}" color="{FILE_INK}"'
        ' font-family="DejaVu Sans, Verdana, sans-serif" '
    )


@dataclass(frozen=True)
class Group:
    """Figures of one kind with the names of their cells; `folded` where the page hides them at first."""

    title: str
    caption: str
    drawings: tuple[tuple[str, Drawing], ...]
    folded: bool = False


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """A colour, a line style and a marker for each arm, in the order of their first appearance.

    Eight arms differ in colour and marker and, four by four, in line style; beyond that the pairs of colour
    and line style still differ, up to 32 arms.
    """
    styles = {}
    for i, arm in enumerate(dict.fromkeys(arms)):
        dashes = _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)]
        styles[arm] = ArmStyle(_COLOURS[i % len(_COLOURS)], dashes, _MARKERS[i % len(_MARKERS)])
    return styles


def new_figure(width: float, height: float) -> Figure:
    """An empty figure whose size is given in CSS pixels. Use inside :func:`house_style`."""
    return Figure(figsize=(width / 72, height / 72))


def house_style() -> Any:
    """A context in which figures are drawn alike, whatever the user's own settings of matplotlib are."""
    return matplotlib.style.context(["default", _STYLE])


def finish(figure: Figure, name: str, title: str) -> Drawing:
    """Turn a figure into SVG without dates, outer namespaces, fixed size or ids that another could have."""
    buffer = io.StringIO()
    empty: Mapping[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=dict(empty))
    text = buffer.getvalue().replace(INK, "currentColor")
    found = re.search(r'viewBox="([^"]+)"', text)
    assert found is not None
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = re.sub(r'\b((?:d|x|y|transform|points|dx|dy)=")([^"]*)"', _rounded, body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"\n\s*", " ", body).strip()
    body = _with_own_ids(body, name)
    body = re.sub(rf"<g([^>]*)>({_SHAPE}?)((?:{_MARK}){{2,}}) *</g>", _with_one_style, body)
    head = f'<svg role="img" viewBox="{found[1]}" stroke-linejoin="round" stroke-linecap="butt">'
    return Drawing(name, title, f"{head}<title>{escape(title)}</title>{body}</svg>")


def _with_own_ids(body: str, name: str) -> str:
    """Number the ids that something refers to, under a short name of the figure's, and drop all others."""
    short = f"f{zlib.crc32(name.encode()):x}"
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    own = {old: f"{short}-{i}" for i, old in enumerate(used)}
    body = re.sub(r'(url\(|href=")#([^)"]+)', lambda found: f"{found[1]}#{own[found[2]]}", body)
    return re.sub(r' id="([^"]+)"', lambda found: f' id="{own[found[1]]}"' if found[1] in own else "", body)


def _with_one_style(group: re.Match[str]) -> str:
    """Say the style of many equal marks once; hundreds of dots would be most of a page."""
    styles = set(re.findall(r' style="[^"]*"', group[3]))
    if len(styles) != 1 or "style=" in group[1]:
        return group[0]
    style = styles.pop()
    return f"<g{group[1]}{style}>{group[2]}{group[3].replace(style, '')}</g>"


def draw_lines(axes: Any, lines: Iterable[Sequence[tuple[float, float]]], **looks: Any) -> None:
    """Draw thin lines of one look as a single path, which makes an SVG of many lines half as long."""
    gap = (math.nan, math.nan)
    points = [point for line in lines for point in (*line, gap)]
    axes.plot([x for x, _ in points], [y for _, y in points], linewidth=0.6, **looks)


def percent(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The points' x as they are, and their y, a share, in percent."""
    return [x for x, _ in points], [100 * y for _, y in points]


def log_axis(axes: Any, label: str) -> None:
    """Give a panel in which all is drawn a logarithmic x axis with plain numbers."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = axes.get_xlim()
    between = [x for x in axes.xaxis.get_minorticklocs() if low <= x <= high]
    axes.xaxis.set_minor_locator(NullLocator())
    # As one line of marks, since matplotlib's own small ticks took a third of the time to draw a figure.
    marks = Line2D(
        between, [0.0] * len(between), linestyle="none", marker=MarkerStyle(TICKDOWN), markersize=2,
        markeredgewidth=0.6, color=INK, clip_on=False, transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    axes.add_artist(marks)


def panel(
    height: float,
    legend: Iterable[str],
    styles: Mapping[str, ArmStyle],
    *,
    marks: Iterable[str] = (),
    markers: bool = False,
    foot: float = 38.0,
    left: float = 52.0,
) -> tuple[Figure, Any]:
    """A figure with one panel, and above it a legend of these arms and marks, as many in a line as fit.

    The margins are given, since matplotlib's own layout takes as long as all the drawing.
    """
    lines = [
        Line2D(
            [], [], color=styles[arm].colour, linestyle=styles[arm].dashes, linewidth=2,
            marker=styles[arm].marker if markers else None, markersize=4.5, label=cut(arm, 24),
        )
        for arm in legend
    ]  # fmt: skip
    lines += [draw_mark(kind) for kind in marks]
    size = 10.5 if len(lines) <= 8 else 9.0
    longest = max((len(str(line.get_label())) for line in lines), default=0)
    columns = max(1, min(4, int((WIDTH - 8) // ((4.8 + 0.6 * longest) * size))))
    head = 8.0 + 1.8 * size * math.ceil(len(lines) / columns)
    height += head
    figure = new_figure(WIDTH, height)
    axes = figure.add_axes(
        (left / WIDTH, foot / height, (WIDTH - left - 8) / WIDTH, (height - head - foot) / height)
    )
    if lines:
        looks: dict[str, Any] = {"fontsize": size, "handlelength": 2.6 if legend else 1.2}
        figure.legend(handles=lines, loc="upper left", ncols=columns, borderaxespad=0.2, **looks)
    return figure, axes


def draw_dots(
    axes: Any,
    dots: Iterable[Dot],
    limits: tuple[float, float],
    *,
    along: Literal["x", "y"],
    **looks: Any,
) -> None:
    """Draw every training: a cross where it diverged, a triangle at the edge where it is beyond the limits.

    `limits` bound the axis `along` which trainings differ; `looks` are colour, marker, size and alpha of
    those that neither diverged nor are beyond.
    """
    low, high = limits
    ends = ("<", ">") if along == "x" else ("v", "^")
    looks = {"linewidths": 0, "zorder": 2, **looks}
    groups: dict[str, list[Dot]] = {}
    for dot in dots:
        value = dot.x if along == "x" else dot.y
        beyond = ends[0] if value < low else ends[1] if value > high else ""
        kept = min(max(value, low), high)
        place = (kept, dot.y) if along == "x" else (dot.x, kept)
        groups.setdefault("x" if dot.diverged else beyond, []).append(Dot(*place, dot.diverged, dot.url))
    for marker, some in groups.items():
        own: dict[str, Any] = {"marker": marker} if marker else {}
        own |= {"linewidths": 1.2, "alpha": 0.9, "s": max(looks["s"], 16)} if marker == "x" else {}
        drawn = axes.scatter(
            [dot.x for dot in some], [dot.y for dot in some], clip_on=False, **{**looks, **own}
        )
        if any(dot.url for dot in some):
            drawn.set_urls([dot.url or None for dot in some])


def marks_of(values: Iterable[float], limits: tuple[float, float], *, diverged: bool) -> tuple[str, ...]:
    """Which marks besides dots a figure needs, for its legend."""
    beyond = any(not limits[0] <= value <= limits[1] for value in values)
    return ("diverged",) * diverged + ("beyond the scale",) * beyond


def draw_mark(kind: str) -> Line2D:
    """One of these marks with its name, for a legend."""
    marker = "x" if kind == "diverged" else "<"
    return Line2D([], [], color=INK, linestyle="none", marker=marker, markersize=5, label=kind)


def fence(groups: Iterable[Sequence[float]], least: float) -> tuple[float, float]:
    """Where a scale begins and ends, so that a few far values leave the rest some room.

    It holds the mean and the quartiles of every group and reaches as far as the values do, but no further
    than twice the span of those numbers, and of `least`, beyond them.
    """
    groups = [values for values in groups if values]
    core = [statistics.fmean(values) for values in groups]
    for values in groups:
        core += statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values
    room = 2 * max(max(core) - min(core), least)
    every = [value for values in groups for value in values]
    return max(min(every), min(core) - room), min(max(every), max(core) + room)


def cut(text: str, length: int) -> str:
    """A text of at most this length, the last letter an ellipsis where something is missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _rounded(match: re.Match[str]) -> str:
    def shorten(number: re.Match[str]) -> str:
        return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

    return match[1] + re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", shorten, match[2]) + '"'
