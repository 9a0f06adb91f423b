"""Whether blocks of layers have similar weights (as arXiv 2512.08819 compares grown models).

theta_i is all MLP weights of the i-th block of n layers, one after the other; the symmetry of two blocks is cos(theta_i, theta_j). Blocks that growth
copied stay alike; those of a model that was not grown are near 0, since their units have no order in common.

A looped layer counts once: these are weights, not executions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaloop.analysis.contributions import SMALLEST
from megaloop.errors import MegaloopError
from megaloop.model import Decoder

__all__ = ["mean_symmetry", "weight_symmetry"]

_MATRICES = ("w_gate", "w_up", "w_down")
_ELEMENTS = 1 << 20
"""Of a matrix of each block that are in memory in fp64 at once."""


@torch.no_grad()
def weight_symmetry(model: Decoder, block: int) -> Tensor:
    """Cosines of the MLP weights of every two blocks of ``block`` unique layers, in the order of their first use; fp64 [B, B].

    What is left over at the end of a model that is no multiple of the block is in none.

    Raises:
        MegaloopError: there are no two blocks of that size.
    """
    ids = model.plan.ids
    count = len(ids) // block if block > 0 else 0
    if count < 2:
        raise MegaloopError(
            f"weight symmetry: blocks of {block} layers in a model of {len(ids)}; at least two must fit, so 1 to {max(1, len(ids) // 2)} each"
        )
    products_BB = torch.zeros(count, count, dtype=torch.float64)
    for place in range(block):
        own = [model.layers[str(ids[number * block + place])] for number in range(count)]
        for name in _MATRICES:
            flat = [layer.get_parameter(f"mlp.{name}.weight").flatten().split(_ELEMENTS) for layer in own]
            for parts in zip(*flat, strict=True):
                part_BN = torch.stack(parts).double()
                products_BB += (part_BN @ part_BN.T).cpu()
    norm_B = products_BB.diagonal().sqrt().clamp(min=SMALLEST)
    return products_BB / (norm_B[:, None] * norm_B)


def mean_symmetry(cosines_BB: Tensor) -> float:
    """The mean cosine of two different blocks."""
    count = len(cosines_BB)
    return float((cosines_BB.sum() - cosines_BB.trace()) / (count * (count - 1)))
