"""Manifests that someone made up, with a checksum that fits: one line, soon, and never a number from them unseen."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.checkpoint.manifest import PieceEntry, TensorEntry, find_problem
from megaloop.checkpoint.recorded import RecordedData
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.evaluation.harness import _context_length
from megaloop.inference.load import load_decoder
from megaloop.layout.pieces import StatePiece
from tests.checkpoint.states import save, state
from tests.checkpoint.test_damage import edit_manifest
from tests.checkpoint.test_earlier_versions import FIXTURES

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 4).path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "step-00000004"))


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A checkpoint of format version 1."""
    path = resolve_checkpoint(FIXTURES / "before-run-state/run")
    return Path(shutil.copytree(path, tmp_path / "earlier"))


def _line(raised: pytest.ExceptionInfo[MegaloopError]) -> str:
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value.update(rng={}), "rng.seed: Field required"),
        (lambda value: value.update(rng={"seed": -1, "step": 5}), "rng.seed: Input should be greater"),
        (lambda value: value.update(skipped=6), "6 of 5 steps were skipped"),
        (lambda value: value.update(run={}), "run: Extra inputs"),
    ],
)
def test_an_earlier_manifest_that_makes_no_sense(earlier: Path, edit: Edit, message: str) -> None:
    edit_manifest(earlier, edit)
    with pytest.raises(DamagedCheckpoint) as raised:
        Checkpoint.open(earlier)
    assert message in _line(raised)


@pytest.mark.parametrize(
    "config", [{}, {"data": None}, {"data": {"sources": None}}, {"seed": "\x1b[31m"}, {"train": 1e999}]
)
def test_an_earlier_manifest_whose_configuration_tells_nothing(earlier: Path, config: dict[str, Any]) -> None:
    edit_manifest(earlier, lambda value: value.update(config=config))
    with Checkpoint.open(earlier) as opened:
        run = opened.manifest.run
    assert (run.step, run.skipped, run.batch, run.data) == (5, 1, None, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value["run"].update(skipped=5), "5 of 4 steps were skipped"),
        (lambda value: value["run"].pop("skipped"), "run.skipped: Field required"),
        (lambda value: value["run"].update(step=10**40), "run.step: Input should be less than"),
        (lambda value: value["run"].update(lr=float("nan")), "run.lr"),
        (lambda value: value["run"]["data"].update(sources=[{}]), "run.data.sources.0.train: Field required"),
        (lambda value: value["tokenizer"].update(file="model/rank-00000.safetensors"), "both the tokenizer and tensors"),
        (lambda value: value["files"][0].update(bytes=10**4000), "manifest.json"),
        (lambda value: value["files"][0].update(bytes=10**29), "is truncated: "),
        (lambda value: value["model"].update(vocab_size=10**15), "embedding.weight is (24, 8)"),
        (lambda value: value["model"].update(hidden_size=10**15), "embedding.weight is (24, 8)"),
        (lambda value: value["model"].update(hidden_size=10**18), "model.hidden_size: "),
        (lambda value: value["plan"].update(order=[0] * 800_000), "plan.order runs 800000 layers"),
        (lambda value: value["plan"].update(order=[10**30]), "something else than layer ids"),
        (lambda value: value["topology"].update({"\x1b[31m": 1}), "topology"),
        (lambda value: value["topology"].update(pp=0), "topology.pp: Input should be greater than 0"),
        (lambda value: value.update(topology=[1, 1, 1]), "topology: Input should be an object"),
        (lambda value: value.update(plan=[0, 1]), "plan: Input should be an object"),
        (lambda value: value.update(model=None), "model: Input should be an object"),
        (lambda value: value.update(plan={}, model={}, extra=1), "is damaged (extra: Extra inputs are not permitted)"),
        (lambda value: (value["plan"].clear(), value["model"].update(num_heads=3)), "(model.hidden_size 8 is not divisible"),
        (lambda value: value.update(megaloop="[/red]\x1b[31m"), "megaloop: String should match pattern"),
        (lambda value: value.update(created="\x1b[2J"), "created: String should match pattern"),
        (lambda value: value.update({"\x1b[2J" * 1000: 1}), "Extra inputs"),
        (lambda value: value["tensors"]["master"].update({"\x1b[2J" * 1000: {"shape": [1], "dtype": "float32", "pieces": []}}), "is missing"),
        (lambda value: value["tensors"]["model"]["norm.weight"].update(dtype="\n" * 9000), "unknown dtype"),
        (lambda value: value["tensors"]["model"]["norm.weight"].update(shape=[1] * 30, pieces=[]), "30 dimensions"),
    ],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_one_line(checkpoint: Path, edit: Edit, message: str) -> None:
    edit_manifest(checkpoint, edit)
    with pytest.raises(MegaloopError) as raised:
        load_decoder(checkpoint)
    assert message in _line(raised)


@pytest.mark.parametrize(
    "data", [None, 3, [], {"sources": 3}, {"sources": [3, {"path": None}], "sequence_length": "x"}]
)
def test_a_configuration_that_tells_nothing_of_the_data(checkpoint: Path, data: Any) -> None:
    edit_manifest(checkpoint, lambda value: value.update(config={"data": data}))
    with Checkpoint.open(checkpoint) as opened:
        assert opened.manifest.data == RecordedData(None, (), False)
        assert _context_length(opened) == 2048


