"""`dscl plan`: what a run will need of a cluster that need not be there: memory, exchange and time of a step.

Memory and exchange are counted in a rehearsal (dscl/planning/simulate.py) of the first rank, for every ZeRO stage. Time
is arithmetic: the operations of dscl/model/flops.py at a stated share of what a device can do, and the bytes of a ring
at the stated bandwidth; the step takes between the longer of both, if they overlap in full, and their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dscl.config.deepspeed_json import read_settings
from dscl.distributed import comm
from dscl.planning.simulate import Rehearsed, largest, rehearse
from dscl.recipe.recipe import Recipe
from dscl.training.setup import Job, open_job
from dscl.utils.formatting import count, duration
from dscl.utils.hardware import GIB

STAGES = Path(__file__).resolve().parent.parent / "ds_configs"
AROUND = 2 * GIB  # of a GPU, that no tensor shows: the CUDA context, NCCL's buffers, workspaces of kernels


@dataclass(frozen=True)
class Cluster:
    nodes: int
    per_node: int
    memory: float | None  # bytes of a device
    bandwidth: float | None  # bytes a second that a device sends
    peak: float | None  # operations a second of a device, at most
    efficiency: float  # the share of it that is reached

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Stage:
    """One DeepSpeed configuration, rehearsed."""

    name: str
    settings: Mapping[str, Any]
    found: Rehearsed
    fits: int | None  # rows of the largest micro-batch that fits; None where no memory was stated

    @property
    def device(self) -> int:
        """The most that the device holds, in a step or when a task ends."""
        return max(self.in_step, self.ending)

    @property
    def in_step(self) -> int:
        """Of the peak, what stays on the device where DeepSpeed keeps the rest in the host's memory."""
        return self.found.peak - self.away

    @property
    def ending(self) -> int:
        """Likewise when a task has ended, with what that takes instead of what passes in a step."""
        return self.in_step - self.found.passing + self.found.ending

    @property
    def host(self) -> int:
        """What of it, and of the method, lies in the host's memory."""
        return self.away + self.found.host

    @property
    def away(self) -> int:
        zero = self.settings.get("zero_optimization", {})
        kept = {"offload_optimizer": self.found.optimizer, "offload_param": self.found.weights}
        return sum(size for key, size in kept.items() if zero.get(key, {}).get("device", "none") != "none")


@dataclass(frozen=True)
class Step:
    """What a rank sends and computes in a step, and how long that takes."""

    sent: float  # bytes, in rings
    tokens: float  # of all ranks
    work: float | None  # operations, where they can be counted
    computing: float | None  # seconds, where the device is stated
    sending: float | None  # and the network

    @property
    def seconds(self) -> tuple[float, float] | None:
        """At least and at most: the exchange goes on beside the arithmetic, or all of it is waited for."""
        if self.computing is None or self.sending is None:
            return None
        return max(self.computing, self.sending), self.computing + self.sending

    @property
    def rates(self) -> tuple[float, float] | None:
        """Tokens a second, at least and at most."""
        return self.seconds and (self.tokens / self.seconds[1], self.tokens / self.seconds[0])


@dataclass(frozen=True)
class Plan:
    job: Job
    cluster: Cluster
    stages: Sequence[Stage]
    own: str  # the stage that the recipe names

    @property
    def mine(self) -> Stage:
        return next(stage for stage in self.stages if stage.name == self.own)

    @property
    def disk(self) -> int:
        """Of run_dir: the checkpoints that are kept, and the one that is being written."""
        return (self.job.recipe.checkpoint.keep + 1) * self.mine.found.saved

    def lines(self) -> list[str]:
        """For readers."""
        found = self.mine.found
        held = [*_opening(self.job, self.cluster, found), "", *_table(self.stages, self.own), ""]
        spent = [*_times(self.job, self.cluster, found), *_advice(self.stages, self.cluster)]
        return [*held, *spent, *_beside(self), SURE]

    def document(self) -> dict[str, Any]:
        """For programs; sizes in bytes."""
        fields = ("weights", "optimizer", "beside", "gradients", "passing", "peak", "ending", "saved", "sent")
        stages = {
            stage.name: {name: getattr(stage.found, name) for name in fields}
            | {"device": stage.device, "host": stage.host, "fits": stage.fits}
            for stage in self.stages
        }
        mine, step = self.mine.found, step_of(self.job, self.cluster, self.mine.found)
        spent = {
            "sent": step.sent,
            "tokens": step.tokens,
            "operations": step.work,
            "seconds": step.seconds,
            "tokens_per_second": step.rates,
        }
        of_all = {
            "ranks": self.cluster.ranks,
            "parameters": mine.parameters,
            "trained": mine.trained,
            "recipe": self.own,
            "disk": self.disk,
            "around": AROUND,
            "busiest": mine.busiest,
        }
        return {**of_all, "step": spent, "stages": stages}


