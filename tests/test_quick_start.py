"""The README's quick start works, line by line, where nothing has run before: real interpreters, as a shell starts them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[1]
ADDED = {
    # 6 steps of 4 samples instead of 120 of 16, which grow where the long run does: after a sixth and half of the first 85%
    "megaloop train": [
        "train.steps=6",
        "train.global_batch=4",
        "train.micro_batch=2",
        "schedule.warmup_steps=1",
        "validation.samples=4",
    ],
    "megaloop generate": ["--max-tokens", "4"],
}
"""What the test adds to commands, so that they take seconds; and it stops training at step 2 instead of 40."""


def commands() -> list[list[str]]:
    """The commands of the quick start, as a shell splits them into words."""
    block = re.search(
        r"^<!-- quick start.*?^<!-- end of the quick start", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert block is not None
    lines = [line.removeprefix("    ") for line in block[0].splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    if words[:2] == ["python", "-c"]:
        return subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300)
    if words[:2] == ["python", "-m"]:
        return run(*words[3:], module=words[2], cwd=folder, fresh=True)
    assert words[0] == "megaloop"
    name = " ".join(words[:2])
    if name == "megaloop train":
        words = ["2" if word == "40" else word for word in words]
    return run(*words[1:], *ADDED.get(name, []), cwd=folder, fresh=True)


@pytest.mark.slow
def test_the_quick_start_works_line_by_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    printed = []
    for words in commands():
        result = _run(words, tmp_path)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
        printed.append(result.stdout)
    text = "\n".join(printed)
    assert "pp 2 x tp 1 x dp 1" in text
    assert "resuming runs/demo/checkpoints/step-00000002 at step 2" in text
    assert "pp 1 x tp 1 x dp 2" in text
    assert "grown from 8 to 12 layers" in text
    assert "And the LORD said unto" in printed[-1]
