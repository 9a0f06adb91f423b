"""The preset reasoning: its data, what it asks, and a whole small bench of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaloop.bench.contenders import REASONING, contender, total_flops
from megaloop.bench.reasoning import ASKED, HOPS, LadderEvaluation, documents
from megaloop.cli import savings_data
from megaloop.cli.savings import bench_savings
from megaloop.cli.savings_data import PRESETS
from megaloop.config import Config, load_config
from megaloop.data import DataSet
from megaloop.data.induction import p_hop
from megaloop.errors import MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.records import EVALUATION, read_records
from tests.data.targeted import write_targeted
from tests.train.runs import configuration

PRESET = PRESETS / "savings_reasoning.yaml"


def test_every_contender_of_the_preset_is_a_run_and_costs_what_its_depth_says() -> None:
    config = load_config(PRESET)
    made = {name: contender(config, name, 128, seed=1) for name in REASONING}
    share = {name: total_flops(item, 128) / total_flops(made["baseline"], 128) for name, item in made.items()}
    assert {name: str(item.stages[-1].plan.notation) for name, item in made.items()} == {
        "baseline": "8", "baseline-matched": "8", "midas": "8", "lidas": "8", "late-stack": "8", "looped": "1-2x3-1",
        "looped-full": "0-2x4-0", "iso-params": "2", "iso-params-middle": "4", "lidas+loop": "3-2x2-3",
    }  # fmt: skip
    assert share["lidas"] == share["midas"] == pytest.approx(share["baseline-matched"], abs=2e-3)
    assert 0.77 < share["lidas"] < 0.80
    assert share["looped"] == share["looped-full"] == 1
    assert share["late-stack"] < 0.45
    assert share["iso-params"] < 0.29 < share["iso-params-middle"] < 0.53


def test_there_are_as_many_samples_as_the_steps_take() -> None:
    config = load_config(PRESET)
    needed = config.train.steps * config.train.global_batch
    held_out = 0.05
    assert needed < documents(config) * (1 - held_out) - 3 * (documents(config) * held_out) ** 0.5 < 1.02 * needed


def test_runs_are_asked_at_the_end_along_the_way_and_with_every_block_looped() -> None:
    config = load_config(PRESET)
    evaluation = LadderEvaluation((Path("hops"),), 2, Path("asked"))
    end, along, swept = evaluation.commands(contender(config, "baseline", 128))
    assert end == ["--tasks", "validation", "--samples", "2304", "--data", "hops", "--data", "asked"]
    assert along[-3:] == ["--data", "asked", "--every-checkpoint"]
    assert swept[-6:] == ["--data", "asked", "--block", "every:2", "--loops", "1,2,3,4,5"]
    *_, looped = evaluation.commands(contender(config, "looped-full", 128))
    assert looped[-1] == "1,2,3,4,5,6"  # as often as it was trained, and twice more
    *_, own = LadderEvaluation((Path("mine"), Path("other")), 2).commands(contender(config, "baseline", 128))
    assert own[4:8] == ["--data", "mine", "--data", "other"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One contender, tiny, from making the data to the report."""
    out = tmp_path_factory.mktemp("reasoning") / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(savings_data, "_ASKED_DOCUMENTS", 1100)
        patch.setenv("COLUMNS", "160")
        bench_savings(
            ["train.steps=8", "train.global_batch=8", "train.micro_batch=8", "model.hidden_size=16", "model.ffn_size=32",
             "checkpoint.every=4", "checkpoint.keep_every=4", "schedule.warmup_steps=2", "validation.samples=16",
             "growth.warmup_steps=0"],
            preset="reasoning", contenders="lidas", out=out, loops="1,2",
        )  # fmt: skip
    return out


@pytest.mark.slow
def test_a_bench_of_the_preset_trains_asks_and_reports(bench: Path) -> None:
    hops, asked = (DataSet.open(bench / "data" / name) for name in ("hops", "asked"))
    assert hops.tokenizer_sha256 == asked.tokenizer_sha256
    _are_hops(hops, HOPS, doubled=True)
    _are_hops(asked, ASKED, doubled=False)
    assert asked.description.targets is not None
    assert [entry.difficulty for entry in asked.description.targets.floors] == list(ASKED)

    records = list(read_records(bench / "runs" / "lidas-seed0" / EVALUATION).values())
    by_difficulty = [record for record in records if record.subject.difficulty is not None]
    last = [r for r in by_difficulty if r.subject.step == 8 and r.subject.data == str(asked.path)]
    assert {r.subject.difficulty for r in last if r.subject.block is None} == set(ASKED)
    assert {r.subject.block for r in last} == {None, *(f"{start}:{start + 2}" for start in range(7))}
    assert {r.subject.step for r in by_difficulty} == {4, 8}
    assert all(0 < r.values["floor"] < 1 for r in last)

    page = (bench / "report.html").read_text(encoding="utf-8")
    assert "Reasoning by difficulty" in page
    assert "hops, as asked asks it" in page


