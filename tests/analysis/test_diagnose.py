"""``megaloop diagnose``: what is measured, remembered, shared over ranks, printed, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaloop.analysis.diagnose import MEASURES
from megaloop.analysis.interventions import Intervention
from megaloop.analysis.measures import Subject
from megaloop.analysis.request import PromptSource, TaskSource
from megaloop.analysis.results import DIAGNOSIS, DiagnosisRecord, read_results
from megaloop.checkpoint.depth import loop_checkpoint
from megaloop.data import DataSet
from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.huggingface.weights import export_huggingface
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import Block
from tests.analysis.diagnosing import diagnose
from tests.cli.test_cli import megaloop
from tests.data.targeted import write_targeted
from tests.distributed import RankPool
from tests.train.runs import configuration, train

COUNT = 24


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ranks_1: RankPool) -> Path:
    """A run of 6 layers on samples of three difficulties."""
    folder = tmp_path_factory.mktemp("diagnose")
    data = write_targeted(folder, corpus)
    ranks_1.run(train, configuration(data, folder / "run", depth="6", validation={"every": 0, "samples": 8}))
    return folder / "run"


@pytest.fixture(scope="module")
def records(run: Path) -> dict[str, DiagnosisRecord]:
    """All measures of the run, block 2."""
    found = diagnose(run, block=2, prompts=PromptSource(count=COUNT))
    return {record.examination.measure: record for record in found}


def test_all_measures_that_a_model_allows_are_taken(records: dict[str, DiagnosisRecord]) -> None:
    assert list(records) == [*(name for name in MEASURES if name != "loops"), "signatures"]
    for name, record in records.items():
        for title, one in record.result.curves.items():
            assert one.values, (name, title)
            assert None not in one.values, (name, title)
    assert len(records["contributions"].result.curves["attention_size"].values) == 6
    assert len(records["lens"].result.curves["kl"].values) == 7
    assert records["lens"].result.curves["kl"].values[-1] == 0.0
    assert records["lens"].result.curves["overlap"].values[-1] == 1.0
    assert np.shape(records["effects"].result.matrices["future effect on later layers"]) == (6, 6)
    assert [len(records["swap"].result.curves[f"swap {n}: loss"].values) for n in (1, 2)] == [5, 3]


def test_they_are_remembered(run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path) -> None:
    """In a file that a reader gets the same from; another seed, block or number of prompts is another examination."""
    remembered = read_results(run / DIAGNOSIS)
    expected = {key.examination: key for name, key in records.items() if name != "signatures"}
    assert remembered == expected
    again = diagnose(run, block=2, prompts=PromptSource(count=COUNT))
    assert {record.examination.measure: record.time for record in again if record.examination.measure != "signatures"} == {
        name: record.time for name, record in records.items() if name != "signatures"
    }  # fmt: skip
    other = tmp_path / "other.jsonl"
    shutil.copy(run / DIAGNOSIS, other)
    diagnose(run, measures=["contributions"], block=3, prompts=PromptSource(count=COUNT), out=other)
    assert len(read_results(other)) == len(remembered) + 1


def test_a_line_that_is_cut_off_or_damaged_is_measured_anew(
    run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path
) -> None:
    file = tmp_path / "cut.jsonl"
    lines = (run / DIAGNOSIS).read_bytes().splitlines(keepends=True)
    damaged = json.loads(lines[0])
    damaged["result"]["curves"] = {"attention_size": "nonsense"}
    file.write_bytes(json.dumps(damaged).encode() + b"\n" + lines[1] + lines[2][: len(lines[2]) // 2])
    assert len(read_results(file)) == 1
    diagnose(run, measures=["contributions", "depth-score"], block=2, prompts=PromptSource(count=COUNT), out=file)
    assert len(read_results(file)) == 3


def test_the_loss_without_intervention_is_that_of_eval(
    run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path
) -> None:
    (held_out, *_) = evaluate(run, tasks=["validation"], samples=COUNT, out=tmp_path / "eval.jsonl")
    for kind in ("skip", "swap", "repeat"):
        numbers = records[kind].result.numbers
        assert numbers["loss"] == pytest.approx(held_out.values["loss"], rel=2e-6)
        assert numbers["accuracy"] == held_out.values["accuracy"]


def test_a_block_run_once_more_is_a_loop_of_two_of_eval(
    run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path
) -> None:
    """And the prefix that is not computed again changes nothing."""
    swept = records["repeat"].result
    for start in range(5):
        looped = evaluate(run, tasks=["validation"], samples=COUNT, loops=[2], blocks=[Block(start, start + 2)], out=tmp_path / "e.jsonl")  # fmt: skip
        found = (swept.curves["repeat 2 +1: loss"].values[start] or 0.0) + (swept.numbers["loss"] or 0.0)
        assert found == pytest.approx(looped[0].values["loss"], rel=2e-5)  # of six digits, measured 4e-6


def test_an_early_exit_is_the_lens_at_its_layer(records: dict[str, DiagnosisRecord]) -> None:
    exits, lens = records["exit"].result, records["lens"].result
    base = exits.numbers["loss"] or 0.0
    for layers in range(1, 6):
        value = exits.curves["exit: loss"].values[layers - 1]
        assert (value or 0.0) + base == pytest.approx(lens.curves["loss"].values[layers], rel=2e-5)


def test_two_ranks_find_what_one_does(run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path) -> None:
    shared = tmp_path / "shared.jsonl"
    result = megaloop("diagnose", run, "--measures", "contributions,skip", "--count", COUNT, "--block", 2, "--ranks", 2, "--out", shared, "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    ((model,), found) = json.loads(result.stdout)["models"], read_results(shared)
    assert model["model"] == str(run)
    assert {key.measure for key in found} == {"contributions", "skip"}
    for key, record in found.items():
        assert record.result.curves == records[key.measure].result.curves


def test_the_prompts_of_a_default_diagnosis_are_enough_for_four_ranks(run: Path, tmp_path: Path) -> None:
    """Batches are what ranks share: one of them would leave all the others idle."""
    told: dict[str, int] = {}
    file = tmp_path / "prompts.jsonl"
    file.write_text((json.dumps({"text": "of the " * 128}) + "\n") * 16)
    measures = ["contributions", "lens", "exit"]
    diagnose(
        run, lambda what, done, total: told.update({what: total}),
        measures=measures, prompts=PromptSource(file), out=tmp_path / "d.jsonl",
    )  # fmt: skip
    assert told == {"contributions": 4, "logit lens": 4, "exit": 4}


def test_primitives_score_interventions_too(run: Path, tmp_path: Path) -> None:
    """As eval does where a block is looped."""
    tasks = TaskSource(["copy-real"], shots=1, examples=40)
    found = diagnose(
        run, measures=["repeat"], block=2, tasks=tasks, prompts=PromptSource(count=4), out=tmp_path / "d.jsonl"
    )
    (of_task,) = [record.result for record in found if record.examination.options]
    evaluated = evaluate(run, tasks=["copy-real"], shots=[1], examples=40, seed=123, loops=[3], blocks=[Block(1, 3)], out=tmp_path / "e.jsonl")  # fmt: skip
    assert of_task.curves["repeat 2 +2: accuracy"].values[1] == evaluated[0].values["accuracy"]


def test_primitives_score_interventions_in_a_loop(run: Path, tmp_path: Path) -> None:
    """A whole time of it once more is what eval makes of more loops; parts of it, skipped or exchanged, are scored as well."""
    looped, tasks = tmp_path / "looped", TaskSource(["variables-0-math"], shots=1, examples=60)
    loop_checkpoint(run, looped, DepthSpec.parse("2-2x2-2"))
    told: list[tuple[str, int, int]] = []
    found = diagnose(
        looped, lambda *part: told.append(part),
        measures=["skip", "swap", "repeat"], block=2, tasks=tasks, prompts=PromptSource(count=4), out=tmp_path / "d.jsonl",
    )  # fmt: skip
    of_task = {one.examination.measure: one.result for one in found if one.examination.options}
    assert list(of_task) == ["skip", "swap", "repeat"]
    evaluated = evaluate(looped, tasks=["variables-0-math"], shots=[1], examples=60, seed=123, loops=[2, 3, 4], out=tmp_path / "e.jsonl")  # fmt: skip
    assert of_task["repeat"].numbers["accuracy"] == evaluated[0].values["accuracy"]
    for more, record in enumerate(evaluated[1:], start=1):
        assert of_task["repeat"].curves[f"repeat 2 +{more}: accuracy"].values[2] == record.values["accuracy"]
    parts = [(done, total) for what, done, total in told if what == "skip, variables-0-math"]
    total = parts[-1][1]  # two blocks of questions in many orders
    assert total % 2 == 0
    assert list(dict.fromkeys(parts)) == [(done, total) for done in range(total + 1)]


def test_prompts_are_attributed_one_by_one(run: Path, tmp_path: Path) -> None:
    """By layer and token, with the tokens as text, a record for each; the progress says which is under way."""
    told: dict[str, None] = {}
    prompts = PromptSource(count=4)
    *found, _ = diagnose(
        run, lambda what, done, total: told.update({what: None}),
        measures=["erasure", "gradients"], attributed=[3, 1, 3], prompts=prompts, out=tmp_path / "d.jsonl",
    )  # fmt: skip
    asked = [(record.examination.measure, record.examination.options) for record in found]
    assert asked == [(name, f"prompt {number}") for name in ("erasure", "gradients") for number in (3, 1)]
    assert [what for what in told if "erasure" in what or "gradients" in what] == [", ".join(one) for one in asked]
    for record in found:
        (matrix,) = record.result.matrices.values()
        assert np.shape(matrix) == (6, len(record.result.labels["tokens"]))
        assert 0 < (record.result.numbers["probability"] or 0) < 1
    assert found[0].result.labels != found[1].result.labels
    gap = found[2].result.numbers["largest gap of completeness"]
    assert gap is not None
    assert gap < 1e-5


def test_a_loop_is_watched_and_a_lens_is_tuned(run: Path, tmp_path: Path) -> None:
    loop_checkpoint(run, tmp_path / "run" / "checkpoints" / "step-00000020", DepthSpec.parse("2-2x3-2"))
    found = diagnose(
        tmp_path / "run", measures=["loops", "tuned-lens", "lens"], prompts=PromptSource(count=8), lens_steps=20
    )
    by_name = {record.examination.measure: record.result for record in found}
    assert len(by_name["loops"].curves["state_norm"].values) == 6  # up to twice as many as in training
    kept = tmp_path / "run" / "lenses" / "step-00000020.safetensors"
    assert kept.is_file()
    manifest = load_decoder(run)[1].manifest
    sha256 = DataSet.open(manifest.data.paths[0]).sha256("train")
    (options,) = [record.examination.options for record in found if record.examination.measure == "tuned-lens"]
    assert re.fullmatch(rf"20 steps on \d+ samples of 32 tokens of data {sha256[:12]}, seed 0", options)
    plain, tuned = (by_name[name].curves["kl"].values for name in ("lens", "tuned-lens"))
    assert sum(tuned) < sum(plain)  # type: ignore[arg-type]
    assert tuned[-1] == plain[-1] == 0.0


def test_a_hugging_face_directory_and_a_run_stand_side_by_side(
    run: Path, records: dict[str, DiagnosisRecord], tmp_path: Path
) -> None:
    export_huggingface(run, tmp_path / "llama", dtype="fp32")
    (data,) = load_decoder(run)[1].manifest.data.paths
    arguments = ("--measures", "contributions,skip", "--count", COUNT, "--block", 2, "--prompts", data)
    result = megaloop("diagnose", run, tmp_path / "llama", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    ours, theirs = json.loads(result.stdout)["models"]
    assert [record["result"] for record in ours["records"]] == [record["result"] for record in theirs["records"]]
    shown = megaloop("diagnose", run, tmp_path / "llama", *arguments)
    assert "late layers indispensable" in shown.stdout
    assert "megaloop-diagnose" not in result.stdout + result.stderr + shown.stdout + shown.stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "llama"]


def test_prompts_may_be_lines_of_jsonl(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    (data,) = load_decoder(run)[1].manifest.data.paths
    lines = (data.parent / "lines.jsonl").read_text().splitlines()[:COUNT]
    file.write_text("".join(line + "\n" for line in lines))
    found = diagnose(run, measures=["skip"], block=2, prompts=PromptSource(file, 10), out=tmp_path / "d.jsonl")
    assert found[0].examination.count == 10


def test_interventions_have_a_name_for_their_curve() -> None:
    named = [
        Intervention("swap", 3, 2),
        Intervention("repeat", 1, 4, 2),
        Intervention("exit", 5),
        Intervention("skip", 0),
    ]
    assert [one.curve for one in named] == ["swap 2", "repeat 4 +2", "exit", "skip 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["depth"]}, "--measures: depth is none of contributions, effects"),
        (
            {"measures": ["erasure"], "attributed": [1, 65], "prompts": PromptSource(count=4)},
            "--prompt 65: there are 4 prompts; choose 1 to 4",
        ),
        ({"block": 7}, "--block 7: the model executes 6 layers; choose 1 to 6"),
        ({"measures": ["loops"]}, "has no loop"),
        ({"measures": ["symmetry"], "block": 4}, "at least two must fit"),
        ({"tasks": TaskSource(["copying"])}, "^--tasks: unknown task 'copying'; choose from"),
        ({"prompts": PromptSource(Path("/nowhere.jsonl"))}, "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(
    run: Path, options: dict[str, Any], message: str, tmp_path: Path, unloaded: None
) -> None:
    with pytest.raises(MegaloopError, match=message):
        diagnose(run, out=tmp_path / "d.jsonl", **options)


@pytest.mark.parametrize(
    ("line", "measure", "message"),
    [
        ('{"text": "of the"}', "depth-score", "prompt 1 of .* has . tokens; at least 13 are needed"),
        ('{"text": "of the"}', "effects", "prompt 1 of .* has . tokens; at least 13 are needed"),
        ('{"words": "of the"}', "lens", "line 1: no text in field 'text'"),
        ("", "lens", "no line with a prompt"),
        ("{", "lens", "line 1: not JSON"),
        ('{"tokens": [5, 6], "targets": [5]}', "lens", "line 1: .*two lists of one length"),
    ],
)
def test_prompts_that_are_none_are_named(
    run: Path, line: str, measure: str, message: str, tmp_path: Path, unloaded: None
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(MegaloopError, match=message):
        diagnose(run, measures=[measure], prompts=PromptSource(file), out=tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()


def test_a_prompt_that_is_too_short_has_its_number_in_the_file(run: Path, tmp_path: Path) -> None:
    """Of 25 easy prompts 20 are scored; the hard one is the 26th all the same."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"text": "of the " * 20, "difficulty": 1}] * 25 + [{"text": "of the", "difficulty": 2}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MegaloopError, match=r"depth-score: prompt 26 of .* has . tokens; at least 13 are needed"):
        diagnose(run, measures=["depth-score"], prompts=PromptSource(file, count=64), out=tmp_path / "d.jsonl")


