"""What GPUs can do at most, by their makers' data sheets; what a run achieves is a share of it.

Dense operations in bf16, with sums in fp32; no structured sparsity, which training does not have.
"""

from __future__ import annotations

import re

import torch

# The first whose words stand in the device's own name counts: the longer ones come first.
TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "MI300X": 1307.0,
}


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of this device at this precision; None where nothing is stated, as for every CPU."""
    if device.type != "cuda" or dtype is torch.float32:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    if "MIG" in name:  # a slice of one
        return None
    return next((1e12 * found for known, found in TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)
