"""A run from start to end: build, resume, then train, validate and save, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaloop.checkpoint import (
    Checkpoint,
    CheckpointInfo,
    check_same_model,
    list_checkpoints,
    prune,
    resolve_checkpoint,
    save_checkpoint,
)
from megaloop.config import Config
from megaloop.data import BatchLoader, MicroBatch, Sources, embedding_rows, open_sources, validation_batches
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.parallel.engine import InitialValues, TrainingEngine, join_ranks
from megaloop.parallel.placement import Piece
from megaloop.parallel.state import StateSource
from megaloop.parallel.topology import Topology
from megaloop.train.agree import all_ranks_agree, from_rank_0
from megaloop.train.report import Position, RunReporter
from megaloop.train.rundir import RunDirectory
from megaloop.train.schedule import learning_rate

__all__ = ["run"]


def run(config: Config, *, resume: bool = False) -> None:
    """Train as ``config`` says, on the ranks that the launcher started; called by every rank.

    Args:
        resume: go on from the newest whole checkpoint of the run's directory (from the beginning, if there is none).

    Raises:
        MegaloopError: the same on every rank.
    """
    joined_before = dist.is_initialized()
    world_size = join_ranks()
    try:
        with all_ranks_agree():
            topology = Topology(*config.topology(world_size))
            sources = open_sources(config.data)
            plan, vocab_size = config.plan, embedding_rows(config, sources)
        with _open_directory(config, resume) as directory:
            start = _starting_point(config, plan, vocab_size, sources, resume)
            with RunReporter(config, plan, topology, vocab_size, start.position, directory) as reporter:
                engine = TrainingEngine(config, plan, topology, vocab_size, start.source, start.position.step)
                reporter.begins(engine, sources, start.checkpoint)
                _train(config, engine, sources, start.position, reporter)
                engine.close()
    finally:
        if not joined_before:  # whoever made the process group ends it
            dist.destroy_process_group()


def _train(config: Config, engine: TrainingEngine, sources: Sources, at: Position, reporter: RunReporter) -> None:
    """The training loop: for each step, train, then validate, check and save where they are due."""
    total = config.train.steps
    validation = _Validation(config, engine, sources)
    loader = _open_loader(config, engine, sources, at.samples)
    try:
        for step in range(at.step, total):
            lr = learning_rate(step, total, config.optimizer.lr, config.schedule)
            began = time.perf_counter()
            result = engine.train_step(_engine_batches(config, loader), lr)
            at = at.after(config, reporter.flops_per_step)
            seconds = time.perf_counter() - began
            validated = validation.run() if _due(at.step, config.validation.every, total) else None
            reporter.stepped(at, result, lr, seconds, validated)
            if config.train.check_replicas and at.step % config.train.check_replicas == 0:
                _check_replicas(engine, at.step)
            if _due(at.step, config.checkpoint.every, total):
                _save(config, engine, sources, at, reporter)
    finally:
        if loader is not None:
            loader.close()


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


# --- where a run begins ---


@dataclass(frozen=True)
class _Start:
    """Where a run begins, and from which weights.

    Attributes:
        checkpoint: the checkpoint that it resumes, None for a new run.
    """

    position: Position
    source: StateSource
    checkpoint: Path | None = None


@dataclass(frozen=True)
class _WeightsOnly:
    """A checkpoint's weights as the beginning of a new run, without its moments."""

    checkpoint: Checkpoint

    def read_piece(self, kind: str, piece: Piece) -> torch.Tensor | None:
        return self.checkpoint.read_piece(kind, piece) if kind in ("model", "master") else None


def _open_directory(config: Config, resume: bool) -> RunDirectory | _NoDirectory:
    """The run directory, held by rank 0; other ranks only learn whether that went well."""
    directory: RunDirectory | _NoDirectory = _NoDirectory()
    with all_ranks_agree():
        if dist.get_rank() == 0:
            directory = RunDirectory.create_or_open(config.directory, config, resume=resume)
    return directory


