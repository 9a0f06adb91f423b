"""Pictures of accuracy by difficulty; :mod:`megaloop.report.style` says how they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from megaloop.report.difficulty import ACCURACY, LAST, Board, Level, Rung
from megaloop.report.savings import Group, Saving
from megaloop.report.style import COLOURS, INK, STYLE, legend_label, line_style, to_svg

__all__ = ["by_difficulty_plot", "loops_plot", "over_flops_plot", "trade_offs_plot"]

_DOTTED: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": ":"}
_MARKERS = "os^"
_Curves = dict[int, list[tuple[float, Level]]]
"""(Start of the block, level) by extra times."""


def by_difficulty_plot(board: Board, metric: str) -> str:
    """Accuracy against difficulty, one line per group; the floor dotted, a line where training's difficulties end."""
    ladder = board.ladder
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.9))
        axes = figure.subplots()
        places = [rung.difficulty for rung in ladder.rungs]
        apart = _apart(places, len(board.groups))
        for number, group in enumerate(board.groups):
            found = [(rung, board.level(group, [rung], metric)) for rung in ladder.rungs]
            points = [(rung.difficulty + apart[number], level) for rung, level in found if level is not None]
            if points:
                _errorbars(axes, points, label=legend_label(group.label), **line_style(number))
        floors = [(rung.difficulty, board.floor(rung, metric)) for rung in ladder.rungs]
        known = [(difficulty, floor) for difficulty, floor in floors if floor is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker=".", markersize=3, **_DOTTED)
        if ladder.ends is not None:
            axes.axvline(ladder.ends, color=INK, linewidth=0.8, linestyle="--")
        _difficulties(axes, places)
        axes.set_ylabel("accuracy" if metric == ACCURACY else "accuracy on the last place")
        axes.set_ylim(_bottom(board), 1.03)
        _legend(figure, axes, columns=3)
        return to_svg(figure)


def _apart(places: Sequence[int], groups: int) -> list[float]:
    """Groups' error bars side by side, within a third of the smallest step."""
    step = min((after - before for before, after in pairwise(places)), default=1)
    return [step * (number - (groups - 1) / 2) / (3 * max(groups, 2)) for number in range(groups)]


def _difficulties(axes: Any, places: Sequence[int]) -> None:
    """Ticks where difficulties are, not closer than they can be read."""
    shown: list[int] = []
    for place in places:
        if not shown or place - shown[-1] >= (places[-1] - places[0]) / 20:
            shown.append(place)
    axes.set_xticks(shown)
    axes.set_xlabel("difficulty")


def trade_offs_plot(board: Board, rows: Sequence[Saving]) -> str:
    """The paper's figure 1 (arXiv 2602.16490): accuracy against parameters, FLOPs of inference and of training, a point per group.

    Above at the hardest trained difficulty, below the mean over the trained ones.
    """
    xs: list[tuple[str, list[float | None]]] = [
        ("parameters", [_or_none(row.parameters) for row in rows]),
        ("inference FLOPs per token", [_or_none(board.inference_flops(row.group)) for row in rows]),
        ("training FLOPs", [_or_none(row.flops.mean) for row in rows]),
    ]
    ladder = board.ladder
    wanted: list[tuple[str, Sequence[Rung]]] = [(_hardest(board), ladder.hardest)]
    if len(ladder.trained) > 1:
        wanted.append(("mean of trained difficulties", ladder.trained))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.0 * len(wanted) + 0.4), layout="constrained")
        panels = figure.subplots(len(wanted), 3, squeeze=False, sharey="row")
        for line, (name, rungs) in zip(panels, wanted, strict=True):
            levels = [board.level(row.group, rungs) for row in rows]
            for axes, (title, values) in zip(line, xs, strict=True):
                places = _beside(values)
                for number, (row, level, x) in enumerate(zip(rows, levels, places, strict=True)):
                    if level is not None and x is not None:
                        _point(axes, x, level, number, row.group.label)
                _floor(axes, board, rungs)
                axes.set_xlabel(title)
                axes.set_ylim(_bottom(board), 1.03)
                axes.margins(x=0.12)
                axes.xaxis.set_major_locator(MaxNLocator(5))
                axes.xaxis.set_major_formatter(ScalarFormatter() if title == "training FLOPs" else EngFormatter(sep=""))
            line[0].set_ylabel(f"accuracy,\n{name}")
        _legend(figure, panels[0][0], columns=5, outside=True)
        return to_svg(figure)


