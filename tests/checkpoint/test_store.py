"""What is saved in one layout is read in any other, bit for bit; and which checkpoints a run has."""

from __future__ import annotations

import re
import weakref
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megaloop.checkpoint import (
    Checkpoint,
    RunState,
    check_same_model,
    list_checkpoints,
    prune,
    resolve_checkpoint,
    save_checkpoint,
)
from megaloop.checkpoint.manifest import MANIFEST, Manifest
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.layout.pieces import STATE_NAMES, Box, Piece, StatePiece
from tests.checkpoint.states import SHAPES, info, run_state, save, state, tensor
from tests.distributed import RankError, RankPool

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (4, 2)]


def assert_reads_in_any_layout(path: Path) -> None:
    """Everything that ranks of every layout would ask for is there, bit for bit."""
    with Checkpoint.open(path, verify="checksums") as checkpoint:
        for state_name in STATE_NAMES:
            assert checkpoint.names(state_name) == list(SHAPES)
            for name, shape in SHAPES.items():
                assert checkpoint.shape(state_name, name) == shape
                assert torch.equal(checkpoint.read(state_name, name), tensor(state_name, name, shape))
        for tp, dp in LAYOUTS:
            for at_tp in range(tp):
                for at_dp in range(dp):
                    for state_piece in state((at_tp, tp), (at_dp, dp)):
                        found = checkpoint.read_piece(state_piece.state_name, state_piece.piece)
                        assert found is not None
                        assert found.dtype == state_piece.data.dtype
                        assert torch.equal(found, state_piece.data), (tp, dp, state_piece.piece)


# --- written by ranks ---


def _save_as_rank(run: Path, tp: int, dp: int, step: int = 1) -> tuple[Path, int]:
    rank = dist.get_rank()
    result = save(run, step, list(state((rank % tp, tp), (rank // tp, dp))))
    return result.path, result.bytes


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)], ids=["tensor parallel", "ZeRO fragments"])
def test_what_two_ranks_write_is_read_in_any_layout(ranks_2: RankPool, tmp_path: Path, tp: int, dp: int) -> None:
    (path, size), other = ranks_2.run(_save_as_rank, tmp_path, tp, dp)
    assert other == (path, size)
    assert size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert sorted(file.name for file in path.parent.iterdir()) == ["step-00000001"]
    assert_reads_in_any_layout(path)


def test_boxes_and_fragments_together(ranks_4: RankPool, tmp_path: Path) -> None:
    (path, _), *_ = ranks_4.run(_save_as_rank, tmp_path, 2, 2)
    assert_reads_in_any_layout(path)


def _save_wrongly(run: Path, how: str) -> None:
    rank = dist.get_rank()
    pieces = list(state((0, 1), (rank, 2)))
    if how == "gap" and rank == 1:
        pieces = [item for item in pieces if item.state_name != "exp_avg" or item.piece.name != "norm.weight"]
    if how == "overlap":
        pieces = [StatePiece(item.state_name, item.piece, item.data) for item in pieces]
    if how == "missing tensor":
        pieces = [item for item in pieces if item.state_name != "master" or item.piece.name != "norm.weight"]
    if how == "shape" and rank == 1:
        piece = Piece("norm.weight", (9,), Box((0,), (9,)))
        pieces.append(StatePiece("model", piece, torch.ones(9, dtype=torch.bfloat16)))
    if how == "a mistake on one rank" and rank == 1:
        pieces.append(None)  # type: ignore[arg-type]
    message = "no error"
    try:
        save(run, 1, pieces)
    except RuntimeError as error:
        message = str(error)
    messages: list[Any] = [None, None]
    dist.all_gather_object(messages, message)
    assert messages[0] == messages[1]
    raise RuntimeError(message)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gap", "exp_avg of norm.weight: 3 of 8 values"),
        ("overlap", "model of embedding.weight: the same values twice"),
        ("missing tensor", "master of norm.weight is missing"),
        ("shape", r"ranks disagree about model of norm.weight"),
        ("a mistake on one rank", "rank 1: AttributeError"),
    ],
)
def test_ranks_that_disagree_save_nothing(ranks_2: RankPool, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        ranks_2.run(_save_wrongly, tmp_path, how)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# --- any shape, any cut ---


@st.composite
def cuttings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[Box, list[tuple[int, int]] | None]]:
    """A tensor cut into boxes along one dimension, and each box left whole or cut into fragments."""
    boxes = [Box.whole(shape)]
    if shape:
        dimension = draw(st.integers(0, len(shape) - 1))
        cuts = sorted(draw(st.sets(st.integers(1, max(shape[dimension] - 1, 1)), max_size=3)))
        edges = [0, *(cut for cut in cuts if cut < shape[dimension]), shape[dimension]]
        boxes = []
        for start, stop in pairwise(edges):
            offset, size = [0] * len(shape), list(shape)
            offset[dimension], size[dimension] = start, stop - start
            boxes.append(Box(tuple(offset), tuple(size)))
    result: list[tuple[Box, list[tuple[int, int]] | None]] = []
    for box in boxes:
        ends = sorted(draw(st.sets(st.integers(0, box.numel), max_size=4)) | {0, box.numel})
        result.append((box, draw(st.none() | st.just(list(pairwise(ends))))))
    return result


