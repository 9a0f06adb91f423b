"""Reading YAML: one kind of error, whatever the text; what is fine stays as it was."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config.yaml_text import parse_yaml, read_yaml
from megaloop.errors import MegaloopError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2024-13-45", r"not YAML \(month must be in 1..12\)"),
        ("9" * 5000, "a number of 5000 characters, line 1"),
        ("a: 1" + ":1" * 50_000, "a number of 100001 characters"),
        ("!!int abc", "not YAML"),
        ("!!bool maybe", "not YAML"),
        ("!!timestamp x", "not YAML"),
        ("!!float ''", "not YAML"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("[" * 2000, "nested more than 50 deep"),
        ("- " * 3000, "nested more than 50 deep"),
        (BOMB, "aliases make it more than"),
        ("&a [*a]", "an alias to something that holds it"),
        ("a: 1\nb: 2\na: 3", "key 'a' is there twice, line 3"),
        ("a: {b: 1, b: 2}", "key 'b' is there twice"),
        ("a: \x1b[2J", "not YAML"),
        ("x" * 300_000, "300000 characters, expected at most 262144"),
        ("\ud800", "not YAML"),
    ],
    ids=range(17),
)
def test_what_is_no_yaml_is_one_kind_of_error(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(MegaloopError, match=message) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert time.process_time() - began < 10


def test_aliases_and_merges_that_stay_small_are_fine() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: {<<: {<<: *a, x: 4}, z: 5}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_what_yaml_writes_reads_back(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@given(st.text(st.sampled_from("a1:-[]{}&*!|>'\"#%@,?\n \\.<=~e_0xZ\t\ud800\x85"), max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(MegaloopError):
        parse_yaml(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(FileNotFoundError):
        read_yaml(path)
    path.write_bytes("name: a".encode("utf-16"))
    with pytest.raises(MegaloopError, match="not UTF-8: byte 0"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfname: a")  # a byte order mark is no part of the first key
    assert read_yaml(path) == {"name": "a"}
    for other in (tmp_path, tmp_path / "a\0b", tmp_path / ("n" * 300), path / "x"):
        with pytest.raises(MegaloopError, match="cannot be read"):
            read_yaml(other)
