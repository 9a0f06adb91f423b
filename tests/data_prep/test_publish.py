"""Whenever publishing is cut off, one whole data set is there, the old one or the new; what is left goes with the next."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from data_prep.publish import Output
from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import file_sha256, load_tokenizer
from tests.data.corpus import documents

PARTS = ("train", "validation", "tokenizer.model")
PLACES = ["NOTES", "data.json", *sorted(PARTS)]
CALLS = [(os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")] + [(io, "open")]
"""What touches the disk."""


class Killed(BaseException):
    """In place of a SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Small data sets by their sequence length; 16 is the old one, 8 the new."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(40)))
    for length, size in ((16, 330), (8, 310)):
        prepare([folder / "text.jsonl"], folder / str(length), vocab_size=size, sequence_length=length, workers=1)
    return {length: folder / str(length) for length in (16, 8)}


@pytest.fixture
def old(made: dict[int, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[16], tmp_path / "out")
    (tmp_path / "out" / "NOTES").write_text("mine")
    return tmp_path / "out"


def _publish(new: Path, out: Path, overwrite: bool = True) -> list[str]:
    """Write a data set as prep does, once its parts are made; returns the notes."""
    notes: list[str] = []
    with Output(out, overwrite, []) as output:
        _opened.append(output)
        with _calls_as_they_are():
            description = DataSet.open(new).description
            for name in PARTS:
                copy: Callable[..., Any] = shutil.copytree if (new / name).is_dir() else shutil.copyfile
                copy(new / name, output.folder / name)
        output.publish(description, PARTS, (), notes.append)
    return notes


_opened: list[Output] = []
_real = {(module, name): getattr(module, name) for module, name in CALLS}
_real[os, "fsync"] = lambda descriptor: None  # no power fails here, and waiting for the disk takes most of the time


@contextlib.contextmanager
def _calls_as_they_are() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), function in _real.items():
            patch.setattr(module, name, function)
        yield


@contextlib.contextmanager
def _failing(number: int, error: BaseException, once: bool) -> Iterator[list[int]]:
    """The ``number``-th call that touches the disk raises, and all after it unless ``once``; yields [calls made]."""
    made = [0]

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made[0] += 1
            if made[0] == number or (made[0] > number and not once):
                raise error
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for (module, name), function in _real.items():
            patch.setattr(module, name, wrapped(function))
        yield made
    output = _opened.pop() if _opened else None
    if isinstance(error, Killed) and output is not None and output._lock is not None:
        with contextlib.suppress(OSError):  # as the kernel does
            os.close(output._lock)


def _length(out: Path) -> int | None:
    """The sequence length of the data set that is there, every byte of it right; None: there is none."""
    if not (out / "data.json").exists():
        return None
    dataset = DataSet.open(out)
    dataset.verify()
    assert file_sha256(dataset.tokenizer) == dataset.tokenizer_sha256
    assert dataset.split("train").sample(0).tokens.max() < load_tokenizer(dataset.tokenizer).vocab_size
    return dataset.sequence_length


def test_a_kill_at_any_step_leaves_the_old_data_set_or_the_new_one(made: dict[int, Path], old: Path) -> None:
    seen: list[int | None] = []
    for number in itertools.count(1):
        shutil.rmtree(old)
        shutil.copytree(made[16], old)
        (old / "NOTES").write_text("mine")
        with _failing(number, Killed(), once=False) as calls, contextlib.suppress(Killed):
            _publish(made[8], old)
        seen.append(_length(old))
        _publish(made[8], old)
        assert sorted(os.listdir(old)) == PLACES, f"killed at call {number}"
        assert _length(old) == 8
        if calls[0] < number:  # it was not killed any more
            break
    before = seen.index(8)
    assert seen == [16] * before + [8] * (len(seen) - before)  # the old one up to a certain step, then the new one
    assert before > 10
    assert len(seen) - before > 10


def test_a_first_prep_that_is_killed_leaves_none_or_a_whole_one(made: dict[int, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: set[int | None] = set()
    for number in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        with _failing(number, Killed(), once=False) as calls, contextlib.suppress(Killed):
            _publish(made[8], out, overwrite=False)
        length = _length(out)
        seen.add(length)
        _publish(made[8], out, overwrite=length is not None)
        assert sorted(os.listdir(out)) == PLACES[1:]
        assert _length(out) == 8
        if calls[0] < number:
            break
    assert seen == {None, 8}


@pytest.mark.parametrize("once", [True, False])
def test_a_disk_that_fails_at_any_step_loses_nothing(made: dict[int, Path], old: Path, once: bool) -> None:
    """Once, or from then on, so that nothing can be cleaned up either."""
    seen: set[tuple[int | None, bool, bool]] = set()
    for number in itertools.count(1):
        shutil.rmtree(old)
        shutil.copytree(made[16], old)
        (old / "NOTES").write_text("mine")
        error, notes = None, []
        with _failing(number, OSError(errno.EIO, "Input/output error"), once) as calls:
            try:
                notes = _publish(made[8], old)
            except MegaloopError as raised:
                error = str(raised)
        places = sorted(os.listdir(old))
        seen.add((_length(old), error is None, bool(notes)))
        if error is not None:
            left = [str(old / name) for name in places if name not in PLACES]
            assert "cannot be written (Input/output error)" in error
            assert "the data set that was there is as it was" in error
            assert all(name in error for name in left)
            assert ("nothing was left behind" in error) == (not left)
        elif places != PLACES:
            assert notes or ".partial-" in str(places)
        if calls[0] < number:
            break
    assert {(16, False, False), (8, True, True), (8, True, False)} >= seen >= {(16, False, False), (8, True, True)}


def test_links_are_replaced_and_what_they_point_to_stays(made: dict[int, Path], old: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train", "tokenizer.model", "data.json"):
        (old / name).rename(elsewhere / name)
        (old / name).symlink_to(elsewhere / name)
    shutil.rmtree(old / "validation")
    (old / "validation").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(old)
    before = {path: path.stat().st_size for path in elsewhere.rglob("*")}
    assert _publish(made[8], tmp_path / "link") == []
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(old)) == PLACES
    assert not any((old / name).is_symlink() for name in PLACES)
    assert _length(tmp_path / "link") == 8
    assert {path: path.stat().st_size for path in elsewhere.rglob("*")} == before


def test_a_link_to_nowhere_is_refused_by_name(made: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MegaloopError, match=r"link is a link to .*nowhere, which does not exist; make that directory"):
        _publish(made[8], tmp_path / "link")


def test_only_folders_of_preps_that_have_ended_are_removed(made: dict[int, Path], old: Path) -> None:
    (old / ".partial-1-of-an-older-version" / "train").mkdir(parents=True)
    with Output(old, True, []) as living:
        _publish(made[8], old)
        assert living.folder.is_dir()
    assert sorted(os.listdir(old)) == PLACES
