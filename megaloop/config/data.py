"""Where samples come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megaloop.config.section import Section

__all__ = ["DataConfig", "PhaseWeightsConfig", "SourceConfig"]


class PhaseWeightsConfig(Section):
    """Shares of a source by phase of the learning rate; 0: none of it."""

    stable: float = Field(ge=0)
    """Until the cooldown begins."""
    cooldown: float = Field(ge=0)
    """From there on."""


class SourceConfig(Section):
    """One set of shards made by ``megaloop prep``."""

    path: Path
    """Directory that holds data.json."""
    weight: PositiveFloat | PhaseWeightsConfig = 1.0
    """Share of the samples, relative to the other sources; by phase: {stable: 1, cooldown: 0.5}."""

    @property
    def weights(self) -> tuple[float, float]:
        """In the stable phase, and in the cooldown."""
        weight = self.weight
        return (weight.stable, weight.cooldown) if isinstance(weight, PhaseWeightsConfig) else (weight, weight)


class DataConfig(Section):
    """Where samples come from, and how long they are."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """One or more sets of shards, mixed by weight."""
    sequence_length: PositiveInt = 2048
    """Tokens per sample (predicted tokens; a sample holds one more)."""
    format: Literal["tokens", "sft"] = "tokens"
    """tokens: shards made by ``megaloop prep``; sft: jsonl of prompts and answers, of which the answers are learnt."""
    prompt_field: str = "prompt"
    """sft only: the field that holds the prompt."""
    answer_field: str = "answer"
    """sft only: the field that holds the answer."""
    tokenizer: Path | None = None
    """sft only: as ``megaloop prep --tokenizer`` takes it; empty: that of the checkpoint in ``init``."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """sft only: share of the examples that are held out, chosen by a hash of their text; at least one."""
    prefetch: int = Field(default=4, ge=0)
    """Micro-batches read ahead in the background."""