def test_evaluation_of_a_checkpoint_that_does_not_know_its_data(earlier: Path) -> None:
    edit_manifest(earlier, lambda value: value.update(config={"data": None}))
    with pytest.raises(MegaloopError, match="eval: the checkpoint does not know its data; name a data set with --data"):
        evaluate(earlier, tasks=["validation"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("state_name", ["model", "exp_avg_sq"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, state_name: str, number: float) -> None:
    def spoil(piece: StatePiece) -> StatePiece:
        if (piece.state_name, piece.piece.name) == (state_name, "layers.0.attention.wo.weight"):
            piece.data.view(-1)[-1] = number
        return piece

    path = save(tmp_path, 1, map(spoil, state((0, 1), (0, 1)))).path
    with Checkpoint.open(path, verify="checksums") as opened:
        opened.check_values({"master"})
        with pytest.raises(MegaloopError) as raised:
            opened.check_values()
        assert f"{state_name} of layers.0.attention.wo.weight holds numbers that are not finite" in _line(raised)
        shares = [_refused(opened, share) for share in range(3)]
        assert shares.count(True) == 1, "each file is one rank's"


def _refused(checkpoint: Checkpoint, share: int) -> bool:
    try:
        checkpoint.check_values(share=share, of=3)
    except MegaloopError:
        return True
    return False


def test_finite_numbers_whose_sum_is_not_are_no_harm(tmp_path: Path) -> None:
    def enlarge(piece: StatePiece) -> StatePiece:
        piece.data.fill_(torch.finfo(piece.data.dtype).max)
        return piece

    with Checkpoint.open(save(tmp_path, 1, map(enlarge, state((0, 1), (0, 1)))).path) as opened:
        opened.check_values()


def test_text_begins_with_no_number_that_is_not_finite(earlier: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.checkpoint.states import reseal_bytes

    file = earlier / "optim/rank-00000.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("master/"))
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt", "megaloop": "optim state of rank 0"})
    reseal_bytes(earlier)
    with pytest.raises(MegaloopError, match="holds numbers that are not finite"):
        load_decoder(earlier)


# --- many boxes ---


def _pieces(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> dict[str, dict[str, TensorEntry]]:
    pieces = [PieceEntry(file="f", key="k", offset=offset, shape=size) for offset, size in boxes]
    return {"model": {"w": TensorEntry(shape=shape, dtype="float32", pieces=pieces)}}


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["rows", "columns", "both"])
def test_many_boxes_are_checked_in_a_time_in_proportion(cut: str) -> None:
    """20,000 boxes, pair by pair, would take minutes."""
    rows, columns = {"rows": (20_000, 1), "columns": (1, 20_000), "both": (200, 100)}[cut]
    boxes = [([row * 3, column * 2], [3, 2]) for row, column in itertools.product(range(rows), range(columns))]
    shape = [rows * 3, columns * 2]
    began = time.process_time()
    assert find_problem(_pieces(boxes, shape)) is None
    assert time.process_time() - began < 20
    moved = [*boxes[:-1], ([max(begin - 1, 0) for begin in boxes[-1][0]], boxes[-1][1])]
    assert "overlap" in str(find_problem(_pieces(moved, shape)))


@given(st.data())
def test_boxes_are_taken_if_and_only_if_they_hold_each_value_once(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    box = st.tuples(*(st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in shape))
    drawn = data.draw(st.lists(box, min_size=1, max_size=6))
    boxes = [
        (
            [begin for begin, _ in count],
            [min(size, whole - begin) for (begin, size), whole in zip(count, shape, strict=True)],
        )
        for count in drawn
    ]
    if data.draw(st.booleans()):  # what is left, value by value: then only overlaps are wrong
        boxes += [([*place], [1] * len(shape)) for place in torch.nonzero(_count(boxes, shape) == 0).tolist()]
    # the same box twice is for the ranges within a box to find, not for its corners
    whole = bool((_count(boxes, shape) == 1).all())
    assert (find_problem(_pieces(boxes, shape)) is None) == whole


def _count(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> torch.Tensor:
    count = torch.zeros(shape, dtype=torch.int64)
    for offset, size in boxes:
        count[tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))] += 1
    return count


def test_the_manifest_of_many_boxes_is_read_soon(checkpoint: Path) -> None:
    def split(value: dict[str, Any]) -> None:
        entry = value["tensors"]["model"]["embedding.weight"]
        (piece,) = entry["pieces"]
        entry["pieces"] = [
            {**piece, "offset": [row, column], "shape": [1, 1]} for row in range(24) for column in range(8)
        ]
        entry["pieces"] += entry["pieces"][:1] * 20_000

    edit_manifest(checkpoint, split)
    began = time.process_time()
    with pytest.raises(DamagedCheckpoint, match="the same values twice"):
        Checkpoint.open(checkpoint)
    assert time.process_time() - began < 20
    assert json.loads((checkpoint / "manifest.json").read_bytes())["format_version"] == 2
