"""The analytic task router: ridge regression from a prompt's features to its task, in closed form (arXiv 2503.13575).

`h` is the pooled hidden state of a prompt; `φ = ReLU(h P)` are its features under a fixed random matrix P
(`FeatureMap`). Of each task only sums over its prompts are kept (`TaskStatistics`): the Gram matrix `Σ φᵀφ`, the
feature sum `Σ φ` and the number of prompts. All prompts of a task have the same one-hot label, so `Σ φ` is also the
task's column of `C = Σ φᵀy`. `fit_router` computes the weights `W = (G + λI)⁻¹ C`. The paper's recursive least squares
gives the same weights, so the router does not depend on the order of the tasks and forgets none of them.

By default all sums consist of integers that floating point represents exactly. Their bits are then the same for every
order of tasks, every number of ranks, and after a task was added and removed. The fit differs from the paper in three
ways that were better in measurements: features are centred, every task has the same total weight, and the ridge is
chosen by an estimate of the error on new prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_SCALE = 12.0  # a pooled state of mean magnitude 1 is multiplied by this before it is rounded to int8
ROW_LIMIT, FEATURE_LIMIT = 127, 255  # the largest magnitude of an entry of a quantized state, and of a feature
NIBBLES_PER_ENTRY = 8  # an entry of P is a sum of this many random 4-bit numbers, shifted to mean zero
ENTRY_LIMIT = 60  # the largest magnitude of an entry of P: NIBBLES_PER_ENTRY times 7.5
TARGET_RMS = 32  # the intended root mean square of a feature, well below FEATURE_LIMIT
FP32_EXACT_LIMIT = 1 << 24  # fp32 represents every integer up to this exactly
PROMPT_CHUNK = 4096  # prompts whose features are computed at once
STRIPE_ROWS = 512  # rows of a Gram matrix that are computed at once
PAPER_RIDGE = 100.0
LARGEST_CONDITION = 1e14  # with a larger condition number hardly a digit of the weights is right
# Candidate ridges, as multiples of the Gram matrix's mean diagonal: first the usual one and larger ones, then smaller.
RIDGES_UPWARDS, RIDGES_DOWNWARDS = (0.1, 0.3, 1.0, 3.0, 10.0), (0.03, 0.01, 0.003)
OOD_THRESHOLD, MIN_SHORTFALL = 5.5, 0.1  # see `OodDetector`


class FeatureMap:
    """The map from pooled hidden states h [n, dim] to features φ = ReLU(h P) [n, num_features].

    With `exact=True`, a pooled state is quantized to 8-bit integers, in units of its own mean magnitude. (LLaMA's
    states have a few huge entries; in units of the norm, all other entries would round to zero.) P holds integers drawn
    from a hash, the same on every machine. From there on all numbers are integers that fp32 represents exactly, in
    whatever order they are summed, so φ has the same bits on every machine.

    With `exact=False`, as in the paper, states stay floats, P is Gaussian, and φ is computed in fp64.
    """

    def __init__(self, dim: int, num_features: int, seed: int, exact: bool = True) -> None:
        assert min(dim, num_features) > 0
        self.dim, self.num_features, self.seed, self.exact = dim, num_features, seed, exact
        # The root mean square of the entries of q P, for quantized rows q that are roughly Gaussian.
        expected_rms = math.sqrt(dim) * 1.25 * ROW_SCALE * math.sqrt(NIBBLES_PER_ENTRY * 255 / 12)
        # A power of two, so that the division is exact.
        self.divisor = 2 ** max(1, round(math.log2(expected_rms / TARGET_RMS)))
        self._matrix: Tensor | None = None

    def quantize(self, pooled: Tensor) -> Tensor:
        """Pooled states [n, dim] in int8; in fp32 if not exact."""
        assert pooled.shape[1:] == (self.dim,)
        if not self.exact:
            return pooled.detach().float()
        pooled = pooled.detach().double()
        magnitude = pooled.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (pooled * (ROW_SCALE / magnitude)).round().clamp(-ROW_LIMIT, ROW_LIMIT).to(torch.int8)

    def compute_features(self, quantized: Tensor) -> Tensor:
        """Features φ [n, num_features] of quantized states [n, dim]: integers up to 255 in fp32; fp64 if not exact."""
        if not self.exact:
            return (quantized.double() @ self._matrix_on(quantized.device, torch.float64)).relu_()
        largest = (
            int(quantized.abs().sum(1, dtype=torch.int64).max()) * ENTRY_LIMIT + self.divisor if len(quantized) else 0
        )
        dtype = torch.float32 if largest < FP32_EXACT_LIMIT else torch.float64
        with torch.autocast(quantized.device.type, enabled=False):  # routing runs inside the model's forward pass
            product = (quantized.to(dtype) @ self._matrix_on(quantized.device, dtype)).relu_()
        product.add_(self.divisor // 2).mul_(1.0 / self.divisor).floor_().clamp_(max=FEATURE_LIMIT)
        return product.float()

    def _matrix_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P [dim, num_features] on a device, drawn at the first call."""
        if self._matrix is None:
            self._matrix = self._draw_integers() if self.exact else self._draw_gaussian()
        if (self._matrix.device, self._matrix.dtype) != (device, dtype):
            self._matrix = self._matrix.to(device, dtype)
        return self._matrix

    def _draw_integers(self) -> Tensor:
        """P from a hash, row by row to save memory. Each entry is a sum of eight 4-bit numbers: nearly Gaussian."""
        matrix = torch.empty(self.dim, self.num_features)
        for i in range(self.dim):
            digest = bytearray(
                hashlib.shake_256(f"{self.seed}:{i}".encode()).digest(self.num_features * NIBBLES_PER_ENTRY // 2)
            )
            random_bytes = torch.frombuffer(digest, dtype=torch.uint8).view(self.num_features, NIBBLES_PER_ENTRY // 2)
            matrix[i] = ((random_bytes >> 4) + (random_bytes & 15)).sum(1) - ENTRY_LIMIT
        return matrix

    def _draw_gaussian(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.dim, self.num_features, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class TaskStatistics:
    """Sums over some prompts of a task. Statistics of several parts can be added and subtracted."""

    gram: Tensor  # Σ φᵀφ, the upper triangle row by row [triangle_size]: fp64, or integers after `compact`
    feature_sum: Tensor  # Σ φ [num_features] in fp64, which is also the task's column of C
    count: Tensor  # the number of prompts, int64 [1]

    def __post_init__(self) -> None:
        assert self.feature_sum.ndim == 1
        assert self.gram.shape in ((triangle_size(self.num_features),), (0,))  # task keys need no Gram matrix

    @property
    def num_features(self) -> int:
        return len(self.feature_sum)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, for a sum over ranks in place."""
        return self.gram, self.feature_sum, self.count

    def __add__(self, other: TaskStatistics) -> TaskStatistics:
        gram = self.gram.double() + other.gram.double()
        return TaskStatistics(gram, self.feature_sum + other.feature_sum, self.count + other.count)

    def __sub__(self, other: TaskStatistics) -> TaskStatistics:
        gram = self.gram.double() - other.gram.double()
        return TaskStatistics(gram, self.feature_sum - other.feature_sum, self.count - other.count)

    def to(self, device: torch.device | str) -> TaskStatistics:
        return TaskStatistics(*(tensor.to(device) for tensor in self.tensors()))

    def compact(self) -> TaskStatistics:
        """The same sums with the Gram matrix in the smallest integer type that holds it exactly, if any does."""
        for dtype in (torch.int32, torch.int64):
            integers = self.gram.to(dtype)
            if torch.equal(integers.to(self.gram.dtype), self.gram):
                return TaskStatistics(integers, self.feature_sum, self.count)
        return self

    def gram_stripes(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (row slice, column slice, values) of the Gram matrix in fp64; values below the diagonal are zero."""
        for rows, columns, in_triangle, packed in _triangle_stripes(self.num_features, self.gram.device):
            stripe = torch.zeros(in_triangle.shape, dtype=torch.float64, device=self.gram.device)
            stripe[in_triangle] = self.gram[packed].double()
            yield rows, columns, stripe


def triangle_size(size: int) -> int:
    """The number of entries in the upper triangle of a [size, size] matrix."""
    return size * (size + 1) // 2


def compute_statistics(quantized: Tensor, feature_map: FeatureMap) -> TaskStatistics:
    """The statistics of quantized states [n, dim] (see `FeatureMap.quantize`), computed on their device."""
    num_features, device = feature_map.num_features, quantized.device
    gram = torch.zeros(triangle_size(num_features), dtype=torch.float64, device=device)
    feature_sum = torch.zeros(num_features, dtype=torch.float64, device=device)
    for chunk in quantized.split(PROMPT_CHUNK):
        features = feature_map.compute_features(chunk)
        feature_sum += features.sum(0, dtype=torch.float64)
        # Blocks so small that the sum of products of features stays an exact integer in fp32.
        block_size = (FP32_EXACT_LIMIT - 1) // FEATURE_LIMIT**2 if feature_map.exact else PROMPT_CHUNK
        for rows_slice, columns, in_triangle, packed in _triangle_stripes(num_features, device):
            stripe = torch.zeros(in_triangle.shape, dtype=torch.float64, device=device)
            for block in features.split(block_size):
                stripe += block[:, rows_slice].T @ block[:, columns]
            gram[packed] += stripe[in_triangle]
    return TaskStatistics(gram, feature_sum, torch.tensor([len(quantized)], device=device))


def _triangle_stripes(num_features: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor, slice]]:
    """Yield (row slice, column slice, upper-triangle mask, slice of the packed triangle) of each stripe of rows."""
    offset = 0
    for start in range(0, num_features, STRIPE_ROWS):
        stop = min(start + STRIPE_ROWS, num_features)
        in_triangle = torch.ones(stop - start, num_features - start, dtype=torch.bool, device=device).triu_()
        count = triangle_size(num_features - start) - triangle_size(num_features - stop)
        yield slice(start, stop), slice(start, num_features), in_triangle, slice(offset, offset + count)
        offset += count


@dataclass(frozen=True)
class OodDetector:
    """Detects out-of-distribution prompts: text that belongs to no task.

    Such a prompt has two signs. Its score falls short of 1 by more than the scores of the task's own prompts do; and it
    lies where the router has seen no prompts, so that its leverage `φ(G + λI)⁻¹φᵀ` is large. Both are divided by their
    expected averages over new prompts of the task, which follow from the statistics. So one threshold suits all tasks,
    widths and layers: OOD_THRESHOLD rejects one or two of a hundred of a task's own prompts.

    On real text the sum of both separated better than either alone, and best with a weight of 2 for the leverage. Where
    tasks are so different that nearly all scores are 1, small shortfalls mean nothing, so the expected shortfall is at
    least MIN_SHORTFALL.
    """

    factor: Tensor  # lower Cholesky factor of G + λI [E, E]
    shortfall: Tensor  # [T], root mean square of 1 - score over a task's own prompts; infinite if there is one task
    leverage: Tensor  # [T], mean leverage of a task's own prompts

    def distance(self, centred: Tensor, score: Tensor, index: Tensor) -> Tensor:
        """The distance [n] of prompts with centred features [n, E] from their tasks, which give them these scores."""
        leverage = torch.linalg.solve_triangular(self.factor, centred.T, upper=False).square().sum(0)
        return (1 - score) / self.shortfall[index] + 2 * leverage / self.leverage[index]


@dataclass(frozen=True)
class FittedRouter:
    """A fitted router, which maps features to tasks."""

    names: tuple[str, ...]  # the tasks' names, sorted; a task's index is its position here
    weights: Tensor  # W [E, T]
    mean: Tensor  # [E], subtracted from φ; zero in the paper's form
    intercept: float
    ridge: float  # as given to `fit_router`, or chosen by it
    condition: float  # condition number of G + λI
    ood_detector: OodDetector | None

    def scores(self, features: Tensor) -> Tensor:
        """Scores [n, T] of features [n, E]: near 1 for a prompt's own task and near 0 for the others."""
        return (features.double() - self.mean) @ self.weights + self.intercept

    def route(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(task index, margin over the second best task, distance from the task) of each prompt, for features [n, E].

        The index is -1 if the distance exceeds OOD_THRESHOLD. Without an `ood_detector` the distance is 0.
        """
        best = self.scores(features).topk(min(2, len(self.names)), 1)
        score, index = best.values[:, 0], best.indices[:, 0]
        margin = score - best.values[:, 1] if len(self.names) > 1 else score
        if self.ood_detector is None:
            return index, margin, torch.zeros_like(margin)
        distance = self.ood_detector.distance(features.double() - self.mean, score, index)
        return torch.where(distance > OOD_THRESHOLD, -1, index), margin, distance


def fit_router(
    tasks: Mapping[str, TaskStatistics],
    ridge: float | None = None,
    *,
    paper_form: bool = False,
    detect_ood: bool = True,
) -> FittedRouter:
    """Fit the router of these tasks, by Cholesky factorization in fp64.

    `ridge` is a multiple of the centred Gram matrix's mean diagonal. By default several are tried, and the one with the
    smallest estimated error on new prompts is used. In the paper's form, `ridge` is λ itself, by default 100; features
    are not centred, every prompt has the same weight, and no prompt is rejected.
    """
    names = tuple(sorted(tasks))  # the order of summation, whatever the order of the tasks
    parts = [tasks[name] for name in names]
    assert parts
    for name, part in zip(names, parts, strict=True):
        if int(part.count) < 1:
            raise ValueError(f"task {name!r} has no samples; a router needs some prompts of every task")
    if paper_form:
        system = _RidgeSystem(parts, [1.0] * len(parts), centred=False)
        ridge = PAPER_RIDGE if ridge is None else ridge
        fit = system.solve(ridge)
        return FittedRouter(names, fit.weights, system.mean, 0.0, ridge, fit.condition, None)
    system = _RidgeSystem(parts, [1.0 / (len(parts) * int(part.count)) for part in parts], centred=True)
    if len(parts) == 1 and system.scale <= 0:  # one task whose prompts are all equal
        return FittedRouter(names, system.cross_products, system.mean, 1.0, ridge or RIDGES_UPWARDS[0], 1.0, None)
    best: tuple[float, float, _RidgeFit, OodDetector] | None = None
    for candidates in (RIDGES_UPWARDS, RIDGES_DOWNWARDS) if ridge is None else ((ridge,),):
        for candidate in candidates:
            fit = system.solve(candidate * system.scale)
            error, ood_detector = system.estimate_unseen_error(fit)
            if best is not None and error >= best[0]:
                break  # as a function of the ridge, the error falls and then rises
            best = error, candidate, fit, ood_detector
    assert best is not None
    _, best_ridge, fit, ood_detector = best
    detector = ood_detector if detect_ood else None
    return FittedRouter(names, fit.weights, system.mean, 1 / len(parts), best_ridge, fit.condition, detector)


@dataclass(frozen=True)
class _RidgeFit:
    factor: Tensor  # lower Cholesky factor of G + λI [E, E]
    weights: Tensor  # W [E, T]
    condition: float  # condition number of G + λI


class _RidgeSystem:
    """The system `(G + λI) W = C` for any λ, where each prompt of task t has the weight `prompt_weights[t]`."""

    def __init__(self, parts: list[TaskStatistics], prompt_weights: list[float], *, centred: bool) -> None:
        self.parts, self.prompt_weights = parts, prompt_weights
        num_features, device = parts[0].num_features, parts[0].feature_sum.device
        self.gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        for part, prompt_weight in zip(parts, prompt_weights, strict=True):
            for rows, columns, values in part.gram_stripes():
                self.gram[rows, columns] += prompt_weight * values
                self.gram[columns, rows] += prompt_weight * values.triu_(1).T
        self.cross_products = torch.stack(
            [prompt_weight * part.feature_sum for part, prompt_weight in zip(parts, prompt_weights, strict=True)], 1
        )
        self.mean = torch.zeros_like(parts[0].feature_sum)
        if centred:  # the weights of all prompts add up to 1
            self.mean = self.cross_products.sum(1)
            self.gram.addr_(self.mean, self.mean, alpha=-1)
            self.cross_products -= self.mean[:, None] / len(parts)
        self.scale = float(self.gram.diagonal().mean())
        if not math.isfinite(self.scale):
            raise ValueError("the statistics hold values that are not finite; gather them again")
        if self.scale <= 0 and len(parts) > 1:
            raise ValueError("all prompts have the same features, so nothing tells tasks apart; give other prompts")

    def solve(self, ridge: float) -> _RidgeFit:
        """Compute W by Cholesky factorization, with λ = `ridge`."""
        matrix = self.gram.clone()
        matrix.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        condition = math.inf if failed.any() else _estimate_condition(matrix, factor)
        if not condition < LARGEST_CONDITION:  # with rounding, even a singular matrix may pass the factorization
            raise ValueError(
                f"the router's system of {len(self.mean)} features is not positive definite with λ = {ridge:.3g} "
                f"(the Gram matrix has {self.scale:.3g} on its diagonal); give a larger ridge"
            )
        return _RidgeFit(factor, torch.cholesky_solve(self.cross_products, factor), condition)

    def estimate_unseen_error(self, fit: _RidgeFit) -> tuple[float, OodDetector]:
        """(expected squared error on new prompts, averaged over tasks; the detector of out-of-distribution prompts).

        The residual of a prompt that is left out of the fit is 1 / (1 - h) times its residual in the fit; h is the
        prompt's influence on its own fitted value (its weight times 1 + its leverage). Generalized cross-validation
        (Golub, Heath and Wahba, 1979) uses the mean of h over all prompts. Here the mean over each task is used, since
        the prompts of a small task have larger weights.
        """
        tasks = len(self.parts)
        inverse = torch.cholesky_inverse(fit.factor)
        inverse_mean = inverse @ self.mean
        offset = self.mean @ fit.weights - 1 / tasks  # score = φ W - offset
        error = 0.0
        shortfalls, leverages = [], []
        for t, (part, prompt_weight) in enumerate(zip(self.parts, self.prompt_weights, strict=True)):
            trace, quadratic = _trace_and_quadratic_form(part, inverse, fit.weights)
            count = int(part.count)
            leverage = (trace - 2 * float(inverse_mean @ part.feature_sum)) / count + float(inverse_mean @ self.mean)
            leave_one_out_factor = 1 - prompt_weight * (1 + leverage)
            target = offset.clone()
            target[t] += 1
            # The mean of (target - φ W)² over the task's prompts, for each output.
            squares = target.square() - 2 * target * (part.feature_sum @ fit.weights) / count + quadratic / count
            squares = squares.clamp(min=0) / leave_one_out_factor**2
            error += float(squares.sum()) / tasks
            shortfalls.append(max(MIN_SHORTFALL, float(squares[t].sqrt())) if tasks > 1 else math.inf)
            leverages.append(leverage / leave_one_out_factor)
        return error, OodDetector(fit.factor, self.mean.new_tensor(shortfalls), self.mean.new_tensor(leverages))


def _estimate_condition(matrix: Tensor, factor: Tensor) -> float:
    """Estimate the condition number from below, by power iteration with the matrix and with its inverse."""
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = smallest = start.to(matrix.device)
    for _ in range(10):
        largest = matrix @ (largest / largest.norm())
        smallest = torch.cholesky_solve(smallest / smallest.norm(), factor)
    return float(largest.norm() * smallest.norm())


def _trace_and_quadratic_form(part: TaskStatistics, inverse: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """tr(M⁻¹ G) and the diagonal of Wᵀ G W, computed from the upper triangle of G; M = G + λI of all tasks."""
    trace = torch.zeros((), dtype=torch.float64, device=inverse.device)
    quadratic = torch.zeros_like(weights[0])
    for rows, columns, values in part.gram_stripes():
        diagonal = values.diagonal()
        trace += 2 * (inverse[rows, columns] * values).sum() - inverse.diagonal()[rows] @ diagonal
        quadratic += 2 * (weights[rows] * (values @ weights[columns])).sum(0) - diagonal @ weights[rows].square()
    return float(trace), quadratic
