"""Write the configuration table of README.md from the models; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from megaloop.config import fields
from megaloop.depth import DepthSpec

README = Path(__file__).parents[1] / "README.md"
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
    """README's text with the table between the two comments."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(
            0 if updated(text) == text else "README.md: the configuration table is stale; run tools/config_table.py"
        )
    README.write_text(updated(text), encoding="utf-8")
