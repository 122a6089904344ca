"""The look of the figures: colours, line styles, and SVG that fits a light and a dark page.

The only file besides figures.py that touches matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

#: Stands for the colour of text and axes until the SVG is finished; no arm has it.
INK = "#010203"
#: A grey with the same contrast on a white and on a nearly black page.
FILE_INK = "#6e7b88"

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
class Drawing:
    """A finished figure: `name` is its file's stem, `title` what it shows in words."""

    name: str
    title: str
    svg: str

    @property
    def inline(self) -> str:
        """The SVG as part of a page: text and axes in the page's colour and font, ids of its own."""
        return self.svg.replace(INK, "currentColor")

    @property
    def file(self) -> str:
        """The SVG as a file that can be read on a white and on a dark background."""
        head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="DejaVu Sans, Verdana, sans-serif" '
        return self.svg.replace(INK, FILE_INK).replace("<svg ", head, 1) + "\n"


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
    text = buffer.getvalue()
    found = re.search(r'viewBox="([^"]+)"', text)
    assert found is not None
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = re.sub(r'\b((?:d|x|y|transform|points|dx|dy)=")([^"]*)"', _rounded, body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\n\s*", " ", body).strip()
    head = f'<svg role="img" viewBox="{found[1]}" stroke-linejoin="round" stroke-linecap="butt">'
    return Drawing(name, title, f"{head}<title>{escape(title)}</title>{body}</svg>")


def _rounded(match: re.Match[str]) -> str:
    def shorten(number: re.Match[str]) -> str:
        return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

    return match[1] + re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", shorten, match[2]) + '"'
