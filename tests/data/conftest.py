"""A small data set for the tests of reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 64-token samples in several shards, with its text beside it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
