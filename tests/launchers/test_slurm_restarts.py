"""What the job script does about failures, where it cannot count them, and about signals. Slurm's programs are stubs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.slurm_script import read_environment_file
from megaloop.errors import MegaloopError
from tests.launchers.slurm_stubs import JOB, Stubs

SAYS = 'echo {} > "$MEGALOOP_EXIT_FILE"; exit 137'
"""A rank that ends in order, and srun's own code for it."""
TRIES = f"slurm/job-{JOB}.tries"


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    run = tmp_path / "a 'run' with \"quotes\", $(touch pwned), `touch pwned`; & \\ #*?["
    (run / "slurm").mkdir(parents=True)
    return Stubs(tmp_path, run)


def _history(stubs: Stubs) -> list[str]:
    return [json.loads(line)["event"] for line in (stubs.run / "slurm/history.jsonl").read_text().splitlines()]


def test_failures_without_a_new_checkpoint_are_limited(stubs: Stubs) -> None:
    done = stubs.start("exit 3")
    assert done.returncode == 3
    assert stubs.calls.count("srun") == 4
    assert _history(stubs) == ["start", "restart"] * 3 + ["start", "gave up: 4 failures without a new checkpoint"]
    assert (stubs.run / TRIES).read_text() == "0 4 0\n"
    assert not list(stubs.folder.glob("pwned"))


def test_a_new_checkpoint_gives_new_attempts(stubs: Stubs) -> None:
    step = 'n=$(grep -c srun "$CALLS")\nmanifest=$RUN/checkpoints/step-0000000$((n / 2))/manifest.json\n'
    ranks = f'{step}mkdir -p "${{manifest%/*}}"; touch "$manifest"\n((n < 9)) || {{ {SAYS.format(0)}; }}\nexit 1'
    done = stubs.start(ranks, max_restarts=2)
    assert done.returncode == 0, done.stderr
    assert stubs.calls.count("srun") == 9
    assert _history(stubs)[-1] == "finished"


def test_a_checkpoint_that_went_away_gives_none(stubs: Stubs) -> None:
    """Set aside as damaged, or not to be seen for a moment, and back again."""
    folder = stubs.run / "checkpoints/step-00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    away = f'mv "$RUN/checkpoints/{folder.name}" "$RUN/aside" || mv "$RUN/aside" "$RUN/checkpoints/{folder.name}"'
    assert stubs.start(f"{away} 2> /dev/null; exit 1").returncode == 1
    assert stubs.calls.count("srun") <= 5


@pytest.mark.parametrize("what", ["gone", "a file", "full", "the counter is a directory"])
def test_where_failures_cannot_be_counted_the_job_ends(stubs: Stubs, what: str, disk: Callable[[str], Path]) -> None:
    ranks = {
        "gone": 'rm -r "$RUN/slurm"',
        "a file": 'rm -r "$RUN/slurm"; touch "$RUN/slurm"',
        "full": 'head -c 1000000 /dev/zero > "$RUN/slurm/filler"',
        "the counter is a directory": f'mkdir -p "$RUN/{TRIES}"',
    }[what]
    if what == "full":
        stubs.run = disk("64k")
        (stubs.run / "slurm").mkdir()
    done = stubs.start(f"{ranks} 2> /dev/null; exit 3")
    assert done.returncode == 3
    assert stubs.calls.count("srun") == 1
    (said,) = [line for line in done.stderr.splitlines() if "gave up" in line]
    assert "no failures can be counted, as job-7.tries cannot be written" in said


def test_where_requeues_cannot_be_counted_the_job_does_not_go_back_into_the_queue(stubs: Stubs) -> None:
    done = stubs.start(f'mkdir "$RUN/{TRIES}"; {SAYS.format(75)}')
    assert done.returncode == 75
    assert "no requeues can be counted" in done.stderr
    assert "scontrol requeue 7" not in stubs.calls


def test_rounds_through_the_queue_are_limited(stubs: Stubs) -> None:
    for number in range(3):
        assert stubs.start(SAYS.format(75), SLURM_RESTART_COUNT=str(number)).returncode == 0
        assert stubs.calls == ["srun", "scontrol requeue 7", "scontrol update JobId=7 StartTime=now+10seconds"]
    done = stubs.start(SAYS.format(75), SLURM_RESTART_COUNT="3")
    assert done.returncode == 75
    assert "gave up: 4 times in the queue without a new checkpoint" in done.stderr
    assert stubs.calls == ["srun"]


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "none 1 1", "none a[$(touch${IFS}pwned)] 0", "0 1", "-1 -5 -5", "1\n2\n3", "\0" * 40, "9" * 80],
)
def test_a_counter_that_holds_garbage_counts_from_0(stubs: Stubs, text: str) -> None:
    (stubs.run / TRIES).write_text(text)
    assert stubs.start("exit 3").returncode == 3
    assert stubs.calls.count("srun") == 4
    assert not list(stubs.folder.rglob("pwned"))


