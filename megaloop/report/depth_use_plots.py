"""Pictures of how models use their depth; :mod:`megaloop.report.style` says how they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megaloop.report.depth_use import DepthUse
from megaloop.report.style import INK, STYLE, legend_label, line_style, to_svg
from megaloop.text import printable

__all__ = [
    "CONTRIBUTIONS",
    "EFFECTS",
    "ERASURE",
    "GRADIENTS",
    "LENS",
    "LOCAL",
    "LOOPS",
    "SYMMETRY",
    "TUNED_LENS",
    "Matrix",
    "curves_plot",
    "interventions_plot",
    "matrices_plot",
    "shown_token",
]

Panel = tuple[str, str, str, str]
"""Measure, curve, title and what the numbers are."""
_STYLE = {**STYLE, "figure.constrained_layout.h_pad": 0.1}
"""With room between what is below one panel and the title of the next."""
CONTRIBUTIONS: tuple[Panel, ...] = (
    ("contributions", "attention_size", "What attention adds", "|a| / |h|"),
    ("contributions", "mlp_size", "What the MLP adds", "|m| / |h + a|"),
    ("contributions", "layer_cosine", "Direction of what a layer adds", "cos(a + m, h)"),
    ("contributions", "residual_norm", "Residual stream", "|h|"),
)
LENS: tuple[Panel, ...] = (
    ("lens", "kl", "Distance to the prediction", "KL, nats"),
    ("lens", "overlap", "Overlap of the five likeliest tokens", "share"),
    ("lens", "accuracy", "Accuracy of an early exit", "accuracy"),
)


TUNED_LENS: tuple[Panel, ...] = tuple(("tuned-lens", *panel[1:]) for panel in LENS)
LOOPS: tuple[Panel, ...] = (
    ("loops", "state_norm", "State of the loop", "|x|"),
    ("loops", "relative_change", "How far it moves", "|x - before| / |x|"),
    ("loops", "token_cosine", "Likeness of tokens", "cosine"),
)


@dataclass(frozen=True)
class Matrix:
    """What a matrix of a measure shows.

    Attributes:
        mask: which of its cells mean something.
        signed: values lie on both sides of 0.
        columns: which of the measure's labels name its columns; none: they are numbered.
        ends: where the colours end at the latest: the first layer's effects are many times those of others.
    """

    measure: str
    name: str
    x: str
    y: str
    unit: str
    mask: Callable[[NDArray[np.float64]], NDArray[np.bool_]]
    signed: bool = False
    columns: str = ""
    ends: float = math.inf


def _all(matrix: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.ones_like(matrix, np.bool_)


def _later(matrix: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.triu(np.ones_like(matrix, np.bool_), 1)


def _apart(matrix: NDArray[np.float64]) -> NDArray[np.bool_]:
    return ~np.eye(matrix.shape[0], matrix.shape[1], dtype=np.bool_)


EFFECTS = Matrix(
    "effects", "future effect on later layers", "later layer", "skipped layer", "relative change", _later, ends=1.0
)
LOCAL = Matrix(
    "effects", "future local effect", "later layer", "layer whose part is taken", "relative change", _later, ends=1.0
)
SYMMETRY = Matrix("symmetry", "cosine of the weights of blocks", "block", "block", "cosine", _apart, signed=True)
ERASURE = Matrix("erasure", "erasure", "token", "layer", "distance of the distributions", _all, columns="tokens")
GRADIENTS = Matrix("gradients", "gradients", "token", "layer", "integrated gradient", _all, True, "tokens")
_AROUND_ZERO = LinearSegmentedColormap.from_list(
    "around zero", [(0.0, "#0072b2ff"), (0.5, "#0072b200"), (0.5, "#d55e0000"), (1.0, "#d55e00ff")]
)
"""0 is the page's ground, light or dark."""
_OUTLIER = 8
"""Times the median, from which on the largest value has an axis made logarithmic."""
_PANEL, _WIDEST, _NAME_WIDTH, _BESIDE = 2.7, 11.0, 0.15, 0.9
"""Inches: a panel's width, that of all panels side by side at most, and what the name of a column and the axis take of it."""


def curves_plot(
    found: Sequence[DepthUse], panels: Sequence[Panel], places: str = "layer", first: int = 0
) -> str | None:
    """Curves over the layers, a line for each group, with the range over its runs; None where no group has any.

    Args:
        places: what the curves go over.
        first: number of the first place.
    """
    shown = [panel for panel in panels if any(use.curve(panel[0], panel[1]) is not None for use in found)]
    if not shown:
        return None
    columns = min(len(shown), 2 if len(shown) == 4 else 3)
    lines = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.1 * columns, 2.9 * lines + 0.4), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, (measure, name, title, unit) in zip(grid.flat, shown, strict=False):
            for use in found:
                _line(axes, use, measure, name, first)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(places)
            axes.set_ylabel(unit)
            _count_whole(axes.xaxis)
            _spread(axes)
        _legend(figure, grid)
        return to_svg(figure)


def _line(axes: Any, use: DepthUse, measure: str, name: str, first: int) -> None:
    """The mean over the runs with their range; of one run with its standard errors."""
    values, errors = use.curve(measure, name), use.errors(measure, name)
    if values is None:
        return
    places = first + np.arange(values.shape[1])
    style = line_style(use.number)
    axes.plot(places, values.mean(0), marker="o", markersize=3, linewidth=1.4, label=legend_label(use.label), **style)
    low, high = values.min(0), values.max(0)
    if errors is not None and errors.shape == (1, len(places)):
        low, high = (values - errors)[0], (values + errors)[0]
    axes.fill_between(places, low, high, color=style["color"], alpha=0.13, linewidth=0)


