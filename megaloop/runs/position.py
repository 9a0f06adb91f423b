"""How far a run is, step by step, and whether what it goes on with is what it has come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megaloop.checkpoint import DataState, RunState, SourceState
from megaloop.config import Config
from megaloop.data import DataSet, Sources
from megaloop.data.excluded import ExcludedSamples, past_excluded
from megaloop.data.order import CURRENT, check_version
from megaloop.data.sft import FineTuningSet
from megaloop.errors import MegaloopError
from megaloop.runs.allow import Allow
from megaloop.text import printable

__all__ = ["Change", "after_step", "begin", "go_on"]


@dataclass(frozen=True)
class Change:
    """Something on which the meaning of a place in the data rests, and which is another than it was.

    Attributes:
        what: the kind of change, as ``--allow`` names it.
        text: a part of a sentence: what it is now, and what it was.
    """

    what: Allow
    text: str


def begin(config: Config, sources: Sources) -> RunState:
    """The state of a run that has done nothing yet."""
    datasets: Sequence[DataSet | FineTuningSet] = sources.datasets
    described = tuple(
        SourceState(
            train=dataset.sha256("train"), validation=dataset.sha256("validation"), stable=stable, cooldown=cooldown
        )
        for dataset, stable, cooldown in zip(datasets, sources.weights, sources.cooldown, strict=True)
    )
    data = DataState(
        sequence_length=config.data.sequence_length, cooldown_sample=config.cooldown_sample, sources=described
    )
    return RunState.fresh(config.seed).model_copy(
        update={"batch": config.train.global_batch, "steps": config.train.steps, "order_version": CURRENT, "data": data}
    )


def after_step(
    at: RunState, config: Config, *, flops: int, lr: float, applied: bool, excluded: ExcludedSamples
) -> RunState:
    """The state one optimizer step later.

    Args:
        flops: of the step.
        lr: its learning rate.
        applied: False where it was skipped.
        excluded: samples that no step takes.
    """
    batch = config.train.global_batch
    return at.model_copy(
        update={
            "step": at.step + 1,
            "samples": past_excluded(at.samples, batch, excluded) + batch,
            "tokens": at.tokens + batch * config.data.sequence_length,
            "flops": at.flops + flops,
            "skipped": at.skipped + (not applied),
            "lr": lr,
        }
    )


def go_on(
    config: Config, sources: Sources, saved: RunState, allowed: Collection[Allow]
) -> tuple[RunState, tuple[Change, ...]]:
    """The state of a run that goes on from a saved one, and what has changed of what its place in the data rests on.

    Raises:
        MegaloopError: something has changed that is not among ``allowed``, or that no position could be exact for; or the
            order of the samples is one that is not known here.
    """
    check_version(saved.order_version)
    now = begin(config, sources)
    if not saved.step and not saved.samples:  # an import, say: nothing rests on a place in the data yet
        return now.model_copy(update={"tokens": saved.tokens, "flops": saved.flops, "depths": saved.depths}), ()
    changes = tuple(_changes(saved, now, [str(dataset.path) for dataset in sources.datasets]))
    if refused := [change for change in changes if change.what not in allowed]:
        flags = " ".join(f"--allow {what}" for what in dict.fromkeys(change.what for change in refused))
        raise MegaloopError(
            f"{'; '.join(change.text for change in refused)}: its place in the data, sample {saved.samples}, would not be where "
            f"it was; go on with what it had, or take the change with {flags}"
        )
    if any(change.what == Allow.batch for change in changes) and _has_phases(saved, now):
        raise MegaloopError(
            f"{next(change.text for change in changes if change.what == 'batch')}, but the weights of its cooldown begin at a sample "
            "that the batch decides; keep train.global_batch, or give each source one weight"
        )
    if _has_phases(now) and _had_another_batch(saved, now):
        raise MegaloopError(
            f"its {saved.step} steps took {saved.samples} samples, not {now.batch} (train.global_batch) each, and the weights "
            "of its cooldown would begin at a sample that is not that of the learning rate's; give each source one weight"
        )
    kept = {"seed": now.seed, "batch": now.batch, "steps": now.steps, "data": now.data}
    return saved.model_copy(update=kept), changes


def _changes(saved: RunState, now: RunState, paths: list[str]) -> Iterator[Change]:
    """What is not known of the saved state counts as unchanged."""
    if saved.seed != now.seed:
        yield Change(Allow.seed, f"it was trained with seed {saved.seed}, and seed is {now.seed} now")
    if saved.batch not in (None, now.batch):
        yield Change(Allow.batch, f"it was trained with train.global_batch {saved.batch}, which is {now.batch} now")
    if saved.data is None:
        return
    assert now.data is not None
    before, after = saved.data, now.data
    if before.sequence_length != after.sequence_length:
        lengths = f"{before.sequence_length}, which is {after.sequence_length} now"
        yield Change(Allow.data, f"it was trained with data.sequence_length {lengths}")
    if len(before.sources) != len(after.sources):
        yield Change(
            Allow.data, f"it was trained on {len(before.sources)} sources, and data.sources has {len(after.sources)}"
        )
        return
    for one, other, path in zip(before.sources, after.sources, paths, strict=True):
        for split in ("train", "validation"):
            expected, found = getattr(one, split), getattr(other, split)
            if expected not in (None, found):
                samples = "samples" if split == "train" else "validation samples"
                yield Change(
                    Allow.data,
                    f"data {printable(path)} holds other {samples} than it was trained "
                    f"{'on' if split == 'train' else 'with'} (SHA-256 {found[:12]}, expected {printable(expected[:12])})",
                )
    if _phases(before, saved.samples) != _phases(after, saved.samples):
        yield Change(
            Allow.data, "the weights of its sources (data.sources, or the beginning of the cooldown) were others"
        )


def _phases(data: DataState, samples: int) -> list[tuple[int, list[Fraction]]]:
    """(first sample, shares of the sources) of the phases of the mixture that ``samples`` samples have come from.

    Later ones do not matter: how many samples of each source were taken does not depend on them.
    """
    phases = [(0, _shares([source.stable for source in data.sources]))]
    if data.cooldown_sample is not None and data.cooldown_sample < samples:
        changed = _shares([source.cooldown for source in data.sources])
        if changed != phases[0][1]:
            phases.append((data.cooldown_sample, changed))
    return phases


def _shares(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    return [weight / total for weight in exact] if total else exact


def _had_another_batch(saved: RunState, now: RunState) -> bool:
    """Whether steps so far took another batch, which ``--allow batch`` took.

    The position alone does not tell, as it has skipped excluded samples; nor do the tokens alone, should the sequence length
    have been another.
    """
    assert now.batch is not None
    assert now.data is not None
    samples = saved.step * now.batch
    return saved.samples != samples and saved.tokens != samples * now.data.sequence_length


def _has_phases(*states: RunState) -> bool:
    """Whether the mixture has a cooldown with weights of its own."""
    sources = [source for state in states if state.data is not None for source in state.data.sources]
    return any(source.stable != source.cooldown for source in sources)
