"""Reasoning by difficulty: which records count as what, levels by hand, and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import pytest
from scipy import stats

from megaloop.cli.report import print_report
from megaloop.cli.report import report as command
from megaloop.config import ModelConfig
from megaloop.depth import DepthSpec
from megaloop.depth.flops import flops_per_token
from megaloop.errors import MegaloopError
from megaloop.report.difficulty import LAST, Board, Loop, boards
from megaloop.report.page import make_report, write_report
from megaloop.report.read import read_run
from megaloop.report.savings import group_runs
from tests.report.rundirs import (
    BEYOND,
    CONTENDERS,
    EVALUATED,
    FURTHER,
    HOPS,
    TRAINED,
    evaluated,
    graded,
    write_contender,
    write_run,
)

ON_HOPS = {"sources": [{"path": HOPS}], "sequence_length": 64}
FIELDS = ("difficulties", "trade_offs", "over_flops", "block_loops", "claims")


def _boards(*runs: Path) -> list[Board]:
    return boards(group_runs([read_run(run) for run in runs]))


def _plain(page: str) -> str:
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All contenders, three seeds."""
    folder = tmp_path_factory.mktemp("reasoning") / "runs"
    return [write_contender(folder, name, seed) for seed in range(3) for name in CONTENDERS]


# --- which records count as what


def test_a_data_set_that_was_not_trained_on_lies_beyond_training(tmp_path: Path) -> None:
    """However the two paths are written; what training had anyway does not lie beyond it."""
    run = write_run(tmp_path / "r", "r", data=ON_HOPS)
    for difficulty in (8, 1):
        graded(run, difficulty, 0.9, data=str(Path(HOPS).absolute()))
    for difficulty in (8, 16, 12):
        graded(run, difficulty, 0.6, data=f"data/../{BEYOND}")
    (board,) = _boards(run)
    assert board.ladder.name == "hops"
    assert [rung.difficulty for rung in board.ladder.trained] == [1, 8]
    assert [rung.difficulty for rung in board.ladder.beyond] == [12, 16]
    assert [rung.difficulty for rung in board.ladder.hardest] == [8]
    assert board.ladder.ends == 10.0
    assert board.level(board.groups[0], board.ladder.hardest).mean == 0.9  # type: ignore[union-attr]


def test_each_task_has_a_ladder_of_its_own(tmp_path: Path) -> None:
    data = {"sources": [{"path": HOPS}, {"path": "data/addition"}, {"path": "data/text"}], "sequence_length": 64}
    run = write_run(tmp_path / "r", "r", data=data)
    for name in ("hops", "hops-beyond", "addition", "addition-beyond"):
        graded(run, 16 if "beyond" in name else 2, 0.9, data=f"data/{name}")
    found = [board.ladder for board in _boards(run)]
    assert [ladder.name for ladder in found] == ["hops", "addition"]
    assert [Path(ladder.beyond[0].data).name for ladder in found] == ["hops-beyond", "addition-beyond"]
    page = make_report([run])[1]
    assert "<h3>hops</h3>" in page
    assert "<h3>addition</h3>" in page


def test_difficulties_of_data_that_no_run_was_trained_on_are_shown_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r")
    graded(run, 3, 0.7)
    (board,) = _boards(run)
    assert board.ladder.hardest == ()
    assert board.ladder.ends is None
    report, page = make_report([run])
    assert len(report.difficulties) == 1
    assert report.claims == []
    assert "What it takes" not in page


