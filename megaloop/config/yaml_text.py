"""The one reader of YAML: configurations, overrides, sites' settings.

Whatever stands in the text, the only error is :class:`megaloop.errors.MegaloopError`. PyYAML alone raises others too (a
date that is none, an integer of thousands of digits, ``!!int abc``), recurses as deep as the text nests, takes the last of
two equal keys without a word, and makes of a kilobyte of aliases a value of gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megaloop.errors import MegaloopError
from megaloop.text import printable

__all__ = ["parse_yaml", "read_yaml"]

_LARGEST = 1 << 18
"""Characters of a text; a configuration has thousands. With its aliases written out it may be twice as long."""
_DEEPEST = 50
"""Sections, lists and mappings within each other."""
_LONGEST_NUMBER = 100
"""Characters of a number."""


class _Refused(yaml.YAMLError):
    """Something that PyYAML would take."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; refuses what is too deep, too large or said twice, before anything is made of it."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth >= _DEEPEST:
            raise _Refused(f"nested more than {_DEEPEST} deep")
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not alias:
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:
            raise _Refused("an alias to something that holds it")
        return node

    def _size(self, node: yaml.Node) -> int:
        """Characters of a node as if its aliases were written out."""
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if (known := (key.tag, str(key.value))) in seen:
                    raise _Refused(f"key {printable(key.value, 80)!r} is there twice{_place(key)}")
                seen.add(known)
                parts += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        else:
            if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _LONGEST_NUMBER:
                raise _Refused(f"a number of {len(node.value)} characters{_place(node)}")
            return 1 + len(node.value)
        size = 1 + sum(self._sizes[id(part)] for part in parts)
        if size > 2 * _LARGEST:
            raise _Refused(f"aliases make it more than {2 * _LARGEST} characters")
        return size


def _place(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}" if node.start_mark is not None else ""


def parse_yaml(text: str) -> Any:
    """The value that a text holds.

    Raises:
        MegaloopError: it is not YAML, or is so only by name; the message says why and leaves it to the caller to say where.
    """
    if len(text) > _LARGEST:
        raise MegaloopError(f"{len(text)} characters, expected at most {_LARGEST}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        problem = printable(error.problem or error.context or "cannot be read", 200)
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise MegaloopError(f"not YAML ({problem}{where})") from None
    except _Refused as error:
        raise MegaloopError(str(error)) from None
    except Exception as error:  # whatever a constructor makes of a text: ValueError, OverflowError, KeyError, ...
        raise MegaloopError(f"not YAML ({printable(' '.join(str(error).split()), 200)})") from None


def read_yaml(path: Path) -> Any:
    """The value that a file holds.

    Raises:
        FileNotFoundError: no such file (the caller knows what to do about it).
        MegaloopError: as :func:`parse_yaml` does, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * _LARGEST + 4)
        return parse_yaml(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise MegaloopError(f"cannot be read (not UTF-8: byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise MegaloopError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
