"""Any pp x tp x dp trains the same curve as one process with plain torch, and replicas never drift."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megaloop.config import RopeScaling
from tests.distributed import RankPool
from tests.parallel.layouts import (
    configuration,
    drifting_replica,
    most_messages,
    reduced_gradients,
    train_layout,
    train_plainly,
)

ALONE = [(1, 1, 1)]
PAIRS = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
FOURS = [(2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)]
SEQUENCE_PARALLEL = [(1, 2, 1), (2, 2, 1), (1, 2, 2)]
LIMITS = {
    ("fp32", False): (4.1e-7, 3.6e-6),
    ("fp32", True): (4.1e-7, 3.6e-6),
    ("bf16", False): (1.6e-4, 6.1e-3),
    ("bf16", True): (3.2e-4, 1.3e-2),
}
"""Of losses and of norms, relative, by precision and whether tp differs from the plain loop's: twice what was measured."""


@cache
def _plain(**changes: Any) -> dict[str, Any]:
    return train_plainly(configuration(**changes))


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _pool(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> RankPool:
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    return pool


def _check(pool: RankPool, layout: tuple[int, int, int], *, sp: bool = False, **changes: Any) -> None:
    """Over 10 steps, unless ``changes`` say otherwise."""
    changes = {"train__steps": 10, **changes}
    everyone = pool.run(train_layout, configuration(*layout, sp=sp, **changes))
    found, expected = everyone[0], _plain(**changes)
    assert all(result == found for result in everyone), "ranks report different numbers"
    loss_limit, norm_limit = LIMITS[changes.get("train__precision", "fp32"), layout[1] > 1]
    assert _relative(found["losses"], expected["losses"]) < loss_limit
    assert _relative(found["norms"], expected["norms"]) < norm_limit
    assert found["losses"][-1] < 0.9 * found["losses"][0], "it does not learn, so the comparison says little"
    assert found["differing"] == []


@pytest.mark.parametrize("layout", ALONE + PAIRS + FOURS, ids=str)
def test_fp32_losses_and_norms_equal_a_plain_loop(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> None:
    _check(_pool(request, layout), layout, train__steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SEQUENCE_PARALLEL, ids=str)
def test_sequence_parallel_equals_a_plain_loop(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> None:
    _check(_pool(request, layout), layout, sp=True)


@pytest.mark.parametrize("layout", [*ALONE, *PAIRS, (2, 2, 1), (2, 1, 2)], ids=str)
def test_bf16_with_fp32_masters_stays_close(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> None:
    _check(_pool(request, layout), layout, train__precision="bf16")


@pytest.mark.parametrize(
    ("layout", "depth"), [((1, 1, 1), "4"), ((1, 1, 2), "4"), ((2, 1, 2), "1-2x3-1")], ids=str
)  # fmt: skip
def test_bf16_gradients_are_added_up_in_fp32(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], depth: str
) -> None:
    """Over micro-batches and over replicas: what the optimizer gets has not been through bf16."""
    for found in _pool(request, layout).run(
        reduced_gradients, configuration(*layout, train__precision="bf16", depth=depth)
    ):
        assert found["beyond_bf16"] > 0.5
        assert found["off"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 2, 1)], ids=str)
def test_activation_checkpointing_changes_nothing(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], recompute: str
) -> None:
    pool = _pool(request, layout)
    kept = pool.run(train_layout, configuration(*layout, train__steps=5))
    recomputed = pool.run(train_layout, configuration(*layout, train__steps=5, train__recompute=recompute))
    assert recomputed == kept  # bit for bit


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 2, 1)], ids=str)
def test_document_masking_and_untied_embeddings_hold_on_every_layout(
    request: pytest.FixtureRequest, layout: tuple[int, int, int]
) -> None:
    changes = {"model__document_masking": True, "model__tied_embeddings": False}
    _check(_pool(request, layout), layout, sp=layout == (2, 2, 1), **changes)


@pytest.mark.parametrize(
    "layout", [*ALONE, *PAIRS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in FOURS)], ids=str
)
def test_heads_of_another_width_and_scaled_positions_hold_on_every_layout(
    request: pytest.FixtureRequest, layout: tuple[int, int, int]
) -> None:
    scaling = RopeScaling(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_length=16)
    changes = {"model__hidden_size": 62, "model__head_dim": 24, "model__rope_scaling": scaling, "train__steps": 15}
    _check(_pool(request, layout), layout, sp=layout == (2, 2, 1), **changes)


@pytest.mark.parametrize(
    ("layout", "sp", "state_name", "name", "rank"),
    [
        ((1, 1, 2), False, "model", "layers.0.mlp.w_up.weight", 1),
        ((1, 2, 1), True, "exp_avg", "layers.1.mlp_norm.weight", 0),
        ((2, 1, 1), False, "master", "embedding.weight", 1),
    ],
)
def test_a_replica_that_drifts_is_named(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], sp: bool, state_name: str, name: str, rank: int
) -> None:
    everyone = _pool(request, layout).run(drifting_replica, configuration(*layout, sp=sp), state_name, name, rank)
    assert everyone == [[f"{state_name} {name}"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [20, 24])
def test_replicas_stay_equal_where_sizes_do_not_divide_into_vectors(
    ranks_4: RankPool, hidden: int, precision: str
) -> None:
    """The tied embedding is cut into shares at other places at the two ends of the pipeline."""
    model = {"hidden_size": hidden, "num_heads": 2, "num_kv_heads": 2, "ffn_size": 3 * hidden // 2}
    values = configuration(2, 1, 2, model=model, train__precision=precision)
    assert [item["differing"] for item in ranks_4.run(train_layout, values)] == [[]] * 4


@pytest.mark.parametrize("rounds", [1, 2])
def test_few_messages_are_held_however_many_are_sent(ranks_2: RankPool, rounds: int) -> None:
    """gloo's requests do not know that they are done: whoever only asked would hold every message of a step."""
    values = configuration(2, parallel__rounds=rounds, train__global_batch=24, train__steps=1)
    nothing_back = 0 if rounds == 1 else 2  # validation in one round sends nothing from the last rank
    assert ranks_2.run(most_messages, values, 24) == [(2, 2), (2, nothing_back)]
