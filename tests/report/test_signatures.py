"""The section *Signatures*: what diagnosed runs show side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, Examination, Result, append_result, curve
from megaloop.report import depth_use_plots
from megaloop.report.depth_use import DepthUse
from megaloop.report.format import format_signature
from megaloop.report.page import Report, make_report
from megaloop.report.read import read_run
from megaloop.report.savings import group_runs
from megaloop.report.signatures import Signatures, signatures
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
    """Results of a model whose last layers are worth ``late`` nats.

    Args:
        extra: results by measure, those of an attribution by "erasure of prompt 3".
    """
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
        measure, _, options = name.partition(" of ")
        examination = Examination(
            measure=measure, prompts="data/asked", prompts_sha256=prompts, count=12, depth="8", block=block, step=step,
            checkpoint=checkpoint, precision="fp32", seed=123, version=1, options=options,
        )  # fmt: skip
        append_result(run / DIAGNOSIS, DiagnosisRecord(examination, results[name], 0.5, time))
    return run


def _run(folder: Path, name: str, seed: int, **options: Any) -> Path:
    rate = {"baseline": 1e-3, "grown": 2e-3, "other": 3e-3}[name]  # runs of one configuration are one group
    run = write_run(folder / f"{name}-seed{seed}", f"{name}-seed{seed}", seed=seed, steps=20, optimizer={"lr": rate})
    return _diagnosed(run, seed, **options)


def _found(*runs: Path) -> Signatures:
    """What the page's section shows; pictures are drawn only if they are asked for."""
    return signatures(group_runs([read_run(run) for run in runs]))


def _late(*runs: Path) -> dict[str, Any]:
    """Of the first group that has it."""
    return next(row for row in _found(*runs).numbers if row["signature"] == "late layers indispensable")


# --- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """A report, and its section: three runs of one group, three of another, and one with the lens alone."""
    folder = tmp_path_factory.mktemp("page")
    runs = [_run(folder, "grown", seed) for seed in range(3)]
    runs += [_run(folder, "baseline", seed, late=late) for seed, late in enumerate((0.0, 0.0, 0.1))]
    runs += [_run(folder, "other", 0, measures=["lens"])]
    report, text = make_report(runs)
    return report, text.partition('<section id="signatures">')[2].partition("</section>")[0]


def test_groups_stand_side_by_side(page: tuple[Report, str]) -> None:
    """With the mean over seeds, from the smallest to the largest, and how many show it."""
    report, section = page
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


def test_a_measure_that_some_runs_lack_leaves_the_others(page: tuple[Report, str]) -> None:
    report, section = page
    assert [row["signature"] for row in report.signatures if row["group"] == "other"] == ["overlap at the last layer"]
    assert ">other</th>" in section


def test_runs_that_were_not_diagnosed_have_no_section(tmp_path: Path) -> None:
    report, text = make_report([write_run(tmp_path / "run", "run", steps=20)])
    assert report.signatures == []
    assert 'id="signatures"' not in text


# --- numbers


def test_one_run_has_the_interval_of_its_prompts(tmp_path: Path) -> None:
    found = _found(_run(tmp_path, "grown", 0))
    (row,) = next(cells for name, cells, _ in found.rows if name == "late layers indispensable")
    assert row is not None
    assert row.high is not None
    assert row.low is not None
    assert row.high - row.low < 0.05
    assert format_signature(row).endswith("); seen")


def test_what_is_unclear_says_why(tmp_path: Path) -> None:
    """Two blocks of four layers are too few to tell."""
    found = _found(_run(tmp_path, "grown", 0, block=4))
    (row,) = next(cells for name, cells, _ in found.rows if name == "period of the block")
    assert row is not None
    assert row.verdicts == {"unclear": 1}
    assert re.search(r"; unclear; in 8 layers the test finds \d\d% of perfect patterns$", format_signature(row))


def test_of_each_run_the_newest_step_counts(tmp_path: Path) -> None:
    run = _diagnosed(_run(tmp_path, "grown", 0, late=0.0, step=10), 0, late=0.5, step=20)
    assert _late(run)["value"] == pytest.approx(0.4, abs=0.02)


