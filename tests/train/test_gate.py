"""A loop's gate in real runs: alone on a frozen model, together with it, and what checkpoints, exports and loops make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megaloop.checkpoint import Checkpoint
from megaloop.checkpoint.depth import loop_checkpoint
from megaloop.checkpoint.starting_config import starting_config
from megaloop.config import Config
from megaloop.depth import DepthSpec
from megaloop.depth.flops import flops_per_token
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import export_huggingface
from megaloop.model.parameters import LOOP_GATE
from megaloop.plan.preview import preview
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, events, losses, metrics, train

DEPTH = "1-1x3-1"
STYLE = {"injection": "concat", "norm": True}
STEPS = 20


def values(data: Path, out: Path, dp: int = 1, gate: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    loop = dict(STYLE) | ({} if gate is None else {"gate": gate})
    return configuration(data, out, (1, 1, dp), **{"depth": DEPTH, "loop": loop} | changes)


def states(run: Path, step: int = STEPS) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of a checkpoint by (kind, name)."""
    with Checkpoint.open(run / "checkpoints" / f"step-{step:08}") as checkpoint:
        kinds = checkpoint.manifest.tensors
        return {(kind, name): checkpoint.read(kind, name) for kind in kinds for name in checkpoint.names(kind)}


@pytest.fixture(scope="module")
def model(ranks_1: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a looped model without a gate; in bf16, whose weights come from masters."""
    directory = tmp_path_factory.mktemp("model") / "run"
    ranks_1.run(train, values(corpus, directory, train__precision="bf16"))
    return directory


@pytest.fixture(scope="module")
def frozen(ranks_1: RankPool, corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gate trained on that model, in fp32."""
    directory = tmp_path_factory.mktemp("frozen") / "run"
    ranks_1.run(train, values(corpus, directory, gate={"train": "frozen"}, init=str(model), optimizer__lr=0.03))
    return directory


def test_a_frozen_models_weights_stay_and_its_gate_learns(frozen: Path, model: Path) -> None:
    before, after = states(model), states(frozen)
    for (kind, name), value in after.items():
        if name in LOOP_GATE:
            assert value.any(), f"{kind} of {name} is as it began"
        elif kind in ("model", "master"):
            assert torch.equal(value, before["master", name]), f"{kind} of {name} moved"
        else:
            assert not value.any(), f"{kind} of {name}: a moment of what does not learn"
    curve = losses(frozen)
    assert sum(curve[-5:]) < sum(curve[:5])
    assert len({record["val_loss"] for record in metrics(frozen) if record["val_loss"] is not None}) == 1, (
        "the model's own"
    )
    (change,) = events(frozen, "loop")
    assert (change["step"], change["live"], change["plan"]["style"]["gate"]) == (0, False, True)


def test_flops_of_a_run_count_every_readout(frozen: Path, corpus: Path) -> None:
    config = Config.model_validate(values(corpus, frozen, gate={"train": "frozen"}, init="x"))
    rows = states(frozen)["model", "embedding.weight"].shape[0]
    cost = flops_per_token(config.plan, config.model, 32, vocab_size=rows, gate="frozen")
    assert metrics(frozen)[-1]["flops"] == cost.total * STEPS * 4 * 32


def test_replicas_train_the_same_gate(
    ranks_2: RankPool, corpus: Path, frozen: Path, model: Path, tmp_path: Path
) -> None:
    ranks_2.run(
        train,
        values(corpus, tmp_path / "run", 2, {"train": "frozen"}, init=str(model), optimizer__lr=0.03),
    )
    alone, shared = losses(frozen), losses(tmp_path / "run")
    assert shared == pytest.approx(alone, rel=1e-6)
    before, after = states(frozen), states(tmp_path / "run")
    assert all(torch.equal(after[key], value) for key, value in before.items() if key[1] not in LOOP_GATE)


def test_a_gates_training_resumes_to_the_bit(
    ranks_1: RankPool, corpus: Path, frozen: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(frozen, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08}")
    ranks_1.run(
        train, values(corpus, tmp_path / "run", gate={"train": "frozen"}, init=str(model), optimizer__lr=0.03), True
    )
    again = states(tmp_path / "run")
    assert all(torch.equal(again[key], value) for key, value in states(frozen).items())
    assert losses(tmp_path / "run") == losses(frozen)


def test_a_run_that_goes_on_frozen_leaves_the_model_although_it_had_moments(
    ranks_1: RankPool, corpus: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "run")
    changes: dict[str, Any] = {"train__precision": "bf16", "train__steps": STEPS + 2}
    ranks_1.run(train, values(corpus, tmp_path / "run", gate={"train": "frozen"}, init=str(model), **changes), True)
    before, after = states(model), states(tmp_path / "run", STEPS + 2)
    assert all(torch.equal(after[key], value) for key, value in before.items() if key[0] in ("model", "master"))


def test_gate_and_model_learn_together_on_any_number_of_replicas(
    ranks_1: RankPool, ranks_2: RankPool, corpus: Path, tmp_path: Path
) -> None:
    gate = {"train": "joint", "beta": 0.05}
    ranks_1.run(train, values(corpus, tmp_path / "one", 1, gate))
    ranks_2.run(train, values(corpus, tmp_path / "two", 2, gate))
    alone, shared = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert shared == pytest.approx(alone, rel=1e-6)
    assert alone[-1] < 0.97 * alone[0]
    validated = [record["val_loss"] for record in metrics(tmp_path / "one") if record["val_loss"] is not None]
    assert validated[-1] < validated[0]
    assert all(value.any() for (kind, name), value in states(tmp_path / "one").items() if name in LOOP_GATE)


def test_a_gate_is_not_lost_without_saying(ranks_1: RankPool, corpus: Path, frozen: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"norm true, a gate, but the configuration says .*, no gate; set .*loop\.gate"):
        ranks_1.run(train, values(corpus, tmp_path / "run", init=str(frozen)))
    assert "gate:\n    train: joint" in starting_config(frozen)
    loop_checkpoint(frozen, tmp_path / "plain", DepthSpec.parse(DEPTH), changes={"gate": False})
    with Checkpoint.open(tmp_path / "plain") as checkpoint:
        style = checkpoint.manifest.plan.style
        assert (style.gate, style.norm, style.injection) == (False, True, "concat")
        assert not set(LOOP_GATE) & set(checkpoint.names("model"))
    with pytest.raises(MegaloopError, match="has no gate to drop; leave --no-gate out"):
        loop_checkpoint(tmp_path / "plain", tmp_path / "again", DepthSpec.parse(DEPTH), changes={"gate": False})


def test_an_export_leaves_the_gate_out_and_says_so(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"loop": {"gate": {"train": "joint"}}, "train__steps": 1, "schedule__warmup_steps": 0}
    ranks_1.run(train, values(corpus, tmp_path / "run", **changes))
    summary = export_huggingface(tmp_path / "run", tmp_path / "out")
    assert set(summary.left_out) == {"loop.gate.bias", "loop.gate.weight"}
    index = [path.read_bytes()[:4000] for path in (tmp_path / "out").glob("*.safetensors")]
    assert index
    assert not any(b"gate.bias" in head for head in index)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"depth": "4", "loop": {"gate": {"train": "joint"}}}, "loop.gate: depth 4 has no loop; use one"),
    ({"gate": {"train": "frozen"}}, "it needs a trained model; name its checkpoint with init=CKPT"),
    ({"gate": {"train": "frozen", "beta": 0.2}, "init": "x"}, "loop.gate.beta does not apply to loop.gate.train frozen"),
    ({"gate": {"train": "joint", "slope": 2.0}}, "loop.gate.slope does not apply to loop.gate.train joint"),
    ({"gate": {"train": "joint"}, "parallel": {"pp": 2}}, "one pipeline rank without tensor parallelism; found parallel.pp 2 and"),
    ({"gate": {"train": "joint"}, "parallel": {"tp": 2}}, "found parallel.pp 1 and tp 2; use pp 1, tp 1 and more dp"),
    (
        {"loop": {"injection": "add", "backprop": 1, "gate": {"train": "joint"}}},
        "loop.backprop 1 with loop.gate: each iteration is read out",
    ),
    (
        {"gate": {"train": "frozen"}, "init": "x", "depth_events": [{"at": 0.5, "untie": True}], "loop": {"gate": {"train": "frozen"}}},
        "loop.gate.train frozen: the model stays as it is, but growth or depth_events would change it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_a_gate_cannot_be_trained_with_is_refused_in_a_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MegaloopError) as caught:
        Config.model_validate(values(tmp_path, tmp_path, **changes)).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plan_counts_the_readouts(tmp_path: Path, corpus: Path) -> None:
    plain, joint = (
        preview(Config.model_validate(values(corpus, tmp_path, gate=gate))).stages[0]
        for gate in (None, {"train": "joint"})
    )
    assert joint.flops_per_step > 1.3 * plain.flops_per_step
    assert joint.ranks[0].activations > 1.3 * plain.ranks[0].activations
    assert joint.parameters == plain.parameters + 33
