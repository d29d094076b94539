"""What the sub-expert layer costs, as ratios within one run, beside its arithmetic and its rivals; printed as Markdown.

    python tools/bench_experts.py [--section step|grid|answer] [--width 512 2048] [--tokens 512 2048] [--rounds N]
    python tools/bench_experts.py --section grid --columns 64 512 2048 --ranks 8 64 --device cuda

step    forward and backward of a projection with sub-experts beside it, over the bare frozen projection (forward, and
        the gradient of its input), a plain LoRA of the same total rank, a loop over experts, and grouped matmul; on a
        GPU also the layer without its kernel
grid    the layer's two ways over the number of columns and the rank: all columns at once, and tokens sorted by expert;
        from which size on is sorting worth it, and does the layer choose so?
answer  a batch whose rows are of eight tasks over one whose rows are of one task, with rank-1 and element masks

All sides take turns; medians are compared. Before anything is timed, the loop and grouped matmul must give what the
layer gives, and its gradients. The floor beside a ratio is what it would be if every operation of the products took as
long as those of the bare projection. On a GPU all of it runs in bf16. Where a machine is busy, `--cpu-time --threads 1`
leaves out what others take.
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

SHARE, SCALE = 0.5, 2.0
TASKS, ROWS = 8, 16
BARE, LORA, LAYER, ELEMENTS, LOOP, GROUPED = "bare", "LoRA", "layer", "layer, element masks", "loop", "grouped matmul"
STEPWISE = "layer without its kernel"
AT_ONCE, SORTED = "at once", "sorted"  # the ways of the layer
BESIDE_LORA, BESIDE_BARE, WIDE = 1.3, 1.15, 2048
SHORTEST = 0.005  # seconds: what is faster is timed several times in a row
clock = time.perf_counter
Work = Callable[[], Any]
MatMul = tuple[int, int, int, bool]  # rows, inner, columns, and whether it is added to what is there


def main(arguments: Sequence[str] | None = None) -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"step": steps, "grid": grid, "answer": answers}
    parser.add_argument("--section", choices=list(sections), nargs="*", default=list(sections))
    parser.add_argument("--width", type=int, nargs="*", default=[512, 2048], help="of the projection, in and out")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048], help="the first is also the grid's")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of an expert")
    parser.add_argument("--top", type=int, default=2, help="experts of a token")
    parser.add_argument("--columns", type=int, nargs="*", default=[64, 256, 512, 1024, 2048], help="experts x rank")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32, 128], help="of an expert, in the grid")
    parser.add_argument("--device", default=str(comm.device()))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on CPUs")
    parser.add_argument("--cpu-time", action="store_true", help="count what this process computes, not what it waits")
    parser.add_argument("--rounds", type=int, default=11, help="how often each side is timed")
    parser.add_argument("--json", action="store_true", help="also the bars as objects, for tools/bench.py")
    options = parser.parse_args(arguments)
    on_gpu = torch.device(options.device).type == "cuda"
    assert not (on_gpu and options.cpu_time), "a GPU's work is not the process's time"
    options.dtype = DTYPES[options.precision or ("bf16" if on_gpu else "fp32")]
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name(options.device) if on_gpu else f"CPU, {options.threads} threads"
    print(f"{device}{', CPU time' if options.cpu_time else ''}; torch {torch.__version__}; {options.dtype}; "
          f"{options.experts} experts of rank {options.rank}, {options.top} a token", flush=True)  # fmt: skip
    for section in options.section:
        sections[section](options)


# ---- forward and backward


def steps(options: argparse.Namespace) -> None:
    arithmetic(options)
    sizes = options.experts, options.rank, options.top
    rows = []
    for width, tokens in product(options.width, options.tokens):
        works = sides(options, width, tokens, *sizes, masks=True)
        found, count = race(works, options.rounds), operations(width, tokens, *sizes)
        for name, seconds in found.items():
            ratio, floor = seconds / found[BARE], count[name] / count[BARE]
            rows.append([
                f"{width}", f"{tokens}", name, f"{1e3 * seconds:.2f}", f"{ratio:.3f}", f"{floor:.3f}",
                f"{ratio - floor:+.3f}", f"{seconds / found[LORA]:.3f}", f"{seconds / found[LAYER]:.3f}",
                bar(name, width),
            ])  # fmt: skip
        tell_bars(options, width, tokens, found, count)
    table(["Forward and backward, width", "tokens", "side", "ms", "over bare", "floor", "gap", "over LoRA",
           "over layer", "bar"], rows)  # fmt: skip


def tell_bars(
    options: argparse.Namespace, width: int, tokens: int, found: Mapping[str, float], count: Mapping[str, int]
) -> None:
    where, layer = f"sub-experts, {tokens} tokens of width {width}", found[LAYER]
    tell(options, f"{where}: over a LoRA of the same rank", f"{layer / found[LORA]:.3f}", f"≤ {BESIDE_LORA}")
    bare = f"≤ {BESIDE_BARE}" if width >= WIDE else ""
    floor = f"floor {count[LAYER] / count[BARE]:.3f}"
    tell(options, f"{where}: over the bare projection", f"{layer / found[BARE]:.3f}", bare, floor)
    for rival in (*RIVALS, STEPWISE):
        if rival in found:
            tell(options, f"{where}: {rival} over it", f"{found[rival] / layer:.3f}", "> 1")


def bar(name: str, width: int) -> str:
    if name == LAYER:
        return f"≤ {BESIDE_LORA} of LoRA" + (f", ≤ {BESIDE_BARE} of bare" if width >= WIDE else "")
    return "> 1 of layer" if name in (LOOP, GROUPED, STEPWISE) else ""


def grid(options: argparse.Namespace) -> None:
    """Sorting's floor falls with the share of the experts that a token uses, but it copies each token's row once for
    each of them, there and back."""

    def rows() -> Iterator[list[str]]:
        for width, columns, rank in product(options.width, options.columns, options.ranks):
            experts = columns // rank
            if columns % rank or experts <= options.top:
                continue
            sizes = experts, rank, options.top
            works = sides(options, width, options.tokens[0], *sizes)
            both = {name: works.pop(name) for name in (LAYER, GROUPED) if name in works}
            works |= {way: partial(forced, way == SORTED, both[LAYER]) for way in (AT_ONCE, SORTED)}
            if GROUPED not in both:
                del works[SORTED]
            found, count = race(works, options.rounds), operations(width, options.tokens[0], *sizes)
            kind = torch.device(options.device), options.dtype
            yield [
                f"{width}", f"{columns}", f"{experts}", f"{rank}", f"{found[AT_ONCE] / found[BARE]:.3f}",
                f"{count[LAYER] / count[BARE]:.3f}",
                f"{found[SORTED] / found[BARE]:.3f}" if SORTED in found else "-",
                f"{count[GROUPED] / count[BARE]:.3f}", f"{found[LORA] / found[BARE]:.3f}",
                f"{found[LOOP] / found[BARE]:.3f}", min((AT_ONCE, SORTED), key=lambda way: found.get(way, math.inf)),
                SORTED if grouped_maths.grouped_is_faster(*kind, *sizes) else AT_ONCE,
            ]  # fmt: skip

    table([f"{options.tokens[0]} tokens, width", "columns", "experts", "rank", "at once over bare", "floor",
           "sorted over bare", "floor", "LoRA over bare", "loop over bare", "faster", "taken"], rows())  # fmt: skip


def forced(sort: bool, work: Work) -> Any:
    with mock.patch.object(grouped_maths, "grouped_is_faster", return_value=sort):
        return work()


def sides(
    options: argparse.Namespace, width: int, tokens: int, experts: int, rank: int, top: int, masks: bool = False
) -> dict[str, Work]:
    """What each computes: the output, and the gradients of its input and of what it trains."""
    layer = layer_of(options, width, experts, rank, top)
    x = drawn(options, tokens, width).requires_grad_()
    out = drawn(options, tokens, width)
    lora = [nn.Parameter(each.detach().clone()) for each in (layer.sub_a, layer.sub_b)]
    own = [getattr(layer, name) for name in layer.trainable_names]
    works: dict[str, Work] = {
        BARE: partial(passed, partial(functional.linear, weight=layer.weight), x, out, []),
        LORA: partial(passed, lambda x: plain_lora(x, layer.weight, *lora), x, out, lora),
        LAYER: partial(passed, layer.forward, x, out, own),
    }
    if masks:
        other = layer_of(options, width, experts, rank, top, rank1=False)
        works[ELEMENTS] = partial(
            passed, other.forward, x, out, [getattr(other, name) for name in other.trainable_names]
        )
        if gates_maths.kernel_fits(drawn(options, 1, experts * (rank + 1)), experts, rank):
            works[STEPWISE] = partial(without_kernel, works[LAYER])
    for name, rival in RIVALS.items():
        if name == GROUPED and rank * x.element_size() % 16:
            continue  # it asks for rows of whole 16 bytes
        works[name] = partial(passed, partial(rival, layer), x, out, own)
        agree(name, works[name](), works[LAYER](), ["output", "x", *layer.trainable_names])
    return works


def without_kernel(work: Work) -> Any:
    fits, gates_maths.kernel_fits = gates_maths.kernel_fits, no_kernel  # a mock would take as long as what is timed
    try:
        return work()
    finally:
        gates_maths.kernel_fits = fits


def no_kernel(projected: torch.Tensor, num_experts: int, rank: int) -> bool:
    return False


def passed(
    forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, out: torch.Tensor, trained: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, ...]:
    y = forward(x)
    return y.detach(), *torch.autograd.grad(y, [x, *trained], out)


def layer_of(
    options: argparse.Namespace, width: int, experts: int, rank: int, top: int, rank1: bool = True, tasks: int = 1
) -> SubExpertLinear:
    """In training, with values as if it had learned for a while."""
    torch.manual_seed(0)
    like = torch.empty(0, dtype=options.dtype, device=options.device)
    plain = nn.Linear(width, width, bias=False, dtype=like.dtype, device=like.device).requires_grad_(False)
    shape = SubExpertShape(
        num_experts=experts, max_experts=experts, rank=rank, top_k=top, mask_density=SHARE, scale=SCALE, rank1=rank1
    )
    made = SubExpertLinear(plain, shape, Routing(tasks, 0), like)
    made.make_trainable()
    made.set_allowed_masks(experts, reuse=True)
    scramble(made)
    return made.train()


@torch.no_grad()
def scramble(layer: SubExpertLinear) -> None:
    for name in layer.trainable_names:
        getattr(layer, name).normal_(std=layer.in_features**-0.5)


def drawn(options: argparse.Namespace, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=options.dtype, device=options.device)


# ---- the rivals


def plain_lora(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(functional.linear(x, weight), SCALE * functional.linear(x, a), b.T)


def loop(layer: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    """Expert by expert, each on its own tokens; the host waits once, to learn how many these are."""
    rank, (a, b) = layer.shape.rank, masked_matrices(layer)
    tokens, gates, sizes = sorted_by_expert(layer, x)
    counts = sizes.tolist()
    parts = zip(x.index_select(0, tokens).split(counts), gates.split(counts), a.split(rank), b.split(rank), strict=True)
    added = [(functional.linear(mine, a) * gate) @ b for mine, gate, a, b in parts]
    return functional.linear(x, layer.weight).index_add_(0, tokens, torch.cat(added))


def grouped(layer: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    """All experts' products in one call, each on its own tokens; no host waits."""
    rank, (a, b) = layer.shape.rank, masked_matrices(layer)
    tokens, gates, sizes = sorted_by_expert(layer, x)
    multiply = partial(functional.grouped_mm, offs=sizes.cumsum(0).int())
    added = multiply(x.index_select(0, tokens), a.unflatten(0, (-1, rank)).transpose(1, 2)) * gates
    return functional.linear(x, layer.weight).index_add_(0, tokens, multiply(added, b.unflatten(0, (-1, rank))))


