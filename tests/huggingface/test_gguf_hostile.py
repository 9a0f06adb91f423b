"""Whatever a GGUF file says, the answer is one line, and neither time nor memory depends on what it says."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from megaloop.errors import MegaloopError
from megaloop.huggingface.gguf import GgufModel, gguf_metadata
from megaloop.huggingface.weights import import_huggingface
from tests.huggingface.gguf_files import header, random_llama, settings_of, tensors_of, text, write_gguf

HUGE = (1 << 64) - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that can be read."""
    llama = random_llama(num_hidden_layers=1)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, settings_of(llama.config), tensors_of(llama), "Q8_0").read_bytes()


def _open(path: Path, data: bytes) -> str | None:
    """What is wrong, if something is; whatever else is raised is a mistake."""
    path.write_bytes(data)
    try:
        with GgufModel.open(path) as opened:
            for name in opened.names:
                opened.read(name)
    except MegaloopError as error:
        problem = str(error)
    else:
        return None
    assert problem.startswith(str(path))
    assert len(problem) < 2000
    assert "\n" not in problem
    return problem


def _array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + content


def _nested(depth: int) -> bytes:
    return struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQI", 4, 1, 7)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends within its magic number"),
    "another format": (b"GGML" + b"\0" * 100, "does not begin with GGUF"),
    "version 1": (header([], [], version=1), "its version is 1, 2 and 3 can be read"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "big-endian"),
    "too many tensors": (header([], [], counts=(0, HUGE)), "tensors, at most"),
    "too many keys": (header([], [], counts=(1 << 40, 0)), "keys, at most"),
    "more keys than there are": (header([], [], counts=(4096, 0)), "ends within|twice"),
    "a long key": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"", HUGE), "is said to have"),
    "a long text": (header([("x", struct.pack("<I", 8) + text(b"abc", 1 << 62))], []), "is said to have"),
    "a text beyond the end": (header([("x", struct.pack("<I", 8) + text(b"abc", 1 << 25))], []), "ends within"),
    "a long array": (header([("x", _array(0, HUGE))], []), "elements, at most"),
    "an array beyond the end": (header([("x", _array(12, 1 << 20))], []), "ends within"),
    "texts beyond the end": (header([("x", _array(8, 1 << 20))], []), "ends within"),
    "many arrays": (header([(str(n), _array(0, 1 << 20, b"\0" * (1 << 20))) for n in range(3)], []), "in all"),
    "nested arrays": (header([("x", _nested(5))], []), "nested more than 4 deep"),
    "endlessly nested arrays": (header([("x", _nested(100_000))], []), "nested more than 4 deep"),
    "arrays of empty arrays": (header([("x", _array(9, 1 << 21, struct.pack("<IQ", 4, 0) * 4))], []), "value of x|possible"),
    "an unknown type": (header([("x", struct.pack("<II", 13, 0))], []), "of type 13"),
    "a bool of 2": (header([("x", struct.pack("<IB", 7, 2))], []), "expected true or false"),
    "no UTF-8": (header([("x", struct.pack("<I", 8) + text(b"\xff\xfe"))], []), "not UTF-8"),
    "a key twice": (header([("x", 1), ("x", 2)], []), "key x is there twice"),
    "alignment 0": (header([("general.alignment", 0)], []), "general.alignment is 0"),
    "alignment of text": (header([("general.alignment", "32")], []), "general.alignment is '32'"),
    "no dimensions": (header([], [("t", (), 0, 0)]), "has 0 dimensions"),
    "many dimensions": (header([], [("t", (1,) * 5, 0, 0)]), "has 5 dimensions"),
    "huge dimensions": (header([], [("t", (HUGE,) * 4, 0, 0)]), "lies at"),
    "sizes that wrap around": (header([], [("t", (1 << 32, 1 << 32), 0, 0)]), "lies at"),
    "no values": (header([], [("t", (0, 8), 0, 0)]), "of shape"),
    "half a block": (header([], [("t", (33,), 8, 0)]), "no multiple of 32"),
    "an offset that wraps around": (header([], [("t", (8,), 0, HUGE - 31)]), "lies at"),
    "a tensor beyond the end": (header([], [("t", (8,), 0, 0)]), "the file has"),
    "a tensor twice": (header([], [("t", (8,), 0, 0), ("t", (8,), 0, 32)]) + b"\0" * 64, "t is there twice"),
    "tensors that overlap": (header([], [("a", (16,), 0, 0), ("b", (8,), 0, 32)]) + b"\0" * 64, "a and b overlap"),
    "an unknown quantisation": (header([], [("t", (8,), 4, 0)]) + b"\0" * 64, "quantisation of number 4"),
    "control characters": (header([("\x1b[2J", 1), ("\x1b[2J", 1)], []), r"key \\x1b\[2J is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_file_that_lies_takes_no_memory(tmp_path: Path, what: str) -> None:
    data, message = LIES[what]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(MegaloopError, match=message):
            gguf_metadata(path)
        assert tracemalloc.get_traced_memory()[1] < (48 << 20 if what == "many arrays" else 1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, model: bytes) -> None:
    length = model.rindex(b"output_norm.weight") + 64
    places = [*range(length), *range(length, len(model), 997), len(model) - 1]
    for size in places:
        assert _open(tmp_path / "model.gguf", model[:size]) is not None, size
    assert _open(tmp_path / "model.gguf", model) is None


@pytest.mark.slow
def test_a_flipped_byte_is_refused_or_changes_a_value(tmp_path: Path, model: bytes) -> None:
    length = model.rindex(b"output_norm.weight") + 64
    generator = random.Random(0)
    refused = 0
    for at in range(length):
        data = bytearray(model)
        data[at] ^= generator.choice([1, 128, 255, generator.randrange(1, 256)])
        refused += _open(tmp_path / "model.gguf", bytes(data)) is not None
    assert refused > length // 2


@pytest.mark.parametrize("seed", range(30))
def test_garbage_does_not_get_into_a_checkpoint(tmp_path: Path, model: bytes, seed: int) -> None:
    generator = random.Random(seed)
    data = bytearray(model)
    for _ in range(generator.randrange(1, 20)):
        at = generator.randrange(len(data))
        kind = generator.randrange(3)
        if kind == 0:
            data[at] = generator.randrange(256)
        elif kind == 1:
            data[at : at + 8] = generator.choice([HUGE, 0, 1 << 31, 1 << 63]).to_bytes(8, "little")
        else:
            del data[at : at + generator.randrange(1, 100)]
    (tmp_path / "model.gguf").write_bytes(data)
    with contextlib.suppress(MegaloopError):  # only values may have changed
        import_huggingface(tmp_path / "model.gguf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(MegaloopError, match="no such file"):
            gguf_metadata(path)
