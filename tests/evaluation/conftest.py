"""Small trained runs to evaluate."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from tests.data.corpus import WORDS, write_corpus
from tests.distributed import run_ranks
from tests.train.runs import configuration, train


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 layers without loop."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_corpus(folder, sequence_length=32)
    run_ranks(1, train, configuration(data, folder / "run", depth="3"))
    return folder / "run"


@pytest.fixture(scope="session")
def looped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose middle layer ran twice."""
    folder = tmp_path_factory.mktemp("evaluate-looped")
    data = write_corpus(folder, sequence_length=32)
    run_ranks(1, train, configuration(data, folder / "run", depth="1-1x2-1", loop={"injection": "concat"}))
    return folder / "run"


@pytest.fixture(scope="session")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with document masking on documents much shorter than a sample, two of whose three words are the first one again."""
    folder = tmp_path_factory.mktemp("evaluate-masked")
    chance = random.Random(0)
    texts = [" ".join([chance.choice(WORDS)] * 3 + [chance.choice(WORDS)]) for _ in range(1500)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "text.jsonl"], folder / "shards", vocab_size=310, sequence_length=32, validation_fraction=0.1)
    values = configuration(
        folder / "shards", folder / "run", depth="2", train__steps=30, validation={"every": 30, "samples": 16},
        checkpoint={"every": 30, "keep": 1},
    )  # fmt: skip
    values["model"]["document_masking"] = True
    run_ranks(1, train, values)
    return folder / "run"
