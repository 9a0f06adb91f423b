"""Small trained runs to evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import write_corpus
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
