"""Where this rank computes."""

from __future__ import annotations

import os

import torch

__all__ = ["local_device"]


def local_device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
