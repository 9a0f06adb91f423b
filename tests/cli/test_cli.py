"""The command line: what a user types, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaloop import __version__
from tests import processes

CONFIG = "depth: 2\ndata:\n  sources:\n    - path: nowhere\n"


def megaloop(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments, env={**os.environ, "COLUMNS": "100", **(environment or {})})


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG + f"run_dir: {tmp_path / 'run'}\n")
    return path


def test_version() -> None:
    result = megaloop("--version")
    assert (result.returncode, result.stdout) == (0, f"megaloop {__version__}\n")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "prep",
        "train",
        "plan",
        "grow",
        "loop",
        "export",
        "import",
        "generate",
        "diagnose",
        "bench",
        "bench diagnose",
        "bench decode",
        "bench step",
        "bench rounds",
    ],
)
def test_help_answers_without_importing_torch(command: str) -> None:
    program = """
import sys
from megaloop.cli.main import main
from tests import processes
try:
    main()
except SystemExit as end:
    heavy = {"torch", "deepspeed", "transformers", "streaming", "numpy"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else end.code)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: megaloop" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "x", "--ranks", "0"], ["prep", "x"], ["diagnose"], ["--nope"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = megaloop(*arguments)
    assert result.returncode == 2
    assert "Usage: megaloop" in result.stderr
    assert result.stdout == ""


def test_a_users_error_is_one_line_on_stderr(config_file: Path) -> None:
    result = megaloop("train", config_file, "train.stpes=3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: configuration {config_file}: unknown key 'train.stpes'; did you mean 'train.steps'?\n"
    )


@pytest.mark.parametrize("name", ["schedule", "rounds"])
def test_a_bench_refuses_a_depth_that_is_none(name: str) -> None:
    result = megaloop("bench", name, "--depth", "nan")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: depth: cannot read 'nan'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loop", "x"], "loop: say which order the layers run in, with --depth, or --untie them"),
        (["loop", "x", "--depth", "4", "--untie"], "loop: say which order the layers run in"),
        (["loop", "x", "--untie", "--norm"], "loop: --norm applies only to loops, and --untie removes them"),
        (["loop", "x", "--depth", "1-2x2-1"], "checkpoint x: no such directory"),
        (["grow", "x"], "grow: say what to grow to, with --layers or with --depth"),
        (["grow", "x", "--layers", "8", "--depth", "8"], "grow: say what to grow to"),
        (["grow", "x", "--depth", "1-2xx2"], "depth: cannot read '1-2xx2'"),
    ],
)
def test_what_a_change_of_depth_needs(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = megaloop(*arguments, "--out", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(config_file: Path, where: int) -> None:
    arguments: list[object] = ["train", config_file, "train.steps=0"]
    arguments.insert(where, "--debug")
    result = megaloop(*arguments)
    assert "Traceback" in result.stderr
    assert "MegaloopError" in result.stderr
    assert result.returncode == 1


def test_an_error_before_the_ranks_start_none(config_file: Path, tmp_path: Path) -> None:
    result = megaloop("train", config_file, "parallel.pp=2", "--ranks", "3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: parallel: pp 2 x tp 1 x dp 1 makes 2 ranks, but there are 3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_in_the_ranks_is_one_line_too(config_file: Path, ranks: int) -> None:
    result = megaloop("train", config_file, f"parallel.dp={ranks}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
