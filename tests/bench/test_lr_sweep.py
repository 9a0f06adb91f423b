"""Each contender has its own best learning rate, found by short runs that come before those that are compared."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.bench.contenders import contender
from megaloop.bench.lr_sweep import SEED, LrSweep, Trials, shortened
from megaloop.bench.savings import Plan
from megaloop.config import Config
from megaloop.errors import MegaloopError
from megaloop.report.lr_sweep import LR_SWEEP, RateSweep, read_lr_sweep, write_lr_sweep
from tests.cli.test_cli import megaloop
from tests.data.corpus import write_corpus
from tests.processes import start
from tests.train.runs import configuration, hold, metrics, release, steps_done, wait_for

VOCAB = 512


def _values(data: Path = Path("data"), **changes: Any) -> dict[str, Any]:
    train = {"steps": 40, "global_batch": 4, "micro_batch": 4, "precision": "fp32"}
    growth = {"start": 2, "block": 2}
    return configuration(data, Path("unused"), **({"depth": "4", "train": train, "growth": growth} | changes))


def _config(**changes: Any) -> Config:
    return Config.model_validate(_values(**changes))


# --- what is chosen ---


def test_the_rate_with_the_lowest_loss_is_chosen() -> None:
    found = RateSweep.over({4e-3: 2.5, 1e-3: 2.3, 2e-3: 2.2})
    assert (found.chosen, found.edge, found.tie) == (2e-3, False, False)
    assert list(found.losses) == [1e-3, 2e-3, 4e-3]


def test_a_best_at_the_edge_and_a_tie_are_said() -> None:
    high = RateSweep.over({1e-3: 2.3, 2e-3: 2.2})
    assert (high.chosen, high.edge) == (2e-3, True)
    assert high.text == (
        "learning rate 0.002 (validation losses: 0.001: 2.3000, 0.002: 2.2000; "
        "it lies at the edge of the sweep, and the best may lie beyond)"
    )
    tie = RateSweep.over({1e-3: 2.3, 2e-3: 2.2, 3e-3: 2.2, 4e-3: 2.4})
    assert (tie.chosen, tie.edge, tie.tie) == (2e-3, False, True)
    assert "a higher rate did as well" in tie.text


def test_a_rate_that_diverged_bounds_the_sweep_as_well() -> None:
    found = RateSweep.over({1e-3: 2.3, 2e-3: 2.2, 4e-3: None})
    assert (found.chosen, found.edge) == (2e-3, False)
    assert "0.004: diverged" in found.text
    with pytest.raises(ValueError, match="empty"):
        RateSweep.over({1e-3: None, 2e-3: None})


# --- the file ---


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_lr_sweep(tmp_path) == {}
    found = {"baseline": RateSweep.over({1e-3: 2.3, 2e-5: None}), "lidas": RateSweep({1e-3: 2.0})}
    write_lr_sweep(tmp_path, found)
    assert read_lr_sweep(tmp_path) == found
    assert json.loads((tmp_path / LR_SWEEP).read_text()) == {
        "baseline": {"rates": {"2e-05": None, "0.001": 2.3}, "chosen": 0.001, "edge": True, "tie": False},
        "lidas": {"rates": {"0.001": 2.0}, "chosen": None, "edge": False, "tie": False},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no object of JSON"),
        ('{"a": 1', "no object of JSON"),
        ('{"a": 1}', "a: expected an object of rates, chosen, edge, tie"),
        ('{"a": {"rates": {}, "chosen": null}}', "a: expected an object of"),
        ('{"a": {"rates": {"x": 1}, "chosen": null, "edge": false, "tie": false}}', "x is no learning rate"),
        ('{"a": {"rates": {"nan": 1}, "chosen": null, "edge": false, "tie": false}}', "nan is no learning rate"),
        ('{"a": {"rates": {"-1": 1}, "chosen": null, "edge": false, "tie": false}}', "-1 is no learning rate"),
        ('{"a": {"rates": {"1": NaN}, "chosen": null, "edge": false, "tie": false}}', "rate 1: the loss is neither"),
        ('{"a": {"rates": {"1": "2"}, "chosen": null, "edge": false, "tie": false}}', "rate 1: the loss is neither"),
        ('{"a": {"rates": {"1": 2}, "chosen": 3, "edge": false, "tie": false}}', "chosen is neither null nor a rate"),
        ('{"a": {"rates": {"1": 2}, "chosen": [1], "edge": false, "tie": false}}', "chosen is neither null nor"),
        (
            '{"a": {"rates": {"1": null}, "chosen": 1, "edge": false, "tie": false}}',
            "chosen is neither null nor a rate",
        ),
        ('{"a": {"rates": {"1": 2}, "chosen": 1, "edge": 0, "tie": false}}', "edge and tie are not both true or false"),
        (
            '{"a": {"rates": {}, "chosen": null, "edge": false, "tie": false, "runs": [1]}}',
            "runs is no object of objects",
        ),
        ('{"a": {"rates": {}, "chosen": null, "edge": false, "tie": false, "runs": {"1": {"x": 2}}}}', "x is no seed"),
        (
            '{"a": {"rates": {}, "chosen": null, "edge": false, "tie": false, "runs": {"1": {"2": "3"}}}}',
            "the loss is neither",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / LR_SWEEP).write_text(text)
    with pytest.raises(MegaloopError) as found:
        read_lr_sweep(tmp_path)
    assert message in str(found.value)
    assert str(tmp_path / LR_SWEEP) in str(found.value)
    assert "\n" not in str(found.value)


# --- the short runs ---


def test_rates_and_steps_are_read() -> None:
    assert LrSweep.parse("2e-3, 1e-3,4e-3", None, _config()) == LrSweep((1e-3, 2e-3, 4e-3), 16)
    assert LrSweep.parse("1e-3,2e-3", 40, _config()) == LrSweep((1e-3, 2e-3), 40)
    for text in ("1e-3", "", "1e-3,1e-3", "1e-3,0", "1e-3,-1", "1e-3,nan", "1e-3,inf", "1e-3,x"):
        with pytest.raises(MegaloopError, match="expected two or more different learning rates"):
            LrSweep.parse(text, None, _config())
    with pytest.raises(MegaloopError, match=r"--lr-steps 41 is more than train.steps 40"):
        LrSweep.parse("1e-3,2e-3", 41, _config())


def test_a_short_run_is_the_recipe_in_fewer_steps() -> None:
    config = _config(depth="8", schedule={"warmup_steps": 30}, checkpoint={"every": 5, "keep": 9, "keep_every": 10})
    short = shortened(config, 20)
    assert (short.train.steps, short.schedule.warmup_steps) == (20, 20)
    assert (short.checkpoint.every, short.checkpoint.keep, short.checkpoint.keep_every) == (5, 1, 0)
    assert short.optimizer == config.optimizer
    starts = {
        name: [stage.first_step for stage in contender(short, name, VOCAB).stages]
        for name in ("lidas", "late-stack", "lidas+loop")
    }
    # 85%, 80%, and the cooldown, of 20 steps
    assert starts == {"lidas": [0, 2, 5, 8 + 2], "late-stack": [0, 16], "lidas+loop": [0, 2, 5, 10, 17]}
    assert contender(short, "baseline-matched", VOCAB).train.steps < 20


def test_an_explicit_schedule_becomes_shorter_in_proportion() -> None:
    stages = [{"steps": 10, "layers": 2}, {"steps": 30, "layers": 4}]
    config = _config(growth={"start": 2, "block": 2, "schedule": stages})
    assert [stage.steps for stage in shortened(config, 20).stages] == [5, 15]
    with pytest.raises(MegaloopError, match=r"--lr-steps 1: the stages of growth.schedule would last 0, 1 steps"):
        shortened(config, 1)


def test_each_contender_is_tried_at_each_rate_that_is_not_known(tmp_path: Path) -> None:
    config, sweep = _config(seed=3), LrSweep((1e-3, 2e-3), 20)
    write_lr_sweep(tmp_path, {"lidas": RateSweep({2e-3: None}, runs={2e-3: {3 + SEED: None}})})
    trials = Trials(config, VOCAB, tmp_path, contenders=["lidas", "iso-params"], sweep=sweep)
    assert [job.name for job in trials.jobs] == ["lidas-lr0.001", "iso-params-lr0.001", "iso-params-lr0.002"]
    for job in trials.jobs:
        made = Config.model_validate(yaml.safe_load(job.config.read_text()))
        assert (made.seed, job.seed, job.steps) == (3 + SEED, 3 + SEED, 20)
        assert made.directory == job.run == tmp_path / "sweep" / job.name
        assert made.optimizer.lr == float(job.name.partition("-lr")[2])
        assert not job.evaluations


def test_a_trial_gives_its_last_validation_loss(tmp_path: Path) -> None:
    trials = Trials(_config(), VOCAB, tmp_path, contenders=["lidas"], sweep=LrSweep((1e-3, 2e-3, 3e-3), 20))
    lowest, middle, highest = trials.jobs
    trials.keep(trials.jobs)
    assert read_lr_sweep(tmp_path) == {}
    for job, loss in ((lowest, 2.5), (middle, None)):  # null: it was not finite
        job.run.mkdir(parents=True)
        (job.run / "metrics.jsonl").write_text(json.dumps({"step": 20, "val_loss": loss}) + "\n")
        job.state = "done"
    highest.state = "diverged"
    trials.keep(trials.jobs[1:])
    assert read_lr_sweep(tmp_path)["lidas"] == RateSweep(
        {2e-3: None, 3e-3: None}, runs={2e-3: {SEED: None}, 3e-3: {SEED: None}}
    )
    trials.keep(trials.jobs)
    runs: dict[float, dict[int, float | None]] = {1e-3: {SEED: 2.5}, 2e-3: {SEED: None}, 3e-3: {SEED: None}}
    expected = {"lidas": RateSweep.over({1e-3: 2.5, 2e-3: None, 3e-3: None}, runs)}
    assert trials.results() == read_lr_sweep(tmp_path) == expected
    assert not Trials(_config(), VOCAB, tmp_path, contenders=["lidas"], sweep=LrSweep((1e-3, 2e-3, 3e-3), 20)).jobs


def test_of_several_seeds_the_mean_decides(tmp_path: Path) -> None:
    """A lucky run is not enough, nor is a rate that diverges with one of them."""
    sweep = LrSweep((1e-3, 2e-3, 4e-3), 20, 2)
    trials = Trials(_config(), VOCAB, tmp_path, contenders=["lidas"], sweep=sweep)
    rates = ("0.001", "0.002", "0.004")
    names = [f"lidas-lr{rate}" for rate in rates] + [f"lidas-lr{rate}-seed{SEED + 1}" for rate in rates]
    assert [job.name for job in trials.jobs] == names
    assert [job.seed for job in trials.jobs] == [SEED] * 3 + [SEED + 1] * 3
    for job, loss in zip(trials.jobs, (0.9, 0.1, 0.05, 0.7, 2.0, None), strict=True):
        job.run.mkdir(parents=True)
        (job.run / "metrics.jsonl").write_text(json.dumps({"step": 20, "val_loss": loss}) + "\n")
        job.state = "done"
    trials.keep(trials.jobs[:4])
    known = read_lr_sweep(tmp_path)["lidas"]
    assert known.chosen is None
    assert list(known.losses) == [1e-3]
    assert known.losses[1e-3] == pytest.approx(0.8)
    left = Trials(_config(), VOCAB, tmp_path, contenders=["lidas"], sweep=sweep)
    assert [job.name for job in left.jobs] == names[4:]
    trials.keep(trials.jobs)
    found = trials.results()["lidas"]
    assert found == read_lr_sweep(tmp_path)["lidas"]
    assert (found.chosen, found.losses[4e-3]) == (1e-3, None)
    assert (
        "0.001: 0.8000 (0.9000, 0.7000), 0.002: 1.0500 (0.1000, 2.0000), 0.004: diverged (0.0500, diverged)"
        in found.text
    )


def test_what_gives_no_rate_is_refused(tmp_path: Path) -> None:
    trials = Trials(_config(), VOCAB, tmp_path, contenders=["lidas"], sweep=LrSweep((1e-3, 2e-3), 20))
    trials.jobs[0].state = "done"
    with pytest.raises(MegaloopError, match=r"lidas-lr0.001 has no record of its last step, 20; remove it"):
        trials.keep(trials.jobs)
    for job in trials.jobs:
        job.state = "diverged"
    trials.keep(trials.jobs)
    with pytest.raises(MegaloopError, match=r"lidas diverged at every learning rate of the sweep \(0.001, 0.002\)"):
        trials.results()


def test_another_sweep_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    values = _config().model_dump(mode="json")
    Plan(values, VOCAB, LrSweep((1e-3, 2e-3), 20).to_json()).keep(tmp_path)
    Plan(values, VOCAB, LrSweep((1e-3, 2e-3), 20).to_json()).keep(tmp_path)
    for other, message in (
        (LrSweep((1e-3, 2e-3), 21).to_json(), "lr_sweep.steps was 20, is 21"),
        (LrSweep((1e-3, 3e-3), 20).to_json(), "lr_sweep.rates was"),
        (None, "lr_sweep was {'rates'"),
    ):
        with pytest.raises(MegaloopError, match=message):
            Plan(values, VOCAB, other).keep(tmp_path)
    plain = tmp_path / "plain"
    Plan(values, VOCAB).keep(plain)
    assert "lr_sweep" not in json.loads((plain / "savings.json").read_text())  # as it always was


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_rates_are_used(tmp_path: Path) -> None:
    """Of two contenders and two rates, of which one is far too high; terminated while the first two runs train."""
    corpus, preset, out = write_corpus(tmp_path, sequence_length=32), tmp_path / "tiny.yaml", tmp_path / "out"
    faults, validation = {"max_rollbacks": 0}, {"every": 0, "samples": 4}
    preset.write_text(yaml.safe_dump(_values(corpus, faults=faults, validation=validation)))
    arguments = [
        "bench", "savings", "--preset", str(preset), "--out", str(out), "--contenders", "iso-params,late-stack",
        "--lr-sweep", "4e-3,1e12", "--lr-steps", "24", "--examples", "5", "--shots", "0", "--loops", "1", "--jobs", "2",
    ]  # fmt: skip
    (tmp_path / "hold-8").touch()
    process = start(*arguments, setup=hold, setup_arguments=(tmp_path,))
    trials = [out / "sweep" / name for name in ("late-stack-lr0.004", "late-stack-lr1000000000000.0")]
    wait_for(lambda: all(steps_done(run) == 7 for run in trials), process)
    process.send_signal(signal.SIGTERM)
    release(tmp_path)
    process.communicate(timeout=300)
    assert process.returncode == 130
    saved = len(metrics(trials[0]))
    assert 7 <= saved < 24
    assert not (out / "runs").exists()

    done = megaloop(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in metrics(trials[0])] == list(range(1, 25))
    starts = [json.loads(line) for line in (trials[0] / "events.jsonl").read_text().splitlines()]
    assert [item["step"] for item in starts if item["event"] == "start"] == [0, saved]
    found = read_lr_sweep(out)
    for name in ("iso-params", "late-stack"):
        last = metrics(out / "sweep" / f"{name}-lr0.004")[-1]
        assert dict(found[name].losses) == {4e-3: last["val_loss"], 1e12: None}
        assert (found[name].chosen, found[name].edge) == (4e-3, True)
        assert (
            f"{name}: learning rate 0.004 (validation losses: 0.004: {last['val_loss']:.4f}, 1e+12: diverged"
            in done.stderr
        )
        assert f"{name}-lr1000000000000.0: diverged" in done.stderr
        run = out / "runs" / f"{name}-seed0"
        assert max(record["lr"] for record in metrics(run)) == pytest.approx(4e-3)
        assert len(metrics(run)) == 40
    assert [row["group"] for row in json.loads(done.stdout)["savings"]] == ["iso-params", "late-stack"]

    (out / "sweep").rename(tmp_path / "elsewhere")  # what is known is not trained again
    again = megaloop(*arguments)
    assert again.returncode == 0, again.stderr
    assert not (out / "sweep").exists()
    other = megaloop(*arguments, "--lr-steps", "25")
    assert other.returncode == 2
    assert "lr_sweep.steps was 24, is 25" in other.stderr


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(_values()))
    for arguments, message in (
        (("--lr-sweep", "1e-3"), "--lr-sweep 1e-3: expected two or more different learning rates"),
        (("--lr-sweep", "1e-3,2e-3", "--lr-steps", "41"), "--lr-steps 41 is more than train.steps 40"),
        (("--lr-steps", "5"), "--lr-steps is for --lr-sweep"),
        (("--lr-seeds", "2"), "--lr-seeds is for --lr-sweep"),
        (("--contenders", ", "), "--contenders names none"),
    ):
        result = megaloop("bench", "savings", "--preset", preset, *arguments, "--out", tmp_path / "out")
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
        assert len(result.stderr.splitlines()) == 1
