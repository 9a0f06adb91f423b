"""What the machine is and can do: peak rates for MFU, memory in use, a line for benchmarks."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

__all__ = ["describe_machine", "device_name", "memory_bytes", "peak_flops"]

# Dense bf16 matrix peaks in FLOP/s per device as torch sees it, from the vendors' data sheets; where a sheet
# gives the figure with 2:4 sparsity, half of it. GeForce: with fp32 accumulation. All words of an entry must
# occur in the device's name; the first entry that fits counts, so the special stand before the general.
_BF16_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("gb300",), 2500e12),  # NVIDIA GB300 NVL72: 360 PFLOP/s sparse over 72
    (("gb200",), 2500e12),  # NVIDIA GB200 NVL72: 360 PFLOP/s sparse over 72
    (("b300",), 2250e12),  # NVIDIA HGX B300: 36 PFLOP/s sparse over 8
    (("b200",), 2250e12),  # NVIDIA HGX B200: 36 PFLOP/s sparse over 8
    (("gh200",), 989e12),  # NVIDIA GH200: an H200's compute
    (("h200", "nvl"), 835e12),  # NVIDIA H200: 1,671 sparse
    (("h200",), 989e12),  # NVIDIA H200 SXM: 1,979 sparse
    (("h100", "pcie"), 756e12),  # NVIDIA H100 PCIe: 1,513 sparse
    (("h100", "nvl"), 835e12),  # NVIDIA H100 NVL: 1,671 sparse
    (("h100",), 989e12),  # NVIDIA H100 SXM: 1,979 sparse
    (("a100",), 312e12),  # NVIDIA A100, PCIe and SXM
    (("a800",), 312e12),  # NVIDIA A800: an A100 with slower links
    (("a10g",), 70e12),  # NVIDIA A10G: 140 sparse
    (("a10",), 125e12),  # NVIDIA A10
    (("a30",), 165e12),  # NVIDIA A30
    (("a40",), 149.7e12),  # NVIDIA A40
    (("a6000",), 154.8e12),  # NVIDIA RTX A6000: 309.7 sparse
    (("l40s",), 362e12),  # NVIDIA L40S: 362.05 dense, 733 sparse
    (("l40",), 181e12),  # NVIDIA L40
    (("l4",), 121e12),  # NVIDIA L4: 242 sparse
    (("rtx", "4090"), 165.2e12),  # NVIDIA Ada architecture paper, appendix A
    (("rtx", "3090", "ti"), 80e12),  # NVIDIA GA102 architecture paper: half rate
    (("rtx", "3090"), 71e12),  # NVIDIA GA102 architecture paper, table 8
    (("mi355x",), 2516e12),  # AMD Instinct MI355X
    (("mi350x",), 2307e12),  # AMD Instinct MI350X
    (("mi325x",), 1307.4e12),  # AMD Instinct MI325X
    (("mi300x",), 1307.4e12),  # AMD Instinct MI300X
    (("mi300a",), 980.6e12),  # AMD Instinct MI300A
    (("mi250x",), 191.5e12),  # AMD Instinct MI250X: 383 for its two dies, each a device to torch
    (("mi210",), 181e12),  # AMD Instinct MI210
)
# fp32 without tensor cores: torch does not use TF32 for matrix products unless told to
_FP32_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("h200", "nvl"), 60e12),  # NVIDIA H200
    (("h200",), 67e12),  # NVIDIA H200 SXM
    (("h100", "pcie"), 51e12),  # NVIDIA H100 PCIe
    (("h100", "nvl"), 60e12),  # NVIDIA H100 NVL
    (("h100",), 67e12),  # NVIDIA H100 SXM
    (("a100",), 19.5e12),  # NVIDIA A100
    (("v100", "pcie"), 14e12),  # NVIDIA V100 PCIe
    (("v100",), 15.7e12),  # NVIDIA V100 SXM2
    (("l40s",), 91.6e12),  # NVIDIA L40S
    (("t4",), 8.1e12),  # NVIDIA T4
)


def peak_flops(name: str, precision: str) -> float | None:
    """The peak rate of one device in FLOP/s, dense, or None where it is not known (a CPU, an unlisted GPU).

    Args:
        name: the device's name, as ``torch.cuda.get_device_name()`` gives it.
        precision: ``bf16`` or ``fp32``, the ``train.precision`` of a configuration. A GPU that computes
            bf16 without matrix units (V100, T4) has no bf16 peak.
    """
    peaks = {"bf16": _BF16_PEAKS, "fp32": _FP32_PEAKS}.get(precision, ())
    words = set(re.split(r"[\s/-]+", name.lower()))
    if words & {"laptop", "mig"}:  # another chip of the same name; a slice of one
        return None
    return next((peak for entry, peak in peaks if words.issuperset(entry)), None)


def device_name(device: torch.device | None = None) -> str:
    """The name of a device (default: the current GPU where there is one): ``NVIDIA H200``, or the CPU's model."""
    if _is_gpu(device):
        return torch.cuda.get_device_name(device)
    return _cpu_model()


def memory_bytes(device: torch.device | None = None) -> int:
    """Bytes in use by this process: the peak that torch allocated on the GPU, or on a CPU the resident set now."""
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def describe_machine() -> str:
    """One line for benchmarks: processor, cores this process may use, GPUs, version of torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [f"{_cpu_model()}, {cores} core{'s' if cores > 1 else ''}"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return "; ".join([*parts, f"torch {torch.__version__}"])


def _is_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