def _point(axes: Any, x: float, level: Level, number: int, label: str) -> None:
    axes.errorbar(
        [x], [level.mean], yerr=[level.margin or 0.0], fmt=_MARKERS[number // len(COLOURS) % 3], capsize=2, markersize=5.5,
        color=COLOURS[number % len(COLOURS)], label=legend_label(label), linewidth=1.2,
    )  # fmt: skip


def _or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _beside(values: Sequence[float | None]) -> list[float | None]:
    """Points of (almost) one x side by side, so that none covers another."""
    known = [value for value in values if value is not None]
    width = max(known) - min(known) if known else 0.0
    step = 0.02 * (width or abs(max(known, default=1.0)))
    placed: list[float | None] = []
    for index, value in enumerate(values):
        if value is None:
            placed.append(None)
            continue
        near = [other for other, x in enumerate(values) if x is not None and abs(x - value) < step / 2]
        placed.append(value + step * (near.index(index) - (len(near) - 1) / 2))
    return placed


def over_flops_plot(board: Board) -> str:
    """Accuracy against the training FLOPs so far, as trained, one line per group with its interval as a band."""
    wanted: list[tuple[str, Sequence[Rung]]] = [(_hardest(board), board.ladder.hardest)]
    if len(board.ladder.trained) > 1:
        wanted.append(("mean of trained difficulties", board.ladder.trained))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(wanted), 3.8), layout="constrained")
        panels = figure.subplots(1, len(wanted), squeeze=False, sharey=True)[0]
        for axes, (name, rungs) in zip(panels, wanted, strict=True):
            for number, group in enumerate(board.groups):
                points = [(flops, level) for _, flops, level in board.over_flops(group, rungs)]
                if points:
                    style = line_style(number)
                    _band(axes, points, style["color"])
                    x, y = [flops for flops, _ in points], [level.mean for _, level in points]
                    axes.plot(x, y, marker="o", markersize=3, label=legend_label(group.label), linewidth=1.4, **style)
            axes.set_xlabel("training FLOPs")
            _floor(axes, board, rungs)
            axes.set_ylabel(f"accuracy, {name}")
            axes.set_ylim(_bottom(board), 1.03)
            axes.set_xlim(left=0)
        _legend(figure, panels[0], columns=5, outside=True)
        return to_svg(figure)


def loops_plot(board: Board, rungs: Sequence[Rung], name: str) -> str | None:
    """The paper's figure 6: accuracy with a block of layers looped at inference against where the block begins, by extra times.

    One panel per group that has such results; dotted: as trained, on the same samples. None where no group has any.
    """
    shown = [(group, found) for group in board.groups if (found := _curves(board, group, rungs))]
    if not shown:
        return None
    columns = min(len(shown), 3)
    lines = math.ceil(len(shown) / columns)
    extras = sorted({extra for _, found in shown for extra in found})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(3.5 * columns, 4.6), 2.9 * lines + 0.3), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in panels.flat[len(shown) :]:
            axes.set_axis_off()
        for number, (axes, (group, found)) in enumerate(zip(panels.flat, shown, strict=False)):
            for extra, points in found.items():
                style = line_style(extras.index(extra))
                _band(axes, points, style["color"])
                x, y = [start for start, _ in points], [level.mean for _, level in points]
                label = f"{extra} extra time{'s' if extra > 1 else ''}"
                axes.plot(x, y, marker="o", markersize=3, label=label, linewidth=1.3, **style)
            trained = board.beside_loops(group, rungs)
            if trained is not None:
                axes.axhline(trained.mean, **_DOTTED)
            axes.set_title(group.label[:60], fontsize=10)
            axes.set_xticks(sorted({int(start) for points in found.values() for start, _ in points}))
            axes.set_xlabel("first layer of the block")
            axes.set_ylabel(f"accuracy,\n{name}" if number % columns == 0 else "")
        panels[0][0].set_ylim(*_limits(board, rungs, shown))
        widest = max(range(len(shown)), key=lambda number: len(shown[number][1]))
        _legend(figure, panels.flat[widest], columns=4, outside=True)
        return to_svg(figure)


