"""The section *Signatures*: what diagnosed runs show side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, Examination, Result, append_result, curve
from megaloop.report import depth_use_plots
from megaloop.report.page import make_report
from tests.report.rundirs import write_run

LAYERS = 8


def _diagnosed(
    run: Path,
    seed: int,
    *,
    late: float = 0.5,
    prompts: str = "a",
    step: int = 20,
    measures: Any = None,
    block: int = 2,
    checkpoint: str = "c",
    time: str = "2026-11-29T00:00:00+00:00",
    extra: dict[str, Result] | None = None,
) -> Path:
    """Results of a model whose last layers are worth ``late`` nats."""
    generator = np.random.default_rng(seed)
    rise = np.array([0.8, 0.8, 0.1, 0.1, 0.1, 0.1, late, late])
    rows = 1.0 * 40 + 40 * (rise + generator.normal(scale=0.02, size=(12, LAYERS)))
    losses = {"skip 1": rows.tolist(), "loss without": [[40.0]] * 12, "targets": [[40.0]] * 12}
    skip = Result(curves={"skip 1: loss": curve(rise), "skip 2: loss": curve(rise[:7])}, by_prompt=losses)
    added = {
        name: curve(generator.uniform(0.1, 1, LAYERS))
        for name in ("attention_size", "mlp_size", "layer_cosine", "residual_norm")
    }
    sizes = {"attention_size": generator.uniform(0.1, 1, (12, LAYERS)).tolist()}
    lens = {name: curve(np.linspace(1, 0, LAYERS + 1)) for name in ("kl", "overlap", "accuracy")}
    overlap = {"overlap at the last layer": [[30.0 + seed, 40.0]] * 12}
    effects = {"future effect on later layers": generator.uniform(0, 1, (LAYERS, LAYERS)).tolist()}
    results = {
        "skip": skip,
        "contributions": Result(curves=added, by_prompt=sizes),
        "lens": Result(curves=lens, by_prompt=overlap),
        "effects": Result(matrices=effects),
    }
    results |= extra or {}
    for name in measures or results:
        examination = Examination(
            measure=name, prompts="data/asked", prompts_sha256=prompts, count=12, depth="8", block=block, step=step,
            checkpoint=checkpoint, precision="fp32", seed=123, version=1,
        )  # fmt: skip
        append_result(run / DIAGNOSIS, DiagnosisRecord(examination, results[name], 0.5, time))
    return run


def _run(folder: Path, name: str, seed: int, **options: Any) -> Path:
    rate = {"baseline": 1e-3, "grown": 2e-3, "other": 3e-3}[name]  # runs of one configuration are one group
    run = write_run(folder / f"{name}-seed{seed}", f"{name}-seed{seed}", seed=seed, steps=20, optimizer={"lr": rate})
    return _diagnosed(run, seed, **options)


def _section(page: str) -> str:
    return page.partition('<section id="signatures">')[2].partition("</section>")[0]


def test_groups_stand_side_by_side(tmp_path: Path) -> None:
    """With the mean over seeds, from the smallest to the largest, and how many show it."""
    runs = [_run(tmp_path, "grown", seed) for seed in range(3)]
    runs += [_run(tmp_path, "baseline", seed, late=late) for seed, late in enumerate((0.0, 0.0, 0.1))]
    report, page = make_report(runs)
    section = _section(page)
    assert section.count("<svg") == 4  # what layers add, what they predict, who reads whom, skipped
    found = {(row["group"], row["signature"]): row for row in report.signatures}
    grown, plain = (found[name, "late layers indispensable"] for name in ("grown", "baseline"))
    assert grown["verdicts"] == {"seen": 3}
    assert grown["value"] == pytest.approx(0.4, abs=0.02)
    assert grown["low"] < grown["value"] < grown["high"]
    assert plain["verdicts"] == {"not seen": 2, "unclear": 1}
    overlap = found["grown", "overlap at the last layer"]
    assert (overlap["value"], overlap["low"], overlap["high"]) == (31 / 40, 30 / 40, 32 / 40)
    assert overlap["verdicts"] == {}
    assert "seen in 3 of 3" in section
    assert "period of the block" in section
    assert "nan" not in re.sub(r"<[^>]*>", "", section).lower()
    json.dumps(report.signatures, allow_nan=False)


def test_one_run_has_the_interval_of_its_prompts(tmp_path: Path) -> None:
    report, page = make_report([_run(tmp_path, "grown", 0)])
    (row,) = [row for row in report.signatures if row["signature"] == "late layers indispensable"]
    assert row["runs"] == 1
    assert row["high"] - row["low"] < 0.05
    assert "; seen</td>" in _section(page)


def test_runs_that_were_not_diagnosed_have_no_section(tmp_path: Path) -> None:
    report, page = make_report([write_run(tmp_path / "run", "run", steps=20)])
    assert report.signatures == []
    assert 'id="signatures"' not in page


def test_of_each_run_the_newest_step_counts(tmp_path: Path) -> None:
    run = _diagnosed(_run(tmp_path, "grown", 0, late=0.0, step=10), 0, late=0.5, step=20)
    report, _ = make_report([run])
    (row,) = [row for row in report.signatures if row["signature"] == "late layers indispensable"]
    assert row["value"] == pytest.approx(0.4, abs=0.02)


def test_runs_that_were_asked_with_other_prompts_are_left_out(tmp_path: Path) -> None:
    """Those that most of them share are compared."""
    runs = [_run(tmp_path, "grown", 0), _run(tmp_path, "baseline", 0), _run(tmp_path, "other", 0, prompts="b")]
    report, page = make_report(runs)
    assert {row["group"] for row in report.signatures} == {"grown", "baseline"}
    assert ">other</th>" not in _section(page)


def test_a_measure_that_some_runs_lack_leaves_the_others(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "grown", 0), _run(tmp_path, "baseline", 0, measures=["lens"])]
    report, page = make_report(runs)
    names = [row["signature"] for row in report.signatures if row["group"] == "baseline"]
    assert names == ["overlap at the last layer"]
    assert _section(page).count("<svg") == 4


LATER = "2026-11-30T00:00:00+00:00"


def _late(run: Path) -> float:
    report, _ = make_report([run])
    (row,) = [row for row in report.signatures if row["signature"] == "late layers indispensable"]
    return float(row["value"])


@pytest.mark.parametrize("change", [{"prompts": "b"}, {"block": 4}, {"checkpoint": "d"}])
def test_what_was_asked_last_is_shown_where_a_run_was_asked_in_several_ways(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """With other prompts, with another block, or of a checkpoint that was trained again up to the same step."""
    run = _diagnosed(_run(tmp_path, "grown", 0, late=0.0), 0, late=0.5, time=LATER, **change)
    assert _late(run) == pytest.approx(0.4, abs=0.02)
    again = _diagnosed(_run(tmp_path, "other", 0, late=0.0, time=LATER), 0, late=0.5, **change)
    assert _late(again) == pytest.approx(-0.1, abs=0.02)


def test_matrices_need_not_be_square(tmp_path: Path) -> None:
    """Layers by tokens, of an attribution."""
    attributions = {
        name: Result(matrices={name: np.linspace(-1, 1, LAYERS * 5).reshape(LAYERS, 5).tolist()})
        for name in ("erasure", "gradients")
    }
    _, page = make_report([_run(tmp_path, "grown", 0, extra=attributions)])
    assert _section(page).count("<svg") == 6
    assert "What the answer rests on: integrated gradients" in _section(page)


def test_the_interval_is_of_the_run_that_has_a_number(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "grown", seed) for seed in range(2)]
    lines = (runs[0] / DIAGNOSIS).read_text().splitlines()
    shallow = json.loads(lines[0])
    shallow["result"]["by_prompt"]["skip 1"] = [[50.0, 50.0]] * 12  # two layers have no middle
    (runs[0] / DIAGNOSIS).write_text("\n".join([json.dumps(shallow), *lines[1:]]) + "\n")
    report, _ = make_report(runs)
    (row,) = [row for row in report.signatures if row["signature"] == "late layers indispensable"]
    assert row["low"] < row["value"] < row["high"]


def test_exits_and_iterations_count_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers that ran, and iterations that are done, do; layers and places of the lens count from 0."""
    values = curve(np.linspace(0, 1, LAYERS - 1))
    run = _run(
        tmp_path, "grown", 0, measures=["lens", "loops", "exit"],
        extra={"exit": Result(curves={"exit: accuracy": values}), "loops": Result(curves={"state_norm": values})},
    )  # fmt: skip
    of_task = json.loads((run / DIAGNOSIS).read_text().splitlines()[2]) | {"options": "copy-real, 5 shots, 9 questions"}
    (run / DIAGNOSIS).write_text((run / DIAGNOSIS).read_text() + json.dumps(of_task) + "\n")
    begins: dict[str, float] = {}

    def look(figure: Any) -> str:
        begins.update({axes.get_xlabel(): axes.lines[0].get_xdata()[0] for axes in figure.axes if axes.lines})
        return "<svg></svg>"

    monkeypatch.setattr(depth_use_plots, "to_svg", look)
    make_report([run])
    assert begins == {"layer": 0, "iteration": 1, "layers before the exit": 1}


