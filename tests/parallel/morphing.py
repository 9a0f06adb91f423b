"""What ranks run in the tests of growth and resharding in flight."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megaloop.config import Config
from megaloop.depth import DepthPlan, Operator, grow
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.parallel.live import Resharded, reshard
from megaloop.parallel.reshard import Moments
from megaloop.parallel.state import InitialValues
from megaloop.parallel.topology import Topology
from tests.parallel.layouts import LR, VOCAB, micro_batches

Layout = tuple[int, int, int]


def morph(
    values: dict[str, Any],
    path: list[tuple[int, Layout, int]],
    operator: Operator = "lidas",
    moments: Moments = "copy",
) -> dict[str, Any]:
    """Train through stages of (layers, (pp, tp, dp), steps), growing in flight between them.

    Returns:
        losses, replicas that differ after each growth, and what each growth moved.
    """
    config = Config.model_validate(values)
    join_ranks()
    plan = DepthPlan.plain(path[0][0])
    engine = TrainingEngine(
        config, plan, Topology(*path[0][1]), VOCAB, InitialValues(config.model, config.seed, plan, VOCAB)
    )
    losses: list[float] = []
    differing: list[str] = []
    reports: list[dict[str, Any]] = []
    step = 0
    for layers, layout, steps in path:
        if step:
            growth = grow(engine.plan, operator, layers, 2)
            resharded = reshard(engine, growth, Topology(*layout), step, moments=moments)
            engine = resharded.engine
            differing += engine.differing_replicas()
            reports.append(_report(resharded))
        batches = micro_batches(config, engine.coordinate.dp, engine.topology.dp, step)
        losses += [engine.train_step(batches, LR).loss for _ in range(steps)]
        step += steps
    differing += engine.differing_replicas()
    groups = len(dist.distributed_c10d._world.pg_map)
    engine.close()
    return {
        "losses": losses,
        "differing": differing,
        "reports": reports,
        "groups": (groups, len(dist.distributed_c10d._world.pg_map)),
    }


def _report(resharded: Resharded) -> dict[str, Any]:
    return {
        "moved": resharded.plan.received(),
        "in_place": resharded.plan.in_place,
        "buffer": resharded.buffer_bytes,
        "seconds": (resharded.seconds, resharded.build_seconds, resharded.exchange_seconds),
    }