class _NoDirectory:
    """What ranks other than 0 hold of the run directory: nothing."""

    def __enter__(self) -> _NoDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _starting_point(config: Config, plan: DepthPlan, vocab_size: int, sources: Sources, resume: bool) -> _Start:
    """A new run's first step, or where the newest whole checkpoint left off."""
    path: Path | None = None
    with all_ranks_agree():
        if resume and dist.get_rank() == 0 and list_checkpoints(config.directory / "checkpoints"):
            path = resolve_checkpoint(config.directory)
            Checkpoint.open(path, verify="checksums").close()  # once, not by every rank
    path = from_rank_0(path)
    with all_ranks_agree():
        if path is not None:
            checkpoint = _open_same_model(path, config, plan, vocab_size)
            manifest = checkpoint.manifest
            if manifest.tokenizer and manifest.tokenizer.sha256 != sources.tokenizer_sha256:
                raise MegaloopError(
                    f"checkpoint {path} was trained with another tokenizer than the data's; "
                    "use the data it was trained on, or prepare new data with its tokenizer.model"
                )
            position = Position(manifest.step, manifest.samples, manifest.tokens, manifest.flops)
            if position.step >= config.train.steps:
                raise MegaloopError(
                    f"checkpoint {path} is at step {position.step}, and train.steps is {config.train.steps}: "
                    "nothing is left to train; raise train.steps to go on"
                )
            return _Start(position, checkpoint, path)
        if config.init is not None:
            checkpoint = _open_same_model(resolve_checkpoint(config.init), config, plan, vocab_size)
            return _Start(Position(), _WeightsOnly(checkpoint))
    return _Start(Position(), InitialValues(config, plan, vocab_size))


def _open_same_model(path: Path, config: Config, plan: DepthPlan, vocab_size: int) -> Checkpoint:
    checkpoint = Checkpoint.open(path, verify="sizes")
    check_same_model(checkpoint.manifest, config.model, plan, vocab_size)
    return checkpoint


# --- data ---


def _open_loader(config: Config, engine: TrainingEngine, sources: Sources, first: int) -> BatchLoader | None:
    """Micro-batches from global sample ``first`` on; None on ranks in the middle of the pipeline, which read none."""
    if not engine.needs_data:
        return None
    return BatchLoader(
        sources.datasets,
        sources.order(config.seed),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_rank=engine.coordinate.dp,
        dp_size=engine.topology.dp,
        start_sample=first,
        prefetch=config.data.prefetch,
    )


def _engine_batches(config: Config, batches: Any) -> Iterator[Any]:
    """Micro-batches as the engine takes them."""
    return (_as_engine_batch(config, each) for each in batches) if batches is not None else iter(())


def _as_engine_batch(config: Config, batch: MicroBatch) -> Any:
    inputs = (batch.inputs, batch.documents) if config.model.document_masking else batch.inputs
    return inputs, batch.targets


class _Validation:
    """The held-out loss over the same samples each time, in nats per token and bits per byte of text."""

    def __init__(self, config: Config, engine: TrainingEngine, sources: Sources):
        self._config, self._engine = config, engine
        replicas = [
            list(
                validation_batches(
                    sources.datasets,
                    samples=config.validation.samples,
                    micro_batch=config.train.micro_batch,
                    dp_rank=dp_rank,
                    dp_size=engine.topology.dp,
                )
            )
            for dp_rank in range(engine.topology.dp)
        ]
        everything = [batch for batches in replicas for batch in batches]
        tokens = sum(batch.targets.numel() for batch in everything)
        # bits per byte = nats per token x tokens per byte / ln 2
        self._bits = tokens / max(sum(batch.bytes for batch in everything), 1) / math.log(2)
        self._batches = replicas[engine.coordinate.dp]

    def run(self) -> tuple[float, float]:
        """(nats per token, bits per byte); collective."""
        loss = self._engine.evaluate(_engine_batches(self._config, self._batches), len(self._batches))
        return loss, loss * self._bits


# --- checks and checkpoints ---


def _check_replicas(engine: TrainingEngine, step: int) -> None:
    differing = engine.differing_replicas()
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise MegaloopError(
            f"step {step}: ranks that should hold the same bits differ in {', '.join(differing[:5])}{more}; "
            "stop using this run's later checkpoints, and report it: a gradient was reduced wrongly or memory is faulty"
        )


def _save(config: Config, engine: TrainingEngine, sources: Sources, at: Position, reporter: RunReporter) -> None:
    topology = engine.topology
    info = CheckpointInfo(
        step=at.step,
        tokens=at.tokens,
        samples=at.samples,
        flops=at.flops,
        plan=engine.plan,
        model=config.model.model_copy(update={"vocab_size": engine.vocab_size}),
        seed=config.seed,
        topology={"pp": topology.pp, "tp": topology.tp, "dp": topology.dp},
        precision=config.train.precision,
        config=config.model_dump(mode="json"),
    )
    checkpoints = config.directory / "checkpoints"
    result = save_checkpoint(checkpoints / f"step-{at.step:08d}", engine.pieces(), info, tokenizer=sources.tokenizer)
    with all_ranks_agree():
        if dist.get_rank() == 0:
            prune(checkpoints, config.checkpoint.keep)
    reporter.saved(at.step, result.path, result.bytes, result.seconds)
