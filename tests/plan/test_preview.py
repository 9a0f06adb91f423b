"""``megaloop plan``: a run worked out before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megaloop.cli.main import app
from megaloop.config import Config
from megaloop.depth import run_flops
from megaloop.errors import MegaloopError
from megaloop.plan.preview import preview, show
from tests import processes
from tests.data.corpus import write_corpus

VALUES: dict[str, Any] = {
    "name": "tiny",
    "depth": 6,
    "model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "vocab_size": 128},
    "data": {"sources": [{"path": "nowhere"}], "sequence_length": 32},
    "train": {"steps": 100, "global_batch": 8, "micro_batch": 1, "precision": "fp32"},
    "growth": {
        "operator": "last",
        "start": 2,
        "block": 2,
        "schedule": [{"steps": 20, "layers": 2}, {"steps": 30, "layers": 4}, {"steps": 50, "layers": 6}],
        "topology": [{"layers": 2}, {"layers": 6, "pp": 2}],
    },
}
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
ENDS = 128 * 64 + 64


def configuration(**changes: Any) -> Config:
    return Config.model_validate(VALUES | changes)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(VALUES))  # JSON is YAML
    return path


def test_the_stages_of_a_run() -> None:
    run = preview(configuration(), ranks=4)
    assert [(stage.first_step, stage.stop) for stage in run.stages] == [(0, 20), (20, 50), (50, 100)]
    assert [stage.layers for stage in run.stages] == [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]
    assert [str(stage.topology) for stage in run.stages] == ["pp 1 x tp 1 x dp 4"] * 2 + ["pp 2 x tp 1 x dp 2"]
    assert [stage.micro_batches for stage in run.stages] == [2, 2, 4]
    assert [stage.bubble for stage in run.stages] == [0, 0, pytest.approx(1 / 5)]
    assert [stage.parameters for stage in run.stages] == [layers * LAYER + ENDS for layers in (2, 4, 6)]
    assert [rank.layers for rank in run.stages[2].ranks] == [(0, 1, 2), (3, 4, 5)]


def test_the_flops_of_a_run() -> None:
    config = configuration()
    run = preview(config)
    expected = run_flops(config.stages, config.model, 32, 8 * 32)
    assert [stage.flops for stage in run.stages] == list(expected.stages)
    assert (run.flops, run.fraction, run.matched_steps) == (expected.total, expected.fraction, expected.matched_steps)
    assert run.tokens == 100 * 8 * 32
    assert run.saved_percent == pytest.approx(100 * (1 - expected.fraction))


def test_what_growing_moves() -> None:
    """On one rank nothing moves; on two, a rank fetches of the copies' masters and moments what it lacks."""
    config = configuration(growth=VALUES["growth"] | {"topology": []})
    alone = preview(config, ranks=1).stages
    assert alone[0].boundary is None
    for stage, layers in zip(alone[1:], (2, 4), strict=True):
        assert stage.boundary is not None
        assert (stage.boundary.moved, stage.boundary.largest_receive) == (0, 0)
        # weights, masters and two moments of the layers before: a layer that is copied is needed once
        assert stage.boundary.in_place == 16 * (layers * LAYER + ENDS)
    pair = preview(config, ranks=2).stages[1]
    assert pair.boundary is not None
    assert 0 < pair.boundary.largest_receive <= pair.boundary.moved
    needed = 2 * 4 * (2 * LAYER + ENDS) + 12 * (2 * LAYER + ENDS)  # weights on both; of the rest at least all once
    assert pair.boundary.moved + pair.boundary.in_place >= needed


def test_zeroed_moments_of_copies_need_not_move() -> None:
    growth = VALUES["growth"] | {"topology": []}
    copied, zeroed = (
        preview(configuration(growth=growth | {"moments": moments}), ranks=2).stages[1].boundary
        for moments in ("copy", "zero")
    )
    assert copied is not None
    assert zeroed is not None
    assert zeroed.moved < copied.moved


def test_without_ranks_it_is_the_fewest_that_fit_and_says_so() -> None:
    run = preview(configuration())
    assert (run.ranks, run.assumed) == (2, True)
    assert "--ranks N" in rendered(run, 100)
    assert not preview(configuration(), ranks=2).assumed
    spelled = configuration(growth=None, parallel={"dp": 2})
    assert (preview(spelled).ranks, preview(spelled).assumed) == (2, False)


