"""Runs on a real Slurm cluster: time limits, dead nodes, chains. What they train is what one machine trains.

All jobs are submitted at once and run side by side; the tests then look at one each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from megaloop.cli.main import app
from megaloop.errors import MegaloopError
from tests.data.corpus import write_corpus
from tests.distributed import RankPool
from tests.launchers.slurm_cluster import SlurmCluster, running_cluster, wait_for
from tests.launchers.waiting_rank import STEPS
from tests.train.runs import configuration, events, losses, metrics, steps_done, train

pytestmark = pytest.mark.slow

PATIENCE = 900
"""Seconds for what takes ten on an idle machine: other tests may have the cores."""
_LIMITED: dict[str, Any] = {"train__global_batch": 8, "checkpoint__every": 0, "validation__every": 0}
_DYING: dict[str, Any] = {"checkpoint__every": 5, "validation__every": 0}
_CHAIN: dict[str, Any] = {
    "depth": "4",
    "growth": {
        "start": 2,
        "block": 2,
        "schedule": [{"steps": 10, "layers": 2}, {"steps": 10, "layers": 4}],
        "topology": [{"layers": 2, "pp": 1}, {"layers": 4, "pp": 2}],
    },
    "train__global_batch": 8,
}


@dataclass
class Job:
    """A run and the number of its job: of the first, where it is a chain."""

    run: Path
    number: int
    next: int | None = None

    @property
    def history(self) -> list[str]:
        path = self.run / "slurm/history.jsonl"
        return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "slurm").glob("job-*.log")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), sequence_length=32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster() as running, pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):  # for the commands that run in this process
            patch.setenv(name, running.environment[name])
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python and the code of this test, on nodes with little to share."""
    folder = tmp_path_factory.mktemp("site")
    root = Path(__file__).parents[2]
    (folder / "waiting").write_text(f'#!/bin/sh\nexec {sys.executable} {root}/tests/launchers/waiting_rank.py "$@"\n')
    (folder / "waiting").chmod(0o755)
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, python in (("plain.yaml", sys.executable), ("waiting.yaml", str(folder / "waiting"))):
        (folder / name).write_text(yaml.safe_dump({"environment": environment, "python": python}))
    return folder


