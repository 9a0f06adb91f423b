"""Stock DeepSpeed's tied layers train the curve that ours do: the baseline of ``bench rounds`` is the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megaloop.bench.tied import TiedEngine
from megaloop.config import Config
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import join_ranks
from tests.distributed import RankPool
from tests.parallel.layouts import VOCAB, configuration, micro_batches, train_layout

DEPTHS = ["1-2x3-1", "0-4x4-0", "2-3x2-1"]


def train_tied(values: dict[str, Any]) -> dict[str, Any]:
    """On every rank: what :func:`tests.parallel.layouts.train_layout` does, with stock DeepSpeed."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TiedEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )  # fmt: skip
    batches = micro_batches(config, topology.coordinate(dist.get_rank()).dp, topology.dp)
    results = [engine.train_step(batches, config.optimizer.lr) for _ in range(config.train.steps)]
    engine.close()
    return {"losses": [result.loss for result in results], "norms": [result.grad_norm for result in results]}


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "depth"), [*((2, depth) for depth in DEPTHS), (4, "1-2x3-1")])
def test_the_losses_of_rounds_are_those_of_tied_layers(
    request: pytest.FixtureRequest, pipeline: int, depth: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks_{pipeline}")
    values = configuration(pipeline, 1, 1, depth=depth, optimizer__lr=1e-3)
    ours, theirs = pool.run(train_layout, values)[0], pool.run(train_tied, values)[0]
    for what in ("losses", "norms"):
        furthest = max(abs(a - b) / abs(b) for a, b in zip(ours[what], theirs[what], strict=True))
        assert furthest < 2e-5, what
