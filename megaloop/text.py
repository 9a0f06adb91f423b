"""Text that came from outside, made fit to be shown: no control characters, no endless lines, no markup."""

from __future__ import annotations

import reprlib
import unicodedata
from typing import Any

__all__ = ["format_bytes", "message_line", "parse_whole", "printable", "quoted", "safe_lines", "significant"]

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


def quoted(value: Any, limit: int = 100) -> str:
    """As :func:`printable`, of a value with its quotes and brackets; of a large one, only the beginning is looked at."""
    looker = reprlib.Repr()
    looker.maxstring = looker.maxother = looker.maxlong = limit
    return printable(looker.repr(value), limit)


def message_line(message: str, limit: int = 1800) -> str:
    """An error as one line that a terminal can show; of one that is longer than ``limit``, the middle is left out.

    Its beginning says what was found, and its end what to do.
    """
    if len(message) > 4 * limit:
        message = f"{message[: 2 * limit]} ... {message[-2 * limit :]}"
    line = "".join(map(_escape, " ".join(message.split())))
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[-limit // 4 :]}"


def safe_lines(text: str) -> str:
    """Text of several lines as a terminal may show it: all control characters but newlines and tabs as escapes."""
    if text.isprintable():
        return text
    return "".join(character if character in "\n\t" else _escape(character) for character in text)


def parse_whole(text: str) -> int | None:
    """A whole number from 0 on as people write it, in at most 18 ASCII digits; None for anything else.

    ``str.isdigit`` is no test for it: it is true of "²", of which ``int`` makes nothing, and of thousands of digits.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def format_bytes(value: int) -> str:
    """Three significant digits with KiB, MiB, GiB or TiB."""
    for factor, suffix in ((1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB")):
        if value < 999.5 * factor:
            return f"{significant(value / factor)} {suffix}"
    return f"{significant(value / (1 << 40))} TiB"


def significant(value: float) -> str:
    """Three significant digits, without an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value >= 99.95 or value == 0:
        return f"{value:.0f}"
    digits = 2 if value < 9.995 else 1
    return f"{value:.{digits}f}" if value >= 0.0995 else f"{value:.4f}"
