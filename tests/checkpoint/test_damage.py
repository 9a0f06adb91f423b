"""Damage is named, and nothing is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file, save_file

from megaloop.checkpoint import resolve_checkpoint
from megaloop.checkpoint.manifest import MANIFEST
from megaloop.errors import DamagedCheckpoint, MegaloopError
from tests.checkpoint.states import read_all, reseal, save

MODEL = "model/rank-00000.safetensors"
OPTIM = "optim/rank-00000.safetensors"
TOKENIZER = "tokenizer.model"
FILES = [MODEL, OPTIM, TOKENIZER]
TENSORS = [MODEL, OPTIM]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 1).path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(saved, tmp_path / "step-00000001"))


def refused(path: Path, verify: Any = "checksums", state_name: type[MegaloopError] = MegaloopError) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(state_name) as raised:
        read_all(path, verify)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"checkpoint {path}: ")
    return message.removeprefix(f"checkpoint {path}: ")


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as someone would who also corrects its checksum."""
    value = json.loads((path / MANIFEST).read_bytes())
    edit(value)
    value["checksum"] = "0" * 32
    text = json.dumps(value, indent=1)
    checksum = xxhash.xxh3_128_hexdigest(text.encode())
    (path / MANIFEST).write_text(text.replace("0" * 32, checksum, 1))


# --- files ---


@pytest.mark.parametrize("verify", ["sizes", "checksums"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["removed", "truncated", "emptied", "extended", "a directory", "a circle of links"])
def test_a_damaged_file_is_named(checkpoint: Path, name: str, damage: str, verify: str) -> None:
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "emptied":
        file.touch()
    elif damage == "extended":
        file.write_bytes(content + b"\0")
    elif damage == "a directory":
        file.mkdir()
    elif damage == "a circle of links":
        file.symlink_to(file)
    expected = {
        "removed": "is missing",
        "truncated": f"is truncated: {len(content) - 1} bytes, expected {len(content)}",
        "emptied": f"is truncated: 0 bytes, expected {len(content)}",
        "extended": f"is altered: {len(content) + 1} bytes, expected {len(content)}",
        "a directory": "is no file",
        "a circle of links": "cannot be read (Symlink loop",
    }[damage]
    assert refused(checkpoint, verify, DamagedCheckpoint).startswith(f"{name} {expected}")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    content = file.read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert refused(checkpoint, state_name=DamagedCheckpoint).startswith(f"{name} is altered: its checksum is ")


def test_any_flipped_byte_of_the_manifest_is_noticed(checkpoint: Path) -> None:
    file = checkpoint / MANIFEST
    content = file.read_bytes()
    for position in [*range(120), *range(120, len(content), 17)]:
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert refused(checkpoint, "sizes", DamagedCheckpoint).startswith(MANIFEST)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert refused(checkpoint, "sizes", DamagedCheckpoint).startswith(f"{MANIFEST} is ")


@pytest.mark.parametrize(
    "content",
    [b"\0\1\2 no JSON", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"{}", b'{"format_version": 1}'],
    ids=["bytes", "depth", "not UTF-8", "null", "list", "empty", "little"],
)
def test_what_is_no_manifest(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST).write_bytes(content)
    assert refused(checkpoint).startswith(f"{MANIFEST} is damaged (")


def test_a_missing_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    assert refused(checkpoint).startswith(f"no {MANIFEST}; it is no checkpoint")
    (checkpoint / MANIFEST).mkdir()
    assert refused(checkpoint).startswith(f"{MANIFEST} is no file")


def test_a_manifest_of_the_future(checkpoint: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["format_version"] = 3
        value["something_new"] = value.pop("plan")

    edit_manifest(checkpoint, edit)
    assert refused(checkpoint) == (
        f"{MANIFEST} is of format version 3, this megaloop reads up to 2; use the megaloop that wrote it"
    )


# --- tensor files that fit their checksums and yet are wrong ---


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (64).to_bytes(8, "little") + b"{" * 64, bytes(8)],
    ids=["garbage", "huge", "no JSON", "none"],
)
def test_a_damaged_header_is_named(checkpoint: Path, name: str, header: bytes) -> None:
    file = checkpoint / name
    file.write_bytes(header + file.read_bytes()[len(header) :])
    assert refused(checkpoint).startswith(f"{name} is altered")
    reseal(checkpoint)
    assert refused(checkpoint).startswith(f"{name} is damaged (")