@st.composite
def cases(draw: st.DrawFn) -> Any:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    return shape, draw(cuttings(shape)), draw(cuttings(shape)), draw(st.sampled_from(["model", "master"]))


@pytest.mark.slow
@given(cases())
@settings(max_examples=150, deadline=None)
def test_any_cut_is_read_in_any_other(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    shape, written, asked, state_name = case
    whole = tensor(state_name, "x", shape)
    directory = tmp_path_factory.mktemp("run") / "step-1"

    def pieces(cutting: Any) -> list[StatePiece]:
        found = []
        for box, fragments in cutting:
            values = whole[box.within(Box.whole(shape))]
            if fragments is None:
                found.append(StatePiece(state_name, Piece("x", shape, box), values))
            for start, stop in fragments or []:
                found.append(
                    StatePiece(state_name, Piece("x", shape, box, (start, stop)), values.reshape(-1)[start:stop])
                )
        return found

    path = save_checkpoint(directory, pieces(written), info()).path
    with Checkpoint.open(path) as checkpoint:
        assert torch.equal(checkpoint.read(state_name, "x"), whole)
        for piece in pieces(asked):
            found = checkpoint.read_piece(state_name, piece.piece)
            assert found is not None
            assert found.shape == piece.data.shape
            assert torch.equal(found, piece.data)


class _OneAtATime(TorchDispatchMode):
    """Counts how many copies of tensors are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.clone.default:
            self.copies.append(weakref.ref(result))
            self.most = max(self.most, sum(copy() is not None for copy in self.copies))
        return result


def test_pieces_are_copied_one_by_one_and_may_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(64.0).view(8, 8)
    transposed = whole.t()  # as what is elsewhere, it has to be copied before its bytes can be written
    state_names = {"model": transposed, "master": whole, "exp_avg": transposed, "exp_avg_sq": transposed}
    pieces = [
        StatePiece(state_name, Piece(name, (8, 8), Box.whole((8, 8))), values)
        for state_name, values in state_names.items()
        for name in ("x", "y")
    ]
    with _OneAtATime() as counted:
        path = save_checkpoint(tmp_path / "step-1", pieces, info()).path
    assert len(counted.copies) == 6
    assert counted.most == 1
    with Checkpoint.open(path, verify="checksums") as checkpoint:
        for state_name, values in state_names.items():
            assert torch.equal(checkpoint.read(state_name, "y"), values)


def test_a_dtype_that_has_no_place_is_refused(tmp_path: Path) -> None:
    piece = Piece("x", (4,), Box.whole((4,)))
    with pytest.raises(RuntimeError, match="x is float64; only float32 and bfloat16 can be written"):
        save_checkpoint(tmp_path / "step-1", [StatePiece("model", piece, torch.ones(4).double())], info())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_range_is_empty(tmp_path: Path) -> None:
    save(tmp_path, 1)
    piece = Piece("norm.weight", (8,), Box((0,), (8,)), (3, 3))
    with Checkpoint.open(resolve_checkpoint(tmp_path)) as checkpoint:
        found = checkpoint.read_piece("master", piece)
    assert found is not None
    assert found.numel() == 0


def test_what_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 1, [item for item in state((0, 1), (0, 1)) if item.state_name == "model"])
    with Checkpoint.open(resolve_checkpoint(tmp_path)) as checkpoint:
        piece = Piece("norm.weight", (8,), Box.whole((8,)))
        assert checkpoint.names("master") == []
        assert checkpoint.read_piece("master", piece) is None
        with pytest.raises(MegaloopError, match=r"holds no master of norm.weight"):
            checkpoint.read("master", "norm.weight")
        with pytest.raises(MegaloopError, match=r"norm.weight holds 4 of 8 values asked for"):
            checkpoint.read("model", "norm.weight", Box((4,), (8,)))


def test_a_fragment_is_read_without_the_rest_of_the_tensor(tmp_path: Path) -> None:
    shape = (4096, 1024)  # 16 MiB
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    pieces = []
    for index in range(4):
        box = Box((0, 256 * index), (4096, 256))
        values = whole[box.within(Box.whole(shape))].reshape(-1)
        for start, stop in [(0, 300_001), (300_001, box.numel)]:
            pieces.append(StatePiece("master", Piece("x", shape, box, (start, stop)), values[start:stop]))
    save_checkpoint(tmp_path / "step-1", pieces, info())
    del pieces, values
    with Checkpoint.open(tmp_path / "step-1") as checkpoint:
        with _Allocations() as allocations:
            part = checkpoint.read_piece("master", Piece("x", shape, Box.whole(shape), (1_000_001, 1_100_001)))
        assert part is not None
        assert torch.equal(part, whole.view(-1)[1_000_001:1_100_001])
        assert allocations.largest < 1 << 20
        with _Allocations() as allocations:
            found = checkpoint.read("master", "x")
        assert torch.equal(found, whole)
        assert allocations.largest <= whole.nbytes


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes; views, as of a mapped file, are no new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(item.alias_info for item in function._schema.returns):
            self.largest = max(self.largest, result.nbytes)
        return result


# --- which checkpoints a run has ---


def test_a_run_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000011").mkdir()  # no manifest: no checkpoint
    (checkpoints / ".step-00000012.partial").mkdir()
    (checkpoints / ".step-00000012.partial" / MANIFEST).write_text("{}")
    (checkpoints / "notes.txt").write_text("mine")
    newest = checkpoints / "step-00000010"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000002", "step-00000009", "step-00000010"]
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(checkpoints) == resolve_checkpoint(newest) == newest


def test_where_no_checkpoint_is(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "absent") == []
    with pytest.raises(MegaloopError, match=re.escape(f"checkpoint {tmp_path / 'absent'}: no such directory")):
        resolve_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(MegaloopError, match=r"cannot be read .File name too long"):
        resolve_checkpoint(tmp_path / ("x" * 300))
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(MegaloopError, match=f"no complete checkpoint in {re.escape(str(path))}: expected"):
            resolve_checkpoint(path)
    with pytest.raises(MegaloopError, match=r"no manifest\.json"):
        Checkpoint.open(tmp_path)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    gone = prune(checkpoints, keep=2)
    assert [path.name for path in gone] == ["step-00000001", "step-00000002"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000010", "step-00000011"]
    assert prune(checkpoints, keep=2) == []
    with pytest.raises(ValueError, match="at least 1"):
        prune(checkpoints, keep=0)


def test_prune_ends_deletions_that_were_interrupted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000001" / MANIFEST).unlink()
    (checkpoints / "step-00000004").mkdir()  # newer: not the beginning of a deletion
    gone = prune(checkpoints, keep=2)
    assert [path.name for path in gone] == ["step-00000001"]
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-0000000{step}" for step in (2, 3, 4)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, salt=500)
    result = save(tmp_path, 1)
    assert [path.name for path in result.path.parent.iterdir()] == ["step-00000001"]
    assert_reads_in_any_layout(result.path)


def test_the_next_save_clears_what_killed_ones_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".step-00000002.partial" / "model").mkdir(parents=True)
    (checkpoints / "step-00000001").rename(checkpoints / ".step-00000001.replaced")  # killed between two renames
    (checkpoints / ".mine.partial").mkdir()
    save(tmp_path, 3)
    assert sorted(path.name for path in checkpoints.iterdir()) == [".mine.partial", "step-00000001", "step-00000003"]
    assert_reads_in_any_layout(checkpoints / "step-00000001")


def test_the_manifest_tells_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 3).path
    with Checkpoint.open(path) as checkpoint:
        manifest = checkpoint.manifest
        assert checkpoint.tokenizer == path / "tokenizer.model"
    assert (manifest.run, manifest.step) == (run_state(3), 3)
    assert (manifest.precision, manifest.config) == ("bf16", {"name": "test"})
    assert manifest.plan == DepthPlan.plain(1)
    assert manifest.model == info().model


def test_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    with Checkpoint.open(save(tmp_path, 1).path) as checkpoint:
        model = info().model
        check_same_model(checkpoint.manifest, model, DepthPlan.plain(1), 24)
        with pytest.raises(MegaloopError) as raised:
            check_same_model(checkpoint.manifest, model.model_copy(update={"ffn_size": 32}), DepthPlan.plain(2), 24)
        with pytest.raises(MegaloopError) as long:
            check_same_model(
                checkpoint.manifest, model.model_copy(update={"ffn_size": 10**4000}), DepthPlan.plain(1), 24
            )
    assert "it holds depth 1, ffn_size 16; the configuration asks for depth 2, ffn_size 32" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(long.value)) < 500


def test_a_path_that_no_message_could_show() -> None:
    with pytest.raises(MegaloopError, match="File name too long") as raised:
        resolve_checkpoint(Path("x" * 5000))
    assert len(str(raised.value)) < 1100


def test_the_documentation_reads_a_checkpoint(tmp_path: Path, ranks_4: RankPool) -> None:
    (path, _), *_ = ranks_4.run(_save_as_rank, tmp_path, 2, 2)
    text = (Path(__file__).parents[2] / "docs" / "CHECKPOINTS.md").read_text()
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def read" in block)
    names: dict[str, Any] = {}
    exec(snippet, names)
    for state_name in STATE_NAMES:
        for name, shape in SHAPES.items():
            assert torch.equal(names["read"](path, state_name, name), tensor(state_name, name, shape))
    described = text.split("## manifest.json")[1].split("### Pieces")[0].split("### The run's state")
    listed = [set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) for part in described]
    assert listed == [set(Manifest.model_fields), set(RunState.model_fields)]
