"""A run's directory as its ranks see it: rank 0 holds it, reads it and changes it, and all learn what they need; collective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megaloop.checkpoint import list_checkpoints, quarantine, step_of
from megaloop.config import Config
from megaloop.data import ExcludedSamples
from megaloop.errors import MegaloopError
from megaloop.runs.directory import NoDirectory, RunDirectory
from megaloop.runs.excluded import exclude_samples, read_excluded
from megaloop.runs.sinks import require_tensorboard
from megaloop.runtime.collectives import broadcast_object, raise_on_all_ranks
from megaloop.train.faults import RollBack
from megaloop.train.report import RunReporter
from megaloop.train.start import Start

__all__ = ["accepted", "excluded_samples", "newest_step", "open_directory"]


def open_directory(config: Config, resume: bool) -> RunDirectory | NoDirectory:
    """The run directory, held by rank 0; other ranks only learn whether that went well."""
    directory: RunDirectory | NoDirectory = NoDirectory()
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            if config.logging.tensorboard:
                require_tensorboard()  # before anything changes
            directory = RunDirectory.create_or_open(config.directory, resume=resume)
    return directory


@contextmanager
def accepted(
    config: Config, start: Start, reporter: RunReporter, directory: RunDirectory | NoDirectory
) -> Iterator[None]:
    """From here on the run changes its directory: every rank has taken the configuration and built its engine."""
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if isinstance(directory, RunDirectory):
                for damage in start.damaged:
                    quarantine(damage.path)
            stack.enter_context(reporter)
            directory.accept(config.to_yaml())
        yield


def newest_step(config: Config) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    complete: list[Path] = []
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            complete = list_checkpoints(config.directory / "checkpoints")
    return broadcast_object(step_of(complete[-1]) if complete else 0)


def excluded_samples(config: Config, rolled_back: Sequence[RollBack]) -> ExcludedSamples:
    """The samples that the run excludes from here on.

    Args:
        rolled_back: what has led back to here, the last one last; its samples join those of before.

    Raises:
        MegaloopError: it was rolled back too often, or the file that says which they are cannot be used.
    """
    excluded: ExcludedSamples = ()
    with raise_on_all_ranks():
        if len(rolled_back) > config.faults.max_rollbacks:
            last = rolled_back[-1]
            raise MegaloopError(
                f"step {last.step}: {last.reason}, after {len(rolled_back) - 1} rollbacks (faults.max_rollbacks); "
                f"look at samples {last.samples[0]} to {last.samples[1] - 1}, or lower optimizer.lr"
            )
        if dist.get_rank() == 0:
            if rolled_back:
                exclude_samples(config.directory, rolled_back[-1].samples)
            excluded = read_excluded(config.directory)
    return broadcast_object(excluded)
