"""Where a run begins: fresh weights, another run's weights, or its own newest checkpoint, deepened where it has to be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from megaloop.checkpoint import (
    Checkpoint,
    RunState,
    check_same_model,
    list_checkpoints,
    list_incomplete,
    resolve_checkpoint,
    step_of,
)
from megaloop.config import Config
from megaloop.config.changes import ChangedSetting, changed_settings
from megaloop.data import Sources
from megaloop.depth import DepthPlan, Growth, GrowthStage, InsertAt, Operator, before_growth, grow, stage_at, unloop
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.layout.pieces import Piece
from megaloop.layout.sources import GrownState, InitialValues, StateSource
from megaloop.model import parameter_specs
from megaloop.runs.allow import Allow
from megaloop.runs.position import Change, begin, go_on
from megaloop.runtime.collectives import broadcast_object, gather_objects, raise_on_all_ranks

__all__ = ["Damage", "Start", "growth_since", "stages_from", "starting_point"]


@dataclass(frozen=True)
class Damage:
    """A checkpoint that was skipped, and what is wrong with it."""

    path: Path
    reason: str

    @property
    def step(self) -> int:
        return step_of(self.path)


@dataclass(frozen=True)
class Start:
    """Where a run begins, and from which weights.

    Attributes:
        stages: the stages of the whole run.
        source: the state of the stage that the run begins in.
        checkpoint: the checkpoint that it resumes, None for a new run.
        grown_from: the checkpoint's plan, where it is another than that of the stage that the run begins in.
        damaged: newer checkpoints that could not be resumed, newest first.
        saved: the state in that checkpoint, None for a new run.
        changes: what a place in the data rests on, and is other than it was when that was saved.
        settings: others that decide the curve, and are other than they were.
    """

    position: RunState
    stages: tuple[GrowthStage, ...]
    source: StateSource
    checkpoint: Path | None = None
    grown_from: DepthPlan | None = None
    damaged: tuple[Damage, ...] = ()
    saved: RunState | None = None
    changes: tuple[Change, ...] = ()
    settings: tuple[ChangedSetting, ...] = ()

    @property
    def stage(self) -> GrowthStage:
        """The stage that the run begins in."""
        return stage_at(self.stages, self.position.step)


@dataclass(frozen=True)
class _WeightsOnly:
    """A checkpoint's weights as the beginning of a new run, without its moments."""

    checkpoint: Checkpoint

    def read_piece(self, state_name: str, piece: Piece) -> torch.Tensor | None:
        return self.checkpoint.read_piece(state_name, piece) if state_name in ("model", "master") else None


def starting_point(
    config: Config, vocab_size: int, sources: Sources, resume: bool, allowed: Collection[Allow] = ()
) -> Start:
    """A new run's first step, or where the newest complete checkpoint left off; collective.

    Every byte that the run starts from is compared with its checksum, and every number must be finite; the ranks share
    the work. A run's own checkpoints that are damaged are skipped; once the run has been accepted, whoever starts it
    renames them (:func:`megaloop.checkpoint.quarantine`), so that none is tried twice.

    Args:
        allowed: what may be other than when the checkpoint was saved.

    Raises:
        MegaloopError: on every rank: all checkpoints are damaged, or the newest complete one is of another shape, was grown
            in another way, holds NaN, or its place in the data is that of other data.
    """
    path, damaged = _newest_complete(config.directory / "checkpoints") if resume else (None, ())
    new = path is None
    if path is None and config.init is not None:
        path = _complete_init(config.init)
    if path is None:
        first = begin(config, sources).at_depth(config.stages[0].plan)
        return Start(first, config.stages, InitialValues(config.model, config.seed, config.stages[0].plan, vocab_size))
    with raise_on_all_ranks():
        checkpoint = Checkpoint.open(path, verify="sizes")
        checkpoint.check_values(share=dist.get_rank(), of=dist.get_world_size())
        if new:
            if config.data.tokenizer is None:  # fine-tuning may name another on purpose
                checkpoint.check_tokenizer(config.data.sources[0].path, sources.tokenizer_sha256)
            return _begin(config, vocab_size, checkpoint, _WeightsOnly(checkpoint), begin(config, sources))
        position, changes = _position(config, sources, checkpoint, allowed)
        start = _begin(config, vocab_size, checkpoint, checkpoint, position, path)
        settings = tuple(changed_settings(checkpoint.manifest.config, config))
        return replace(start, damaged=damaged, saved=checkpoint.manifest.run, changes=changes, settings=settings)


