"""Fixtures that all tests share."""

from __future__ import annotations

import os

# before torch is imported: tests run beside each other, and threads that wait for a core cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.distributed import RankPool

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("MEGALOOP_HYPOTHESIS", "ci"))


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of its own of a given size (``1200k``)."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
