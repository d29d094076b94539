"""Subspaces of a weight that may not change: where they come from, how they grow, and how a weight is held to them.

`W` [m, n] maps inputs of width n to outputs of width m. What was learned is kept by orthonormal columns `V` [n, k_v]
of the input space and `U` [m, k_u] of the output space, in one of three readings of arXiv 2504.07097. With `Δ` the
change of the weight since they were fixed:

- `input`: `Δ V = 0`, so the output for every input within V stays. At half the rank, 50% of a square matrix is free.
- `two_sided`: `Δ V = 0` and `Uᵀ Δ = 0`, as in the released code; 25% is free.
- `paper`: `Uᵀ Δ V = 0`, as printed (`∇ - UUᵀ ∇ VVᵀ`); 75% is free.

The weight itself is held, not its gradient alone, and to what it gave when the directions were fixed (`W V`, `Uᵀ W`,
`Uᵀ W V`), not to its last value: whatever an optimizer did in between is undone, errors cannot add up, and no copy of
the weight is needed. This is exact up to the rounding of the weight's own entries: in fp32 the protected part of a
change is about 1e-7 of the weight's size, after one step as after a million. Products in TF32 would leave theirs, so on
GPUs gradients alone have such products, whatever else torch is set to: where the weight is held, what they leave is
undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dscl.maths.readings import READINGS

EPS = torch.finfo(torch.float64).eps


class Directions(NamedTuple):
    """Orthonormal columns, the strongest first, and what each holds of the whole."""

    energies: Tensor  # (r,) in fp64, descending, without those that are zero to rounding
    vectors: Tensor  # (d, r) in fp64


@torch.no_grad()
def right_directions(root: Tensor, taken: Tensor | None = None) -> Directions:
    """Eigenvectors of `rootᵀ root`, that is right singular vectors, after orthonormal columns `taken` were taken out.

    From the smaller of the two Gram matrices. As far as gaps tell directions apart, they are right to 1e-6 down to 1e-5
    of the largest singular value; those below about 1e-6 of it are left out.
    """
    free, blur = _Complement(taken), max(_blur(root, taken), max(root.shape) * EPS)
    root = root.double()
    floor = blur**2 * float(root.square().sum())
    root = free.coordinates(root)
    wide = root.shape[0] < root.shape[1]
    energies, vectors = _strongest(root @ root.T if wide else root.T @ root, floor)
    vectors = _orthonormal(root.T @ (vectors / energies.sqrt()) if wide else vectors)
    _check(energies, vectors, lambda probe: root.T @ (root @ probe))
    return Directions(energies, free.columns(vectors))


@torch.no_grad()
def moment_directions(moment: Tensor, taken: Tensor | None = None) -> Directions:
    """The same for a symmetric positive semidefinite second moment, as of the inputs of a layer."""
    free, blur = _Complement(taken), max(_blur(moment), len(moment) * EPS)
    moment = moment.double()
    floor = blur * float(moment.norm())
    moment = free.coordinates(free.coordinates(moment).T)
    energies, vectors = _strongest(moment, floor)
    vectors = _orthonormal(vectors)
    _check(energies, vectors, moment.matmul)
    return Directions(energies, free.columns(vectors))


@torch.no_grad()
def left_of(root: Tensor, right: Directions) -> Tensor:
    """The left singular vectors that belong to right ones of the whole matrix, without a second decomposition."""
    return _orthonormal(root.double() @ (right.vectors / right.energies.sqrt()))


def _blur(*tensors: Tensor | None) -> float:
    """The relative rounding of what is given; 16-bit numbers count as exact ones of 32 bits."""
    kinds = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors if tensor is not None]
    return max(torch.finfo(kind).eps for kind in kinds)


class _Complement:
    """What orthonormal columns leave, by Householder reflections: to 1e-15, even of columns in fp32.

    Within it the matrix is smaller, and what is found is orthogonal to the columns, however weak it is.
    """

    def __init__(self, taken: Tensor | None) -> None:
        self.count = 0 if taken is None else taken.shape[1]
        if taken is not None and self.count:
            self.factors = torch.geqrf(taken.double())
            off = self.factors[0].diagonal().abs() - 1
            assert off.abs().max() < 1e-3, "the columns taken are not orthonormal"

    def coordinates(self, rows: Tensor) -> Tensor:
        return torch.ormqr(*self.factors, rows, left=False)[:, self.count :] if self.count else rows

    def columns(self, vectors: Tensor) -> Tensor:
        padded = torch.cat([vectors.new_zeros(self.count, vectors.shape[1]), vectors])
        return torch.ormqr(*self.factors, padded) if self.count else vectors


def _strongest(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues above the floor and above their own rounding, descending, and their vectors."""
    if not torch.isfinite(gram).all():
        raise ArithmeticError("the matrix to decompose is not finite")
    if not len(gram):
        return gram.new_zeros(0), gram
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(0), vectors.flip(1)
    count = int((energies > max(floor, len(gram) * EPS * float(energies[0]))).sum())
    return energies[:count], vectors[:, :count]


