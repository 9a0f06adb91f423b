"""Held-out loss while a run trains."""

from __future__ import annotations

from megaloop.config import Config
from megaloop.data import Sources, bits_per_byte, usable_validation, validation_batches
from megaloop.depth import stages_between
from megaloop.parallel.engine import TrainingEngine

__all__ = ["Validation", "validation_samples"]


def validation_samples(config: Config, sources: Sources, world_size: int, first_step: int, stop: int | None) -> int:
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


class Validation:
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
        loss = self._engine.evaluate(self._batches, len(self._batches))
        return loss, bits_per_byte(loss, self._tokens, self._bytes)
