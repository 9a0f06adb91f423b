"""Claims about growing and looping, each with what was measured for it and a verdict.

All are about accuracy over all places with a target, of runs that are finished and were evaluated at their last step: at the hardest
difficulty of training, and "solves more" about the mean over all difficulties of training, which also tells apart models of which none gets to the
hardest one. The *effect* is the mean over seeds of the difference between two contenders that had the same
samples in the same order, in percentage points, with its 95% interval (Student's t). What is claimed lies above a *bound*: 0 for
"more than", -2 points for "not more than 2 points below" (:data:`MARGIN`; non-inferiority). p is that of the two-sided t test
that the effect is the bound, and Holm's procedure adjusts it over all claims of the page that could be tested, so that the
probability of seeing any effect that is not there stays below 5%.

- *seen*: the effect lies above the bound, and the adjusted p is below 5%. (Without adjustment this says that the lower end of the
  interval lies above the bound; for non-inferiority it is a one-sided test at 2.5%.)
- *not seen*: the interval excludes what is claimed. Of "more than": its upper end is below +1 point (:data:`WORTH`), so that there is
  no effect or one too small to matter. Of "not more than 2 points below": its upper end is below -2 points.
- *unclear*: neither; also where fewer than two seeds can be compared, which is said.

A loop at inference is chosen by start and extra times. For each seed it is chosen on the other seeds (the one that gains most on
average; of equals the one with fewest extra times) and measured on this one: choosing and measuring on the same seeds would find a
gain where there is none. The seeds' choices share seeds, so intervals and tests of these gains are the wider ones of
:mod:`megaloop.report.statistics`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from megaloop.report.difficulty import Board, Loop
from megaloop.report.savings import Group
from megaloop.report.statistics import LEVEL, Interval, holm, interval, p_value, paired

__all__ = [
    "MARGIN",
    "NOT_SEEN",
    "SEEN",
    "UNCLEAR",
    "WORTH",
    "Claim",
    "ambiguous",
    "chosen_on_others",
    "claims",
    "verdict",
]

MARGIN, WORTH = 0.02, 0.01
"""Accuracy that "not more than 2 points below" may lose, and below which a gain does not matter."""
SEEN, NOT_SEEN, UNCLEAR = "seen", "not seen", "unclear"
_BASELINE = "baseline"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: what is claimed, of which contenders.
        bound: what the effect should lie above.
        effect: difference of accuracies and its interval; None where no seed has both.
        p: of the test that the effect is the bound; None for fewer than two seeds.
        adjusted: the same after Holm's correction.
        verdict: *seen*, *not seen*, or *unclear*, with the reason where there are too few seeds.
        note: what else belongs to it: FLOPs, or which loops were chosen.
    """

    text: str
    bound: float
    effect: Interval | None
    p: float | None
    adjusted: float | None
    verdict: str
    note: str


@dataclass(frozen=True)
class _Pair:
    """``first`` against ``second``.

    Attributes:
        costs: the note says what share of its FLOPs ``first`` took.
        overall: about the mean over difficulties, not the hardest one.
    """

    text: str
    first: str
    second: str
    bound: float = 0.0
    costs: bool = False
    overall: bool = False


_PAIRS = (
    _Pair("A loop does more with the same parameters", "looped-full", "iso-params"),
    _Pair("A loop in the middle does more with the same parameters", "looped", "iso-params-middle"),
    _Pair("A loop solves more with the same parameters", "looped-full", "iso-params", overall=True),
    _Pair("A loop in the middle solves more with the same parameters", "looped", "iso-params-middle", overall=True),
    _Pair("A loop keeps what full depth has", "looped-full", _BASELINE, -MARGIN),
    _Pair("A loop in the middle keeps what full depth has", "looped", _BASELINE, -MARGIN),
    _Pair("Growing keeps what full depth has", "lidas", _BASELINE, -MARGIN, costs=True),
    _Pair("Growing does more than full depth for the same FLOPs", "lidas", "baseline-matched", costs=True),
    _Pair("Copying the layers in the middle does more than copying the block in the middle", "lidas", "midas"),
    _Pair("Growing once and late keeps what growing little by little has", "late-stack", "lidas", -MARGIN, costs=True),
)
_LOOPS = "lidas"
_LAST = _Pair("A loop from the cooldown on adds to growing", "lidas+loop", "lidas", costs=True)


def claims(board: Board) -> list[Claim]:
    """The claims whose contenders (by name, where only one group has it) were evaluated; nothing where no difficulty of training was."""
    if not board.ladder.hardest:
        return []
    groups = {name: found[0] for name, found in _by_name(board).items() if len(found) == 1}
    made = [_pair(board, groups, pair) for pair in _PAIRS if pair.first in groups and pair.second in groups]
    made += _loops(board, groups)
    if _LAST.first in groups and _LAST.second in groups:
        made.append(_pair(board, groups, _LAST))
    return _judged([claim for claim in made if claim is not None])


def ambiguous(board: Board) -> dict[str, list[str]]:
    """Contenders of which nothing is claimed because several groups have their name; with the labels of these."""
    found = _by_name(board)
    pairs = [pair for pair in (*_PAIRS, _LAST) if pair.first in found and pair.second in found]
    comparable = {name for pair in pairs for name in (pair.first, pair.second)}
    return {
        name: [group.label for group in groups]
        for name, groups in found.items()
        if name in comparable and len(groups) > 1
    }


