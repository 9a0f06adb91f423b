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
    if (scores := results.get("depth-score")) is not None:
        output_PL, difficulty_P = scores.array("output"), scores.array("difficulty")[:, 0].astype(np.int64)
        rows += [sign.depth_score_signature(output_PL), sign.score_by_difficulty(output_PL, difficulty_P)]
    if (lens := results.get("lens")) is not None:
        overlap_P2 = lens.array("overlap at the last layer")
        rows.append(sign.mean_of("overlap at the last layer", overlap_P2[:, 0], overlap_P2[:, 1]))
    if (added := results.get("contributions")) is not None:
        rows.append(sign.period_test(added.array("attention_size").mean(0), block))
    rows += [
        row
        for name, curve, signature in (
            ("skip", "skip 1", sign.late_layers),
            ("swap", "swap 1", sign.middle_permutable),
            ("repeat", f"repeat {block} +1", sign.repeat_gain),
        )
        if (row := _of_losses(results.get(name), curve, signature)) is not None
    ]
    return rows


def _of_losses(
    result: Result | None, curve: str, signature: Callable[[sign.Array, sign.Array, sign.Array], sign.Signature]
) -> sign.Signature | None:
    if result is None or curve not in result.by_prompt:
        return None
    return signature(result.array(curve), result.array("loss without")[:, 0], result.array("targets")[:, 0])