def test_a_counter_with_leading_zeros_is_decimal(stubs: Stubs) -> None:
    (stubs.run / TRIES).write_text("00000000 02 09\n")
    assert stubs.start("exit 3").returncode == 3
    assert stubs.calls.count("srun") == 2


@pytest.mark.parametrize("text", ["garbage", "a[$(touch${IFS}pwned)]", "07", "750", ""])
def test_an_exit_code_that_no_rank_says_is_a_failure(stubs: Stubs, text: str) -> None:
    done = stubs.start(f"printf %s '{text}' > \"$MEGALOOP_EXIT_FILE\"", max_restarts=0)
    assert done.returncode == 1
    assert "gave up: 1 failures" in done.stderr
    assert not list(stubs.folder.rglob("pwned"))


def test_a_sigterm_between_two_starts_ends_the_job(stubs: Stubs) -> None:
    stubs.write("sleep", "kill -TERM $PPID")
    done = stubs.start("exit 3")
    assert done.returncode == 143
    assert stubs.calls == ["srun"]
    assert _history(stubs) == ["start", "restart", "ended by SIGTERM"]


def test_a_sigterm_that_the_script_alone_got_is_passed_on_once(stubs: Stubs) -> None:
    """Two of them, which would make the ranks leave without saving; they save, and the job goes back into the queue."""
    wait = 'until grep -q scancel "$CALLS"; do read -rt 0.01 <> <(:); done'
    done = stubs.start(f"kill -TERM $SCRIPT; {wait}; kill -TERM $SCRIPT; {SAYS.format(75)}")
    assert done.returncode == 0, done.stderr
    assert stubs.calls[:3] == ["srun", "scancel --signal=TERM 7", "scontrol requeue 7"]


def test_after_a_sigterm_nothing_starts_again(stubs: Stubs) -> None:
    done = stubs.start("kill -TERM $SCRIPT; exit 9")
    assert done.returncode == 143
    assert stubs.calls.count("srun") == 1


def test_a_job_that_slurm_ends_is_told_once(stubs: Stubs) -> None:
    """``scancel`` has told the ranks itself."""
    done = stubs.start(f"kill -TERM $SCRIPT; {SAYS.format(75)}", STATE="COMPLETING")
    assert done.returncode == 75
    assert stubs.calls == ["srun"]
    assert _history(stubs) == ["start", "ended by Slurm"]


def test_a_warning_that_the_script_got_sends_it_into_the_queue(stubs: Stubs) -> None:
    done = stubs.start("kill -USR1 $SCRIPT; exit 138")
    assert done.returncode == 0
    assert stubs.calls[:2] == ["srun", "scontrol requeue 7"]


def test_a_controller_that_does_not_answer_ends_nothing(stubs: Stubs) -> None:
    done = stubs.start('[[ $(grep -c srun "$CALLS") == 1 ]] || { ' + SAYS.format(0) + "; }\nexit 1", STATE="")
    assert done.returncode == 0
    assert _history(stubs) == ["start", "restart", "start", "finished"]


# --- variables that may be secrets ---

LINES = (
    "# a comment\n\n  \t \nA=1\nexport B='two words'\n  C = $(touch pwned) \t\nD=\"\"\nE='\nF=''\nG=a=b=c\nH=\\t\\\\x\n"
    "I=`touch pwned`; touch pwned\r\nJ='x\"\nK=ümläut\nline=1\nname=2\nvalue=3\nblank=4\nL=* ?\nM= x\nZ=last"
)


def test_an_environment_file_is_read_when_the_job_runs(stubs: Stubs) -> None:
    path = stubs.folder / "se 'cret"
    path.write_bytes(LINES.encode())
    path.chmod(0o600)
    stubs.env_file = path
    secret = read_environment_file(path)
    assert (secret["C"], secret["I"], secret["M"]) == (" $(touch pwned)", "`touch pwned`; touch pwned", " x")
    path.write_text(LINES.replace("last", "newer"))
    done = stubs.start(f'env -0 > "$RUN/environment"; {SAYS.format(0)}')
    assert done.returncode == 0, done.stderr
    seen = dict(item.partition("=")[::2] for item in (stubs.run / "environment").read_text().split("\0"))
    assert {name: seen[name] for name in secret} == secret | {"Z": "newer"}
    assert "two words" not in stubs.script()
    assert not list(stubs.folder.rglob("pwned"))


@pytest.mark.parametrize("text", [None, "A=1\nB\n", "1A=1\n", "A B=1\n", "=1\n"])
def test_an_environment_file_that_cannot_be_read_is_for_the_user_to_mend(stubs: Stubs, text: str | None) -> None:
    stubs.env_file = stubs.folder / "env"
    if text is not None:
        stubs.env_file.write_text(text)
    with pytest.raises(MegaloopError, match=r"--env-file .*expected (a file|NAME=VALUE)"):
        read_environment_file(stubs.env_file)
    done = stubs.start("exit 0")
    assert done.returncode == 2
    assert "env: cannot be read on " in done.stderr
    assert stubs.calls == []
