"""Pictures of a pipeline: what stands where in the text, and a PNG that is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaloop.errors import MegaloopError
from megaloop.layout.rounds import Rounds
from megaloop.plan.memory import in_flight
from megaloop.plan.timeline import StepPicture, draw_png, draw_text
from tests import processes

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_one_forward_one_backward_as_it_is_known() -> None:
    """Narayanan et al., arXiv 2104.04473, figure 4 in small: 1F1B of 4 micro-batches on 2 ranks."""
    picture = StepPicture("step", Rounds(2, 4), ((1.0, 1.0),), ((2.0, 2.0),))
    title, *lines = draw_text(picture, 80).plain.split("\n")
    assert title == "step  ranks wait 20.0% of a step"
    assert lines == ["0  01··aa2bb3cc·dd", "1  ·0aa1bb2cc3dd··"]
    assert picture.waiting == pytest.approx(picture.rounds.bubble)


def test_two_rounds_wait_half_as_long() -> None:
    once, twice = (
        StepPicture("step", Rounds(4, 8, rounds), ((1.0,) * 4,) * rounds, ((2.0,) * 4,) * rounds) for rounds in (1, 2)
    )
    assert once.waiting == pytest.approx(3 / 11)
    assert twice.waiting == pytest.approx(3 / 19)


def test_uneven_slices_and_recomputation_take_their_time() -> None:
    picture = StepPicture("step", Rounds(2, 2), ((2.0, 1.0),), ((4.0, 2.0),))
    assert draw_text(picture, 80).plain.split("\n")[1:] == ["0  0011·aaaabbbb", "1  ··0aa1bb·····"]
    assert picture.waiting == pytest.approx(1 - (12 + 6) / (2 * 13))
    again = StepPicture("step", Rounds(2, 2), ((1.0, 1.0),), ((3.0, 3.0),))
    assert max(span.stop for span in again.spans()[0]) == 4 * 3
    assert again.waiting == pytest.approx(again.rounds.bubble)


def test_a_long_step_is_cut_where_the_terminal_ends() -> None:
    lines = draw_text(StepPicture("step", Rounds(12, 64), ((1.0,) * 12,), ((2.0,) * 12,)), 60).plain.split("\n")[1:]
    assert all(len(line) == 60 and line.endswith(" ...") for line in lines)
    assert lines[11].startswith("11  ···········0aa1bb")


def test_the_command_draws_text_and_png(tmp_path: Path) -> None:
    command = ["plan", DEMO, "model.vocab_size=4096"]
    picture = tmp_path / "step.png"
    done = processes.run(*command, "--timeline", "--timeline-png", picture)
    assert done.returncode == 0, done.stderr
    assert "Stage 3: 12 layers, pp 2 x tp 1 x dp 1  ranks wait 20.5% of a step" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone = processes.run(*command, "parallel.pp=1", "--timeline-png", picture)
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)
    assert "no stage has a pipeline (pp 1)" in alone.stderr


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match="cannot be written"):
        draw_png([StepPicture("step", Rounds(2, 4), ((1.0, 1.0),), ((2.0, 2.0),))], tmp_path / "missing" / "step.png")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro_batches", "rounds"), [(2, 10_401, 1), (4, 2603, 2), (3, 1720, 4)])
def test_a_step_too_long_to_simulate_is_estimated(ranks: int, micro_batches: int, rounds: int) -> None:
    """A shorter one stands for it: as many slices in flight, and the waiting of the whole to 1e-4 of the step."""
    iterations = tuple(tuple(1.0 + 0.1 * rank for rank in range(ranks)) for _ in range(rounds))
    long = Rounds(ranks, micro_batches, rounds)
    picture = StepPicture("step", long, iterations, iterations)
    assert long.beginning().micro_batches < micro_batches
    assert f"of {micro_batches:,} micro-batches are simulated" in draw_text(picture, 60).plain
    spans = long.timeline(lambda rank, work: iterations[work.round][rank])
    end, busy = max(item[-1].stop for item in spans), sum(span.stop - span.start for item in spans for span in item)
    assert picture.waiting == pytest.approx(1 - busy / (ranks * end), abs=1e-4)
    for rank in range(ranks):
        assert in_flight(long, rank) == _held(long, rank)


def _held(rounds: Rounds, rank: int) -> int:
    held = most = 0
    for work in rounds.passes(rank):
        held += -1 if work.backward else 1
        most = max(most, held)
    return most


def test_a_step_of_usual_length_is_simulated_whole() -> None:
    for rounds in (Rounds(12, 64), Rounds(8, 512, 4), Rounds(2, 2), Rounds(64, 64)):
        assert rounds.beginning() is rounds
