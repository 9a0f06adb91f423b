"""A small data set whose samples carry targets, the same each time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare

__all__ = ["LENGTH", "lines", "write_targeted"]

LENGTH = 32


def lines(count: int = 400, seed: int = 0, vocab_size: int = 40) -> list[dict[str, Any]]:
    """Documents of 4 to 20 tokens, of three difficulties; the target is the token before, at some of the places.

    How many places differs much, so that means of micro-batches' means would be another curve.
    """
    rng = random.Random(seed)
    made = []
    for number in range(count):
        tokens = [rng.randrange(5, vocab_size) for _ in range(rng.randint(4, 20))]
        share = rng.choice((0.1, 0.9))
        targets = [None] + [before if rng.random() < share else None for before in tokens[:-1]]
        targets[-1] = tokens[-2]
        made.append({"tokens": tokens, "targets": targets, "difficulty": number % 3})
    return made


def write_targeted(folder: Path, tokenizer: Path, count: int = 400, length: int = LENGTH, seed: int = 0) -> Path:
    """Write ``lines.jsonl`` and prepare it into ``targeted``, in samples of ``length`` tokens; returns the data set."""
    folder.mkdir(exist_ok=True)
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines(count, seed)), encoding="utf-8")
    prepare(
        [file], folder / "targeted", tokenizer=tokenizer, sequence_length=length, validation_fraction=0.2, targets=True
    )
    return folder / "targeted"
