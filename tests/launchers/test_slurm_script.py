"""The job script: everything is quoted, what cannot be is refused, and bash can read it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from launchers.slurm_rank import record_exit, slurm_rank_environment
from launchers.slurm_script import TEMPLATE, JobOptions, Site, job_script, load_site, read_environment_file
from megaloop.errors import MegaloopError

NASTY = "a 'run' with \"quotes\", $(touch pwned), `touch pwned`; touch pwned & \\ #"


def _script(options: JobOptions | None = None, site: Site | None = None, **changes: Any) -> str:
    values: dict[str, Any] = {
        "name": "demo", "run": Path("/runs/demo"), "directory": Path("/work"), "arguments": ["megaloop", "train", "x.yaml"]
    }  # fmt: skip
    return job_script(options or JobOptions(2, 4), site or Site(), **(values | changes))


def _readable(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)


def test_all_that_is_asked_for_is_in_it() -> None:
    options = JobOptions(
        3, 4, gpus_per_node=4, cpus_per_task=8, time="2:00:00", partition="gpu", account="me", qos="high",
        constraint="h100&ib", exclusive=True, dependency="afterok:7", signal_before=90,
    )  # fmt: skip
    script = _script(options)
    for line in (
        "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--time=2:00:00", "--partition=gpu",
        "--account=me", "--qos=high", "--constraint='h100&ib'", "--exclusive", "--dependency=afterok:7", "--signal=USR1@90",
        "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in script, line
    _readable(script)


def test_a_name_runs_nothing(tmp_path: Path) -> None:
    run = tmp_path / NASTY.replace("/", "")
    script = _script(name=NASTY, run=run, arguments=["megaloop", "train", str(run / "x.yaml")])
    _readable(script)
    # the first commands, as far as they need no Slurm
    head = script.partition("# --- the ranks")[0].replace("scontrol", "true")
    done = subprocess.run(["bash", "-c", head + '\necho "$run"'], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == str(run)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "container", "dependency"])
def test_a_newline_would_be_another_line_of_the_script(field: str) -> None:
    with pytest.raises(MegaloopError, match="has a newline or another control character; take it out"):
        _script(JobOptions(1, 1, **{field: "x\ntouch pwned"}))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["run", "directory"])
def test_nor_may_a_path_have_one(path: str) -> None:
    changes: dict[str, Any] = {path: Path("/runs/x\ntouch pwned")}
    with pytest.raises(MegaloopError, match="has a newline or another control character; take it out"):
        _script(**changes)


@pytest.mark.parametrize(("time", "fine"), [("4:00:00", True), ("90", True), ("1-12", True), ("0", True), ("1:30", False),
                                            ("soon", False), ("2", False), ("0:01:30", False)])  # fmt: skip
def test_a_time_limit_leaves_time_before_the_signal(time: str, fine: bool) -> None:
    options = JobOptions(1, 1, time=time, signal_before=120)
    if fine:
        options.check()
        return
    with pytest.raises(MegaloopError, match="--time"):
        options.check()


def test_a_site_adds_modules_environment_and_options() -> None:
    site = Site(
        modules=["cuda/12.8"], environment={"X": "$(1)"}, setup=["ulimit -n 65536"], partition="small",
        sbatch_options=["--mem=0"], srun_options=["--cpu-bind=cores"], python="/opt/python",
    )  # fmt: skip
    script = _script(site=site)
    for text in ("module load cuda/12.8", "export X='$(1)'", "ulimit -n 65536", "#SBATCH --partition=small", "#SBATCH --mem=0",
                 "--cpu-bind=cores", "/opt/python -m megaloop train x.yaml"):  # fmt: skip
        assert text in script, text
    assert "--partition=big" in _script(JobOptions(1, 1, partition="big"), site), "what is asked for wins"
    _readable(script)


def test_the_example_site_can_be_used() -> None:
    _readable(_script(JobOptions(1, 1, container="image.sif"), load_site("example")))
    assert "apptainer exec --nv image.sif" in _script(JobOptions(1, 1, container="image.sif"), load_site("example"))
    assert "--container-image=image" in _script(JobOptions(1, 1, container="image"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module: [x]", "module: Extra inputs .*known keys: modules, "),
        ("[", "not YAML"),
        ("environment: {1x: a}", "no name of"),
    ],
)
def test_a_site_that_makes_no_sense(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(MegaloopError, match=message):
        load_site(str(tmp_path / "site.yaml"))


def test_a_template_that_reads_no_environment_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.j2").write_text(
        TEMPLATE.read_text().replace("env_file", "other").replace("{% if other %}", "{% if 0 %}")
    )
    with pytest.raises(MegaloopError, match="does not read --env-file; take the lines of env_file from"):
        _script(JobOptions(1, 1, env_file=tmp_path / "env"), template=tmp_path / "old.j2")
    _script(JobOptions(1, 1), template=tmp_path / "old.j2")


def test_a_rank_finds_its_place() -> None:
    slurm = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_CPUS_PER_TASK": "6",
    }  # fmt: skip
    assert slurm_rank_environment(slurm) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "OMP_NUM_THREADS": "6",
    }  # fmt: skip


def test_the_first_orderly_exit_is_kept(tmp_path: Path) -> None:
    environment = {"MEGALOOP_EXIT_FILE": str(tmp_path / "exit")}
    for code in (1, 75, 2, 0):
        record_exit(code, environment)
    assert (tmp_path / "exit").read_text() == "75\n"


@pytest.mark.parametrize("name", ["run", "tries", "max_restarts", "UID"])
def test_a_variable_of_the_job_scripts_own_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "env").write_text(f"{name}=1\n")
    with pytest.raises(MegaloopError, match=rf"env: {name} is a variable of the job script or of bash itself"):
        read_environment_file(tmp_path / "env")
    (tmp_path / "env").write_text("http_proxy=here\nWANDB_API_KEY=secret\n")
    assert set(read_environment_file(tmp_path / "env")) == {"http_proxy", "WANDB_API_KEY"}
