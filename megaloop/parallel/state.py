"""The state of a running engine as pieces, and back: what checkpoints, resharding and checks stand on.

Under ZeRO-1 a rank holds its tensor-parallel box of a parameter in the training dtype, and of the fp32
master and Adam's moments one contiguous fragment of that box, which the step engine gives as views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaloop.layout.pieces import Piece, StatePiece
from megaloop.layout.placement import local_box
from megaloop.layout.sources import StateSource
from megaloop.layout.topology import Coordinate, Topology
from megaloop.model import ParameterSpec
from megaloop.parallel.step_engine import StepEngine

__all__ = [
    "LocalParameter",
    "prime_moments",
    "state_pieces",
    "write_state",
]


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as this rank holds it.

    Attributes:
        name: canonical name.
        parameter: the tensor in the training dtype, the whole box.
        box_piece: which part of the whole parameter it is.
        fragment: [start, stop) of the box's elements whose master and moments live here; empty if none do.
        master, moments: views into the engine's flat fp32 buffers; moments by Adam's names.
        duplicate: another pipeline stage holds the same parameter and is the one that saves it.
    """

    name: str
    parameter: nn.Parameter
    box_piece: Piece
    fragment: tuple[int, int]
    master: Tensor | None
    moments: dict[str, Tensor]
    duplicate: bool

    def piece(self, state_name: str) -> Piece:
        """The piece of ``state_name`` that this rank holds."""
        if state_name == "model":
            return self.box_piece
        return Piece(self.box_piece.name, self.box_piece.shape, self.box_piece.box, self.fragment)

    def values(self, state_name: str) -> Tensor | None:
        """This rank's values of ``state_name``, a view; None where it holds none."""
        if state_name == "model":
            return self.parameter.data
        return self.master if state_name == "master" else self.moments.get(state_name)


def prime_moments(adam: torch.optim.Optimizer, step: int) -> None:
    """Give a fresh Adam its moments (zeros), which torch makes at the first step only; a run that resumes needs them before.

    Args:
        adam: torch's AdamW.
        step: optimizer steps taken so far, which Adam's bias correction counts.
    """
    assert isinstance(adam, torch.optim.AdamW), "where another optimizer keeps its count of steps is not known"
    for group in adam.param_groups:
        for flat in group["params"]:
            state = adam.state[flat]
            state.setdefault("exp_avg", torch.zeros_like(flat))
            state.setdefault("exp_avg_sq", torch.zeros_like(flat))
            state["step"] = torch.tensor(float(step), device=flat.device)


def local_parameters(
    engine: StepEngine, stage: nn.Module, specs: dict[str, ParameterSpec], topology: Topology, at: Coordinate
) -> Iterator[LocalParameter]:
    """All parameters of this rank's stage, in the stage's order."""
    for name, parameter in stage.named_parameters():
        spec, fragment = specs[name], engine.fragment(parameter)
        yield LocalParameter(
            name=name,
            parameter=parameter,
            box_piece=Piece(name, spec.shape, local_box(spec, at.tp, topology.tp)),
            fragment=(fragment.start, fragment.stop) if fragment is not None else (0, 0),
            master=fragment.master if fragment is not None else None,
            moments=fragment.moments if fragment is not None else {},
            duplicate=engine.is_copy(parameter),
        )


def state_pieces(
    parameters: list[LocalParameter], specs: dict[str, ParameterSpec], topology: Topology, at: Coordinate
) -> list[StatePiece]:
    """Everything this rank holds; ``writes`` is set so that over all ranks each value is saved exactly once.

    Model weights are the same on all data-parallel ranks: they take turns by size. What tensor-parallel
    ranks hold alike is saved by the first of them.
    """
    pieces: list[StatePiece] = []
    load = [0] * topology.dp
    for local in parameters:
        writer = load.index(min(load))
        load[writer] += local.box_piece.numel
        unique = not local.duplicate and (specs[local.name].shard_dim is not None or at.tp == 0)
        pieces.append(StatePiece("model", local.box_piece, local.parameter.data, unique and writer == at.dp))
        for state_name in ("master", "exp_avg", "exp_avg_sq"):
            values = local.values(state_name)
            if values is not None:
                pieces.append(StatePiece(state_name, local.piece(state_name), values, unique))
    return pieces


@torch.no_grad()
def write_state(parameters: list[LocalParameter], source: StateSource, group: dist.ProcessGroup) -> None:
    """Fill this rank's weights, masters and moments from ``source``.

    Weights in the training dtype are made from the masters, as the optimizer makes them: bit-equal to what
    the run that wrote them had.

    Args:
        group: the data-parallel ranks (not needed for the values, which every rank reads itself; a barrier
            keeps them together, so that a rank that fails does so before others step).
    """
    for local in parameters:
        whole = source.read_piece("master", local.box_piece)
        if whole is None:
            whole = source.read_piece("model", local.box_piece)
        assert whole is not None, f"no values for {local.name}"
        local.parameter.data.copy_(whole.view_as(local.parameter))
        if local.master is None:
            continue
        start, stop = local.fragment
        local.master.copy_(whole.reshape(-1)[start:stop])
        for state_name, values in local.moments.items():
            fragment = source.read_piece(state_name, local.piece(state_name))
            if fragment is None:
                values.zero_()
            else:
                values.copy_(fragment.reshape(-1))
    dist.barrier(group)
