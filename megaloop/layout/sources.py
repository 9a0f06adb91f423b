"""Where the values of a piece come from: a seed, a checkpoint, or the layers that were copied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, Growth
from megaloop.layout.pieces import Piece
from megaloop.layout.transfers import Moments, takes_zeros
from megaloop.model import ParameterSpec, grown_from, initial_values, parameter_specs

__all__ = ["GrownState", "InitialValues", "StateSource"]


class StateSource(Protocol):
    """Where values come from: a checkpoint, or the initial values of a seed."""

    def read_piece(self, state_name: str, piece: Piece) -> Tensor | None:
        """Values of a piece (fp32 or the stored dtype; shaped like the box, or flat), or None: there are none."""
        ...


@dataclass(frozen=True)
class InitialValues:
    """The state that a run starts from: weights of a seed, no moments.

    Attributes:
        vocab_size: rows of the embedding.
    """

    model: ModelConfig
    seed: int
    plan: DepthPlan
    vocab_size: int

    @cached_property
    def _specs(self) -> dict[str, ParameterSpec]:
        return parameter_specs(self.model, self.plan, self.vocab_size)

    def read_piece(self, state_name: str, piece: Piece) -> Tensor | None:
        if state_name not in ("model", "master"):
            return None
        values = initial_values(piece.name, self._specs[piece.name], self.seed, piece.box.offset, piece.box.shape)
        return values if piece.flat is None else values.reshape(-1)[slice(*piece.flat)]


@dataclass(frozen=True)
class GrownState:
    """The state of a grown plan, read from that of the plan before.

    Attributes:
        source: the state before.
        growth: how the plan grew.
        fresh: where layers that are no copies get their values from.
        moments: copied layers take their parent's moments, or zeros.
    """

    source: StateSource
    growth: Growth
    fresh: StateSource
    moments: Moments = "copy"

    def read_piece(self, state_name: str, piece: Piece) -> Tensor | None:
        name = grown_from(piece.name, self.growth)
        if name is None:
            return self.fresh.read_piece(state_name, piece)
        if takes_zeros(state_name, piece.name, name, self.moments):
            return None
        return self.source.read_piece(state_name, replace(piece, name=name))