def test_runs_that_were_asked_with_other_prompts_are_left_out(tmp_path: Path) -> None:
    """Those that most of them share are compared."""
    found = _found(
        _run(tmp_path, "grown", 0), _run(tmp_path, "baseline", 0), _run(tmp_path, "other", 0, prompts="b")
    )  # fmt: skip
    assert {row["group"] for row in found.numbers} == {use.label for use in found.groups} == {"grown", "baseline"}


LATER = "2026-11-30T00:00:00+00:00"


@pytest.mark.parametrize("change", [{"prompts": "b"}, {"block": 4}, {"checkpoint": "d"}])
def test_what_was_asked_last_is_shown_where_a_run_was_asked_in_several_ways(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """With other prompts, with another block, or of a checkpoint that was trained again up to the same step."""
    run = _diagnosed(_run(tmp_path, "grown", 0, late=0.0), 0, late=0.5, time=LATER, **change)
    assert _late(run)["value"] == pytest.approx(0.4, abs=0.02)
    again = _diagnosed(_run(tmp_path, "other", 0, late=0.0, time=LATER), 0, late=0.5, **change)
    assert _late(again)["value"] == pytest.approx(-0.1, abs=0.02)


def test_a_later_look_at_other_prompts_does_not_hide_a_whole_diagnosis(tmp_path: Path) -> None:
    run = _run(tmp_path, "grown", 0, late=0.5)
    _diagnosed(run, 0, late=0.0, prompts="b", time=LATER, measures=["skip"])
    assert _late(run)["value"] == pytest.approx(0.4, abs=0.02)


def test_the_interval_is_of_the_run_that_has_a_number(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "grown", seed) for seed in range(2)]
    lines = (runs[0] / DIAGNOSIS).read_text().splitlines()
    shallow = json.loads(lines[0])
    shallow["result"]["by_prompt"]["skip 1"] = [[50.0, 50.0]] * 12  # two layers have no middle
    (runs[0] / DIAGNOSIS).write_text("\n".join([json.dumps(shallow), *lines[1:]]) + "\n")
    row = _late(*runs)
    assert row["low"] < row["value"] < row["high"]


# --- pictures


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of all pictures that are made from here on, which are not drawn."""
    made: list[Any] = []

    def look(figure: Any) -> str:
        made.extend(figure.axes)
        return "<svg></svg>"

    monkeypatch.setattr(depth_use_plots, "to_svg", look)
    return made


def test_exits_and_iterations_count_from_one(tmp_path: Path, axes: list[Any]) -> None:
    """As layers that ran, and iterations that are done, do; layers and places of the lens count from 0."""
    values = curve(np.linspace(0, 1, LAYERS - 1))
    run = _run(
        tmp_path, "grown", 0, measures=["lens", "loops", "exit"],
        extra={"exit": Result(curves={"exit: accuracy": values}), "loops": Result(curves={"state_norm": values})},
    )  # fmt: skip
    of_task = json.loads((run / DIAGNOSIS).read_text().splitlines()[2]) | {"options": "copy-real, 5 shots, 9 questions"}
    (run / DIAGNOSIS).write_text((run / DIAGNOSIS).read_text() + json.dumps(of_task) + "\n")
    assert _found(run).pictures
    begins = {each.get_xlabel(): each.lines[0].get_xdata()[0] for each in axes if each.lines}
    assert begins == {"layer": 0, "iteration": 1, "layers before the exit": 1}


def test_a_primitive_that_was_asked_in_two_ways_is_two_pictures(tmp_path: Path) -> None:
    """No mean is taken over runs of which one had more solved examples."""
    one = Result(curves={"skip 1: accuracy": curve(np.linspace(0.1, 0.9, LAYERS))})
    runs = [_run(tmp_path, "grown", seed, measures=["skip"], extra={"skip": one}) for seed in range(2)]
    for run, shots in zip(runs, (1, 5), strict=True):
        record = json.loads((run / DIAGNOSIS).read_text().splitlines()[0])
        options = f"copy-real, {shots} shots, 9 questions, version 3"
        (run / DIAGNOSIS).write_text(json.dumps(record | {"options": options}) + "\n")
    found = _found(*runs)
    assert [title for title, *_ in found.pictures] == [
        f"Skip on copy-real, {shots} shots, 9 questions, version 3" for shots in (1, 5)
    ]
    (group,) = found.groups
    assert [len(run) for run in group.runs] == [1, 1]


def test_accuracies_stand_beside_what_they_were_and_beside_chance(axes: list[Any]) -> None:
    """In one scale over all sizes of a block; a single run's line has its standard errors."""
    how = "repeat on copy-real, 5 shots, 9 questions"
    curves = {
        f"repeat 2 +{more}: accuracy": curve(np.array([0.5, 0.4]) / more, np.array([0.1, 0.2])) for more in (1, 2)
    }
    one = Result(curves=curves, numbers={"accuracy": 0.45, "exact_match": 0.3, "chance": 0.1})
    depth_use_plots.interventions_plot([DepthUse(0, "one", ({how: one},), 2)], how, "accuracy")
    assert [[line.get_ydata()[0] for line in panel.lines] for panel in axes] == [[0.5, 0.1, 0.45], [0.25, 0.1, 0.45]]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    (band,) = axes[0].collections
    assert band.get_datalim(axes[0].transData).intervaly == pytest.approx([0.2, 0.6])


