"""Runs that differ in their seed alone make a group; what groups cost, and what that saves against the baseline."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megaloop.config import ModelConfig
from megaloop.depth import DepthSpec
from megaloop.depth.flops import layer_parameters
from megaloop.errors import MegaloopError
from megaloop.evaluation.records import Record
from megaloop.report.read import Array, Run
from megaloop.text import printable

__all__ = [
    "BITS",
    "NATS",
    "Group",
    "Measure",
    "Saving",
    "Spread",
    "at_trained_depth",
    "choose_baseline",
    "choose_measure",
    "curve_points",
    "differences",
    "executed_layers",
    "flops_to_reach",
    "group_runs",
    "model_of",
    "run_labels",
    "savings",
    "trained_loops",
]

VALIDATION = "validation"
_OF_A_SEED = ("name", "run_dir", "seed")


@dataclass(frozen=True)
class Spread:
    """Values over seeds.

    Attributes:
        mean: nan where there are none.
        deviation: standard deviation (n - 1); None for fewer than two seeds.
        count: seeds.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        found = [float(value) for value in values if value is not None and math.isfinite(value)]
        if not found:
            return cls(math.nan, None, 0)
        deviation = float(np.std(found, ddof=1)) if len(found) > 1 else None
        return cls(float(np.mean(found)), deviation, len(found))


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds."""

    label: str
    runs: tuple[Run, ...]

    def spread(self, value: Callable[[Run], float | None]) -> Spread:
        return Spread.of(value(run) for run in self.runs)

    @property
    def name(self) -> str:
        """What several groups may be called, whose labels then say more."""
        return _label(self.runs)

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs are given.

    Configurations of one name have their runs' paths with it. Runs of one configuration whose tokenizers or validation
    samples differ (the data was prepared again between them) are of different groups, and so are two runs of one seed: a mean
    over them would count one seed as two.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if key not in _OF_A_SEED}
        if isinstance(same.get("init"), str):  # fine-tuned, each from the pretrained run of its seed
            same["init"] = _without_seed(same["init"])
        key, number = json.dumps(same, sort_keys=True), 0
        while not all(_is_another_seed_of(run, other) for other in groups.get(f"{key} {number}", [])):
            number += 1
        groups.setdefault(f"{key} {number}", []).append(run)
    names = [_label(members) for members in groups.values()]
    paths = [Path(_without_seed(str(members[0].path))) for members in groups.values()]
    labels = _told_apart(names, paths)
    return [Group(label, tuple(members)) for label, members in zip(labels, groups.values(), strict=True)]


def _is_another_seed_of(run: Run, other: Run) -> bool:
    return run.held_out.is_that_of(other.held_out) and (run.seed is None or run.seed != other.seed)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, and where several have one name, the ends of their paths in which they differ."""
    return _told_apart([run.name for run in runs], [run.path for run in runs])


def _told_apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    labels = []
    for name, path in zip(names, paths, strict=True):
        others = [other for twin, other in zip(names, paths, strict=True) if twin == name and other != path]
        alone = names.count(name) == 1
        labels.append(name if alone else f"{name} ({printable(_end(path, others), 120)})")
    # what even paths do not tell apart is counted
    return [
        f"{label}, {labels[: number + 1].count(label)}" if labels.count(label) > 1 else label
        for number, label in enumerate(labels)
    ]


def _end(path: Path, others: Sequence[Path]) -> Path:
    """As much of the end of a path as the others do not share."""
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if all(other.parts[-count:] != end for other in others):
            return Path(*end)
    return path


def _label(runs: Sequence[Run]) -> str:
    names = {_without_seed(run.name) for run in runs}
    return names.pop() if len(names) == 1 else runs[0].name


def _without_seed(name: str) -> str:
    """A name, or the names in a path, without ``-seed3`` at the end."""
    return re.sub(r"[-_.](?:seed|s)[-_]?\d+(?=/|$)", "", name)


@dataclass(frozen=True)
class Measure:
    """What validation losses are compared by.

    Attributes:
        unit: in which they are.
        of: of a run, one value for each of its validations.
    """

    unit: str
    of: Callable[[Run], Array]

    def last(self, run: Run) -> float | None:
        """Of the run's last validation; None where that was not finite."""
        values = self.of(run)
        return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


NATS = Measure("nats per token", lambda run: run.val_loss)
BITS = Measure("bits per byte", lambda run: run.val_bits)


def choose_measure(groups: Sequence[Group]) -> Measure:
    """Nats per token where all are validated on the same data by the same tokenizer; else bits per byte of text."""
    found = [run.held_out for group in groups for run in group.runs]
    return NATS if all(result.is_that_of(other) for result in found for other in found) else BITS


def choose_baseline(groups: Sequence[Group], name: str | None) -> Group:
    """The group that the others are measured by: the named one, ``baseline``, or the one of most FLOPs.

    Raises:
        MegaloopError: there is none of this name.
    """
    by_label = {group.label: group for group in groups}
    if name is not None and name not in by_label:
        near = difflib.get_close_matches(name, by_label, n=1)
        raise MegaloopError(
            f"report: --baseline {printable(name)}: there is {printable(', '.join(by_label), 400)}"
            + (f"; did you mean {near[0]}?" if near else "; choose one of these")
        )
    chosen = by_label.get(name or "baseline")
    return chosen or max(groups, key=lambda group: _known(group.spread(lambda run: run.flops[-1]).mean, 0.0))


