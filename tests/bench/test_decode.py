"""``megaloop bench decode`` on a small model: every way runs, and those that have to give the same tokens do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaloop.bench.decode import DecodeBenchmark, bench_decode, table
from megaloop.depth import LoopStyle
from megaloop.errors import MegaloopError
from megaloop.inference.speculation import Speculation
from tests.analysis.models import decoder, saved


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> DecodeBenchmark:
    checkpoint = saved(decoder("1-2x4-1"), tmp_path_factory.mktemp("decode") / "step")
    return bench_decode(checkpoint, batches=(1, 3), prompt=6, tokens=6, repeats=1, speculate=Speculation(2))


def test_every_way_is_timed_and_gives_the_same_tokens(measured: DecodeBenchmark) -> None:
    assert [(row.batch, row.way) for row in measured.results] == [
        (batch, way) for batch in (1, 3) for way in ("ours", "theirs", "half", "drafted")
    ]
    for row in measured.results:
        assert row.tokens_per_second > 0
        assert row.spread[0] <= row.speed <= row.spread[1]
        assert row.same == (None if row.way == "half" else 1.0)
        assert row.loops == (2.0 if row.way == "half" else 4.0)
        assert (row.accepted is not None) == (row.way == "drafted")


def test_the_table_has_a_row_for_each(measured: DecodeBenchmark) -> None:
    assert table(measured).row_count == len(measured.results)


def test_a_loop_that_transformers_has_no_place_for_is_said(tmp_path: Path) -> None:
    checkpoint = saved(decoder("1-2x4-1", LoopStyle(norm=True)), tmp_path / "step")
    with pytest.raises(MegaloopError, match="injection or a norm"):
        bench_decode(checkpoint, batches=(1,), prompt=4, tokens=4, repeats=1)
    assert bench_decode(checkpoint, batches=(1,), prompt=4, tokens=4, repeats=1, transformers=False).results
