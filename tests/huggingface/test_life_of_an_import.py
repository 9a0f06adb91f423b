"""What was imported is continued, grown, looped, evaluated and exported from its own configuration, by the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megaloop.checkpoint import Checkpoint
from megaloop.checkpoint.starting_config import starting_config
from megaloop.config import load_config
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import import_huggingface
from tests.data.corpus import documents
from tests.processes import run

SHAPE: dict[str, Any] = {
    "hidden_size": 50, "head_dim": 12, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 5e4,
    "tie_word_embeddings": True, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
SHORT = ["train.global_batch=4", "logging.tensorboard=false", "validation.samples=4"]


@pytest.fixture(scope="module")
def imported(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ours``, a checkpoint of a random Llama with a tokenizer, and ``run.yaml``, made from it, with data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("imported")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "theirs")
    shutil.copy(corpus / "tokenizer.model", folder / "theirs")
    _succeed("import", folder / "theirs", "--out", folder / "ours")
    _succeed("init-config", folder / "ours", "--out", folder / "run.yaml")
    config = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(100)))
    _succeed(
        "prep", folder / "text.jsonl", "--out", folder / "shards", "--tokenizer", folder / "ours",
        "--sequence-length", config["data"]["sequence_length"], "--validation-fraction", 0.1,
    )  # fmt: skip
    config["data"]["sources"][0]["path"] = str(folder / "shards")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def _succeed(*words: object) -> str:
    done = run(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _train(imported: Path, directory: Path, *overrides: str) -> list[float]:
    words = [f"run_dir={directory}", "train.steps=4", "schedule.warmup_steps=1", *SHORT, *overrides]
    _succeed("train", imported / "run.yaml", *words)
    return _losses(directory)


@pytest.mark.slow
def test_two_pipeline_stages_train_it_as_one_rank_does(imported: Path, tmp_path: Path) -> None:
    assert "parameters" in _succeed("plan", imported / "run.yaml", "parallel.pp=2")
    one = _train(imported, tmp_path / "one")
    two = _train(imported, tmp_path / "two", "parallel.pp=2")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=2e-5)
    assert one[0] != one[-1]
    assert (tmp_path / "one/checkpoints/step-00000004/tokenizer.model").is_file()
    again = load_config(_written(tmp_path / "one", tmp_path / "again.yaml"))
    assert again.model == load_config(imported / "run.yaml").model
    assert again.name == "one-continued"


def _written(checkpoint: Path, out: Path) -> Path:
    out.write_text(starting_config(checkpoint))
    return out


@pytest.mark.slow
def test_it_grows_loops_and_goes_out_again(imported: Path, tmp_path: Path) -> None:
    ours = imported / "ours"
    _succeed("grow", ours, "--out", tmp_path / "grown", "--layers", 6, "--block", 2)
    grown = load_config(_written(tmp_path / "grown", tmp_path / "grown.yaml"))
    assert str(grown.depth) == "6"
    _succeed("loop", tmp_path / "grown", "--out", tmp_path / "looped", "--depth", "2-2x2-2", "--norm")
    looped = load_config(_written(tmp_path / "looped", tmp_path / "looped.yaml"))
    assert (str(looped.depth), looped.loop.norm) == ("2-2x2-2", True)
    for name in ("grown", "looped"):
        words = [f"data.sources.0.path={imported / 'shards'}", f"run_dir={tmp_path / 'of' / name}"]
        _succeed("train", tmp_path / f"{name}.yaml", "train.steps=1", "schedule.warmup_steps=0", *SHORT, *words)
        assert len(_losses(tmp_path / "of" / name)) == 1
    plain = _succeed("generate", ours, "--prompt", "the king", "--max-tokens", 4, "--temperature", 0)
    deep = _succeed(
        "generate", ours, "--prompt", "the king", "--max-tokens", 4, "--temperature", 0, "--depth", "1-2x2-1"
    )
    assert plain.startswith("the king") == deep.startswith("the king") is True
    words = ["--tasks", "addition,validation", "--examples", "2", "--shots", "0"]
    _succeed("eval", ours, "--loops", "1,2", "--data", imported / "shards", "--out", tmp_path / "eval.jsonl", *words)
    assert "addition" in (tmp_path / "eval.jsonl").read_text()
    _succeed("export", tmp_path / "grown", "--out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["rope_scaling"] == SHAPE["rope_scaling"]


@pytest.mark.slow
def test_its_growth_and_retrofit_in_a_run(imported: Path, tmp_path: Path) -> None:
    grow = ["depth=6", "growth.operator=lidas", "growth.block=2", "growth.start=4"]
    steps = 'growth.schedule=[{"steps": 2, "layers": 4}, {"steps": 2, "layers": 6}]'
    loop = ['depth_events=[{"at": 0.75, "depth": "2-2x2-2"}]', "schedule.cooldown=0.25"]
    one = _train(imported, tmp_path / "one", *grow, steps, *loop)
    two = _train(imported, tmp_path / "two", *grow, steps, *loop, "parallel.pp=2")
    assert two == pytest.approx(one, rel=2e-5)
    with Checkpoint.open(tmp_path / "two/checkpoints/step-00000004") as checkpoint:
        assert checkpoint.manifest.plan.layers == 6
        assert checkpoint.manifest.plan.is_looped
        assert checkpoint.manifest.model.head_dim == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rope_theta=10000", "it holds rope_theta 50000.0; the configuration asks for rope_theta 10000.0"),
        ("model.head_dim=16", "it holds head_dim 12; the configuration asks for head_dim 16"),
        ("model.rope_scaling=null", "the configuration asks for rope_scaling none"),
        ("model.tied_embeddings=false", "the configuration asks for tied_embeddings False"),
        ("depth=5", "it holds depth 4; the configuration asks for depth 5"),
    ],
)
def test_a_model_section_that_is_not_the_checkpoints_is_refused_by_field(
    imported: Path, tmp_path: Path, override: str, message: str
) -> None:
    words = [f"run_dir={tmp_path / 'run'}", "train.steps=2", "schedule.warmup_steps=0", *SHORT, override]
    done = run("train", imported / "run.yaml", *words)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "megaloop init-config writes one from the checkpoint" in done.stderr


def test_the_configuration_is_the_checkpoints_and_loads(imported: Path, tmp_path: Path) -> None:
    config = load_config(imported / "run.yaml")
    with Checkpoint.open(imported / "ours") as checkpoint:
        assert config.model == checkpoint.manifest.model
    assert config.init == imported / "ours"
    assert config.data.sequence_length == 64
    path = tmp_path / "a \u00e9: #'\n{x}"
    import_huggingface(imported / "theirs", path)
    odd = load_config(_written(path, tmp_path / "odd.yaml"))
    assert odd.init == path
    assert "\n{x}" not in starting_config(path).splitlines()[0]


def test_a_configuration_is_not_written_over_another(imported: Path, tmp_path: Path) -> None:
    done = run("init-config", imported / "ours", "--out", imported / "run.yaml")
    assert (done.returncode, "already exists" in done.stderr) == (2, True)
    done = run("init-config", imported / "ours", "--out", tmp_path / "none" / "run.yaml")
    assert (done.returncode, "cannot be written" in done.stderr) == (2, True)
    with pytest.raises(MegaloopError, match="no complete checkpoint"):
        starting_config(tmp_path)
