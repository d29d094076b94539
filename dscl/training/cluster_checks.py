"""Checks of a cluster: clocks, the shared folder, free memory and disk, network bandwidth and compute speed.

Every check is collective: all ranks call it, and all get the same results. Messages name the hosts that stand out.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dscl.distributed import comm
from dscl.distributed.launcher import PROGRAM, subprocess_environment
from dscl.training.setup import RunSetup
from dscl.utils.hardware import free_disk, free_host_memory

MAX_CLOCK_SKEW = 5.0  # seconds that a host's clock may differ from the median
VISIBILITY_TIMEOUT = 15.0  # seconds within which a host must see a file that another host has written
OUTLIER_RATIO = 0.5  # a value below this share of the median is an outlier
MIN_COMPARABLE = 3  # outliers are named from this many values on
NETWORK_TEST_NUMEL = 1 << 24  # elements sent to measure a network of GPUs; a sixteenth on CPUs

T = TypeVar("T")


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, shown to the user as "subject: message"."""

    subject: str
    message: str
    passed: bool = True
    is_measurement: bool = False  # a failed measurement (slow, scarce) need not prevent a run


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
    return [memory, CheckResult("disk of run_dir", f"{_format_bytes(free_disk(setup.recipe.run_folder))} free")]


def check_plan_fits(setup: RunSetup) -> list[CheckResult]:
    """The memory and disk that `dscl plan` foresees for this recipe and number of ranks are free."""
    plan, problem = run_dscl_plan(setup) if comm.is_main() else ({}, "")
    comm.wait_for_all_ranks()  # planning may take minutes
    plan, problem = comm.broadcast_from_main((plan, problem))
    if problem:
        return [CheckResult("plan", f"none could be made ({problem}), so memory and disk were not compared with it")]
    stage = plan["stages"][plan["recipe"]]
    on_device, on_host = stage["device"] + plan["untracked_memory"], stage["host"]
    if comm.device().type != "cuda":
        on_device, on_host = 0, stage["device"] + stage["host"]
    ranks_per_host = Counter(host for host, _ in gather_by_host(None))
    gpu_memory, host_memory = (gather_by_host(free) for free in (_free_gpu_memory(), free_host_memory()))
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
    all_reduce_seconds = best_seconds(lambda: comm.all_reduce_sum(values.fill_(1.0)))
    parts = [count // world_size] * world_size
    all_to_all_seconds = best_seconds(lambda: comm.all_to_all(values.split(parts), parts))
    next_rank, previous_rank = (comm.rank() + 1) % world_size, (comm.rank() - 1) % world_size
    outgoing = [values if rank == next_rank else values[:0] for rank in range(world_size)]
    incoming = [count if rank == previous_rank else 0 for rank in range(world_size)]
    link_seconds = best_seconds(lambda: comm.all_to_all(outgoing, incoming))
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
    seconds = best_seconds(lambda: matrix @ matrix)
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


def gather_by_host(value: T) -> list[tuple[str, T]]:
    """Every rank's (host, value), in rank order; all ranks call it."""
    return comm.all_gather_objects((socket.gethostname(), value))


def _can_lock(path: Path) -> bool:
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def run_dscl_plan(setup: RunSetup) -> tuple[dict[str, Any], str]:
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
    return _free_gpu_memory() if comm.device().type == "cuda" else free_host_memory()


def _free_gpu_memory() -> float:
    return float(torch.cuda.mem_get_info()[0]) if comm.device().type == "cuda" else 0.0


def _free_disk_for_checkpoints(run_dir: Path) -> float:
    """Free bytes of the disk, plus those that existing checkpoints take: new ones replace them."""
    return free_disk(run_dir) + sum(path.stat().st_size for path in run_dir.glob("checkpoints/**/*") if path.is_file())


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"


def best_seconds(work: Callable[[], object]) -> float:
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
