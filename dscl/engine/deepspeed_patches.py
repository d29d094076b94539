"""Everything that changes, wraps or works around DeepSpeed's internals, each patch with its reason.

The docstrings say which names of DeepSpeed a patch relies on. All patches were checked against the source of DeepSpeed
`CHECKED_VERSION`, which launch/constraints.txt pins; for other versions nothing is claimed. A test looks every name up
in the installed DeepSpeed. Which attributes of DeepSpeed's optimizers are read says dscl/engine/zero_layouts.py.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch.utils.cpp_extension import _get_build_directory

from dscl.distributed import comm
from dscl.utils import timers
from dscl.utils.cache import hold_file_lock
from dscl.utils.errors import UserError

CHECKED_VERSION = "0.19.8"
# DeepSpeed's collectives: (kind in the statistics, index and name of the argument that holds the tensors they send).
COLLECTIVE_SIGNATURES = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_reduce_coalesced": ("all_reduce", 0, "tensors"),
    "inference_all_reduce": ("all_reduce", 0, "tensor"),
    "reduce": ("reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_gather": ("all_gather", 1, "tensor"),
    "all_gather_into_tensor": ("all_gather", 1, "input_tensor"),
    "all_gather_coalesced": ("all_gather", 1, "input_tensors"),
    "reduce_scatter": ("reduce_scatter", 1, "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input_tensor"),
    "all_to_all_single": ("all_to_all", 1, "input"),
}
DISABLE_COMPILER_VARIABLE = "TORCHDYNAMO_DISABLE"  # environment variable that turns torch.compile off
MUON_MODULE = "deepspeed.runtime.zero.muon.muon_optimizer"
SHM_EXTENSION = "deepspeed_shm_comm"  # the name under which torch builds the extension of `ShareMemCommBuilder`


def allow_zero_with(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Add an optimizer class to those that ZeRO accepts.

    Reason: DeepSpeed looks up an optimizer's exact type, so it refuses a subclass of AdamW that is not listed. The
    alternative, `zero_allow_untested_optimizer`, prints a warning in every run.
    Relies on: the list `deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS`. Checked: 0.19.8.
    """
    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)


def init_deepspeed_comm() -> None:
    """Initialize DeepSpeed's communication on the existing process group, once a process, with the patches below.

    Reason: on CPUs DeepSpeed compiles an extension here, and prints what it does. torch finds the compiler's driver,
    ninja, on the PATH only, although it is a dependency whose folder need not be there.
    Relies on: the public `init_distributed`, and `deepspeed.comm.comm.cdb`, the backend that it creates.
    Checked: 0.19.8.
    """
    if deepspeed.comm.is_initialized():
        return
    import_muon_without_compiler()
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with redirect_stdout(io.StringIO()):
        if comm.device().type == "cpu":
            build_shm_extension()
        deepspeed.init_distributed(verbose=False)
    count_collectives(deepspeed.comm.comm.cdb)
    time_weight_gathering()


def import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon optimizer while torch.compile is turned off.

    Reason: DeepSpeed always imports Muon, which decorates its kernels with torch.compile. Importing the compiler takes
    a second, and nothing here is compiled.
    Relies on: the module `deepspeed.runtime.zero.muon.muon_optimizer`, which ZeRO imports when an optimizer is built.
    Checked: 0.19.8.
    """
    original = os.environ.get(DISABLE_COMPILER_VARIABLE)
    os.environ[DISABLE_COMPILER_VARIABLE] = "1"
    try:
        import_module(MUON_MODULE)
    finally:
        if original is None:
            del os.environ[DISABLE_COMPILER_VARIABLE]
        else:
            os.environ[DISABLE_COMPILER_VARIABLE] = original


def count_collectives(backend: Any) -> None:
    """Wrap the collectives of DeepSpeed's backend so that their bytes and waiting times are counted.

    Reason: DeepSpeed's own `comms_logger` synchronizes with the device at every collective, and knows no training step.
    Relies on: the methods of `deepspeed.comm.torch.TorchBackend` in `COLLECTIVE_SIGNATURES`, with these arguments.
    Checked: 0.19.8.
    """
    for name, (kind, arg_index, keyword) in COLLECTIVE_SIGNATURES.items():
        setattr(backend, name, timers.wrap_collective(kind, getattr(backend, name), arg_index, keyword))


def time_weight_gathering() -> None:
    """Time how long a layer waits for its weights at ZeRO 3.

    Reason: ZeRO-3 gathers weights in a separate stream, where a collective costs the step nothing; the step waits in
    this method.
    Relies on: `PartitionedParameterCoordinator.fetch_sub_module`. DeepSpeed decorates it, so `__wrapped__` does not
    show whether it is patched. Checked: 0.19.8.
    """
    fetch = PartitionedParameterCoordinator.fetch_sub_module
    if not hasattr(fetch, "_is_timed"):
        timed: Any = wraps(fetch)(timers.wrap_wait("all_gather", fetch))
        timed._is_timed = True
        PartitionedParameterCoordinator.fetch_sub_module = timed


def build_shm_extension() -> None:
    """Build and load DeepSpeed's extension for all-reduce in shared memory. It is compiled once per machine.

    Reason: torch protects the build with a lock file. A killed process leaves this file behind, and all others would
    wait for ever. Our own lock, which is released when its holder dies, makes it safe to remove the file.
    Relies on: `ShareMemCommBuilder` of the CPU accelerator, its name `deepspeed_shm_comm`, and the file `lock` in the
    folder that torch's private `_get_build_directory` returns. Checked: 0.19.8, with torch 2.13.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(f"no C++ compiler found ({compiler}), which DeepSpeed needs on CPUs; install g++, or set CXX")
    folder = Path(_get_build_directory(SHM_EXTENSION, False))
    with hold_file_lock(folder.with_name(f"{folder.name}.dscl-lock")):
        (folder / "lock").unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


@contextmanager
def deepspeed_errors_as_user_errors() -> Iterator[None]:
    """Turn DeepSpeed's complaints about its settings into a one-line error for the user.

    Reason: the settings come from the user's JSON, and only DeepSpeed knows all values that it allows.
    Relies on: `DeepSpeedConfigError`; `NotImplementedError`, for combinations of settings; and pydantic's
    `ValidationError`, for single values. Checked: 0.19.8.
    """
    try:
        yield
    except (DeepSpeedConfigError, NotImplementedError, ValidationError) as error:
        raise UserError(f"deepspeed: these settings are refused: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def without_cross_rank_asserts() -> Iterator[None]:
    """Turn off ZeRO-3's asserts that all ranks pass the same values.

    Reason: `dscl plan` simulates one rank, and no other rank answers these asserts.
    Relies on: functions whose names begin with `assert_ints_same` in the namespace of
    `deepspeed.runtime.zero.partitioned_param_coordinator`. Checked: 0.19.8.
    """
    names = [name for name in vars(partitioned_param_coordinator) if name.startswith("assert_ints_same")]
    original = {name: getattr(partitioned_param_coordinator, name) for name in names}
    for name in names:
        setattr(partitioned_param_coordinator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, check in original.items():
            setattr(partitioned_param_coordinator, name, check)
