"""Text and a data set made of it, the same each time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.prepare import prepare

__all__ = ["documents", "write_corpus"]

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "god",
    "lord",
    "said",
    "unto",
    "king",
    "earth",
    "heaven",
    "water",
    "light",
    "day",
    "night",
    "man",
    "son",
    "house",
    "people",
]


def documents(count: int = 300, seed: int = 0) -> list[str]:
    """Texts of 20 to 200 words."""
    chance = random.Random(seed)
    return [
        " ".join(chance.choice(WORDS) for _ in range(chance.randint(20, 200))).capitalize() + f". {number}\n"
        for number in range(count)
    ]


def write_corpus(folder: Path, count: int = 300, sequence_length: int = 64) -> Path:
    """Write ``text.jsonl`` and prepare it into ``shards``, many small ones; returns the data set."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents(count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.pack.SHARD_BYTES", 8192)
        prepare([text], folder / "shards", vocab_size=400, sequence_length=sequence_length, validation_fraction=0.1)
    return folder / "shards"
