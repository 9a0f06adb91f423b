"""YAML and overrides from the command line into a :class:`Config`; what is wrong with them, in one line."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megaloop.config.run import Config
from megaloop.config.yaml_text import parse_yaml, read_yaml
from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable, quoted

__all__ = ["fields", "load_config", "parse_override"]


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"train.steps=10"`` as (["train", "steps"], 10); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise MegaloopError(f"override {quoted(text)}: expected key=value, for example train.steps=100")
    try:
        return key.strip().split("."), parse_yaml(value)
    except MegaloopError as error:
        raise MegaloopError(f"override {quoted(text)}: the value is {error}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, validate.

    Raises:
        MegaloopError: no such file, not YAML, an unknown key (the nearest known one is named), a bad value.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise MegaloopError(f"configuration {path}: no such file") from None
    except MegaloopError as error:
        raise MegaloopError(f"configuration {path}: {error}") from None
    if not isinstance(values, dict):
        raise MegaloopError(f"configuration {path}: expected a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        keys, value = parse_override(override)
        _set(values, keys, value, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise MegaloopError(f"configuration {path}: {_explain(error)}") from None
    config.check()
    return config


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    node: Any = values
    for key in keys[:-1]:
        if isinstance(node, list):
            node = node[_place(node, key, override)]
            continue
        if not isinstance(node, dict):
            raise _no_section(override, key)
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    if isinstance(node, list):
        node[_place(node, keys[-1], override)] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise _no_section(override, keys[-1])


def _no_section(override: str, key: str) -> MegaloopError:
    return MegaloopError(f"override {quoted(override)}: {quoted(key)} lies under a value that is no section")


def _place(items: list[Any], key: str, override: str) -> int:
    """Which element of a list a key means."""
    place = parse_whole(key)
    if place is None or place >= len(items):
        have = f"places 0 to {len(items) - 1}" if items else "none"
        raise MegaloopError(f"override {quoted(override)}: {quoted(key)} is no element of this list; it has {have}")
    return place


def fields(model: type[BaseModel] | None = None, prefix: str = "", item: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, pydantic's field) of every value and section of a configuration, parents first.

    Args:
        item: what stands for an element of a list in the names: ``"0."``, or nothing.
    """
    for name, field in (model or Config).model_fields.items():
        yield prefix + name, field
        section, listed = _section_of(field.annotation)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.{item if listed else ''}", item)


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if it does, and whether as a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in typing.get_args(annotation):
        section, listed = _section_of(inner)
        if section is not None:
            return section, listed or typing.get_origin(annotation) is tuple
    return None, False


_BRANCHES = (
    "tuple[StageConfig, ...]",
    "PhaseWeightsConfig",
)  # pydantic's names of what a value may be instead of plain


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error, as one line."""
    errors: list[Mapping[str, Any]] = [*error.errors()]
    # of a schedule that is a list, what is wrong inside, not that it is no text; an unknown key before what it left out
    listed = [
        problem for problem in errors if problem["loc"][-1] not in _BRANCHES and set(problem["loc"]) & set(_BRANCHES)
    ]
    first = min(listed or errors[:1], key=lambda item: item["type"] != "extra_forbidden")
    if first["loc"][:2] == ("growth", "schedule") or "weight" in first["loc"]:
        plain_names = ("str", "constrained-float", *_BRANCHES)
        first = {**first, "loc": tuple(part for part in first["loc"] if part not in plain_names)}
    where = printable(".".join(str(part) for part in first["loc"]), 200)
    if first["type"] == "missing":
        return f"{where}: missing"
    if first["type"] != "extra_forbidden":
        message, found = printable(first["msg"].removeprefix("Value error, "), 300), quoted(first["input"])
        return f"{where}: {message}" + (
            "" if isinstance(first["input"], str) and found in message else f" (found {found})"
        )
    plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    return f"unknown key {where!r}; {_nearest(plain)}"


def _nearest(key: str) -> str:
    """What somebody may have meant by a key that there is not; what there is, where nothing is like it."""
    names = [name for name, _ in fields(Config)]
    parent, _, leaf = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]
    if len(key) <= 100:  # comparing takes time in proportion to the square
        if near := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
            return f"did you mean {'.'.join(filter(None, [parent, near[0]]))!r}?"
        # the right name in the wrong section, or the whole of it misspelt
        elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
        if near := elsewhere[:1] or difflib.get_close_matches(key, names, n=1, cutoff=0.75):
            return f"did you mean {near[0]!r}?"
    return f"{parent or 'a configuration'} has {', '.join(siblings)}"
