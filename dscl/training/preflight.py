"""Checks before a run: do all ranks agree on what they train, and is the cluster fit for it?

`require_consistent_ranks` is cheap and precedes every run: a rank that read another recipe, other data or another model
would otherwise train on with the others unnoticed. `run_checks` also measures clocks, disk, memory, network and compute
speed and takes some seconds; `dscl doctor` and the launch scripts call it. Messages name the hosts that stand out.
"""

from __future__ import annotations

import json
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dscl import __version__
from dscl.distributed import comm
from dscl.recipe.recipe import find_difference
from dscl.training.cluster_checks import (
    CheckResult,
    check_clocks,
    check_compute_speed,
    check_free_space,
    check_network,
    check_plan_fits,
    check_shared_folder,
    gather_by_host,
)
from dscl.training.setup import RunSetup
from dscl.utils.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")
# Recipe keys that may differ between ranks: they do not affect training. (The content of the DeepSpeed JSON may not.)
MAY_DIFFER = ("run_dir", "deepspeed", "data.cache_dir", "observe.live", "observe.tensorboard")


def require_consistent_ranks(setup: RunSetup) -> None:
    """Raise a `UserError` on every rank if programs, recipe, data or model differ between ranks; all ranks call it."""
    failures = [result for result in check_consistency(setup) if not result.passed]
    if failures:
        raise UserError("; ".join(f"{result.subject}: {result.message}" for result in failures))


def run_checks(setup: RunSetup, show: Callable[[str], None], strict: bool = True) -> None:
    """Run all checks and show each result as a line; raise a `UserError` at the end if any failed. All ranks call it.

    Without `strict`, failed measurements (slow, scarce, no locks) are shown but are no error.
    """
    failed = []
    checks = [
        check_consistency,
        check_clocks,
        check_shared_folder,
        check_free_space,
        check_network,
        check_compute_speed,
    ]
    has_checkpoints = any((setup.recipe.run_folder / "checkpoints").glob("step-*"))
    if strict or not comm.broadcast_from_main(has_checkpoints):  # a run with checkpoints has fitted before
        checks.append(check_plan_fits)
    for check in checks:
        for result in check(setup):
            show(f"{'ok ' if result.passed else 'BAD'}  {result.subject}: {result.message}")
            failed += [] if result.passed or (result.is_measurement and not strict) else [result.subject]
    if failed:
        raise UserError(f"not fit for a run: {', '.join(failed)} (see above); mend that, or leave these hosts out")


def check_consistency(setup: RunSetup) -> list[CheckResult]:
    """Versions of programs, recipe, data and model are the same on all ranks."""
    versions = {"dscl": f"{__version__}, sources {_checksum_sources()}", "python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    versions |= {"triton": _triton_version(), "CUDA": torch.version.cuda or "none", "NCCL": _nccl_version()}
    versions_by_host = gather_by_host(versions)
    results = [
        CheckResult(name, text + "; install the same everywhere, as launch/environment.sh does", False)
        for name in versions
        if (text := describe_differences([(host, others[name]) for host, others in versions_by_host]))
    ]
    if not results:
        results = [CheckResult("programs", ", ".join(f"{name} {value}" for name, value in versions.items()))]

    document = setup.recipe.to_dict()
    main_rank = comm.broadcast_from_main({"recipe": document, "deepspeed": setup.deepspeed_settings})
    different_key = find_difference(main_rank["recipe"], document, ignored_keys=MAY_DIFFER)
    different_key = different_key or find_difference(main_rank["deepspeed"], setup.deepspeed_settings, ignored_keys=())
    different = [(host, key) for host, key in gather_by_host(different_key) if key]
    message = "; ".join(f"{host} has another {key}" for host, key in dict(different).items())
    results.append(CheckResult("recipe", message or "the same everywhere", not different))

    fingerprints = gather_by_host(_fingerprint_inputs(setup))
    failures = [
        CheckResult(name, text + "; copy the same files everywhere", False)
        for name in dict.fromkeys(name for _, inputs in fingerprints for name in inputs)
        if (text := describe_differences([(host, inputs.get(name, "nothing")) for host, inputs in fingerprints]))
    ]
    success = CheckResult(
        "data and model", f"{len(setup.tasks)} tasks, the model and its tokenizer are the same everywhere"
    )
    return [*results, *(failures or [success])]


def describe_differences(values: Sequence[tuple[str, str]]) -> str:
    """Which hosts have which value, the most common value first; "" if all values are the same."""
    counts = Counter(value for _, value in values)
    if len(counts) == 1:
        return ""
    groups = []
    for value, _ in counts.most_common():
        hosts = dict.fromkeys(host for host, other in values if other == value)
        groups.append(f"{value} on {', '.join(hosts)}")
    return "; ".join(groups)


def _checksum_sources() -> str:
    """A checksum of the source files as they are now; a commit's number would not show local changes."""
    home, checksum = Path(__file__).resolve().parents[1], 0
    for path in sorted(home.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(home)).encode(), checksum))
    return f"{checksum:08x}"


def _triton_version() -> str:
    """Triton comes with torch's GPU builds; on CPUs it may be missing."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if comm.device().type == "cuda" else "none"


def _fingerprint_inputs(setup: RunSetup) -> Mapping[str, str]:
    """Checksums of the model, the tokenizer and the data that this rank has read, by name."""
    checksums = {"model": setup.run_info.model[:12], "tokenizer": setup.run_info.tokenizer[:12]}
    for task_data in setup.tasks:
        checksum = 0
        for samples in (task_data.task.train, task_data.eval_set.samples):
            for sample in samples:
                checksum = zlib.crc32(json.dumps([sample.prompt, sample.answer]).encode(), checksum)
        checksum = zlib.crc32(json.dumps(task_data.task.labels).encode(), checksum)
        checksums[f"data of {task_data.task.name}"] = f"{checksum:08x}"
    checksums["held-out texts"] = f"{zlib.crc32(json.dumps(setup.heldout_texts).encode()):08x}"
    return checksums
