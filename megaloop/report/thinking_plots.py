"""Pictures of quality against mean loops, and of mean loops against difficulty; :mod:`megaloop.report.style` says how they look."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megaloop.report.style import INK, STYLE, legend_label, line_style, to_svg
from megaloop.report.thinking import FIXED, ORACLE, Ladder, Picture

__all__ = ["difficulty_plot", "quality_plot"]


def quality_plot(picture: Picture) -> str:
    """One curve per criterion; fixed counts in the colour of the text, the oracle as a star."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.9))
        axes = figure.subplots()
        own = [curve for curve in picture.curves if curve.name != FIXED and not curve.name.startswith(ORACLE)]
        for curve in picture.curves:
            x, y = [point.loops for point in curve.points], [point.value for point in curve.points]
            errors, label = [point.error or 0.0 for point in curve.points], legend_label(curve.name)
            if curve.name == FIXED:
                axes.errorbar(
                    x,
                    y,
                    yerr=errors,
                    label=label,
                    color=INK,
                    linestyle="--",
                    marker=".",
                    linewidth=1.0,
                    capsize=2,
                    zorder=4,
                )
            elif curve not in own:
                axes.plot(x, y, "*", label=label, color=INK, markersize=9)
            else:
                style = line_style(own.index(curve))
                axes.errorbar(
                    x, y, yerr=errors, label=label, marker="o", markersize=4, linewidth=1.3, capsize=2, **style
                )
        axes.set_xlabel("mean loops of the tokens that were asked for")
        axes.set_ylabel("accuracy" if picture.metric == "accuracy" else "loss, nats per token")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, columnspacing=1.2)
        return to_svg(figure)


def difficulty_plot(ladder: Ladder) -> str:
    """A line per threshold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.9))
        axes = figure.subplots()
        for index, (setting, line) in enumerate(ladder.lines.items()):
            axes.plot(
                list(line),
                list(line.values()),
                label=legend_label(setting),
                marker="o",
                markersize=4,
                linewidth=1.3,
                **line_style(index),
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("difficulty")
        axes.set_ylabel("mean loops")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, columnspacing=1.2)
        return to_svg(figure)
