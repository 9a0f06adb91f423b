"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import RankPool


@pytest.fixture(scope="session")
def ranks_2() -> Iterator[RankPool]:
    """Two ranks that stay alive for the whole test session."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks_4() -> Iterator[RankPool]:
    """Four ranks that stay alive for the whole test session."""
    with RankPool(4) as pool:
        yield pool
