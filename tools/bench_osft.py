"""What OSFT costs, as ratios within one run, beside its arithmetic and beside PEFT's OSF; printed as Markdown.

    python tools/bench_osft.py [--section step|setup|memory|precision] [--nproc 2] [--precision bf16] [--rounds N]
    python tools/bench_osft.py --plan 7b --ranks 64

step       a training step over one of `sequential` full fine-tuning: both train the same tensors (`rest: free`) on the
           same micro-batches, with half of each rank protected; beside it what the arithmetic alone would cost. PEFT's
           OSF trains its own factors only
setup      what has to be decomposed before the first step, and after a task, over what PEFT decomposes
memory     what is kept beside the weights
precision  the projection with products in TF32 or bf16, over fp32: its time, and what it leaves in the protected part
--nproc    the step again on so many ranks of this machine, at ZeRO 1 and 3: what the exchange of stretches adds
--plan     no model is built: who owns what of a large one, and what that costs

All sides take turns, one step each; medians are compared. As a machine that others use too is noisy, `own` is a second
figure: the seconds within the step that are the method's alone, over the plain step. Where it is busier still,
`--cpu-time --threads 1` leaves out what others take. `--section` without a word leaves the sections out.
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

ANSWER = 8  # tokens of each row that are answered, for which logits are made
SHARE = 0.5
EVERY = 8
LR = 1e-4
FACTS = RunInfo(0, ("a", "b"), "", "", "", 0, "")
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32},
}
BARS = {"input, gradients too": 1.15, "two_sided": 1.15, f"two_sided, every {EVERY}": 1.03}
PARTS = [
    (osft, "sample_texts"),
    (osft_directions, "right_singular_directions"),
    (osft_directions, "moment_eigenvectors"),
    (ProtectedSubspace, "add_directions"),
]
clock = time.perf_counter
Clocked = tuple[float, float]  # seconds of a step, and those of them that are the method's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("step", "setup", "memory", "precision")
    parser.add_argument("--section", choices=sections, nargs="*", default=list(sections))
    parser.add_argument("--nproc", type=int, default=1, help="ranks for the step over several; default: none")
    parser.add_argument("--plan", choices=list(SHAPES), help="only print a plan for a model of this shape")
    parser.add_argument("--ranks", type=int, default=64, help="of the plan")
    parser.add_argument("--tokens", type=int, default=4096, help="of the plan: per rank and step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process, on CPUs")
    parser.add_argument("--cpu-time", action="store_true", help="count what this process computes, not what it waits")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--json", action="store_true", help="also the bars as objects, for tools/bench.py")
    options = parser.parse_args()
    if options.plan:
        plan(options)
        return
    settle(options)
    with comm.process_group():
        told(options)
        if {"step", "setup", "memory"} & set(options.section):
            alone(options)
        if "precision" in options.section:
            precision(options)
    if options.nproc > 1:
        several(options)


def settle(options: argparse.Namespace) -> None:
    global clock
    silence_libraries()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter


def told(options: argparse.Namespace) -> None:
    here = comm.device()
    device = torch.cuda.get_device_name(here) if here.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = backbone(options).count_parameters()
    micro = options.rows * options.length
    clocked = ", CPU time" if options.cpu_time else ""
    print(f"{device}{clocked}; torch {torch.__version__}; {options.precision}; LLaMA of {size / 1e6:.1f}M parameters "
          f"(hidden {options.hidden}, {options.layers} layers, intermediate {options.intermediate}); "
          f"{options.micro * micro} tokens a step in micro-batches of {micro}; {SHARE:.0%} of each rank protected",
          flush=True)  # fmt: skip


# ---- the sides


def backbone(options: argparse.Namespace) -> Backbone:
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=options.intermediate, vocab_size=options.vocab,
    )  # fmt: skip
    return Backbone(ModelConfig(shape={}), config, None, RandomWeights(0, 0.02), DTYPES[options.precision])


def free() -> Sequential:
    return Sequential(parse_config(SequentialPreset, {"name": "sequential", "tune": "full"}), FACTS)


def constrained(projection: str, **settings: Any) -> Osft:
    constraint = {
        "projection": projection,
        "protect_base": ("weights",),
        "other_params": "free",
        "protected_ratio": SHARE,
        "protect_task": (),
        "project_gradients": False,
        **settings,
    }
    return Osft(parse_config(OsftPreset, {"name": "osft", "constraint": constraint}), FACTS)


@dataclass
class Side:
    """An engine that takes steps, and the seconds which its method has spent in them."""

    engine: Engine
    method: Any = None
    own: float = 0.0
    setup: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # of the set-up

    def step(self, micro_batches: Sequence[Batch], project: bool = True) -> Clocked:
        targets = comm.world_size() * sum(len(batch.sample_ids) for batch in micro_batches) * ANSWER
        before = self.own
        seconds, _ = timed(
            lambda: self.engine.step(answer_loss, micro_batches, targets=targets, lr=LR, project=project)
        )
        return seconds, self.own - before


def side(options: argparse.Namespace, method: Method, settings: Mapping[str, Any] = {}) -> Side:
    engine = engine_of(options, method.prepare, settings, method.constraint)
    made = Side(engine, method)

    def around(call: Callable[[Any], None]) -> Callable[[Any], None]:
        def clocked(stepped: Any) -> None:
            seconds, _ = timed(lambda: call(stepped))
            made.own += seconds

        return clocked

    engine.optimizer.before_step, engine.optimizer.after_step = map(
        around, (engine.optimizer.before_step, engine.optimizer.after_step)
    )
    with clocks([*PARTS, (engine, "probe_activations")]) as made.parts:
        made.setup, _ = timed(lambda: engine.reset_optimizer(method.begin_task(0, "a", ranks_of(options, engine))))
    return made


def engine_of(
    options: argparse.Namespace,
    prepare: Callable[[nn.Module], nn.Module],
    settings: Mapping[str, Any] = {},
    constraint: Callable[[], Any] = lambda: None,
) -> Engine:
    built = backbone(options)
    return Engine(
        dict(settings), build=built.build, read=built.weights.read, prepare=prepare, constraint=constraint,
        precision=options.precision, micro_batch=options.rows, weight_decay=0.01,
    )  # fmt: skip


def peft_side(options: argparse.Namespace) -> Side:
    spent = 0.0

    def prepare(model: nn.Module) -> nn.Module:
        nonlocal spent
        config = OSFConfig(target_modules=list(LLAMA_PROJECTIONS), effective_rank=SHARE)
        spent, made = timed(lambda: get_peft_model(model, config))
        return made

    engine = engine_of(options, prepare)
    return Side(engine, setup=spent)


def ranks_of(options: argparse.Namespace, engine: Engine) -> TaskContext:
    """The samples of an ended task are those of one step."""

    def refuse(problem: str) -> None:
        assert not problem, problem

    def seen(_: int) -> Iterator[Batch]:
        yield from batches(options, options.micro)

    return TaskContext(
        engine.device,
        engine.module,
        engine.probe_activations,
        seen,
        engine.shards.gather_full_weights,
        engine.apply_on_owners,
        comm.all_reduce_sum,
        lambda *_: None,
        refuse,
        lambda: ReplayBuffer("", ()),
        engine.shards.local_shards,
        lambda *_: [],
        lambda *_: None,
    )


def batches(options: argparse.Namespace, count: int, first: int = 0) -> list[Batch]:
    made = []
    for number in range(first, first + count):
        draw = torch.Generator().manual_seed(number)
        size = (options.rows, options.length - ANSWER)
        prompts = torch.randint(5, options.vocab, size, generator=draw).tolist()
        samples = {row: (prompt, [7] * ANSWER) for row, prompt in enumerate(prompts)}
        made.append(collate([[row] for row in samples], samples, 0, False).to(comm.device()))
    return made


# ---- one process


def alone(options: argparse.Namespace) -> None:
    sides = {
        "plain": side(options, free()),
        "input": side(options, constrained("input")),
        "two_sided": side(options, constrained("two_sided")),
        "paper": side(options, constrained("paper")),
        "input, gradients too": side(options, constrained("input", project_gradients=True)),
        "two_sided, gradients too": side(options, constrained("two_sided", project_gradients=True)),
        "PEFT": peft_side(options),
    }
    if "step" in options.section:
        steps(options, sides)
    if "memory" in options.section:
        memory(options, sides)
    if "setup" in options.section:
        setup(options, sides)
    for one in sides.values():
        one.engine.close()


def steps(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    many, one = batches(options, options.micro), batches(options, 1)
    works = {name: partial(s.step, many) for name, s in sides.items()}
    works["no projection"] = partial(sides["two_sided"].step, many, project=False)
    few = {name: partial(sides[name].step, one) for name in ("plain", "input", "two_sided", "PEFT")}
    for work in few.values():
        work()
    found = race(works, options.rounds)
    for reading in ("input", "two_sided"):
        parts = [found[reading], *[found["no projection"]] * (EVERY - 1)]
        found[f"{reading}, every {EVERY}"] = tuple(map(numbers.mean, zip(*parts, strict=True)))
    tokens = options.rows * options.length
    show(options, f"Step of {options.micro * tokens} tokens", found, options.micro)
    show(options, f"Step of {tokens} tokens", race(few, options.rounds), 1)
    counts(options, found)


def show(options: argparse.Namespace, title: str, found: Mapping[str, Clocked], micro: int) -> None:
    """Beside each ratio the floor: what it would be if every operation took as long as those of a plain step."""
    whole = micro * step_flops(backbone(options).hf_config, options.rows, options.length, ANSWER)
    plain = found["plain"][0]
    rows = []
    for name, (seconds, own) in found.items():
        floor = 1 + own_flops(options, name) / whole
        known = name.split(",")[0] in PROJECTIONS
        rows.append([
            name, f"{seconds:.3f}", f"{seconds / plain:.3f}", f"{1 + own / plain:.3f}" if known else "",
            f"{floor:.3f}" if known else "", f"{seconds / plain - floor:+.3f}" if known else "",
            f"{1 + own / plain - floor:+.3f}" if known else "",
            f"≤ {BARS[name]}" if name in BARS and micro * options.rows * options.length == 4096 else "",
        ])  # fmt: skip
        if name in BARS and micro == options.micro:
            what = f"OSFT, {name}: {title.lower()} over one of full fine-tuning"
            tell(options, what, f"{seconds / plain:.3f}", rows[-1][-1], f"floor {floor:.3f}")
    table([title, "seconds", "over plain", "own", "floor", "gap", "own gap", "bar"], rows)


def counts(options: argparse.Namespace, found: Mapping[str, Clocked]) -> None:
    """Operations and bytes: what has to be done at least, and how fast it was done."""
    built = backbone(options)
    whole = options.micro * step_flops(built.hf_config, options.rows, options.length, ANSWER)
    shapes = targets(built.hf_config).values()
    rows = [["plain", f"{whole / 1e9:.0f}", f"{whole / found['plain'][0] / 1e9:.0f}",
             f"{28 * built.count_parameters() / 1e9:.2f}", "1"]]  # fmt: skip
    for reading in PROJECTIONS:
        flops, (_, own) = own_flops(options, reading), found[reading]
        moved = sum(hold_bytes(reading, m, n, rank_from_ratio(SHARE, m, n)) for m, n in shapes)
        rows.append([f"{reading}: its own", f"{flops / 1e9:.0f}", f"{flops / own / 1e9:.0f}",
                     f"{moved / 1e9:.2f}", f"{moved / 28 / built.count_parameters():.2f}"])  # fmt: skip
    table(["In a step", "GFLOP", "GFLOP/s reached", "GB moved at least (plain: AdamW's)", "over AdamW's"], rows)


def setup(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    theirs = sides["PEFT"].setup

    def row(name: str, seconds: float, parts: Mapping[str, float]) -> list[str]:
        told = ", ".join(f"{what.strip('_')} {spent:.2f}" for what, spent in parts.items() if spent >= 0.005)
        return [name, f"{seconds:.2f}", f"{theirs / seconds:.1f}", told]

    def rows() -> Iterator[list[str]]:
        yield row("PEFT: get_peft_model", theirs, {})
        for reading in PROJECTIONS:
            mine = sides[reading].setup
            what = f"OSFT, {reading}: set-up of PEFT's OSF over it"
            tell(options, what, f"{theirs / mine:.1f}", "≥ 10", f"{mine:.1f} s")
            yield row(f"{reading}, protect_base: weights", mine, sides[reading].parts)
        other = side(
            options, constrained("input", protect_base=("activations",), protect_task=("activations", "sensitivity"))
        )
        yield row("input, protect_base: activations", other.setup, other.parts)
        with clocks([*PARTS, (other.engine, "probe_activations")]) as parts:
            ranks = ranks_of(options, other.engine)
            seconds, _ = timed(lambda: other.method.end_task(0, "a", ranks))
        yield row(
            f"end of a task of {options.micro * options.rows} samples, protect_task: activations and sensitivity",
            seconds,
            parts,
        )
        other.engine.close()

    table(["Set-up", "seconds", "PEFT's over it (bar: ≥ 10 for weights)", "of which"], rows())


def memory(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    shapes = targets(backbone(options).hf_config)
    rows = []
    plain = 0
    for name in ("plain", *PROJECTIONS, "PEFT"):
        one = sides[name]
        kept = one.method.matrix_state_dict() if isinstance(one.method, Osft) else {}
        bases = sum(map(size, kept.values()))
        weights = sum(map(size, [*one.engine.module.parameters(), *one.engine.module.buffers()]))
        state = sum(size(f.gradient if f.optimizer_tensor.grad is not None else f.master)
                    + size(f.master) * (f.master.dtype != one.engine.dtype)
                    + sum(map(size, f.moments.values())) for f in one.engine.shards.local_shards())  # fmt: skip
        whole = weights + state + bases
        plain = plain or whole
        owners = []
        if name in PROJECTIONS:
            for ranks in (2, 4, 8):
                given = assign_owners({k: float(projection_flops(name, m, n, *[rank_from_ratio(0.5, m, n)] * 2))
                              for k, (m, n) in shapes.items()}, ranks)  # fmt: skip
                owners.append(max(owned_bytes(name, shapes, given, ranks)))
        rows.append([name, *(mib(value) for value in (weights, state, bases)), *(map(mib, owners or [0, 0, 0])),
                     f"{whole / plain:.2f}"])  # fmt: skip
    table(["Memory, MiB", "weights and buffers", "gradients, masters, moments", "bases on 1 rank", "of 2, at most",
           "of 4", "of 8", "all on 1 rank over plain"], rows)  # fmt: skip


# ---- several ranks


def several(options: argparse.Namespace) -> None:
    """Start the ranks as processes of this machine, and wait for them; the first one prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=rank, args=(options, number, port)) for number in range(options.nproc)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert not any(process.exitcode for process in started), "a rank failed"


