"""A mixture that changes in the cooldown: the same samples whatever the topology, the growth and the interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megaloop.config import Config, DataConfig, SourceConfig, load_config
from megaloop.data import open_sources
from megaloop.errors import MegaloopError
from tests.distributed import RankPool
from tests.train.runs import configuration, losses, train


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two sources, of which the second begins in the cooldown."""
    copy = shutil.copytree(corpus, tmp_path_factory.mktemp("mixture") / "copy")
    return [
        {"path": str(corpus), "weight": {"stable": 1, "cooldown": 0.5}},
        {"path": str(copy), "weight": {"stable": 0, "cooldown": 0.5}},
    ]


def _values(two: list[dict[str, Any]], directory: Path, layout: tuple[int, int, int], **changes: Any) -> dict[str, Any]:
    values = configuration(
        Path("."),
        directory,
        layout,
        schedule={"warmup_steps": 4, "cooldown": 0.4},
        checkpoint={"every": 7, "keep": 5},
        **changes,
    )
    return {**values, "data": {"sources": two, "sequence_length": 32}}


def test_the_second_source_begins_with_the_cooldown(two: list[dict[str, Any]], tmp_path: Path) -> None:
    config = Config.model_validate(_values(two, tmp_path, (1, 1, 1)))
    order = open_sources(config.data).order(config.seed, config.cooldown_sample)
    sources = [order.source(number)[0] for number in range(80)]
    assert config.cooldown_sample == 48  # of 20 steps of 4, the last 8
    assert set(sources[:48]) == {0}
    assert sum(sources[48:]) == 16


@pytest.mark.slow
def test_a_run_that_grows_and_is_resumed_reads_the_mixture_of_one_that_does_neither(
    two: list[dict[str, Any]], tmp_path: Path, ranks_1: RankPool, ranks_2: RankPool
) -> None:
    """Stopped after step 14, in the cooldown, and resumed as two replicas; growing changes what is learnt, not what is read."""
    straight, stopped, grown = (tmp_path / name for name in ("straight", "stopped", "grown"))
    (taken,) = ranks_1.run(train, _values(two, straight, (1, 1, 1)))
    assert taken == list(range(80))
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000020")
    resumed = ranks_2.run(train, _values(two, stopped, (1, 1, 2)), resume=True)
    assert sorted(number for part in resumed for number in part) == list(range(56, 80))
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-5)
    growth = {"operator": "lidas", "start": 2, "block": 2, "end": 0.5}
    values = _values(two, grown, (1, 1, 1), growth=growth, depth="4")
    (read,) = ranks_1.run(train, values)
    assert read == taken


def test_without_the_other_source_the_cooldown_is_another(
    two: list[dict[str, Any]], tmp_path: Path, corpus: Path
) -> None:
    sources = open_sources(DataConfig(sources=(SourceConfig(path=corpus),), sequence_length=32))
    mixed = open_sources(DataConfig.model_validate({"sources": two, "sequence_length": 32}))
    plain, changed = sources.order(0, 48), mixed.order(0, 48)
    assert [plain(n) for n in range(48)] == [changed(n) for n in range(48)]
    assert [plain(n) for n in range(48, 80)] != [changed(n) for n in range(48, 80)]
    assert "share 100%, 50% in the cooldown" in mixed.describe()
    assert "share 0%, 50% in the cooldown" in mixed.describe()


@pytest.mark.parametrize(
    ("weights", "override", "message"),
    [
        ("0", "seed=0", "data.sources.1.weight: Input should be greater than 0"),
        ("{stable: 1}", "seed=0", "data.sources.1.weight.cooldown: missing"),
        ("{stable: -1, cooldown: 1}", "seed=0", "data.sources.1.weight.stable: Input should be greater than or equal"),
        ("{stable: 1, cooldwn: 1}", "seed=0", "did you mean 'data.sources.weight.cooldown'"),
        ("{stable: 1, cooldown: 2}", "schedule.kind=cosine", "weights of a cooldown, but schedule.kind cosine"),
        ("{stable: 1, cooldown: 2}", "schedule.cooldown=0", "cooldown 0 has none"),
        ("1", "data.sources.0.weight={stable: 1, cooldown: 0}", ""),
        ("{stable: 1, cooldown: 0}", "data.sources.0.weight={stable: 1, cooldown: 0}", "of the cooldown phase is 0"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(tmp_path: Path, weights: str, override: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"data: {{sources: [{{path: a}}, {{path: b, weight: {weights}}}]}}\n", encoding="utf-8")
    if not message:
        load_config(file, [override])
        return
    with pytest.raises(MegaloopError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)
