"""Text that prep and fine-tuning read from files: UTF-8 without its mark, and fields of lines of JSON."""

from __future__ import annotations

import codecs
import json
from typing import Any

from megaloop.text import printable

__all__ = ["BEGINNING", "MARK", "NotText", "field_text", "foreign_encoding", "read_object"]

BEGINNING = 4096
"""Bytes of a file by which :func:`foreign_encoding` judges."""
MARK = codecs.BOM_UTF8
"""The byte order mark that some editors put before UTF-8; no part of the text."""
_FOREIGN = (  # the marks of UTF-32 begin like those of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class NotText(ValueError):
    """What was read is no text; the message says why, in a few words."""


def foreign_encoding(beginning: bytes) -> str | None:
    """Why a file that begins with these bytes is no UTF-8 text, and what it seems to be; None: nothing speaks for that.

    Without a byte order mark UTF-16 gives itself away by NUL bytes: for the most part of its spaces, line ends, digits
    and Latin letters, and always at every other place.
    """
    for mark, name in _FOREIGN:
        if beginning.startswith(mark):
            return f"{name}, as its byte order mark {mark.hex(' ').upper()} says; convert it: iconv -f {name} -t UTF-8"
    even, odd = beginning[0::2].count(0), beginning[1::2].count(0)
    found = f"by {even + odd:,} NUL bytes among the first {len(beginning):,}"
    if max(even, odd) > 1 and max(even, odd) >= 0.02 * len(beginning) and min(even, odd) <= 0.05 * max(even, odd):
        name = "UTF-16LE" if odd > even else "UTF-16BE"
        return f"{name}, {found}; convert it: iconv -f {name} -t UTF-8"
    if even + odd >= 0.1 * len(beginning) > 1:
        name = "UTF-32, or no text at all," if 2 * (even + odd) > len(beginning) else "no text at all,"
        return f"{name} {found}; convert it to UTF-8"
    return None  # a stray one is a character like others


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        NotText: there is none.
    """
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise NotText(f"byte 0x{line[error.start]:02x} is not UTF-8") from None
    except (ValueError, RecursionError):  # not JSON, or an integer of thousands of digits; nested too deep
        raise NotText("not JSON") from None
    if not isinstance(value, dict):
        raise NotText("no object of JSON")
    return value


def field_text(fields: dict[str, Any], name: str, option: str) -> str:
    """The text in a field.

    Args:
        option: that names the field.

    Raises:
        NotText: there is none, with the fields that have text; or half a surrogate pair is in it, which is no character
            but can be written in JSON.
    """
    text = fields.get(name)
    if not isinstance(text, str):
        there = [printable(key, 40) for key, value in fields.items() if isinstance(value, str)]
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        listed = f"set {option} to a field that has: {', '.join(there[:12])}{more}" if there else "no field has any"
        raise NotText(f"no text in field '{printable(name, 40)}' ({listed})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotText("half a surrogate pair, which is not UTF-8") from None
    return text
