"""A GPU's peak by its name: the whole words count, the longer ones first; of what is not known nothing is said."""

from __future__ import annotations

import pytest
import torch

from dscl.utils.hardware import peak, peak_of


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
def test_the_peak_is_that_of_the_named_device(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090"])
def test_of_what_is_not_known_nothing_is_said(name: str) -> None:
    assert peak_of(name) is None


def test_a_cpu_has_no_peak() -> None:
    assert peak(torch.device("cpu"), torch.bfloat16) is None
