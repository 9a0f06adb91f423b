"""The growth section: what it makes of a run, and one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.config import Config, GrowthConfig, load_config
from megaloop.depth import DepthPlan, grow, run_flops, stage_at
from megaloop.errors import MegaloopError

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
GROWING = [path for path in SHIPPED if load_config(path).growth is not None]


def load(tmp_path: Path, growth: Any, **changes: Any) -> Config:
    """A run of 100 steps to 12 layers, read from a file; ``section__key=value`` changes a field."""
    values: dict[str, Any] = {
        "depth": 12,
        "model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 128},
        "data": {"sources": [{"path": "shards"}], "sequence_length": 64},
        "parallel": {},
        "train": {"steps": 100, "global_batch": 8},
        "growth": growth,
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def test_the_defaults_are_lidas_from_4_by_4_over_85_percent(tmp_path: Path) -> None:
    config = load(tmp_path, {})
    assert [(stage.first_step, stage.steps, stage.plan.layers) for stage in config.stages] == [
        (0, 14, 4), (14, 28, 8), (42, 58, 12),
    ]  # fmt: skip
    assert config.plan == config.stages[-1].plan == grow(DepthPlan.plain(4), "lidas", 12, 4).plan
    layers = [stage_at(config.stages, step).plan.layers for step in (0, 13, 14, 41, 42, 99, 100)]
    assert layers == [4, 4, 8, 8, 12, 12, 12]


def test_a_run_without_growth_is_one_stage(tmp_path: Path) -> None:
    config = load(tmp_path, None)
    (stage,) = config.stages
    assert (stage.first_step, stage.steps, stage.plan) == (0, 100, DepthPlan.plain(12))


def test_stages_may_be_listed(tmp_path: Path) -> None:
    listed = [{"steps": 20, "layers": 4}, {"steps": 30, "layers": 6}, {"steps": 50, "layers": 12}]
    config = load(tmp_path, {"schedule": listed, "block": 2, "operator": "last"})
    assert [(stage.steps, stage.plan.layers) for stage in config.stages] == [(20, 4), (30, 6), (50, 12)]
    assert config.plan == grow(DepthPlan.plain(4), "last", 12, 2).plan


def test_stack_goes_to_full_depth_in_one_step(tmp_path: Path) -> None:
    config = load(tmp_path, {"operator": "stack"})
    assert [stage.plan.layers for stage in config.stages] == [4, 12]
    assert [config.plan.root(layer_id) for layer_id in config.plan.order] == [0, 1, 2, 3] * 3


def test_where_new_layers_go_is_read(tmp_path: Path) -> None:
    plan = load(tmp_path, {"insert_at": "middle", "block": 2}).plan
    assert plan == grow(DepthPlan.plain(4), "lidas", 12, 2, insert_at="middle").plan


def test_growth_may_start_from_layers_that_were_there() -> None:
    first = grow(DepthPlan.plain(2), "last", 4, 2).plan
    stages = GrowthConfig().stages(12, 100, first)
    assert stages[0].plan == first
    assert stages[-1].plan == grow(first, "lidas", 12, 4).plan


def test_the_last_growth_may_come_with_the_first_step_of_the_cooldown(tmp_path: Path) -> None:
    config = load(tmp_path, {"schedule": _stages((85, 4), (15, 12))})
    assert config.stages[-1].first_step == config.schedule.cooldown_start(100) == 85


def test_a_cosine_has_no_cooldown_to_wait_for(tmp_path: Path) -> None:
    config = load(tmp_path, {"schedule": _stages((90, 4), (10, 12))}, schedule__kind="cosine")
    assert config.stages[-1].first_step == 90


def test_the_topology_follows_the_depth(tmp_path: Path) -> None:
    entries = [{"layers": 8, "pp": 2}, {"layers": 12, "pp": 2, "tp": 2, "dp": 2}]
    config = load(tmp_path, {"topology": entries})
    assert [config.topology(8, layers) for layers in (4, 8, 12)] == [(1, 1, 8), (2, 1, 4), (2, 2, 2)]
    assert config.topology(8) == (2, 2, 2)
    assert config.smallest_world == 8
    config.check_world(8)
    with pytest.raises(MegaloopError, match=r"growth\.topology\.1: pp 2 x tp 2 x dp 2 makes 8 ranks, but there are 4"):
        config.check_world(4)


def test_what_an_entry_leaves_open(tmp_path: Path) -> None:
    entries = [{"layers": 8}, {"layers": 12, "pp": 2, "dp": 1}]
    config = load(tmp_path, {"topology": entries}, parallel={"tp": 2, "dp": 4})
    # tp is that of parallel; dp is what is left, not that of parallel
    assert config.topology(8, 4) == (1, 2, 4)
    assert config.topology(4, 8) == (1, 2, 2)
    assert config.topology(4, 12) == (2, 2, 1)
    assert config.smallest_world == 8, "the first stage needs the most"
    assert config.leaves_dp_open
    assert not load(tmp_path, {"topology": entries[1:]}, parallel={"tp": 2, "dp": 2}).leaves_dp_open


def test_a_stage_may_have_a_layer_per_pipeline_rank(tmp_path: Path) -> None:
    assert load(tmp_path, {"topology": [{"layers": 8, "pp": 8}]}).topology(8, 8) == (8, 1, 1)


def test_overrides_reach_growth(tmp_path: Path) -> None:
    load(tmp_path, {})
    path = tmp_path / "run.yaml"
    config = load_config(path, ["growth.schedule=[{steps: 40, layers: 4}, {steps: 60, layers: 12}]"])
    assert [stage.steps for stage in config.stages] == [40, 60]
    assert load_config(path, ["growth.operator=midas"]).growth.operator == "midas"  # type: ignore[union-attr]
    assert load_config(path, ["growth="]).growth is None
    written = tmp_path / "again.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


def _stages(*parts: tuple[int, int]) -> list[dict[str, int]]:
    return [{"steps": steps, "layers": layers} for steps, layers in parts]


@pytest.mark.parametrize(
    ("growth", "changes", "message"),
    [
        ({"block": 3, "start": 10, "schedule": _stages((50, 10), (50, 12))}, {}, "12 layers cannot be reached from 10 by blocks of 3"),
        ({}, {"depth": 11}, "11 layers cannot be reached from 8 by blocks of 4; choose for example 12"),
        ({"start": 2}, {}, "a block of 4 layers, and 2 to copy from"),
        ({"operator": "midas", "start": 6}, {"depth": 14}, "6 layers are no multiple of block 4"),
        ({"operator": "stack", "start": 5}, {}, "stack repeats all 5 layers, which never makes 12"),
        ({"start": 12}, {}, "growth.start 12 is not below depth 12: growth only deepens"),
        ({"start": 16}, {}, "growth.start 16 is not below depth 12"),
        ({"end": 0.95}, {"schedule__cooldown": 0.6}, "to 12 layers at step 48, but the cooldown begins at step 40"),
        ({"schedule": _stages((90, 4), (10, 12))}, {}, "to 12 layers at step 90, but the cooldown begins at step 85"),
        ({"schedule": _stages((50, 4), (40, 12))}, {}, "add up to 90, but train.steps is 100"),
        ({"schedule": _stages((50, 8), (50, 12))}, {}, "the first must have growth.start 4, and the last depth 12"),
        ({"schedule": _stages((50, 4), (50, 8))}, {}, "the stages go through 4, 8 layers; the first must have"),
        ({"schedule": _stages((30, 4), (30, 16), (40, 12))}, {}, "the stages go through 4, 16, 12 layers; growth only deepens"),
        ({"schedule": _stages((30, 4), (30, 4), (40, 12))}, {}, "two stages of 4 layers follow each other"),
        ({"schedule": _stages((50, 4), (50, 12)), "end": 0.5}, {}, "growth.end belongs to prop schedules"),
        ({"end": 1.5}, {}, "growth.end: Input should be less than or equal to 1"),
        ({"end": 0}, {}, "growth.end: Input should be greater than 0"),
        ({"schedule": []}, {}, "the stages go through no layers"),
        ({"schedule": "linear"}, {}, "growth.schedule: cannot read 'linear'; expected prop-1"),
        ({"schedule": "prop-999"}, {}, "growth.schedule: cannot read 'prop-999'"),
        ({"schedule": [{"step": 10, "layers": 4}]}, {}, "unknown key 'growth.schedule.0.step'; did you mean"),
        ({"schedule": [{"steps": 0, "layers": 4}]}, {}, "growth.schedule.0.steps: Input should be greater than 0"),
        ({"schedule": [{"steps": 100}]}, {}, "growth.schedule.0.layers: missing"),
        ({"schedule": 5}, {}, "growth.schedule: Input should be a valid string (found 5)"),
        ({"topology": [{"layers": 8, "dp": 3}]}, {}, "global_batch 8 is not a multiple of micro_batch 1 x dp 3"),
        ({"schedule": "prop-9"}, {"train__steps": 20}, "20 steps are too few for 3 stages under prop-9"),
        ({"topology": [{"layers": 8}, {"layers": 4}]}, {}, "layers 8, 4; each must be more than the one before"),
        ({"topology": [{"layers": 4}, {"layers": 4, "pp": 2}]}, {}, "layers 4, 4; each must be more than the one before"),
        ({"topology": [{"layers": 16}]}, {}, "an entry for 16 layers, but there are 12; it is never reached"),
        ({"topology": [{"layers": 4, "pp": 6}, {"layers": 8, "pp": 8}]}, {}, "growth.topology.0.pp 6 is more pipeline"),
        ({"topology": [{"layers": 8, "tp": 3}]}, {}, "growth.topology.0.tp 3 does not divide model.num_heads 4"),
        (
            {"topology": [{"layers": 4, "tp": 2}, {"layers": 8, "tp": 1}]}, {"model__vocab_size": 511},
            "growth.topology.0.tp 2 does not divide the vocabulary of 511 rows",
        ),
        (
            {"topology": [{"layers": 8, "tp": 2}]}, {"parallel__sequence_parallel": True, "data__sequence_length": 65},
            "parallel.sequence_parallel: tp 2 does not divide data.sequence_length 65",
        ),
        ({}, {"parallel__pp": 8}, "parallel.pp 8 is more pipeline ranks than the 4 layers of that growth stage"),
        ({}, {"depth": "(0,1,2,3)x2(4,5,6,7)x2"}, "is more than one loop of neighbouring layers; growth takes one"),
        ({"operator": "lidass"}, {}, "growth.operator: Input should be 'lidas'"),
        ({"blocks": 2}, {}, "unknown key 'growth.blocks'; did you mean 'growth.block'?"),
        ({"topology": [{"layers": 4, "layer": 4}]}, {}, "unknown key 'growth.topology.0.layer'; did you mean 'growth.topology.layers'?"),
        ({"topology": [{"layer": 4}]}, {}, "growth.topology.0.layers: missing"),
        ({"moments": "reset"}, {}, "growth.moments: Input should be 'copy' or 'zero'"),
    ],
)  # fmt: skip
def test_every_mistake_is_a_line(tmp_path: Path, growth: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MegaloopError) as caught:
        load(tmp_path, growth, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("entry", "world_size"), [({"layers": 8, "pp": 2}, 3), ({"layers": 8, "pp": 4}, 2)])
def test_ranks_that_one_stage_cannot_use(tmp_path: Path, entry: dict[str, int], world_size: int) -> None:
    config = load(tmp_path, {"topology": [entry, {"layers": 12}]}, train__global_batch=6)
    assert config.topology(world_size, 4) == config.topology(world_size, 12) == (1, 1, world_size)
    with pytest.raises(MegaloopError, match=rf"growth\.topology\.0: .*but there are {world_size};"):
        config.check_world(world_size)


def test_a_batch_that_one_stage_cannot_divide(tmp_path: Path) -> None:
    config = load(tmp_path, {"topology": [{"layers": 8, "pp": 2}]}, train__global_batch=6)
    with pytest.raises(MegaloopError, match=r"train\.global_batch 6 is not a multiple of micro_batch 1 x dp 4 = 4"):
        config.check_world(4)


# --- configurations that ship ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_configuration_has_a_topology_for_every_stage(path: Path) -> None:
    config = load_config(path)
    config.check_world(config.smallest_world)
    with pytest.raises(MegaloopError, match="but there are 0"):
        config.check_world(0)


@pytest.mark.parametrize("path", [path for path in GROWING if path.stem != "demo"], ids=lambda path: path.stem)
def test_what_a_configuration_says_it_saves(path: Path) -> None:
    config = load_config(path)
    tokens = config.train.global_batch * config.data.sequence_length
    flops = run_flops(config.stages, config.model, config.data.sequence_length, tokens)
    header = path.read_text().partition("\nname:")[0].replace("\n# ", " ")
    assert re.findall(r"[0-9.]+(?=% of)", header) == [f"{100 * flops.fraction:.1f}"]
    assert re.findall(r"([0-9,]+) of its steps", header) == [f"{flops.matched_steps:,}"]


@pytest.mark.parametrize("size", ["360m", "1_7b"])
@pytest.mark.parametrize("operator", ["midas", "lidas"])
def test_grown_smollms_are_their_baseline_but_for_growth(size: str, operator: str) -> None:
    grown, baseline = (load_config(CONFIGS / f"smollm_{size}_{name}.yaml") for name in (operator, "baseline"))
    assert grown.model_copy(update={"name": baseline.name, "growth": None}) == baseline
    assert grown.growth is not None
    assert (grown.growth.operator, grown.growth.block, grown.growth.start) == (operator, 4, 4)


@pytest.mark.parametrize(
    ("looped", "baseline", "depth", "layers"),
    [
        ("smollm_360m_looped", "smollm_360m_baseline", "8-8x2-8", 24),
        ("smollm_360m_looped_4x6", "smollm_360m_baseline", "4-4x6-4", 12),
        ("smollm_1_7b_looped", "smollm_1_7b_baseline", "4-4x4-4", 12),
    ],
)
def test_looped_smollms_are_their_baseline_but_for_depth(looped: str, baseline: str, depth: str, layers: int) -> None:
    ours, plain = (load_config(CONFIGS / f"{name}.yaml") for name in (looped, baseline))
    assert ours.model_copy(update={"name": plain.name, "depth": plain.depth}) == plain
    assert (str(ours.depth), ours.plan.layers, ours.plan.depth) == (depth, layers, plain.plan.depth)


def test_the_retrofit_is_the_grown_model_but_for_the_loop_in_its_cooldown() -> None:
    ours, grown = (load_config(CONFIGS / f"smollm_1_7b_{name}.yaml") for name in ("lidas_retrofit", "lidas"))
    assert ours.model_copy(update={"name": grown.name, "depth_events": ()}) == grown
    assert ours.stages[-1].first_step == ours.schedule.cooldown_start(ours.train.steps)
    assert ours.stages[-1].plan.notation == "10-4x2-10"


def test_the_math_heavy_cooldown_is_the_retrofit_on_the_corpus_of_the_paper() -> None:
    ours, plain = (load_config(CONFIGS / f"smollm_1_7b_lidas_{name}.yaml") for name in ("retrofit_math", "retrofit"))
    assert ours.model_copy(update={"name": plain.name, "data": plain.data}) == plain
    parts = [source.weights for source in ours.data.sources]
    stable, cooldown = ([weights[phase] / sum(part[phase] for part in parts) for weights in parts] for phase in (0, 1))
    assert stable == pytest.approx([0.70, 0.15, 0.09, 0.06])
    assert cooldown[3] == pytest.approx(0.20)
    assert cooldown[:3] == pytest.approx([share * 0.80 / 0.94 for share in stable[:3]]), "the rest in proportion"
    assert ours.cooldown_sample == 170_000 * 1024


@pytest.mark.parametrize(("size", "peak", "tokens"), [("360m", 3e-3, 1e6), ("1_7b", 5e-4, 2e6)])
def test_smollms_have_the_recipe_of_the_paper(size: str, peak: float, tokens: float) -> None:
    """arXiv 2602.16490: 200k steps, warm-up 2k, plateau to 170k, then 1 - sqrt; decay 0.01, clip 1."""
    for path in SHIPPED:
        if path.stem.startswith(f"smollm_{size}"):
            config = load_config(path)
            schedule, options = config.schedule, config.optimizer
            assert (config.train.steps, schedule.warmup_steps, schedule.cooldown_start(200_000)) == (
                200_000,
                2000,
                170_000,
            )
            assert (schedule.decay, schedule.final) == ("sqrt", 0.0)
            assert (options.lr, options.weight_decay, options.clip) == (peak, 0.01, 1.0)
            assert config.train.global_batch * config.data.sequence_length == pytest.approx(tokens, rel=0.05)


def test_the_7b_grows_on_64_ranks() -> None:
    config = load_config(CONFIGS / "llama_7b_lidas.yaml")
    config.check_world(64)
    assert config.topology(64, 8) == (1, 2, 32)
    assert config.topology(64) == (4, 2, 8)
    assert [stage.plan.layers for stage in config.stages] == list(range(8, 33, 4))