def rank(options: argparse.Namespace, number: int, port: int) -> None:
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": options.nproc, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
    settle(options)
    with comm.process_group():
        for stage in (1, 3):
            sharded(options, stage)


def sharded(options: argparse.Namespace, stage: int) -> None:
    """The step, the bytes that the exchange of stretches takes, and who keeps what, on all ranks together."""
    folder = Path(__file__).resolve().parent.parent / "ds_configs"
    settings = read_deepspeed_json(folder / f"zero{stage}.json")
    sides = {"plain": side(options, free(), settings)}
    sides |= {reading: side(options, constrained(reading), settings) for reading in ("input", "two_sided")}
    each = max(1, options.micro // comm.world_size())
    mine = batches(options, each, first=comm.rank() * each)
    away: dict[str, list[int]] = {name: [] for name in sides}
    waited: dict[str, list[float]] = {name: [] for name in sides}
    now = ""
    all_to_all = comm.all_to_all

    def counted(inputs: Sequence[torch.Tensor], output_sizes: Sequence[int]) -> list[torch.Tensor]:
        seconds, received = timed(lambda: all_to_all(inputs, output_sizes))
        away[now][-1] += sum(size(part) for rank, part in enumerate(inputs) if rank != comm.rank())
        waited[now][-1] += seconds
        return received

    def work(name: str) -> Callable[[], Clocked]:
        def one() -> Clocked:
            nonlocal now
            now = name
            away[name].append(0)
            waited[name].append(0.0)
            comm.barrier()
            return sides[name].step(mine)

        return one

    comm.all_to_all = counted
    try:
        for name in sides:
            work(name)()
        found = race({name: work(name) for name in sides}, options.rounds)
    finally:
        comm.all_to_all = all_to_all
    kept = {name: sum(map(size, s.method.matrix_state_dict().values()))
            for name, s in sides.items() if s.method is not None}  # fmt: skip
    gathered = comm.all_gather_objects((kept, {name: values[-1] for name, values in away.items()}))
    whole = each * step_flops(backbone(options).hf_config, options.rows, options.length, ANSWER)
    if comm.is_main():
        plain = found["plain"][0]
        rows = []
        for name, (seconds, own) in found.items():
            floor = 1 + own_flops(options, name) / comm.world_size() / whole
            rows.append([
                name, f"{seconds:.3f}", f"{seconds / plain:.3f}", f"{1 + own / plain:.3f}", f"{floor:.3f}",
                f"{seconds / plain - floor:+.3f}", f"{numbers.median(waited[name]) / plain:.3f}",
                ", ".join(mib(there[1][name]) for there in gathered), ", ".join(mib(of[0][name]) for of in gathered),
            ])  # fmt: skip
        title = f"ZeRO {stage}, {comm.world_size()} ranks, {each * comm.world_size()} micro-batches"
        table([title, "seconds", "over plain", "own", "floor", "gap", "exchange over plain", "MiB sent, by rank",
               "MiB of bases, by rank"], rows)  # fmt: skip
    for one in sides.values():
        one.engine.close()


# ---- products of lower precision


@torch.no_grad()
def precision(options: argparse.Namespace) -> None:
    """`W V - A` and its product with `Vᵀ`, each in another precision, on one layer's matrices."""
    kinds = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
    if comm.device().type == "cuda":
        kinds += [("fp32", "tf32"), ("tf32", "tf32")]
    h, i = options.hidden, options.intermediate
    cases = [case(m, n, number) for number, (m, n) in enumerate([(h, h)] * 4 + [(i, h)] * 2 + [(h, i)])]
    rows = []

    def exact() -> None:
        for space, _, moved in cases:
            space.project_weight_(moved.clone())

    def other(first: str, second: str) -> Callable[[], None]:
        def one() -> None:
            for space, _, moved in cases:
                hold_in(space, moved.clone(), first, second)

        return one

    works = {kind: other(*kind) for kind in kinds}
    works["", ""] = exact
    for work in works.values():
        work()
    found = race({kind: partial(seconds, work) for kind, work in works.items()}, options.rounds)
    for kind in kinds:
        left = [""] * 4
        for at, times in enumerate((0, 1, 2, 3)):  # the third time exactly
            worst = 0.0
            for space, weight, moved in cases:
                changed = moved.clone()
                for number in range(times):
                    hold_in(space, changed, *(kind if number < 2 else ("fp32", "fp32")))
                worst = max(worst, space.protected_norm(changed - weight) / float(weight.double().norm()))
            left[at] = f"{worst:.1e}"
        rows.append([*kind, f"{found[kind][0] / found['', ''][0]:.2f}", *left])
    table([f"two_sided: D = W V - A ({1e3 * found['', ''][0]:.1f} ms a layer by hold_)", "D Vᵀ", "time over hold_",
           "protected part of a step, over the weight", "after 1", "after 2", "and an exact one"], rows)  # fmt: skip


def case(rows: int, columns: int, seed: int) -> tuple[ProtectedSubspace, torch.Tensor, torch.Tensor]:
    """A weight, what of it is protected, and the weight after a step."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    k = rank_from_ratio(SHARE, rows, columns)
    weight = (0.02 * normal(rows, columns)).float().to(comm.device())
    bases = [torch.linalg.qr(normal(width, k))[0].to(comm.device()) for width in (columns, rows)]
    space = ProtectedSubspace.empty("two_sided", weight)
    space.add_directions(weight, *bases)
    return space, weight, weight + LR * normal(rows, columns).sign().to(weight)


def hold_in(space: ProtectedSubspace, weight: torch.Tensor, first: str, second: str) -> None:
    """`Subspace.hold_` under `two_sided`, with the products in these precisions."""
    weight.sub_(product(product(weight, space.right, first) - space.image, space.right.T, second))
    weight.sub_(product(space.left, product(space.left.T, weight, first) - space.coimage, second))


def product(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    made = a @ b
    torch.set_float32_matmul_precision("highest")
    return made


# ---- on paper


def plan(options: argparse.Namespace) -> None:
    config = LlamaConfig(**SHAPES[options.plan])
    shapes, ranks = targets(config), options.ranks
    whole = step_flops(config, options.tokens // options.length, options.length, ANSWER)
    print(f"LLaMA {options.plan}: {len(shapes)} matrices of {sum(map(math.prod, shapes.values())) / 1e9:.2f}G weights "
          f"over {ranks} ranks; {options.tokens} tokens a rank and step, in rows of {options.length}; {SHARE:.0%} "
          f"of each rank protected; projected after every step")  # fmt: skip
    rows = []
    for reading in PROJECTIONS:
        method = constrained(reading)
        with torch.device("meta"):
            method.prepare(LlamaForCausalLM(config))
        costs = method.matrix_costs()
        owners = assign_owners(costs, ranks)
        loads, kept = [0.0] * ranks, owned_bytes(reading, shapes, owners, ranks)
        owned, matrices = [0] * ranks, [0] * ranks
        for name, owner in owners.items():
            loads[owner] += costs[name]
            owned[owner] += 4 * math.prod(shapes[name])
            matrices[owner] += 1
        # There: a rank's stretches of all matrices but its own; back: its own, but for its stretches of them.
        sent = [(sum(owned) - mine) / ranks + mine * (1 - 1 / ranks) for mine in owned]
        mean = sum(loads) / ranks
        rows.append([
            reading, f"{min(matrices)}-{max(matrices)}", f"{min(loads) / 1e12:.2f} / {mean / 1e12:.2f} / "
            f"{max(loads) / 1e12:.2f}", f"{max(loads) / mean:.3f}", f"{min(kept) / 2**30:.2f}-{max(kept) / 2**30:.2f}",
            f"{sum(sent) / ranks / 1e9:.2f}, {max(sent) / 1e9:.2f}", f"{sum(loads) / whole:.1%}",
            f"{max(loads) / whole:.1%}",
        ])  # fmt: skip
    table([f"{ranks} ranks", "matrices a rank", "TFLOP a rank: least / mean / most", "most over mean",
           "GiB of bases a rank", "GB sent a rank and step: mean, most", "of forward and backward if each rank did all",
           "with owners"], rows)  # fmt: skip
    weights = sum(p.numel() for p in meta(config).parameters())
    print(f"For comparison: ZeRO 3 moves {6 * weights / 1e9:.0f} GB to each rank per micro-batch (bf16: the weights "
          "twice, the gradients once).")  # fmt: skip


def meta(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def targets(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """The shapes of the constrained weights."""
    return {name: (int(p.shape[0]), int(p.shape[1])) for name, p in meta(config).named_parameters()
            if name.endswith(tuple(f"{layer}.weight" for layer in LLAMA_PROJECTIONS))}  # fmt: skip


def step_flops(config: LlamaConfig, rows: int, length: int, kept: int) -> int:
    """Operations of forward and backward: 6 for each token and weight of the layers, attention (its whole square), and
    the head in the columns that are kept."""
    layers = sum(m * n for m, n in targets(config).values())
    attention = 12 * config.num_hidden_layers * config.hidden_size * length**2
    head = 6 * config.hidden_size * config.vocab_size * kept
    return rows * (6 * layers * length + attention + head)


def own_flops(options: argparse.Namespace, name: str) -> float:
    """Of the projections within a step of one of the sides."""
    reading, *more = name.split(", ")
    if reading not in PROJECTIONS:
        return 0.0
    shapes = targets(backbone(options).hf_config).values()
    once = sum(projection_flops(reading, m, n, *[rank_from_ratio(SHARE, m, n)] * 2) for m, n in shapes)
    return once * (2.0 if "gradients too" in more else 1 / EVERY if f"every {EVERY}" in more else 1.0)


def hold_bytes(reading: str, rows: int, columns: int, k: int) -> int:
    """What one projection has to move in fp32: each product reads its factors and writes its result, once."""
    weight, narrow, wide = rows * columns, k * min(rows, columns), k * max(rows, columns)
    return (
        4
        * {
            "input": 3 * weight + 2 * columns * k + 3 * rows * k,
            "two_sided": 6 * weight + 5 * (narrow + wide),
            "paper": 3 * weight + 2 * wide + 6 * narrow + 3 * k * k,
        }[reading]
    )


def owned_bytes(
    reading: str, shapes: Mapping[str, tuple[int, int]], owners: Mapping[str, int], ranks: int
) -> list[int]:
    """What each rank keeps of the matrices that it owns."""
    kept = [0] * ranks
    for name, (m, n) in shapes.items():
        kept[owners[name]] += basis_bytes(reading, m, n, rank_from_ratio(SHARE, m, n))
    return kept


def basis_bytes(reading: str, rows: int, columns: int, k: int) -> int:
    """V and W V; U and Uᵀ W as well; or V, U and Uᵀ W V."""
    once = (rows + columns) * k
    return 4 * {"input": once, "two_sided": 2 * once, "paper": once + k * k}[reading]


# ---- clocks and tables


def race(works: Mapping[Any, Callable[[], Clocked]], rounds: int) -> dict[Any, Clocked]:
    """The medians of each; they take turns, so that what else the machine does hits them alike."""
    found: dict[Any, list[Clocked]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(work())
    return {name: tuple(map(numbers.median, zip(*each, strict=True))) for name, each in found.items()}


def seconds(work: Callable[[], Any]) -> Clocked:
    return timed(work)[0], 0.0


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    wait()
    start = clock()
    result = work()
    wait()
    return clock() - start, result


@contextmanager
def clocks(places: Sequence[tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """The seconds spent within these functions."""
    spent = {name: 0.0 for _, name in places}
    originals = [(place, name, getattr(place, name)) for place, name in places]

    def clocked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            seconds, result = timed(lambda: original(*given))
            spent[name] += seconds
            return result

        return call

    for place, name, original in originals:
        setattr(place, name, clocked(name, original))
    try:
        yield spent
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def wait() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def tell(options: argparse.Namespace, what: str, figure: str, target: str, told: str = "") -> None:
    """A row of tools/bench.py's table, where that asks."""
    if options.json:
        print(json.dumps({"what": what, "figure": figure, "target": target, "told": told}), flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Each row as soon as it is known."""
    print()
    for line in chain([head, ["---"] * len(head)], rows):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
