"""How ranks are arranged: pipeline x data x tensor parallel."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Coordinate", "Topology"]


@dataclass(frozen=True)
class Coordinate:
    """A rank's place along each axis."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """pp x tp x dp ranks. Tensor-parallel ranks are neighbours, then data-parallel ones, then pipeline stages:
    the chattiest traffic stays inside a node (the order of DeepSpeed's PipeModelDataParallelTopology).
    """

    pp: int = 1
    tp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp

    def coordinate(self, rank: int) -> Coordinate:
        """Where a global rank stands."""
        return Coordinate(pp=rank // (self.dp * self.tp), dp=rank // self.tp % self.dp, tp=rank % self.tp)

    def rank(self, coordinate: Coordinate) -> int:
        """The global rank at a place; inverse of :meth:`coordinate`."""
        return (coordinate.pp * self.dp + coordinate.dp) * self.tp + coordinate.tp

    def __str__(self) -> str:
        return f"pp {self.pp} x tp {self.tp} x dp {self.dp}"
