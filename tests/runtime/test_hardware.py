from __future__ import annotations

import mmap

import pytest
import torch

from megaloop.runtime.hardware import describe_machine, device_name, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI250X/MI250", 191.5e12),
    ],
)
def test_known_gpus_have_their_dense_bf16_peak(name: str, peak: float) -> None:
    assert peak_flops(name, "bf16") == peak


@pytest.mark.parametrize(
    "name",
    ["Tesla V100-SXM2-16GB", "Tesla T4", "Intel(R) Xeon(R) CPU @ 2.20GHz", "NVIDIA A1000",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""],
)  # fmt: skip
def test_no_peak_is_claimed_where_none_is_known(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_fp32_has_peaks_of_its_own() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla V100-SXM2-16GB", "fp32") == 15.7e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_memory_on_a_cpu_is_what_the_process_holds() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size) as block:  # new pages in any case: an allocator may hand out what it has kept
        before = memory_bytes(torch.device("cpu"))
        block.write(b"1" * size)
        assert memory_bytes(torch.device("cpu")) - before > 0.9 * size


def test_the_machine_is_described_in_one_line() -> None:
    line = describe_machine()
    assert "\n" not in line
    assert f"torch {torch.__version__}" in line
    assert "core" in line
    assert device_name(torch.device("cpu")) in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu_is_the_peak_of_what_was_allocated() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = memory_bytes()
    block = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    size = block.numel()
    del block
    assert memory_bytes() >= before + size