def _curves(board: Board, group: Group, rungs: Sequence[Rung]) -> _Curves:
    found: _Curves = {}
    for loop in board.loops(group):
        level = board.looped(group, loop, rungs)
        if level is not None:
            found.setdefault(loop.extra, []).append((float(loop.start), level))
    return found


# --- what all share


def _hardest(board: Board) -> str:
    return f"difficulty {board.ladder.hardest[0].difficulty}"


def _errorbars(axes: Any, points: Sequence[tuple[float, Level]], **style: Any) -> None:
    axes.errorbar(
        [x for x, _ in points], [level.mean for _, level in points], yerr=[level.margin or 0.0 for _, level in points],
        capsize=2, marker="o", markersize=3.5, linewidth=1.3, elinewidth=0.9, **style,
    )  # fmt: skip


def _band(axes: Any, points: Sequence[tuple[float, Level]], colour: str) -> None:
    x, mean, margin = np.array([(x, level.mean, level.margin or 0.0) for x, level in points]).T
    axes.fill_between(x, mean - margin, mean + margin, color=colour, alpha=0.13, linewidth=0)


def _floor(axes: Any, board: Board, rungs: Sequence[Rung]) -> None:
    """The mean floor of some rungs, dotted, where all are known."""
    known = [floor for rung in rungs if (floor := board.floor(rung)) is not None]
    if len(known) == len(rungs):
        axes.axhline(fmean(known), **_DOTTED)


def _bottom(board: Board) -> float:
    """Of all pictures of levels one, so that they compare: a little under the lowest level or floor."""
    rungs, metrics = board.ladder.rungs, (ACCURACY, LAST)
    levels = (board.level(group, [rung], metric) for group in board.groups for rung in rungs for metric in metrics)
    floors = (board.floor(rung, metric) for rung in rungs for metric in metrics)
    means = [level.mean for level in levels if level is not None]
    return max(min([1.0, *means, *(floor for floor in floors if floor is not None)]), 0.0) - 0.05


def _limits(board: Board, rungs: Sequence[Rung], shown: Sequence[tuple[Group, _Curves]]) -> tuple[float, float]:
    """From the lowest to the highest level of some loops at inference, and those as trained; at least 10 points."""
    levels = [level for _, found in shown for points in found.values() for _, level in points]
    levels += [level for group, _ in shown if (level := board.level(group, rungs)) is not None]
    margins = [min(level.margin or 0.0, 0.1) for level in levels]  # two seeds may have an interval of any width
    low = min(level.mean - margin for level, margin in zip(levels, margins, strict=True))
    high = max(level.mean + margin for level, margin in zip(levels, margins, strict=True))
    room = max(0.1 - (high - low), 0.0) / 2 + 0.01
    return max(low - room, -0.03), min(high + room, 1.03)


def _legend(figure: Figure, axes: Any, *, columns: int, outside: bool = False) -> None:
    """Under one panel, or under all panels of a figure."""
    style: dict[str, Any] = {"ncols": columns, "fontsize": 9, "columnspacing": 1.2}
    if outside:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", **style)
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), **style)
