"""``megaloop generate``: many prompts, halting and caches, and what it refuses; in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaloop.cli.generate import _parts
from megaloop.inference.generate import Generation, Writer
from megaloop.inference.halting import Halting
from megaloop.inference.sampling import Sampling
from megaloop.inference.setting import Setting
from megaloop.inference.thinking import Thinking
from tests.data.corpus import write_corpus
from tests.distributed import run_ranks
from tests.processes import run as megaloop
from tests.train.runs import configuration, train

PROMPTS = ["The king", "And", "It was the best of", "He said", "In", "A new line"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with a loop."""
    folder = tmp_path_factory.mktemp("generate")
    data = write_corpus(folder, sequence_length=32)
    run_ranks(1, train, configuration(data, folder / "run", depth="1-1x3-1", train__steps=10))
    return folder / "run"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in PROMPTS))
    return path


def test_a_file_of_prompts_on_two_ranks_gives_each_what_it_gets_alone(run: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--prompts", prompts, "--max-tokens", 9, "--batch", 1, "--halt", "latent=0.2", "--seed", 4]
    result = megaloop("generate", run, *options, "--ranks", 2, "--out", tmp_path / "out.jsonl")
    assert result.returncode == 0, result.stderr
    assert "6 continuations of " in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    writer = Writer.open(run, Setting(thinking=Thinking(Halting.parse("latent=0.2"))))
    for number, (prompt, line) in enumerate(zip(PROMPTS, lines, strict=True)):
        how = Generation(9, Sampling(0.8), seed=4)
        (alone,) = writer.continue_prompts([prompt], how, numbers=[number])
        assert (line["continuation"], line["tokens"], line["stopped"]) == (
            alone.continuation,
            alone.tokens,
            alone.stopped,
        )
        assert line["loops_mean"] == alone.loops_mean
    assert 1 < sum(line["loops_mean"] for line in lines) / len(lines) < 3


@pytest.mark.parametrize(
    ("prompts", "rows", "ranks", "sizes"), [(6, 16, 2, [3, 3]), (1, 16, 2, [1]), (10, 1, 2, [4, 4, 2]), (5, 16, 1, [5])]
)
def test_each_rank_has_a_part_of_the_prompts(prompts: int, rows: int, ranks: int, sizes: list[int]) -> None:
    parts = _parts(prompts, rows, ranks)
    assert [len(part) for part in parts] == sizes
    assert [number for part in parts for number in part] == list(range(prompts))


def test_what_halts_is_said(run: Path) -> None:
    result = megaloop(
        "generate", run, "--prompt", "The", "--greedy", "--max-tokens", 5, "--max-loops", 6, "--halt", "fixed=2"
    )
    assert result.returncode == 0, result.stderr
    assert "2.00 loops a token" in result.stderr
    assert "5 tokens in" in result.stderr


def test_longer_contexts_than_those_of_training_are_said(run: Path) -> None:
    notes: list[str] = []
    Writer.open(run).continue_prompts(["The"], Generation(40), on_note=notes.append)
    assert len(notes) == 1
    assert "trained on 32" in notes[0]


def test_text_stops_before_a_stop_string_and_none_of_it_is_shown(run: Path) -> None:
    writer = Writer.open(run)
    (plain,) = writer.continue_prompts(["The king"], Generation(30, Sampling()))
    stop = plain.continuation[8:12]
    shown: list[str] = []
    (found,) = writer.continue_prompts(["The king"], Generation(30, Sampling(), (stop,)), on_text=shown.append)
    assert found.continuation == plain.continuation[: plain.continuation.index(stop)] == "".join(shown)
    assert found.stopped == "stop"
    assert found.tokens < plain.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a text with --prompt, or a file of them with --prompts"),
        (["--prompt", "x", "--out", "y"], "--out and --ranks are for many prompts"),
        (["--prompts", "none.txt"], "--prompts none.txt: No such file"),
        (["--prompts", "empty.txt"], "--prompts empty.txt: there is no prompt in it"),
        (["--prompts", "bad.jsonl"], "--prompts bad.jsonl, line 2: no text in field 'prompt'"),
        (["--prompts", "good.txt", "--out", "good.txt"], "--out good.txt is there already"),
        (["--prompts", "good.txt", "--out", "none/out.jsonl"], "--out none/out.jsonl: there is no directory none; create it"),
        (["--prompt", "x", "--max-loops", "1", "--halt", "kl=1"], "--halt kl=1: the loop runs once; choose more loops"),
        (["--prompt", "x", "--max-loops", "1", "--cache", "last"], "--cache last: the loop runs once; choose more loops"),
        (["--prompt", "x", "--max-loops", "1", "--speculate", "2"], "--speculate 2: the loop runs once; choose more loops"),
        (["--prompt", "x", "--min-loops", "2"], "--min-loops, --halt-scope and --halt-decay belong to --halt"),
        (["--prompt", "x", "--depth", "1-1x2-1", "--max-loops", "2"], "--depth says how often the loop runs"),
        (["--prompt", "x", "--block", "0:1"], "say how often with --max-loops"),
        (["--prompt", "x", "--halt", "sleep"], "no such criterion; choose from kl,"),
        (["--prompt", "x", "--halt", "gate=0.5"], "the checkpoint has no gate"),
        (["--prompt", "x", "--depth", "3", "--halt", "kl=1"], "--halt kl=1: the loop runs once"),
        (["--prompt", "x", "--cache", "some"], "expected full, last or shared=N"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_line(
    run: Path,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import megaloop.cli.main as cli

    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "good.txt").write_text("a prompt\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["megaloop", "generate", str(run), *options])
    codes: list[int] = []

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(cli, "leave", leave)
    with pytest.raises(Left):
        cli.main()
    error = capfd.readouterr().err
    assert codes == [2]
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "good.txt").read_text() == "a prompt\n"
