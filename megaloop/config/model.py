"""The shape of the decoder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megaloop.config.section import Section
from megaloop.errors import MegaloopError

__all__ = ["ModelConfig", "RopeScaling"]


class RopeScaling(Section):
    """How the angles of the rotary position embedding are made smaller for texts longer than the model first saw."""

    kind: Literal["linear", "llama3"]
    """linear: every frequency is divided by the factor (arXiv 2306.15595); llama3: only the slow ones, as Llama 3.1 does."""
    factor: float = Field(ge=1)
    """What frequencies are divided by."""
    low_freq_factor: PositiveFloat | None = None
    """llama3 only: what turns less than so many times within original_length is divided by the whole factor."""
    high_freq_factor: PositiveFloat | None = None
    """llama3 only: what turns more than so many times is left alone; in between the two are interpolated."""
    original_length: PositiveInt | None = None
    """llama3 only: tokens of the longest text that the model was first trained on."""

    def check(self) -> None:
        """Raise MegaloopError where the kind lacks a value, or has one that it does not use."""
        others = ("low_freq_factor", "high_freq_factor", "original_length")
        for name in others:
            if self.kind == "llama3" and getattr(self, name) is None:
                raise MegaloopError(f"model.rope_scaling: kind llama3 needs {name}; set it, or use kind linear")
            if self.kind == "linear" and getattr(self, name) is not None:
                raise MegaloopError(f"model.rope_scaling.{name} applies only to kind llama3; leave it out")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise MegaloopError(
                f"model.rope_scaling.low_freq_factor {low:g} is not less than high_freq_factor {high:g}; "
                "Llama 3.1 has 1 and 4"
            )


_LATER = ("head_dim", "rope_scaling", "norm_scaling")
"""Fields that manifests of the first versions do not have; whoever adds one names it here."""


class ModelConfig(Section):
    """The Llama-family decoder of SmolLM v1."""

    hidden_size: PositiveInt = 960
    """Width of the residual stream."""
    num_heads: PositiveInt = 15
    """Query heads; must divide hidden_size, unless head_dim is set."""
    num_kv_heads: PositiveInt = 5
    """Key and value heads (grouped-query attention); must divide num_heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; empty: hidden_size / num_heads."""
    ffn_size: PositiveInt = 2560
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; empty: the tokenizer's size rounded up to a multiple of 128."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary position embedding for longer texts; empty: none."""
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
        """Width of a head, H; queries and attention's output are num_heads x H wide."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def to_json(self) -> dict[str, Any]:
        """All values as JSON; what came later is left out where it has its default, so that older readers know the rest."""
        values = self.model_dump(mode="json")
        for name in _LATER:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values

    def check(self) -> None:
        """Raise MegaloopError where the shape does not fit together."""
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise MegaloopError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; choose a "
                f"multiple, for example {self.hidden_size // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.head_size % 2:
            source = "hidden_size / num_heads" if self.head_dim is None else "head_dim"
            raise MegaloopError(
                f"model: head size {self.head_size} ({source}) is odd; rotary embeddings need an even one"
            )
        if self.num_heads % self.num_kv_heads:
            raise MegaloopError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check()
