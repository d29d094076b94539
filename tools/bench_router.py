"""The cost of the analytic router, as ratios within one run: the closed form against a recursion over single prompts.

    python tools/bench_router.py [--width 10000 --rows 5000 --dim 256] [--memory 16384]

The recursion `R ← R - Rφᵀ(1 + φRφᵀ)⁻¹φR` is timed in three forms on few prompts, and scaled to all prompts:
as released   (Rφᵀ·φ)·R, a product of two E-by-E matrices per prompt (fp32)
vector form   (Rφᵀ)·(φR), the same update with a cheaper order of products (fp32; it loses digits with each prompt)
in blocks     256 prompts at a time, in fp64, which keeps the digits
The closed form is timed with a fixed ridge, and with the ridge chosen from the statistics. `--memory E` instead
measures the peak memory of all parts at width E, in its own process.
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


def random_states(task: int, count: int, dim: int) -> Tensor:
    """Random pooled hidden states [count, dim]: the sum of a part common to all tasks, a part of the task, and a
    part of each prompt."""
    common = 2 * torch.randn(dim, generator=torch.Generator().manual_seed(999))
    generator = torch.Generator().manual_seed(task)
    return common + torch.randn(dim, generator=generator) + torch.randn(count, dim, generator=generator)


def time_call(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def collect_statistics(expansion: FeatureMap, rows: int) -> dict[str, TaskStatistics]:
    states = [random_states(task, rows // TASKS, expansion.dim) for task in range(TASKS)]
    return {
        f"task{t}": compute_statistics(expansion.quantize(state), expansion).compact() for t, state in enumerate(states)
    }


def released_update(inverse: Tensor, feature: Tensor) -> Tensor:
    gain = inverse @ feature[:, None] / (1 + feature @ inverse @ feature)
    return inverse - (gain @ feature[None]) @ inverse


def vector_update(inverse: Tensor, feature: Tensor) -> Tensor:
    gain = inverse @ feature
    return inverse.addr_(gain, gain, alpha=-1 / (1 + float(feature @ gain)))


def block_update(inverse: Tensor, features: Tensor) -> Tensor:
    gain = inverse @ features.T
    middle = torch.linalg.inv(torch.eye(len(features), dtype=inverse.dtype) + features @ gain)
    return inverse.addmm_(gain @ middle, gain.T, alpha=-1)


def compare(width: int, rows: int, dim: int) -> dict[str, float]:
    """Print the seconds of all sides. Returns the ratios of the released recursion over the closed form."""
    expansion = FeatureMap(dim, width, seed=0)
    expansion.compute_features(torch.zeros(1, dim, dtype=torch.int8))  # initializes the random projection, once per run
    statistics_seconds, statistics = time_call(lambda: collect_statistics(expansion, rows))
    fixed_ridge_seconds, _ = time_call(lambda: fit_router(statistics, ridge=0.1))
    chosen_ridge_seconds, solution = time_call(lambda: fit_router(statistics))
    features = expansion.compute_features(expansion.quantize(random_states(0, BLOCK, dim)))

    inverse = torch.eye(width) / 100
    released_seconds, _ = time_call(lambda: released_update(inverse, features[0]))
    vector_seconds, _ = time_call(lambda: [vector_update(inverse, feature) for feature in features[:10]])
    inverse = inverse.double()
    block_seconds, _ = time_call(lambda: block_update(inverse, features.double()))

    print(f"E = {width}, {rows} prompts of {dim} dimensions, {TASKS} tasks, {torch.get_num_threads()} threads")
    table = [
        ("closed form, fixed ridge", statistics_seconds + fixed_ridge_seconds),
        (f"closed form, ridge chosen ({solution.ridge:g})", statistics_seconds + chosen_ridge_seconds),
        ("recursion as released, scaled from 1 prompt", released_seconds * rows),
        ("recursion in vector form, scaled from 10", vector_seconds / 10 * rows),
        (f"recursion in blocks in fp64, scaled from {BLOCK}", block_seconds / BLOCK * rows),
    ]
    print(f"{'':48}{'seconds':>12}{'over fixed':>12}{'over chosen':>12}")
    for name, total in table:
        print(f"{name:48}{total:12.1f}{total / table[0][1]:12.2f}{total / table[1][1]:12.2f}")
    print(f"the closed form's {statistics_seconds:.1f} s of sums accrue during training")
    return {
        "router: the released recursion over the closed form with a fixed ridge": table[2][1] / table[0][1],
        "the same, with the ridge chosen": table[2][1] / table[1][1],
    }


def measure_memory(width: int, rows: int, dim: int) -> None:
    start_peak = peak_gib()
    expansion = FeatureMap(dim, width, seed=0)
    statistics_seconds, statistics = time_call(lambda: collect_statistics(expansion, rows))
    statistics_peak = peak_gib()
    fit_seconds, solution = time_call(lambda: fit_router(statistics))
    features = expansion.compute_features(expansion.quantize(random_states(0, 8, dim)))
    route_seconds, _ = time_call(lambda: solution.route(features))
    print(f"E = {width}, {rows} prompts of {dim} dimensions, {TASKS} tasks, {torch.get_num_threads()} threads")
    print(f"sums      {statistics_seconds:8.1f} s   peak {statistics_peak:6.2f} GiB (at the start: {start_peak:.2f})")
    print(f"solution  {fit_seconds:8.1f} s   peak {peak_gib():6.2f} GiB (ridge {solution.ridge:g})")
    print(f"8 routes  {route_seconds:8.2f} s")


def peak_gib() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / GIB


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=10000, metavar="E", help="features of the router")
    parser.add_argument("--rows", type=int, default=5000, metavar="N", help="prompts of all tasks together")
    parser.add_argument("--dim", type=int, default=256, metavar="D", help="hidden size of the model")
    parser.add_argument("--memory", type=int, metavar="E", help="measure the peak memory at this width instead")
    parser.add_argument(
        "--json", action="store_true", help="also print the ratios with targets as JSON objects, for tools/bench.py"
    )
    options = parser.parse_args()
    if options.memory is None:
        ratios = compare(options.width, options.rows, options.dim)
        for name, ratio in ratios.items() if options.json else ():
            print(json.dumps({"name": name, "value": f"{ratio:.0f}", "target": "> 1", "note": f"E = {options.width}"}))
        return
    child = multiprocessing.get_context("spawn").Process(
        target=measure_memory, args=(options.memory, options.rows, options.dim)
    )
    child.start()
    child.join()
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main()
