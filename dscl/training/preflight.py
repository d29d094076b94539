"""Checks before a run: do all ranks agree on what they train, and is the cluster fit for it?

`require_consistent_ranks` is cheap and precedes every run: a rank that read another recipe, other data or another model
would otherwise train on with the others unnoticed. `run_checks` also measures clocks, disk, memory, network and compute
speed and takes some seconds; `dscl doctor` and the launch scripts call it. Messages name the hosts that stand out.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from dscl import __version__
from dscl.distributed import comm
from dscl.distributed.launcher import PROGRAM, subprocess_environment
from dscl.recipe.recipe import find_difference
from dscl.training.setup import RunSetup
from dscl.utils.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")
MAX_CLOCK_SKEW = 5.0  # seconds that a host's clock may differ from the median
VISIBILITY_TIMEOUT = 15.0  # seconds within which a host must see a file that another host has written
OUTLIER_RATIO = 0.5  # a value below this share of the median is an outlier
MIN_COMPARABLE = 3  # outliers are named from this many values on
# Recipe keys that may differ between ranks: they do not affect training. (The content of the DeepSpeed JSON may not.)
MAY_DIFFER = ("run_dir", "deepspeed", "data.cache_dir", "observe.live", "observe.tensorboard")
NETWORK_TEST_NUMEL = 1 << 24  # elements sent to measure a network of GPUs; a sixteenth on CPUs


T = TypeVar("T")


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, shown to the user as "subject: message"."""

    subject: str
    message: str
    passed: bool = True
    is_measurement: bool = False  # a failed measurement (slow, scarce) need not prevent a run


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


def check_clocks(_setup: RunSetup) -> list[CheckResult]:
    """The hosts' clocks agree."""
    comm.barrier()
    times = gather_by_host(time.time())
    median = statistics.median(seconds for _, seconds in times)
    skews = {host: seconds - median for host, seconds in times if abs(seconds - median) > MAX_CLOCK_SKEW}
    message = ", ".join(
        f"{host} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}" for host, skew in skews.items()
    )
    largest = max(abs(seconds - median) for _, seconds in times)
    return [CheckResult("clocks", message or f"within {largest:.1f} s", not skews)]


