"""The page: read runs, work out the tables, draw the pictures, fill in the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaloop import __version__
from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.report import plots
from megaloop.report.format import FILTERS, format_cell, format_spread
from megaloop.report.primitives import (
    MEAN,
    Cell,
    by_loops,
    by_shots,
    cells,
    chance_of,
    exact_match,
    held_out,
    of_one_version,
    shots_shown,
    tasks_of,
)
from megaloop.report.read import Run, read_run
from megaloop.report.reasoning import reasoning, sweep_table
from megaloop.report.savings import (
    BITS,
    Group,
    Measure,
    Saving,
    choose_baseline,
    choose_measure,
    differences,
    group_runs,
    run_labels,
    savings,
)
from megaloop.report.signatures import signatures
from megaloop.report.style import COLOURS
from megaloop.report.thinking import ladders, pictures, texts
from megaloop.report.thinking_plots import difficulty_plot, quality_plot

__all__ = ["Report", "make_report", "write_report"]


@dataclass(frozen=True)
class Report:
    """What the page shows, as numbers.

    Attributes:
        compared_by: the unit of the losses that are compared.
        difficulties, trade_offs, over_flops, block_loops, claims: of reasoning by difficulty; empty where it was not measured.
        learning_rates: what a sweep found, by contender.
        signatures: how models use their depth, where it was diagnosed.
        thinking, loops_by_difficulty: quality and mean loops where tokens left the loop early.
    """

    baseline: str
    compared_by: str
    summary: list[str]
    savings: list[dict[str, Any]]
    primitives: list[dict[str, Any]]
    loops: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    difficulties: list[dict[str, Any]] = field(default_factory=list)
    trade_offs: list[dict[str, Any]] = field(default_factory=list)
    over_flops: list[dict[str, Any]] = field(default_factory=list)
    block_loops: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    learning_rates: list[dict[str, Any]] = field(default_factory=list)
    signatures: list[dict[str, Any]] = field(default_factory=list)
    thinking: list[dict[str, Any]] = field(default_factory=list)
    loops_by_difficulty: list[dict[str, Any]] = field(default_factory=list)


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    baseline: str | None = None,
    title: str | None = None,
    lr_sweep: Path | None = None,
) -> Report:
    """Write the page about some runs.

    Args:
        paths: run directories.
        baseline: label of the group that the others are measured by; default: ``baseline``, or the one of most FLOPs.
        lr_sweep: directory of a bench whose ``lr_sweep.json`` is shown, if it has one.

    Raises:
        MegaloopError: no run, one that cannot be read, no such baseline, a damaged sweep, or a page that cannot be written.
    """
    report, page = make_report(paths, baseline=baseline, title=title, lr_sweep=lr_sweep)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode())
    except OSError as error:
        raise MegaloopError(f"report: cannot write {out} ({error.strerror})") from None
    return report


def make_report(
    paths: Sequence[Path], *, baseline: str | None = None, title: str | None = None, lr_sweep: Path | None = None
) -> tuple[Report, str]:
    """The numbers, and the page as HTML."""
    runs, tasks_version = of_one_version([read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)])
    if not runs:
        raise MegaloopError("report: give at least one run directory")
    groups = group_runs(runs)
    base = choose_baseline(groups, baseline)
    measure, labels = choose_measure(groups), run_labels(runs)
    rows = savings(groups, base, measure)
    tasks, shots = tasks_of(groups), shots_shown(groups)
    chance = chance_of(groups, MEAN) if tasks else math.nan
    found, (rates, swept), depth = reasoning(groups, rows), sweep_table(lr_sweep), signatures(groups)
    drawn, by_difficulty = pictures(groups), ladders(groups)
    report = Report(
        baseline=base.label,
        compared_by=measure.unit,
        summary=[*_summary(rows, base, groups, shots, measure), *found.summary],
        savings=[_saving_numbers(row) for row in rows],
        primitives=_primitive_numbers(groups, tasks, shots),
        loops=_loop_numbers(groups, shots),
        runs=[_run_numbers(run, label) for run, label in zip(runs, labels, strict=True)],
        learning_rates=[{"contender": name, **sweep.to_json()} for name, sweep in swept],
        signatures=depth.numbers,
        thinking=[point for picture in drawn for point in picture.to_json()],
        loops_by_difficulty=[point for ladder in by_difficulty for point in ladder.to_json()],
        **found.numbers,
    )
    page = _template().render(
        title=title or (f"Run {runs[0].name}" if len(runs) == 1 else f"{len(groups)} configurations, {len(runs)} runs"),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        report=report,
        groups=groups,
        base=base,
        colours=[COLOURS[number % len(COLOURS)] for number in range(len(groups))],
        rows=rows,
        losses=[(name, Markup(plots.loss_plot(groups, axis, measure))) for name, axis in _AXES],
        in_bits=measure is BITS,
        boundaries=[(label, boundary) for run, label in zip(runs, labels, strict=True) for boundary in run.boundaries],
        reasoning=found,
        depth=depth,
        thinking_pictures=[(picture, Markup(quality_plot(picture))) for picture in drawn],
        thinking_ladders=[(ladder, Markup(difficulty_plot(ladder))) for ladder in by_difficulty],
        thinking_texts=texts(groups),
        rates=rates,
        swept=swept,
        tasks=_task_rows(groups, tasks, shots),
        tasks_version=tasks_version,
        shots=shots,
        primitives_plot=Markup(plots.primitives_plot(groups, shots, chance)) if tasks else None,
        shots_plot=Markup(plots.shots_plot(groups, chance))
        if any(len(by_shots(g, MEAN)) > 1 for g in groups)
        else None,
        loop_plots=_loop_plots(groups, shots, chance),
        differences=differences(groups) if len(groups) > 1 else [],
    )
    return report, page


_AXES = (("against FLOPs", "flops"), ("against tokens", "tokens"), ("against time", "seconds"))


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("megaloop.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template("report.html.j2")


# --- the page's words


def _summary(rows: list[Saving], base: Group, groups: Sequence[Group], shots: int, measure: Measure) -> list[str]:
    """What the tables say, in sentences; only what was measured."""
    said = []
    loss = "a validation loss"
    if measure is BITS:
        loss = "bits per byte of validation text"
        said.append(
            "The runs are validated on different data, or with other tokenizers, so losses are compared in bits per byte of "
            "text instead of nats per token. Where the text differs, a part of each difference may be the text's."
        )
    for row in rows:
        if row.group is base or math.isnan(row.fraction):
            continue
        text = f"{row.group.label} took {row.fraction:.3f} of the FLOPs of {base.label}"
        if row.difference.count:
            word = "higher" if row.difference.mean > 0 else "lower"
            text += f" and ended with {loss} {abs(row.difference.mean):.2f}% {word} ({format_spread(row.compared, 4)})"
        if row.reached_fraction is not None:
            of = (
                ""
                if row.reached.count == len(row.group.runs)
                else f" in {row.reached.count} of {len(row.group.runs)} seeds"
            )
            text += f"; it reached the loss of {base.label} with {row.reached_fraction:.3f} of its FLOPs{of}"
        elif row.difference.count:
            text += f"; it did not reach the loss of {base.label}"
        said.append(text + ".")
    means = [(group.label, cell) for group, cell in zip(groups, cells(groups, MEAN, shots), strict=True) if cell]
    if len(means) > 1:
        label, best = max(means, key=lambda mean: mean[1].value)
        second = max((mean for mean in means if mean[0] != label), key=lambda item: item[1].value)
        clear = _clear(best, second[1])
        said.append(
            f"Over the primitives, {label} has the highest mean accuracy, {format_cell(best)}; next is {second[0]} with "
            f"{format_cell(second[1])}"
            + ("." if clear else ", less than three standard errors behind: no difference is shown.")
        )
    if any(not group.finished for group in groups):
        said.append("Some runs are unfinished: their last values are compared.")
    if all(len(group.runs) == 1 for group in groups) and len(groups) > 1:
        said.append("One seed each: how much of a difference is chance is not known.")
    return said


def _clear(best: Cell, other: Cell) -> bool:
    """The lead is more than three standard errors of the difference; never where one is not known."""
    if best.error is None or other.error is None:
        return False
    return best.value - other.value > 3 * math.hypot(best.error, other.error)


def _task_rows(groups: Sequence[Group], tasks: list[str], shots: int) -> list[dict[str, Any]]:
    rows = []
    for task in [*tasks, MEAN] if tasks else []:
        values = cells(groups, task, shots)
        known = sorted((cell for cell in values if cell is not None), key=lambda cell: -cell.value)
        best = known[0] if len(known) > 1 and _clear(known[0], known[1]) else None
        exact = cells(groups, task, shots, exact_match)
        rows.append(
            {
                "task": task,
                "chance": chance_of(groups, task),
                "cells": [
                    (cell, other, cell is not None and cell is best) for cell, other in zip(values, exact, strict=True)
                ],
            }
        )
    return rows


def _loop_plots(groups: Sequence[Group], shots: int, chance: float) -> list[tuple[str, Markup]]:
    looped = [group for group in groups if len({r.subject.loops for run in group.runs for r in run.evaluations}) > 1]
    if not looped:
        return []
    made = []
    if any(by_loops(group, MEAN, shots) for group in looped):
        made.append((f"Primitives, {shots} shots", Markup(plots.loops_plot(groups, shots, chance))))
    for data in dict.fromkeys(held.data for group in looped for held in held_out(group)):
        made.append((f"Held out of {data}", Markup(plots.loops_plot(groups, shots, chance, data))))
    return made


# --- numbers


def _saving_numbers(row: Saving) -> dict[str, Any]:
    return {
        "group": row.group.label,
        "seeds": len(row.group.runs),
        "finished": row.group.finished,
        "parameters": row.parameters,
        "layers": row.layers,
        "depth": row.depth,
        "steps": row.steps,
        "tokens": _known(row.tokens.mean),
        "flops": _known(row.flops.mean),
        "fraction_of_baseline": _known(row.fraction),
        "val_loss": _known(row.loss.mean),
        "val_loss_deviation": row.loss.deviation,
        "difference_percent": _known(row.difference.mean),
        "difference_deviation": row.difference.deviation,
        "bits_per_byte": _known(row.bits.mean),
        "bits_per_byte_deviation": row.bits.deviation,
        "flops_to_baseline_loss": _known(row.reached.mean),
        "fraction_to_baseline_loss": row.reached_fraction,
        "seeds_that_reached": row.reached.count,
        "rank_hours": row.rank_hours,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell_numbers(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else {"value": cell.value, "error": cell.error, "seeds": cell.seeds}


def _primitive_numbers(groups: Sequence[Group], tasks: list[str], shots: int) -> list[dict[str, Any]]:
    return [
        {"group": group.label, "task": task, "shots": shots, "chance": chance_of(groups, task), "accuracy": _cell_numbers(found),
         "exact_match": _cell_numbers(exact)}
        for task in ([*tasks, MEAN] if tasks else [])
        for group, found, exact in zip(groups, cells(groups, task, shots), cells(groups, task, shots, exact_match), strict=True)
    ]  # fmt: skip


def _loop_numbers(groups: Sequence[Group], shots: int) -> list[dict[str, Any]]:
    return [
        {
            "group": group.label,
            "loops": loops,
            "shots": shots,
            "mean_accuracy": _cell_numbers(cell),
            "held_out": {held.data: _cell_numbers(held.loss) for held in held_out(group, loops)},
        }
        for group in groups
        for loops, cell in by_loops(group, MEAN, shots).items()
    ]


def _run_numbers(run: Run, label: str) -> dict[str, Any]:
    seconds, tokens = float(run.seconds[-1]), _known(float(run.tokens[-1]))
    return {
        "run": str(run.path),
        "name": run.name,
        "label": label,
        "seed": run.seed,
        "steps": int(run.step[-1]),
        "of": run.steps,
        "tokens": tokens,
        "flops": _known(float(run.flops[-1])),
        "seconds": seconds,
        "ranks": run.ranks,
        "tokens_per_second": tokens / seconds if tokens is not None and seconds > 0 else None,
        "memory_bytes": run.memory_bytes,
        "restarts": run.restarts,
        "rollbacks": run.rollbacks,
        "torch": run.torch,
        "attention": run.attention,
    }
