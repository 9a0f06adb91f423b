"""The page's pictures of losses and primitives; :mod:`megaloop.report.style` says how they look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megaloop.report.primitives import MEAN, Cell, by_loops, by_shots, cells, held_out
from megaloop.report.read import Array, Run
from megaloop.report.savings import NATS, Group, Measure, curve_points, trained_loops
from megaloop.report.style import COLOURS, INK, STYLE, legend_label, line_style, to_svg

__all__ = ["loops_plot", "loss_plot", "primitives_plot", "shots_plot"]

_POINTS = 300
_RING: dict[str, Any] = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.2}


def loss_plot(groups: Sequence[Group], axis: str, measure: Measure) -> str:
    """Validation loss (lines) against ``tokens``, ``flops`` or ``seconds``; boundaries as dots; in nats also training loss (faint)."""
    titles = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4))
        axes = figure.subplots()
        for number, group in enumerate(groups):
            style = line_style(number)
            for index, run in enumerate(group.runs):
                x: Array = getattr(run, axis)
                if measure is NATS:  # how many bytes of text a training step saw is not known
                    axes.plot(
                        *curve_points(x, run.loss, _POINTS), alpha=0.18, linewidth=0.8, zorder=1, color=style["color"]
                    )
                label = legend_label(group.label) if index == 0 else None
                axes.plot(x[run.val_at], measure.of(run), linewidth=1.4, label=label, zorder=3, **style)
                _mark(axes, run, x, measure.of(run), style["color"])
        axes.set_xlabel(titles[axis])
        axes.set_ylabel(f"loss, {measure.unit}")
        axes.set_ylim(*_limits(groups, measure))
        axes.set_xlim(left=0)
        axes.legend(loc="upper right", fontsize=9)
        return to_svg(figure)


def _mark(axes: Any, run: Run, x: Array, losses: Array, colour: str) -> None:
    """A dot where the model's depth changes, on the line of its validation losses."""
    if not len(run.val_at):
        return
    at = [int(np.searchsorted(run.step, boundary.step)) for boundary in run.boundaries]
    places = x[np.array([min(index, len(x) - 1) for index in at], dtype=np.int64)]
    heights = np.interp(places, x[run.val_at], losses, left=np.nan)
    axes.plot(places, heights, "o", markersize=3.5, color=colour, zorder=4)


def _limits(groups: Sequence[Group], measure: Measure) -> tuple[float, float]:
    """What there is to see: from a little under the lowest loss to where the second twentieth of training lies."""
    runs = [run for group in groups for run in group.runs]
    shown = [measure.of(run) for run in runs] + ([run.loss for run in runs] if measure is NATS else [])
    finite = [curve[np.isfinite(curve)] for curve in shown]
    lowest = min((float(values.min()) for values in finite if len(values)), default=0.0)
    losses = finite[len(runs) :] or finite
    early = max(
        (float(np.median(loss[len(loss) // 20 : len(loss) // 10 + 1])) for loss in losses if len(loss)), default=lowest
    )
    room = max(early - lowest, 0.1)
    return lowest - 0.05 * room, early + 0.1 * room


def _errorbar(axes: Any, points: Mapping[int, Cell] | Mapping[float, Cell], **style: Any) -> None:
    axes.errorbar(
        list(points),
        [cell.value for cell in points.values()],
        yerr=[cell.error or 0.0 for cell in points.values()],
        capsize=2,
        marker="o",
        markersize=4,
        linewidth=1.3,
        **style,
    )


def primitives_plot(groups: Sequence[Group], shots: int, chance: float) -> str:
    """The mean accuracy over the primitives against the layers that are executed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6))
        axes = figure.subplots()
        depths = sorted({group.runs[-1].depth for group in groups})
        # contenders share depths: side by side, or they would lie on each other
        apart = 0.03 * max(depths[-1] - depths[0], 4)
        for number, (group, cell) in enumerate(zip(groups, cells(groups, MEAN, shots), strict=True)):
            if cell is not None:
                points = {group.runs[-1].depth + apart * (number - (len(groups) - 1) / 2): cell}
                label = legend_label(f"{group.label}, {group.runs[-1].layers} unique")
                _errorbar(axes, points, color=line_style(number)["color"], label=label)
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("layers executed")
        axes.set_xticks(depths)
        axes.set_ylabel("mean accuracy")
        axes.margins(x=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, columnspacing=1.2)
        return to_svg(figure)


def shots_plot(groups: Sequence[Group], chance: float) -> str:
    """The mean accuracy against the number of shots."""
    return _curves(
        groups, lambda group: by_shots(group, MEAN), "solved examples before the question", "mean accuracy", chance
    )


def loops_plot(groups: Sequence[Group], shots: int, chance: float, data: str | None = None) -> str:
    """The mean accuracy, or the held-out loss on ``data``, against the loops at inference; the trained number is ringed."""

    def points(group: Group) -> dict[int, Cell]:
        if data is None:
            return by_loops(group, MEAN, shots)
        counts = sorted({record.subject.loops for run in group.runs for record in run.evaluations})
        found = {count: [held.loss for held in held_out(group, count) if held.data == data] for count in counts}
        return {count: losses[0] for count, losses in found.items() if losses}

    name = "mean accuracy" if data is None else "held-out loss, nats per token"
    return _curves(
        groups, points, "times that the middle block runs", name, chance if data is None else None, ring=True
    )


def _curves(
    groups: Sequence[Group],
    points: Callable[[Group], dict[int, Cell]],
    x: str,
    y: str,
    chance: float | None,
    ring: bool = False,
) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6))
        axes = figure.subplots()
        places: set[int] = set()
        for number, group in enumerate(groups):
            if found := points(group):
                _errorbar(axes, found, label=legend_label(group.label), **line_style(number))
                if ring and (trained := trained_loops(group.runs[-1])) in found:
                    axes.plot([trained], [found[trained].value], "o", **_RING, color=COLOURS[number % len(COLOURS)])
                places |= set(found)
        if chance is not None:
            axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(sorted(places))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9, columnspacing=1.2)
        return to_svg(figure)
