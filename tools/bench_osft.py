"""The cost of OSFT, as ratios within one run, beside its operation counts and beside PEFT's OSF; printed as Markdown.

    python tools/bench_osft.py [--section step|setup|memory|precision] [--nproc 2] [--precision bf16] [--rounds N]
    python tools/bench_osft.py --plan 7b --ranks 64

step       a training step, over a step of `sequential` full fine-tuning. Both train the same tensors
           (`other_params: free`) on the same micro-batches, and OSFT protects half of each rank. The floor beside a
           ratio is the ratio of operation counts. PEFT's OSF trains its own factors only
setup      the decompositions before the first step and after a task, over those of PEFT
memory     the memory of bases, weights and optimizer state
precision  the projection with products in TF32 or bf16, over fp32: its time, and the change that it leaves in the
           protected subspace
--nproc    the step again on several ranks of this machine, at ZeRO 1 and 3, with the cost of the exchange of shards
--plan     the owners of a large model's matrices and their costs, without building the model

All sides take turns, one step each, and medians are compared. Since other processes add noise, the column `own` has a
second ratio: 1 plus the seconds of the method's own work within the step, over the plain step. On a busier machine,
`--cpu-time --threads 1` leaves out the time of other processes. `--section` without a value runs no section.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import statistics as numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.config.deepspeed_json import read_deepspeed_json
from dscl.config.methods import OsftPreset, SequentialPreset
from dscl.config.parsing import parse_config
from dscl.data.batches import Batch, collate
from dscl.data.replay_buffer import ReplayBuffer
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.matrix_owners import assign_owners
from dscl.maths.subspace import PROJECTIONS, ProtectedSubspace, projection_flops, rank_from_ratio
from dscl.methods import osft, osft_directions
from dscl.methods.base import Method, RunInfo, TaskContext
from dscl.methods.osft import Osft
from dscl.methods.sequential import Sequential
from dscl.model.adapters.injection import LLAMA_PROJECTIONS
from dscl.model.backbone import DTYPES, Backbone, ModelConfig
from dscl.model.lm_head import answer_loss
from dscl.model.weights import RandomWeights
from dscl.utils.quiet import silence_libraries

ANSWER = 8  # answer tokens of each row, whose logits are computed
PROTECTED_RATIO = 0.5
PROJECT_EVERY = 8
LR = 1e-4
RUN_INFO = RunInfo(0, ("a", "b"), "", "", "", 0, "")
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32},
}
TARGETS = {"input, gradients too": 1.15, "two_sided": 1.15, f"two_sided, every {PROJECT_EVERY}": 1.03}
SETUP_FUNCTIONS = [
    (osft, "sample_texts"),
    (osft_directions, "right_singular_directions"),
    (osft_directions, "moment_eigenvectors"),
    (ProtectedSubspace, "add_directions"),
]
clock = time.perf_counter
StepSeconds = tuple[float, float]  # seconds of a step, and of the method's own work within it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("step", "setup", "memory", "precision")
    parser.add_argument("--section", choices=sections, nargs="*", default=list(sections))
    parser.add_argument(
        "--nproc", type=int, default=1, help="ranks of the step on several ranks (default: one rank only)"
    )
    parser.add_argument("--plan", choices=list(SHAPES), help="only print the plan for a model of this shape")
    parser.add_argument("--ranks", type=int, default=64, help="ranks of the plan")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the plan, per rank and step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process, on CPUs")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the CPU time of this process, not elapsed time"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument(
        "--json", action="store_true", help="also print the ratios with targets as JSON objects, for tools/bench.py"
    )
    options = parser.parse_args()
    if options.plan:
        print_plan(options)
        return
    set_up_process(options)
    with comm.process_group():
        print_header(options)
        if {"step", "setup", "memory"} & set(options.section):
            run_sections(options)
        if "precision" in options.section:
            print_precision(options)
    if options.nproc > 1:
        start_ranks(options)


def set_up_process(options: argparse.Namespace) -> None:
    global clock
    silence_libraries()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter


def print_header(options: argparse.Namespace) -> None:
    here = comm.device()
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = build_backbone(options).count_parameters()
    micro = options.rows * options.length
    clocked = ", CPU time" if options.cpu_time else ""
    print(f"{device}{clocked}; torch {torch.__version__}; {options.precision}; LLaMA of {size / 1e6:.1f}M parameters "
          f"(hidden {options.hidden}, {options.layers} layers, intermediate {options.intermediate}); "
          f"{options.micro * micro} tokens per step in micro-batches of {micro}; "
          f"{PROTECTED_RATIO:.0%} of each rank protected",
          flush=True)  # fmt: skip


# ---- the sides


def build_backbone(options: argparse.Namespace) -> Backbone:
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=options.intermediate, vocab_size=options.vocab,
    )  # fmt: skip
    return Backbone(ModelConfig(shape={}), config, None, RandomWeights(0, 0.02), DTYPES[options.precision])


def build_sequential() -> Sequential:
    return Sequential(parse_config(SequentialPreset, {"name": "sequential", "tune": "full"}), RUN_INFO)


def build_osft(projection: str, **settings: Any) -> Osft:
    constraint = {
        "projection": projection,
        "protect_base": ("weights",),
        "other_params": "free",
        "protected_ratio": PROTECTED_RATIO,
        "protect_task": (),
        "project_gradients": False,
        **settings,
    }
    return Osft(parse_config(OsftPreset, {"name": "osft", "constraint": constraint}), RUN_INFO)


@dataclass
class Side:
    """An engine to time, with the seconds of its method's own work."""

    engine: Engine
    method: Any = None
    own: float = 0.0  # seconds of projections within steps
    setup: float = 0.0  # seconds of the set-up
    parts: dict[str, float] = field(default_factory=dict)  # seconds of the set-up by function

    def step(self, micro_batches: Sequence[Batch], project: bool = True) -> StepSeconds:
        targets = comm.world_size() * sum(len(batch.sample_ids) for batch in micro_batches) * ANSWER
        before = self.own
        seconds, _ = time_call(
            lambda: self.engine.step(answer_loss, micro_batches, targets=targets, lr=LR, project=project)
        )
        return seconds, self.own - before