def _are_hops(dataset: DataSet, difficulties: tuple[int, ...], *, doubled: bool) -> None:
    """Targets are p-hops, found by walking; of doubled letters there are some, or none."""
    seen, doubles = set(), 0
    words = {number: word for word, number in dataset.open_tokenizer().vocabulary().items()}
    split = dataset.split("validation")
    for index in range(min(len(split), 60)):
        sample = split.sample(index)
        assert sample.targets is not None
        hops, *letters = (words[token] for token in sample.tokens[:-1].tolist())
        seen.add(int(hops))
        for place in range(len(letters)):
            target = int(sample.targets[place + 1])
            is_doubled = place > 0 and letters[place] == letters[place - 1]
            doubles += is_doubled and target >= 0
            expected = p_hop(letters[: place + 1], int(hops)) if doubled or not is_doubled else None
            assert (words[target] if target >= 0 else None) == expected
    assert seen <= set(difficulties)
    assert len(seen) > 5
    assert (doubles > 0) is doubled


@pytest.mark.slow
def test_the_numbers_of_the_report_are_there_for_scripts(bench: Path) -> None:
    from tests.cli.test_cli import megaloop

    made = megaloop("report", bench / "runs" / "lidas-seed0", "--out", bench / "again.html", "--json")
    assert made.returncode == 0, made.stderr
    report: dict[str, Any] = json.loads(made.stdout)
    assert {entry["difficulty"] for entry in report["difficulties"]} == set(ASKED)
    assert len(report["block_loops"]) > 0


@pytest.mark.slow
def test_a_model_of_words_is_asked_no_primitives_and_says_so(bench: Path) -> None:
    notes: list[str] = []
    records = evaluate(bench / "runs" / "lidas-seed0", samples=8, on_note=notes.append)
    assert [note[:15] for note in notes] == ["no primitives: "]
    assert {record.subject.task for record in records} == {"validation", "difficulty"}
    with pytest.raises(MegaloopError, match="cannot encode"):
        evaluate(bench / "runs" / "lidas-seed0", tasks=["copy-real"])


def test_data_with_targets_of_ones_own_is_asked_by_difficulty(corpus: Path, tmp_path: Path) -> None:
    targeted = write_targeted(tmp_path, corpus, 120)
    config = Config.model_validate(
        configuration(targeted, tmp_path / "run", growth={"block": 2, "start": 2}, depth="4")
    )
    evaluation = savings_data.evaluation_of("mine.yaml", config, tmp_path, None, None, "1,3")
    assert evaluation == LadderEvaluation((targeted,), 2, None, loops=(1, 3))
    for options, message in (
        ({"examples": 5, "shots": None}, "--examples is for"),
        ({"examples": None, "shots": "5"}, "--shots"),
    ):
        with pytest.raises(MegaloopError, match=message):
            savings_data.evaluation_of("mine.yaml", config, tmp_path, loops=None, **options)


def test_samples_of_a_bench_that_ended_before_it_trained_are_made_for_the_options_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too few of them, more steps would train on the same samples again, and nobody would know."""
    monkeypatch.setattr(savings_data, "_ASKED_DOCUMENTS", 1100)
    few, many = (savings_data.configuration("reasoning", tmp_path, None, [f"train.steps={n}"]) for n in (60, 80))
    savings_data.prepare_data("reasoning", few, tmp_path, [])
    assert len(DataSet.open(tmp_path / "hops").split("train")) < 80 * 32
    asked = (tmp_path / "asked" / "data.json").stat().st_mtime_ns
    savings_data.prepare_data("reasoning", many, tmp_path, [], begun=True)
    assert len(DataSet.open(tmp_path / "hops").split("train")) < 80 * 32, "runs rest on it"
    savings_data.prepare_data("reasoning", many, tmp_path, [])
    assert len(DataSet.open(tmp_path / "hops").split("train")) >= 80 * 32
    assert (tmp_path / "asked" / "data.json").stat().st_mtime_ns == asked, "what fits is kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["data.sequence_length=23"],
            "data.sequence_length 23 is too short for the 10 hops that the preset asks; use 42 or more",
        ),
        (["train.steps=10"], "schedule.warmup_steps 50 is more than train.steps 10"),
        (["growth.start=3"], "8 layers cannot be reached"),
    ],
)
def test_what_does_not_fit_is_said_before_data_is_made(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match=message):
        bench_savings(options, preset="reasoning", contenders="late-stack", out=tmp_path / "bench")
    assert not (tmp_path / "bench" / "data").exists()