def test_a_header_that_disagrees_with_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / OPTIM
    tensors = load_file(file)
    size = file.stat().st_size
    key = "master/layers.0.attention.wq.weight"
    save_file({**tensors, key: tensors[key].view(2, 32)}, file, metadata={"padding": ""})
    assert abs(file.stat().st_size - size) < 100
    reseal(checkpoint)
    assert refused(checkpoint).startswith(f"{OPTIM} holds {key} as F32 [2, 32], the manifest says F32 [64]")
    save_file({**tensors, key: tensors[key].bfloat16()}, file)
    edit_manifest(checkpoint, lambda value: value["files"][1].update(bytes=size))
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    reseal(checkpoint)
    assert refused(checkpoint).startswith(f"{OPTIM} is damaged (")  # safetensors allows no padding
    del tensors[key]
    save_file({**tensors, "padding": tensors["master/norm.weight"].repeat(8)}, file)
    reseal(checkpoint)
    message = refused(checkpoint)
    assert message.startswith(f"{OPTIM} is damaged (")
    assert key in message


def test_a_dtype_that_disagrees_with_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / MODEL
    tensors = load_file(file)
    save_file({name: values.float() for name, values in tensors.items()}, file)
    reseal(checkpoint)
    assert refused(checkpoint).startswith(f"{MODEL} holds embedding.weight as F32 [24, 8], the manifest says BF16")


# --- manifests that fit their checksum and yet are wrong ---


def _piece(value: dict[str, Any], name: str = "norm.weight", state_name: str = "master") -> dict[str, Any]:
    piece: dict[str, Any] = value["tensors"][state_name][name]["pieces"][0]
    return piece


OUTSIDE = ["/etc/hostname", "../secret", "model/../../secret", "..", "", "a\nb", "C:\\x", "/"]


@pytest.mark.parametrize("path", OUTSIDE, ids=[repr(path) for path in OUTSIDE])
def test_paths_that_point_outside(checkpoint: Path, path: str) -> None:
    original = (checkpoint / MANIFEST).read_bytes()
    for edit in (
        lambda value: value["files"][0].update(path=path),
        lambda value: value["tokenizer"].update(file=path),
        lambda value: _piece(value).update(file=path),
    ):
        (checkpoint / MANIFEST).write_bytes(original)
        edit_manifest(checkpoint, edit)
        message = refused(checkpoint, "sizes")
        assert message.startswith(f"{MANIFEST} is damaged (")
        assert f"{path!r} points outside the checkpoint" in message


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_links_that_point_outside(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    assert refused(checkpoint, "sizes").startswith(name)


def test_a_link_to_the_checkpoint_itself_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(checkpoint)
    read_all(resolve_checkpoint(tmp_path / "best"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: _piece(value).update(flat=[0, 7]), "master of norm.weight: 7 of 8 values"),
        (lambda value: _piece(value).update(flat=[0, 9]), "a piece of values 0 to 9 does not lie in its box of 8"),
        (lambda value: _piece(value).update(flat=[5, 5]), "a piece of values 5 to 5 does not lie"),
        (lambda value: _piece(value).update(offset=[1]), "does not lie in shape [8]"),
        (lambda value: _piece(value).update(offset=[-1]), "greater than or equal to 0"),
        (lambda value: _piece(value).update(shape=[2, 4], offset=[0, 0]), "does not lie in shape [8]"),
        (
            lambda value: _piece(value, "embedding.weight").update(file=TOKENIZER),
            "tokenizer.model is said to hold both the tokenizer and tensors",
        ),
        (lambda value: value["files"][0].update(bytes=511), f"{MODEL} is too small for what it should hold"),
        (lambda value: _piece(value).update(file="model/other"), "model/other is not among its files"),
        (lambda value: value["tokenizer"].update(file="other"), "other is not among its files"),
        (lambda value: value["files"].append(value["files"][0]), "a file is listed twice"),
        (lambda value: value["tensors"]["master"].pop("norm.weight"), "master of norm.weight is missing"),
        (lambda value: value["tensors"]["master"]["norm.weight"]["pieces"].append(_piece(value)), "values twice"),
        (
            lambda value: value["tensors"]["master"]["norm.weight"].update(shape=[10**15]),
            "8 of 1000000000000000 values",
        ),
        (lambda value: value["tensors"]["master"]["norm.weight"].update(dtype="object"), "unknown dtype 'object'"),
        (lambda value: value["run"].update(step="1"), "run.step: Input should be a valid integer"),
        (lambda value: value.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda value: value.pop("files"), "files: Field required"),
    ],
)
def test_a_manifest_that_makes_no_sense(checkpoint: Path, edit: Any, message: str) -> None:
    edit_manifest(checkpoint, edit)
    found = refused(checkpoint, "sizes")
    assert found.startswith(f"{MANIFEST} is damaged (")
    assert message in found


