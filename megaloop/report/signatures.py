"""The page's part on how models use their depth: numbers for JSON, pictures and a table for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from markupsafe import Markup

from megaloop.report import depth_use_plots as plots
from megaloop.report.depth_use import DepthUse, Row, depth_use, signature_rows
from megaloop.report.savings import Group

__all__ = ["PAPERS", "Signatures", "signatures"]

PAPERS = {
    "depth score": "24 layers on MATH: 6.56 (baseline), 9.12 (4x6), 7.82 (4-4x4-4), 8.72 (LIDAS)",
    "depth score per step of difficulty": "whether harder questions use more depth",
    "overlap at the last layer": "0.80 (baseline), 0.67 (LIDAS)",
    "period of the block": "grown and looped models repeat a pattern of four layers",
    "late layers indispensable": "without the last layer Lambada falls to .08 (grown), .33 (baseline)",
    "middle permutable": "four layers of the middle exchanged: Lambada .46 to .49 (grown), .20 to .28 (baseline)",
    "gain from repeating a block": "grown models gain, with one or two extra times most",
}
"""What arXiv 2512.08819 and 2602.16490 saw, by signature."""
_INTERVENTIONS = {
    "skip": ("Skipped", "blocks of 1, 2, 4 and 8 layers left out"),
    "swap": ("Exchanged", "blocks of 1, 2, 4 and 8 layers exchanged with the next ones"),
    "reverse": ("Reversed", "four layers in reverse order"),
    "repeat": ("Repeated", "a block of layers run 1 to 4 times more"),
}


@dataclass(frozen=True)
class Signatures:
    """What the page says of depth; empty where nothing was diagnosed.

    Attributes:
        numbers: a record for each signature and group.
        groups: the diagnosed ones.
        rows: of the table: the signature, a cell for each group, what the papers saw.
    """

    numbers: list[dict[str, Any]] = field(default_factory=list)
    groups: list[DepthUse] = field(default_factory=list)
    rows: list[tuple[str, list[Row | None], str]] = field(default_factory=list)

    @cached_property
    def pictures(self) -> list[tuple[str, Markup, str]]:
        """(title, picture, what it shows)."""
        return _pictures(self.groups) if self.groups else []


def signatures(groups: Sequence[Group]) -> Signatures:
    """The section about some groups of runs."""
    found = depth_use(groups)
    if not found:
        return Signatures()
    rows = [(name, cells, PAPERS.get(name, "")) for name, cells in signature_rows(found)]
    numbers = [
        {
            "group": use.label,
            "signature": name,
            "runs": len(use.runs),
            "value": cell.mean,
            "low": cell.low,
            "high": cell.high,
            "verdicts": cell.verdicts,
            "why": cell.why,
        }
        for name, cells, _ in rows
        for use, cell in zip(found, cells, strict=True)
        if cell is not None
    ]
    return Signatures(numbers, found, rows)


def _pictures(found: Sequence[DepthUse]) -> list[tuple[str, Markup, str]]:
    several = max(len(use.runs) for use in found) > 1
    bands = (
        " Lines are means over runs, bands go from the smallest to the largest of them."
        if several
        else " Bands are standard errors."
    )
    means = " Means over the runs of each group." if several else ""
    lens = "Norm and head on the residual stream that enters each layer; the last place is what the model predicts."
    drawn = [
        ("What layers add", plots.curves_plot(found, plots.CONTRIBUTIONS), f"Means over tokens; a looped layer has a place for each time.{bands}"),
        ("What layers predict", plots.curves_plot(found, plots.LENS), f"{lens}{bands}"),
        ("What layers predict, by the tuned lens", plots.curves_plot(found, plots.TUNED_LENS), f"{lens}{bands}"),
        ("Who reads whom", plots.matrices_plot(found, plots.EFFECTS), f"Largest relative change of what a later layer adds at later positions, when a layer is skipped at earlier ones; colours end at 1.{means}"),
        ("Who reads whom directly", plots.matrices_plot(found, plots.LOCAL), f"The same, when what a layer added is taken from the input of that one later layer alone.{means}"),
        ("The loop", plots.curves_plot(found, plots.LOOPS, "iteration", 1), f"After each iteration, from the first on; up to twice as many as in training.{bands}"),
        ("Likeness of blocks", plots.matrices_plot(found, plots.SYMMETRY), f"Cosine of the MLP weights of two blocks; 0 where nothing was copied.{means}"),
        *(
            (title, plots.interventions_plot(found, kind), f"Change of the loss over the targets of the prompts: {what}.{bands}")
            for kind, (title, what) in _INTERVENTIONS.items()
        ),
        *(
            (name.capitalize(), plots.interventions_plot(found, name, "accuracy"), f"Accuracy of the primitive with the order changed at every place; dashed: as it is, dotted: chance.{bands}")
            for name in _names(found, " on ")
        ),
        *(
            (title, plots.matrices_plot(found, kind), f"{note}{means}")
            for title, kind, note in _attributions(found)
        ),
    ]  # fmt: skip
    return [(title, Markup(picture), note) for title, picture, note in drawn if picture is not None]


def _names(found: Sequence[DepthUse], part: str) -> list[str]:
    """Of the measures whose names have a part."""
    return list(dict.fromkeys(name for use in found for run in use.runs for name in run if part in name))


def _attributions(found: Sequence[DepthUse]) -> list[tuple[str, plots.Matrix, str]]:
    """Title, matrix and note for each prompt that was asked about."""
    made = []
    for kind, what, of in (
        (plots.ERASURE, "erasure", "How far what is predicted for {} moves, when the residual stream at a token is replaced by its mean over the tokens of several prompts."),
        (plots.GRADIENTS, "integrated gradients", "Of the probability of {}."),
    ):  # fmt: skip
        asked = [name for name in _names(found, kind.measure) if name.partition(" of ")[0] == kind.measure]
        for name in sorted(asked, key=lambda name: (len(name), name)):
            prompt = name.partition(" of ")[2]
            answers = dict.fromkeys(answer for use in found for answer in use.labels(name, "answer"))
            shown = " or ".join(f"“{plots.shown_token(answer, 40)}”" for answer in answers)
            target = f"{shown}{', ' if shown else ''}the last target of {prompt or 'one prompt'}"
            title = f"What the answer rests on: {what}" + (f", {prompt}" if prompt else "")
            made.append((title, replace(kind, measure=name), of.format(target)))
    return made
