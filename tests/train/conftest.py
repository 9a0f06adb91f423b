"""A data set for the runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 32-token samples."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), sequence_length=32)
