"""Supervised fine-tuning: the plain curve on any layout, from a checkpoint, at any depth, resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megaloop.config import Config
from megaloop.data import open_sources
from megaloop.errors import MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.inference.load import load_decoder
from megaloop.model.parameters import parameter_specs
from tests.cli.test_cli import megaloop
from tests.data.test_sft import examples, write
from tests.distributed import RankPool
from tests.train.plain import plain_steps
from tests.train.runs import configuration, events, losses, metrics, train

STEPS = 12


@pytest.fixture(scope="module")
def pretrained(corpus: Path, ranks_1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    ranks_1.run(train, configuration(corpus, run, depth="4"))
    return run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers whose lengths differ much, so that means of micro-batches' means would be another curve."""
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", examples(200))


def _values(
    pairs: Path, pretrained: Path, directory: Path, layout: tuple[int, int, int], **changes: Any
) -> dict[str, Any]:
    values = configuration(
        pairs, directory, layout, depth="4", init=str(pretrained), data__format="sft", data__sequence_length=64,
        data__validation_fraction=0.3,
        train__steps=STEPS, checkpoint={"every": 6, "keep": 5}, optimizer={"lr": 1e-3}, **changes,
    )  # fmt: skip
    values["train"] |= {"global_batch": 8, "micro_batch": 2}
    return values


def test_a_tokenizer_that_was_altered_is_not_taken_from_a_checkpoint(
    pairs: Path, pretrained: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pretrained, tmp_path / "copy"))
    for file in copy.rglob("tokenizer.model"):
        whole = file.read_bytes()
        file.write_bytes(whole.replace("\u2581god".encode(), "\u2581dog".encode()))
        assert file.read_bytes() != whole
    config = Config.model_validate(_values(pairs, copy, tmp_path / "run", (1, 1, 1)))
    with pytest.raises(MegaloopError, match=r"tokenizer\.model is altered: its checksum is"):
        open_sources(config.data, config.init)


def _plainly(values: dict[str, Any]) -> list[float]:
    """The same fine-tuning with nothing but torch: one mean over the answers of each global batch."""
    config = Config.model_validate(values)
    assert config.init is not None
    model, _ = load_decoder(config.init)
    model.train()
    model.plan = config.plan
    sources = open_sources(config.data, config.init)
    split, order = sources.datasets[0].split("train"), sources.order(config.seed)
    specs = parameter_specs(config.model, config.plan, model.vocab_size)

    def loss_of(step: int) -> torch.Tensor:
        samples = [split.sample(order(step * 8 + number)[1]) for number in range(8)]
        tokens = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])
        loss_mask = torch.stack([torch.from_numpy(sample.loss_mask) for sample in samples])
        targets = tokens[:, 1:].masked_fill(~loss_mask, -100)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)

    return plain_steps(config, model, lambda name: specs[name].decay, loss_of)


@pytest.mark.parametrize(
    ("layout", "depth", "micro_batch"),
    [
        ((1, 1, 1), "4", 4),
        ((1, 1, 1), "4", 1),
        ((2, 1, 1), "4", 2),
        ((1, 2, 1), "4", 2),
        ((1, 1, 2), "4", 2),
        ((2, 1, 2), "4", 1),
        ((2, 1, 1), "1-2x2-1", 2),  # a loop that pretraining did not have, on pipeline rounds
    ],
    ids=str,
)
def test_every_layout_has_the_curve_of_one_mean_over_all_answers(
    request: pytest.FixtureRequest,
    pairs: Path,
    pretrained: Path,
    tmp_path: Path,
    layout: tuple[int, int, int],
    depth: str,
    micro_batch: int,
) -> None:
    values = _values(pairs, pretrained, tmp_path / "run", layout)
    values["depth"] = depth
    values["train"]["micro_batch"] = micro_batch
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    pool.run(train, values)
    expected = _plainly(values)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.95 * expected[0], "it does not learn, so the comparison says little"


def test_validation_is_the_mean_over_all_held_out_answers(
    pairs: Path, pretrained: Path, tmp_path: Path, ranks_2: RankPool
) -> None:
    values = _values(pairs, pretrained, tmp_path / "run", (1, 1, 2), validation={"every": 0, "samples": 4})
    values["train"]["micro_batch"] = 1
    ranks_2.run(train, values)
    config = Config.model_validate(values)
    split = open_sources(config.data, config.init).datasets[0].split("validation")
    model, _ = load_decoder(tmp_path / "run")
    samples = [split.sample(index) for index in range(min(4, len(split)) // 2 * 2)]
    tokens = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])
    loss_mask = torch.stack([torch.from_numpy(sample.loss_mask) for sample in samples])
    with torch.no_grad():
        targets = tokens[:, 1:].masked_fill(~loss_mask, -100)
        expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=-100)
    last = metrics(tmp_path / "run")[-1]
    assert last["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    bits = float(expected) * int(loss_mask.sum()) / 0.6931471805599453 / sum(sample.bytes for sample in samples)
    assert last["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_fine_tuning_goes_on_where_it_stopped_and_grows(
    pairs: Path, pretrained: Path, tmp_path: Path, ranks_1: RankPool
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    growth = {
        "operator": "lidas",
        "start": 4,
        "block": 2,
        "schedule": [{"steps": 4, "layers": 4}, {"steps": 8, "layers": 6}],
    }
    for directory in (straight, stopped):
        values = _values(pairs, pretrained, directory, (1, 1, 1), growth=growth)
        values["depth"] = "6"
        if directory == stopped:
            shutil.copytree(straight, stopped)
            shutil.rmtree(stopped / "checkpoints" / "step-00000012")
        (taken,) = ranks_1.run(train, values, resume=directory == stopped)
        assert taken == list(range(0 if directory == straight else 48, 96))
    assert losses(stopped) == losses(straight)
    assert [event["step"] for event in events(straight, "grow")] == [4]


def test_the_command_line_begins_with_a_checkpoint(pairs: Path, pretrained: Path, tmp_path: Path) -> None:
    values = _values(pairs, pretrained, tmp_path / "run", (1, 1, 1))
    del values["init"]
    file = tmp_path / "sft.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    refused = megaloop("train", file)
    assert refused.returncode == 2
    assert "no tokenizer; begin with a checkpoint that has one (init=CKPT)" in refused.stderr
    result = megaloop("train", file, "--init", pretrained, "train.steps=5")
    assert result.returncode == 0, result.stderr
    assert "tokens of answers" in result.stdout
    assert len(losses(tmp_path / "run")) == 5
    assert (tmp_path / "run" / "checkpoints" / "step-00000005" / "tokenizer.model").is_file()
    with pytest.raises(MegaloopError, match=r"fine-tuned on prompts and answers.* with --data"):
        evaluate(tmp_path / "run", tasks=["validation"])
    notes: list[str] = []
    evaluate(tmp_path / "run", shots=[], on_note=notes.append)  # no number of shots: no questions
    assert [note[:34] for note in notes] == ["no held-out loss: the run was fine"]
