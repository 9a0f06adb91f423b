"""``grow_checkpoint``: every tensor is its parent's, nothing else changes, and memory does not grow with the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaloop.checkpoint import Checkpoint, CheckpointInfo, RunState, save_checkpoint
from megaloop.checkpoint.depth import grow_checkpoint, loop_checkpoint
from megaloop.checkpoint.manifest import MANIFEST, Manifest
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, Growth, Operator, grow
from megaloop.errors import MegaloopError
from megaloop.layout.pieces import STATE_NAMES, Box, Piece, StatePiece
from megaloop.layout.transfers import Moments
from megaloop.model import initial_values, parameter_specs
from tests.checkpoint.states import info, reseal

MODEL = ModelConfig(hidden_size=8, num_heads=2, num_kv_heads=1, ffn_size=12, vocab_size=24)
FOUR = DepthPlan.plain(4)


def _state(model: ModelConfig, plan: DepthPlan, state_names: tuple[str, ...]) -> Iterator[StatePiece]:
    """Other values for every tensor of every kind; masters and moments in two fragments, as two replicas hold them."""
    for number, (name, spec) in enumerate(parameter_specs(model, plan, model.vocab_size or 0).items()):
        box = Box.whole(spec.shape)
        for state_name in state_names:
            generator = torch.Generator().manual_seed(1000 * STATE_NAMES.index(state_name) + number)
            values = torch.randn(spec.shape, generator=generator)
            if state_name == "model":
                yield StatePiece(state_name, Piece(name, spec.shape, box), values.bfloat16())
                continue
            middle = box.numel // 3
            for flat in ((0, middle), (middle, box.numel)):
                yield StatePiece(state_name, Piece(name, spec.shape, box, flat), values.reshape(-1)[slice(*flat)])


def _info(model: ModelConfig = MODEL, plan: DepthPlan = FOUR) -> CheckpointInfo:
    return info(5, model=model, plan=plan)


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    """A bf16 checkpoint of 4 layers."""
    tokenizer = tmp_path / "tokenizer.source"
    tokenizer.write_bytes(b"as if sentencepiece had written it")
    return save_checkpoint(tmp_path / "shallow", _state(MODEL, FOUR, STATE_NAMES), _info(), tokenizer).path


@pytest.mark.parametrize("moments", ["copy", "zero"])
@pytest.mark.parametrize("operator", ["lidas", "midas", "stack", "last", "random"])
def test_every_tensor_is_its_parents(tmp_path: Path, shallow: Path, operator: Operator, moments: Moments) -> None:
    result = grow_checkpoint(
        shallow, tmp_path / "deep", operator, DepthSpec.parse(8), 2 if operator != "stack" else 4, moments=moments
    )
    growth = grow(FOUR, operator, 8, 2 if operator != "stack" else 4)
    assert (result.layers_before, result.layers, result.step) == (4, 8, 5)
    specs = parameter_specs(MODEL, growth.plan, 24)
    with Checkpoint.open(shallow) as before, Checkpoint.open(tmp_path / "deep", verify="checksums") as after:
        assert after.manifest.plan == growth.plan
        assert result.parameters == sum(torch.Size(spec.shape).numel() for spec in specs.values())
        for state_name in STATE_NAMES:
            assert after.names(state_name) == list(specs)
            for name in specs:
                expected = _expected(before, state_name, name, growth, moments)
                found = after.read(state_name, name)
                assert found.dtype == (torch.bfloat16 if state_name == "model" else torch.float32)
                assert torch.equal(found, expected.to(found.dtype)), f"{state_name} of {name}"


def _expected(before: Checkpoint, state_name: str, name: str, growth: Growth, moments: str) -> Tensor:
    if not name.startswith("layers."):
        return before.read(state_name, name)
    _, layer, rest = name.split(".", 2)
    source = growth.source(int(layer))
    spec = parameter_specs(MODEL, growth.plan, 24)[name]
    if source is None:
        fresh = initial_values(name, spec, 7, (0,) * len(spec.shape), spec.shape)
        return fresh if state_name in ("model", "master") else torch.zeros(spec.shape)
    if moments == "zero" and state_name in ("exp_avg", "exp_avg_sq") and source != int(layer):
        return torch.zeros(spec.shape)
    return before.read(state_name, f"layers.{source}.{rest}")


@pytest.mark.parametrize("how", ["grow", "loop"])
def test_all_but_the_depth_stays(tmp_path: Path, shallow: Path, how: str) -> None:
    if how == "grow":
        grow_checkpoint(shallow, tmp_path / "deep", "midas", DepthSpec.parse(8))
    else:
        loop_checkpoint(shallow, tmp_path / "deep", DepthSpec.parse("1-2x3-1"))
    old, new = (Manifest.model_validate_json((path / MANIFEST).read_bytes()) for path in (shallow, tmp_path / "deep"))
    anew = {"plan", "growth", "created", "checksum", "topology", "files", "tensors", "run"}
    for key in Manifest.model_fields.keys() - anew:
        assert getattr(new, key) == getattr(old, key), key
    for key in RunState.model_fields.keys() - {"depths"}:
        assert getattr(new.run, key) == getattr(old.run, key) != RunState.model_fields[key].default, key
    assert new.run.depths[:-1] == old.run.depths
    last = new.run.depths[-1]
    assert (last.step, last.layers, last.grown) == ((5, 8, True) if how == "grow" else (5, 4, False))
    if how == "loop":
        return
    assert new.growth is not None
    assert (new.growth.operator, new.growth.stage) == ("midas", None)
    assert new.tokenizer is not None
    assert new.tokenizer == old.tokenizer
    assert (tmp_path / "deep" / "tokenizer.model").read_bytes() == b"as if sentencepiece had written it"


def test_weights_without_moments_stay_without(tmp_path: Path) -> None:
    """As an imported model is."""
    path = save_checkpoint(tmp_path / "shallow", _state(MODEL, FOUR, ("model", "master")), _info()).path
    grow_checkpoint(path, tmp_path / "deep", "lidas", DepthSpec.parse(12))
    with Checkpoint.open(tmp_path / "deep") as deep:
        assert list(deep.manifest.tensors) == ["model", "master"]


def test_growing_twice_is_growing_once(tmp_path: Path, shallow: Path) -> None:
    grow_checkpoint(shallow, tmp_path / "8", "lidas", DepthSpec.parse(8))
    grow_checkpoint(tmp_path / "8", tmp_path / "8-12", "lidas", DepthSpec.parse(12))
    grow_checkpoint(shallow, tmp_path / "12", "lidas", DepthSpec.parse(12))
    with Checkpoint.open(tmp_path / "8-12") as twice, Checkpoint.open(tmp_path / "12") as once:
        assert twice.manifest.plan == once.manifest.plan
        for state_name in STATE_NAMES:
            assert all(
                torch.equal(twice.read(state_name, name), once.read(state_name, name))
                for name in once.names(state_name)
            )


def test_progress_is_told_to_the_end(tmp_path: Path, shallow: Path) -> None:
    told: list[tuple[str, int, int]] = []
    grow_checkpoint(
        shallow, tmp_path / "deep", "lidas", DepthSpec.parse(8), on_bytes=lambda *all_three: told.append(all_three)
    )
    for what in ("verifying", "writing"):
        done = [count for item, count, _ in told if item == what]
        (total,) = {total for item, _, total in told if item == what}
        assert done == sorted(done)
        assert done[-1] == total
    assert [what for what, _, _ in told] == sorted((what for what, _, _ in told), key=["verifying", "writing"].index)


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Private memory of the process while it writes 400 MB, of tensors of 4 MB at most."""
    model = replace_widths(hidden=512, ffn=2048, vocab=512)
    path = save_checkpoint(tmp_path / "shallow", _state(model, FOUR, STATE_NAMES), _info(model)).path
    resident: list[int] = []
    before = _private_bytes()
    result = grow_checkpoint(
        path,
        tmp_path / "deep",
        "lidas",
        DepthSpec.parse(8),
        on_bytes=lambda what, done, total: resident.append(_private_bytes()),
    )
    assert result.bytes > 400e6
    assert max(resident) - before < 40e6


