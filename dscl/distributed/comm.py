"""Ranks: who am I, how many are we, sums and agreement. All of it works alone too, so callers need no `if`."""

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

_PATIENT: list[Any] = []  # the process group of `_patient`, once it is there


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its own GPU where there are GPUs, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


@contextmanager
def session() -> Iterator[None]:
    """Join the other ranks, and leave them on every way out (a process that exits inside its group may abort)."""
    start()
    try:
        yield
    finally:
        finish()


def start() -> None:
    """Join the process group that the environment describes; without one, a group of this process alone."""
    if torch_dist.is_initialized():
        return
    here = device()
    if here.type == "cuda":
        if here.index >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={here.index}: this machine has {torch.cuda.device_count()} GPUs; "
                "start at most that many processes on it"
            )
        torch.cuda.set_device(here)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    if not minutes.isdecimal() or int(minutes) < 1:
        raise UserError(f"DEEPSPEED_TIMEOUT: given {minutes!r}; a whole number of minutes, at least 1, is needed")
    timeout = timedelta(minutes=int(minutes))
    _join_slurm()
    if "RANK" in os.environ:
        _check_environment()
        torch_dist.init_process_group(backend, timeout=timeout)
        if world() > 1:
            _patient()  # made while all are here
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even here
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _join_slurm() -> None:
    """`srun` numbers its tasks under names of its own; the first node of the step is where the others meet."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or tasks == "1":
        return
    first = first_node(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    meeting = {"MASTER_ADDR": first, "MASTER_PORT": str(20000 + job % 10000)}
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, value in {**meeting, **{name: os.environ.get(theirs, "") for name, theirs in names.items()}}.items():
        os.environ.setdefault(name, value)


def first_node(nodes: str) -> str:
    """Of a list as Slurm shortens it: commas part its entries, and brackets hold the numbers of many nodes."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST: given {nodes!r}; a list like n[01-04],m7 is needed; start by srun")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _check_environment() -> None:
    """A launcher that sets RANK sets these as well; a hand-made environment may have forgotten one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is None or (name != "MASTER_ADDR" and not value.isdigit()):
            raise UserError(
                f"{name}: given {value!r} in the environment, where RANK is set; start the ranks by torchrun, "
                "deepspeed, srun or --nproc, or unset RANK to run alone"
            )


def pretend(ranks: int) -> None:
    """Be the first of so many ranks, of which the others are not there: their part in a collective is nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch's own, for what is planned only

    assert not torch_dist.is_initialized()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu")
    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def finish() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        _PATIENT.clear()


def _patient() -> Any:
    """A group on which a wait has no end; it carries no sums that a step waits for."""
    if not _PATIENT:
        _PATIENT.append(torch_dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return _PATIENT[0]


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Add `tensor` up over all ranks, in place."""
    if world() > 1:
        with timers.collective("all_reduce", tensor):
            torch_dist.all_reduce(tensor)
    return tensor


def exchange(sent: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Give each rank its flat tensor of `sent`, and get one from each, of these sizes."""
    if world() == 1:
        return list(sent)
    arrived, packed = sent[0].new_empty(sum(sizes)), torch.cat(list(sent))
    with timers.collective("all_to_all", packed):
        torch_dist.all_to_all_single(arrived, packed, list(sizes), [part.numel() for part in sent])
    return list(arrived.split(list(sizes)))


def any_rank(flag: bool) -> bool:
    """True on every rank as soon as it is true on one."""
    if world() == 1:
        return flag
    value = torch.tensor([int(flag)], dtype=torch.int32)
    with timers.collective("all_reduce", value):
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX)
    return bool(value.item())


class Flag:
    """Raised by any rank at any time, even in a signal handler; all ranks learn of it at the same call of `raised`.

    No call waits for another rank's: each starts a sum, which the next call reads.
    """

    def __init__(self) -> None:
        self._mine = False
        self._seen = torch.zeros((), dtype=torch.int32)
        self._sum: Any = None
        self._group: Any = _patient() if world() > 1 else None

    def raise_(self) -> None:
        self._mine = True

    def raised(self) -> int:
        """How many ranks have, as of the last call."""
        if self._group is None:
            return int(self._mine)
        if self._sum is not None:
            self._sum.wait()
        seen = int(self._seen)
        self._seen = torch.tensor(int(self._mine), dtype=torch.int32)
        self._sum = torch_dist.all_reduce(self._seen, group=self._group, async_op=True)
        return seen

    def drop(self) -> None:
        """Nobody asks any more; all ranks call it, after equally many calls of `raised`."""
        if self._sum is not None:
            self._sum.wait()


def from_main(value: Any) -> Any:
    """The main rank's `value`, on every rank. For small plain objects."""
    if world() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. For small plain objects."""
    if world() == 1 or torch_dist.get_backend() == "fake":  # those who are not there would say the same
        return [value] * world()
    values: list[Any] = [None] * world()
    torch_dist.all_gather_object(values, value)
    return values


def peak_memory() -> float:
    """The most bytes that any rank has had in use so far: of its GPU, or on a CPU of the process."""
    if device().type == "cuda":
        mine = float(torch.cuda.max_memory_allocated())
    else:
        mine = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(gather(mine))


def memory() -> dict[str, float]:
    """Bytes in use by this rank now: of its GPU, and of the process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {"host": float(pages * resource.getpagesize())}
    except OSError:  # not a Linux machine
        found = {}
    if device().type == "cuda":
        found["allocated"] = float(torch.cuda.memory_allocated())
        found["reserved"] = float(torch.cuda.memory_reserved())
        found["peak"] = float(torch.cuda.max_memory_allocated())
    return found


def meet() -> None:
    """Wait for all ranks, however long: where one may have hours of work that no collective's time limit should end.

    A rank that dies meanwhile ends the wait all the same, see dscl/distributed/liveness.py.
    """
    if world() > 1:
        torch_dist.all_reduce(torch.zeros(1), group=_patient())


def barrier() -> None:
    if world() > 1:
        any_rank(False)
