"""A run from start to end: build, resume, then train, validate, save and grow, step by step."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Collection, Sequence
from typing import Literal

import torch.distributed as dist

from megaloop.checkpoint import CheckpointInfo, GrowthEntry
from megaloop.config import Config
from megaloop.data import BatchLoader, ExcludedSamples, Sources, embedding_rows, open_sources
from megaloop.depth import GrowthStage, stage_at
from megaloop.errors import MegaloopError
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import StepResult, TrainingEngine, join_ranks
from megaloop.parallel.live import reshard
from megaloop.runs.allow import Allow
from megaloop.runs.events import Signalled, Spiked, StopReached
from megaloop.runs.metrics import RankRecord
from megaloop.runs.position import after_step
from megaloop.runtime.collectives import all_reduce_max, broadcast_object, gather_objects, raise_on_all_ranks
from megaloop.runtime.hardware import memory_bytes
from megaloop.train.directory import accepted, excluded_samples, newest_step, open_directory
from megaloop.train.faults import Faults, RollBack, Spike, check_replicas
from megaloop.train.report import RunReporter
from megaloop.train.saving import Saver
from megaloop.train.schedule import learning_rate
from megaloop.train.signals import StopSignals
from megaloop.train.start import Start, starting_point
from megaloop.train.validation import Validation, validation_samples
from megaloop.train.watchdog import Watchdog

__all__ = ["Ending", "run"]

Ending = Literal["finished", "stopped", "signalled", "interrupted"]
"""All steps are done; or those until ``stop_at``; or a signal asked to end (Ctrl-C: interrupted), and the rest is to follow."""


def run(
    config: Config,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    signals: StopSignals | None = None,
    allowed: Collection[Allow] = (),
    go_on: str | None = None,
    restarts: int = 0,
) -> Ending:
    """Train as ``config`` says, on the ranks that the launcher started; called by every rank.

    Args:
        resume: go on from the newest complete checkpoint of the run's directory (from the beginning, if there is none).
        stop_at: save and end after this step, as if the rest were to follow later; the schedules are those of all steps.
        signals: asks to end; looked at after each step.
        allowed: what may be other than where the run was saved: its data, its seed, its batch.
        go_on: the command that goes on with this run to its end, to be named where it stops before.
        restarts: how often the launcher has started these ranks again.

    Returns:
        How it ended, the same on every rank. Whatever was trained is saved.

    Raises:
        MegaloopError: the same on every rank. If it comes before the first step, the run's directory is as it was before.
    """
    joined_before = dist.is_initialized()
    world_size = join_ranks()
    try:
        with open_directory(config, resume) as directory:
            newest = newest_step(config) if resume else 0
            first = min(newest, config.train.steps - 1)  # damage, or that nothing is left, is for later to say
            with raise_on_all_ranks():
                config.check_world(world_size, first, stop_at)
                if stop_at is not None and not 0 < stop_at <= config.train.steps:
                    raise MegaloopError(
                        f"--stop-at {stop_at}: expected a step from 1 to train.steps, {config.train.steps}"
                    )
                sources = open_sources(config.data, config.init)
                vocab_size = embedding_rows(config, sources)
                samples = validation_samples(config, sources, world_size, first, stop_at)
            if newest >= config.train.steps and restarts:
                return "finished"  # it died after its last checkpoint: whoever started it again cannot know
            rolled_back: list[RollBack] = []
            while True:
                excluded = excluded_samples(config, rolled_back)
                start = starting_point(config, vocab_size, sources, resume or bool(rolled_back), allowed)
                reporter = RunReporter(config, vocab_size, start.position, directory, go_on, restarts)
                training = _Run(config, sources, vocab_size, samples, start, reporter, excluded, stop_at, signals)
                with accepted(config, start, reporter, directory):
                    if signals:
                        signals.training = True
                    end = training.train(rolled_back)
                del training  # its engine is not to be in memory while the next is built
                if not isinstance(end, RollBack):
                    return end
                rolled_back.append(end)
    finally:
        if not joined_before:  # whoever made the process group ends it
            dist.destroy_process_group()


class _Run:
    """A run while it trains; every rank has one.

    Attributes:
        at: how far it is.
        engine: of the stage that it is in.
        validation: on that engine.
        saver: of its checkpoints.
    """

    def __init__(
        self,
        config: Config,
        sources: Sources,
        vocab_size: int,
        validation_samples: int,
        start: Start,
        reporter: RunReporter,
        excluded: ExcludedSamples,
        stop_at: int | None,
        signals: StopSignals | None,
    ):
        self._excluded, self._stop_at, self._signals = excluded, stop_at, signals
        self._config, self._sources, self._start, self._reporter = config, sources, start, reporter
        self._validation_samples = validation_samples
        self.at = start.position
        self.engine = TrainingEngine(
            config, start.stage.plan, self._topology(start.stage), vocab_size, start.source, start.position.updates
        )
        self.validation = self._open_validation()
        self.saver = Saver(
            config.directory / "checkpoints",
            config.checkpoint,
            reporter.hub,
            None if start.checkpoint is None else start.position.step,
        )
        self.saver.prepare(self.engine.pieces())
        self.watchdog = Watchdog(config.directory, dist.get_rank(), config.faults.step_limit)
        self.faults = Faults(config.faults, config.train.global_batch)

    def train(self, rolled_back: Sequence[RollBack] = ()) -> Ending | RollBack:
        """Train through the growth stages that are left, resharding from each to the next, or until asked to end.

        Args:
            rolled_back: what has led back to here, the last one last.
        """
        try:
            with self.watchdog:
                ending = self._train(rolled_back)
        except _RollbackRequested as trouble:
            self._reporter.ends("rollback")
            self.saver.collect()
            self.saver.close()
            self.engine.close()
            return trouble.roll_back
        except Exception:
            self.saver.close(patience=60)  # what is being written is whole, whatever went wrong after it
            raise
        self.saver.close()
        return ending

    def _train(self, rolled_back: Sequence[RollBack]) -> Ending:
        start, reporter = self._start, self._reporter
        self.faults.remember(reporter.recent_losses(self._config.faults.spike_window))
        reporter.begins(self.engine, self._sources, start.checkpoint, start.stages)
        if start.saved is not None:
            step = self.at.step
            was = self._learning_rate(step - 1) if step else None
            reporter.resumed(start.changes, start.settings, start.saved, was, self._learning_rate(step))
        reporter.passed_over(start.damaged)
        if rolled_back:
            reporter.rolled_back(rolled_back[-1])
        if start.grown_from is not None:
            loss, _ = self.validation.run()
            reporter.grown_on_load(self.at.step, start.grown_from, self.engine, loss)
        ending = self._after_step()
        for stage in start.stages[start.stages.index(start.stage) :]:
            if ending is not None:
                break
            if stage.plan != self.engine.plan:
                self._grow_into(stage)
            ending = self._train_stage(stage)
        if self.at.step:
            self.saver.finish(self.at.step, self.engine.pieces(), self._checkpoint_info(), self._sources.tokenizer)
        if ending is None:
            reporter.finished()
        else:
            reporter.ends_early(self.at.step, None if ending == "stopped" else self._stop_at)
        self.engine.close()
        return ending or "finished"

    def _after_step(self) -> Ending | None:
        """What ranks agree on between two steps: whether to end, and what of the checkpoint under way; collective."""
        self.watchdog.feed()
        signalled = self._signals.number if self._signals else 0
        lost = self._reporter.lost
        number, busy, again, gone = all_reduce_max(
            signalled, self.saver.busy, not lost and self.saver.should_retry, lost
        )
        self._check_directory(bool(gone))
        if not busy:
            self.saver.collect()
        if again:
            self._save()
        if self.at.step == self._config.train.steps or (not number and self.at.step < (self._stop_at or math.inf)):
            return None
        if number:
            name = signal.Signals(int(number)).name
            self._reporter.ends(f"signal {name}")
            self._reporter.hub.event(Signalled(self.at.step, name))
            return "interrupted" if number == signal.SIGINT else "signalled"
        self._reporter.ends("stop_at")
        self._reporter.hub.event(StopReached(self.at.step))
        return "stopped"

    def _look_for_directory(self) -> None:
        """As :meth:`_check_directory`, where nothing else is to be agreed on; collective."""
        (lost,) = all_reduce_max(self._reporter.lost)
        self._check_directory(bool(lost))

    def _check_directory(self, lost: bool) -> None:
        """End, on all ranks alike, where rank 0 has found that the run's directory is gone; there is nowhere to save."""
        if lost:
            raise MegaloopError(
                f"run directory {self._config.directory}: deleted, moved or replaced while the run trained (noticed after "
                f"step {self.at.step}), so nothing more can be saved there; put it back and add --resume to go on from its "
                "last checkpoint, or start again"
            )

    def _grow_into(self, stage: GrowthStage) -> None:
        """Reshard into the next stage. Nothing on disk changes: a rank that dies here leaves the last checkpoint."""
        growth = self._config.growth
        if growth is not None and growth.save_before and not stage.event and self.saver.saved != self.at.step:
            self._save()
        before, (loss_before, _) = self.engine.plan, self.validation.run()
        resharded = reshard(
            self.engine,
            stage.growth,
            self._topology(stage),
            self.at.updates,
            moments=growth.moments if growth else "copy",
        )
        self.engine = resharded.engine
        self.at = self.at.at_depth(stage.plan, grown=not stage.event)
        self.saver.prepare(self.engine.pieces())
        self.faults.forget()
        self.validation = self._open_validation()
        loss_after, _ = self.validation.run()
        self._reporter.grown(self.at.step, before, resharded, loss_before, loss_after)
        self.watchdog.feed()

    def _train_stage(self, stage: GrowthStage) -> Ending | None:
        """For each step of a stage: train, then validate, check and save where they are due; None at its end."""
        config, total = self._config, self._config.train.steps
        loader = self._open_loader()
        try:
            for step in range(self.at.step, stage.stop):
                lr, iterations = self._learning_rate(step), config.loop_iterations(stage.plan, step)
                began = time.perf_counter()
                result = self.engine.train_step(loader if loader is not None else iter(()), lr, iterations)
                self.at = after_step(
                    self.at,
                    config,
                    flops=self._reporter.step_flops(iterations),
                    lr=lr,
                    applied=result.applied,
                    excluded=self._excluded,
                )
                seconds = time.perf_counter() - began
                self.watchdog.feed()
                ranks_due = config.logging.ranks_every > 0 and self.at.step % config.logging.ranks_every == 0
                busy = self.engine.stopwatch.seconds if ranks_due else 0.0  # validation would add to it
                validated = self.validation.run() if _due(self.at.step, config.validation.every, total) else None
                self._reporter.stepped(self.at, result, lr, seconds, validated, iterations)
                self._check_step(result)
                self.watchdog.feed()
                if ranks_due:
                    self._record_ranks(busy)
                if config.train.check_replicas and self.at.step % config.train.check_replicas == 0:
                    check_replicas(self.engine.differing_replicas(), self.at.step)
                if config.checkpoint.every and self.at.step % config.checkpoint.every == 0:
                    self._save()
                if ending := self._after_step():
                    return ending
            return None
        finally:
            if loader is not None:
                loader.close()

    def _record_ranks(self, busy: float) -> None:
        """Every rank's record of the step that was just done, in which it was busy for this many seconds; collective."""
        memory = memory_bytes(self.engine.device)
        dist.barrier()  # the clocks are read at one moment, as far as that goes
        records = gather_objects(RankRecord(busy, memory, time.time(), socket.gethostname()))
        self._reporter.ranks(self.at.step, records)

    def _check_step(self, result: StepResult) -> None:
        """Record what is wrong with the step's numbers; raises _RollbackRequested on every rank where training cannot go on."""
        verdict = self.faults.stepped(self.at, result)
        if isinstance(verdict, Spike):
            self._reporter.hub.event(Spiked(self.at.step, verdict.loss, verdict.median, verdict.deviation))
        if not result.applied or self._config.faults.spike_rollback:
            verdict = broadcast_object(verdict)
            if isinstance(verdict, RollBack):
                self._look_for_directory()  # it would go back to what another directory holds, and begin anew there
                raise _RollbackRequested(verdict)

    def _topology(self, stage: GrowthStage) -> Topology:
        return Topology(*self._config.topology(dist.get_world_size(), stage.plan.layers))

    def _learning_rate(self, step: int) -> float:
        config = self._config
        return learning_rate(
            step,
            config.train.steps,
            config.optimizer.lr,
            config.schedule,
            growth_steps=self._growth_steps(),
            growth_warmup=config.growth.warmup_steps if config.growth else 0,
        )

    def _growth_steps(self) -> list[int]:
        """The steps at which the model has grown; as the schedule says, where that is not recorded from the beginning."""
        depths = self.at.depths
        if depths and depths[0].step == 0:
            return [depth.step for depth in depths if depth.grown]
        return [stage.first_step for stage in self._start.stages[1:] if not stage.event]

    def _open_validation(self) -> Validation:
        return Validation(self._config, self.engine, self._sources, self._validation_samples)

    def _open_loader(self) -> BatchLoader | None:
        """Micro-batches from here on; None on ranks in the middle of the pipeline, which read none."""
        config, engine = self._config, self.engine
        if not engine.needs_data:
            return None
        return BatchLoader(
            self._sources.datasets,
            self._sources.order(config.seed, config.cooldown_sample, self.at.order_version),
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            dp_rank=engine.coordinate.dp,
            dp_size=engine.topology.dp,
            start_sample=self.at.samples,
            prefetch=config.data.prefetch,
            excluded=self._excluded,
        )

    def _save(self) -> None:
        self._look_for_directory()  # or the checkpoint would be all that is in a new directory, or in another run's
        self.saver.save(self.engine.pieces(), self._checkpoint_info(), self._sources.tokenizer)

    def _checkpoint_info(self) -> CheckpointInfo:
        config, engine, at = self._config, self.engine, self.at
        growth = None
        if config.growth is not None:
            stages = self._start.stages
            index = stages.index(stage_at(stages, max(at.step - 1, 0)))
            growth = GrowthEntry(operator=config.growth.operator, stage=index, stages=len(stages))
        return CheckpointInfo(
            run=at,
            plan=engine.plan,
            model=config.model.model_copy(update={"vocab_size": engine.vocab_size}),
            topology=engine.topology,
            precision=config.train.precision,
            config=config.model_dump(mode="json"),
            growth=growth,
        )


class _RollbackRequested(Exception):
    """Leads out of the steps of a run that has to go back; never out of :class:`_Run`."""

    def __init__(self, roll_back: RollBack):
        self.roll_back = roll_back


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)
