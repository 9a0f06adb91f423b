"""Growing a running engine: another plan, another topology or both, in the same processes."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch.distributed as dist

from megaloop.depth import Growth
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.layout.transfers import Moments, Reshard, transfers
from megaloop.parallel.engine import TrainingEngine
from megaloop.parallel.exchange import exchange
from megaloop.runtime.dtype import training_dtype

__all__ = ["Resharded", "reshard"]


@dataclass(frozen=True)
class Resharded:
    """An engine that took over from another, and what that cost.

    Attributes:
        engine: the new engine; the old one is closed.
        plan: what moved and what was in place, for all ranks.
        seconds: from the old engine's last use to the new one's first, on the slowest rank.
        build_seconds: of these, building the new engine.
        exchange_seconds: of these, copying and moving the state.
        buffer_bytes: the most that this rank held beyond the old state and the new.
    """

    engine: TrainingEngine
    plan: Reshard
    seconds: float
    build_seconds: float
    exchange_seconds: float
    buffer_bytes: int


def reshard(
    engine: TrainingEngine, growth: Growth, topology: Topology, step: int, *, moments: Moments = "copy"
) -> Resharded:
    """Replace an engine by one for a grown plan on a topology; collective, and the old engine is gone afterwards.

    Memory of a rank is at most its old state, its new state and the largest transfer. Nothing on disk is touched:
    a rank that dies here leaves the run as its last checkpoint has it.

    Args:
        growth: from the engine's plan; :meth:`megaloop.depth.Growth.none` to change only the topology.
        topology: on as many ranks.
        step: optimizer steps done, those that were skipped not counted.
    """
    dist.barrier()  # nobody is in a collective of the old groups any more
    began = time.perf_counter()
    config, vocab_size, before = engine.config, engine.vocab_size, engine.placement
    old = engine.pieces()
    engine.close()
    gc.freeze()  # the garbage is out; what is left stays, and the collections of the next build pass it over
    new = TrainingEngine(config, growth.plan, topology, vocab_size, None, step)
    built = time.perf_counter()
    weight_bytes = training_dtype(config.train.precision).itemsize
    plan = transfers(before, new.placement, growth, weight_bytes=weight_bytes, moments=moments)
    fresh = InitialValues(config.model, config.seed, growth.plan, vocab_size)
    buffers = exchange(plan, old, new.pieces(), growth, fresh=fresh, moments=moments)
    dist.barrier()
    ended = time.perf_counter()
    return Resharded(new, plan, ended - began, built - began, ended - built, buffers)