@pytest.fixture(scope="module")
def jobs(cluster: SlurmCluster, site: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Five jobs: one reaches its time limit, a node of one dies, one is a chain, two are to be ended."""
    folder = tmp_path_factory.mktemp("jobs")
    waiting, pair = ("--site", site / "waiting.yaml"), ("--tasks-per-node", 2)
    limited = folder / "limited $(touch pwned) 'run'"
    jobs = {
        "limited": _submit(
            configuration(corpus, limited, (2, 1, 2), **_LIMITED),
            *("--nodes", 2, *pair, *waiting, "--time", "1:00:00", "--signal-before", 600),
        ),
        "dying": _submit(
            configuration(corpus, folder / "dying", (2, 1, 1), **_DYING), "--nodes", 2, "--tasks-per-node", 1, *waiting
        ),
    }
    for name in ("cancelled", "told"):
        endless = configuration(corpus, folder / name, train__steps=1000)
        jobs[name] = _submit(endless, "--nodes", 1, "--tasks-per-node", 1, *waiting)
    values = configuration(corpus, folder / "chain", **_CHAIN)
    del values["parallel"]
    jobs["chain"] = _submit(values, "--chain", "1,2", *pair, "--site", site / "plain.yaml")
    wait_for("steps of the job with the limit", lambda: steps_done(limited) >= STEPS, PATIENCE)
    wait_for("steps of the job whose node dies", lambda: _waits_after_a_checkpoint(jobs["dying"]), PATIENCE)
    # the warning comes signal_before seconds before the limit: now
    cluster.run("scontrol", "update", f"JobId={jobs['limited'].number}", "TimeLimit=10")
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(jobs["dying"].number)["NodeList"]).split()
    cluster.lose_node(nodes[-1])
    return jobs


def _waits_after_a_checkpoint(job: Job) -> bool:
    manifest = job.run / "checkpoints/step-00000010/manifest.json"
    return steps_done(job.run) >= STEPS and manifest.exists()


def _megaloop(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _submit(values: dict[str, Any], *arguments: object) -> Job:
    run = Path(values["run_dir"])
    path = run.with_name(f"{run.name}.yaml")
    path.write_text(yaml.safe_dump(values))
    result = _megaloop("submit", path, "--json", *arguments)
    assert result.exit_code == 0, result.exception
    numbers = [job["job"] for job in json.loads(result.output)["jobs"]]
    return Job(run, *numbers)


def _status(job: Job) -> dict[str, Any]:
    result = _megaloop("status", job.run, "--json")
    assert result.exit_code == 0, result.exception
    values: dict[str, Any] = json.loads(result.output)
    return values


def _ended(cluster: SlurmCluster, job: Job, number: int | None = None) -> str:
    """How a job ended: COMPLETED, FAILED, ..."""
    try:
        return cluster.ended(number or job.number, PATIENCE)["JobState"]
    except AssertionError:
        print(job.log, file=sys.stderr)
        raise


def test_a_job_saves_before_its_limit_goes_back_into_the_queue_and_ends_with_the_same_losses(
    cluster: SlurmCluster, jobs: dict[str, Job], ranks_4: RankPool, corpus: Path, tmp_path: Path
) -> None:
    job = jobs["limited"]
    wait_for("the requeue", lambda: "requeue" in job.history, PATIENCE)
    # once is enough: the second time it may take as long as it needs
    wait_for("the job to wait", lambda: cluster.job(job.number)["JobState"] in ("PENDING", "RUNNING"), PATIENCE)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60", check=False)
    ranks_4.run(train, configuration(corpus, tmp_path / "straight", (2, 1, 2), **_LIMITED))
    assert _ended(cluster, job) == "COMPLETED", job.log
    assert job.history[:3] == ["start", "requeue", "start"]
    assert _status(job)["restarts"] >= 1
    assert "SIGUSR1" in (job.run / "events.jsonl").read_text(), "the warning ended it"
    assert losses(job.run) == losses(tmp_path / "straight")
    assert not list(job.run.parent.rglob("pwned"))
    assert not Path("pwned").exists()


def test_what_slurm_refuses_is_shown_in_its_own_words(cluster: SlurmCluster, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(corpus, tmp_path / "run", (1, 1, 2))))
    command = ["submit", path, "--nodes", 1, "--tasks-per-node", 2, "--partition", "nowhere"]
    result = subprocess.run(
        [sys.executable, "-m", "megaloop", *map(str, command)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 2
    assert "sbatch refused: " in result.stderr
    assert "nvalid partition" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert os.environ.get("SLURM_JOB_ID") is None


def test_status_and_cancel(cluster: SlurmCluster, jobs: dict[str, Job]) -> None:
    job = jobs["cancelled"]
    wait_for("some steps", lambda: _waits_after_a_checkpoint(job), PATIENCE)
    found = _status(job)
    assert [(result["job"], result["state"]) for result in found["jobs"]] == [(job.number, "RUNNING")]
    assert found["step"] == STEPS
    assert found["steps"] == 1000
    assert found["last_checkpoint"] == "step-00000010"
    assert "RUNNING" in _megaloop("status", job.run).output
    config = job.run.with_name("cancelled.yaml")
    again = _megaloop("submit", config, "--nodes", 1, "--tasks-per-node", 1, "--resume").exception
    assert isinstance(again, MegaloopError)
    assert f"job {job.number} of this run is still with Slurm" in str(again)
    assert f"cancelled: job {job.number}" in _megaloop("cancel", job.run).output
    assert _ended(cluster, job) == "CANCELLED"
    assert job.history == ["start", "ended by Slurm"]
    assert "nothing to cancel" in _megaloop("cancel", job.run).output


def test_a_sigterm_to_the_job_script_alone_makes_the_ranks_save(cluster: SlurmCluster, jobs: dict[str, Job]) -> None:
    job = jobs["told"]
    wait_for("some steps", lambda: steps_done(job.run) >= STEPS, PATIENCE)
    cluster.run("scancel", "--batch", "--signal=TERM", str(job.number))
    wait_for("the requeue", lambda: "requeue" in job.history, PATIENCE)
    # the note comes before Slurm hears of it, and a job that is cancelled in between would be requeued nevertheless
    wait_for("its second time", lambda: cluster.job(job.number).get("Restarts") == "1", PATIENCE)
    assert _megaloop("cancel", job.run).exit_code == 0
    assert _ended(cluster, job) == "CANCELLED"
    assert "SIGTERM" in (job.run / "events.jsonl").read_text()
    assert _status(job)["last_checkpoint"] == f"step-{STEPS:08d}"


def test_a_dead_node_leads_to_a_requeue_and_a_finished_run(
    cluster: SlurmCluster, jobs: dict[str, Job], ranks_2: RankPool, corpus: Path, tmp_path: Path
) -> None:
    job = jobs["dying"]
    wait_for("the requeue", lambda: cluster.job(job.number).get("Restarts") == "1", PATIENCE)

    def runs_again() -> bool:
        # what a requeued job waits for otherwise is two minutes, so that credentials of its first start have expired
        cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now", check=False)
        return job.history.count("start") > 1

    wait_for("the job to run again", runs_again, PATIENCE)
    ranks_2.run(train, configuration(corpus, tmp_path / "straight", (2, 1, 1), **_DYING))
    assert _ended(cluster, job) == "COMPLETED", job.log
    (resumed,) = events(job.run, "resume")
    assert resumed["step"] == 10, "its newest checkpoint"
    assert losses(job.run) == losses(tmp_path / "straight")


def test_a_chain_gives_each_stage_its_nodes(
    cluster: SlurmCluster, jobs: dict[str, Job], ranks_4: RankPool, corpus: Path, tmp_path: Path
) -> None:
    job = jobs["chain"]
    values = configuration(corpus, tmp_path / "straight", **_CHAIN)
    del values["parallel"]
    ranks_4.run(train, values)
    assert _ended(cluster, job) == "COMPLETED", job.log
    assert _ended(cluster, job, job.next) == "COMPLETED", job.log
    records = metrics(job.run)
    assert [(record["pp"], record["dp"]) for record in records] == [(1, 2)] * 10 + [(2, 2)] * 10
    assert losses(job.run) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