@pytest.mark.parametrize("key", ["batch", "steps", "order_version"])
def test_a_number_that_no_run_has(checkpoint: Path, key: str) -> None:
    """And that no message could show."""
    edit_manifest(checkpoint, lambda value: value["run"].update({key: 10**4000}))
    assert f"run.{key}: Input should be less than" in refused(checkpoint, "sizes")


def test_boxes_that_overlap_and_leave_a_gap(checkpoint: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        whole = _piece(value, "embedding.weight", "model")
        pieces = [{**whole, "offset": [row, 0], "shape": [12, 8]} for row in (0, 6)]
        value["tensors"]["model"]["embedding.weight"]["pieces"] = pieces

    edit_manifest(checkpoint, edit)
    assert "boxes at [0, 0] and [6, 0] overlap" in refused(checkpoint)


# --- pickles ---


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("resealed", [False, True])
def test_a_planted_pickle_never_runs(checkpoint: Path, tmp_path: Path, name: str, resealed: bool) -> None:
    ran = tmp_path / "ran"
    size = (checkpoint / name).stat().st_size
    (checkpoint / name).write_bytes(pickle.dumps(_Touch(ran)).ljust(size, b"\0"))
    if resealed and name != MANIFEST:
        reseal(checkpoint)
    if resealed and name == TOKENIZER:
        read_all(checkpoint)  # the store hands the tokenizer on as a path; sentencepiece refuses it
    else:
        assert refused(checkpoint).startswith(name)
    assert not ran.exists()
    pickle.loads(pickle.dumps(_Touch(ran)).ljust(size, b"\0"))
    assert ran.exists()  # it would have told


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value["model"].update(hidden_size="wide"), "hidden_size"),
        (lambda value: value["model"].update(num_heads=3), "is not divisible by model.num_heads 3"),
        (lambda value: value["model"].update(vocab_size=None), "model.vocab_size is empty"),
        (lambda value: value["model"].update(experts=8), "experts"),
        (lambda value: value["plan"].update(order="x"), "plan.order holds something else than layer ids"),
        (lambda value: value["plan"].update(order=[0.5]), "plan.order holds something else than layer ids"),
        (lambda value: value["plan"].update(order=[]), "a plan needs at least one layer"),
        (lambda value: value["plan"].update(lineage=[3]), "list"),
        (lambda value: value["plan"].pop("order"), "order"),
        (lambda value: value["plan"].update(order=[0, 0], style={"injection": "often"}), "'often' is none of none"),
        (lambda value: value["plan"].update(order=[0, 0], style={"colour": "red"}), "colour"),
        (lambda value: value["plan"].update(order=[0, 0], style=[]), "mapping"),
        (lambda value: value["plan"].update(style={"norm": True}), "must contain exactly one loop"),
    ],
)
def test_a_decoder_that_cannot_be_built(checkpoint: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_manifest(checkpoint, edit)
    line = refused(checkpoint, "sizes")
    assert line.startswith(f"{MANIFEST} describes a decoder that this megaloop does not know (")
    assert message in line
