"""The dtype of a precision."""

from __future__ import annotations

import torch

__all__ = ["training_dtype"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations where ``train.precision`` is ``fp32`` or ``bf16``; masters are fp32 in both."""
    return _DTYPES[precision]