def test_results_that_cannot_be_kept_are_not_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "collect", lambda *_: pytest.fail("measured"))
    nowhere = Path("/proc/nowhere/d.jsonl")  # where not even root may make a directory
    with pytest.raises(MegaloopError, match=r"cannot write /proc/nowhere/d.jsonl \(.*\); name another file with --out"):
        diagnose(run, measures=["contributions"], prompts=PromptSource(count=4), out=nowhere)


def test_results_are_not_added_to_the_prompts(run: Path, tmp_path: Path) -> None:
    """Nor to any other file of something else; one that a kill has left with a line's beginning is no such file."""
    file = tmp_path / "prompts.jsonl"
    asked: dict[str, Any] = {"measures": ["contributions"], "prompts": PromptSource(count=4)}
    file.write_text('{"text": "of the"}\n')
    with pytest.raises(
        MegaloopError, match=r"prompts.jsonl has no results of diagnose, but 1 other lines; name another"
    ):
        diagnose(run, out=file, **asked)
    assert file.read_text() == '{"text": "of the"}\n'
    for begun in ("", '{"measure": "contrib'):
        file.write_text(begun)
        diagnose(run, out=file, **asked)
        assert len(read_results(file)) == 1


def test_prompts_are_numbered_in_a_list_or_one_by_one(run: Path) -> None:
    result = megaloop("diagnose", run, "--measures", "erasure", "--count", 4, "--prompt", 2, "--prompt", "1,9")
    assert result.returncode == 2
    assert "--prompt 9: there are 4 prompts; choose 1 to 4" in result.stderr


@pytest.mark.parametrize("option", ["--measures", "--tasks"])
def test_a_list_that_names_nothing_is_a_mistake(run: Path, option: str) -> None:
    """As an empty variable of the shell makes it; it would be taken for the default."""
    result = megaloop("diagnose", run, option, "")
    assert result.returncode == 2
    assert f"{option}: names nothing" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_mistake_ends_the_command_with_exit_code_2(run: Path) -> None:
    result = megaloop("diagnose", run, "--measures", "deepness")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
