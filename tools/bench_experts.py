"""The cost of the sub-expert layer, as ratios within one run, beside its operation counts and its rivals (in Markdown).

    python tools/bench_experts.py [--section step|grid|answer] [--width 512 2048] [--tokens 512 2048] [--rounds N]
    python tools/bench_experts.py --section grid --columns 64 512 2048 --ranks 8 64 --device cuda

step    forward and backward pass of a projection with sub-experts, over the bare frozen projection (forward pass and
        input gradient), a plain LoRA of the same total rank, a loop over experts, and grouped matmul; on a GPU also
        over the layer without its kernel
grid    the two implementations of the layer by number of columns and rank: all columns at once, or tokens sorted by
        expert. The table shows from which size on sorting is faster, and which implementation the layer chooses
answer  a batch whose rows belong to eight tasks, over one whose rows belong to one task; rank-1 and element masks

All sides take turns, and medians are compared. Before the timing, the outputs and gradients of the loop and of grouped
matmul must equal those of the layer. The floor beside a ratio is the ratio of operation counts: the layer would reach
it if its products ran at the speed of the bare projection's. On a GPU everything runs in bf16. On a busy machine,
`--cpu-time --threads 1` leaves out the time of other processes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from dscl.distributed import comm
from dscl.maths import gates as gates_maths
from dscl.maths import grouped as grouped_maths
from dscl.maths.masks import trainable_top_k_mask
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape, merge_frozen_params
from dscl.model.backbone import DTYPES

MASK_DENSITY, SCALE = 0.5, 2.0
TASKS, ROWS = 8, 16
BARE, LORA, LAYER, ELEMENTS, LOOP, GROUPED = "bare", "LoRA", "layer", "layer, element masks", "loop", "grouped matmul"
NO_KERNEL = "layer without its kernel"
AT_ONCE, SORTED = "at once", "sorted"  # the implementations of the layer
TARGET_OVER_LORA, TARGET_OVER_BARE, TARGET_WIDTH = 1.3, 1.15, 2048
MIN_SECONDS = 0.005  # a faster call is timed several times in a row
clock = time.perf_counter
Work = Callable[[], Any]
MatMul = tuple[int, int, int, bool]  # rows, inner, columns; True: the product is added to its output


def main(arguments: Sequence[str] | None = None) -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"step": step, "grid": grid, "answer": answer}
    parser.add_argument("--section", choices=list(sections), nargs="*", default=list(sections))
    parser.add_argument(
        "--width", type=int, nargs="*", default=[512, 2048], help="input and output widths of the projection"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[512, 2048],
        help="tokens of a batch; the first value is also the grid's",
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="rank of an expert")
    parser.add_argument("--top", type=int, default=2, help="experts per token")
    parser.add_argument(
        "--columns",
        type=int,
        nargs="*",
        default=[64, 256, 512, 1024, 2048],
        help="values of experts x rank in the grid",
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32, 128], help="ranks of an expert in the grid")
    parser.add_argument("--device", default=str(comm.device()))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on CPUs")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the CPU time of this process, not elapsed time"
    )
    parser.add_argument("--rounds", type=int, default=11, help="timings of each side")
    parser.add_argument(
        "--json", action="store_true", help="also print the ratios with targets as JSON objects, for tools/bench.py"
    )
    options = parser.parse_args(arguments)
    on_gpu = torch.device(options.device).type == "cuda"
    assert not (on_gpu and options.cpu_time), "--cpu-time does not measure a GPU"
    options.dtype = DTYPES[options.precision or ("bf16" if on_gpu else "fp32")]
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {options.threads} threads"
    print(f"{device}{', CPU time' if options.cpu_time else ''}; torch {torch.__version__}; {options.dtype}; "
          f"{options.experts} experts of rank {options.rank}, {options.top} per token", flush=True)  # fmt: skip
    for section in options.section:
        sections[section](options)


# ---- forward and backward pass


def step(options: argparse.Namespace) -> None:
    print_operation_counts(options)
    sizes = options.experts, options.rank, options.top
    rows = []
    for width, tokens in product(options.width, options.tokens):
        works = build_sides(options, width, tokens, *sizes, masks=True)
        seconds_of, flops = time_in_turns(works, options.rounds), count_operations(width, tokens, *sizes)
        for name, seconds in seconds_of.items():
            ratio, floor = seconds / seconds_of[BARE], flops[name] / flops[BARE]
            rows.append([
                f"{width}", f"{tokens}", name, f"{1e3 * seconds:.2f}", f"{ratio:.3f}", f"{floor:.3f}",
                f"{ratio - floor:+.3f}", f"{seconds / seconds_of[LORA]:.3f}", f"{seconds / seconds_of[LAYER]:.3f}",
                target_of(name, width),
            ])  # fmt: skip
        print_target_rows(options, width, tokens, seconds_of, flops)
    print_table(["Forward and backward, width", "tokens", "side", "ms", "over bare", "floor", "gap", "over LoRA",
                 "over layer", "target"], rows)  # fmt: skip


def print_target_rows(
    options: argparse.Namespace, width: int, tokens: int, seconds_of: Mapping[str, float], flops: Mapping[str, int]
) -> None:
    where, layer = f"sub-experts, {tokens} tokens of width {width}", seconds_of[LAYER]
    print_row(
        options, f"{where}: over a LoRA of the same rank", f"{layer / seconds_of[LORA]:.3f}", f"≤ {TARGET_OVER_LORA}"
    )
    bare = f"≤ {TARGET_OVER_BARE}" if width >= TARGET_WIDTH else ""
    floor = f"floor {flops[LAYER] / flops[BARE]:.3f}"
    print_row(options, f"{where}: over the bare projection", f"{layer / seconds_of[BARE]:.3f}", bare, floor)
    for rival in (*RIVALS, NO_KERNEL):
        if rival in seconds_of:
            print_row(options, f"{where}: {rival} over the layer", f"{seconds_of[rival] / layer:.3f}", "> 1")


def target_of(name: str, width: int) -> str:
    if name == LAYER:
        return f"≤ {TARGET_OVER_LORA} of LoRA" + (f", ≤ {TARGET_OVER_BARE} of bare" if width >= TARGET_WIDTH else "")
    return "> 1 of layer" if name in (LOOP, GROUPED, NO_KERNEL) else ""


def grid(options: argparse.Namespace) -> None:
    """Sorting saves operations where a token uses few of the experts, but copies the token's row to each of them and
    back."""

    def rows() -> Iterator[list[str]]:
        for width, columns, rank in product(options.width, options.columns, options.ranks):
            experts = columns // rank
            if columns % rank or experts <= options.top:
                continue
            sizes = experts, rank, options.top
            sides = build_sides(options, width, options.tokens[0], *sizes)
            layer_sides = {name: sides.pop(name) for name in (LAYER, GROUPED) if name in sides}
            sides |= {kind: partial(run_forced, kind == SORTED, layer_sides[LAYER]) for kind in (AT_ONCE, SORTED)}
            if GROUPED not in layer_sides:
                del sides[SORTED]
            seconds_of, flops = time_in_turns(sides, options.rounds), count_operations(width, options.tokens[0], *sizes)
            place = torch.device(options.device), options.dtype
            yield [
                f"{width}", f"{columns}", f"{experts}", f"{rank}", f"{seconds_of[AT_ONCE] / seconds_of[BARE]:.3f}",
                f"{flops[LAYER] / flops[BARE]:.3f}",
                f"{seconds_of[SORTED] / seconds_of[BARE]:.3f}" if SORTED in seconds_of else "-",
                f"{flops[GROUPED] / flops[BARE]:.3f}", f"{seconds_of[LORA] / seconds_of[BARE]:.3f}",
                f"{seconds_of[LOOP] / seconds_of[BARE]:.3f}",
                min((AT_ONCE, SORTED), key=lambda kind: seconds_of.get(kind, math.inf)),
                SORTED if grouped_maths.grouped_is_faster(*place, *sizes) else AT_ONCE,
            ]  # fmt: skip

    print_table([f"{options.tokens[0]} tokens, width", "columns", "experts", "rank", "at once over bare", "floor",
                 "sorted over bare", "floor", "LoRA over bare", "loop over bare", "faster", "chosen"],
                rows())  # fmt: skip


def run_forced(sort: bool, work: Work) -> Any:
    """Call the layer with its choice of implementation overridden."""
    with mock.patch.object(grouped_maths, "grouped_is_faster", return_value=sort):
        return work()


def build_sides(
    options: argparse.Namespace, width: int, tokens: int, experts: int, rank: int, top: int, masks: bool = False
) -> dict[str, Work]:
    """The calls to time. Each returns the output and the gradients of the input and of the trainable parameters."""
    layer = build_layer(options, width, experts, rank, top)
    x = random_tensor(options, tokens, width).requires_grad_()
    output_grad = random_tensor(options, tokens, width)
    lora = [nn.Parameter(param.detach().clone()) for param in (layer.sub_a, layer.sub_b)]
    params = [getattr(layer, name) for name in layer.trainable_names]
    sides: dict[str, Work] = {
        BARE: partial(forward_backward, partial(functional.linear, weight=layer.weight), x, output_grad, []),
        LORA: partial(forward_backward, lambda x: plain_lora(x, layer.weight, *lora), x, output_grad, lora),
        LAYER: partial(forward_backward, layer.forward, x, output_grad, params),
    }
    if masks:
        element_layer = build_layer(options, width, experts, rank, top, rank1=False)
        sides[ELEMENTS] = partial(
            forward_backward,
            element_layer.forward,
            x,
            output_grad,
            [getattr(element_layer, name) for name in element_layer.trainable_names],
        )
        if gates_maths.kernel_fits(random_tensor(options, 1, experts * (rank + 1)), experts, rank):
            sides[NO_KERNEL] = partial(without_kernel, sides[LAYER])
    for name, rival in RIVALS.items():
        if name == GROUPED and rank * x.element_size() % 16:
            continue  # grouped_mm requires rows whose bytes are a multiple of 16
        sides[name] = partial(forward_backward, partial(rival, layer), x, output_grad, params)
        assert_agreement(name, sides[name](), sides[LAYER](), ["output", "x", *layer.trainable_names])
    return sides


def without_kernel(work: Work) -> Any:
    fits, gates_maths.kernel_fits = gates_maths.kernel_fits, no_kernel  # a mock would add time
    try:
        return work()
    finally:
        gates_maths.kernel_fits = fits


def no_kernel(projected: torch.Tensor, num_experts: int, rank: int) -> bool:
    return False


def forward_backward(
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    output_grad: torch.Tensor,
    params: Sequence[nn.Parameter],
) -> tuple[torch.Tensor, ...]:
    y = forward(x)
    return y.detach(), *torch.autograd.grad(y, [x, *params], output_grad)


def build_layer(
    options: argparse.Namespace, width: int, experts: int, rank: int, top: int, rank1: bool = True, tasks: int = 1
) -> SubExpertLinear:
    """A layer in training mode, whose random parameters stand for those of a trained one."""
    torch.manual_seed(0)
    like = torch.empty(0, dtype=options.dtype, device=options.device)
    plain = nn.Linear(width, width, bias=False, dtype=like.dtype, device=like.device).requires_grad_(False)
    shape = SubExpertShape(
        num_experts=experts,
        max_experts=experts,
        rank=rank,
        top_k=top,
        mask_density=MASK_DENSITY,
        scale=SCALE,
        rank1=rank1,
    )
    layer = SubExpertLinear(plain, shape, Routing(tasks, 0), like)
    layer.make_trainable()
    layer.set_allowed_masks(experts, reuse=True)
    randomize_params(layer)
    return layer.train()


@torch.no_grad()
def randomize_params(layer: SubExpertLinear) -> None:
    for name in layer.trainable_names:
        getattr(layer, name).normal_(std=layer.in_features**-0.5)


def random_tensor(options: argparse.Namespace, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=options.dtype, device=options.device)


# ---- rivals of the layer


def plain_lora(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(functional.linear(x, weight), SCALE * functional.linear(x, a), b.T)


def loop_over_experts(layer: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    """One expert after another, each on its own tokens. The host waits once for the numbers of tokens."""
    rank, (a, b) = layer.shape.rank, masked_matrices(layer)
    tokens, gates, sizes = sort_tokens_by_expert(layer, x)
    counts = sizes.tolist()
    parts = zip(x.index_select(0, tokens).split(counts), gates.split(counts), a.split(rank), b.split(rank), strict=True)
    outputs = [(functional.linear(rows, a) * gate) @ b for rows, gate, a, b in parts]
    return functional.linear(x, layer.weight).index_add_(0, tokens, torch.cat(outputs))


def grouped_matmul(layer: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    """The products of all experts in one call, each on its own tokens. The host does not wait."""
    rank, (a, b) = layer.shape.rank, masked_matrices(layer)
    tokens, gates, sizes = sort_tokens_by_expert(layer, x)
    multiply = partial(functional.grouped_mm, offs=sizes.cumsum(0).int())
    hidden = multiply(x.index_select(0, tokens), a.unflatten(0, (-1, rank)).transpose(1, 2)) * gates
    return functional.linear(x, layer.weight).index_add_(0, tokens, multiply(hidden, b.unflatten(0, (-1, rank))))


RIVALS = {LOOP: loop_over_experts, GROUPED: grouped_matmul}


def masked_matrices(layer: SubExpertLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A and Bᵀ of the current task, as in the layer. A rank-1 mask costs least when applied to B."""
    scores, allowed, frozen_mask = (getattr(layer, f"{kind}_rank1") for kind in ("score", "allowed", "frozen_mask"))
    mask = trainable_top_k_mask(scores, allowed, layer.mask_counts["rank1"])
    b = merge_frozen_params(frozen_mask, layer.frozen_b, layer.sub_b) * mask
    return merge_frozen_params(frozen_mask[:, None], layer.frozen_a, layer.sub_a), b.T.contiguous()


