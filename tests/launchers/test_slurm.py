"""Runs on a real Slurm cluster of two nodes: time limits, dead nodes, chains. What they train is what one machine trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.corpus import write_corpus
from tests.distributed import RankPool
from tests.launchers.slurm_cluster import SlurmCluster, running_cluster, wait_for
from tests.train.runs import configuration, losses, metrics, steps_done, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), sequence_length=32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The Python and the code of this test, on nodes with little to share."""
    path = tmp_path / "site.yaml"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path.write_text(yaml.safe_dump({"environment": environment, "python": sys.executable}))
    return path


def _megaloop(cluster: SlurmCluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megaloop", *map(str, arguments)]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=120)


def _submit(cluster: SlurmCluster, site: Path, values: dict[str, Any], *arguments: object) -> list[int]:
    path = site.with_name("config.yaml")
    path.write_text(yaml.safe_dump(values))
    result = _megaloop(cluster, "submit", path, "--tasks-per-node", 2, "--site", site, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return [job["job"] for job in json.loads(result.stdout)["jobs"]]


def _status(cluster: SlurmCluster, run: Path) -> dict[str, Any]:
    result = _megaloop(cluster, "status", run, "--json")
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def _log(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run / "slurm").glob("job-*.log")))


def _ended(cluster: SlurmCluster, job: int, run: Path, timeout: float = 150) -> str:
    """How a job ended: COMPLETED, FAILED, ..."""
    try:
        return cluster.ended(job, timeout)["JobState"]
    except AssertionError:
        print(_log(run), file=sys.stderr)
        raise


def _history(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "slurm/history.jsonl").read_text().splitlines()]


def test_a_job_saves_before_its_limit_goes_back_into_the_queue_and_ends_with_the_same_losses(
    cluster: SlurmCluster, site: Path, ranks_4: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Slurm's shortest limit is a minute: the signal comes 45 s before it, and the run is long enough not to be done."""
    changes: dict[str, Any] = {
        "train__global_batch": 64,
        "train__steps": 160,
        "checkpoint__every": 0,
        "validation__every": 0,
    }
    name = "limited $(touch pwned) 'run'"
    values = configuration(corpus, tmp_path / name, (2, 1, 2), **changes)
    (job,) = _submit(cluster, site, values, "--nodes", 2, "--time", "0:01:00", "--signal-before", 40)
    run = tmp_path / name
    wait_for("the requeue", lambda: (run / "slurm/history.jsonl").exists() and "requeue" in _history(run), 100)
    # once is enough: the second time it may take as long as it needs
    wait_for("the job to wait", lambda: cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), 30)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10", check=False)
    assert _ended(cluster, job, run) == "COMPLETED", _log(run)
    assert _history(run)[:3] == ["start", "requeue", "start"]
    assert _status(cluster, run)["restarts"] >= 1
    ranks_4.run(train, configuration(corpus, tmp_path / "straight", (2, 1, 2), **changes))
    assert losses(run) == losses(tmp_path / "straight")
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_a_dead_node_leads_to_a_requeue_and_a_finished_run(
    cluster: SlurmCluster, site: Path, ranks_4: RankPool, corpus: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "train__global_batch": 64,
        "train__steps": 60,
        "checkpoint__every": 5,
        "validation__every": 0,
    }
    run = tmp_path / "run"
    (job,) = _submit(cluster, site, configuration(corpus, run, (2, 1, 2), **changes), "--nodes", 2)
    wait_for("some steps", lambda: steps_done(run) >= 12, 60)
    cluster.kill_node("n2")
    wait_for("the requeue", lambda: cluster.job(job)["JobState"] == "PENDING", 90)
    assert cluster.job(job)["Restarts"] == "1"
    cluster.start_node("n2")

    def runs_again() -> bool:
        # what a requeued job waits for otherwise is two minutes, so that credentials of its first start have expired
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return cluster.job(job)["JobState"] == "RUNNING"

    wait_for("the job to run again", runs_again, 90)
    assert _ended(cluster, job, run) == "COMPLETED", _log(run)
    ranks_4.run(train, configuration(corpus, tmp_path / "straight", (2, 1, 2), **changes))
    assert losses(run) == losses(tmp_path / "straight")


def test_a_chain_gives_each_stage_its_nodes(
    cluster: SlurmCluster, site: Path, ranks_4: RankPool, corpus: Path, tmp_path: Path
) -> None:
    schedule = [{"steps": 10, "layers": 2}, {"steps": 10, "layers": 4}]
    topology = [{"layers": 2, "pp": 1}, {"layers": 4, "pp": 2}]
    changes: dict[str, Any] = {
        "depth": "4",
        "growth": {"start": 2, "block": 2, "schedule": schedule, "topology": topology},
        "train__steps": 20,
        "train__global_batch": 8,
    }
    values = configuration(corpus, tmp_path / "run", **changes)
    del values["parallel"]
    first, second = _submit(cluster, site, values, "--chain", "1,2")
    assert _ended(cluster, first, tmp_path / "run") == "COMPLETED", _log(tmp_path / "run")
    assert _ended(cluster, second, tmp_path / "run") == "COMPLETED", _log(tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert [(each["pp"], each["dp"]) for each in records] == [(1, 2)] * 10 + [(2, 2)] * 10
    ranks_4.run(train, {**values, "run_dir": str(tmp_path / "straight")})
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)


def test_status_and_cancel(cluster: SlurmCluster, site: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = configuration(corpus, run, (1, 1, 2), train__steps=100_000, schedule__cooldown=0)
    (job,) = _submit(cluster, site, values, "--nodes", 1)
    wait_for("some steps", lambda: steps_done(run) >= 15, 60)
    found = _status(cluster, run)
    assert [(each["job"], each["state"]) for each in found["jobs"]] == [(job, "RUNNING")]
    assert found["step"] >= 15
    assert found["steps"] == 100_000
    assert int(found["last_checkpoint"].removeprefix("step-")) >= 10
    shown = _megaloop(cluster, "status", run)
    assert "RUNNING" in shown.stdout
    again = _megaloop(cluster, "submit", site.with_name("config.yaml"), "--nodes", 1, "--tasks-per-node", 2, "--resume")
    assert again.returncode == 2
    assert f"job {job} of this run is still with Slurm" in again.stderr
    began = time.monotonic()
    assert f"cancelled: job {job}" in _megaloop(cluster, "cancel", run).stdout
    assert _ended(cluster, job, run) == "CANCELLED"
    assert time.monotonic() - began < 30
    assert "nothing to cancel" in _megaloop(cluster, "cancel", run).stdout


def test_what_slurm_refuses_is_shown_in_its_own_words(
    cluster: SlurmCluster, site: Path, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(corpus, tmp_path / "run", (1, 1, 2))))
    result = _megaloop(cluster, "submit", path, "--nodes", 1, "--tasks-per-node", 2, "--partition", "nowhere")
    assert result.returncode == 2
    assert "sbatch refused: " in result.stderr
    assert "nvalid partition" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert os.environ.get("SLURM_JOB_ID") is None
