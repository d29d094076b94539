"""The hardware: peak FLOPS of common GPUs, free memory and disk, and sizes such as 80GiB as users type them.

Importing this file imports no torch.

The peaks are from the makers' data sheets, for dense bf16 operations with fp32 accumulation, without sparsity.
"""

from __future__ import annotations

import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dscl.utils.errors import UserError

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
SIZE_UNITS = {"GIB": GIB, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6, "TIB": 1 << 40, "TB": 10**12}
# In TFLOPS. The first name that the device's own name contains counts, so longer names come first.
PEAK_TFLOPS = {
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOPS of this device at this precision; None if unknown, as for every CPU."""
    import torch  # not at the top of the file: `dscl plan` calls `parse_size` before it imports anything heavy

    if device.type != "cuda" or dtype is torch.float32:
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Peak FLOPS in bf16 of the GPU with this name; None if it is not in the table or is a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    return next((1e12 * tflops for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def parse_size(option: str, text: str) -> float:
    """The bytes of a size like 80GiB or 400GB/s; errors name the `option` that it was given for."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)(?:/s)?\s*", text)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UserError(f"{option}: given {text!r}; a size like 80GiB or 400GB is needed")
    return float(match[1]) * unit


def parse_gpu_peak(gpu_name: str) -> float:
    """The peak FLOPS for `--gpu`; a UserError if the name is unknown."""
    flops = peak_flops_by_name(gpu_name)
    if flops is None:
        raise UserError(
            f"--gpu: given {gpu_name!r}, which is not known; give --tflops, its peak TFLOPS at this precision"
        )
    return flops


def free_host_memory(root: Path = Path("/")) -> float:
    """Free bytes of the host, but at most what the limits of its container or Slurm job (cgroups v2) leave."""
    meminfo = root / "proc/meminfo"
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
    with suppress(OSError, ValueError, StopIteration):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = Path(next(line for line in groups if line.startswith("0::")).removeprefix("0::/"))
        for group in (own, *own.parents):  # the limits of all parent groups hold too
            folder = root / "sys/fs/cgroup" / group
            limit = (folder / "memory.max").read_text().strip() if (folder / "memory.max").exists() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                free = min(free, max(0.0, float(limit) - used))
    return free


def free_disk(folder: Path) -> float:
    """Free bytes of the disk that holds the folder, or will hold it once it is created."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(existing).free)
