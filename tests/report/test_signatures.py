"""The section *Signatures*: what diagnosed runs show side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, Examination, Result, append_result, curve
from megaloop.report.page import make_report
from tests.report.rundirs import write_run

LAYERS = 8


def _diagnosed(
    run: Path, seed: int, *, late: float = 0.5, prompts: str = "a", step: int = 20, measures: Any = None
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
    for name in measures or results:
        examination = Examination(
            measure=name, prompts="data/asked", prompts_sha256=prompts, count=12, depth="8", block=2, step=step,
            checkpoint="c", precision="fp32", seed=123, version=1,
        )  # fmt: skip
        append_result(run / DIAGNOSIS, DiagnosisRecord(examination, results[name], 0.5, "2026-11-29T00:00:00+00:00"))
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
