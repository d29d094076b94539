"""Is the cluster fit for a run? What all ranks must have in common is compared, what they have is measured; what is odd
is named with its host.

`agree` costs little and comes before every run: ranks that read another recipe, other data or another model than the
main one would train on with it all the same. `examine` takes some seconds more: `dscl doctor`, and the launch scripts.
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
from dscl.distributed.launcher import PROGRAM, outside
from dscl.recipe.recipe import difference
from dscl.training.setup import Job
from dscl.utils.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets", "safetensors", "numpy")
CLOCKS = 5.0  # seconds that two hosts' clocks may differ
SEEN_WITHIN = 15.0  # seconds after which a host should see what another has written
SLOW, FEW = 0.5, 3  # below this share of the median, of at least so many, something is odd
# What ranks may have differently, as it decides nothing that they do together (but what the DeepSpeed JSON holds does).
MAY_DIFFER = ("run_dir", "deepspeed", "data.cache_dir", "observe.live", "observe.tensorboard")
MOVED = 1 << 24  # numbers that are sent to measure a network on GPUs; on CPUs a sixteenth


T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    what: str
    said: str
    fine: bool = True
    measured: bool = False  # it may pass, or be lived with


def agree(job: Job) -> None:
    """All ranks call it; none goes on if one would train on something else than the others."""
    findings = [finding for finding in agreement(job) if not finding.fine]
    if findings:
        raise UserError("; ".join(f"{finding.what}: {finding.said}" for finding in findings))


def examine(job: Job, show: Callable[[str], None], strict: bool = True) -> None:
    """All ranks call it; each finding is shown as soon as it is there, and what is odd is an error at the end.

    Not `strict`, what was only measured (slow, scarce, without locks) is none: a run goes on with it.
    """
    odd = []
    looks = [agreement, clocks, shared_folder, room, network, arithmetic]
    if strict or not comm.from_main(any((job.recipe.folder / "checkpoints").glob("step-*"))):  # else it has held before
        looks.append(foreseen)
    for look in looks:
        for finding in look(job):
            show(f"{'ok ' if finding.fine else 'BAD'}  {finding.what}: {finding.said}")
            odd += [] if finding.fine or (finding.measured and not strict) else [finding.what]
    if odd:
        raise UserError(f"not fit for a run: {', '.join(odd)} (see above); mend that, or leave these hosts out")


def agreement(job: Job) -> list[Finding]:
    """Programs, recipe, data and model are the same everywhere."""
    mine = {"dscl": f"{__version__}, sources {_sources()}", "python": platform.python_version()}
    mine |= {package: version(package) for package in PACKAGES}
    mine |= {"triton": _triton(), "CUDA": torch.version.cuda or "none", "NCCL": _nccl()}
    everyone = by_host(mine)
    findings = [
        Finding(name, text + "; install the same everywhere, as launch/environment.sh does", False)
        for name in mine
        if (text := divided([(host, facts[name]) for host, facts in everyone]))
    ]
    if not findings:
        findings = [Finding("programs", ", ".join(f"{name} {value}" for name, value in mine.items()))]

    document = job.recipe.document()
    theirs = comm.from_main({"recipe": document, "deepspeed": job.settings})
    other = difference(theirs["recipe"], document, but=MAY_DIFFER)
    other = other or difference(theirs["deepspeed"], job.settings, but=())
    others = [(host, key) for host, key in by_host(other) if key]
    said = "; ".join(f"{host} has another {key}" for host, key in dict(others).items())
    findings.append(Finding("recipe", said or "the same everywhere", not others))

    read = by_host(_read(job))
    unlike = [
        Finding(name, text + "; copy the same files everywhere", False)
        for name in dict.fromkeys(name for _, facts in read for name in facts)
        if (text := divided([(host, facts.get(name, "nothing")) for host, facts in read]))
    ]
    same = Finding("data and model", f"{len(job.lessons)} tasks, the model and its tokenizer are the same everywhere")
    return [*findings, *(unlike or [same])]


def clocks(_job: Job) -> list[Finding]:
    comm.barrier()
    now = by_host(time.time())
    middle = statistics.median(seconds for _, seconds in now)
    wrong = {host: seconds - middle for host, seconds in now if abs(seconds - middle) > CLOCKS}
    said = ", ".join(f"{host} is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}" for host, by in wrong.items())
    most = max(abs(seconds - middle) for _, seconds in now)
    return [Finding("clocks", said or f"within {most:.1f} s", not wrong)]


def shared_folder(job: Job) -> list[Finding]:
    """What any host writes to `run_dir`, all see; and a lock that one holds, no other gets."""
    folder = job.recipe.folder
    name = comm.from_main(f".doctor-{os.getpid()}-{time.time_ns()}")
    mine = folder / f"{name}-{comm.rank()}"
    problem, lock, made, loose = "", None, not folder.exists(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(socket.gethostname())
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if comm.is_main() and not problem:
        lock = open(folder / name, "w")  # noqa: SIM115 - held until all have tried
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            loose = True
    comm.barrier()
    wanted = [folder / f"{name}-{rank}" for rank in range(comm.world())]
    unseen: list[Path] = []
    deadline = time.monotonic() + SEEN_WITHIN
    while not problem and (unseen := [path for path in wanted if not path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = [host for host, _ in by_host(None)]
    if unseen and not problem:
        writers = {hosts[wanted.index(path)] for path in unseen}
        problem = f"does not see what {', '.join(sorted(writers))} wrote; it has to be a file system that all share"
    loose = loose or (not problem and not comm.is_main() and _lockable(folder / name))
    problems = {host: text for host, text in by_host(problem) if text}
    without = dict.fromkeys(host for host, found in by_host(loose) if found)
    comm.barrier()
    with suppress(OSError):
        mine.unlink()
    if lock is not None:
        lock.close()
        (folder / name).unlink()
    comm.barrier()
    if made:
        with suppress(OSError):
            folder.rmdir()
    said = "; ".join(f"{host} {text}" for host, text in problems.items())
    findings = [Finding("run_dir", said or f"{folder}: written and seen by all", not problems)]
    if without and not problems:
        said = f"one in {folder} does not keep {', '.join(without)} out, so a second job there would not be refused; "
        said += "mount it with locks that all hosts share, or see to it that only one job is started on this run_dir"
        findings.append(Finding("locks", said, False, measured=True))
    return findings


def room(job: Job) -> list[Finding]:
    """Free memory and disk; hosts that have far less than the others."""
    free = by_host(_free_memory())
    found = [measured("free memory", free, _gib, FEW)]
    return [*found, Finding("disk of run_dir", f"{_gib(_free_disk(job.recipe.folder))} free")]


def foreseen(job: Job) -> list[Finding]:
    """Whether the run will find room: what `dscl plan` foresees for as many ranks, against what is free."""
    plan, problem = _plan(job) if comm.is_main() else ({}, "")
    comm.meet()  # that may take minutes
    plan, problem = comm.from_main((plan, problem))
    if problem:
        return [Finding("plan", f"none could be made ({problem}), so memory and disk were not compared with it")]
    stage = plan["stages"][plan["recipe"]]
    on_device, on_host = stage["device"] + plan["around"], stage["host"]
    if comm.device().type != "cuda":
        on_device, on_host = 0, stage["device"] + stage["host"]
    hosts = Counter(host for host, _ in by_host(None))
    gpu, memory = (by_host(free) for free in (_free_gpu(), _free_host()))
    disk = [("run_dir", float(comm.from_main(_for_checkpoints(job.recipe.folder) if comm.is_main() else None)))]
    wanted = [
        ("memory of GPUs", gpu, dict.fromkeys(hosts, on_device)),
        ("memory of hosts", memory, {host: count * on_host for host, count in hosts.items()}),
        ("disk for checkpoints", disk, {"run_dir": plan["disk"]}),
    ]
    return [enough(what, free, needed) for what, free, needed in wanted if any(needed.values())]


def enough(what: str, free: Sequence[tuple[str, float]], needed: Mapping[str, float]) -> Finding:
    """What is free in each place against what is foreseen there; where it is less, that is named."""
    short = {place: size for place, size in free if size < needed[place]}
    told = [f"{place} has {_gib(size)} free and needs {_gib(needed[place])}" for place, size in short.items()]
    if told:
        return Finding(what, f"{', '.join(told)}; dscl plan says what would fit", False, measured=True)
    return Finding(what, f"{_gib(max(needed.values()))} foreseen, {_gib(min(size for _, size in free))} free")


def network(_job: Job) -> list[Finding]:
    """All-reduce and all-to-all over all ranks, and each link of a ring through them."""
    world = comm.world()
    if world == 1:
        return []
    here = comm.device()
    count = MOVED if here.type == "cuda" else MOVED // 16
    count -= count % world
    values = torch.ones(count, device=here)
    size = values.element_size() * count
    summed = _seconds(lambda: comm.sum_(values.fill_(1.0)))
    parts = [count // world] * world
    swapped = _seconds(lambda: comm.exchange(values.split(parts), parts))
    after, before = (comm.rank() + 1) % world, (comm.rank() - 1) % world
    sent = [values if rank == after else values[:0] for rank in range(world)]
    arriving = [count if rank == before else 0 for rank in range(world)]
    passed = _seconds(lambda: comm.exchange(sent, arriving))
    bus = [2 * (world - 1) / world * size / max(t for _, t in by_host(summed))]
    bus.append((world - 1) / world * size / max(t for _, t in by_host(swapped)))
    said = f"all-reduce {_rate(bus[0])}, all-to-all {_rate(bus[1])} (of a rank's link)"
    hosts = [host for host, _ in by_host(None)]
    rates = [size / seconds for _, seconds in by_host(passed)]
    links = [(f"{hosts[rank - 1]} → {hosts[rank]}", rate) for rank, rate in enumerate(rates)]
    within = [link for rank, link in enumerate(links) if hosts[rank - 1] == hosts[rank]]
    between = [link for rank, link in enumerate(links) if hosts[rank - 1] != hosts[rank]]
    kinds = (("links within hosts", within), ("links between hosts", between))
    return [Finding("network", said), *(measured(what, some, _rate, FEW) for what, some in kinds if some)]


def arithmetic(_job: Job) -> list[Finding]:
    """One matrix product on every rank: a device that is throttled, or shared with somebody."""
    here = comm.device()
    size, kind = (8192, torch.bfloat16) if here.type == "cuda" else (1024, torch.float32)
    matrix = torch.ones(size, size, dtype=kind, device=here)
    seconds = _seconds(lambda: matrix @ matrix)
    rates = [(host, 2 * size**3 / t) for host, t in by_host(seconds)]
    return [measured("matrix products", rates, lambda rate: f"{rate / 1e12:.2f} TFLOP/s", FEW)]


def measured(what: str, values: Sequence[tuple[str, float]], text: Callable[[float], str], few: int) -> Finding:
    """What was measured in many places; the places that have far less than the others are named.

    Of very few nobody can say which one is odd: then every figure is shown, and the reader judges.
    """
    if 1 < len(values) < few:
        return Finding(what, ", ".join(f"{place} {text(value)}" for place, value in values))
    middle = statistics.median(value for _, value in values)
    odd = [(place, value) for place, value in values if value < SLOW * middle]
    if odd:
        named = ", ".join(f"{place} {text(value)}" for place, value in odd)
        return Finding(what, f"{named}, where the median is {text(middle)}", False, measured=True)
    least = min(value for _, value in values)
    return Finding(what, text(middle) if least == middle else f"{text(least)} and more, median {text(middle)}")


def divided(values: Sequence[tuple[str, str]]) -> str:
    """Which hosts have which value, where they have not all the same; what most have comes first."""
    counts = Counter(value for _, value in values)
    if len(counts) == 1:
        return ""
    sides = []
    for value, _ in counts.most_common():
        hosts = dict.fromkeys(host for host, other in values if other == value)
        sides.append(f"{value} on {', '.join(hosts)}")
    return "; ".join(sides)


def by_host(mine: T) -> list[tuple[str, T]]:
    """Every rank's value, in rank order, with its host."""
    return comm.gather((socket.gethostname(), mine))


