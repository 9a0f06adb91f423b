"""A checkpoint as a decoder on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.model import Decoder, choose_kernels, parameter_specs
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype

__all__ = ["load_decoder"]


def load_decoder(
    path: Path,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | None = None,
) -> tuple[Decoder, Checkpoint]:
    """Build the decoder of a checkpoint (or of a run's newest) and fill it, tensor by tensor.

    Args:
        precision: fp32 takes the fp32 masters where there are some; bf16 the training copy, or rounds.

    Returns:
        The decoder in evaluation mode, and the opened checkpoint.

    Raises:
        MegaloopError: no complete checkpoint there, or one that is damaged (the file is named) or holds NaN.
    """
    checkpoint = Checkpoint.open(resolve_checkpoint(path), verify="checksums")
    manifest = checkpoint.manifest
    config, rows = manifest.model, manifest.vocab_size
    state_name = "master" if precision == "fp32" and checkpoint.names("master") else "model"
    checkpoint.check_tensors(parameter_specs(config, manifest.plan, rows))
    checkpoint.check_values([state_name])
    device = device or local_device()
    dtype = training_dtype(precision)
    model = Decoder(config, rows, manifest.plan, kernels=choose_kernels(device, dtype)).to(device, dtype)
    model.fill(lambda name, spec: checkpoint.read(state_name, name))
    return model.eval(), checkpoint