def _orthonormal(vectors: Tensor) -> Tensor:
    """To the last digits, the leading columns changed least (Cholesky-QR).

    Where the other side was decomposed, weak directions lose orthogonality to strong ones.
    """
    eye = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    for _ in range(3):
        overlap = vectors.T @ vectors
        off = float((overlap - eye).abs().max()) if len(eye) else 0.0
        if off <= 1e-12:
            return vectors
        factor, failed = torch.linalg.cholesky_ex(overlap)
        if failed:
            break
        vectors = torch.linalg.solve_triangular(factor.T, vectors, upper=True, left=False)
    raise ArithmeticError(f"the directions of a matrix are not orthonormal, but off by {off:.1e}")


def _check(energies: Tensor, vectors: Tensor, apply: Callable[[Tensor], Tensor]) -> None:
    """On random combinations of the directions, which stand for all of them and cost next to nothing."""
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(len(energies), 4, dtype=torch.float64, generator=draw).to(vectors.device)
    expected = vectors @ (energies[:, None] * probe)
    off = float((apply(vectors @ probe) - expected).norm())
    if not off <= 1e-10 * float(expected.norm()):
        raise ArithmeticError(f"the directions of a matrix do not reproduce it, but are off by {off:.1e}")


def count_by_share(share: float, rows: int, columns: int) -> int:
    """`⌊share · min(m, n)⌋`; 0.29 of 100 is 29, whatever floating point makes of it."""
    assert 0 <= share <= 1
    return math.floor(share * min(rows, columns) + 1e-9)


def count_by_energy(directions: Directions, share: float) -> int:
    """The fewest leading directions that hold this share of the energy of all."""
    assert 0 <= share <= 1
    held = torch.cat([directions.energies.new_zeros(1), directions.energies.cumsum(0)])
    return int((held < share * held[-1] * (1 - 1e-12)).sum())


def shares_by_importance(importance: Tensor, least: float, most: float) -> Tensor:
    """The paper's share `mrr + I (trr - mrr)` of each weight, its importance I being normalised to mean 1."""
    importance = importance.double()
    mean = importance.mean()
    if not (torch.isfinite(mean) and mean > 0):
        raise ArithmeticError(f"the mean importance of the weights is {float(mean):.3g}, it must be positive")
    return (least + importance / mean * (most - least)).clamp(0, 1)


@torch.no_grad()
def cosines(before: Tensor, after: Tensor) -> Tensor:
    """The paper's importance before it is averaged: `Σ cos(x, y)` over rows in fp64, rows of zeros counting 0."""
    assert before.shape == after.shape
    before, after = before.double(), after.double()
    sizes = before.norm(dim=-1) * after.norm(dim=-1)
    return ((before * after).sum(-1) / sizes.masked_fill(sizes == 0, 1)).sum()


def hold_flops(reading: str, rows: int, columns: int, right: int, left: int) -> int:
    """Operations of one `Subspace.hold_` or `free_` with `right` = k_v and `left` = k_u directions.

    input 4mn k_v; two_sided 4mn (k_v + k_u); paper the smaller of 4mn k_v + 4m k_v k_u and 4mn k_u + 4n k_v k_u.
    """
    if reading == "paper":
        return 2 * min(_block_flops(rows, columns, right, left))
    return 4 * rows * columns * (right + (left if reading == "two_sided" else 0))


def _block_flops(rows: int, columns: int, right: int, left: int) -> tuple[int, int]:
    """Of `Uᵀ (W V)` and `(Uᵀ W) V`; their counterparts `(U D) Vᵀ` and `U (D Vᵀ)` cost the same."""
    return 2 * rows * right * (columns + left), 2 * columns * left * (rows + right)