def build_side(options: argparse.Namespace, method: Method, settings: Mapping[str, Any] = {}) -> Side:
    engine = build_engine(options, method.prepare, settings, method.constraint)
    side = Side(engine, method)

    def add_to_own(hook: Callable[[Any], None]) -> Callable[[Any], None]:
        def timed_hook(stepped: Any) -> None:
            seconds, _ = time_call(lambda: hook(stepped))
            side.own += seconds

        return timed_hook

    engine.optimizer.before_step, engine.optimizer.after_step = map(
        add_to_own, (engine.optimizer.before_step, engine.optimizer.after_step)
    )
    with time_functions([*SETUP_FUNCTIONS, (engine, "probe_activations")]) as side.parts:
        side.setup, _ = time_call(
            lambda: engine.reset_optimizer(method.begin_task(0, "a", task_context(options, engine)))
        )
    return side


def build_engine(
    options: argparse.Namespace,
    prepare: Callable[[nn.Module], nn.Module],
    settings: Mapping[str, Any] = {},
    constraint: Callable[[], Any] = lambda: None,
) -> Engine:
    backbone = build_backbone(options)
    return Engine(
        dict(settings), build=backbone.build, read=backbone.weights.read, prepare=prepare, constraint=constraint,
        precision=options.precision, micro_batch=options.rows, weight_decay=0.01,
    )  # fmt: skip


def build_peft_side(options: argparse.Namespace) -> Side:
    seconds = 0.0

    def prepare(model: nn.Module) -> nn.Module:
        nonlocal seconds
        config = OSFConfig(target_modules=list(LLAMA_PROJECTIONS), effective_rank=PROTECTED_RATIO)
        seconds, peft_model = time_call(lambda: get_peft_model(model, config))
        return peft_model

    engine = build_engine(options, prepare)
    return Side(engine, setup=seconds)


