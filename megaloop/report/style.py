"""How the page's pictures look: SVG whose text takes the page's colour, so that it suits light and dark."""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "STYLE", "legend_label", "line_style", "to_svg"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800")
"""Okabe and Ito's, which colour-blind people tell apart; more groups than these begin again with dashes."""
INK = "#123456"
"""Stands for the colour of the page's text."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollars in it is a name
    "svg.hashsalt": "megaloop",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#80808040",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def line_style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
    }


def legend_label(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def to_svg(figure: Figure) -> str:
    out = io.StringIO()
    with warnings.catch_warnings():
        # the browser chooses the font: matplotlib only guesses how wide the text is
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
