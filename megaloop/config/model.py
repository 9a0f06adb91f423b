"""The shape of the decoder."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat, PositiveInt

from megaloop.config.section import Section
from megaloop.errors import MegaloopError

__all__ = ["ModelConfig"]


_LATER = ("norm_scaling",)
"""Fields that manifests of the first versions do not have; whoever adds one names it here."""


class ModelConfig(Section):
    """The Llama-family decoder of SmolLM v1."""

    hidden_size: PositiveInt = 960
    """Width of the residual stream."""
    num_heads: PositiveInt = 15
    """Query heads; must divide hidden_size."""
    num_kv_heads: PositiveInt = 5
    """Key and value heads (grouped-query attention); must divide num_heads."""
    ffn_size: PositiveInt = 2560
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; empty: the tokenizer's size rounded up to a multiple of 128."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of every freshly initialised matrix."""
    tied_embeddings: bool = True
    """The output head shares the embedding's weight."""
    document_masking: bool = False
    """Attention does not cross document boundaries within a packed sample."""
    norm_scaling: bool = False
    """Multiply what a layer's two norms give by 1/sqrt(position + 1), its place among the layers (arXiv 2502.05795)."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def to_json(self) -> dict[str, Any]:
        """All values as JSON; what came later is left out where it has its default, so that older readers know the rest."""
        values = self.model_dump(mode="json")
        for name in _LATER:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values

    def check(self) -> None:
        """Raise MegaloopError where the shape does not fit together."""
        if self.hidden_size % self.num_heads:
            raise MegaloopError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; choose a "
                f"multiple, for example {self.hidden_size // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.head_size % 2:
            raise MegaloopError(
                f"model: head size {self.head_size} (hidden_size / num_heads) is odd; "
                "rotary embeddings need an even one"
            )
        if self.num_heads % self.num_kv_heads:
            raise MegaloopError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