def sort_tokens_by_expert(layer: SubExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The [tokens · top] choices sorted by expert: their tokens, their gates [choices, 1], and the number of choices of
    each expert."""
    shape = layer.shape
    gates, chosen = functional.linear(x, layer.token_router).float().softmax(-1).topk(shape.top_k)
    gates, chosen = (gates * (shape.num_experts * shape.scale)).to(x.dtype).flatten(), chosen.flatten()
    order = chosen.argsort()
    sizes = chosen.new_zeros(shape.max_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return order // shape.top_k, gates.index_select(0, order)[:, None], sizes


def assert_agreement(
    name: str, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], names: Sequence[str]
) -> None:
    """Results agree up to rounding, except for the few tokens whose gates are equal up to rounding, where the choice of
    experts may differ."""
    bf16 = tensors[0].dtype == torch.bfloat16
    for tensor_name, tensor, other in zip(names, tensors, expected, strict=True):
        far = (tensor - other).float().norm(dim=-1) > (5e-2 if bf16 else 1e-3) * other.float().norm(dim=-1).max()
        assert float(far.float().mean()) <= (2e-2 if bf16 else 1e-3), f"{name} and the layer differ in {tensor_name}"


# ---- generation


@torch.no_grad()
def answer(options: argparse.Namespace) -> None:
    def rows() -> Iterator[list[str]]:
        for width, rank1, tokens in product(options.width, (True, False), (1, max(1, options.tokens[0] // ROWS))):
            layer = build_layer(options, width, options.experts, options.rank, options.top, rank1, TASKS)
            for task in range(TASKS):
                randomize_params(layer)
                layer.freeze_task_params(task, {name: getattr(layer, name) for name in layer.trainable_names})
            layer.eval()
            x = random_tensor(options, ROWS, tokens, width)

            def work(slots: Sequence[int | None], layer: SubExpertLinear = layer, x: torch.Tensor = x) -> Work:
                with layer.routing.use_slots(slots, x):
                    assignment = layer.routing.assignment
                assert assignment is not None

                def run() -> torch.Tensor:
                    layer.routing.assignment = assignment  # keep the tensors on the device, as generation does
                    return layer(x)

                return run

            mixed = [row % TASKS for row in range(ROWS)]
            works: dict[str, Work] = {"bare": partial(functional.linear, x, layer.weight)}
            works |= {"one": work([0] * ROWS), "mixed": work(mixed)}
            whole = works["mixed"]()
            for row, slot in enumerate(mixed):
                far = (work([slot])()[row] - whole[row]).abs().max()
                assert far <= 0.02 * whole.abs().max(), "a row has the output of another task"
            seconds_of = time_in_turns(works, options.rounds)
            yield [
                f"{width}", "rank-1" if rank1 else "elements", f"{ROWS} x {tokens}", f"{1e3 * seconds_of['bare']:.3f}",
                f"{seconds_of['one'] / seconds_of['bare']:.2f}", f"{seconds_of['mixed'] / seconds_of['bare']:.2f}",
                f"{seconds_of['mixed'] / seconds_of['one']:.2f}",
            ]  # fmt: skip

    print_table(["Generation, width", "masks", "rows x tokens", "bare, ms", "one task over bare",
           f"{TASKS} tasks over bare", f"{TASKS} tasks over one"], rows())  # fmt: skip


# ---- operation counts


def print_operation_counts(options: argparse.Namespace) -> None:
    """Print the operations of the products, and the bytes that they move if each product reads its factors and writes
    its result once."""
    size = torch.empty(0, dtype=options.dtype).element_size()
    rows = []
    for width, tokens in product(options.width, options.tokens):
        chains = matmul_chains(width, tokens, options.experts, options.rank, options.top)
        flops, moved = (
            {name: sum(map(count, one)) for name, one in chains.items()} for count in (matmul_flops, matmul_elements)
        )
        for name in chains:
            rows.append([
                f"{width}", f"{tokens}", name, f"{flops[name] / 1e9:.3f}", f"{flops[name] / flops[BARE]:.3f}",
                f"{size * moved[name] / 1e6:.1f}", f"{moved[name] / moved[BARE]:.2f}",
                f"{flops[name] / moved[name] / size:.0f}",
            ])  # fmt: skip
    print_table(["Products of forward and backward, width", "tokens", "side", "GFLOP", "over bare", "MB", "over bare",
                 "FLOP per byte"], rows)  # fmt: skip


def matmul_chains(width: int, tokens: int, experts: int, rank: int, top: int) -> dict[str, list[MatMul]]:
    """The products of each side for a projection [width, width]. A and the token router count as one product, since one
    read of x serves both."""
    bare = [(tokens, width, width, False)] * 2

    def beside(tokens: int, into: int, out: int) -> list[MatMul]:
        return [
            (tokens, width, into, False), (tokens, out, width, True),  # forward
            (tokens, width, out, False), (out, tokens, width, False),  # backward through B
            (into, tokens, width, False), (tokens, into, width, True),  # backward through A
        ]  # fmt: skip

    columns = experts * rank
    layer = bare + beside(tokens, columns + experts, columns)
    routed = bare + beside(tokens, experts, 0) + beside(tokens * top, rank, rank)
    return {BARE: bare, LORA: bare + beside(tokens, columns, columns), LAYER: layer, ELEMENTS: layer,
            NO_KERNEL: layer, LOOP: routed, GROUPED: routed}  # fmt: skip


def count_operations(width: int, tokens: int, experts: int, rank: int, top: int) -> dict[str, int]:
    return {
        name: sum(map(matmul_flops, chain)) for name, chain in matmul_chains(width, tokens, experts, rank, top).items()
    }


def matmul_flops(matmul: MatMul) -> int:
    rows, inner, columns, _ = matmul
    return 2 * rows * inner * columns


def matmul_elements(matmul: MatMul) -> int:
    rows, inner, columns, added = matmul
    return rows * inner + inner * columns + rows * columns * (2 if added else 1) if inner and columns else 0


# ---- timing and tables


def time_in_turns(works: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """The median seconds of each call. The calls take turns, so that other load on the machine affects all alike."""
    for work in works.values():
        work()
    repeats = {name: max(1, round(MIN_SECONDS / max(time_call(work), 1e-6))) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(time_call(work, repeats[name]))
    return {name: numbers.median(values) for name, values in times.items()}


def time_call(work: Work, repeats: int = 1) -> float:
    synchronize()
    start = clock()
    for _ in range(repeats):
        work()
    synchronize()
    return (clock() - start) / repeats


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
