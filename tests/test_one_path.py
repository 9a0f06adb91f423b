"""One path for one thing: what two places would do apart, one place does for all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = {
    "objects go from rank to rank": (
        r"\b(broadcast_object_list|all_gather_object|gather_object|scatter_object_list)\(",
        "megaloop/runtime/collectives.py",
    ),
    "files and directories are synced": (r"\bos\.(fsync|fdatasync)\(", "megaloop/files.py"),
    "files are renamed over others": (r"\bos\.(replace|rename)\(", "megaloop/files.py"),
    "a global batch is divided into micro-batches": (r"global_batch\s*(//|%)\s*\(", "megaloop/config/training.py"),
    "a precision has a dtype": (r"bfloat16 if .*bf16|float32 if .*(fp32|bf16)", "megaloop/runtime/dtype.py"),
    "a new layer gets an id": (r"lineage\.values\(\)[^\n]*\+ 1", "megaloop/depth/plan.py"),
}


@pytest.mark.parametrize("what", PATHS)
def test_one_file_does_it(what: str) -> None:
    pattern, only = PATHS[what]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in ("megaloop", "data_prep", "launchers")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() != only
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, f"belongs in {only}: {', '.join(found)}"
