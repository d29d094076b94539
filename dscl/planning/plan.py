"""`dscl plan`: the memory, communication and time per step that a run needs on a cluster, which need not exist.

Memory and communication of the first rank are counted in a simulated step (dscl/planning/simulate.py), for every ZeRO
stage. Time is computed from the FLOPs (dscl/model/flops.py) at a stated share of the device's peak, and from the bytes
of ring collectives at the stated bandwidth. If both overlap fully, a step takes the longer of the two times; if they do
not overlap, it takes their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dscl.config.deepspeed_json import read_deepspeed_json
from dscl.distributed import comm
from dscl.planning.simulate import MemoryEstimate, largest_micro_batches, simulate_step
from dscl.recipe.recipe import Recipe
from dscl.training.setup import RunSetup, build_setup
from dscl.utils.formatting import format_count, format_duration
from dscl.utils.hardware import GIB

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
UNTRACKED_GPU_BYTES = 2 * GIB  # GPU memory outside of tensors: the CUDA context, NCCL's buffers, kernel workspaces


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    device_memory: float | None  # bytes per device; None: not stated
    bandwidth: float | None  # bytes per second that a device sends; None: not stated
    peak_flops: float | None  # of one device, per second; None: not stated
    efficiency: float  # the share of `peak_flops` that is reached

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class StageEstimate:
    """The memory of one rank under one DeepSpeed configuration."""

    name: str  # of the DeepSpeed JSON
    settings: Mapping[str, Any]
    estimate: MemoryEstimate
    max_rows: int | None  # rows of the largest micro-batch that fits; None where the cluster's memory is not stated

    @property
    def device_bytes(self) -> int:
        """The largest device memory at any time: in a step or at a task's end."""
        return max(self.step_bytes, self.task_end_bytes)

    @property
    def step_bytes(self) -> int:
        """The peak of device memory in a step, without what DeepSpeed offloads to the host."""
        return self.estimate.peak - self.offloaded_bytes

    @property
    def task_end_bytes(self) -> int:
        """The peak of device memory at a task's end, where the method's work takes the place of activations."""
        return self.step_bytes - self.estimate.activations + self.estimate.task_end

    @property
    def host_bytes(self) -> int:
        """Host memory of a rank: what DeepSpeed offloads and what the method keeps there."""
        return self.offloaded_bytes + self.estimate.host

    @property
    def offloaded_bytes(self) -> int:
        zero = self.settings.get("zero_optimization", {})
        sizes = {"offload_optimizer": self.estimate.optimizer, "offload_param": self.estimate.weights}
        return sum(size for key, size in sizes.items() if zero.get(key, {}).get("device", "none") != "none")


@dataclass(frozen=True)
class StepCost:
    """What one rank communicates and computes in a step, and how long that takes."""

    bytes_sent: float  # in ring collectives
    tokens: float  # of all ranks
    flops: float | None  # None where the model's FLOPs cannot be counted
    compute_seconds: float | None  # None where the device's speed is not stated
    communication_seconds: float | None  # None where the bandwidth is not stated

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Least and most seconds of a step: with full overlap of computation and communication, and with none."""
        if self.compute_seconds is None or self.communication_seconds is None:
            return None
        least = max(self.compute_seconds, self.communication_seconds)
        return least, self.compute_seconds + self.communication_seconds

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Least and most tokens per second, over all ranks."""
        return self.seconds and (self.tokens / self.seconds[1], self.tokens / self.seconds[0])