def plan(recipe: Recipe, cluster: Cluster, say: Callable[[str], None], alone: bool = False) -> Plan:
    """`say` hears how far it is. `alone`: of the recipe's own DeepSpeed configuration only."""
    comm.pretend(cluster.ranks)
    if recipe.train.precision == "fp16":  # as large as bf16, which CPUs train in
        recipe = replace(recipe, train=replace(recipe.train, precision="bf16"))
    job = open_job(recipe)
    most = -(-recipe.train.global_batch // cluster.ranks)  # rows that a rank has in a step
    now = min(recipe.train.micro_batch, most)
    jobs = {now: job if now == recipe.train.micro_batch else _with_rows(recipe, now)}
    if cluster.memory is not None and most > 1:
        other = now // 2 if now > 1 else 2
        jobs[other] = _with_rows(recipe, other)
    own = recipe.deepspeed_path()
    chosen = read_settings(own)
    others = () if alone else (STAGES / f"zero{stage}.json" for stage in range(4))
    settings = {**{path.name: read_settings(path) for path in others}, own.name: chosen}
    stages = []
    for name, each in sorted(settings.items(), key=lambda pair: (_stage(pair[1]), pair[0])):
        found = {}
        for rows, of in jobs.items():
            say(f"rehearsing {name}, micro-batches of {rows}")
            found[rows] = rehearse(of, dict(each), largest(of), _micro_batches(of))
        stages.append(_judged(Stage(name, each, found[now], None), found, cluster, most))
    return Plan(jobs[now], cluster, stages, own.name)


def _with_rows(recipe: Recipe, rows: int) -> Job:
    return open_job(replace(recipe, train=replace(recipe.train, micro_batch=rows)))


def _stage(settings: Mapping[str, Any]) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


SURE = (
    "how sure: tensors are counted as the program makes them, with what torch allocates on CPUs within a few per cent "
    f"of it; not counted are about {AROUND // GIB} GiB of a GPU that no tensor shows, and gaps between tensors. Times "
    "assume the stated efficiency and bandwidth, and even ranks: take them for a half to twice of the truth until a "
    "first run has been measured."
)


def _micro_batches(job: Job) -> int:
    """Of a rank, in a step."""
    return len(job.lesson(0).schedule.micro_batches(0, comm.rank()))


def _judged(stage: Stage, found: Mapping[int, Rehearsed], cluster: Cluster, most: int) -> Stage:
    """With what fits: memory grows by the row, so two rehearsals tell, up to all rows that a rank has in a step."""
    if cluster.memory is None:
        return stage
    room = cluster.memory - AROUND
    needed = {rows: replace(stage, found=each).in_step for rows, each in found.items()}
    (now, here), *others = needed.items()
    if stage.ending > room:  # however few rows a step has
        return replace(stage, fits=0)
    if not others:
        return replace(stage, fits=now if here <= room else 0)
    other, there = others[0]
    row = max(1.0, (here - there) / (now - other))
    return replace(stage, fits=max(0, min(most, now + int((room - here) // row))))


def _opening(job: Job, cluster: Cluster, found: Rehearsed) -> list[str]:
    recipe, schedule = job.recipe, job.lesson(0).schedule
    each = _micro_batches(job)
    batch = largest(job)[0].input_ids
    return [
        f"{recipe.method.name}, {recipe.train.precision}: {count(found.parameters)} parameters, of which "
        f"{count(found.trained)} train",
        f"{cluster.ranks} ranks ({cluster.nodes} x {cluster.per_node}); a step of {recipe.train.global_batch} samples "
        f"is {each} micro-batch{'es' if each != 1 else ''} of up to {recipe.train.micro_batch} rows on each; the "
        f"largest has {batch.numel():,} tokens; {schedule.steps:,} steps of the first task",
    ]


def _table(stages: Sequence[Stage], own: str) -> list[str]:
    """What a rank holds."""
    unit, size = ("GiB", GIB) if max(stage.found.peak for stage in stages) > 4 * GIB else ("MiB", GIB >> 10)
    head = [f"{unit} a rank", "weights", "optimizer", "method", "gradients", "passing", "peak", "micro-batch that fits"]
    rows = [head]
    for stage in stages:
        found = stage.found
        parts = [found.weights, found.optimizer, found.beside, found.gradients, found.passing, found.peak]
        fits = "" if stage.fits is None else f"up to {stage.fits}" if stage.fits else "none"
        if stage.away:
            fits += f" ({stage.away / size:.1f} {unit} of the peak in the host's memory)"
        name = f"{stage.name} (recipe's)" if stage.name == own else stage.name
        rows.append([name, *(f"{part / size:.1f}" for part in parts), fits])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wire(sent: Mapping[str, float], ranks: int) -> float:
    """Bytes that a rank sends in rings, of what it puts into each kind of collective."""
    share = (ranks - 1) / ranks
    times = {"all_reduce": 2 * share, "all_gather": ranks - 1.0, "reduce_scatter": share, "all_to_all": share}
    return sum(times.get(kind, 1.0) * size for kind, size in sent.items())


def step_of(job: Job, cluster: Cluster, found: Rehearsed) -> Step:
    schedule, moved = job.lesson(0).schedule, wire(found.sent, cluster.ranks)
    steps = [schedule.step(number) for number in range(min(schedule.steps_per_epoch, 200))]
    tokens = sum(step.tokens for step in steps) / len(steps)
    sending = moved / cluster.bandwidth if cluster.bandwidth else None if cluster.ranks > 1 else 0.0
    if found.cost is None:
        return Step(moved, tokens, None, None, sending)
    work = sum(
        found.cost.of(s.tokens, s.pairs, s.targets) + found.cost.again(s.tokens, s.pairs) for s in steps
    ) / len(steps) / cluster.ranks  # fmt: skip
    computing = None if cluster.peak is None else work / (cluster.peak * cluster.efficiency)
    return Step(moved, tokens, work, computing, sending)


def _times(job: Job, cluster: Cluster, found: Rehearsed) -> list[str]:
    step = step_of(job, cluster, found)
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in found.sent.items() if size)
    lines = [f"exchange: a rank sends {step.sent / 1e9:.3g} GB a step (it puts in {kinds or 'nothing'})"]
    if step.work is None:
        return [*lines, "time: unknown, for the model is not built like a LLaMA"]
    told = f"time: {step.tokens:,.0f} tokens a step; a rank computes {step.work / 1e12:.3g} TFLOP"
    if cluster.peak is None or step.computing is None:
        return [*lines, f"{told}; give --gpu or --tflops for the seconds of it"]
    told += f", {step.computing:.3g} s at {cluster.efficiency:.0%} of {cluster.peak / 1e12:.3g} TFLOP/s"
    if step.seconds is None or step.rates is None:
        return [*lines, f"{told}; give --bandwidth for the exchange's part"]
    (least, longest), (slow, fast) = step.seconds, step.rates
    told += f"; exchange {step.sending:.3g} s; so {least:.3g} to {longest:.3g} s a step, "
    told += f"{slow:,.0f} to {fast:,.0f} tokens/s in all"
    whole = sum(count for _, count in job.steps())
    return [*lines, told, f"the stream: {whole:,} steps, {duration(whole * least)} to {duration(whole * longest)}"]


def _advice(stages: Sequence[Stage], cluster: Cluster) -> list[str]:
    if cluster.memory is None:
        return ["give --gpu-memory to learn what fits"]
    fitting = [stage for stage in stages if stage.fits]
    if not fitting:
        return [
            f"fits: nothing in {cluster.memory / GIB:.0f} GiB; take more ranks, model.activation_checkpointing=true, "
            "ds_configs/zero3_offload.json, or a smaller train.max_length"
        ]
    first, best = fitting[0], max(fitting, key=lambda stage: stage.fits or 0)
    which = "is the lowest stage that does" if len(stages) > 1 else "does"
    told = f"fits: {first.name} {which}, with train.micro_batch up to {first.fits}"
    if best.fits != first.fits:
        told += f"; {best.name} leaves room for {best.fits}"
    return [told]


def _beside(plan: Plan) -> list[str]:
    found, keep = plan.mine.found, plan.job.recipe.checkpoint.keep
    lines = [
        f"disk of run_dir: {plan.disk / GIB:.3g} GiB, {keep + 1} checkpoints of {found.saved / GIB:.3g} GiB "
        f"(checkpoint.keep={keep}, and the one that is being written)"
    ]
    lines += [f"{what}: {size / GIB:.3g} GiB" for what, size in found.later.items()]
    if plan.mine.ending > plan.mine.in_step:
        lines.append(f"when a task ends, a device holds {plan.mine.ending / GIB:.3g} GiB, more than in a step")
    if found.busiest is not None:
        lines.append(f"owners: the busiest rank has {found.busiest:.2f} of the mean work on matrices")
    return lines
