"""Which signatures the results of a model's measures allow, without torch: ``megaloop report`` makes the table from what was remembered."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megaloop.analysis import signatures as sign
from megaloop.analysis.results import Result

__all__ = ["signature_table"]


def signature_table(results: dict[str, Result], block: int) -> list[sign.Signature]:
    """The signatures that these measures allow."""
    rows: list[sign.Signature] = []
    if (scores := _arrays(results, "depth-score", "output", "difficulty")) is not None:
        output_PL, difficulty_P = scores[0], scores[1][:, 0].astype(np.int64)
        rows += [sign.depth_score_signature(output_PL), sign.score_by_difficulty(output_PL, difficulty_P)]
    if (lens := _arrays(results, "lens", "overlap at the last layer")) is not None:
        overlap_P2 = lens[0]
        rows.append(sign.mean_of("overlap at the last layer", overlap_P2[:, 0], overlap_P2[:, -1]))
    if (added := _arrays(results, "contributions", "attention_size")) is not None:
        rows.append(sign.period_test(added[0], block))
    rows += [
        row
        for name, curve, signature in (
            ("skip", "skip 1", sign.late_layers),
            ("swap", "swap 1", sign.middle_permutable),
            ("repeat", f"repeat {block} +1", sign.repeat_gain),
        )
        if (row := _of_losses(_arrays(results, name, curve, "loss without", "targets"), signature)) is not None
    ]
    return rows


def _arrays(results: dict[str, Result], measure: str, *names: str) -> list[sign.Array] | None:
    """What a measure left of each prompt; None where it was not taken, or not all of it is there."""
    return results[measure].arrays(*names) if measure in results else None


def _of_losses(
    arrays: list[sign.Array] | None, signature: Callable[[sign.Array, sign.Array, sign.Array], sign.Signature]
) -> sign.Signature | None:
    return None if arrays is None else signature(arrays[0], arrays[1][:, 0], arrays[2][:, 0])
