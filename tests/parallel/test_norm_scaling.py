"""LN-scaling on any layout trains the curve of one process that multiplies the norms' outputs, and growth keeps to places."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megaloop.config import Config
from megaloop.depth import DepthPlan, Growth, grow, loop, untie
from megaloop.layout.topology import Topology
from megaloop.model import Decoder, vocab_parallel_cross_entropy
from megaloop.parallel.live import reshard
from tests.distributed import RankPool
from tests.norm_scaling import counted, scale_outputs
from tests.parallel.layouts import VOCAB, batch, configuration, micro_batches, train_layout, train_plainly
from tests.parallel.morphing import Layout, _gather, _trained

SCALED = (("hidden_size", 64), ("num_heads", 4), ("num_kv_heads", 2), ("ffn_size", 96), ("norm_scaling", True))
"""As pairs, which a cache can tell apart."""


@cache
def _plain(**changes: Any) -> dict[str, Any]:
    return train_plainly(_values(1, 1, 1, **changes))


def _values(*layout: int, sp: bool = False, **changes: Any) -> dict[str, Any]:
    return configuration(*layout, sp=sp, model=dict(SCALED), optimizer__lr=1e-3, train__steps=10, **changes)


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


LIMITS = {"fp32": (5e-7, 3.5e-6), "bf16": (1.5e-4, 3.5e-3)}
"""Of losses and of norms, relative: twice what was measured."""

CASES = [
    ((1, 1, 1), {}, {}),
    ((2, 1, 1), {}, {}),
    ((1, 1, 2), {}, {}),
    ((1, 2, 1), {}, {}),
    ((4, 1, 1), {}, {}),
    ((2, 2, 1), {"sp": True}, {}),
    ((2, 1, 1), {"rounds": 2}, {}),
    ((2, 1, 1), {}, {"depth": "1-2x3-1"}),
    ((4, 1, 1), {}, {"depth": "1-2x3-1"}),
    ((2, 2, 1), {"sp": True}, {"depth": "1-2x3-1"}),
    ((2, 1, 2), {}, {"depth": "1-2x3-1", "train__recompute": "full"}),
    ((1, 1, 1), {}, {"train__precision": "bf16"}),
    ((2, 1, 2), {}, {"train__precision": "bf16"}),
]


@pytest.mark.parametrize(("layout", "how", "changes"), CASES, ids=str)
def test_every_layout_trains_the_curve_of_the_reference(
    request: pytest.FixtureRequest, layout: Layout, how: dict[str, Any], changes: dict[str, Any]
) -> None:
    values = _values(*layout, sp=how.get("sp", False), **changes)
    values["parallel"]["rounds"] = how.get("rounds", 1)
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    everyone = pool.run(train_layout, values)
    found, expected = everyone[0], _plain(**{key: value for key, value in changes.items() if key != "train__recompute"})
    assert all(result == found for result in everyone), "ranks report different numbers"
    loss_limit, norm_limit = LIMITS[changes.get("train__precision", "fp32")]
    assert _relative(found["losses"], expected["losses"]) < loss_limit
    assert _relative(found["norms"], expected["norms"]) < norm_limit
    assert _relative([found["evaluated"]], [expected["evaluated"]]) < loss_limit
    assert found["losses"][-1] < 0.97 * found["losses"][0], "it does not learn, so the comparison says little"
    assert found["differing"] == []


@pytest.mark.parametrize(
    ("before", "after", "change", "places"),
    [
        ((2, 1, 1), (2, 1, 1), "grow", [0, 1, 2, 4, 5, 3]),
        ((1, 1, 2), (2, 1, 1), "grow", [0, 1, 2, 4, 5, 3]),
        ((2, 1, 1), (1, 1, 2), "loop", [0, 1, 2, 3]),
        ((2, 1, 1), (2, 1, 1), "untie", [0, 1, 2, 4, 5, 3]),
    ],
    ids=str,
)
def test_a_layer_takes_the_factor_of_its_new_place_in_flight(
    ranks_2: RankPool, before: Layout, after: Layout, change: str, places: list[int]
) -> None:
    """Layers move between ranks as well. Against one process with the weights of all ranks, and places spelled out."""
    found, expected, stale = ranks_2.run(_change_in_flight, _values(1, 1, 1), before, after, change, places)[0]
    assert found == pytest.approx(expected, rel=1e-6)
    if change == "loop":
        assert stale == expected
    else:
        assert abs(stale - expected) > 1e-4 * expected, "factors of the old places would show"


def _change_in_flight(
    values: dict[str, Any], before: Layout, after: Layout, change: str, places: list[int]
) -> tuple[float, float, float]:
    """Train 4 layers and change their plan in flight.

    Returns:
        The loss afterwards: the engine's, that of one process, and that of one process with the factors of the old places.
    """
    engine, config = _trained(values, before, 3), Config.model_validate(values)
    changes = [grow(engine.plan, "lidas", 6, 2)]
    if change != "grow":
        looped = loop(engine.plan, 1, 3, 2)
        changes = [Growth.reordered(engine.plan, looped), *([untie(looped)] if change == "untie" else [])]
    for growth in changes:
        engine = reshard(engine, growth, Topology(*after), 3).engine
    found = engine.evaluate(micro_batches(config, engine.coordinate.dp, engine.topology.dp, 7), engine.micro_batches)
    whole = {name: tensor for (state_name, name), tensor in _gather(engine).items() if state_name == "model"}
    plan = engine.plan
    engine.close()
    old = {layer_id: (plan.ancestors(layer_id) or (layer_id,))[0] + 1 for layer_id in places}
    return found, _loss(config, plan, whole, counted(places)), _loss(config, plan, whole, old)


def _loss(config: Config, plan: DepthPlan, weights: dict[str, Tensor], places: dict[int, int]) -> float:
    model = Decoder(config.model.model_copy(update={"norm_scaling": False}), VOCAB, plan)
    model.fill(lambda name, _: weights[name])
    scale_outputs(model, places)
    tokens, targets, _ = batch(config, 7)
    with torch.no_grad():
        return float(vocab_parallel_cross_entropy(model(tokens), targets, model.tp))
