"""The page's part on how models use their depth: numbers for JSON, pictures and a table for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
        pictures: (title, picture, what it shows).
    """

    numbers: list[dict[str, Any]] = field(default_factory=list)
    groups: list[DepthUse] = field(default_factory=list)
    rows: list[tuple[str, list[Row | None], str]] = field(default_factory=list)
    pictures: list[tuple[str, Markup, str]] = field(default_factory=list)


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
    return Signatures(numbers, found, rows, _pictures(found))


def _pictures(found: Sequence[DepthUse]) -> list[tuple[str, Markup, str]]:
    lens = "Norm and head on the residual stream that enters each layer; the last place is what the model predicts."
    drawn = [
        ("What layers add", plots.curves_plot(found, plots.CONTRIBUTIONS), "Means over tokens; a looped layer has a place for each time."),
        ("What layers predict", plots.curves_plot(found, plots.LENS), lens),
        ("What layers predict, by the tuned lens", plots.curves_plot(found, plots.TUNED_LENS), lens),
        ("Who reads whom", plots.matrices_plot(found, plots.EFFECTS), "Largest relative change of what a later layer adds at later positions, when a layer is skipped at earlier ones."),
        ("Who reads whom directly", plots.matrices_plot(found, plots.LOCAL), "The same, when what a layer added is taken from the input of that one later layer alone."),
        ("The loop", plots.curves_plot(found, plots.LOOPS, "iteration", 1), "After each iteration, from the first on; up to twice as many as in training."),
        ("Likeness of blocks", plots.matrices_plot(found, plots.SYMMETRY), "Cosine of the MLP weights of two blocks; 0 where nothing was copied."),
        *(
            (title, plots.interventions_plot(found, kind), f"Change of the loss over the targets of the prompts: {what}.")
            for kind, (title, what) in _INTERVENTIONS.items()
        ),
        *_of_primitives(found),
        ("What the answer rests on: erasure", plots.matrices_plot(found, plots.ERASURE), "Drop of the probability of the last target of one prompt, when the residual stream at a token is replaced by its mean over tokens."),
        ("What the answer rests on: integrated gradients", plots.matrices_plot(found, plots.GRADIENTS), "Of the probability of the last target of one prompt."),
    ]  # fmt: skip
    return [(title, Markup(picture), note) for title, picture, note in drawn if picture is not None]


def _of_primitives(found: Sequence[DepthUse]) -> list[tuple[str, str | None, str]]:
    kinds = dict.fromkeys(name for use in found for run in use.runs for name in run if " on " in name)
    return [
        (f"{name.capitalize()}", plots.interventions_plot(found, name, "accuracy"), "Accuracy of the primitive with the order changed at every place.")
        for name in kinds
    ]  # fmt: skip
