"""The peak FLOPS of a GPU by its name: whole words match, longer names first; unknown GPUs have none."""

from __future__ import annotations

import pytest
import torch

from dscl.utils.hardware import peak_flops, peak_flops_by_name


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peak_flops_by_gpu_name(name: str, tflops: float) -> None:
    assert peak_flops_by_name(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090"])
def test_peak_flops_of_an_unknown_gpu_is_none(name: str) -> None:
    assert peak_flops_by_name(name) is None


def test_a_cpu_has_no_peak_flops() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