def _by_name(board: Board) -> dict[str, list[Group]]:
    """Groups that were evaluated to their end."""
    found: dict[str, list[Group]] = {}
    for group in board.groups:
        if board.complete(group):
            found.setdefault(group.name, []).append(group)
    return found


def verdict(effect: Interval, bound: float, adjusted: float | None) -> str:
    """As the module's docstring defines it."""
    if effect.high is None or adjusted is None:
        return f"{UNCLEAR} (one seed)"
    if effect.mean > bound and adjusted < 1 - LEVEL:
        return SEEN
    return NOT_SEEN if effect.high < (WORTH if bound == 0 else bound) else UNCLEAR


def _judged(made: Sequence[Claim]) -> list[Claim]:
    tested = [claim.p for claim in made if claim.p is not None]
    adjusted = iter(holm(tested))
    found = []
    for claim in made:
        value = None if claim.p is None else next(adjusted)
        judged = claim.verdict if claim.effect is None else verdict(claim.effect, claim.bound, value)
        found.append(replace(claim, adjusted=value, verdict=judged))
    return found


def _claim(
    text: str, bound: float, differences: Sequence[float], note: str, *, lacking: str, left_out: bool = False
) -> Claim:
    """Not judged yet; ``lacking`` says why there are no differences, where there are none."""
    effect = interval(differences, left_out=left_out) if differences else None
    return Claim(
        text, bound, effect, p_value(differences, bound, left_out=left_out), None, f"{UNCLEAR} ({lacking})", note
    )


def _pair(board: Board, groups: dict[str, Group], pair: _Pair) -> Claim | None:
    rungs = board.ladder.trained if pair.overall else board.ladder.hardest
    first, second = (board.by_seed(groups[name], rungs) for name in (pair.first, pair.second))
    if not first or not second:
        return None
    limit = f" (not more than {100 * MARGIN:g} points below)" if pair.bound else ""
    limit += " (mean over difficulties)" if pair.overall else ""
    notes = [_other_samples(groups[pair.first], groups[pair.second])]
    share = _flops(groups[pair.first]) / (_flops(groups[pair.second]) or math.nan)
    if pair.costs and math.isfinite(share):
        notes.insert(0, f"{pair.first} took {share:.3f} of the FLOPs of {pair.second}")
    note = "; ".join(filter(None, notes))
    text = f"{pair.text}: {pair.first} against {pair.second}{limit}"
    return _claim(text, pair.bound, list(paired(first, second).values()), note, lacking="no seed in common")


def _flops(group: Group) -> float:
    return group.spread(lambda run: run.flops[-1]).mean


def _other_samples(first: Group, second: Group) -> str:
    """Why runs of one seed have not had the same samples in the same order; empty: they have."""
    runs = (*first.runs, *second.runs)
    parts = [(run.config.get("data"), run.config.get("train")) for run in runs]
    orders = [(data, train.get("global_batch") if isinstance(train, dict) else None) for data, train in parts]
    if any(order != orders[0] for order in orders):
        return "not on the same samples in the same order: data or train.global_batch are not the same"
    if any(run.rollbacks for run in runs):
        return "not on quite the same samples: a run that rolled back leaves some out"
    return ""


# --- loops at inference


def _loops(board: Board, groups: dict[str, Group]) -> list[Claim]:
    found = {
        name: chosen_on_others(board.gains(groups[name], board.ladder.hardest))
        for name in (_LOOPS, _BASELINE)
        if name in groups and board.loops(groups[name])
    }
    made = []
    for name, text in ((_LOOPS, "a grown model"), (_BASELINE, "a model of full depth")):
        if name in found:
            gains = [gain for _, gain in found[name].values()]
            text = f"Loops at inference help {text}: {name} with a loop against {name} as trained"
            made.append(_claim(text, 0.0, gains, _choices(found[name]), lacking="one seed", left_out=True))
    if len(found) == 2:
        both = [{seed: gain for seed, (_, gain) in found[name].items()} for name in (_LOOPS, _BASELINE)]
        text = f"Loops at inference help a grown model more: gain of {_LOOPS} against gain of {_BASELINE}"
        lacking = "no seed in common" if all(both) else "one seed"
        made.append(_claim(text, 0.0, list(paired(*both).values()), "", lacking=lacking, left_out=True))
    return made


def chosen_on_others(gains: dict[int, dict[Loop, float]]) -> dict[int, tuple[Loop, float]]:
    """For each seed the loop that gains most on the other seeds, and its gain on this one."""
    chosen: dict[int, tuple[Loop, float]] = {}
    for seed, own in gains.items():
        others = [gains[other] for other in gains if other != seed]
        shared = [loop for loop in sorted(own) if others and all(loop in other for other in others)]
        if shared:
            best = max(shared, key=_mean_gain(others))
            chosen[seed] = (best, own[best])
    return chosen


def _mean_gain(others: Sequence[dict[Loop, float]]) -> Callable[[Loop], float]:
    return lambda loop: fmean(other[loop] for other in others)


def _choices(chosen: dict[int, tuple[Loop, float]]) -> str:
    """Which loops were chosen, the most frequent first."""
    counts = Counter(loop for loop, _ in chosen.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    said = [
        f"layers {loop.start} to {loop.stop - 1}, {loop.extra} extra time{'s' if loop.extra > 1 else ''}"
        + (f" ({count} of {len(chosen)} seeds)" if len(counts) > 1 else "")
        for loop, count in ordered
    ]
    return "chosen on the other seeds: " + "; ".join(said) if said else "choosing a loop on other seeds takes two seeds"
