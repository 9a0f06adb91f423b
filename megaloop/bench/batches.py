"""Micro-batches that benches train on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megaloop.config import Config
from megaloop.data import MicroBatch

__all__ = ["random_batches"]


def random_batches(config: Config, vocab_size: int, device: torch.device | None = None) -> Iterator[MicroBatch]:
    """Made-up micro-batches without end, the same on every rank.

    Args:
        vocab_size: token ids are below it.
        device: where they are put; default: the CPU, as a loader's.
    """
    generator = torch.Generator().manual_seed(0)
    size = (config.train.micro_batch, config.data.sequence_length + 1)
    while True:
        tokens = torch.randint(vocab_size, size, generator=generator).to(device)
        yield MicroBatch.of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