def _complete_init(init: Path) -> Path:
    """The checkpoint whose weights a new run begins with; it must be whole, as there is none to take instead."""
    found: Path | None = None
    with raise_on_all_ranks():
        if dist.get_rank() == 0:  # a running run may save a newer one before the others look
            found = resolve_checkpoint(init)
    path = broadcast_object(found)
    assert path is not None  # rank 0 has found one, or all have raised
    if (problem := _damage(path)) is not None:
        raise MegaloopError(f"checkpoint {path}: {problem}; begin with another checkpoint")
    return path


def _newest_complete(directory: Path) -> tuple[Path | None, tuple[Damage, ...]]:
    """The newest checkpoint of which every byte is as it was saved, and those after it; None if there is none at all."""
    candidates: list[Path] = []
    incomplete: list[Path] = []
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            candidates, incomplete = list_checkpoints(directory), list_incomplete(directory)
    damaged: dict[Path, str] = {}
    complete: Path | None = None
    for path in reversed(broadcast_object(candidates)):
        problem = _damage(path)
        if problem is None:
            complete = path
            break
        damaged[path] = problem
    if complete is None and damaged:
        newest, problem = next(iter(damaged.items()))
        raise MegaloopError(
            f"no checkpoint in {directory} is complete ({len(damaged)} damaged); of the newest, {newest.name}: {problem}; "
            "restore one from a copy, or start again in another run_dir"
        )
    if complete is not None:
        # older ones without a manifest are what is left of a deletion; a newer one had a manifest once
        damaged |= {
            path: "no manifest.json" for path in broadcast_object(incomplete) if step_of(path) > step_of(complete)
        }
    found = [Damage(path, problem) for path, problem in damaged.items()]
    return complete, tuple(sorted(found, key=lambda result: -result.step))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, None where they are whole; each rank reads a share of the files."""
    problem: str | None = None
    with raise_on_all_ranks():
        try:
            with Checkpoint.open(path, verify="sizes") as checkpoint:
                checkpoint.verify(share=dist.get_rank(), of=dist.get_world_size())
        except DamagedCheckpoint as error:
            problem = str(error).removeprefix(f"checkpoint {path}: ").removesuffix("; use another checkpoint")
    return next((found for found in gather_objects(problem) if found is not None), None)


def _position(
    config: Config, sources: Sources, checkpoint: Checkpoint, allowed: Collection[Allow]
) -> tuple[RunState, tuple[Change, ...]]:
    """How far the run of a checkpoint was, and what has changed since."""
    manifest = checkpoint.manifest
    checkpoint.check_tokenizer(config.data.sources[0].path, sources.tokenizer_sha256)
    if manifest.step >= config.train.steps:
        raise MegaloopError(
            f"checkpoint {checkpoint.path} is at step {manifest.step}, and train.steps is {config.train.steps}: "
            "nothing is left to train; raise train.steps to go on"
        )
    try:
        return go_on(config, sources, manifest.run, allowed)
    except MegaloopError as error:
        raise MegaloopError(f"checkpoint {checkpoint.path}: {error}") from None


def _begin(
    config: Config,
    vocab_size: int,
    checkpoint: Checkpoint,
    state: StateSource,
    position: RunState,
    resumed: Path | None = None,
) -> Start:
    """Begin from a checkpoint's state, grown where the stage at this step is deeper."""
    saved = checkpoint.manifest.plan
    try:
        stages = stages_from(config, saved)
        growth = growth_since(config, stages, saved, position.step)
    except MegaloopError as error:
        raise MegaloopError(f"checkpoint {checkpoint.path}: {error}") from None
    # a checkpoint of another number of layers that nothing made grow is refused here, like any other shape
    refused = growth.plan.layers != saved.layers and not growth.lineage
    check_same_model(checkpoint.manifest, config.model, growth.plan if refused else saved, vocab_size)
    checkpoint.check_tensors(parameter_specs(config.model, saved, vocab_size))
    event = stage_at(stages, position.step).event
    position = position.at_depth(
        growth.plan,
        grown=resumed is not None and growth.plan.layers > saved.layers and not event,
    )
    if growth.plan == saved:
        return Start(position, stages, state, resumed)
    moments = "copy" if config.growth is None else config.growth.moments
    grown = GrownState(state, growth, InitialValues(config.model, config.seed, growth.plan, vocab_size), moments)
    return Start(position, stages, grown, resumed, saved)