def task_context(options: argparse.Namespace, engine: Engine) -> TaskContext:
    """The context of a task whose samples are those of one step."""

    def assert_no_problem(problem: str) -> None:
        assert not problem, problem

    def task_batches(_: int) -> Iterator[Batch]:
        yield from random_batches(options, options.micro)

    return TaskContext(
        engine.device,
        engine.module,
        engine.probe_activations,
        task_batches,
        engine.shards.gather_full_weights,
        engine.apply_on_owners,
        comm.all_reduce_sum,
        lambda *_: None,
        assert_no_problem,
        lambda: ReplayBuffer("", ()),
        engine.shards.local_shards,
        lambda *_: [],
        lambda *_: None,
    )


def random_batches(options: argparse.Namespace, count: int, first_seed: int = 0) -> list[Batch]:
    batches = []
    for number in range(first_seed, first_seed + count):
        generator = torch.Generator().manual_seed(number)
        shape = (options.rows, options.length - ANSWER)
        prompts = torch.randint(5, options.vocab, shape, generator=generator).tolist()
        samples = {row: (prompt, [7] * ANSWER) for row, prompt in enumerate(prompts)}
        batches.append(collate([[row] for row in samples], samples, 0, False).to(comm.device()))
    return batches


# ---- one process


def run_sections(options: argparse.Namespace) -> None:
    sides = {
        "plain": build_side(options, build_sequential()),
        "input": build_side(options, build_osft("input")),
        "two_sided": build_side(options, build_osft("two_sided")),
        "paper": build_side(options, build_osft("paper")),
        "input, gradients too": build_side(options, build_osft("input", project_gradients=True)),
        "two_sided, gradients too": build_side(options, build_osft("two_sided", project_gradients=True)),
        "PEFT": build_peft_side(options),
    }
    if "step" in options.section:
        print_steps(options, sides)
    if "memory" in options.section:
        print_memory(options, sides)
    if "setup" in options.section:
        print_setup_times(options, sides)
    for side in sides.values():
        side.engine.close()


