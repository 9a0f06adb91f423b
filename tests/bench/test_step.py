"""``megaloop bench step``: each contender in a process of its own. Its seconds are no business of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megaloop.bench import step
from megaloop.config import Config


def steps_that_tell_their_process(config: Config) -> Iterator[float]:
    while True:
        yield float(os.getpid())


@pytest.mark.slow
def test_apart_each_contender_has_a_process_that_ends() -> None:
    config = step._configuration("tiny", "fp32", 1, 16, False, "none")
    found = [step._in_a_process(steps_that_tell_their_process, config, 2, 3, 1) for _ in range(2)]
    assert len({os.getpid(), *(int(result.loss) for result in found)}) == 3
    assert [len(result.seconds) for result in found] == [3, 3], "the round that warms up is left out"
    assert not any(os.path.exists(f"/proc/{int(result.loss)}") for result in found)