def stages_from(config: Config, saved: DepthPlan) -> tuple[GrowthStage, ...]:
    """The stages of a run that goes on from layers that exist already.

    The first stage has the layers, with their ids and lineage, that the plan had when it was as shallow: so a run may
    begin with a model that was grown before. A run that does not grow takes any plan that is as deep as it asks for.
    """
    count = config.stages[0].plan.layers
    layers = unloop(saved)
    if config.growth is None:
        unties = any(event.untie for event in config.depth_events)
        if saved.layers != count and not (unties and saved.layers > count):
            return config.stages
        return config.stages_from(before_growth(layers, count))
    growth = config.growth
    if saved.layers >= count:
        return config.stages_from(before_growth(layers, count))
    return config.stages_from(grow(layers, growth.operator, count, growth.block, insert_at=growth.insert_at).plan)


def growth_since(config: Config, stages: Sequence[GrowthStage], saved: DepthPlan, step: int) -> Growth:
    """From a checkpoint's plan to that of the stage which ``step`` belongs to; none where they are the same.

    Raises:
        MegaloopError: the checkpoint is deeper, or its lineage is another than the run's growth makes.
    """
    stage = stage_at(stages, step)
    position = stages.index(stage)
    for index in range(position, -1, -1):
        if stages[index].plan == saved:
            made = Growth.none(saved)
            for later in stages[index + 1 : position + 1]:
                made = made.then(later.growth)
            return made
    if unloop(saved) == unloop(stage.plan):  # only the order differs: loops come and go on load as well
        _check_style(saved, stage.plan)
        return Growth.reordered(saved, stage.plan)
    growth = config.growth
    if growth is None:
        return Growth.none(stage.plan)
    if saved.layers > stage.plan.layers:
        raise MegaloopError(
            f"it has {saved.layers} layers, but at step {step} the growth schedule is at {stage.plan.layers}; growth "
            "never shrinks: keep the schedule (and train.steps, which prop schedules divide) of the run that saved it"
        )
    if saved.is_looped and not stage.plan.is_looped:
        raise MegaloopError(
            f"its plan {saved.notation} is looped, but at step {step} the run has {stage.plan.layers} layers without a loop; "
            "make one change at a time: take the loop away first (megaloop loop --depth), or spell it in depth"
        )
    if saved.layers < stage.plan.layers:
        made = grow(unloop(saved), growth.operator, stage.plan.layers, growth.block, insert_at=growth.insert_at)
        if made.plan == unloop(stage.plan):
            _check_style(saved, stage.plan)
            return Growth(stage.plan, made.lineage).loop_of(saved)
    raise MegaloopError(
        f"the lineage of its {saved.layers} layers is {_made_by(config, saved)}, but growth.operator is "
        f"{growth.operator} (block {growth.block}, insert_at {growth.insert_at}); go on with the operator it was grown with"
    )


def _check_style(saved: DepthPlan, now: DepthPlan) -> None:
    """Refuse a loop that goes on otherwise than it was trained; a gate may come on load, but is not dropped in silence."""
    expected = replace(saved.style, gate=saved.style.gate or now.style.gate)
    if not (saved.is_looped and now.is_looped) or now.style == expected:
        return
    drop = ", or drop the gate with megaloop loop --no-gate" if saved.style.gate and not now.style.gate else ""
    raise MegaloopError(
        f"its loop has {_style(saved)}, but the configuration says {_style(now)}; "
        f"set loop.injection, loop.residual_scale, loop.norm and loop.gate as it was trained{drop}"
    )


def _style(plan: DepthPlan) -> str:
    style = plan.style
    return f"injection {style.injection}, residual_scale {style.residual_scale}, norm {str(style.norm).lower()}" + (
        ", a gate" if style.gate else ", no gate"
    )


def _made_by(config: Config, saved: DepthPlan) -> str:
    """Which operator makes such a lineage, as far as this run's stages allow to say."""
    growth = config.growth
    assert growth is not None
    saved = unloop(saved)
    if not saved.lineage:
        return f"that of fresh layers (growth.start={saved.layers} would begin with them)"
    first = before_growth(saved, growth.start)
    for operator in get_args(Operator):
        for insert_at in get_args(InsertAt):
            for block in range(1, growth.start + 1):
                try:
                    if grow(first, operator, saved.layers, block, insert_at=insert_at).plan == saved:
                        where = f", insert_at {insert_at}" if operator in ("lidas", "random") else ""
                        return f"that of {operator} (block {block}{where})"
                except MegaloopError:  # this operator does not get there by such blocks
                    continue
    return "that of another growth"