def matrices_plot(found: Sequence[DepthUse], kind: Matrix) -> str | None:
    """A matrix for each group, all in one scale; None where no group has one."""
    shown = [(use, matrix) for use in found if (matrix := use.matrix(kind.measure, kind.name)) is not None]
    if not shown:
        return None
    width = _panel_width([use.labels(kind.measure, kind.columns) for use, _ in shown])
    columns = min(len(shown), 4, int(_WIDEST / width))
    lines = math.ceil(len(shown) / columns)
    shown = [(use, np.where(kind.mask(matrix), matrix, np.nan)) for use, matrix in shown]
    highest = max((float(np.nanmax(np.abs(matrix))) for _, matrix in shown if not np.isnan(matrix).all()), default=1.0)
    end = min(highest or 1.0, kind.ends)
    limits = (-end if kind.signed else 0.0, end)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        height = 2.7 if width == _PANEL else 3.4  # with names that stand on end
        figure = Figure(figsize=(width * columns + 0.8, height * lines + 0.3), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, (use, matrix) in zip(grid.flat, shown, strict=False):
            colours = _AROUND_ZERO if kind.signed else "viridis"
            picture = axes.imshow(matrix, origin="lower", cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_title(use.label[:40], fontsize=10)
            axes.set_xlabel(kind.x)
            axes.set_ylabel(kind.y)
            _count_whole(axes.xaxis, axes.yaxis)
            _name_columns(axes, use.labels(kind.measure, kind.columns), matrix.shape[1], width)
        figure.colorbar(picture, ax=grid, shrink=0.7, label=kind.unit, extend="max" if highest > end else "neither")
        return to_svg(figure)


def _panel_width(labels: Sequence[Sequence[str]]) -> float:
    """Of a matrix, in inches: wide enough to name its columns, where that fits on a page."""
    return min(max(_PANEL, _BESIDE + _NAME_WIDTH * max(map(len, labels))), _WIDEST)


def _name_columns(axes: Any, names: Sequence[str], columns: int, width: float) -> None:
    """As many as can be read, at equal distances; none where they are not those of the columns: somebody has edited them."""
    if len(names) != columns:
        return
    every = math.ceil(columns / round((width - _BESIDE) / _NAME_WIDTH))
    named = range(0, columns, every)
    # anchored at their ends, so that they reach the axis in whatever font the browser chooses
    axes.set_xticks(
        named, [shown_token(names[place]) for place in named],
        rotation=90, rotation_mode="anchor", ha="right", va="center", fontsize=8,
    )  # fmt: skip
    if every > 1:
        axes.set_xlabel(f"{axes.get_xlabel()} (one of {every} is named)")


def shown_token(token: str, limit: int = 12) -> str:
    """A token on one line, a dot for each space."""
    return printable(token.replace(" ", "\N{MIDDLE DOT}"), limit) or "(nothing)"


def interventions_plot(found: Sequence[DepthUse], kind: str, unit: str = "loss") -> str | None:
    """What an intervention at each place does: a panel for each size of the block, a line for each group.

    Args:
        kind: of interventions; of those that a primitive scores also that one's, whose accuracy is shown as it is.
        unit: loss or accuracy; changes, but of primitives.
    """
    is_difference, is_exit = " on " not in kind, kind.startswith("exit")
    names = sorted({name for use in found for run in use.runs if kind in run for name in run[kind].curves})
    names = [name for name in names if name.endswith(f": {unit}")]
    if not names:
        return None
    columns = min(len(names), 4)
    lines = math.ceil(len(names) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(2.9 * columns, 4.6), 2.7 * lines + 0.5), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=not is_difference)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            for use in found:
                _line(axes, use, kind, name, int(is_exit))  # the earliest exit is after one layer
            _references(axes, [] if is_difference else found, kind)
            axes.set_title(name.partition(":")[0], fontsize=10)
            axes.set_xlabel("layers before the exit" if is_exit else "first layer")
            _count_whole(axes.xaxis)
            _spread(axes)
        of_unit = "loss, nats" if unit == "loss" else "accuracy"
        grid[0][0].set_ylabel(f"change of the {of_unit}" if is_difference else of_unit)
        _legend(figure, grid)
        return to_svg(figure)


def _references(axes: Any, found: Sequence[DepthUse], kind: str) -> None:
    """What curves are held against: no change; of a primitive each group's accuracy without intervention, and chance."""
    chance = next((value for use in found if (value := use.mean(kind, "chance")) is not None), None if found else 0.0)
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
    for use in found:
        if (accuracy := use.mean(kind, "accuracy")) is not None:
            axes.axhline(accuracy, color=line_style(use.number)["color"], linewidth=0.9, linestyle="--")


def _count_whole(*axes: Any) -> None:
    """There is no layer 2.5, however few layers there are."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def _spread(axes: Any) -> None:
    """A logarithmic axis (linear about 0) where the first layer does so much more than others that their lines would lie on each other."""
    sizes = np.abs(np.concatenate([np.zeros(1), *(np.asarray(line.get_ydata(), float) for line in axes.lines)]))
    sizes = sizes[sizes > 0]
    if not len(sizes) or sizes.max() < _OUTLIER * np.median(sizes):
        return
    linear = 10.0 ** math.floor(math.log10(max(np.median(sizes), sizes.max() / 1000)))
    axes.set_yscale("symlog", linthresh=linear)
    axes.autoscale(axis="y")  # anew: the margins were those of a linear axis
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(figure: Figure, grid: Any) -> None:
    """Of the panel with most lines, under all of them; as many names side by side as fit."""
    best = max(grid.flat, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    handles, labels = best.get_legend_handles_labels()
    name_width = 0.6 + 0.08 * max(map(len, labels), default=0)
    columns = max(1, min(4, int(figure.get_size_inches()[0] / name_width)))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, columnspacing=1.2)