def test_runs_without_difficulties_have_the_page_that_they_had(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r")
    evaluated(run, "p-hop", 0.3)
    report, page = make_report([run])
    assert "Reasoning by difficulty" not in page
    assert "Learning rates" not in page
    assert all(getattr(report, name) == [] for name in (*FIELDS, "learning_rates"))


def test_difficulties_are_no_held_out_loss_and_leave_other_evaluations_alone(tmp_path: Path) -> None:
    """They have a loss, too, and may be of a later step."""
    run = write_run(tmp_path / "r", "r", data=ON_HOPS)
    for loops in (1, 2):
        evaluated(run, "validation", 2.0, loops=loops)
        evaluated(run, "p-hop", 0.3, loops=loops)
    before = make_report([run])[0]
    graded(run, 1, 0.9, step=120)
    after = make_report([run])[0]
    assert after.loops == before.loops
    assert [list(entry["held_out"]) for entry in after.loops] == [["data/text"]] * 2


def test_a_loop_that_was_trained_is_no_loop_at_inference(tmp_path: Path) -> None:
    """Of a run that loops from step 60 on; before, it ran every layer once."""
    run = write_run(tmp_path / "r", "r", data=ON_HOPS, executed=10, grown_at=60)
    graded(run, 8, 0.5, step=40, depth="4")
    graded(run, 8, 0.8, depth="3-2x2-3", loops=2, block="3:5")
    graded(run, 8, 0.1, depth="3-2x1-3", loops=1, block="3:5")
    graded(run, 8, 0.2, depth="3-2x3-3", loops=3, block="3:5")
    (board,) = _boards(run)
    (group,) = board.groups
    assert [(step, level.mean) for step, _, level in board.over_flops(group, board.ladder.hardest)] == [
        (40, 0.5),
        (100, 0.8),
    ]
    assert board.loops(group) == []  # its own block alone: nothing to draw over starts


def test_blocks_of_the_most_frequent_size_are_shown_at_the_newest_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r", data=ON_HOPS)
    graded(run, 8, 0.8)
    for start in (0, 3):
        graded(run, 8, 0.7 + start / 100, loops=2, depth=f"{start}-2x2-{6 - start}", block=f"{start}:{start + 2}")
        graded(run, 8, 0.1, loops=2, depth=f"{start}-2x2-{6 - start}", block=f"{start}:{start + 2}", step=40)
    for block, loops in (("2:6", 2), ("5:5", 2), ("x:7", 2), ("3:9999999999999999999", 2)):
        graded(run, 8, 0.9, loops=loops, depth="2-4x2-2", block=block)
    (board,) = _boards(run)
    (group,) = board.groups
    assert board.loops(group) == [Loop(1, 0, 2), Loop(1, 3, 5)]
    assert board.gains(group, board.ladder.hardest) == {
        0: {Loop(1, 0, 2): pytest.approx(-0.1), Loop(1, 3, 5): pytest.approx(-0.07)}
    }


def test_loops_are_compared_on_the_samples_that_they_were_asked_with(tmp_path: Path) -> None:
    """They are asked with fewer; what the model scores on all is another number."""
    runs = [write_run(tmp_path / f"r-seed{seed}", f"r-seed{seed}", seed=seed, data=ON_HOPS) for seed in (0, 1)]
    for run, few in zip(runs, (0.6, 0.8), strict=True):
        graded(run, 8, 0.9, examples=256)
        graded(run, 8, few, examples=16)
        for start in (0, 3):
            graded(run, 8, 0.5, examples=16, loops=2, depth=f"{start}-2x2-{6 - start}", block=f"{start}:{start + 2}")
    (board,) = _boards(*runs)
    (group,) = board.groups
    level, beside = board.level(group, board.ladder.hardest), board.beside_loops(group, board.ladder.hardest)
    assert level is not None
    assert beside is not None
    assert (level.mean, beside.mean) == pytest.approx((0.9, 0.7))
    assert board.gains(group, board.ladder.hardest)[1] == {
        Loop(1, 0, 2): pytest.approx(-0.3),
        Loop(1, 3, 5): pytest.approx(-0.3),
    }


# --- levels


def test_levels_are_means_over_seeds_with_students_interval(tmp_path: Path) -> None:
    values = {0: (0.9, 0.5), 1: (0.8, 0.6), 2: (1.0, 0.4)}
    made = []
    for seed, (easy, hard) in values.items():
        made.append(write_run(tmp_path / f"r-seed{seed}", f"r-seed{seed}", seed=seed, data=ON_HOPS))
        graded(made[-1], 1, easy)
        graded(made[-1], 8, hard, last=hard - 0.1)
    (board,) = _boards(*made)
    (group,) = board.groups
    level = board.level(group, board.ladder.hardest)
    assert level is not None
    assert level.mean == pytest.approx(0.5)
    assert level.margin == pytest.approx(float(stats.t.ppf(0.975, 2)) * 0.1 / math.sqrt(3))
    mean, last = board.level(group, board.ladder.trained), board.level(group, board.ladder.hardest, LAST)
    assert mean is not None
    assert last is not None
    assert [mean.mean, last.mean] == pytest.approx([0.7, 0.4])
    assert mean.margin == pytest.approx(0, abs=1e-9)  # every seed's mean is 0.7


def test_of_one_seed_the_error_is_that_of_its_examples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", "r", data=ON_HOPS)
    graded(run, 1, 0.9, error=0.03)
    graded(run, 8, 0.5, error=0.04)
    (board,) = _boards(run)
    level = board.level(board.groups[0], board.ladder.trained)
    assert level is not None
    assert level.over_seeds.low is None
    assert level.margin == pytest.approx(0.025)
    graded(run, 9, 0.5, error=None)
    (board,) = _boards(run)
    unknown = board.level(board.groups[0], board.ladder.trained)
    assert unknown is not None
    assert unknown.margin is None


def test_a_mean_is_of_runs_that_have_all_its_difficulties(tmp_path: Path) -> None:
    whole, part = (write_run(tmp_path / f"r-seed{seed}", f"r-seed{seed}", seed=seed, data=ON_HOPS) for seed in range(2))
    for run, difficulties in ((whole, (1, 8)), (part, (1,))):
        for difficulty in difficulties:
            graded(run, difficulty, 0.8)
    (board,) = _boards(whole, part)
    (group,) = board.groups
    counts = [board.level(group, rungs) for rungs in (board.ladder.trained[:1], board.ladder.trained)]
    assert [level.over_seeds.count for level in counts if level is not None] == [2, 1]


def test_floors_and_flops_are_the_accountants(runs: list[Path]) -> None:
    (board,) = _boards(*runs)
    model = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=128)
    for group in board.groups:
        plan = DepthSpec.parse(CONTENDERS[group.label].depth).plan
        assert board.inference_flops(group) == flops_per_token(plan, model, 64, vocab_size=100).forward
    assert [board.floor(rung) for rung in board.ladder.rungs] == [0.42, 0.5, 0.5, 0.5, 0.55, 0.55, 0.55, 0.55]
    lidas = next(group for group in board.groups if group.label == "lidas")
    spent = [(step, flops) for step, flops, _ in board.over_flops(lidas, board.ladder.hardest)]
    assert spent == [(40, 20e12), (80, (22 + 36) * 1e12), (100, (22 + 56) * 1e12)]


