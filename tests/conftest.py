"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import RankPool


@pytest.fixture(scope="session")
def ranks_1() -> Iterator[RankPool]:
    """A single rank in a process of its own."""
    with RankPool(1) as pool:
        yield pool


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that need a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