def print_steps(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    micro_batches, single_batch = random_batches(options, options.micro), random_batches(options, 1)
    steps = {name: partial(s.step, micro_batches) for name, s in sides.items()}
    steps["no projection"] = partial(sides["two_sided"].step, micro_batches, project=False)
    single_steps = {name: partial(sides[name].step, single_batch) for name in ("plain", "input", "two_sided", "PEFT")}
    for work in single_steps.values():
        work()
    seconds_of = time_in_turns(steps, options.rounds)
    for projection in ("input", "two_sided"):
        parts = [seconds_of[projection], *[seconds_of["no projection"]] * (PROJECT_EVERY - 1)]
        seconds_of[f"{projection}, every {PROJECT_EVERY}"] = tuple(map(numbers.mean, zip(*parts, strict=True)))
    tokens = options.rows * options.length
    print_ratios(options, f"Step of {options.micro * tokens} tokens", seconds_of, options.micro)
    print_ratios(options, f"Step of {tokens} tokens", time_in_turns(single_steps, options.rounds), 1)
    print_operation_counts(options, seconds_of)


def print_ratios(options: argparse.Namespace, title: str, seconds_of: Mapping[str, StepSeconds], micro: int) -> None:
    """Beside each ratio stands its floor: the ratio if all operations ran at the speed of the plain step's."""
    step_cost = micro * step_flops(build_backbone(options).hf_config, options.rows, options.length, ANSWER)
    plain = seconds_of["plain"][0]
    rows = []
    for name, (seconds, own) in seconds_of.items():
        floor = 1 + method_flops(options, name) / step_cost
        projected = name.split(",")[0] in PROJECTIONS
        rows.append([
            name, f"{seconds:.3f}", f"{seconds / plain:.3f}", f"{1 + own / plain:.3f}" if projected else "",
            f"{floor:.3f}" if projected else "", f"{seconds / plain - floor:+.3f}" if projected else "",
            f"{1 + own / plain - floor:+.3f}" if projected else "",
            f"≤ {TARGETS[name]}" if name in TARGETS and micro * options.rows * options.length == 4096 else "",
        ])  # fmt: skip
        if name in TARGETS and micro == options.micro:
            row_name = f"OSFT, {name}: {title.lower()} over one of full fine-tuning"
            print_row(options, row_name, f"{seconds / plain:.3f}", rows[-1][-1], f"floor {floor:.3f}")
    print_table([title, "seconds", "over plain", "own", "floor", "gap", "own gap", "target"], rows)


def print_operation_counts(options: argparse.Namespace, seconds_of: Mapping[str, StepSeconds]) -> None:
    """The operations and bytes that a step needs at least, and the speed that was reached."""
    backbone = build_backbone(options)
    step_cost = options.micro * step_flops(backbone.hf_config, options.rows, options.length, ANSWER)
    shapes = target_shapes(backbone.hf_config).values()
    rows = [["plain", f"{step_cost / 1e9:.0f}", f"{step_cost / seconds_of['plain'][0] / 1e9:.0f}",
             f"{28 * backbone.count_parameters() / 1e9:.2f}", "1"]]  # fmt: skip
    for projection in PROJECTIONS:
        flops, (_, own_seconds) = method_flops(options, projection), seconds_of[projection]
        moved = sum(projection_bytes(projection, m, n, rank_from_ratio(PROTECTED_RATIO, m, n)) for m, n in shapes)
        rows.append([f"{projection}: projections", f"{flops / 1e9:.0f}", f"{flops / own_seconds / 1e9:.0f}",
                     f"{moved / 1e9:.2f}", f"{moved / 28 / backbone.count_parameters():.2f}"])  # fmt: skip
    print_table(["In a step", "GFLOP", "GFLOP/s reached", "GB moved at least (plain: AdamW's)", "over AdamW's"], rows)


def print_setup_times(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    peft_seconds = sides["PEFT"].setup

    def row(name: str, seconds: float, parts: Mapping[str, float]) -> list[str]:
        shares = ", ".join(f"{function} {part:.2f}" for function, part in parts.items() if part >= 0.005)
        return [name, f"{seconds:.2f}", f"{peft_seconds / seconds:.1f}", shares]

    def rows() -> Iterator[list[str]]:
        yield row("PEFT: get_peft_model", peft_seconds, {})
        for projection in PROJECTIONS:
            osft_seconds = sides[projection].setup
            row_name = f"OSFT, {projection}: set-up of PEFT's OSF over OSFT's"
            print_row(options, row_name, f"{peft_seconds / osft_seconds:.1f}", "≥ 10", f"{osft_seconds:.1f} s")
            yield row(f"{projection}, protect_base: weights", osft_seconds, sides[projection].parts)
        activation_side = build_side(
            options, build_osft("input", protect_base=("activations",), protect_task=("activations", "sensitivity"))
        )
        yield row("input, protect_base: activations", activation_side.setup, activation_side.parts)
        with time_functions([*SETUP_FUNCTIONS, (activation_side.engine, "probe_activations")]) as parts:
            context = task_context(options, activation_side.engine)
            seconds, _ = time_call(lambda: activation_side.method.end_task(0, "a", context))
        yield row(
            f"end of a task of {options.micro * options.rows} samples, protect_task: activations and sensitivity",
            seconds,
            parts,
        )
        activation_side.engine.close()

    print_table(["Set-up", "seconds", "PEFT's over it (target: ≥ 10 for weights)", "of which"], rows())


def print_memory(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    shapes = target_shapes(build_backbone(options).hf_config)
    rows = []
    plain_total = 0
    for name in ("plain", *PROJECTIONS, "PEFT"):
        side = sides[name]
        basis_tensors = side.method.matrix_state_dict() if isinstance(side.method, Osft) else {}
        bases = sum(map(tensor_bytes, basis_tensors.values()))
        weights = sum(map(tensor_bytes, [*side.engine.module.parameters(), *side.engine.module.buffers()]))
        state = sum(tensor_bytes(f.gradient if f.optimizer_tensor.grad is not None else f.master)
                    + tensor_bytes(f.master) * (f.master.dtype != side.engine.dtype)
                    + sum(map(tensor_bytes, f.moments.values()))
                    for f in side.engine.shards.local_shards())  # fmt: skip
        total = weights + state + bases
        plain_total = plain_total or total
        owners = []
        if name in PROJECTIONS:
            for ranks in (2, 4, 8):
                assignment = assign_owners({k: float(projection_flops(name, m, n, *[rank_from_ratio(0.5, m, n)] * 2))
                                            for k, (m, n) in shapes.items()}, ranks)  # fmt: skip
                owners.append(max(owned_bytes(name, shapes, assignment, ranks)))
        rows.append([name, *(mib(value) for value in (weights, state, bases)), *(map(mib, owners or [0, 0, 0])),
                     f"{total / plain_total:.2f}"])  # fmt: skip
    print_table(["Memory, MiB", "weights and buffers", "gradients, masters, moments", "bases on 1 rank",
                 "of 2, at most", "of 4", "of 8", "all on 1 rank over plain"], rows)  # fmt: skip


# ---- several ranks


def start_ranks(options: argparse.Namespace) -> None:
    """Start the ranks as processes of this machine, and wait for them. The main rank prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=run_rank, args=(options, number, port)) for number in range(options.nproc)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert not any(process.exitcode for process in started), "a rank failed"


def run_rank(options: argparse.Namespace, number: int, port: int) -> None:
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": options.nproc, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
    set_up_process(options)
    with comm.process_group():
        for stage in (1, 3):
            print_sharded_steps(options, stage)


def print_sharded_steps(options: argparse.Namespace, stage: int) -> None:
    """Time the step on all ranks, and count the bytes of the exchange of shards and of each rank's bases."""
    folder = Path(__file__).resolve().parent.parent / "ds_configs"
    settings = read_deepspeed_json(folder / f"zero{stage}.json")
    sides = {"plain": build_side(options, build_sequential(), settings)}
    sides |= {
        projection: build_side(options, build_osft(projection), settings) for projection in ("input", "two_sided")
    }
    num_batches = max(1, options.micro // comm.world_size())
    micro_batches = random_batches(options, num_batches, first_seed=comm.rank() * num_batches)
    bytes_sent: dict[str, list[int]] = {name: [] for name in sides}
    exchange_seconds: dict[str, list[float]] = {name: [] for name in sides}
    current_side = ""
    all_to_all = comm.all_to_all

    def counting_all_to_all(inputs: Sequence[torch.Tensor], output_sizes: Sequence[int]) -> list[torch.Tensor]:
        seconds, received = time_call(lambda: all_to_all(inputs, output_sizes))
        bytes_sent[current_side][-1] += sum(
            tensor_bytes(part) for rank, part in enumerate(inputs) if rank != comm.rank()
        )
        exchange_seconds[current_side][-1] += seconds
        return received

    def timed_step(name: str) -> Callable[[], StepSeconds]:
        def step() -> StepSeconds:
            nonlocal current_side
            current_side = name
            bytes_sent[name].append(0)
            exchange_seconds[name].append(0.0)
            comm.barrier()
            return sides[name].step(micro_batches)

        return step

    comm.all_to_all = counting_all_to_all
    try:
        for name in sides:
            timed_step(name)()
        seconds_of = time_in_turns({name: timed_step(name) for name in sides}, options.rounds)
    finally:
        comm.all_to_all = all_to_all
    basis_bytes_of = {name: sum(map(tensor_bytes, s.method.matrix_state_dict().values()))
                      for name, s in sides.items() if s.method is not None}  # fmt: skip
    gathered = comm.all_gather_objects((basis_bytes_of, {name: values[-1] for name, values in bytes_sent.items()}))
    step_cost = num_batches * step_flops(build_backbone(options).hf_config, options.rows, options.length, ANSWER)
    if comm.is_main():
        plain = seconds_of["plain"][0]
        rows = []
        for name, (seconds, own) in seconds_of.items():
            floor = 1 + method_flops(options, name) / comm.world_size() / step_cost
            rows.append([
                name, f"{seconds:.3f}", f"{seconds / plain:.3f}", f"{1 + own / plain:.3f}", f"{floor:.3f}",
                f"{seconds / plain - floor:+.3f}", f"{numbers.median(exchange_seconds[name]) / plain:.3f}",
                ", ".join(mib(there[1][name]) for there in gathered), ", ".join(mib(of[0][name]) for of in gathered),
            ])  # fmt: skip
        title = f"ZeRO {stage}, {comm.world_size()} ranks, {num_batches * comm.world_size()} micro-batches"
        print_table([title, "seconds", "over plain", "own", "floor", "gap", "exchange over plain", "MiB sent, by rank",
               "MiB of bases, by rank"], rows)  # fmt: skip
    for side in sides.values():
        side.engine.close()


# ---- products in lower precision


@torch.no_grad()
def print_precision(options: argparse.Namespace) -> None:
    """Time the projection of one layer's matrices with `W V - A` and its product with `Vᵀ` in several precisions."""
    precisions = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
    if comm.device().type == "cuda":
        precisions += [("fp32", "tf32"), ("tf32", "tf32")]
    h, i = options.hidden, options.intermediate
    cases = [projection_case(m, n, number) for number, (m, n) in enumerate([(h, h)] * 4 + [(i, h)] * 2 + [(h, i)])]
    rows = []

    def exact() -> None:
        for space, _, stepped in cases:
            space.project_weight_(stepped.clone())

    def in_precision(first: str, second: str) -> Callable[[], None]:
        def run() -> None:
            for space, _, stepped in cases:
                project_in_precision(space, stepped.clone(), first, second)

        return run

    works = {pair: in_precision(*pair) for pair in precisions}
    works["", ""] = exact
    for work in works.values():
        work()
    seconds_of = time_in_turns({pair: partial(time_only, work) for pair, work in works.items()}, options.rounds)
    for pair in precisions:
        norms = [""] * 4
        for column, num_projections in enumerate((0, 1, 2, 3)):  # the third projection is exact
            worst = 0.0
            for space, weight, stepped in cases:
                changed = stepped.clone()
                for number in range(num_projections):
                    project_in_precision(space, changed, *(pair if number < 2 else ("fp32", "fp32")))
                worst = max(worst, space.protected_norm(changed - weight) / float(weight.double().norm()))
            norms[column] = f"{worst:.1e}"
        rows.append([*pair, f"{seconds_of[pair][0] / seconds_of['', ''][0]:.2f}", *norms])
    exact_ms = 1e3 * seconds_of["", ""][0]
    print_table([f"two_sided: D = W V - A ({exact_ms:.1f} ms per layer in fp32)", "D Vᵀ", "time over fp32",
                 "norm of a step's protected part over the weight's", "after 1 projection", "after 2",
                 "and an exact one"], rows)  # fmt: skip


def projection_case(rows: int, columns: int, seed: int) -> tuple[ProtectedSubspace, torch.Tensor, torch.Tensor]:
    """A weight, its protected subspace, and the weight after a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = rank_from_ratio(PROTECTED_RATIO, rows, columns)
    weight = (0.02 * normal(rows, columns)).float().to(comm.device())
    bases = [torch.linalg.qr(normal(width, k))[0].to(comm.device()) for width in (columns, rows)]
    space = ProtectedSubspace.empty("two_sided", weight)
    space.add_directions(weight, *bases)
    return space, weight, weight + LR * normal(rows, columns).sign().to(weight)


def project_in_precision(space: ProtectedSubspace, weight: torch.Tensor, first: str, second: str) -> None:
    """`ProtectedSubspace.project_weight_` for `two_sided`, with the products in these precisions."""
    weight.sub_(
        matmul_in_precision(matmul_in_precision(weight, space.right, first) - space.image, space.right.T, second)
    )
    weight.sub_(
        matmul_in_precision(space.left, matmul_in_precision(space.left.T, weight, first) - space.coimage, second)
    )


def matmul_in_precision(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    if precision == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    result = a @ b
    torch.set_float32_matmul_precision("highest")
    return result


# ---- plan of a large model


def print_plan(options: argparse.Namespace) -> None:
    config = LlamaConfig(**SHAPES[options.plan])
    shapes, ranks = target_shapes(config), options.ranks
    step_cost = step_flops(config, options.tokens // options.length, options.length, ANSWER)
    print(f"LLaMA {options.plan}: {len(shapes)} matrices of {sum(map(math.prod, shapes.values())) / 1e9:.2f}G weights "
          f"over {ranks} ranks; {options.tokens} tokens per rank and step, in rows of {options.length}; "
          f"{PROTECTED_RATIO:.0%} of each rank protected; projected after every step")  # fmt: skip
    rows = []
    for projection in PROJECTIONS:
        method = build_osft(projection)
        with torch.device("meta"):
            method.prepare(LlamaForCausalLM(config))
        costs = method.matrix_costs()
        owners = assign_owners(costs, ranks)
        loads, basis_bytes_by_rank = [0.0] * ranks, owned_bytes(projection, shapes, owners, ranks)
        owned, matrices = [0] * ranks, [0] * ranks
        for name, owner in owners.items():
            loads[owner] += costs[name]
            owned[owner] += 4 * math.prod(shapes[name])
            matrices[owner] += 1
        # To the owners: a rank's shards of the other ranks' matrices. Back: its own matrices without its own shards.
        sent = [(sum(owned) - bytes_owned) / ranks + bytes_owned * (1 - 1 / ranks) for bytes_owned in owned]
        mean = sum(loads) / ranks
        rows.append([
            projection, f"{min(matrices)}-{max(matrices)}", f"{min(loads) / 1e12:.2f} / {mean / 1e12:.2f} / "
            f"{max(loads) / 1e12:.2f}", f"{max(loads) / mean:.3f}",
            f"{min(basis_bytes_by_rank) / 2**30:.2f}-{max(basis_bytes_by_rank) / 2**30:.2f}",
            f"{sum(sent) / ranks / 1e9:.2f}, {max(sent) / 1e9:.2f}", f"{sum(loads) / step_cost:.1%}",
            f"{max(loads) / step_cost:.1%}",
        ])  # fmt: skip
    print_table([f"{ranks} ranks", "matrices per rank", "TFLOP per rank: least / mean / most", "most over mean",
                 "GiB of bases per rank", "GB sent per rank and step: mean, most",
                 "share of forward and backward if each rank projected all", "with owners"], rows)  # fmt: skip
    weights = sum(p.numel() for p in meta_model(config).parameters())
    print(f"For comparison: ZeRO 3 moves {6 * weights / 1e9:.0f} GB to each rank per micro-batch (bf16: the weights "
          "twice, the gradients once).")  # fmt: skip


def meta_model(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def target_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shapes of the constrained weights."""
    return {name: (int(p.shape[0]), int(p.shape[1])) for name, p in meta_model(config).named_parameters()
            if name.endswith(tuple(f"{layer}.weight" for layer in LLAMA_PROJECTIONS))}  # fmt: skip


def step_flops(config: LlamaConfig, rows: int, length: int, num_logits: int) -> int:
    """The operations of a forward and backward pass: 6 per token and weight of the layers, attention without a causal
    mask, and the LM head for `num_logits` tokens per row."""
    layers = sum(m * n for m, n in target_shapes(config).values())
    attention = 12 * config.num_hidden_layers * config.hidden_size * length**2
    lm_head = 6 * config.hidden_size * config.vocab_size * num_logits
    return rows * (6 * layers * length + attention + lm_head)


def method_flops(options: argparse.Namespace, name: str) -> float:
    """The operations of the projections within a step of a side."""
    projection, *suffixes = name.split(", ")
    if projection not in PROJECTIONS:
        return 0.0
    shapes = target_shapes(build_backbone(options).hf_config).values()
    flops = sum(projection_flops(projection, m, n, *[rank_from_ratio(PROTECTED_RATIO, m, n)] * 2) for m, n in shapes)
    return flops * (
        2.0 if "gradients too" in suffixes else 1 / PROJECT_EVERY if f"every {PROJECT_EVERY}" in suffixes else 1.0
    )


def projection_bytes(projection: str, rows: int, columns: int, k: int) -> int:
    """The bytes that a projection moves at least, in fp32: each product reads its factors and writes its result."""
    weight, narrow, wide = rows * columns, k * min(rows, columns), k * max(rows, columns)
    return (
        4
        * {
            "input": 3 * weight + 2 * columns * k + 3 * rows * k,
            "two_sided": 6 * weight + 5 * (narrow + wide),
            "paper": 3 * weight + 2 * wide + 6 * narrow + 3 * k * k,
        }[projection]
    )


def owned_bytes(
    projection: str, shapes: Mapping[str, tuple[int, int]], owners: Mapping[str, int], ranks: int
) -> list[int]:
    """The bytes of bases on each rank, for the matrices that it owns."""
    owned = [0] * ranks
    for name, (m, n) in shapes.items():
        owned[owners[name]] += basis_bytes(projection, m, n, rank_from_ratio(PROTECTED_RATIO, m, n))
    return owned


def basis_bytes(projection: str, rows: int, columns: int, k: int) -> int:
    """`input` stores V and W V; `two_sided` also U and Uᵀ W; `paper` stores V, U and Uᵀ W V."""
    two_matrices = (rows + columns) * k
    return 4 * {"input": two_matrices, "two_sided": 2 * two_matrices, "paper": two_matrices + k * k}[projection]


# ---- timing and tables


def time_in_turns(works: Mapping[Any, Callable[[], StepSeconds]], rounds: int) -> dict[Any, StepSeconds]:
    """The medians of each call. The calls take turns, so that other load on the machine affects all alike."""
    times: dict[Any, list[StepSeconds]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work())
    return {name: tuple(map(numbers.median, zip(*values, strict=True))) for name, values in times.items()}


def time_only(work: Callable[[], Any]) -> StepSeconds:
    return time_call(work)[0], 0.0


def time_call(work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize()
    start = clock()
    result = work()
    synchronize()
    return clock() - start, result


@contextmanager
def time_functions(functions: Sequence[tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """The seconds within these functions (owner, name), by name."""
    seconds_in = {name: 0.0 for _, name in functions}
    originals = [(owner, name, getattr(owner, name)) for owner, name in functions]

    def timed_function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seconds, result = time_call(lambda: original(*arguments))
            seconds_in[name] += seconds
            return result

        return call

    for owner, name, original in originals:
        setattr(owner, name, timed_function(name, original))
    try:
        yield seconds_in
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def synchronize() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def print_row(options: argparse.Namespace, name: str, value: str, target: str, note: str = "") -> None:
    """With --json: print a row of tools/bench.py's table."""
    if options.json:
        print(json.dumps({"name": name, "value": value, "target": target, "note": note}), flush=True)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is known."""
    print()
    for line in chain([head, ["---"] * len(head)], rows):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
