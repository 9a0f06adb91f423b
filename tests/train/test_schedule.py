from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaloop.config import ScheduleConfig
from megaloop.train.schedule import learning_rate


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, ScheduleConfig]:
    steps = draw(st.integers(1, 300))
    schedule = ScheduleConfig(
        kind=draw(st.sampled_from(["trapezoid", "cosine"])),
        warmup_steps=draw(st.integers(0, steps)),
        cooldown=draw(st.floats(0, 1)),
        final=draw(st.floats(0, 1)),
        decay=draw(st.sampled_from(["linear", "sqrt"])),
    )
    return steps, schedule


def rates(steps: int, schedule: ScheduleConfig, lr: float = 1.0) -> list[float]:
    return [learning_rate(step, steps, lr, schedule) for step in range(steps)]


@given(runs())
def test_every_step_learns_and_none_exceeds_the_peak(run: tuple[int, ScheduleConfig]) -> None:
    assert all(0 < rate <= 1 for rate in rates(*run))


@given(runs())
def test_the_rate_rises_then_stays_then_falls(run: tuple[int, ScheduleConfig]) -> None:
    values = rates(*run)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


@given(runs(), st.floats(1e-6, 1.0))
def test_the_peak_scales_the_whole_schedule(run: tuple[int, ScheduleConfig], peak: float) -> None:
    assert rates(*run, lr=peak) == pytest.approx([peak * rate for rate in rates(*run)])


@given(st.integers(1, 100), st.integers(0, 100))
def test_warm_up_is_linear_and_ends_at_the_peak(warmup: int, rest: int) -> None:
    values = rates(warmup + rest, ScheduleConfig(warmup_steps=warmup, cooldown=0))
    assert values[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert values[warmup:] == [1.0] * rest


def test_a_trapezoid_of_twenty_steps() -> None:
    schedule = ScheduleConfig(warmup_steps=4, cooldown=0.2, final=0.0)
    assert rates(20, schedule) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 13 + [0.75, 0.5, 0.25])


def test_the_cooldown_covers_its_fraction_and_heads_for_the_final_rate() -> None:
    schedule = ScheduleConfig(cooldown=0.15, final=0.1)
    assert schedule.cooldown_start(1000) == 850
    assert learning_rate(849, 1000, 1.0, schedule) == learning_rate(850, 1000, 1.0, schedule) == 1.0
    assert learning_rate(851, 1000, 1.0, schedule) < 1.0
    assert learning_rate(925, 1000, 1.0, schedule) == pytest.approx(0.55)
    assert learning_rate(999, 1000, 1.0, schedule) == pytest.approx(0.106)
    assert learning_rate(1000, 1000, 1.0, schedule) == pytest.approx(0.1)


def test_a_root_falls_first_fast_then_slowly_over_the_same_cooldown() -> None:
    schedule = ScheduleConfig(cooldown=0.15, decay="sqrt")
    assert learning_rate(849, 1000, 1.0, schedule) == learning_rate(850, 1000, 1.0, schedule) == 1.0
    assert learning_rate(1000, 1000, 1.0, schedule) == 0.0
    schedule = ScheduleConfig(cooldown=0.4, decay="sqrt", final=0.2)
    falling = [2 * (0.2 + 0.8 * fraction) for fraction in (1.0, 0.5, 0.25, 0.0)]
    assert [learning_rate(step, 1000, 2.0, schedule) for step in (600, 700, 825, 1000)] == pytest.approx(falling)


@given(runs())
def test_a_linear_cooldown_is_to_the_bit_what_it_was_before_there_was_another(run: tuple[int, ScheduleConfig]) -> None:
    steps, drawn = run
    schedule = drawn.model_copy(update={"decay": "linear"})
    begin = schedule.cooldown_start(steps)
    for step in range(begin, steps):
        warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
        progress = min(1.0, (step - begin) / max(steps - begin, 1))
        fall = 1.0 - progress if schedule.kind == "trapezoid" else 0.5 * (1.0 + math.cos(math.pi * progress))
        assert learning_rate(step, steps, 3e-3, schedule) == 3e-3 * min(
            warmup, schedule.final + (1.0 - schedule.final) * fall
        )


def test_the_cosine_is_half_way_down_in_the_middle() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=100, final=0.2)
    assert schedule.cooldown_start(1100) == 100
    assert learning_rate(99, 1100, 1.0, schedule) == learning_rate(100, 1100, 1.0, schedule) == 1.0
    assert learning_rate(600, 1100, 1.0, schedule) == pytest.approx(0.6)
    assert learning_rate(1100, 1100, 1.0, schedule) == pytest.approx(0.2)


def test_without_a_cooldown_the_rate_stays_at_its_peak() -> None:
    assert rates(50, ScheduleConfig(cooldown=0)) == [1.0] * 50
    assert ScheduleConfig(cooldown=0).cooldown_start(50) == 50


@given(runs(), st.integers(1, 20), st.sets(st.integers(0, 300), max_size=4))
def test_a_growth_warms_the_rate_up_again_and_leaves_the_rest(
    run: tuple[int, ScheduleConfig], warmup: int, growths: set[int]
) -> None:
    steps, schedule = run
    plain = rates(steps, schedule)
    for step, rate in enumerate(plain):
        found = learning_rate(step, steps, 1.0, schedule, growth_steps=growths, growth_warmup=warmup)
        since = min((step - first for first in growths if first <= step), default=warmup)
        if since >= warmup:
            assert found == rate
        else:
            assert found == pytest.approx(rate * (since + 1) / warmup)


def test_a_growth_within_the_warm_up_of_the_one_before_starts_it_anew() -> None:
    found = [
        learning_rate(step, 12, 2.0, ScheduleConfig(cooldown=0), growth_steps=(2, 5), growth_warmup=4)
        for step in range(12)
    ]
    assert found == [2.0, 2.0, 0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]


@given(runs(), st.sets(st.integers(0, 300), max_size=4))
def test_without_a_warm_up_growths_leave_the_rate_alone(run: tuple[int, ScheduleConfig], growths: set[int]) -> None:
    steps, schedule = run
    assert rates(steps, schedule) == [
        learning_rate(step, steps, 1.0, schedule, growth_steps=growths) for step in range(steps)
    ]