def _known(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def flops_to_reach(run: Run, loss: float, measure: Measure = NATS) -> float | None:
    """FLOPs at which the validation loss first is ``loss`` or lower, on the straight line between validations; None: never."""
    before: tuple[float, float] | None = None
    for at, value in zip(run.flops[run.val_at], measure.of(run), strict=True):
        if math.isnan(value) or math.isnan(at):
            continue
        if value <= loss:
            if before is None or before[1] == value:
                return float(at)
            return float(before[0] + (at - before[0]) * (before[1] - loss) / (before[1] - value))
        before = (float(at), float(value))
    return None


@dataclass(frozen=True)
class Saving:
    """A group against the baseline.

    Attributes:
        fraction: of the baseline's FLOPs.
        loss: final validation loss, nats per token.
        bits: the same in bits per byte of text.
        compared: of the two the one that is compared.
        difference: of that from the baseline's, in percent of it, seed by
            seed where both have the seed.
        reached: FLOPs at which the baseline's final loss is reached; its count says in how many seeds it is.
        reached_fraction: of the baseline's FLOPs.
    """

    group: Group
    parameters: int | None
    layers: int
    depth: int
    steps: int
    tokens: Spread
    flops: Spread
    fraction: float
    loss: Spread
    bits: Spread
    compared: Spread
    difference: Spread
    reached: Spread
    reached_fraction: float | None
    rank_hours: float


def savings(groups: Sequence[Group], baseline: Group, measure: Measure = NATS) -> list[Saving]:
    """A row of the table for each group; losses are compared by ``measure``."""
    base_flops = baseline.spread(lambda run: run.flops[-1]).mean
    base_loss = baseline.spread(measure.last).mean
    by_seed = {run.seed: measure.last(run) for run in baseline.runs}

    def difference(run: Run) -> float | None:
        own, against = measure.last(run), by_seed.get(run.seed, base_loss)
        return None if own is None or not against or math.isnan(against) else 100 * (own / against - 1)

    def reached(run: Run) -> float | None:
        against = by_seed.get(run.seed, base_loss)
        return None if against is None or math.isnan(against) else flops_to_reach(run, against, measure)

    rows = []
    for group in groups:
        last, flops, reach = group.runs[-1], group.spread(lambda run: run.flops[-1]), group.spread(reached)
        parameters = _parameters(last)
        rows.append(
            Saving(
                group=group,
                parameters=parameters,
                layers=last.layers,
                depth=last.depth,
                steps=int(last.step[-1]),
                tokens=group.spread(lambda run: run.tokens[-1]),
                flops=flops,
                fraction=flops.mean / base_flops if base_flops else math.nan,
                loss=group.spread(NATS.last),
                bits=group.spread(BITS.last),
                compared=group.spread(measure.last),
                difference=group.spread(difference),
                reached=reach,
                reached_fraction=reach.mean / base_flops if reach.count and base_flops > 0 else None,
                rank_hours=float(sum(run.seconds[-1] * run.ranks for run in group.runs)) / 3600,
            )
        )
    return rows


def _parameters(run: Run) -> int | None:
    """Of the model as it ends; None where the run does not say what it takes."""
    model = model_of(run)
    if run.plan is None or run.parameters is None or model is None:
        return None
    return run.parameters + (run.layers - run.plan.layers) * layer_parameters(model)


def model_of(run: Run) -> ModelConfig | None:
    """The widths of its layers; None where its configuration holds none that make sense."""
    try:
        return ModelConfig.model_validate(run.config["model"])
    except (KeyError, TypeError, ValueError):
        return None


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each group) where groups differ."""
    flat = [_flat({k: v for k, v in group.runs[0].config.items() if k not in _OF_A_SEED}) for group in groups]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key, "") for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(values, dict) and values:
        parts = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: "" if values is None else json.dumps(values).strip('"')}


def at_trained_depth(record: Record, run: Run) -> bool:
    """The evaluation ran the model as it was trained."""
    return trained_loops(run) == record.subject.loops


def trained_loops(run: Run) -> int:
    """How often the looped block ran at the end of training; 1 without loop."""
    if run.depth == run.layers:
        return 1
    loops = {record.subject.loops for record in run.evaluations if executed_layers(record.subject.depth) == run.depth}
    return min(loops, default=1)


@lru_cache(maxsize=1024)
def executed_layers(recorded: str) -> int:
    """Layers that ran, by the depth of a record, which is text; -1 where it makes no sense."""
    try:
        return DepthSpec.parse(recorded).plan.depth
    except MegaloopError:
        return -1


def curve_points(x: Array, y: Array, count: int) -> tuple[Array, Array]:
    """A curve in at most ``count`` points: means of neighbours, gaps left out."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= count:
        return x, y
    edges = np.linspace(0, len(x), count + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / sizes, np.add.reduceat(y, edges[:-1]) / sizes
