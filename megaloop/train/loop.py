"""A run from start to end: build, resume, then train, validate, save and grow, step by step."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megaloop.checkpoint import CheckpointInfo, GrowthEntry, list_checkpoints, set_aside, step_of
from megaloop.config import Config
from megaloop.data import (
    BatchLoader,
    Holes,
    Sources,
    bits_per_byte,
    embedding_rows,
    open_sources,
    usable_validation,
    validation_batches,
)
from megaloop.depth import GrowthStage, stage_at, stages_between
from megaloop.errors import MegaloopError
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import StepResult, TrainingEngine, join_ranks
from megaloop.parallel.live import reshard
from megaloop.runs.allow import Allow
from megaloop.runs.directory import RunDirectory
from megaloop.runs.excluded import add_hole, read_holes
from megaloop.runs.metrics import require_tensorboard
from megaloop.runs.position import after_step
from megaloop.runtime.collectives import all_ranks_agree, from_rank_0, highest
from megaloop.runtime.hardware import memory_bytes
from megaloop.train.faults import Faults, RollBack, Spike
from megaloop.train.report import RankRecord, RunReporter
from megaloop.train.saving import Saver
from megaloop.train.schedule import learning_rate
from megaloop.train.signals import StopSignals
from megaloop.train.start import Start, starting_point
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
        resume: go on from the newest whole checkpoint of the run's directory (from the beginning, if there is none).
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
        with _open_directory(config, resume) as directory:
            newest = _newest_step(config) if resume else 0
            first = min(
                newest, config.train.steps - 1
            )  # it may be damaged, or nothing may be left: that is for later to say
            with all_ranks_agree():
                config.check_world(world_size, first, stop_at)
                if stop_at is not None and not 0 < stop_at <= config.train.steps:
                    raise MegaloopError(
                        f"--stop-at {stop_at}: expected a step from 1 to train.steps, {config.train.steps}"
                    )
                sources = open_sources(config.data, config.init)
                vocab_size = embedding_rows(config, sources)
                samples = _validation_samples(config, sources, world_size, first, stop_at)
            if newest >= config.train.steps and restarts:
                return "finished"  # it died after its last checkpoint: whoever started it again cannot know
            rolled_back: list[RollBack] = []
            while True:
                holes = _holes(config, rolled_back)
                start = starting_point(config, vocab_size, sources, resume or bool(rolled_back), allowed)
                reporter = RunReporter(config, vocab_size, start.position, directory, go_on, restarts)
                training = _Run(config, sources, vocab_size, samples, start, reporter, holes, stop_at, signals)
                with _accepted(config, start, reporter, directory):
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
        holes: Holes,
        stop_at: int | None,
        signals: StopSignals | None,
    ):
        self._holes, self._stop_at, self._signals = holes, stop_at, signals
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
            reporter,
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
        except _Trouble as trouble:
            self._reporter.rolls_back()
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
            reporter.resumed(start.changes, start.saved, was, self._learning_rate(step))
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
        number, busy, again, gone = highest(signalled, self.saver.busy, not lost and self.saver.wants_again, lost)
        self._check_directory(bool(gone))
        if not busy:
            self.saver.collect()
        if again:
            self._save()
        if self.at.step == self._config.train.steps or (not number and self.at.step < (self._stop_at or math.inf)):
            return None
        if number:
            self._reporter.signalled(self.at.step, signal.Signals(int(number)).name)
            return "interrupted" if number == signal.SIGINT else "signalled"
        self._reporter.stopped(self.at.step)
        return "stopped"

    def _look_for_directory(self) -> None:
        """As :meth:`_check_directory`, where nothing else is to be agreed on; collective."""
        (lost,) = highest(self._reporter.lost)
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
                lr, times = self._learning_rate(step), config.loop_times(stage.plan, step)
                began = time.perf_counter()
                result = self.engine.train_step(_engine_batches(config, loader), lr, times)
                self.at = after_step(
                    self.at,
                    config,
                    flops=self._reporter.step_flops(times),
                    lr=lr,
                    applied=result.applied,
                    holes=self._holes,
                )
                seconds = time.perf_counter() - began
                self.watchdog.feed()
                ranks_due = config.logging.ranks_every > 0 and self.at.step % config.logging.ranks_every == 0
                busy = self.engine.stopwatch.seconds if ranks_due else 0.0  # validation would add to it
                validated = self.validation.run() if _due(self.at.step, config.validation.every, total) else None
                self._reporter.stepped(self.at, result, lr, seconds, validated, times)
                self._judge(result)
                self.watchdog.feed()
                if ranks_due:
                    self._record_ranks(busy)
                if config.train.check_replicas and self.at.step % config.train.check_replicas == 0:
                    _check_replicas(self.engine, self.at.step)
                if config.checkpoint.every and self.at.step % config.checkpoint.every == 0:
                    self._save()
                if ending := self._after_step():
                    return ending
            return None
        finally:
            if loader is not None:
                loader.close()

    def _record_ranks(self, busy: float) -> None:
        """Every rank's record of the step that was just done, in which it was busy for so many seconds; collective."""
        memory = memory_bytes(self.engine.device)
        dist.barrier()  # the clocks are read at one moment, as far as that goes
        own = RankRecord(busy, memory, time.time(), socket.gethostname())
        records: list[RankRecord] = [own] * dist.get_world_size()
        dist.all_gather_object(records, own)
        self._reporter.ranks(self.at.step, records)

    def _judge(self, result: StepResult) -> None:
        """Record what is wrong with the step's numbers; raises _Trouble on every rank where training cannot go on."""
        verdict = self.faults.stepped(self.at, result)
        if isinstance(verdict, Spike):
            self._reporter.spiked(self.at.step, verdict)
        if not result.applied or self._config.faults.spike_rollback:
            verdict = from_rank_0(verdict)
            if isinstance(verdict, RollBack):
                self._look_for_directory()  # it would go back to what another directory holds, and begin anew there
                raise _Trouble(verdict)

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
            return [each.step for each in depths if each.grown]
        return [stage.first_step for stage in self._start.stages[1:] if not stage.event]

    def _open_validation(self) -> _Validation:
        return _Validation(self._config, self.engine, self._sources, self._validation_samples)

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
            holes=self._holes,
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


