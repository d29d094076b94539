"""Ranks and collectives. Every function also works in a single process, so callers need no `if`."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from dscl.utils import timers
from dscl.utils.errors import UserError

_GROUP_WITHOUT_TIMEOUT: list[Any] = []  # holds the process group of `_group_without_timeout` once it is made


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device: the GPU of its local rank where there are GPUs, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group, and leave it on every way out (a process that exits without leaving it may abort)."""
    init_process_group()
    try:
        yield
    finally:
        destroy_process_group()


def init_process_group() -> None:
    """Join the process group that the environment describes; without a launcher, make one of this process alone."""
    if torch_dist.is_initialized():
        return
    rank_device = device()
    if rank_device.type == "cuda":
        if rank_device.index >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={rank_device.index}: this machine has {torch.cuda.device_count()} GPUs; "
                "start at most that many processes on it"
            )
        torch.cuda.set_device(rank_device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "cpu:gloo,cuda:nccl" if rank_device.type == "cuda" else "gloo"
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    if not minutes.isdecimal() or int(minutes) < 1:
        raise UserError(f"DEEPSPEED_TIMEOUT: given {minutes!r}; a whole number of minutes, at least 1, is needed")
    timeout = timedelta(minutes=int(minutes))
    _join_slurm()
    if "RANK" in os.environ:
        _check_environment()
        torch_dist.init_process_group(backend, timeout=timeout)
        if world_size() > 1:
            _group_without_timeout()  # all ranks have to make a group together, and here all of them are present
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it even in a single process
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _join_slurm() -> None:
    """Under `srun`, set torch's environment variables from Slurm's; the first node of the step is the master."""
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or num_tasks == "1":
        return
    master = first_slurm_node(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    job_id = int(os.environ.get("SLURM_JOB_ID", "0"))
    variables = {"MASTER_ADDR": master, "MASTER_PORT": str(20000 + job_id % 10000)}
    slurm_names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    variables |= {name: os.environ.get(slurm_name, "") for name, slurm_name in slurm_names.items()}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def first_slurm_node(nodelist: str) -> str:
    """The first node of a Slurm node list such as `n[01-04],m7`: commas separate entries, brackets hold numbers."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodelist)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST: given {nodelist!r}; a list like n[01-04],m7 is needed; start by srun")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _check_environment() -> None:
    """Refuse an environment that sets RANK and lacks another variable, which only a hand-made one does."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is None or (name != "MASTER_ADDR" and not value.isdigit()):
            raise UserError(
                f"{name}: given {value!r} in the environment, where RANK is set; start the ranks by torchrun, "
                "deepspeed, srun or --nproc, or unset RANK to run alone"
            )


def init_fake_process_group(ranks: int) -> None:
    """Act as rank 0 of `ranks` ranks without the other ranks: collectives return at once and exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # private to torch; only `dscl plan` uses it

    assert not torch_dist.is_initialized()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu")
    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def destroy_process_group() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        _GROUP_WITHOUT_TIMEOUT.clear()


def _group_without_timeout() -> Any:
    """A gloo group whose collectives may wait for days; no collective of a training step uses it."""
    if not _GROUP_WITHOUT_TIMEOUT:
        _GROUP_WITHOUT_TIMEOUT.append(torch_dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return _GROUP_WITHOUT_TIMEOUT[0]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world_size() > 1:
        with timers.timed_collective("all_reduce", tensor):
            torch_dist.all_reduce(tensor)
    return tensor


def all_to_all(inputs: Sequence[torch.Tensor], output_sizes: Sequence[int]) -> list[torch.Tensor]:
    """Send `inputs[i]` (flat) to rank i, and return the flat tensor from each rank, of `output_sizes` elements."""
    if world_size() == 1:
        return list(inputs)
    received, packed = inputs[0].new_empty(sum(output_sizes)), torch.cat(list(inputs))
    with timers.timed_collective("all_to_all", packed):
        torch_dist.all_to_all_single(received, packed, list(output_sizes), [part.numel() for part in inputs])
    return list(received.split(list(output_sizes)))


def any_rank_true(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on every rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], dtype=torch.int32)
    with timers.timed_collective("all_reduce", value):
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX)
    return bool(value.item())


class SharedFlag:
    """A flag that any rank may set at any time, even in a signal handler.

    All ranks see it at the same call of `count_ranks_set`. That call does not wait for the other ranks to make the same
    call: it starts an asynchronous all-reduce, and the next call reads the result.
    """

    def __init__(self) -> None:
        self._set_here = False
        self._count = torch.zeros((), dtype=torch.int32)
        self._work: Any = None  # torch's handle of the all-reduce in progress
        self._group: Any = _group_without_timeout() if world_size() > 1 else None

    def set(self) -> None:
        self._set_here = True

    def count_ranks_set(self) -> int:
        """How many ranks had set the flag at the previous call (in a single process: at this call)."""
        if self._group is None:
            return int(self._set_here)
        if self._work is not None:
            self._work.wait()
        count = int(self._count)
        self._count = torch.tensor(int(self._set_here), dtype=torch.int32)
        self._work = torch_dist.all_reduce(self._count, group=self._group, async_op=True)
        return count

    def close(self) -> None:
        """Wait for the last all-reduce. All ranks call this, after equally many calls of `count_ranks_set`."""
        if self._work is not None:
            self._work.wait()


def broadcast_from_main(value: Any) -> Any:
    """The main rank's `value`, on every rank; for small picklable objects."""
    if world_size() == 1:
        return value
    objects = [value]
    torch_dist.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
    return objects[0]


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank; for small picklable objects."""
    if world_size() == 1 or torch_dist.get_backend() == "fake":  # simulated ranks have the same value as this one
        return [value] * world_size()
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def max_peak_memory() -> float:
    """The largest peak memory of any rank so far, in bytes: of the GPU, or without one of the process."""
    if device().type == "cuda":
        local_peak = float(torch.cuda.max_memory_allocated())
    else:
        local_peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(all_gather_objects(local_peak))


def memory_in_use() -> dict[str, float]:
    """Bytes in use by this rank now, by kind: host memory of the process, and memory of its GPU."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        num_bytes = {"host": float(pages * resource.getpagesize())}
    except OSError:  # not a Linux machine
        num_bytes = {}
    if device().type == "cuda":
        num_bytes["allocated"] = float(torch.cuda.memory_allocated())
        num_bytes["reserved"] = float(torch.cuda.memory_reserved())
        num_bytes["peak"] = float(torch.cuda.max_memory_allocated())
    return num_bytes


def wait_for_all_ranks() -> None:
    """A barrier without a time limit, for places where one rank may have hours of work and the others wait.

    A rank that dies meanwhile still ends the wait, see dscl/distributed/liveness.py.
    """
    if world_size() > 1:
        torch_dist.all_reduce(torch.zeros(1), group=_group_without_timeout())


def barrier() -> None:
    if world_size() > 1:
        any_rank_true(False)
