"""What GPUs can do at most, by their makers' data sheets, and sizes as they are typed; without torch.

Dense operations in bf16, with sums in fp32; no structured sparsity, which training does not have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dscl.utils.errors import UserError

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
UNITS = {"GIB": GIB, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6, "TIB": 1 << 40, "TB": 10**12}
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
    import torch  # not above: `dscl plan` reads sizes and names before it imports anything heavy

    if device.type != "cuda" or dtype is torch.float32:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    if "MIG" in name:  # a slice of one
        return None
    return next((1e12 * found for known, found in TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def size_of(name: str, given: str) -> float:
    """Bytes, of words like 80GiB."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)(?:/s)?\s*", given)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UserError(f"{name}: given {given!r}; a size like 80GiB or 400GB is needed")
    return float(match[1]) * unit


def peak_named(given: str) -> float:
    found = peak_of(given)
    if found is None:
        raise UserError(
            f"--gpu: given {given!r}, which is not known; give --tflops, what it does at most at this precision"
        )
    return found