def _sources() -> str:
    """A checksum of this very program, which a commit's number would not be: files may have been changed since."""
    home, checksum = Path(__file__).resolve().parent, 0
    for path in sorted(home.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(home)).encode(), checksum))
    return f"{checksum:08x}"


def _triton() -> str:
    """Torch's builds for GPUs bring it, others need not have it."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _nccl() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if comm.device().type == "cuda" else "none"


def _read(job: Job) -> Mapping[str, str]:
    """What this rank has read, as checksums."""
    found = {"model": job.facts.model[:12], "tokenizer": job.facts.tokenizer[:12]}
    for lesson in job.lessons:
        checksum = 0
        for samples in (lesson.task.train, lesson.exam.samples):
            for sample in samples:
                checksum = zlib.crc32(json.dumps([sample.prompt, sample.answer]).encode(), checksum)
        checksum = zlib.crc32(json.dumps(lesson.task.labels).encode(), checksum)
        found[f"data of {lesson.task.name}"] = f"{checksum:08x}"
    found["held-out texts"] = f"{zlib.crc32(json.dumps(job.heldout).encode()):08x}"
    return found


def _lockable(path: Path) -> bool:
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _plan(job: Job) -> tuple[dict[str, Any], str]:
    """That of `dscl plan`, a program of its own; or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(job.recipe.text(), "utf-8")
        words = [f"deepspeed={json.dumps(str(job.recipe.deepspeed_path().absolute()))}", "--alone", "--json"]
        done = subprocess.run(
            [sys.executable, *PROGRAM, "plan", str(recipe), *words, "--gpus-per-node", str(comm.world())],
            env=outside(), capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, ""


def _free_memory() -> float:
    """Of this rank's GPU, or of the host."""
    return _free_gpu() if comm.device().type == "cuda" else _free_host()


def _free_gpu() -> float:
    return float(torch.cuda.mem_get_info()[0]) if comm.device().type == "cuda" else 0.0


def _free_host(root: Path = Path("/")) -> float:
    """Of the machine; or of what a container or a Slurm job may have of it, which no job outgrows and lives."""
    meminfo = root / "proc/meminfo"
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
    with suppress(OSError, ValueError, StopIteration):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = Path(next(line for line in groups if line.startswith("0::")).removeprefix("0::/"))
        for group in (own, *own.parents):  # each has to keep to the limit of those above it
            place = root / "sys/fs/cgroup" / group
            limit = (place / "memory.max").read_text().strip() if (place / "memory.max").exists() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                used = int((place / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                free = min(free, max(0.0, float(limit) - used))
    return free


def _free_disk(folder: Path) -> float:
    """Where the folder is, or would be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return float(shutil.disk_usage(there).free)


def _for_checkpoints(run: Path) -> float:
    """What is free, and what those that are there already take."""
    return _free_disk(run) + sum(path.stat().st_size for path in run.glob("checkpoints/**/*") if path.is_file())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of a few turns, all ranks starting together."""
    best = float("inf")
    for _ in range(4):
        comm.barrier()
        start = time.perf_counter()
        work()
        if comm.device().type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"
