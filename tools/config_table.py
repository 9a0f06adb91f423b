"""Write the table of docs/CONFIGURATION.md from the models; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from megaloop.config import fields
from megaloop.depth import DepthSpec

PAGE = Path(__file__).parents[1] / "docs/CONFIGURATION.md"
BEGIN = "<!-- configuration table: tools/config_table.py writes it -->\n"
END = "<!-- end -->"


def rows() -> list[tuple[str, str, str]]:
    """(key, default, sentence) of every value, sections expanded."""
    return [
        (name, _default(field.default), field.description or "")
        for name, field in fields(item="0.")
        if field.description  # sections that are always there have none
    ]


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return (
        ""
        if value is None or value == ()
        else f"`{value if isinstance(value, str | DepthSpec) else json.dumps(value)}`"
    )


def table() -> str:
    """The table in Markdown."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows()]
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """The page with the table between the two comments."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if updated(text) == text else "docs/CONFIGURATION.md: the table is stale; run tools/config_table.py")
    PAGE.write_text(updated(text), encoding="utf-8")
