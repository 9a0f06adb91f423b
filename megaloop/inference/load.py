"""A checkpoint as a decoder on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, at_depth
from megaloop.errors import MegaloopError
from megaloop.model import Decoder, choose_kernels, parameter_specs
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype

__all__ = ["load_decoder"]


def load_decoder(
    path: Path,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | None = None,
    depth: str | None = None,
) -> tuple[Decoder, Checkpoint]:
    """Build the decoder of a checkpoint (or of a run's newest) and fill it, tensor by tensor.

    Args:
        precision: fp32 takes the fp32 masters where there are some; bf16 the training copy, or rounds.
        depth: run the layers in this order, whatever they were trained in: ``10-4x3-10``; default: as trained.

    Returns:
        The decoder in evaluation mode, and the opened checkpoint.

    Raises:
        MegaloopError: no whole checkpoint there, or one that is damaged (the file is named) or holds NaN; a depth that does not fit it.
    """
    checkpoint = Checkpoint.open(resolve_checkpoint(path), verify="checksums")
    manifest = checkpoint.manifest
    config = ModelConfig.model_validate(manifest.model)
    if config.vocab_size is None:
        raise MegaloopError(f"checkpoint {path}: its manifest lacks the vocabulary's size")
    plan, times = DepthPlan.from_json(manifest.plan), None
    if depth is not None:
        plan, times = at_depth(plan, depth)
    kind = "master" if precision == "fp32" and checkpoint.names("master") else "model"
    checkpoint.check_tensors(parameter_specs(config, DepthPlan.from_json(manifest.plan), config.vocab_size))
    checkpoint.check_values([kind])
    device = device or local_device()
    dtype = training_dtype(precision)
    model = Decoder(config, config.vocab_size, plan, kernels=choose_kernels(device, dtype)).to(device, dtype)
    model.times = times
    model.fill(lambda name, spec: checkpoint.read(kind, name))
    return model.eval(), checkpoint