class _Trouble(Exception):
    """Leads out of the steps of a run that has to go back; never out of :class:`_Run`."""

    def __init__(self, roll_back: RollBack):
        self.roll_back = roll_back


def _newest_step(config: Config) -> int:
    """The step of the newest checkpoint, 0 if there is none; the same on every rank."""
    whole: list[Path] = []
    with all_ranks_agree():
        if dist.get_rank() == 0:
            whole = list_checkpoints(config.directory / "checkpoints")
    return int(from_rank_0(step_of(whole[-1]) if whole else 0))


def _holes(config: Config, rolled_back: Sequence[RollBack]) -> Holes:
    """The samples that the run passes over from here on; collective.

    Raises:
        MegaloopError: it was rolled back too often, or the file that says which they are cannot be used.
    """
    holes: Holes = ()
    with all_ranks_agree():
        if len(rolled_back) > config.faults.max_rollbacks:
            last = rolled_back[-1]
            raise MegaloopError(
                f"step {last.step}: {last.reason}, after {len(rolled_back) - 1} rollbacks (faults.max_rollbacks); "
                f"look at samples {last.samples[0]} to {last.samples[1] - 1}, or lower optimizer.lr"
            )
        if dist.get_rank() == 0:
            if rolled_back:
                add_hole(config.directory, rolled_back[-1].samples)
            holes = read_holes(config.directory)
    return from_rank_0(holes)


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _open_directory(config: Config, resume: bool) -> RunDirectory | _NoDirectory:
    """The run directory, held by rank 0; other ranks only learn whether that went well."""
    directory: RunDirectory | _NoDirectory = _NoDirectory()
    with all_ranks_agree():
        if dist.get_rank() == 0:
            if config.logging.tensorboard:
                require_tensorboard()  # before anything changes
            directory = RunDirectory.create_or_open(config.directory, resume=resume)
    return directory


@contextmanager
def _accepted(
    config: Config, start: Start, reporter: RunReporter, directory: RunDirectory | _NoDirectory
) -> Iterator[None]:
    """From here on the run changes its directory: every rank has taken the configuration and built its engine; collective."""
    with ExitStack() as stack:
        with all_ranks_agree():
            if isinstance(directory, RunDirectory):
                for damage in start.damaged:
                    set_aside(damage.path)
            stack.enter_context(reporter)
            if isinstance(directory, RunDirectory):
                directory.accept(config.to_yaml())
        yield


class _NoDirectory:
    """What ranks other than 0 hold of the run directory: nothing."""

    def __enter__(self) -> _NoDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# --- data ---


def _validation_samples(config: Config, sources: Sources, world_size: int, first_step: int, stop: int | None) -> int:
    """How many samples each validation takes, the same in all stages that these ranks will train."""
    return usable_validation(
        sources.datasets,
        samples=config.validation.samples,
        micro_batch=config.train.micro_batch,
        dp_sizes={
            config.topology(world_size, stage.plan.layers)[2]
            for stage in stages_between(config.stages, first_step, stop)
        },
    )


def _engine_batches(config: Config, batches: Any) -> Iterator[Any]:
    """Micro-batches as the engine takes them."""
    masking = config.model.document_masking
    return (each.for_model(masking) for each in batches) if batches is not None else iter(())


class _Validation:
    """The held-out loss over the same samples each time, in nats per token and bits per byte of text."""

    def __init__(self, config: Config, engine: TrainingEngine, sources: Sources, samples: int):
        self._config, self._engine = config, engine
        replicas = [
            list(
                validation_batches(
                    sources.datasets,
                    samples=samples,
                    micro_batch=config.train.micro_batch,
                    dp_rank=dp_rank,
                    dp_size=engine.topology.dp,
                )
            )
            for dp_rank in range(engine.topology.dp)
        ]
        everything = [batch for batches in replicas for batch in batches]
        self._tokens = sum(batch.tokens for batch in everything)
        self._bytes = sum(batch.bytes for batch in everything)
        self._batches = replicas[engine.coordinate.dp]

    def run(self) -> tuple[float, float]:
        """(nats per token, bits per byte); collective."""
        loss = self._engine.evaluate(_engine_batches(self._config, self._batches), len(self._batches))
        return loss, bits_per_byte(loss, self._tokens, self._bytes)


# --- checks ---


def _check_replicas(engine: TrainingEngine, step: int) -> None:
    differing = engine.differing_replicas()
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise MegaloopError(
            f"step {step}: ranks that should hold the same bits differ in {', '.join(differing[:5])}{more}; "
            "stop using this run's later checkpoints, and report it: a gradient was reduced wrongly or memory is faulty"
        )
