"""The page's part on reasoning by difficulty: numbers for JSON, pictures and tables for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megaloop.report.claims import NOT_SEEN, SEEN, Claim, ambiguous, claims
from megaloop.report.difficulty import ACCURACY, LAST, Board, Level, boards
from megaloop.report.difficulty_plots import by_difficulty_plot, loops_plot, over_flops_plot, trade_offs_plot
from megaloop.report.lr_sweep import RateSweep, read_lr_sweep
from megaloop.report.savings import Group, Saving
from megaloop.text import printable

__all__ = ["Reasoning", "reasoning", "sweep_table"]


@dataclass(frozen=True)
class Reasoning:
    """What the page says of difficulties; empty where none were measured.

    Attributes:
        numbers: for the fields of :class:`megaloop.report.page.Report` of these names.
        ladders: of each ladder what the template shows.
        claims: in the order of the page.
        summary: sentences about the claims.
    """

    numbers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ladders: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    @property
    def tests(self) -> int:
        """Claims that were tested: the family that Holm's procedure adjusts for."""
        return sum(claim.p is not None for claim in self.claims)

    @property
    def has_loops(self) -> bool:
        return any(ladder["loops"] for ladder in self.ladders)


def reasoning(groups: Sequence[Group], rows: Sequence[Saving]) -> Reasoning:
    """Claims are about the first ladder, the one whose data is configured first."""
    found = boards(groups)
    if not found:
        return Reasoning()
    judged = claims(found[0])
    numbers = {
        "difficulties": [entry for board in found for entry in _difficulties(board)],
        "trade_offs": [entry for board in found for entry in _trade_offs(board, rows)],
        "over_flops": [entry for board in found for entry in _over_flops(board)],
        "block_loops": [entry for board in found for entry in _loops(board)],
        "claims": [_claim(claim) for claim in judged],
    }
    return Reasoning(
        numbers, [_view(board, rows) for board in found], judged, [*_summary(judged), *_ambiguous(found[0])]
    )


def _summary(judged: Sequence[Claim]) -> list[str]:
    if not judged:
        return []
    seen, not_seen = (sum(claim.verdict == word for claim in judged) for word in (SEEN, NOT_SEEN))
    unclear = len(judged) - seen - not_seen
    word = "claim" if len(judged) == 1 else "claims"
    return [
        f"Of {len(judged)} {word} about reasoning by difficulty, {seen} {_be(seen)} seen, {not_seen} {_be(not_seen)} not seen and "
        f"{unclear} {_be(unclear)} unclear."
    ]


def _ambiguous(board: Board) -> list[str]:
    return [
        f"Nothing is claimed about {name}: {len(labels)} groups of runs have that name ({', '.join(labels)}). "
        "Give the report one of them, and of each seed one run."
        for name, labels in ambiguous(board).items()
    ]


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _view(board: Board, rows: Sequence[Saving]) -> dict[str, Any]:
    ladder = board.ladder
    trained = bool(ladder.hardest)
    by_difficulty = [("All places", by_difficulty_plot(board, ACCURACY))]
    if any(board.level(group, [rung], LAST) for group in board.groups for rung in ladder.rungs):
        by_difficulty.append(("The last place of each sample", by_difficulty_plot(board, LAST)))
    pictures: list[tuple[str, str | None]] = []
    if trained:
        hardest = f"difficulty {ladder.hardest[0].difficulty}"
        pictures.append((f"At {hardest}, the hardest of training", loops_plot(board, ladder.hardest, hardest)))
        pictures.append(("Beyond training", loops_plot(board, ladder.beyond, "mean beyond training")))
    loops = [(title, Markup(svg)) for title, svg in pictures if svg is not None]
    several = any(len(board.over_flops(group, ladder.hardest)) > 1 for group in board.groups)
    return {
        "name": ladder.name,
        "by_difficulty": [(title, Markup(svg)) for title, svg in by_difficulty],
        "ends": ladder.ends is not None,
        "trade_offs": Markup(trade_offs_plot(board, rows)) if trained else None,
        "over_flops": Markup(over_flops_plot(board)) if trained and several else None,
        "loops": loops,
        "rungs": ladder.rungs,
        "hardest": ladder.hardest[0].difficulty if trained else None,
        "beyond": set(ladder.beyond),
        "floors": [board.floor(rung) for rung in ladder.rungs],
        "levels": [(group.label, [board.level(group, [rung]) for rung in ladder.rungs]) for group in board.groups],
    }


