"""Loops and rounds: any pp x tp x dp trains the curve of one process that simply executes the plan."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megaloop.config import Config
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.layout.partition import LayerCosts, owned_layers, slice_rounds, slices_for
from tests.distributed import RankPool
from tests.parallel.layouts import configuration, train_layout, train_plainly

LOOPS = ["1-2x3-1", "0-4x4-0", "2-3x2-1"]
MODEL = (("hidden_size", 64), ("num_heads", 4), ("num_kv_heads", 2), ("ffn_size", 96))
"""As pairs, which a cache can tell apart."""
STEPS = 12
LR = 1e-3
"""At the 2e-3 of the other layouts, rounding in Loop(2-3x2-1) grows to 2e-4 of the norm in 20 steps on one rank already."""
LIMITS = {"fp32": (8e-7, 2.3e-5), "bf16": (1e-3, 1.8e-2)}
"""Of losses and of norms, relative: twice what was measured."""
LAYOUTS = [
    *(((pp, 1, 1), depth) for pp in (1, 2, 4) for depth in LOOPS),
    *(((1, 1, 2), "1-2x3-1"), ((1, 2, 1), "1-2x3-1"), ((2, 1, 2), "0-4x4-0"), ((2, 2, 1), "2-3x2-1")),
]
"""Every depth on every pipeline, which is what it is spread over. Replicas and tensor parallelism know nothing of loops: once with each depth."""


@cache
def _plain(**changes: Any) -> dict[str, Any]:
    return train_plainly(_values(1, 1, 1, **changes))


def _values(*layout: int, sp: bool = False, **changes: Any) -> dict[str, Any]:
    thawed: dict[str, Any] = {key: dict(value) if isinstance(value, tuple) else value for key, value in changes.items()}
    return configuration(*layout, sp=sp, **{"optimizer__lr": LR, "train__steps": STEPS, **thawed})


def _relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _check(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], *, sp: bool = False, rounds: int = 1, **changes: Any
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    values = _values(*layout, sp=sp, **changes)
    values["parallel"]["rounds"] = rounds
    everyone = pool.run(train_layout, values)
    found, expected = everyone[0], _plain(**changes)
    assert all(result == found for result in everyone), "ranks report different numbers"
    loss_limit, norm_limit = LIMITS[changes.get("train__precision", "fp32")]
    assert _relative(found["losses"], expected["losses"]) < loss_limit
    assert _relative(found["norms"], expected["norms"]) < norm_limit
    assert _relative([found["evaluated"]], [expected["evaluated"]]) < loss_limit
    assert found["losses"][-1] < 0.98 * found["losses"][0], "it does not learn, so the comparison says little"
    assert found["differing"] == []


@pytest.mark.parametrize(("layout", "depth"), LAYOUTS, ids=str)
def test_loops_train_as_one_process_does(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], depth: str
) -> None:
    _check(request, layout, depth=depth)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 1, 2), (2, 2, 1)], ids=str)
def test_loops_in_bf16_stay_close(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> None:
    _check(request, layout, depth="1-2x3-1", train__precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 1, 2), (2, 2, 1)], ids=str)
def test_a_model_without_loops_may_go_round_several_times(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], rounds: int
) -> None:
    _check(request, layout, rounds=rounds, depth="6")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing(request: pytest.FixtureRequest, recompute: str) -> None:
    pool: RankPool = request.getfixturevalue("ranks_2")
    kept, again = (
        pool.run(train_layout, _values(2, 1, 1, depth="1-2x3-1", train__recompute=item))[0]["losses"]
        for item in ("none", recompute)
    )
    assert kept == again


@pytest.mark.slow
def test_documents_go_along(request: pytest.FixtureRequest) -> None:
    _check(request, (4, 1, 1), depth="1-2x3-1", model=(*MODEL, ("document_masking", True)))


@pytest.mark.slow
def test_sequence_parallel(request: pytest.FixtureRequest) -> None:
    _check(request, (2, 2, 1), sp=True, depth="1-2x3-1")


def test_untied_embeddings(request: pytest.FixtureRequest) -> None:
    _check(request, (2, 1, 1), depth="1-2x3-1", model=(*MODEL, ("tied_embeddings", False)))


@pytest.mark.slow
def test_seven_micro_batches_on_two_ranks(request: pytest.FixtureRequest) -> None:
    _check(request, (2, 1, 1), depth="1-2x3-1", train__global_batch=7, train__micro_batch=1)


OPTIONS = {
    "add": (("injection", "add"),),
    "concat": (("injection", "concat"),),
    "everything": (("injection", "concat"), ("norm", True), ("residual_scale", "1/k")),
    "backprop 1, add": (("injection", "add"), ("backprop", 1)),
    "backprop 2, concat and norm": (("injection", "concat"), ("norm", True), ("backprop", 2)),
    "a count of its own each step": (("count", "uniform"),),
    "ramp, Poisson, truncated": (
        ("count", "poisson"), ("ramp", 0.5), ("backprop", 2), ("injection", "concat"), ("residual_scale", "1/k"),
    ),
}  # fmt: skip


PIPELINES = [(1, 1, 1), (2, 1, 1), (4, 1, 1)]
PAIRS = [
    (name, PIPELINES[(first + second) % 3], depth)
    for first, name in enumerate(OPTIONS)
    for second, depth in enumerate(("1-2x3-1", "0-4x4-0", "1-2x3-1"))
]
"""Every option on every pipeline and with every depth, every depth on every pipeline; not all three in all combinations."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "depth"), PAIRS, ids=str)
def test_options_of_loops_do_not_depend_on_the_pipeline(
    request: pytest.FixtureRequest, layout: tuple[int, int, int], depth: str, name: str
) -> None:
    _check(request, layout, depth=depth, loop=OPTIONS[name])


