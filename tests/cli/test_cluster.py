"""``megaloop submit``, ``status`` and ``cancel`` in this process, with Slurm's programs as stubs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from megaloop.cli.main import app
from megaloop.errors import MegaloopError

STUBS = {
    "sbatch": 'echo "sbatch $*" >> "$CALLS"; echo $((100 + $(grep -c ^sbatch "$CALLS")))',
    # every job runs, whatever is asked for
    "squeue": 'echo "squeue $*" >> "$CALLS"; while [[ $1 != -j ]]; do shift; done\n'
    'for job in ${2//,/ }; do echo "$job|RUNNING|1:00|n[1-2]|None"; done',
    "scancel": 'echo "scancel $*" >> "$CALLS"',
}
TAMPERED = [
    '{"job": "--all"}', '{"job": "-u root"}', '{"job": "1,2,3"}', '{"job": "12"}', '{"job": -5}', '{"job": 0}', '{"job": true}',
    '{"job": 1.5}', '{"job": 1e3}', '{"job": 99999999999999999999}', '{"job": [1]}', '{"job": null}', "{}", "[12]", "12", "",
    '{"job": ' + "9" * 5000 + "}", "[" * 3000, "\x1b[2J", '{"job": 14, "nodes',
]  # fmt: skip


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the stubs write how they were called; they alone, and a shell's own programs, are on the path."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("COLUMNS", "200")
    return calls


def _megaloop(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _config(folder: Path, **changes: Any) -> Path:
    values = {
        "run_dir": str(folder / "run"),
        "data": {"sources": [{"path": "x"}]},
        "train": {"global_batch": 8},
    } | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def _submit(folder: Path, *arguments: object, **changes: Any) -> Result:
    return _megaloop("submit", _config(folder, **changes), *arguments)


def _submitted(folder: Path) -> Path:
    """A run with jobs 101 and 102, and lines of jobs that are none."""
    one = ("--nodes", 1, "--tasks-per-node", 1)
    assert _submit(folder, *one).exit_code == 0
    jobs = folder / "run/slurm/jobs.jsonl"
    first = jobs.read_text()
    jobs.write_text("\n".join([*TAMPERED, first]) + first.replace("101", "102") + TAMPERED[-1])
    return folder / "run"


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    done = _submit(tmp_path, "--nodes", 2, "--gpus-per-node", 2, "--dry-run")
    assert done.exit_code == 0, done.exception
    assert done.output.startswith("#!/bin/bash\n")
    assert "#SBATCH --gpus-per-node=2" in done.output
    subprocess.run(["bash", "-n"], input=done.output, text=True, check=True, capture_output=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 2", "say --gpus-per-node G (one rank per GPU), or --tasks-per-node T"),
        ("--gpus-per-node 2", "say --nodes N, or --chain N,N,..."),
        ("--nodes 3 --tasks-per-node 1", "train.global_batch 8 is not a multiple of"),
        ("--chain 1,2 --tasks-per-node 1", "has 2 jobs, but the run has 1 stages (32 layers until step 1000)"),
        ("--chain 1,x --tasks-per-node 1", "--chain 1,x: expected a number of nodes for each growth stage"),
        ("--nodes 1 --tasks-per-node 1 --site nowhere", "--site nowhere: no such site; use one of default, "),
        ("--nodes 1 --tasks-per-node 1 --env-file nowhere", "--env-file nowhere: expected a file"),
        ("--nodes 1 --tasks-per-node 1", "sbatch: not found"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error = _submit(tmp_path, *arguments.split()).exception
    assert isinstance(error, MegaloopError)
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_what_was_never_submitted(tmp_path: Path, command: str) -> None:
    error = _megaloop(command, tmp_path).exception
    assert isinstance(error, MegaloopError)
    assert "no run" in str(error)
    assert "that megaloop submit has put on a cluster" in str(error)


def test_only_numbers_of_jobs_reach_slurm(tmp_path: Path, calls: Path) -> None:
    run = _submitted(tmp_path)
    calls.write_text("")
    done = _megaloop("cancel", run)
    assert done.exit_code == 0, done.exception
    asked, cancelled = calls.read_text().splitlines()
    assert "-j 101,102 " in asked
    assert cancelled == "scancel 101 102"


def test_status_of_a_run_whose_files_were_edited(tmp_path: Path, calls: Path) -> None:
    run = _submitted(tmp_path)
    event = {"job": 102, "event": "[/red]\x1b[2J gave up", "restart": 0}
    lines = [
        *TAMPERED,
        json.dumps({"job": 101, "event": "restart"}),
        json.dumps(event),
        '{"job": 102, "event": 7}',
        '{"job',
    ]
    (run / "slurm/history.jsonl").write_text("\n".join(lines))
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": "[/red]", "seconds": 1e999}\n')
    done = _megaloop("status", run, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.output)
    assert [(job["job"], job["state"], job["on"]) for job in found["jobs"]] == [
        (101, "RUNNING", "n[1-2]"),
        (102, "RUNNING", "n[1-2]"),
    ]
    assert (found["restarts"], found["step"], found["loss"]) == (1, 3, None)
    shown = _megaloop("status", run)
    assert shown.exit_code == 0, shown.exception
    assert r"[/red]\x1b[2J gave up" in shown.output
    assert "n[1-2]" in shown.output


def test_a_torn_line_does_not_swallow_the_next_job(tmp_path: Path, calls: Path) -> None:
    run = _submitted(tmp_path)
    (tmp_path / "bin/squeue").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n"
    )
    done = _submit(tmp_path, "--nodes", 1, "--tasks-per-node", 1)
    assert done.exit_code == 0, done.exception
    found = json.loads(_megaloop("status", run, "--json").output)
    assert [(job["job"], job["state"]) for job in found["jobs"]] == [(101, "GONE"), (102, "GONE")]
    assert len((run / "slurm/jobs.jsonl").read_text().splitlines()) == len(TAMPERED) + 4


def test_jobs_that_cannot_be_recorded_are_taken_back(tmp_path: Path, calls: Path) -> None:
    with (tmp_path / "bin/sbatch").open("a") as stub:
        stub.write(f"rm -r '{tmp_path / 'run/slurm'}'\n")
    error = _submit(tmp_path, "--nodes", 1, "--tasks-per-node", 1).exception
    assert isinstance(error, MegaloopError)
    assert str(error) == f"run directory {tmp_path / 'run'}: cannot be written (No such file or directory)"
    assert calls.read_text().splitlines()[1:] == ["scancel 101"]


def test_a_controller_that_does_not_answer_is_no_empty_queue(tmp_path: Path, calls: Path) -> None:
    run = _submitted(tmp_path)
    (tmp_path / "bin/squeue").write_text(
        "#!/bin/sh\necho squeue: error: Unable to contact slurm controller >&2; exit 1\n"
    )
    for command in (
        ("cancel", run),
        ("status", run),
        ("submit", tmp_path / "config.yaml", "--nodes", 1, "--tasks-per-node", 1),
    ):
        error = _megaloop(*command).exception
        assert isinstance(error, MegaloopError)
        assert "squeue refused: error: Unable to contact slurm controller" in str(error)


def test_a_secret_is_nowhere_but_in_its_file(tmp_path: Path, calls: Path) -> None:
    secret = tmp_path / "env"
    secret.write_text("TOKEN=s3cr3t\n")
    secret.chmod(0o600)
    arguments = ("--nodes", 1, "--tasks-per-node", 1, "--env-file", secret)
    assert "s3cr3t" not in _submit(tmp_path, *arguments, "--dry-run").output
    assert _submit(tmp_path, *arguments).exit_code == 0
    found = subprocess.run(["grep", "-rl", "s3cr3t", tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(secret)]
    assert str(secret) in (tmp_path / "run/slurm/stage-1.sbatch").read_text()