def test_json_holds_everything_raw(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(config_file), "--ranks", "4", "--json"])
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    run = preview(configuration(), ranks=4)
    assert values == json.loads(json.dumps(run.to_json()))
    assert (values["ranks"], values["tokens"], values["flops"]) == (4, run.tokens, run.flops)
    last = values["stages"][2]
    assert last["layers"] == [0, 1, 2, 3, 4, 5]
    assert last["topology"] == {"pp": 2, "tp": 1, "dp": 2}
    assert last["boundary"]["moved"] == run.stages[2].boundary.moved  # type: ignore[union-attr]
    assert values["stages"][0]["boundary"] is None
    for rank in last["ranks"]:
        assert rank["total"] == rank["weights"] + rank["gradients"] + rank["optimizer"] + rank["activations"]
    assert last["worst_rank"]["total"] == max(rank["total"] for rank in last["ranks"])
    assert last["ranks"][last["worst_rank"]["pipeline_rank"]]["layers"] == last["worst_rank"]["layers"]


def test_json_of_a_run_that_does_not_grow(config_file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(config_file), "growth=null", "--json"])
    values = json.loads(result.stdout)
    assert len(values["stages"]) == 1
    assert (values["fraction"], values["saved_percent"], values["matched_steps"]) == (1, 0, 100)


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_fit_the_terminal(width: int) -> None:
    growth = VALUES["growth"] | {"operator": "lidas", "start": 4, "schedule": "prop-1", "topology": []}
    text = rendered(preview(configuration(depth=24, growth=growth, parallel={"pp": 4})), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("activations") == len(range(4, 25, 2))


def rendered(run: Any, width: int) -> str:
    console = Console(width=width, highlight=False, force_terminal=False)
    with console.capture() as captured:
        show(run, console)
    return captured.get()


def test_ids_are_shown_in_their_order(config_file: Path) -> None:
    changes = ["growth.operator=lidas", "growth.topology=[]", "--ranks", "1"]
    result = CliRunner().invoke(app, ["plan", str(config_file), *changes], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "0-2, 4-5, 3" in result.stdout
    assert "steps [20, 50)  4 layers" in result.stdout


def test_the_data_tell_the_vocabulary_or_need_not_exist(config_file: Path) -> None:
    assert CliRunner().invoke(app, ["plan", str(config_file)]).exit_code == 0
    with pytest.raises(MegaloopError, match=r"nowhere.*set model\.vocab_size"):
        preview(configuration(model=VALUES["model"] | {"vocab_size": None}))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ranks", "3", "growth=null", "parallel.pp=2"], "makes 2 ranks, but there are 3"),
        (["model.vocab_size=null"], "set model.vocab_size"),
        (["growth.block=3"], "a block of 3 layers"),
        (["train.global_batch=6", "--ranks", "4"], "global_batch 6"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(config_file: Path, arguments: list[str], complaint: str) -> None:
    result = processes.run("plan", config_file, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert complaint in result.stderr


@pytest.mark.slow
def test_planning_imports_no_deepspeed(config_file: Path) -> None:
    program = f"""
import sys
from megaloop.config import load_config
from megaloop.plan.preview import preview
from pathlib import Path
from tests import processes
from tests.data.corpus import write_corpus
preview(load_config(Path({str(config_file)!r})), 4)
assert "deepspeed" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.slow
def test_a_batch_of_millions_is_planned_at_once() -> None:
    train = VALUES["train"] | {"global_batch": 4_000_000}
    run = preview(configuration(train=train), ranks=2)
    last = run.stages[-1]
    assert (last.micro_batches, last.estimated) == (4_000_000, True)
    assert last.ranks[0].micro_batches == preview(configuration(), ranks=2).stages[-1].ranks[0].micro_batches
    console = Console(width=200)
    with console.capture() as shown:
        show(run, console)
    assert "the step is too long to simulate: waiting is estimated" in shown.get()
    assert not any(stage.estimated for stage in preview(configuration(), ranks=2).stages)


def test_what_is_wrong_with_the_data_is_not_blamed_on_the_vocabulary(tmp_path: Path) -> None:
    data = write_corpus(tmp_path, count=80, sequence_length=32)
    model = VALUES["model"] | {"vocab_size": None}
    there = {"sources": [{"path": str(data)}], "sequence_length": 48}
    with pytest.raises(MegaloopError, match=r"^data.sequence_length 48 is longer than the 32 tokens"):
        preview(configuration(model=model, data=there))
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MegaloopError, match=r"not known without the data .*; set model.vocab_size"):
            preview(configuration(model=model, data=there | {"sources": [{"path": str(path)}]}))
    sft = {"sources": [{"path": str(tmp_path / "text.jsonl")}], "format": "sft"}
    with pytest.raises(MegaloopError, match=r"no tokenizer; begin with a checkpoint that has one \(init=CKPT\)"):
        configuration(data=sft).check()