# --- the page


def test_the_page_has_every_part(runs: list[Path], tmp_path: Path) -> None:
    report = write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = page.partition('<section id="reasoning">')[2].partition("</section>")[0]
    assert section.count("<svg") == 2 + 1 + 1 + 2  # two by difficulty, what it takes, over training, two of loops
    assert page.index('id="savings"') < page.index('id="reasoning"') < page.index('id="primitives"')
    assert "Holm’s procedure" in section  # noqa: RUF001
    assert "<b>" not in section
    assert "nan" not in _plain(section).lower()
    assert "those by difficulty</a> stand above" in page
    assert len(report.claims) == 14
    assert len(report.difficulties) == len(CONTENDERS) * (len(TRAINED) + len(FURTHER))
    assert [entry["trained"] for entry in report.difficulties[:8]] == [True] * 5 + [False] * 3
    assert len(report.over_flops) == len(CONTENDERS) * len(EVALUATED) - 1  # baseline-matched ends before the last
    assert {entry["group"] for entry in report.block_loops} == {"baseline", "midas", "lidas"}
    assert {(entry["block"], entry["extra_times"]) for entry in report.block_loops} == {
        (f"{start}:{start + 2}", extra) for start in range(7) for extra in range(1, 5)
    }
    assert all(entry["hardest"]["low"] < entry["hardest"]["value"] for entry in report.trade_offs)
    assert re.search(r"Of 14 claims about reasoning by difficulty, \d+ (is|are) seen", report.summary[-1])
    json.dumps(dataclasses.asdict(report), allow_nan=False)


def test_one_seed_of_three_contenders_has_a_page(tmp_path: Path) -> None:
    """What make demo-reasoning ends in."""
    three = [write_contender(tmp_path, name, 0, looped_too=False) for name in ("baseline", "iso-params", "looped-full")]
    report, page = make_report(three)
    assert [claim["verdict"] for claim in report.claims] == ["unclear (one seed)"] * 3
    assert all(claim["low"] is None and claim["p_holm"] is None for claim in report.claims)
    assert "No claim can be tested on one seed." in page
    assert page.partition('<section id="reasoning">')[2].partition("</section>")[0].count("<svg") == 4


