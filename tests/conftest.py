"""Fixtures that all tests share."""

from __future__ import annotations

import os

# before torch is imported: tests run beside each other, and threads that wait for a core cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.data.corpus import write_corpus
from tests.distributed import RankPool

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("MEGALOOP_HYPOTHESIS", "ci"))


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell that starts the suite in the background lets it ignore Ctrl-C, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


_LONGEST = (
    "launchers/test_slurm",
    "train/test_watchdog",
    "parallel/test_loops",
    "evaluation/test_harness",
    "huggingface/test_smollm2",
    "parallel/",
    "train/",
)
"""Files that pytest's workers begin with, so that none is left with a long one in the end: those that wait first."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is run by one worker, so what its tests share is made once; the files of the Slurm cluster count as one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.partition("::")[0]
            return "slurm" if file.startswith("tests/launchers/test_slurm") else file

    return ByFile(config, log)


_LAYOUTS = (
    "bench", "checkpoint", "evaluation", "huggingface", "layout", "model", "parallel", "plan", "runs", "train"
)  # fmt: skip
"""Folders whose tests are made for many layouts, precisions and options."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="Leave out tests marked slow, and of one made for many layouts take the first.",
    )


def _is_left_out_of_fast(item: pytest.Item, taken: set[str]) -> bool:
    name = item.nodeid.partition("[")[0]
    again = name in taken and item.path.parent.name in _LAYOUTS
    taken.add(name)
    return again or item.get_closest_marker("slow") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; tests that need a GPU are deselected where there is none."""
    items.sort(
        key=lambda item: next((place for place, name in enumerate(_LONGEST) if name in item.nodeid), len(_LONGEST))
    )
    if config.getoption("fast"):
        taken: set[str] = set()
        left_out = [item for item in items if _is_left_out_of_fast(item, taken)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 32-token samples."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), sequence_length=32)


@pytest.fixture
def small_disk(disk: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return disk("64k")
