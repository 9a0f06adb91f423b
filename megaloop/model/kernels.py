"""Which kernels a run uses: chosen once, from what is installed and where it runs, and reported at start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Kernels", "build_adamw", "choose_kernels"]


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels, by name.

    Attributes:
        attention: ``flash-attn`` or ``torch SDPA``.
        norm: ``apex`` (fused RMSNorm) or ``torch``.
    """

    attention: str = "torch SDPA"
    norm: str = "torch"

    def __str__(self) -> str:
        return f"attention {self.attention}, norm {self.norm}, Adam torch fused"


def choose_kernels(device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Kernels:
    """The fastest kernels that are there for tensors of ``dtype`` on ``device``.

    flash-attn has no fp32 kernels; apex and flash-attn need a GPU. Where the layers are compiled, the compiler fuses
    torch's norm with what stands beside it, and takes apart what is compiled where it meets one of apex.
    """
    if device.type != "cuda":
        return Kernels()
    flash = dtype in (torch.bfloat16, torch.float16) and importlib.util.find_spec("flash_attn") is not None
    return Kernels(
        attention="flash-attn" if flash else "torch SDPA",
        norm="apex" if not compiled and _nvidia_apex("apex.normalization", "fused_rms_norm_affine") else "torch",
    )


def _nvidia_apex(module: str, name: str) -> bool:
    """True if NVIDIA's apex is there. The package of that name on the Python index is another project."""
    try:
        if importlib.util.find_spec(module) is None:
            return False
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def build_adamw(
    groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """torch's fused AdamW over parameter groups, each with its own ``weight_decay``.

    It rounds an element alike wherever it lies in a flat buffer, on a CPU too, so replicas stay bit-identical. apex's
    FusedAdam is not used where it is there: torch's kernel is fused as well and keeps its count of steps in its state,
    where a resume and a growth put it back; apex's keeps it in its groups, from the first step on only.
    """
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