@dataclass(eq=False)
class Subspace:
    """What of one weight [m, n] may not change, under one of the readings."""

    reading: str
    right: Tensor  # V [n, k_v]
    left: Tensor  # U [m, k_u]; no columns under `input`
    image: Tensor  # W V as it must stay; no columns under `paper`
    coimage: Tensor  # Uᵀ W as it must stay, under `two_sided`; else no rows
    core: Tensor  # Uᵀ W V as it must stay, under `paper`; else empty

    def __post_init__(self) -> None:
        assert self.reading in READINGS

    @classmethod
    def empty(cls, reading: str, weight: Tensor) -> Subspace:
        """Protects nothing yet."""
        m, n = weight.shape
        shapes = ((n, 0), (m, 0), (m, 0), (0, n), (0, 0))
        return cls(reading, *(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes))

    @classmethod
    def of(cls, reading: str, tensors: dict[str, Tensor]) -> Subspace:
        """From what `tensors` gave."""
        return cls(reading, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}

    @torch.no_grad()
    def grow(self, weight: Tensor, right: Tensor, left: Tensor) -> None:
        """Append directions, orthonormal to those held (`input` ignores `left`), and fix what the weight gives there.

        The weight must be held already; what was fixed before stays as it is, bit for bit.
        """
        known, known_left = self.right.shape[1], self.left.shape[1]
        self.right = _appended(self.right, right)
        self.left = _appended(self.left, self.left[:, :0] if self.reading == "input" else left)
        exact, U, V = weight.double(), self.left.double(), self.right.double()
        if self.reading == "paper":
            core = (U.T @ exact @ V).to(self.core.dtype)
            core[:known_left, :known] = self.core
            self.core = core
            return
        self.image = torch.cat([self.image, (exact @ V[:, known:]).to(self.image.dtype)], 1)
        if self.reading == "two_sided":
            self.coimage = torch.cat([self.coimage, (U[:, known_left:].T @ exact).to(self.coimage.dtype)])

    def release(self, right: slice, left: slice) -> None:
        """Give directions back: these columns of `right` and `left` are free from now on."""
        (keep, keep_left) = (_without(basis.shape[1], part) for basis, part in ((self.right, right), (self.left, left)))
        self.right, self.left = self.right[:, keep], self.left[:, keep_left]
        if self.reading == "paper":
            self.core = self.core[keep_left][:, keep]
        else:
            self.image = self.image[:, keep]
            self.coimage = self.coimage[keep_left]

    @torch.no_grad()
    def hold_(self, weight: Tensor) -> None:
        """`weight` becomes the nearest matrix that keeps what is held, in place."""
        with products("ieee", weight.device):
            self._clear_(weight, -1)

    @torch.no_grad()
    def free_(self, gradient: Tensor) -> None:
        """`gradient` loses, in place, the part that `hold_` would undo; on a GPU up to about a thousandth of it."""
        with products("tf32", gradient.device):
            self._clear_(gradient, 0)

    def _clear_(self, matrix: Tensor, beta: int) -> None:
        """Take the protected part out of the matrix (beta 0), or of its difference to what is held (beta -1).

        Beside the matrix itself only [m, k] and [k, n] are written: `addmm` subtracts the target within the product.
        """
        U, V = self.left, self.right
        assert matrix.shape == (len(U), len(V))
        if self.reading == "paper":
            by_right, by_left = _block_flops(*matrix.shape, V.shape[1], U.shape[1])
            if by_right <= by_left:
                excess = torch.addmm(self.core, U.T, matrix @ V, beta=beta)
                matrix.addmm_(U @ excess, V.T, alpha=-1)
            else:
                excess = torch.addmm(self.core, U.T @ matrix, V, beta=beta)
                matrix.addmm_(U, excess @ V.T, alpha=-1)
            return
        matrix.addmm_(torch.addmm(self.image, matrix, V, beta=beta), V.T, alpha=-1)
        if self.reading == "two_sided":
            matrix.addmm_(U, torch.addmm(self.coimage, U.T, matrix, beta=beta), alpha=-1)

    @torch.no_grad()
    def leak(self, change: Tensor) -> float:
        """The size (Frobenius norm) of the protected part of a change of the weight, in fp64."""
        change, U, V = change.double(), self.left.double(), self.right.double()
        image = change @ V
        if self.reading == "paper":
            return float((U.T @ image).norm())
        coimage = U.T @ change - (U.T @ image) @ V.T  # without what the image counts already; empty under `input`
        return math.hypot(float(image.norm()), float(coimage.norm()))


@contextmanager
def products(kind: str, device: torch.device) -> Iterator[None]:
    """Within, fp32 matrices are multiplied so on GPUs: as they are (`ieee`), or at several times the speed (`tf32`)."""
    if device.type != "cuda":
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = kind
    try:
        yield
    finally:
        setting.fp32_precision = before


def _without(count: int, part: slice) -> list[int]:
    gone = set(range(count)[part])
    return [index for index in range(count) if index not in gone]


def room_of(reading: str, m: int, n: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """What `Subspace.tensors` gives of a weight [m, n] with so many directions a side: the sizes, of any values."""
    left = 0 if reading == "input" else count
    shapes = {
        "right": (n, count),
        "left": (m, left),
        "image": (m, 0 if reading == "paper" else count),
        "coimage": (count if reading == "two_sided" else 0, n),
        "core": (count, count) if reading == "paper" else (0, 0),
    }
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def _appended(basis: Tensor, new: Tensor) -> Tensor:
    """Both side by side, in the type of the first."""
    known, basis = basis.shape[1], torch.cat([basis, new.to(basis)], 1)
    eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    with products("ieee", basis.device):
        off = basis.T @ basis[:, known:] - eye[:, known:]
    assert not off.numel() or off.abs().max() < 1e-4, "the directions to append are not orthonormal to those held"
    return basis
