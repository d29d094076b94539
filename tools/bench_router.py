"""What the analytic router costs, as ratios within one run: closed form against recursion over single prompts.

    python tools/bench_router.py [--width 10000 --rows 5000 --dim 256] [--memory 16384]

The recursion `R ← R - Rφᵀ(1 + φRφᵀ)⁻¹φR` is timed in three forms, on few prompts, and scaled to all of them:
as released   (Rφᵀ·φ)·R, a product of two E-by-E matrices for each prompt (fp32)
vector form   (Rφᵀ)·(φR), the same update associated well (fp32, like the one above; it loses digits with each prompt)
in blocks     256 prompts at a time, in fp64, which keeps the digits
The closed form is timed with a given ridge and with the ridge chosen from the statistics. `--memory E` measures the
peak memory of everything at width E instead, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dscl.maths.rls import FeatureMap, TaskStatistics, compute_statistics, fit_router

TASKS = 4
BLOCK = 256
GIB = 1 << 30


def pooled(task: int, count: int, dim: int) -> Tensor:
    """Made-up pooled states: what tasks have in common, their own part, and their prompts' own."""
    common = 2 * torch.randn(dim, generator=torch.Generator().manual_seed(999))
    draw = torch.Generator().manual_seed(task)
    return common + torch.randn(dim, generator=draw) + torch.randn(count, dim, generator=draw)


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def statistics(expansion: FeatureMap, rows: int) -> dict[str, TaskStatistics]:
    states = [pooled(task, rows // TASKS, expansion.dim) for task in range(TASKS)]
    return {f"task{t}": compute_statistics(expansion.quantize(h), expansion).compact() for t, h in enumerate(states)}


def as_released(inverse: Tensor, feature: Tensor) -> Tensor:
    gain = inverse @ feature[:, None] / (1 + feature @ inverse @ feature)
    return inverse - (gain @ feature[None]) @ inverse


def vector_form(inverse: Tensor, feature: Tensor) -> Tensor:
    gain = inverse @ feature
    return inverse.addr_(gain, gain, alpha=-1 / (1 + float(feature @ gain)))


def in_blocks(inverse: Tensor, features: Tensor) -> Tensor:
    gain = inverse @ features.T
    middle = torch.linalg.inv(torch.eye(len(features), dtype=inverse.dtype) + features @ gain)
    return inverse.addmm_(gain @ middle, gain.T, alpha=-1)


def compare(width: int, rows: int, dim: int) -> dict[str, float]:
    """Prints all sides; returns how many times as long the released recursion takes."""
    expansion = FeatureMap(dim, width, seed=0)
    expansion.compute_features(torch.zeros(1, dim, dtype=torch.int8))  # draws P, which is done once in a run
    gathering, parts = seconds(lambda: statistics(expansion, rows))
    given, _ = seconds(lambda: fit_router(parts, ridge=0.1))
    choosing, solution = seconds(lambda: fit_router(parts))
    features = expansion.compute_features(expansion.quantize(pooled(0, BLOCK, dim)))

    inverse = torch.eye(width) / 100
    released, _ = seconds(lambda: as_released(inverse, features[0]))
    vector, _ = seconds(lambda: [vector_form(inverse, feature) for feature in features[:10]])
    inverse = inverse.double()
    blocks, _ = seconds(lambda: in_blocks(inverse, features.double()))

    print(f"E = {width}, {rows} prompts of {dim} dimensions, {TASKS} tasks, {torch.get_num_threads()} threads")
    table = [
        ("closed form, ridge given", gathering + given),
        (f"closed form, ridge chosen ({solution.ridge:g})", gathering + choosing),
        ("recursion as released, scaled from 1 prompt", released * rows),
        ("recursion in vector form, scaled from 10", vector / 10 * rows),
        (f"recursion in blocks in fp64, scaled from {BLOCK}", blocks / BLOCK * rows),
    ]
    print(f"{'':48}{'seconds':>12}{'over given':>12}{'over chosen':>12}")
    for name, taken in table:
        print(f"{name:48}{taken:12.1f}{taken / table[0][1]:12.2f}{taken / table[1][1]:12.2f}")
    print(f"the closed form's {gathering:.1f} s of sums are spent while tasks are learnt")
    return {
        "router: the released recursion over the closed form, ridge given": table[2][1] / table[0][1],
        "the same, ridge chosen": table[2][1] / table[1][1],
    }


def measure_memory(width: int, rows: int, dim: int) -> None:
    before = peak()
    expansion = FeatureMap(dim, width, seed=0)
    gathering, parts = seconds(lambda: statistics(expansion, rows))
    gathered = peak()
    solving, solution = seconds(lambda: fit_router(parts))
    features = expansion.compute_features(expansion.quantize(pooled(0, 8, dim)))
    routing, _ = seconds(lambda: solution.route(features))
    print(f"E = {width}, {rows} prompts of {dim} dimensions, {TASKS} tasks, {torch.get_num_threads()} threads")
    print(f"sums      {gathering:8.1f} s   peak {gathered:6.2f} GiB (of which {before:.2f} before anything was done)")
    print(f"solution  {solving:8.1f} s   peak {peak():6.2f} GiB (ridge {solution.ridge:g})")
    print(f"8 routes  {routing:8.2f} s")


def peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / GIB


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=10000, metavar="E", help="width of the expansion")
    parser.add_argument("--rows", type=int, default=5000, metavar="N", help="prompts of all tasks together")
    parser.add_argument("--dim", type=int, default=256, metavar="D", help="hidden size of the model")
    parser.add_argument("--memory", type=int, metavar="E", help="measure the peak memory at this width instead")
    parser.add_argument("--json", action="store_true", help="also the bars as objects, for tools/bench.py")
    given = parser.parse_args()
    if given.memory is None:
        told = compare(given.width, given.rows, given.dim)
        for what, figure in told.items() if given.json else ():
            print(json.dumps({"what": what, "figure": f"{figure:.0f}", "target": "> 1", "told": f"E = {given.width}"}))
        return
    child = multiprocessing.get_context("spawn").Process(
        target=measure_memory, args=(given.memory, given.rows, given.dim)
    )
    child.start()
    child.join()
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main()
