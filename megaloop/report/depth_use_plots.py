"""Pictures of how models use their depth; :mod:`megaloop.report.style` says how they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megaloop.report.depth_use import DepthUse
from megaloop.report.style import INK, STYLE, legend_label, line_style, to_svg

__all__ = ["curves_plot", "effects_plot", "interventions_plot"]

Panel = tuple[str, str, str, str]
"""Measure, curve, title and what the numbers are."""
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


def curves_plot(found: Sequence[DepthUse], panels: Sequence[Panel]) -> str | None:
    """Curves over the layers, a line for each group, with the range over its runs; None where no group has any."""
    shown = [panel for panel in panels if any(use.curve(panel[0], panel[1]) is not None for use in found)]
    if not shown:
        return None
    columns = min(len(shown), 2 if len(shown) == 4 else 3)
    lines = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1 * columns, 2.9 * lines + 0.4), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, (measure, name, title, unit) in zip(grid.flat, shown, strict=False):
            for use in found:
                _line(axes, use, use.curve(measure, name))
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("layer")
            axes.set_ylabel(unit)
        _legend(figure, grid)
        return to_svg(figure)


def _line(axes: Any, use: DepthUse, values: NDArray[np.float64] | None) -> None:
    if values is None:
        return
    places = np.arange(values.shape[1])
    style = line_style(use.number)
    axes.plot(places, values.mean(0), marker="o", markersize=3, linewidth=1.4, label=legend_label(use.label), **style)
    if len(values) > 1:
        axes.fill_between(places, values.min(0), values.max(0), color=style["color"], alpha=0.13, linewidth=0)


def effects_plot(found: Sequence[DepthUse], name: str = "future effect on later layers") -> str | None:
    """Which layer reads what which layer wrote: a matrix for each group, all in one scale."""
    shown = [(use, matrix) for use in found if (matrix := use.matrix("effects", name)) is not None]
    if not shown:
        return None
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    highest = max(float(np.nanmax(matrix)) for _, matrix in shown)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.7 * columns + 0.8, 2.7 * lines + 0.3), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, (use, matrix) in zip(grid.flat, shown, strict=False):
            later = np.where(np.triu(np.ones_like(matrix), 1) > 0, matrix, np.nan)
            picture = axes.imshow(later, origin="lower", cmap="viridis", vmin=0, vmax=highest or 1.0)
            axes.set_title(use.label[:40], fontsize=10)
            axes.set_xlabel("later layer")
            axes.set_ylabel("skipped layer")
        figure.colorbar(picture, ax=grid, shrink=0.7, label="relative change")
        return to_svg(figure)


def interventions_plot(found: Sequence[DepthUse], kind: str, unit: str = "loss") -> str | None:
    """What an intervention at each place does to the loss: a panel for each size of the block, a line for each group."""
    names = sorted({name for use in found for run in use.runs if kind in run for name in run[kind].curves})
    names = [name for name in names if name.endswith(f": {unit}")]
    if not names:
        return None
    columns = min(len(names), 4)
    lines = math.ceil(len(names) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(2.9 * columns, 4.6), 2.7 * lines + 0.5), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            for use in found:
                _line(axes, use, use.curve(kind, name))
            axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(name.partition(":")[0], fontsize=10)
            axes.set_xlabel("first layer" if kind != "exit" else "layers before the exit")
        grid[0][0].set_ylabel("change of the loss, nats" if unit == "loss" else "change of accuracy")
        _legend(figure, grid)
        return to_svg(figure)


def _legend(figure: Figure, grid: Any) -> None:
    """Of the panel with most lines, under all of them."""
    best = max(grid.flat, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    handles, labels = best.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, columnspacing=1.2)