def test_options_depths_and_pipelines_meet_in_pairs() -> None:
    depths = {depth for _, _, depth in PAIRS}
    assert {(name, layout) for name, layout, _ in PAIRS} == {(name, layout) for name in OPTIONS for layout in PIPELINES}
    assert {(name, depth) for name, _, depth in PAIRS} == {(name, depth) for name in OPTIONS for depth in depths}
    assert {(layout, depth) for _, layout, depth in PAIRS} == {
        (pipeline, depth) for pipeline in PIPELINES for depth in depths
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1), (4, 1, 1)], ids=str)
def test_a_loop_of_one_layer_runs_on_one_rank(request: pytest.FixtureRequest, layout: tuple[int, int, int]) -> None:
    options = (("count", "uniform"), ("injection", "add"), ("backprop", 1), ("norm", True))
    _check(request, layout, depth="0-1x3-4", loop=options)
    _check(request, layout, depth="4-1x3-0")


@pytest.mark.slow
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_adapter_and_norm_under_tensor_parallelism(request: pytest.FixtureRequest, sp: bool) -> None:
    _check(request, (2, 2, 1), sp=sp, depth="1-2x3-1", loop=OPTIONS["everything"])


@pytest.mark.slow
def test_options_of_loops_in_bf16(request: pytest.FixtureRequest) -> None:
    _check(
        request, (2, 1, 2), depth="1-2x3-1", train__precision="bf16", loop=OPTIONS["backprop 2, concat and norm"]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "poisson", "lognormal-poisson"])
def test_a_count_drawn_each_step_neither_hangs_nor_changes_the_curve(request: pytest.FixtureRequest, kind: str) -> None:
    """On pp 2 x dp 2 against one process with the same counts."""
    steps = 60 if kind == "lognormal-poisson" else 20
    changes: dict[str, Any] = {
        "depth": "1-2x3-1",
        "loop": (("count", kind),),
        "train__steps": steps,
        "optimizer__lr": 3e-4,
    }
    values = _values(1, 1, 1, **changes)
    counts = {Config.model_validate(values).loop_iterations(DepthPlan.parse("1-2x3-1"), step) for step in range(steps)}
    assert len(counts) > 3
    _check(request, (2, 1, 2), **changes)


# --- which rank runs what ---


