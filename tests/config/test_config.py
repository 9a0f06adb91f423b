"""The configuration: strict, with overrides, and one clear line for every mistake."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config import Config, TrainConfig, load_config, parse_override
from megaloop.depth import DepthPlan, DepthSpec
from megaloop.errors import MegaloopError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("depth: 4\ndata:\n  sources:\n    - path: shards\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_that_ships_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.plan.is_looped == ("looped" in path.stem or "retrofit" in path.stem)


@pytest.mark.parametrize(("stem", "millions"), [("smollm_360m_baseline", 361.8), ("smollm_1_7b_baseline", 1711.4)])
def test_smollm_shapes_have_smollms_size(stem: str, millions: float) -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == stem))
    m = config.model
    assert m.vocab_size is not None
    kv_size = m.num_kv_heads * m.head_size
    layer = 2 * m.hidden_size**2 + 2 * m.hidden_size * kv_size + 3 * m.hidden_size * m.ffn_size + 2 * m.hidden_size
    total = config.plan.layers * layer + m.hidden_size * (m.vocab_size + 1)
    assert total / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.topology(8) == (1, 1, 8)


def test_overrides_reach_any_value(config_file: Path) -> None:
    overrides = ["train.steps=7", "optimizer.lr=1e-3", "data.sources.0.weight=2", "depth=8", "parallel.dp=", "name=x y"]
    config = load_config(config_file, overrides)
    assert (config.train.steps, config.optimizer.lr, config.plan.depth, config.name) == (7, 1e-3, 8, "x y")
    assert config.data.sources[0].weight == 2
    assert config.parallel.dp is None


def test_the_last_override_wins(config_file: Path) -> None:
    assert load_config(config_file, ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("value", "text"),
    [(24, "24"), ("24", "24"), ("4-4x4-4", "4-4x4-4"), ("4-4x1-4", "4-4x1-4"), ("(0,1,3)(2)x3", "(0,1,3)(2)x3"), (" 8 ", " 8 ")],
)  # fmt: skip
def test_a_depth_is_read_once_and_written_as_it_was(config_file: Path, value: str | int, text: str) -> None:
    values = {**yaml.safe_load(config_file.read_text()), "depth": value, "depth_events": [{"at": 0.5, "depth": value}]}
    config = Config.model_validate(values)
    assert config.depth == DepthSpec.parse(value)
    assert config.depth.plan == DepthPlan.parse(value)
    for written in (yaml.safe_load(config.to_yaml()), config.model_dump(mode="json"), config.model_dump()):
        assert written["depth"] == written["depth_events"][0]["depth"] == text
        assert Config.model_validate(written) == config
    assert Config.model_validate({**values, "depth": config.depth}) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.step=1", "unknown key 'train.step'; did you mean 'train.steps'"),
        ("trian.steps=1", "unknown key 'trian'; did you mean 'train'"),
        ("data.sources.0.wieght=1", "unknown key 'data.sources.0.wieght'; did you mean 'data.sources.weight'"),
        ("train.steps=0", "train.steps: .*greater than 0.*found 0"),
        ("train.steps=many", "train.steps: .*found 'many'"),
        ("train.precision=fp8", "train.precision: .*'fp32' or 'bf16'"),
        ("train.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.steps=[", "not YAML"),
        ("depth.sub=1", "lies under a value that is no section"),
        ("depth=0", "at least one layer"),
        ("depth=4-4x4", "cannot read '4-4x4'"),
        ("depth=2-2x2", "depth: cannot read '2-2x2'"),
        ("depth=1-0x3-1", "depth: '1-0x3-1' loops 0 layers 3 times; both must be at least 1"),
        ("depth=2-2x99999999-0", "depth: '2-2x99999999-0' is deeper than 100000 layers"),
        ("depth=4.5", "depth: Input should be a valid string"),
        ("depth=" + "(0)" * 2000, "depth: should have at most 4096 characters"),
        (
            "depth_events=[{at: 0.5, depth: 4-4x}]",
            "depth_events.0.depth: cannot read '4-4x'; expected a number of layers",
        ),
        ("parallel.tp=2", "parallel.tp 2 does not divide model.num_heads 15"),
        ("parallel.tp=3", "parallel.tp 3 does not divide model.num_kv_heads 5"),
        ("parallel.pp=5", "parallel.pp 5 is more pipeline ranks than the 4 layers"),
        ("parallel.dp=3", "train.global_batch 8 is not a multiple of micro_batch 1 x dp 3 = 3; choose for example 9"),
        ("model.num_heads=7", "is not divisible by model.num_heads 7"),
        ("model.num_kv_heads=4", "num_heads 15 is not divisible by model.num_kv_heads 4"),
        ("schedule.warmup_steps=2000", "warmup_steps 2000 is more than train.steps 1000"),
        ("schedule={kind: cosine, decay: sqrt}", "schedule.decay sqrt applies only to schedule.kind trapezoid"),
        ("data.sources=[]", "data.sources: .*at least 1"),
        ("name=2024-13-45", r"override 'name=2024-13-45': the value is not YAML \(month must be in 1..12\)"),
        ("seed=" + "9" * 5000, "a number of 5000 characters"),
        ("train.steps=!!int abc", "not YAML"),
        ("train.steps=" + "[" * 2000, "nested more than 50 deep"),
        ("train.steps=true", "train.steps: should not be true or false"),
        ("train.steps=99999999999999999999", "train.steps: should be at most 9007199254740992"),
        ("data.sources.²=1", "'²' is no element of this list; it has places 0 to 0"),
        ("data.sources.1.path=x", "'1' is no element of this list; it has places 0 to 0"),
        ("faults.step_limit=.inf", "faults.step_limit: Input should be a finite number"),
        ("name=..", "name: should be the name of a directory of its own"),
        ("name=a/b", "name: String should match pattern"),
        ('name="\\e[2J"', r"name: should hold no control characters \(found '\\x1b\[2J'\)"),
        ("name=" + "x" * 201, "name: should have at most 200 bytes"),
        ('run_dir="\\0"', "run_dir: should hold no zero byte"),
        (
            "growth={start: 2, schedule: [{steps: 1, layers: 2}, {steps: 9, layers: 99}, {steps: 1, layers: 4}]}",
            "only deepens",
        ),
    ],
    ids=lambda text: text[:30],
)
def test_a_mistake_gets_one_line(config_file: Path, text: str, message: str) -> None:
    with pytest.raises(MegaloopError, match=message) as caught:
        load_config(config_file, [text])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.steeps", "did you mean 'train.steps'?"),
        ("steps", "did you mean 'train.steps'?"),
        ("train.lr", "did you mean 'optimizer.lr'?"),
        ("optimiser", "did you mean 'optimizer'?"),
        ("qwertz", "a configuration has name, run_dir, init, "),
        ("train.qwertz", "train has steps, global_batch, "),
        ("a.b.c", "a configuration has name, "),
        ("x" * 100_000, "a configuration has name, "),
    ],
    ids=lambda text: text[:20],
)
def test_only_what_is_near_is_suggested(config_file: Path, key: str, suggestion: str) -> None:
    with pytest.raises(MegaloopError, match="unknown key") as caught:
        load_config(config_file, [f"{key}=1"])
    assert suggestion in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in suggestion)


def _floats(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _floats(item, (*path, key))
    elif isinstance(value, float):
        yield path


def test_no_number_of_a_configuration_may_be_infinite_or_none(config_file: Path) -> None:
    names = [".".join(path) for path in _floats(load_config(config_file).model_dump())]
    assert len(names) > 15
    for name in names:
        for value in (".inf", "-.inf", ".nan", "1e999"):
            with pytest.raises(MegaloopError, match=f"{name}: Input should be"):
                load_config(config_file, [f"{name}={value}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "expected a mapping"),
        (b"- 1\n", "expected a mapping of keys, found list"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"depth: 4\n", "data: missing"),
        (b"data: 3\n", "data: "),
    ],
)
def test_a_file_that_is_no_configuration_gets_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MegaloopError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "world_size", "topology"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (1, 1, 4)),
        ({"pp": 2}, 4, (2, 1, 2)),
        ({"pp": 2, "tp": 1, "dp": 2}, 4, (2, 1, 2)),
        ({"pp": 2}, 3, None),
        ({"pp": 4}, 2, None),
        ({"dp": 2}, 4, None),
    ],
)
def test_the_world_size_must_factor(
    parallel: dict[str, int], world_size: int, topology: tuple[int, int, int] | None
) -> None:
    config = Config.model_validate({"data": {"sources": [{"path": "x"}]}, "parallel": parallel})
    if topology is not None:
        assert config.topology(world_size) == topology
        return
    with pytest.raises(MegaloopError, match=f"but there are {world_size}"):
        config.topology(world_size)


def test_the_batch_must_divide_over_the_replicas(config_file: Path) -> None:
    with pytest.raises(MegaloopError, match="global_batch 8 is not a multiple of micro_batch 1 x dp 3"):
        load_config(config_file).topology(3)


def test_micro_batches_are_those_of_one_replica() -> None:
    train = TrainConfig(global_batch=24, micro_batch=2)
    assert [train.micro_batches(dp) for dp in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(
        MegaloopError, match=r"24 is not a multiple of micro_batch 2 x dp 5 = 10; choose for example 30"
    ):
        train.micro_batches(5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_configuration_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["seed=3"])
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config


@given(st.lists(st.from_regex(r"[a-z_]+", fullmatch=True), min_size=1), st.integers() | st.booleans() | st.none())
def test_an_override_is_a_path_and_a_yaml_value(keys: list[str], value: Any) -> None:
    assert parse_override(f"{'.'.join(keys)}={yaml.safe_dump(value)}") == (keys, value)


def test_the_configuration_page_lists_every_value_as_it_is() -> None:
    check = [sys.executable, str(CONFIGS[0].parents[1] / "tools/config_table.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