@dataclass(frozen=True)
class Plan:
    setup: RunSetup
    cluster: Cluster
    stages: Sequence[StageEstimate]
    recipe_stage_name: str  # the DeepSpeed JSON that the recipe names

    @property
    def recipe_stage(self) -> StageEstimate:
        return next(stage for stage in self.stages if stage.name == self.recipe_stage_name)

    @property
    def disk_bytes(self) -> int:
        """Disk space of run_dir: the checkpoints that are kept, and the one that is being written."""
        return (self.setup.recipe.checkpoint.keep + 1) * self.recipe_stage.estimate.checkpoint

    def lines(self) -> list[str]:
        """The plan as text."""
        estimate = self.recipe_stage.estimate
        memory = [
            *_describe_setup(self.setup, self.cluster, estimate), "",
            *_format_table(self.stages, self.recipe_stage_name), "",
        ]  # fmt: skip
        time = [*_describe_times(self.setup, self.cluster, estimate), *_describe_fit(self.stages, self.cluster)]
        return [*memory, *time, *_describe_rest(self), ACCURACY_NOTE]

    def document(self) -> dict[str, Any]:
        """The plan as JSON, sizes in bytes."""
        stages = {stage.name: _stage_document(stage) for stage in self.stages}
        estimate = self.recipe_stage.estimate
        step = estimate_step(self.setup, self.cluster, estimate)
        step_document = {
            "bytes_sent": step.bytes_sent,
            "tokens": step.tokens,
            "flops": step.flops,
            "seconds": step.seconds,
            "tokens_per_second": step.tokens_per_second,
        }
        totals = {
            "ranks": self.cluster.world_size,
            "parameters": estimate.num_parameters,
            "trainable": estimate.num_trainable,
            "recipe": self.recipe_stage_name,
            "disk": self.disk_bytes,
            "untracked_memory": UNTRACKED_GPU_BYTES,
            "load_imbalance": estimate.load_imbalance,
        }
        return {**totals, "step": step_document, "stages": stages}