@pytest.mark.parametrize("depth", [*LOOPS, "4-4x4-4", "0-8x8-0", "10-4x2-10", "7-1x5-0", "2-1x8-5", "24"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_layer_is_on_one_rank_and_every_use_runs_once_in_order(depth: str, ranks: int) -> None:
    plan = DepthPlan.parse(depth)
    if ranks > plan.layers:
        with pytest.raises(MegaloopError, match="each needs at least one"):
            slice_rounds(plan, ranks, 1, 16, LayerCosts(0.0, 1.0, 2.0))
        return
    for rounds in (1, 2, 3) if not plan.is_looped and ranks * 3 <= plan.depth else (1,):
        base = slice_rounds(plan, ranks, rounds, 16, LayerCosts(0.0, 1.0, 2.0))
        owners = [owned_layers(plan, base, rank) for rank in range(ranks)]
        assert all(owners)
        assert sorted(layer_id for own in owners for layer_id in own) == sorted(plan.ids)
        for iterations in (1, 2, 7, None) if plan.loop is not None else (None,):
            calls = plan.calls(iterations)
            slices = base if iterations is None else slices_for(plan, base, iterations)
            positions = [position for slice_ in slices for part in slice_ for position in range(*part)]
            assert positions == list(range(len(calls)))
            for slice_ in slices:
                for rank, part in enumerate(slice_):
                    assert {call.layer_id for call in calls[slice(*part)]} <= set(owners[rank])


def test_parts_of_a_loop_share_rounds_where_their_ranks_allow_it() -> None:
    costs = LayerCosts(0.0, 1.0, 0.0)
    # one layer on either side of the loop: with its first and its last round, not in rounds of their own
    assert slice_rounds(DepthPlan.parse("1-2x3-1"), 2, 1, 8, costs) == (
        ((0, 2), (2, 3)),
        ((3, 4), (4, 5)),
        ((5, 6), (6, 8)),
    )
    # two layers looped on four ranks: the others hold what is left, and let through what goes round
    assert slice_rounds(DepthPlan.parse("1-2x2-1"), 4, 1, 8, costs) == (
        ((0, 1), (1, 2), (2, 3), (3, 3)),
        ((3, 3), (3, 4), (4, 5), (5, 6)),
    )
    # parts as even as the ranks: each in rounds of its own, which makes the bubble small
    assert len(slice_rounds(DepthPlan.parse("4-4x4-4"), 4, 1, 8, costs)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": "(0,1)x2(2,3)x2"}, "is more than one loop of neighbouring layers"),
        ({"depth": "4", "rounds": 3}, "parallel.rounds 3 x parallel.pp 2 makes 6 slices, more than the 4 layers; use"),
        ({"depth": "1-2x3-1", "rounds": 2}, "parallel.rounds 2: rounds are for pipelines of unlooped models"),
        ({"depth": "1-2x3-1", "loop": {"backprop": 4}}, "loop.backprop 4 is more than the 3 times that 1-2x3-1 loops"),
        ({"depth": "1-2x3-1", "loop": {"backprop": 2}}, "no gradient would reach what comes before the loop"),
        ({"depth": "1-2x3-1", "loop": {"min_count": 4}}, "exclude the 3 times, the mean, that 1-2x3-1 loops"),
        ({"depth": "4", "loop": {"norm": True}}, "loop.norm: depth 4 has no loop"),
        ({"depth": "4", "depth_events": [{"at": 0.5, "depth": "1-2x2-2"}]}, "has 5 layers of its own, and there are 4"),
        ({"depth": "4", "depth_events": [{"at": 0.5, "depth": "0-2x2-1"}]}, "1 would be dropped"),
        ({"depth": "4", "depth_events": [{"at": 0.5}]}, "needs either a depth, or untie: true"),
        ({"depth": "4", "depth_events": [{"at": 0.5, "untie": True}]}, "repeats no layer; there is nothing to untie"),
        ({"depth": "4", "depth_events": [{"at": 0.5, "depth": 4}]}, "the depth is 4 already"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes: dict[str, Any], message: str) -> None:
    rounds = changes.pop("rounds", 1)
    values = configuration(2, 1, 1, **changes)
    values["parallel"]["rounds"] = rounds
    with pytest.raises(MegaloopError) as caught:
        Config.model_validate(values).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_micro_batches_for_the_ring_are_refused() -> None:
    values = configuration(4, 1, 1, depth="0-4x4-0", train__global_batch=3, train__micro_batch=1)
    with pytest.raises(MegaloopError, match=r"makes 3 micro-batches of 1 per step and replica; rounds over 4 pipeline"):
        Config.model_validate(values).check_world(4)