RIVALS = {LOOP: loop, GROUPED: grouped}


def masked_matrices(layer: SubExpertLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """A and Bᵀ of the task that learns, as in the layer; a rank-1 mask is cheapest in B."""
    scores, allowed, frozen_mask = (getattr(layer, f"{kind}_rank1") for kind in ("score", "allowed", "frozen_mask"))
    mask = trainable_top_k_mask(scores, allowed, layer.mask_counts["rank1"])
    b = merge_frozen_params(frozen_mask, layer.frozen_b, layer.sub_b) * mask
    return merge_frozen_params(frozen_mask[:, None], layer.frozen_a, layer.sub_a), b.T.contiguous()


def sorted_by_expert(layer: SubExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the [tokens · top] choices, expert by expert: their tokens, gates [.., 1], and how many each expert has."""
    shape = layer.shape
    gates, chosen = functional.linear(x, layer.token_router).float().softmax(-1).topk(shape.top_k)
    gates, chosen = (gates * (shape.num_experts * shape.scale)).to(x.dtype).flatten(), chosen.flatten()
    order = chosen.argsort()
    sizes = chosen.new_zeros(shape.max_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return order // shape.top_k, gates.index_select(0, order)[:, None], sizes


def agree(name: str, given: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], whose: Sequence[str]) -> None:
    """To rounding, but for the few tokens whose best experts' gates are alike to rounding."""
    rough = given[0].dtype == torch.bfloat16
    for what, one, other in zip(whose, given, expected, strict=True):
        far = (one - other).float().norm(dim=-1) > (5e-2 if rough else 1e-3) * other.float().norm(dim=-1).max()
        assert float(far.float().mean()) <= (2e-2 if rough else 1e-3), f"{name} and the layer differ in {what}"


# ---- answering


@torch.no_grad()
def answers(options: argparse.Namespace) -> None:
    def rows() -> Iterator[list[str]]:
        for width, rank1, tokens in product(options.width, (True, False), (1, max(1, options.tokens[0] // ROWS))):
            layer = layer_of(options, width, options.experts, options.rank, options.top, rank1, TASKS)
            for task in range(TASKS):
                scramble(layer)
                layer.freeze_task_params(task, {name: getattr(layer, name) for name in layer.trainable_names})
            layer.eval()
            x = drawn(options, ROWS, tokens, width)

            def work(slots: Sequence[int | None], layer: SubExpertLinear = layer, x: torch.Tensor = x) -> Work:
                with layer.routing.use_slots(slots, x):
                    kept = layer.routing.assignment
                assert kept is not None

                def answer() -> torch.Tensor:
                    layer.routing.assignment = kept  # what is on the device already stays there, as in generating
                    return layer(x)

                return answer

            mixed = [row % TASKS for row in range(ROWS)]
            works: dict[str, Work] = {"bare": partial(functional.linear, x, layer.weight)}
            works |= {"one": work([0] * ROWS), "mixed": work(mixed)}
            whole = works["mixed"]()
            for row, slot in enumerate(mixed):
                far = (work([slot])()[row] - whole[row]).abs().max()
                assert far <= 0.02 * whole.abs().max(), "a row is not of its task"
            found = race(works, options.rounds)
            yield [
                f"{width}", "rank-1" if rank1 else "elements", f"{ROWS} x {tokens}", f"{1e3 * found['bare']:.3f}",
                f"{found['one'] / found['bare']:.2f}", f"{found['mixed'] / found['bare']:.2f}",
                f"{found['mixed'] / found['one']:.2f}",
            ]  # fmt: skip

    table(["Answering, width", "masks of", "rows x tokens", "bare, ms", "one task over bare",
           f"{TASKS} tasks over bare", f"{TASKS} tasks over one"], rows())  # fmt: skip


# ---- arithmetic


def arithmetic(options: argparse.Namespace) -> None:
    """Operations of the products, and the bytes that they move if each reads its factors and writes its result once."""
    size = torch.empty(0, dtype=options.dtype).element_size()
    rows = []
    for width, tokens in product(options.width, options.tokens):
        found = matmul_chains(width, tokens, options.experts, options.rank, options.top)
        flops, moved = ({name: sum(map(each, one)) for name, one in found.items()} for each in (flops_of, numbers_of))
        for name in found:
            rows.append([
                f"{width}", f"{tokens}", name, f"{flops[name] / 1e9:.3f}", f"{flops[name] / flops[BARE]:.3f}",
                f"{size * moved[name] / 1e6:.1f}", f"{moved[name] / moved[BARE]:.2f}",
                f"{flops[name] / moved[name] / size:.0f}",
            ])  # fmt: skip
    table(["Products of forward and backward, width", "tokens", "side", "GFLOP", "over bare", "MB", "over bare",
           "FLOP a byte"], rows)  # fmt: skip


def matmul_chains(width: int, tokens: int, experts: int, rank: int, top: int) -> dict[str, list[MatMul]]:
    """Of projections width x width. A and the token router may read x together, so they count as one."""
    bare = [(tokens, width, width, False)] * 2

    def beside(tokens: int, into: int, out: int) -> list[MatMul]:
        return [
            (tokens, width, into, False), (tokens, out, width, True),  # forward
            (tokens, width, out, False), (out, tokens, width, False),  # backward through B
            (into, tokens, width, False), (tokens, into, width, True),  # and through A
        ]  # fmt: skip

    columns = experts * rank
    layer = bare + beside(tokens, columns + experts, columns)
    routed = bare + beside(tokens, experts, 0) + beside(tokens * top, rank, rank)
    return {BARE: bare, LORA: bare + beside(tokens, columns, columns), LAYER: layer, ELEMENTS: layer,
            STEPWISE: layer, LOOP: routed, GROUPED: routed}  # fmt: skip


def operations(width: int, tokens: int, experts: int, rank: int, top: int) -> dict[str, int]:
    return {name: sum(map(flops_of, each)) for name, each in matmul_chains(width, tokens, experts, rank, top).items()}


def flops_of(each: MatMul) -> int:
    rows, inner, columns, _ = each
    return 2 * rows * inner * columns


def numbers_of(each: MatMul) -> int:
    rows, inner, columns, added = each
    return rows * inner + inner * columns + rows * columns * (2 if added else 1) if inner and columns else 0


# ---- clocks and tables


def race(works: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """The median seconds of each; they take turns, so that what else the machine does hits them alike."""
    for work in works.values():
        work()
    repeats = {name: max(1, round(SHORTEST / max(timed(work), 1e-6))) for name, work in works.items()}
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(timed(work, repeats[name]))
    return {name: numbers.median(each) for name, each in found.items()}


def timed(work: Work, repeats: int = 1) -> float:
    wait()
    start = clock()
    for _ in range(repeats):
        work()
    wait()
    return (clock() - start) / repeats


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