HOSTILE: list[dict[str, Any]] = [
    {"by_prompt": {}},
    {"by_prompt": {"skip 1": [[1.0, 2.0], [3.0]], "loss without": [[1.0], [1.0]], "targets": [[1.0], [1.0]]}},
    {"by_prompt": {"skip 1": [[1.0] * 8] * 3, "loss without": [[1.0]], "targets": [[1.0]]}},
    {"by_prompt": {"skip 1": [[]] * 3, "loss without": [[]] * 3, "targets": [[]] * 3}},
    {"by_prompt": {"skip 1": [], "loss without": [], "targets": []}},
    {"by_prompt": {"skip 1": [[float("nan")] * 8] * 2, "loss without": [[1.0]] * 2, "targets": [[1.0]] * 2}},
    {"by_prompt": {"skip 1": [[1e308] * 8] * 2, "loss without": [[1.0]] * 2, "targets": [[1.0]] * 2}},
    {"curves": {"skip 1: loss": {"values": []}, "skip 2: loss": {"values": [None] * 8}}},
    {"curves": {"<script>$x$\u0007": {"values": [1e29, -1e29]}, "<b>: loss": {"values": [1e29, -1e29]}}},
    {"curves": {"skip 1: loss": {"values": [float("inf")]}}},
]


@pytest.mark.parametrize("result", HOSTILE)
def test_results_that_somebody_has_edited_are_no_end_of_the_page(tmp_path: Path, result: dict[str, Any]) -> None:
    run = _run(tmp_path, "grown", 0, measures=["lens"])
    line = json.loads((run / DIAGNOSIS).read_text())
    with (run / DIAGNOSIS).open("a") as file:
        file.write(json.dumps(line | {"measure": "skip", "result": result}) + "\n")
    report, page = make_report([run])
    assert "<script>" not in _section(page)
    json.dumps(report.signatures, allow_nan=False)
    assert "overlap at the last layer" in _section(page)


@pytest.mark.parametrize(
    "matrix", [[], [[]], [[1.0], [1.0, 2.0]], [[1.0, 2.0, 3.0]] * 2, [[0.0, 0.0]] * 2, [[1e30] * 2] * 2]
)
@pytest.mark.parametrize("measure", ["effects", "symmetry", "erasure"])
def test_matrices_of_any_shape_are_no_end_of_the_page(tmp_path: Path, measure: str, matrix: list[list[float]]) -> None:
    name = {
        "effects": "future effect on later layers",
        "symmetry": "cosine of the weights of blocks",
        "erasure": "erasure",
    }
    run = _run(tmp_path, "grown", 0, measures=[measure], extra={measure: Result(matrices={name[measure]: matrix})})
    _, page = make_report([run])
    assert "<svg" in page