# --- numbers


def _level(level: Level | None) -> dict[str, Any] | None:
    if level is None:
        return None
    over = level.over_seeds
    return {"value": over.mean, "seeds": over.count, "low": over.low, "high": over.high, "standard_error": level.error}


def _difficulties(board: Board) -> list[dict[str, Any]]:
    return [
        {
            "ladder": board.ladder.name,
            "group": group.label,
            "difficulty": rung.difficulty,
            "data": printable(rung.data),
            "trained": rung in board.ladder.trained,
            "floor": board.floor(rung),
            "last_floor": board.floor(rung, LAST),
            "accuracy": _level(board.level(group, [rung])),
            "last_accuracy": _level(board.level(group, [rung], LAST)),
        }
        for group in board.groups
        for rung in board.ladder.rungs
    ]


def _trade_offs(board: Board, rows: Sequence[Saving]) -> list[dict[str, Any]]:
    ladder = board.ladder
    wanted = {"hardest": ladder.hardest, "mean_trained": ladder.trained, "mean_beyond": ladder.beyond}
    return [
        {
            "ladder": ladder.name,
            "group": row.group.label,
            "parameters": row.parameters,
            "inference_flops_per_token": board.inference_flops(row.group),
            "training_flops": row.flops.mean if row.flops.count else None,
            **{name: _level(board.level(row.group, rungs)) for name, rungs in wanted.items()},
        }
        for row in rows
    ]


def _over_flops(board: Board) -> list[dict[str, Any]]:
    ladder = board.ladder
    made = []
    for group in board.groups:
        means = {step: level for step, _, level in board.over_flops(group, ladder.trained)}
        for step, flops, level in board.over_flops(group, ladder.hardest):
            made.append(
                {
                    "ladder": ladder.name,
                    "group": group.label,
                    "step": step,
                    "training_flops": flops,
                    "hardest": _level(level),
                    "mean_trained": _level(means.get(step)),
                }
            )
    return made


def _loops(board: Board) -> list[dict[str, Any]]:
    ladder = board.ladder
    return [
        {
            "ladder": ladder.name,
            "group": group.label,
            "block": f"{loop.start}:{loop.stop}",
            "extra_times": loop.extra,
            "hardest": _level(board.looped(group, loop, ladder.hardest)),
            "mean_beyond": _level(board.looped(group, loop, ladder.beyond)),
        }
        for group in board.groups
        for loop in board.loops(group)
    ]


def _claim(claim: Claim) -> dict[str, Any]:
    effect = claim.effect
    return {
        "claim": claim.text,
        "note": claim.note,
        "bound": claim.bound,
        "effect": None if effect is None else effect.mean,
        "low": None if effect is None else effect.low,
        "high": None if effect is None else effect.high,
        "seeds": 0 if effect is None else effect.count,
        "p": claim.p,
        "p_holm": claim.adjusted,
        "verdict": claim.verdict,
    }


# --- learning rates


def sweep_table(directory: Path | None) -> tuple[list[float], list[tuple[str, RateSweep]]]:
    """The learning rates of a bench's sweep, ascending, and what each contender's runs had; nothing where there was none.

    Raises:
        MegaloopError: its file is damaged.
    """
    found = {} if directory is None else read_lr_sweep(directory)
    rates = sorted({rate for sweep in found.values() for rate in sweep.losses})
    return rates, [(printable(name, 80), sweep) for name, sweep in found.items()]
