"""Bad input, through the real command line: one clear line, exit code 2, and nothing lost."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.prepare import prepare
from tests import processes
from tests.distributed import RankPool
from tests.train.runs import configuration, metrics, train


def _megaloop(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments)


def _train(folder: Path, values: dict[str, Any], *arguments: object) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return _megaloop("train", path, *arguments)


def _refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode == 2, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stdout
    return lines[0]


def _digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "logs" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=5"], "unknown key 'train.step'; did you mean 'train.steps'?"),
        (["optimiser.lr=1"], "unknown key 'optimiser'; did you mean 'optimizer'?"),
        (["train.steps=many"], "train.steps: "),
        (["parallel.tp=3"], "parallel.tp 3 does not divide model.num_heads 4"),
        (["parallel.tp=4"], "parallel.tp 4 does not divide model.num_kv_heads 2"),
        (["parallel.pp=4"], "parallel.pp 4 is more pipeline ranks than the 3 layers"),
        (["parallel.pp=2", "parallel.dp=2", "--ranks=3"], "pp 2 x tp 1 x dp 2 makes 4 ranks, but there are 3"),
        (["train.global_batch=5", "parallel.dp=2"], "train.global_batch 5 is not a multiple of micro_batch 1 x dp 2"),
        (["data.sequence_length=64"], "data.sequence_length 64 is longer than the 32 tokens"),
        (["data.sources.0.path=nowhere"], "data nowhere: no data.json there"),
        (["model.vocab_size=128"], "model.vocab_size 128 is smaller than the data's vocabulary of 400"),
        (["depth=4-4x"], "depth: cannot read '4-4x'"),
        (["depth=1-2x3-1", "loop.backprop=4"], "loop.backprop 4 is more than the 3 times"),
        (["init=nowhere"], "checkpoint nowhere: no such directory"),
    ],
)
def test_a_bad_configuration_is_one_line(corpus: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    values = configuration(corpus, tmp_path / "run")
    values["parallel"]["dp"] = None
    before = _digest(corpus)
    assert message in _refused(_train(tmp_path, values, *overrides))
    assert _digest(corpus) == before


def test_an_error_on_several_ranks_is_one_line_too(corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (2, 1, 1), data__sequence_length=64)
    assert "longer than the 32 tokens" in _refused(_train(tmp_path, values))


def test_debug_shows_where_it_came_from(corpus: Path, tmp_path: Path) -> None:
    result = _train(tmp_path, configuration(corpus, tmp_path / "run", depth="x"), "--debug")
    assert "Traceback" in result.stderr


@pytest.fixture(scope="module")
def finished(ranks_1: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with two checkpoints."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    ranks_1.run(train, configuration(corpus, directory, train__steps=4, checkpoint__every=2))
    return directory


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(
    corpus: Path, tmp_path: Path, finished: Path
) -> None:
    """It never begins anew by itself: what is damaged may still be repaired from a copy."""
    run = shutil.copytree(finished, tmp_path / "run")
    _truncate(run / "checkpoints/step-00000002/model/rank-00000.safetensors")
    _flip(run / "checkpoints/step-00000004/optim/rank-00000.safetensors")
    before = _digest(run / "checkpoints")
    error = _refused(_train(tmp_path, configuration(corpus, run, train__steps=6), "--resume"))
    assert "is complete (2 damaged); of the newest, step-00000004: optim/rank-00000.safetensors is altered" in error
    assert _digest(run / "checkpoints") == before


def test_a_checkpoint_of_another_shape_shows_both(corpus: Path, tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    values = configuration(corpus, run, train__steps=6, depth="2", model__ffn_size=96)
    error = _refused(_train(tmp_path, values, "--resume"))
    assert "depth 3" in error
    assert "ffn_size 64" in error
    assert "depth 2" in error
    assert "ffn_size 96" in error


def test_data_of_another_tokenizer_is_refused(corpus: Path, tmp_path: Path, finished: Path) -> None:
    prepare([corpus.parent / "text.jsonl"], tmp_path / "other", vocab_size=390, sequence_length=32)
    run = shutil.copytree(finished, tmp_path / "run")
    values = configuration(tmp_path / "other", run, train__steps=6)
    message = _refused(_train(tmp_path, values, "--resume"))
    for path in (
        tmp_path / "other" / "tokenizer.model",
        corpus / "tokenizer.model",
    ):  # both are named by their checksum
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in message


def test_a_finished_run_says_so(corpus: Path, finished: Path, tmp_path: Path) -> None:
    values = configuration(corpus, finished, train__steps=4)
    before = _digest(finished / "checkpoints")
    assert "already holds a run at step 4; add --resume" in _refused(_train(tmp_path, values))
    assert "nothing is left to train; raise train.steps" in _refused(_train(tmp_path, values, "--resume"))
    assert _digest(finished / "checkpoints") == before
    assert [record["step"] for record in metrics(finished)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_live_run_keeps_its_directory(corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", train__steps=100_000, validation__every=0)
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(values))
    live = processes.start("train", path)
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "run" / "metrics.jsonl").exists() and metrics(tmp_path / "run")):
            assert live.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        error = _refused(_train(tmp_path, values, "--resume"))
        assert "is in use by a live run" in error
        assert f"process {live.pid}" in error
        assert live.poll() is None
    finally:
        live.send_signal(signal.SIGKILL)
        live.wait()


@pytest.mark.parametrize("command", ["generate", "export"])
def test_what_is_no_checkpoint_is_refused_by_every_command(tmp_path: Path, command: str) -> None:
    options = ["--prompt", "In"] if command == "generate" else ["--out", tmp_path / "out"]
    assert "no such directory" in _refused(_megaloop(command, tmp_path / "nowhere", *options))
    assert "no complete checkpoint in" in _refused(_megaloop(command, tmp_path, *options))
