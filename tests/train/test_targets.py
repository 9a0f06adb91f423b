"""Training on targets of their own: the plain curve on any layout, in mixtures, resumed and grown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megaloop.checkpoint.depth import grow_checkpoint
from megaloop.config import Config
from megaloop.data import DataSet, open_sources
from megaloop.depth import DepthSpec
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.records import DIFFICULTY, Record, read_records
from megaloop.inference.halting import Halting
from megaloop.inference.load import load_decoder
from megaloop.inference.loops import EveryBlock
from megaloop.model import Decoder
from megaloop.model.parameters import parameter_specs
from tests.data.targeted import LENGTH, write_targeted
from tests.distributed import RankPool
from tests.train.plain import plain_steps
from tests.train.runs import configuration, losses, metrics, train

STEPS = 12


@pytest.fixture(scope="module")
def targeted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_targeted(tmp_path_factory.mktemp("targeted"), corpus)


def _values(
    targeted: Path, directory: Path, layout: tuple[int, int, int] = (1, 1, 1), **changes: Any
) -> dict[str, Any]:
    values = configuration(
        targeted,
        directory,
        layout,
        **{
            "train__steps": STEPS,
            "checkpoint": {"every": 6, "keep": 5},
            "validation": {"every": 0, "samples": 8},
            "depth": "4",
            **changes,
        },
    )
    values["train"] |= {"global_batch": 8, "micro_batch": 2}
    return values


def _plainly(values: dict[str, Any]) -> list[float]:
    """The same with nothing but torch: one mean over the targets of each global batch."""
    config = Config.model_validate(values)
    sources = open_sources(config.data)
    model = Decoder(config.model, 512, config.plan)
    model.initialise(config.seed)
    order = sources.order(config.seed)
    splits = [dataset.split("train") for dataset in sources.datasets]
    specs = parameter_specs(config.model, config.plan, 512)

    def loss_of(step: int) -> torch.Tensor:
        samples = [splits[source].sample(index) for source, index in map(order, range(step * 8, step * 8 + 8))]
        tokens = torch.stack([torch.from_numpy(sample.tokens) for sample in samples])
        targets = tokens[:, 1:].clone()
        for row, sample in enumerate(samples):
            if sample.targets is not None:
                targets[row] = torch.from_numpy(sample.targets)
        documents = None
        if config.model.document_masking:
            begins = torch.zeros(8, LENGTH, dtype=torch.int32)
            for row, sample in enumerate(samples):
                begins[row, [start for start in sample.starts.tolist() if start]] = 1
            documents = begins.cumsum(1, dtype=torch.int32)
        logits = model(tokens[:, :-1], documents)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    return plain_steps(config, model, lambda name: specs[name].decay, loss_of)


@pytest.mark.parametrize(
    ("layout", "depth", "micro_batch", "changes"),
    [
        ((1, 1, 1), "4", 8, {}),
        ((2, 1, 1), "4", 2, {}),
        ((1, 2, 1), "4", 2, {}),
        ((1, 1, 2), "4", 2, {"model__document_masking": True}),
        ((2, 1, 2), "4", 1, {}),
        ((2, 1, 1), "1-2x2-1", 2, {}),  # loops on rounds
        ((1, 1, 2), "0-2x2-0", 1, {}),
    ],
    ids=str,
)
def test_every_layout_has_the_curve_of_one_mean_over_all_targets(
    request: pytest.FixtureRequest,
    targeted: Path,
    corpus: Path,
    tmp_path: Path,
    layout: tuple[int, int, int],
    depth: str,
    micro_batch: int,
    changes: dict[str, Any],
) -> None:
    """Half of the samples are text, of which every token counts."""
    values = _values(targeted, tmp_path / "run", layout, **changes)
    values["depth"], values["train"]["micro_batch"] = depth, micro_batch
    values["data"]["sources"].append({"path": str(corpus)})
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    pool.run(train, values)
    expected = _plainly(values)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=TOLERANCE)
    assert expected[-1] < 0.98 * expected[0], "it does not learn, so the comparison says little"


def test_bf16_is_near_the_plain_curve_in_fp32(targeted: Path, tmp_path: Path, ranks_2: RankPool) -> None:
    values = _values(targeted, tmp_path / "run", (2, 1, 1), train__precision="bf16")
    ranks_2.run(train, values)
    assert losses(tmp_path / "run") == pytest.approx(_plainly(values), rel=BF16_TOLERANCE)


BF16_TOLERANCE = 3.5e-4
"""Twice what was measured."""
TOLERANCE = 3.5e-7
"""Twice the largest relative difference that was measured."""


@pytest.mark.slow
def test_growth_in_flight_is_growth_offline_and_resuming_changes_nothing(
    targeted: Path, tmp_path: Path, ranks_1: RankPool, ranks_2: RankPool
) -> None:
    growth = {
        "operator": "lidas",
        "start": 2,
        "block": 2,
        "schedule": [{"steps": 6, "layers": 2}, {"steps": 6, "layers": 4}],
    }
    straight, stopped, offline = (tmp_path / name for name in ("straight", "stopped", "offline"))
    (taken,) = ranks_1.run(train, _values(targeted, straight, growth=growth))
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000012")
    resumed = ranks_2.run(train, _values(targeted, stopped, (2, 1, 1), growth=growth), resume=True)
    assert resumed[0] == taken[48:]
    assert losses(stopped) == pytest.approx(losses(straight), rel=TOLERANCE)
    shutil.copytree(straight, offline)
    shutil.rmtree(offline / "checkpoints" / "step-00000012")
    before = offline / "checkpoints" / "step-00000006"
    grow_checkpoint(before, tmp_path / "grown", "lidas", DepthSpec.parse(4), block=2)
    shutil.rmtree(before)
    shutil.copytree(tmp_path / "grown", before)
    ranks_1.run(train, _values(targeted, offline, growth=growth), resume=True)
    assert losses(offline) == losses(straight)


@pytest.fixture(scope="module")
def learnt(targeted: Path, tmp_path_factory: pytest.TempPathFactory, ranks_1: RankPool) -> Path:
    """A run that has learnt something of its targets."""
    run = tmp_path_factory.mktemp("learnt") / "run"
    ranks_1.run(train, _values(targeted, run, train__steps=60, checkpoint={"every": 30, "keep": 5}))
    return run


def _by_hand(run: Path, samples: int) -> dict[int, list[tuple[int, int, float, bool]]]:
    """Of each document, by difficulty: places with a target, how many are right, their loss, and whether the last is right."""
    model, checkpoint = load_decoder(run)
    (dataset,) = open_sources(Config.model_validate(checkpoint.manifest.config).data).datasets
    split = dataset.split("validation")
    found: dict[int, list[tuple[int, int, float, bool]]] = {}
    for index in range(samples):
        sample = split.sample(index)
        assert sample.targets is not None
        assert sample.difficulties is not None
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.tokens[None, :-1]))[0]
        ends = [*sample.starts[1:].tolist(), LENGTH]
        for start, stop, difficulty in zip(sample.starts.tolist(), ends, sample.difficulties.tolist(), strict=True):
            places = [place for place in range(start, stop) if sample.targets[place] >= 0]
            if not places:
                continue
            wanted = torch.from_numpy(sample.targets[places])
            right = (logits[places, : dataset.vocab_size].argmax(-1) == wanted).tolist()
            loss = float(F.cross_entropy(logits[places], wanted, reduction="sum"))
            found.setdefault(difficulty, []).append((len(places), sum(right), loss, right[-1]))
    return found


def _records(records: list[Record]) -> dict[int | None, Record]:
    return {record.subject.difficulty: record for record in records}


def test_evaluation_by_difficulty_is_what_counting_by_hand_gives(learnt: Path) -> None:
    samples = 24
    records = _records(evaluate(learnt, tasks=["validation"], samples=samples))
    by_hand = _by_hand(learnt, samples)
    assert set(records) == {None, 0, 1, 2}
    for difficulty, documents in by_hand.items():
        values = records[difficulty].values
        assert records[difficulty].subject.task == DIFFICULTY
        tokens = sum(count for count, *_ in documents)
        assert values["tokens"] == tokens
        assert values["accuracy"] == pytest.approx(sum(right for _, right, *_ in documents) / tokens)
        assert values["last_accuracy"] == pytest.approx(sum(last for *_, last in documents) / len(documents))
        assert values["loss"] == pytest.approx(sum(loss for _, _, loss, _ in documents) / tokens, rel=1e-5)
        # a bootstrap over documents has the same error
        rng = torch.Generator().manual_seed(0)
        pairs = torch.tensor([(count, right) for count, right, *_ in documents], dtype=torch.float64)
        drawn = pairs[torch.randint(len(pairs), (4000, len(pairs)), generator=rng)].sum(1)
        assert values["accuracy_stderr"] == pytest.approx(float((drawn[:, 1] / drawn[:, 0]).std()), rel=0.1)
        assert 0 < values["floor"] <= 1  # the token before: the vote finds it
    whole = records[None].values
    assert whole["loss"] == pytest.approx(
        sum(records[d].values["loss"] * records[d].values["tokens"] for d in (0, 1, 2)) / whole["tokens"], rel=1e-6
    )
    assert evaluate(learnt, tasks=["validation"], samples=samples) == list(records.values()), "remembered"


def test_the_held_out_loss_of_evaluation_is_that_of_training(learnt: Path) -> None:
    (record, *_) = evaluate(learnt, tasks=["validation"], samples=8)
    last = metrics(learnt)[-1]
    assert record.values["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert record.values["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)


def test_what_is_asked_may_be_longer_than_what_was_trained_on(learnt: Path, corpus: Path, tmp_path: Path) -> None:
    """Twice as long too: text would be cut in two there, but targets rest on all that comes before."""
    for length in (2 * LENGTH, LENGTH + 8):
        longer = write_targeted(tmp_path / str(length), corpus, length=length)
        records = _records(evaluate(learnt, tasks=["validation"], data=[longer], samples=4, out=tmp_path / "out.jsonl"))
        assert set(records) == {None, 0, 1, 2}
        assert records[None].values["tokens"] == sum(
            DataSet.open(longer).split("validation").loss_mask(n) for n in range(4)
        )


def test_data_prepared_anew_at_the_same_path_is_measured_anew(learnt: Path, corpus: Path, tmp_path: Path) -> None:
    data, out = write_targeted(tmp_path / "data", corpus), tmp_path / "out.jsonl"
    first = evaluate(learnt, tasks=["validation"], data=[data], samples=4, out=out)
    assert evaluate(learnt, tasks=["validation"], data=[data], samples=4, out=out) == first, "remembered"
    shutil.rmtree(data)
    write_targeted(tmp_path / "data", corpus, count=300, seed=1)
    second = evaluate(learnt, tasks=["validation"], data=[data], samples=4, out=out)
    assert [record.subject for record in second] == [record.subject for record in first]
    assert [record.values["loss"] for record in second] != [record.values["loss"] for record in first]
    assert list(read_records(out).values()) == second, "what was measured last counts"


def test_every_block_may_loop_in_turn(learnt: Path) -> None:
    records = evaluate(learnt, tasks=["validation"], samples=8, loops=[1, 2], blocks=[EveryBlock(2)])
    hardest = [record for record in records if record.subject.difficulty == 2]
    assert [(r.subject.block, r.subject.loops, r.subject.depth) for r in hardest] == [
        (None, 1, "4"), ("0:2", 2, "0-2x2-2"), ("1:3", 2, "1-2x2-1"), ("2:4", 2, "2-2x2-0"),
    ]  # fmt: skip
    assert len({record.values["loss"] for record in hardest}) == 4


def test_loops_by_difficulty_are_those_of_the_whole(learnt: Path) -> None:
    """With halting, only what carries a target leaves the loop early."""
    halts = [Halting("oracle")]
    records = _records(evaluate(learnt, tasks=["validation"], samples=8, loops=[3], halts=halts))
    whole = records[None].values
    assert sum(whole["loops_histogram"]) == whole["tokens"]
    assert 1 <= whole["loops_mean"] < 3
    parts = [records[difficulty].values for difficulty in (0, 1, 2)]
    counts = [sum(column) for column in zip(*(part["loops_histogram"] for part in parts), strict=True)]
    assert counts == whole["loops_histogram"]
    asked = [loops for _, loops in whole["loops_text"]]
    assert None in asked
    assert set(asked) - {None} <= {1, 2, 3}