def test_names_and_paths_are_escaped(tmp_path: Path) -> None:
    name, path = "<script>$x^$_&\"'", "data/<img src=x onerror=alert(1)>\x00\x1b"
    hostile = [write_run(tmp_path / "r", name, data={"sources": [{"path": "data/<b>"}], "sequence_length": 64})]
    graded(hostile[0], 8, 0.9, data="data/<b>")
    graded(hostile[0], 9, 0.9, data=path)
    for start in (0, 1):
        graded(hostile[0], 8, 0.9, data="data/<b>", loops=2, depth=f"{start}-2x2-4", block=f"{start}:{start + 2}")
    sweep = {"rates": {"0.001": 2.0}, "chosen": 0.001, "edge": True, "tie": False}
    (tmp_path / "lr_sweep.json").write_text(json.dumps({"<script>alert(2)\x1b": sweep}))
    report, page = make_report(hostile, lr_sweep=tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;$x^$_" in page
    assert "\x1b" not in json.dumps(dataclasses.asdict(report))


def test_what_was_tampered_with_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any two values of any line may have become any other."""
    chance = random.Random(0)
    made: list[Path] = []
    for wrong in (None, -1, 10**29, "0:1", [[1]], "8-8x99999999-1"):
        run = write_run(tmp_path / str(len(made)), f"r{len(made)}", data=ON_HOPS, depth=str(8 + len(made)))
        for difficulty, data in ((8, HOPS), (16, BEYOND)):
            for step in (40, 100):
                graded(run, difficulty, 0.8, data=data, step=step)
            for start in range(3):
                graded(run, difficulty, 0.8, data=data, loops=2, depth=f"{start}-2x2-4", block=f"{start}:{start + 2}")
        lines = (run / "evaluation.jsonl").read_text().splitlines()
        changed = [
            json.dumps(record | dict.fromkeys(chance.sample(sorted(record), 2), wrong))
            for record in map(json.loads, lines * 3)
        ]
        (run / "evaluation.jsonl").write_text("\n".join([*changed, lines[0]]))
        made.append(run)
    report, _ = make_report(made)
    json.dumps(dataclasses.asdict(report), allow_nan=False)
    print_report(report, None, as_json=False)
    assert "\x1b" not in capsys.readouterr().out


# --- learning rates


def test_the_page_shows_all_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the runs of a bench, the command finds it by itself."""
    run = write_run(tmp_path / "runs" / "baseline-seed0", "baseline-seed0")
    sweep = {
        "baseline": {"rates": {"0.004": None, "0.001": 2.3141, "0.002": 2.25}, "chosen": 0.002, "edge": False, "tie": False},
        "lidas": {"rates": {"0.001": 2.1, "0.008": 2.2}, "chosen": 0.001, "edge": True, "tie": False},
    }  # fmt: skip
    (tmp_path / "lr_sweep.json").write_text(json.dumps(sweep))
    report, page = make_report([run], lr_sweep=tmp_path)
    section = page.partition('<section id="learning-rates">')[2].partition("</section>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in section.split("<tr>")[1:]]
    assert cells[:3] == [
        ["contender", "0.001", "0.002", "0.004", "0.008", ""],
        ["baseline", "2.3141", "2.2500 ←", "diverged", "–", ""],  # noqa: RUF001
        ["lidas", "2.1000 ←", "–", "–", "2.2000", "at the edge: a better rate may lie beyond"],  # noqa: RUF001
    ]
    assert [entry["contender"] for entry in report.learning_rates] == ["baseline", "lidas"]
    assert report.learning_rates[0]["rates"]["0.004"] is None
    command([run], json=True)
    assert json.loads(capsys.readouterr().out)["learning_rates"] == report.learning_rates
    (tmp_path / "lr_sweep.json").write_text("[1")
    with pytest.raises(MegaloopError, match=r"lr_sweep\.json"):
        make_report([run], lr_sweep=tmp_path)


def test_the_command_says_what_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [write_contender(tmp_path, name, seed) for name in ("iso-params", "looped-full") for seed in range(3)]
    print_report(make_report(made)[0], None, as_json=False)
    said = capsys.readouterr().out
    assert "seen: A loop does more with the same parameters: looped-full against iso-params (+" in said
