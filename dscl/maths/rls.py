"""Routing by regularised least squares: which task a prompt belongs to, in closed form (arXiv 2503.13575).

`h` is the pooled hidden state of a prompt, `φ = ReLU(h P)` its features under a fixed random matrix P (`Expansion`).
A task leaves behind sums over its prompts alone: the Gram matrix `Σ φᵀφ`, `Σ φ` and their number (`Statistics`). Since
the label of a task's prompts is one and the same one-hot vector, `Σ φ` is also the task's column of `C = Σ φᵀy`. The
weights `W = (G + λI)⁻¹ C` (`solve`) are what the paper's recursion over single prompts arrives at, so nothing depends
on the order of the tasks and none is forgotten.

By default all of it is made of integers that floating point holds exactly, so the sums have the same bits for every
order, every split among ranks, and after a task was added and removed; and the fit differs from the paper in three
ways that were measured to be better: it is centred, every task counts alike however many prompts it has, and the ridge
is chosen from the sums themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 12.0  # of a row whose entries have mean magnitude 1, before it is rounded
ROW_LIMIT, FEATURE_LIMIT = 127, 255
NIBBLES = 8  # of which an entry of P is the sum
ENTRY_LIMIT = 60  # of P: NIBBLES times half of 15
TYPICAL = 32  # what the root mean square of a feature should come to, far from FEATURE_LIMIT
EXACT = 1 << 24  # fp32 holds every integer up to it
CHUNK = 4096  # prompts whose features are in memory at once
STRIPE = 512  # rows of a Gram matrix that are computed at once
PAPER_RIDGE = 100.0
LARGEST_CONDITION = 1e14  # beyond it hardly a digit of the weights is right
# Ridges to choose from, as multiples of the Gram matrix's mean diagonal: upwards from the usual one, and downwards.
UPWARDS, DOWNWARDS = (0.1, 0.3, 1.0, 3.0, 10.0), (0.03, 0.01, 0.003)
FAR, SURE = 5.5, 0.1  # see `Rejection`


class Expansion:
    """The feature map from pooled hidden states to φ.

    Exact: a pooled row is kept as 8-bit integers, in units of its own mean magnitude (a norm would be that of the few
    huge entries that LLaMA's states have, and round all others to nothing), and P holds integers drawn by a hash, the
    same ones everywhere. From there on every number is an integer that fp32 holds exactly, in whatever order it is
    summed, so that φ has the same bits on every machine. Otherwise, as in the paper, rows are floats, P is Gaussian,
    and φ is computed in fp64.
    """

    def __init__(self, dim: int, width: int, seed: int, exact: bool = True) -> None:
        assert min(dim, width) > 0
        self.dim, self.width, self.seed, self.exact = dim, width, seed, exact
        typical = math.sqrt(dim) * 1.25 * SCALE * math.sqrt(NIBBLES * 255 / 12)  # of q P, q being near Gaussian
        self.divisor = 2 ** max(1, round(math.log2(typical / TYPICAL)))  # a power of two divides without rounding
        self._matrix: Tensor | None = None

    def rows(self, pooled: Tensor) -> Tensor:
        """What is kept of pooled states [n, dim]: int8 when exact, else the floats themselves."""
        assert pooled.shape[1:] == (self.dim,)
        if not self.exact:
            return pooled.detach().float()
        pooled = pooled.detach().double()
        size = pooled.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return (pooled * (SCALE / size)).round().clamp(-ROW_LIMIT, ROW_LIMIT).to(torch.int8)

    def features(self, rows: Tensor) -> Tensor:
        """φ of each row [n, width]: whole numbers from 0 to 255 in fp32 when exact, else fp64."""
        if not self.exact:
            return (rows.double() @ self._at(rows.device, torch.float64)).relu_()
        largest = int(rows.abs().sum(1, dtype=torch.int64).max()) * ENTRY_LIMIT + self.divisor if len(rows) else 0
        kind = torch.float32 if largest < EXACT else torch.float64
        with torch.autocast(rows.device.type, enabled=False):  # prompts are routed within a model's forward pass
            product = (rows.to(kind) @ self._at(rows.device, kind)).relu_()
        product.add_(self.divisor // 2).mul_(1.0 / self.divisor).floor_().clamp_(max=FEATURE_LIMIT)
        return product.float()

    def _at(self, device: torch.device, kind: torch.dtype) -> Tensor:
        """P on a device; it is drawn when it is first needed."""
        if self._matrix is None:
            self._matrix = self._draw_integers() if self.exact else self._draw_gaussian()
        if (self._matrix.device, self._matrix.dtype) != (device, kind):
            self._matrix = self._matrix.to(device, kind)
        return self._matrix

    def _draw_integers(self) -> Tensor:
        """Row by row, so that the bytes of the hash need little memory; a sum of eight is near enough to Gaussian."""
        matrix = torch.empty(self.dim, self.width)
        for i in range(self.dim):
            digest = bytearray(hashlib.shake_256(f"{self.seed}:{i}".encode()).digest(self.width * NIBBLES // 2))
            drawn = torch.frombuffer(digest, dtype=torch.uint8).view(self.width, NIBBLES // 2)
            matrix[i] = ((drawn >> 4) + (drawn & 15)).sum(1) - ENTRY_LIMIT
        return matrix

    def _draw_gaussian(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.dim, self.width, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Statistics:
    """All that is kept of a task, or of any share of it: sums over prompts, which add and subtract."""

    gram: Tensor  # Σ φᵀφ: the upper triangle row after row, in fp64, or in whole numbers once compact
    total: Tensor  # Σ φ in fp64: the task's feature sum, and its column of cross-products
    count: Tensor  # one int64: prompts

    def __post_init__(self) -> None:
        assert self.total.ndim == 1
        assert self.gram.shape in ((packed(self.width),), (0,))  # what needs the sums alone keeps no Gram matrix

    @property
    def width(self) -> int:
        return len(self.total)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What ranks add up, in place, when each has gathered its share."""
        return self.gram, self.total, self.count

    def __add__(self, other: Statistics) -> Statistics:
        gram = self.gram.double() + other.gram.double()
        return Statistics(gram, self.total + other.total, self.count + other.count)

    def __sub__(self, other: Statistics) -> Statistics:
        gram = self.gram.double() - other.gram.double()
        return Statistics(gram, self.total - other.total, self.count - other.count)

    def to(self, device: torch.device | str) -> Statistics:
        return Statistics(*(tensor.to(device) for tensor in self.tensors()))

    def compact(self) -> Statistics:
        """The same sums, the Gram matrix in the smallest type that holds it exactly."""
        for kind in (torch.int32, torch.int64):
            whole = self.gram.to(kind)
            if torch.equal(whole.to(self.gram.dtype), self.gram):
                return Statistics(whole, self.total, self.count)
        return self

    def stripes(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The Gram matrix in fp64, stripe by stripe: its rows, its columns, and the values, zero below the diagonal."""
        for rows, columns, keep, place in _stripes(self.width, self.gram.device):
            part = torch.zeros(keep.shape, dtype=torch.float64, device=self.gram.device)
            part[keep] = self.gram[place].double()
            yield rows, columns, part


def packed(width: int) -> int:
    """How many entries the upper triangle has."""
    return width * (width + 1) // 2


def gather(rows: Tensor, expansion: Expansion) -> Statistics:
    """The statistics of these rows (see `Expansion.rows`), computed where the rows are."""
    width, device = expansion.width, rows.device
    gram = torch.zeros(packed(width), dtype=torch.float64, device=device)
    total = torch.zeros(width, dtype=torch.float64, device=device)
    for chunk in rows.split(CHUNK):
        features = expansion.features(chunk)
        total += features.sum(0, dtype=torch.float64)
        # So few rows that a sum of products of features cannot leave the integers that fp32 holds exactly.
        block = (EXACT - 1) // FEATURE_LIMIT**2 if expansion.exact else CHUNK
        for stripe, columns, keep, place in _stripes(width, device):
            part = torch.zeros(keep.shape, dtype=torch.float64, device=device)
            for some in features.split(block):
                part += some[:, stripe].T @ some[:, columns]
            gram[place] += part[keep]
    return Statistics(gram, total, torch.tensor([len(rows)], device=device))


def _stripes(width: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor, slice]]:
    """Rows and columns of each stripe, which of its entries lie in the upper triangle, and their place in it packed."""
    done = 0
    for start in range(0, width, STRIPE):
        stop = min(start + STRIPE, width)
        keep = torch.ones(stop - start, width - start, dtype=torch.bool, device=device).triu_()
        count = packed(width - start) - packed(width - stop)
        yield slice(start, stop), slice(start, width), keep, slice(done, done + count)
        done += count


@dataclass(frozen=True)
class Rejection:
    """How far a prompt is from the task that it was routed to, in units of how far the task's own prompts are.

    Two things tell text of no task: no task claims it with the score that its own prompts get, and it lies where there
    were no prompts, so that its leverage `φ(G + λI)⁻¹φᵀ` is large. Each is divided by its average over the task's own
    prompts, which the statistics tell: of the prompts that were fitted, and by way of their leverage also of others.
    So one limit suits any tasks, widths and layers: beyond FAR lie one or two in a hundred of a task's own prompts. On
    real text the sum told more than either part, and most when leverage counts twice. Where tasks are so unlike that
    nearly all scores are 1, a small step from it means nothing: a shortfall is taken to be SURE at least.
    """

    factor: Tensor  # lower Cholesky factor of the system
    shortfall: Tensor  # [T], root mean square of 1 - score over a task's own prompts; infinite if there is one task
    leverage: Tensor  # [T], mean over a task's own prompts

    def distance(self, centred: Tensor, score: Tensor, index: Tensor) -> Tensor:
        """Of each prompt, from the task `index`, which gives it this score."""
        leverage = torch.linalg.solve_triangular(self.factor, centred.T, upper=False).square().sum(0)
        return (1 - score) / self.shortfall[index] + 2 * leverage / self.leverage[index]


@dataclass(frozen=True)
class Solution:
    """A solved router."""

    names: tuple[str, ...]  # sorted; an index stands for its place here
    weights: Tensor  # W [E, T]
    mean: Tensor  # [E], taken off φ; zero in the paper's form
    intercept: float
    ridge: float  # as `solve` takes it
    condition: float  # of the system that was solved
    rejection: Rejection | None

    def scores(self, features: Tensor) -> Tensor:
        """[n, T], near 1 for a prompt's own task and near 0 for the others."""
        return (features.double() - self.mean) @ self.weights + self.intercept

    def route(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each prompt its task's index, the lead over the second best task, and the distance from the task.

        Beyond FAR a prompt belongs to no task, and its index is -1. Without rejection the distance is 0.
        """
        best = self.scores(features).topk(min(2, len(self.names)), 1)
        score, index = best.values[:, 0], best.indices[:, 0]
        margin = score - best.values[:, 1] if len(self.names) > 1 else score
        if self.rejection is None:
            return index, margin, torch.zeros_like(margin)
        distance = self.rejection.distance(features.double() - self.mean, score, index)
        return torch.where(distance > FAR, -1, index), margin, distance


def solve(
    tasks: Mapping[str, Statistics], ridge: float | None = None, *, faithful: bool = False, reject: bool = True
) -> Solution:
    """The router of these tasks, by Cholesky factorisation in fp64.

    `ridge` is a multiple of the centred Gram matrix's mean diagonal; by default the one with the smallest error of
    several on other prompts than those of the sums, which the sums foretell. In the paper's form (`faithful`) it is λ
    itself, by default 100, nothing is centred, every prompt counts alike, and no prompt is rejected.
    """
    names = tuple(sorted(tasks))  # summed in this order, whatever order the tasks came in
    parts = [tasks[name] for name in names]
    assert parts
    for name, part in zip(names, parts, strict=True):
        if int(part.count) < 1:
            raise ValueError(f"task {name!r} has no samples; a router needs some prompts of every task")
    if faithful:
        system = _System(parts, [1.0] * len(parts), centred=False)
        ridge = PAPER_RIDGE if ridge is None else ridge
        fit = system.fit(ridge)
        return Solution(names, fit.weights, system.mean, 0.0, ridge, fit.condition, None)
    system = _System(parts, [1.0 / (len(parts) * int(part.count)) for part in parts], centred=True)
    if len(parts) == 1 and system.scale <= 0:  # a single prompt, or the same one again: nothing to tell it from
        return Solution(names, system.cross, system.mean, 1.0, ridge or UPWARDS[0], 1.0, None)
    best: tuple[float, float, _Fit, Rejection] | None = None
    for way in (UPWARDS, DOWNWARDS) if ridge is None else ((ridge,),):
        for candidate in way:
            fit = system.fit(candidate * system.scale)
            error, rejection = system.unseen(fit)
            if best is not None and error >= best[0]:
                break  # along the ridges the error falls and then rises
            best = error, candidate, fit, rejection
    assert best is not None
    _, chosen, fit, rejection = best
    kept = rejection if reject else None
    return Solution(names, fit.weights, system.mean, 1 / len(parts), chosen, fit.condition, kept)


@dataclass(frozen=True)
class _Fit:
    factor: Tensor
    weights: Tensor
    condition: float


class _System:
    """`(G + λI) W = C` for any λ, of weighted prompts: those of task t count `shares[t]` each."""

    def __init__(self, parts: list[Statistics], shares: list[float], *, centred: bool) -> None:
        self.parts, self.shares = parts, shares
        width, device = parts[0].width, parts[0].total.device
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        for part, share in zip(parts, shares, strict=True):
            for rows, columns, values in part.stripes():
                self.gram[rows, columns] += share * values
                self.gram[columns, rows] += share * values.triu_(1).T
        self.cross = torch.stack([share * part.total for part, share in zip(parts, shares, strict=True)], 1)
        self.mean = torch.zeros_like(parts[0].total)
        if centred:  # the shares add up to 1
            self.mean = self.cross.sum(1)
            self.gram.addr_(self.mean, self.mean, alpha=-1)
            self.cross -= self.mean[:, None] / len(parts)
        self.scale = float(self.gram.diagonal().mean())
        if not math.isfinite(self.scale):
            raise ValueError("the statistics hold values that are not finite; gather them again")
        if self.scale <= 0 and len(parts) > 1:
            raise ValueError("all prompts have the same features, so nothing tells tasks apart; give other prompts")

    def fit(self, ridge: float) -> _Fit:
        """W by Cholesky factorisation."""
        matrix = self.gram.clone()
        matrix.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        condition = math.inf if failed.any() else _condition(matrix, factor)
        if not condition < LARGEST_CONDITION:  # rounding may let a singular matrix pass the factorisation
            raise ValueError(
                f"the router's system of {len(self.mean)} features is not positive definite with λ = {ridge:.3g} "
                f"(the Gram matrix has {self.scale:.3g} on its diagonal); give a larger ridge"
            )
        return _Fit(factor, torch.cholesky_solve(self.cross, factor), condition)

    def unseen(self, fit: _Fit) -> tuple[float, Rejection]:
        """The squared error to expect on prompts that are not in the sums, a mean over tasks, and how to reject.

        A prompt that is left out of the fit has its residual grow by 1 / (1 - h), h being the share that it has in its
        own fitted value (its leverage times its weight, and its weight in the mean). Generalised cross-validation
        (Golub, Heath and Wahba, 1979) takes the mean h of all prompts; here it is the mean of each task, since the
        prompts of a small task weigh more.
        """
        tasks = len(self.parts)
        inverse = torch.cholesky_inverse(fit.factor)
        middle = inverse @ self.mean
        offset = self.mean @ fit.weights - 1 / tasks  # score = φW - offset
        error = 0.0
        shortfalls, leverages = [], []
        for t, (part, share) in enumerate(zip(self.parts, self.shares, strict=True)):
            trace, quadratic = _traces(part, inverse, fit.weights)
            count = int(part.count)
            leverage = (trace - 2 * float(middle @ part.total)) / count + float(middle @ self.mean)
            own = 1 - share * (1 + leverage)
            target = offset.clone()
            target[t] += 1
            # The mean of (target - φW)² over the task's prompts.
            squares = target.square() - 2 * target * (part.total @ fit.weights) / count + quadratic / count
            squares = squares.clamp(min=0) / own**2
            error += float(squares.sum()) / tasks
            shortfalls.append(max(SURE, float(squares[t].sqrt())) if tasks > 1 else math.inf)
            leverages.append(leverage / own)
        return error, Rejection(fit.factor, self.mean.new_tensor(shortfalls), self.mean.new_tensor(leverages))


def _condition(matrix: Tensor, factor: Tensor) -> float:
    """Largest over smallest eigenvalue, by iteration with the matrix and its inverse: a little too small."""
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up = down = start.to(matrix.device)
    for _ in range(10):
        up = matrix @ (up / up.norm())
        down = torch.cholesky_solve(down / down.norm(), factor)
    return float(up.norm() * down.norm())


def _traces(part: Statistics, inverse: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """tr(M⁻¹G) and the diagonal of WᵀGW, G being known by its upper triangle."""
    trace = torch.zeros((), dtype=torch.float64, device=inverse.device)
    quadratic = torch.zeros_like(weights[0])
    for rows, columns, values in part.stripes():
        diagonal = values.diagonal()
        trace += 2 * (inverse[rows, columns] * values).sum() - inverse.diagonal()[rows] @ diagonal
        quadratic += 2 * (weights[rows] * (values @ weights[columns])).sum(0) - diagonal @ weights[rows].square()
    return float(trace), quadratic
