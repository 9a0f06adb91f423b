"""LN-scaling as the paper writes it, for tests to compare with: factors of outputs, by places that the test spells out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megaloop.model import DecoderStage


def counted(layers: Sequence[int]) -> dict[int, int]:
    """By id, the place of each of ``layers``, counted from 1."""
    return {layer_id: place for place, layer_id in enumerate(layers, start=1)}


def scale_outputs(model: DecoderStage, places: Mapping[int, int]) -> None:
    """Multiply what the two norms of the l-th layer give by ``l ** -0.5``; ``places`` says l by id.

    The model itself must know nothing of it. The product is taken of every output, and autograd differentiates that.
    """
    assert not model.config.norm_scaling
    for layer_id, place in places.items():
        layer: Any = model.layers[str(layer_id)]
        for norm in (layer.attention_norm, layer.mlp_norm):

            def scaled(_module: Any, _inputs: Any, output: Tensor, factor: float = place**-0.5) -> Tensor:
                return output * factor

            norm.register_forward_hook(scaled)
