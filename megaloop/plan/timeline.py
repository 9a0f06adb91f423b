"""Pictures of a pipeline at work: rank by time, as text for a terminal and as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.text import Text

from megaloop.errors import MegaloopError
from megaloop.layout.rounds import Action, Rounds, Span

__all__ = ["StepPicture", "draw_png", "draw_text"]

_FORWARD, _BACKWARD = ("#163a6b", "#86b6e8"), ("#6b3413", "#e8b686")
"""Colours of the first round and of the last; those between lie between."""


def _colour(work: Action, rounds: int) -> str:
    first, last = _BACKWARD if work.backward else _FORWARD
    share = work.round / (rounds - 1) if rounds > 1 else 0.3
    parts = ((int(first[at : at + 2], 16), int(last[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in parts)


@dataclass(frozen=True)
class StepPicture:
    """One optimizer step of a pipeline.

    Attributes:
        title: what it is of.
        rounds: the order of work.
        forward, backward: time of a pass of one micro-batch, by round and pipeline rank (only ratios matter).

    Of a step of very many micro-batches only a shorter one is simulated (:meth:`Rounds.beginning`), and drawn.
    """

    title: str
    rounds: Rounds
    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]

    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """When each rank does what, as far as it is simulated; messages take no time."""
        return self._spans

    @cached_property
    def _simulated(self) -> Rounds:
        return self.rounds.beginning()

    @cached_property
    def _spans(self) -> tuple[tuple[Span, ...], ...]:
        return self._simulated.timeline(self._seconds)

    @property
    def note(self) -> str:
        """What is not simulated; nothing where all is."""
        done, there = self._simulated.micro_batches, self.rounds.micro_batches
        return "" if done == there else f" (estimated: {done:,} of {there:,} micro-batches are simulated)"

    def _seconds(self, rank: int, work: Action) -> float:
        return (self.backward if work.backward else self.forward)[work.round][rank]

    @property
    def waiting(self) -> float:
        """Fraction of the step in which ranks wait, on average: the bubble, and what uneven slices add.

        Each micro-batch that is not simulated takes as long as the slowest rank works on one.
        """
        spans = self.spans()
        busy = sum(span.stop - span.start for of_rank in spans for span in of_rank)
        end = _end(spans)
        if more := self.rounds.micro_batches - self._simulated.micro_batches:
            each = [sum(times) for times in zip(*self.forward, *self.backward, strict=True)]
            busy += more * sum(each)
            end += more * max(each)
        return 1 - busy / (len(spans) * end)


def _end(spans: Sequence[Sequence[Span]]) -> float:
    return max(span[-1].stop for span in spans)


def draw_text(picture: StepPicture, width: int) -> Text:
    """A line per rank; digits are forward passes, letters backward passes of the same micro-batches, dots waiting.

    Args:
        width: columns at most. Where the step is too long for it, the beginning is shown.
    """
    spans = picture.spans()
    tick = min(seconds for of_rank in picture.forward for seconds in of_rank if seconds)
    label = len(str(len(spans) - 1)) + 2
    columns = min(round(_end(spans) / tick), max(width - label - 4, 10))
    lines = Text(f"{picture.title}  ranks wait {picture.waiting:.1%} of a step{picture.note}\n", no_wrap=True)
    for rank, of_rank in enumerate(spans):
        lines.append(f"{rank:>{label - 2}}  ", "dim")
        upcoming = iter(of_rank)
        span: Span | None = next(upcoming)
        for column in range(columns):
            middle = (column + 0.5) * tick
            while span is not None and span.stop <= middle:
                span = next(upcoming, None)
            if span is None or span.start > middle:
                lines.append("·", "dim")
                continue
            number = span.work.micro_batch
            character = chr(ord("a") + number % 26) if span.work.backward else str(number % 10)
            lines.append(character, f"white on {_colour(span.work, picture.rounds.rounds)}")
        if columns * tick < _end(spans) - tick / 2 or picture.note:
            lines.append(" ...", "dim")
        if rank < len(spans) - 1:
            lines.append("\n")
    return lines


def draw_png(pictures: Sequence[StepPicture], path: Path) -> None:
    """All pictures below each other, on a white ground.

    Raises:
        MegaloopError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [0.9 + 0.32 * picture.rounds.ranks for picture in pictures]
    figure = Figure(figsize=(14, sum(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for picture, axis in zip(pictures, axes, strict=True):
        spans = picture.spans()
        for rank, of_rank in enumerate(spans):
            axis.broken_barh(
                [(span.start, span.stop - span.start) for span in of_rank],
                (rank - 0.42, 0.84),
                facecolors=[_colour(span.work, picture.rounds.rounds) for span in of_rank],
                edgecolor="white",
                linewidth=0.5,
            )
            if sum(map(len, spans)) <= 600:  # more would be illegible
                for span in of_rank:
                    axis.text(
                        (span.start + span.stop) / 2, rank, str(span.work.micro_batch),
                        ha="center", va="center", fontsize=7, color="white", clip_on=True,
                    )  # fmt: skip
        axis.set(xlim=(0, _end(spans)), ylim=(len(spans) - 0.5, -0.5), yticks=range(len(spans)), ylabel="pipeline rank")
        axis.set_title(
            f"{picture.title}: ranks wait {picture.waiting:.1%} of a step{picture.note}", loc="left", fontsize=10
        )
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[-1].set_xlabel(
        "time; blue: forward, orange: backward, lighter from round to round; white: waiting; numbers: micro-batches"
    )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise MegaloopError(f"picture {path} cannot be written ({error.strerror or error})") from None
