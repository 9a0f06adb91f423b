"""``tools/gpu_check.sh``, as far as it goes without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def _run(*arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env={"PATH": path})


def test_its_help_names_its_parts() -> None:
    done = _run("--help")
    assert done.returncode == 0
    for part in ("tests", "step", "reshard", "savings", "wheels"):
        assert re.search(rf"^{part} |gpu_check.sh {part}", done.stdout, re.MULTILINE), part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU here"),
        (["step", "1.7b"], "there is no GPU here"),
        (["steps"], "unknown part steps; choose from tests, step"),
        (["wheels", "three"], "three is no version of Python"),
    ],
)
def test_what_it_cannot_do_it_says_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    for tool in ("bash", "dirname"):  # and no nvidia-smi
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    done = _run(*arguments, path=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_its_wheels_are_the_tested_versions() -> None:
    names = re.search(r"^WHEELS=\((.*?)^\)", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert names is not None
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert [name for name in names[1].split() if name.lower().replace("_", "-") not in pinned] == []