def check_shared_folder(setup: RunSetup) -> list[CheckResult]:
    """All hosts see what any host writes to `run_dir`, and a lock held by one host keeps the others out."""
    folder = setup.recipe.run_folder
    name = comm.broadcast_from_main(f".doctor-{os.getpid()}-{time.time_ns()}")
    own_file = folder / f"{name}-{comm.rank()}"
    problem, lock, created, lacks_locks = "", None, not folder.exists(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own_file.write_text(socket.gethostname())
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if comm.is_main() and not problem:
        lock = open(folder / name, "w")  # noqa: SIM115 - held until all ranks have tried to lock it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            lacks_locks = True
    comm.barrier()
    files = [folder / f"{name}-{rank}" for rank in range(comm.world_size())]
    unseen: list[Path] = []
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not problem and (unseen := [path for path in files if not path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = [host for host, _ in gather_by_host(None)]
    if unseen and not problem:
        writers = {hosts[files.index(path)] for path in unseen}
        problem = f"does not see what {', '.join(sorted(writers))} wrote; it has to be a file system that all share"
    # The main rank holds the lock: a rank that can lock the file too is not kept out.
    lacks_locks = lacks_locks or (not problem and not comm.is_main() and _can_lock(folder / name))
    problems = {host: text for host, text in gather_by_host(problem) if text}
    hosts_without_locks = dict.fromkeys(host for host, lacking in gather_by_host(lacks_locks) if lacking)
    comm.barrier()
    with suppress(OSError):
        own_file.unlink()
    if lock is not None:
        lock.close()
        (folder / name).unlink()
    comm.barrier()
    if created:
        with suppress(OSError):
            folder.rmdir()
    message = "; ".join(f"{host} {text}" for host, text in problems.items())
    results = [CheckResult("run_dir", message or f"{folder}: written and seen by all", not problems)]
    if hosts_without_locks and not problems:
        message = (
            f"one in {folder} does not keep {', '.join(hosts_without_locks)} out, so a second job there would not "
        )
        message += "be refused; mount it with locks that all hosts share, or see to it that only one job is started on "
        message += "this run_dir"
        results.append(CheckResult("locks", message, False, is_measurement=True))
    return results


def check_free_space(setup: RunSetup) -> list[CheckResult]:
    """Free memory and disk; hosts with far less memory than the others fail."""
    free = gather_by_host(_free_device_memory())
    memory = find_outliers("free memory", free, _format_bytes, MIN_COMPARABLE)
    return [memory, CheckResult("disk of run_dir", f"{_format_bytes(_free_disk(setup.recipe.run_folder))} free")]


def check_plan_fits(setup: RunSetup) -> list[CheckResult]:
    """The memory and disk that `dscl plan` foresees for this recipe and number of ranks are free."""
    plan, problem = _run_dscl_plan(setup) if comm.is_main() else ({}, "")
    comm.wait_for_all_ranks()  # planning may take minutes
    plan, problem = comm.broadcast_from_main((plan, problem))
    if problem:
        return [CheckResult("plan", f"none could be made ({problem}), so memory and disk were not compared with it")]
    stage = plan["stages"][plan["recipe"]]
    on_device, on_host = stage["device"] + plan["around"], stage["host"]
    if comm.device().type != "cuda":
        on_device, on_host = 0, stage["device"] + stage["host"]
    ranks_per_host = Counter(host for host, _ in gather_by_host(None))
    gpu_memory, host_memory = (gather_by_host(free) for free in (_free_gpu_memory(), _free_host_memory()))
    disk = _free_disk_for_checkpoints(setup.recipe.run_folder) if comm.is_main() else None
    free_disk = [("run_dir", float(comm.broadcast_from_main(disk)))]
    comparisons = [
        ("memory of GPUs", gpu_memory, dict.fromkeys(ranks_per_host, on_device)),
        ("memory of hosts", host_memory, {host: count * on_host for host, count in ranks_per_host.items()}),
        ("disk for checkpoints", free_disk, {"run_dir": plan["disk"]}),
    ]
    return [compare_with_needed(subject, free, needed) for subject, free, needed in comparisons if any(needed.values())]


def compare_with_needed(subject: str, free: Sequence[tuple[str, float]], needed: Mapping[str, float]) -> CheckResult:
    """Fails where a place (a host, a folder) has fewer bytes free than are needed there, and names these places."""
    short = {place: size for place, size in free if size < needed[place]}
    shortages = [
        f"{place} has {_format_bytes(size)} free and needs {_format_bytes(needed[place])}"
        for place, size in short.items()
    ]
    if shortages:
        message = f"{', '.join(shortages)}; dscl plan says what would fit"
        return CheckResult(subject, message, False, is_measurement=True)
    least_free = _format_bytes(min(size for _, size in free))
    return CheckResult(subject, f"{_format_bytes(max(needed.values()))} foreseen, {least_free} free")


def check_network(_setup: RunSetup) -> list[CheckResult]:
    """Bandwidth of all-reduce and all-to-all over all ranks, and of each link of a ring through them."""
    world_size = comm.world_size()
    if world_size == 1:
        return []
    device = comm.device()
    count = NETWORK_TEST_NUMEL if device.type == "cuda" else NETWORK_TEST_NUMEL // 16
    count -= count % world_size
    values = torch.ones(count, device=device)
    size = values.element_size() * count
    all_reduce_seconds = _best_seconds(lambda: comm.all_reduce_sum(values.fill_(1.0)))
    parts = [count // world_size] * world_size
    all_to_all_seconds = _best_seconds(lambda: comm.all_to_all(values.split(parts), parts))
    next_rank, previous_rank = (comm.rank() + 1) % world_size, (comm.rank() - 1) % world_size
    outgoing = [values if rank == next_rank else values[:0] for rank in range(world_size)]
    incoming = [count if rank == previous_rank else 0 for rank in range(world_size)]
    link_seconds = _best_seconds(lambda: comm.all_to_all(outgoing, incoming))
    ring_share = (world_size - 1) / world_size
    all_reduce_rate = 2 * ring_share * size / max(seconds for _, seconds in gather_by_host(all_reduce_seconds))
    all_to_all_rate = ring_share * size / max(seconds for _, seconds in gather_by_host(all_to_all_seconds))
    message = (
        f"all-reduce {_format_rate(all_reduce_rate)}, all-to-all {_format_rate(all_to_all_rate)} (of a rank's link)"
    )
    hosts = [host for host, _ in gather_by_host(None)]
    rates = [size / seconds for _, seconds in gather_by_host(link_seconds)]
    links = [(f"{hosts[rank - 1]} → {hosts[rank]}", rate) for rank, rate in enumerate(rates)]
    within = [link for rank, link in enumerate(links) if hosts[rank - 1] == hosts[rank]]
    between = [link for rank, link in enumerate(links) if hosts[rank - 1] != hosts[rank]]
    kinds = (("links within hosts", within), ("links between hosts", between))
    return [
        CheckResult("network", message),
        *(find_outliers(subject, links, _format_rate, MIN_COMPARABLE) for subject, links in kinds if links),
    ]


def check_compute_speed(_setup: RunSetup) -> list[CheckResult]:
    """The speed of a matrix product on every rank; finds a device that is throttled or shared with other programs."""
    device = comm.device()
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds = _best_seconds(lambda: matrix @ matrix)
    rates = [(host, 2 * size**3 / host_seconds) for host, host_seconds in gather_by_host(seconds)]
    return [find_outliers("matrix products", rates, lambda rate: f"{rate / 1e12:.2f} TFLOP/s", MIN_COMPARABLE)]


def find_outliers(
    subject: str, values: Sequence[tuple[str, float]], format_value: Callable[[float], str], min_count: int
) -> CheckResult:
    """Fails where a place has far less than the median of all places (`OUTLIER_RATIO`), and names these places.

    With fewer than `min_count` values nobody can say which is the outlier: the message then lists all values.
    """
    if 1 < len(values) < min_count:
        return CheckResult(subject, ", ".join(f"{place} {format_value(value)}" for place, value in values))
    median = statistics.median(value for _, value in values)
    outliers = [(place, value) for place, value in values if value < OUTLIER_RATIO * median]
    if outliers:
        places = ", ".join(f"{place} {format_value(value)}" for place, value in outliers)
        message = f"{places}, where the median is {format_value(median)}"
        return CheckResult(subject, message, False, is_measurement=True)
    least = min(value for _, value in values)
    if least == median:
        return CheckResult(subject, format_value(median))
    return CheckResult(subject, f"{format_value(least)} and more, median {format_value(median)}")


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


def gather_by_host(value: T) -> list[tuple[str, T]]:
    """Every rank's (host, value), in rank order; all ranks call it."""
    return comm.all_gather_objects((socket.gethostname(), value))


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


def _can_lock(path: Path) -> bool:
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _run_dscl_plan(setup: RunSetup) -> tuple[dict[str, Any], str]:
    """Run `dscl plan --json` as a subprocess. Returns its document and "", or an empty one and why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(setup.recipe.to_yaml(), "utf-8")
        deepspeed_json = json.dumps(str(setup.recipe.find_deepspeed_json().absolute()))
        arguments = [f"deepspeed={deepspeed_json}", "--recipe-only", "--json"]
        process = subprocess.run(
            [sys.executable, *PROGRAM, "plan", str(recipe), *arguments, "--gpus-per-node", str(comm.world_size())],
            env=subprocess_environment(), capture_output=True, text=True,
        )  # fmt: skip
    if process.returncode:
        return {}, (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]
    document: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return document, ""


def _free_device_memory() -> float:
    """Free bytes of this rank's GPU, or of the host's memory on CPUs."""
    return _free_gpu_memory() if comm.device().type == "cuda" else _free_host_memory()


def _free_gpu_memory() -> float:
    return float(torch.cuda.mem_get_info()[0]) if comm.device().type == "cuda" else 0.0


def _free_host_memory(root: Path = Path("/")) -> float:
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


def _free_disk(folder: Path) -> float:
    """Free bytes of the disk that holds the folder, or will hold it once it is created."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(existing).free)


def _free_disk_for_checkpoints(run_dir: Path) -> float:
    """Free bytes of the disk, plus those that existing checkpoints take: new ones replace them."""
    return _free_disk(run_dir) + sum(path.stat().st_size for path in run_dir.glob("checkpoints/**/*") if path.is_file())


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"


def _best_seconds(work: Callable[[], object]) -> float:
    """Seconds of the fastest of four calls, with all ranks starting together."""
    best = float("inf")
    for _ in range(4):
        comm.barrier()
        start = time.perf_counter()
        work()
        if comm.device().type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _format_rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"