def _lines(sizes: list[float]) -> DepthUse:
    contributions = Result(curves={"attention_size": curve(np.array(sizes))})
    return DepthUse(0, "one", ({"contributions": contributions},), 2)


@pytest.mark.parametrize(("first", "scale"), [(7.5, "symlog"), (0.2, "linear")])
def test_a_first_layer_that_does_far_more_does_not_flatten_the_others(
    first: float, scale: str, axes: list[Any]
) -> None:
    depth_use_plots.curves_plot([_lines([first, 0.15, -0.05, 0.1])], depth_use_plots.CONTRIBUTIONS[:1])
    (panel,) = axes
    assert panel.get_yscale() == scale
    low, high = panel.get_ylim()
    assert -0.1 < low < -0.05
    assert first < high < 3 * first


def test_colours_of_effects_end_where_a_layer_changes_as_much_as_another_adds(axes: list[Any]) -> None:
    effects = np.triu(np.full((4, 4), 0.3), 1)
    effects[0, 1:] = 7.0
    result = Result(matrices={"future effect on later layers": effects.tolist()})
    depth_use_plots.matrices_plot([DepthUse(0, "one", ({"effects": result},), 2)], depth_use_plots.EFFECTS)
    assert axes[0].images[0].get_clim() == (0.0, 1.0)


def _attribution(tokens: list[str], answer: str = " Paris", columns: int | None = None, scale: float = 1.0) -> Result:
    """Layers by tokens."""
    width = len(tokens) if columns is None else columns
    scores = scale * np.linspace(-1, 1, LAYERS * width).reshape(LAYERS, width)
    return Result(matrices={"erasure": scores.tolist()}, labels={"tokens": tokens, "answer": [answer]})


def _asked(**prompts: Result) -> DepthUse:
    return DepthUse(0, "grown", ({f"erasure of prompt {name[1:]}": result for name, result in prompts.items()},), 2)


def _names(axes: list[Any]) -> list[str]:
    return [label.get_text() for label in axes[0].get_xticklabels()]


def test_every_prompt_that_was_asked_about_has_its_picture_and_its_answer(tmp_path: Path, axes: list[Any]) -> None:
    extra = {
        f"erasure of prompt {number}": _attribution([" a", "b"] * number, f" answer {number}") for number in (12, 3)
    }
    pictures = _found(_run(tmp_path, "grown", 0, measures=list(extra), extra=extra)).pictures
    assert [title for title, _, _ in pictures] == [
        "What the answer rests on: erasure, prompt 3",
        "What the answer rests on: erasure, prompt 12",
    ]
    assert [re.findall("“(.*)”", note) for _, _, note in pictures] == [["·answer·3"], ["·answer·12"]]
    assert _names(axes) == ["·a", "b"] * 3