def make_plan(recipe: Recipe, cluster: Cluster, on_progress: Callable[[str], None], recipe_only: bool = False) -> Plan:
    """Simulate a step under every ZeRO stage, or (`recipe_only`) under the recipe's DeepSpeed configuration alone.

    `on_progress` gets a line before every simulation.
    """
    comm.init_fake_process_group(cluster.world_size)
    if recipe.train.precision == "fp16":  # CPUs cannot train in fp16; bf16 takes as much memory
        recipe = replace(recipe, train=replace(recipe.train, precision="bf16"))
    setup = build_setup(recipe)
    rows_per_step = -(-recipe.train.global_batch // cluster.world_size)  # rows that a rank has in a step
    micro_batch = min(recipe.train.micro_batch, rows_per_step)
    setups = {micro_batch: setup if micro_batch == recipe.train.micro_batch else _build_setup(recipe, micro_batch)}
    if cluster.device_memory is not None and rows_per_step > 1:  # a second size shows how memory grows by the row
        second = micro_batch // 2 if micro_batch > 1 else 2
        setups[second] = _build_setup(recipe, second)
    recipe_path = recipe.find_deepspeed_json()
    recipe_settings = read_deepspeed_json(recipe_path)
    paths = () if recipe_only else (DS_CONFIGS / f"zero{stage}.json" for stage in range(4))
    configs = {**{path.name: read_deepspeed_json(path) for path in paths}, recipe_path.name: recipe_settings}
    stages = []
    for name, settings in sorted(configs.items(), key=lambda pair: (_zero_stage(pair[1]), pair[0])):
        estimates = {}
        for rows, rows_setup in setups.items():
            on_progress(f"simulating a step with {name}, micro-batches of {rows}")
            batches = largest_micro_batches(rows_setup)
            estimates[rows] = simulate_step(rows_setup, dict(settings), batches, _micro_batches_per_step(rows_setup))
        stage = StageEstimate(name, settings, estimates[micro_batch], None)
        stages.append(_with_max_rows(stage, estimates, cluster, rows_per_step))
    return Plan(setups[micro_batch], cluster, stages, recipe_path.name)


def _build_setup(recipe: Recipe, micro_batch: int) -> RunSetup:
    return build_setup(replace(recipe, train=replace(recipe.train, micro_batch=micro_batch)))


def _stage_document(stage: StageEstimate) -> dict[str, Any]:
    estimate = stage.estimate
    return {
        "weights": estimate.weights,
        "optimizer": estimate.optimizer,
        "method_state": estimate.method_state,
        "gradients": estimate.gradients,
        "activations": estimate.activations,
        "peak": estimate.peak,
        "task_end": estimate.task_end,
        "checkpoint": estimate.checkpoint,
        "bytes_sent": estimate.bytes_sent,
        "device": stage.device_bytes,
        "host": stage.host_bytes,
        "max_rows": stage.max_rows,
    }


def _zero_stage(settings: Mapping[str, Any]) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


ACCURACY_NOTE = (
    "how sure: tensors are counted as the program makes them, with what torch allocates on CPUs within a few per cent "
    f"of it; not counted are about {UNTRACKED_GPU_BYTES // GIB} GiB of a GPU that no tensor shows, and gaps between "
    "tensors. Times assume the stated efficiency and bandwidth, and even ranks: take them for a half to twice of the "
    "truth until a first run has been measured."
)


def _micro_batches_per_step(setup: RunSetup) -> int:
    """How many micro-batches a rank has in a step."""
    return len(setup.training_data(0).sampler.micro_batches(0, comm.rank()))


def _with_max_rows(
    stage: StageEstimate, estimates: Mapping[int, MemoryEstimate], cluster: Cluster, rows_per_step: int
) -> StageEstimate:
    """`stage` with its `max_rows`, at most `rows_per_step`.

    `estimates`: by rows of a micro-batch, the stage's own first. Two of them give the memory of one more row.
    """
    if cluster.device_memory is None:
        return stage
    available = cluster.device_memory - UNTRACKED_GPU_BYTES
    needed = {rows: replace(stage, estimate=estimate).step_bytes for rows, estimate in estimates.items()}
    (rows, size), *others = needed.items()
    if stage.task_end_bytes > available:  # which no smaller micro-batch changes
        return replace(stage, max_rows=0)
    if not others:
        return replace(stage, max_rows=rows if size <= available else 0)
    other_rows, other_size = others[0]
    bytes_per_row = max(1.0, (size - other_size) / (rows - other_rows))
    return replace(stage, max_rows=max(0, min(rows_per_step, rows + int((available - size) // bytes_per_row))))


def _describe_setup(setup: RunSetup, cluster: Cluster, estimate: MemoryEstimate) -> list[str]:
    recipe, sampler = setup.recipe, setup.training_data(0).sampler
    count = _micro_batches_per_step(setup)
    batch = largest_micro_batches(setup)[0].input_ids
    return [
        f"{recipe.method.name}, {recipe.train.precision}: {format_count(estimate.num_parameters)} parameters, of which "
        f"{format_count(estimate.num_trainable)} train",
        f"{cluster.world_size} ranks ({cluster.nodes} x {cluster.gpus_per_node}); a step of "
        f"{recipe.train.global_batch} samples is {count} micro-batch{'es' if count != 1 else ''} of up to "
        f"{recipe.train.micro_batch} rows on each; the largest has {batch.numel():,} tokens; {sampler.num_steps:,} "
        "steps of the first task",
    ]


def _format_table(stages: Sequence[StageEstimate], recipe_stage_name: str) -> list[str]:
    """The memory of a rank, a row for each stage."""
    unit, size = ("GiB", GIB) if max(stage.estimate.peak for stage in stages) > 4 * GIB else ("MiB", GIB >> 10)
    head = [
        f"{unit} a rank",
        "weights",
        "optimizer",
        "method",
        "gradients",
        "activations",
        "peak",
        "micro-batch that fits",
    ]
    rows = [head]
    for stage in stages:
        memory = stage.estimate
        parts = [
            memory.weights, memory.optimizer, memory.method_state, memory.gradients, memory.activations, memory.peak,
        ]  # fmt: skip
        fits = "" if stage.max_rows is None else f"up to {stage.max_rows}" if stage.max_rows else "none"
        if stage.offloaded_bytes:
            fits += f" ({stage.offloaded_bytes / size:.1f} {unit} of the peak in the host's memory)"
        name = f"{stage.name} (recipe's)" if stage.name == recipe_stage_name else stage.name
        rows.append([name, *(f"{part / size:.1f}" for part in parts), fits])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ring_bytes(bytes_put: Mapping[str, float], world_size: int) -> float:
    """Bytes that a rank sends in ring collectives, from the bytes it puts into each kind of collective."""
    share = (world_size - 1) / world_size
    factors = {"all_reduce": 2 * share, "all_gather": world_size - 1.0, "reduce_scatter": share, "all_to_all": share}
    return sum(factors.get(kind, 1.0) * size for kind, size in bytes_put.items())


def estimate_step(setup: RunSetup, cluster: Cluster, estimate: MemoryEstimate) -> StepCost:
    """The cost of the first task's average step (over at most 200 steps)."""
    sampler, bytes_sent = setup.training_data(0).sampler, ring_bytes(estimate.bytes_sent, cluster.world_size)
    steps = [sampler.step_plan(number) for number in range(min(sampler.steps_per_epoch, 200))]
    tokens = sum(step.num_tokens for step in steps) / len(steps)
    seconds = bytes_sent / cluster.bandwidth if cluster.bandwidth else None if cluster.world_size > 1 else 0.0
    if estimate.flop_count is None:
        return StepCost(bytes_sent, tokens, None, None, seconds)
    count = estimate.flop_count
    total = sum(
        count.total_flops(step.num_tokens, step.attention_pairs, step.num_targets)
        + count.recompute_flops(step.num_tokens, step.attention_pairs)
        for step in steps
    )
    flops = total / len(steps) / cluster.world_size
    compute_seconds = None if cluster.peak_flops is None else flops / (cluster.peak_flops * cluster.efficiency)
    return StepCost(bytes_sent, tokens, flops, compute_seconds, seconds)


def _describe_times(setup: RunSetup, cluster: Cluster, estimate: MemoryEstimate) -> list[str]:
    step = estimate_step(setup, cluster, estimate)
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in estimate.bytes_sent.items() if size)
    lines = [f"exchange: a rank sends {step.bytes_sent / 1e9:.3g} GB a step (it puts in {kinds or 'nothing'})"]
    if step.flops is None:
        return [*lines, "time: unknown, for the model is not built like a LLaMA"]
    line = f"time: {step.tokens:,.0f} tokens a step; a rank computes {step.flops / 1e12:.3g} TFLOP"
    if cluster.peak_flops is None or step.compute_seconds is None:
        return [*lines, f"{line}; give --gpu or --tflops for the seconds of it"]
    line += f", {step.compute_seconds:.3g} s at {cluster.efficiency:.0%} of {cluster.peak_flops / 1e12:.3g} TFLOP/s"
    if step.seconds is None or step.tokens_per_second is None:
        return [*lines, f"{line}; give --bandwidth for the exchange's part"]
    (least, most), (slowest, fastest) = step.seconds, step.tokens_per_second
    line += f"; exchange {step.communication_seconds:.3g} s; so {least:.3g} to {most:.3g} s a step, "
    line += f"{slowest:,.0f} to {fastest:,.0f} tokens/s in all"
    total = sum(num_steps for _, num_steps in setup.planned_steps())
    duration = f"{format_duration(total * least)} to {format_duration(total * most)}"
    return [*lines, line, f"the stream: {total:,} steps, {duration}"]


def _describe_fit(stages: Sequence[StageEstimate], cluster: Cluster) -> list[str]:
    """Which stages fit into the devices' memory, and what to change where none does."""
    if cluster.device_memory is None:
        return ["give --gpu-memory to learn what fits"]
    fitting = [stage for stage in stages if stage.max_rows]
    if not fitting:
        return [
            f"fits: nothing in {cluster.device_memory / GIB:.0f} GiB; take more ranks, "
            "model.activation_checkpointing=true, ds_configs/zero3_offload.json, or a smaller train.max_length"
        ]
    lowest, best = fitting[0], max(fitting, key=lambda stage: stage.max_rows or 0)
    verb = "is the lowest stage that does" if len(stages) > 1 else "does"
    line = f"fits: {lowest.name} {verb}, with train.micro_batch up to {lowest.max_rows}"
    if best.max_rows != lowest.max_rows:
        line += f"; {best.name} leaves room for {best.max_rows}"
    return [line]


def _describe_rest(plan: Plan) -> list[str]:
    """Disk space, what later tasks add, memory at a task's end, and the balance of matrix owners."""
    stage, keep = plan.recipe_stage, plan.setup.recipe.checkpoint.keep
    estimate = stage.estimate
    lines = [
        f"disk of run_dir: {plan.disk_bytes / GIB:.3g} GiB, {keep + 1} checkpoints of "
        f"{estimate.checkpoint / GIB:.3g} GiB (checkpoint.keep={keep}, and the one that is being written)"
    ]
    lines += [f"{name}: {size / GIB:.3g} GiB" for name, size in estimate.later_tasks.items()]
    if stage.task_end_bytes > stage.step_bytes:
        lines.append(f"when a task ends, a device holds {stage.task_end_bytes / GIB:.3g} GiB, more than in a step")
    if estimate.load_imbalance is not None:
        lines.append(f"owners: the busiest rank has {estimate.load_imbalance:.2f} of the mean work on matrices")
    return lines