def replace_widths(hidden: int, ffn: int, vocab: int) -> ModelConfig:
    return MODEL.model_copy(update={"hidden_size": hidden, "ffn_size": ffn, "vocab_size": vocab})


def _private_bytes() -> int:
    """Resident memory without mapped files, which the kernel drops when it needs the room."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lidas", 9), "9 layers cannot be reached from 4 by blocks of 4"),
        (("lidas", 4), "has 4 layers already; choose a deeper target"),
        (("lidas", 2), "from 4 to 2 layers; growth never shrinks"),
        (("lidas", 8, 5), "a block of 5 layers, and 4 to copy from"),
        (("stack", 10), "stack repeats all 4 layers, which never makes 10"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_reached(
    tmp_path: Path, shallow: Path, arguments: tuple[Operator, int, *tuple[int, ...]], message: str
) -> None:
    operator, layers, *block = arguments
    with pytest.raises(MegaloopError, match=message):
        grow_checkpoint(shallow, tmp_path / "deep", operator, DepthSpec.parse(layers), *block)
    assert not list(tmp_path.glob("*deep*"))


def test_damage_is_found_before_anything_is_written(tmp_path: Path, shallow: Path) -> None:
    weights = shallow / "model" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(MegaloopError, match=r"rank-00000\.safetensors is altered: its checksum is"):
        grow_checkpoint(shallow, tmp_path / "deep", "lidas", DepthSpec.parse(8))
    assert not list(tmp_path.glob("*deep*"))


def test_a_checkpoint_that_lacks_a_layer_of_its_plan_is_refused(tmp_path: Path, shallow: Path) -> None:
    manifest = Manifest.model_validate_json((shallow / MANIFEST).read_bytes())
    longer = manifest.model_copy(update={"plan": DepthPlan.plain(5)})
    reseal(shallow, longer)
    with pytest.raises(MegaloopError, match=r"model of layers.4.attention.wk.weight is not there, its plan asks for"):
        grow_checkpoint(shallow, tmp_path / "deep", "lidas", DepthSpec.parse(9))


def test_an_output_that_exists_is_left_alone(tmp_path: Path, shallow: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(MegaloopError, match="already exists"):
        grow_checkpoint(shallow, tmp_path / "deep", "lidas", DepthSpec.parse(8))


def test_a_full_disk_leaves_nothing(shallow: Path, small_disk: Path) -> None:
    with pytest.raises(MegaloopError, match="No space left on device"):
        grow_checkpoint(shallow, small_disk / "deep", "lidas", DepthSpec.parse(24))
    assert list(small_disk.iterdir()) == []