def test_tokens_with_odd_characters_are_shown_as_they_can_be(axes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    odd = ["<b>&amp;", "$x$", "\n", "\u202eabc", "\x00", "", " internationalization", "日本"]
    drawn = depth_use_plots.matrices_plot([_asked(p1=_attribution(odd))], _erasure(1))
    shown = ["<b>&amp;", "$x$", "\\n", "\\u202eabc", "\\x00", "(nothing)", "·internat...", "日本"]
    assert _names(axes) == shown
    monkeypatch.undo()
    drawn = depth_use_plots.matrices_plot([_asked(p1=_attribution(odd))], _erasure(1))
    assert drawn is not None
    texts = {element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("text")}
    assert set(shown) <= texts


def _erasure(prompt: int) -> depth_use_plots.Matrix:
    return replace(depth_use_plots.ERASURE, measure=f"erasure of prompt {prompt}")


@pytest.mark.parametrize("tokens", [1, 40, 68, 500])
def test_as_many_tokens_are_named_as_can_be_read(axes: list[Any], tokens: int) -> None:
    """Those of a page's width at most, at equal distances, and none lies upon another."""
    names = [f"t{number}" for number in range(tokens)]
    assert depth_use_plots.matrices_plot([_asked(p1=_attribution(names))] * 2, _erasure(1)) is not None
    figure = axes[0].figure
    figure.draw_without_rendering()
    every = 1 if tokens < 68 else -(-tokens // 67)
    assert _names(axes) == names[::every]
    assert f"one of {every}" in axes[0].get_xlabel() or every == 1
    boxes = [label.get_window_extent() for label in axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert figure.get_size_inches()[0] <= 11.8


def test_names_that_are_not_those_of_the_columns_are_left_out(axes: list[Any]) -> None:
    assert depth_use_plots.matrices_plot([_asked(p1=_attribution(["a", "b"], columns=5))], _erasure(1)) is not None
    assert not {"a", "b"} & set(_names(axes))


def test_runs_have_a_mean_matrix_where_their_tokens_are_the_same() -> None:
    one, other = ({"erasure": _attribution(["a", "b"], scale=scale)} for scale in (1.0, 3.0))
    mean = DepthUse(0, "grown", (one, other), 2).matrix("erasure", "erasure")
    assert mean is not None
    assert mean.tolist() == (2 * np.array(one["erasure"].matrices["erasure"])).tolist()
    apart = {"erasure": _attribution(["a", "c"])}
    assert DepthUse(0, "grown", (one, apart), 2).matrix("erasure", "erasure") is None


# --- results that somebody has edited


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
    plain = Result(by_prompt={"overlap at the last layer": [[30.0, 40.0]] * 12})
    run = _run(tmp_path, "grown", 0, measures=["lens"], extra={"lens": plain})
    line = json.loads((run / DIAGNOSIS).read_text())
    with (run / DIAGNOSIS).open("a") as file:
        file.write(json.dumps(line | {"measure": "skip", "result": result}) + "\n")
    found = _found(run)
    assert not any("<script>" in picture for _, picture, _ in found.pictures)
    json.dumps(found.numbers, allow_nan=False)
    assert "overlap at the last layer" in [row["signature"] for row in found.numbers]


@pytest.mark.parametrize(
    "matrix", [[], [[]], [[1.0], [1.0, 2.0]], [[1.0, 2.0, 3.0]] * 2, [[0.0, 0.0]] * 2, [[1e30] * 2] * 2]
)
@pytest.mark.parametrize(
    "kind", [depth_use_plots.EFFECTS, depth_use_plots.SYMMETRY, depth_use_plots.ERASURE], ids=lambda kind: kind.measure
)
def test_matrices_of_any_shape_are_no_end_of_the_page(kind: depth_use_plots.Matrix, matrix: list[list[float]]) -> None:
    """They have a picture if they are matrices."""
    use = DepthUse(0, "grown", ({kind.measure: Result(matrices={kind.name: matrix})},), 2)
    drawn = depth_use_plots.matrices_plot([use], kind)
    assert (drawn is not None) == (len({len(row) for row in matrix} - {0}) == 1)
