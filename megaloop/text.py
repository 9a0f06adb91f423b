"""Text that came from outside, made fit to be shown: no control characters, no endless lines, no markup."""

from __future__ import annotations

import unicodedata
from typing import Any

__all__ = ["printable"]

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that a terminal obeys or hides: controls, direction marks, surrogates, line separators."""


def printable(value: Any, limit: int = 200) -> str:
    """What a value looks like on one line: control characters as escapes, whatever is longer than ``limit`` shortened.

    Names, keys and values that a user, a file or a checkpoint gave go through this before they stand in a message.
    """
    text = str(value[: 4 * limit] if isinstance(value, str) else value)
    shown = "".join(_escape(character) for character in text[: 4 * limit])
    if len(shown) <= limit and len(text) <= 4 * limit:
        return shown
    return shown[: limit - 3] + "..."


def _escape(character: str) -> str:
    if character == " " or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
