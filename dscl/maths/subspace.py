"""OSFT's constraint (arXiv 2504.07097): protected subspaces of a weight, and projections that keep the weight in them.

`W` [m, n] maps inputs of width n to outputs of width m. Orthonormal columns `V` [n, k_v] of the input space and
`U` [m, k_u] of the output space span the protected directions. Let `Δ` be the change of the weight since these
directions were added. There are three projections, which differ in what they require of `Δ`:

- `input`: `Δ V = 0`. The output for every input in the span of V is unchanged. With half of the rank protected, 50% of
  the dimensions of a square matrix are free.
- `two_sided`: `Δ V = 0` and `Uᵀ Δ = 0`, as in the paper's released code; 25% are free.
- `paper`: `Uᵀ Δ V = 0`, the paper's equation `∇ ← ∇ - UUᵀ ∇ VVᵀ`; 75% are free.

Not only the gradient is projected but the weight itself, after every optimizer step. The target is the product stored
when the directions were added (`W V`, `Uᵀ W` or `Uᵀ W V`), not the weight's previous value. So the projection undoes
what the optimizer did to the protected part, errors do not accumulate, and no copy of the weight is needed. In fp32 the
protected part of a change is about 1e-7 of the weight's norm, however many steps were made.

On GPUs, TF32 products would leave larger errors. They are used for gradients only: the projection of the weight, in
full fp32, removes the errors that they leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dscl.maths.projections import PROJECTIONS

EPS = torch.finfo(torch.float64).eps


class Directions(NamedTuple):
    """Orthonormal columns with their energies (squared singular values, or eigenvalues), the largest first."""

    energies: Tensor  # [r] in fp64, descending; values that are zero up to rounding are left out
    vectors: Tensor  # [d, r] in fp64


@torch.no_grad()
def right_singular_directions(matrix: Tensor, excluded: Tensor | None = None) -> Directions:
    """Right singular vectors of a matrix, restricted to the complement of the orthonormal columns `excluded`.

    They are eigenvectors of `matrixᵀ matrix`, computed from the smaller of the two Gram matrices. Directions with
    separated singular values are accurate to 1e-6, down to 1e-5 of the largest singular value. Those below about 1e-6
    of it are left out.
    """
    complement = _OrthogonalComplement(excluded)
    rounding = max(_relative_rounding(matrix, excluded), max(matrix.shape) * EPS)
    matrix = matrix.double()
    floor = rounding**2 * float(matrix.square().sum())
    matrix = complement.to_coordinates(matrix)
    is_wide = matrix.shape[0] < matrix.shape[1]
    energies, vectors = _top_eigenvectors(matrix @ matrix.T if is_wide else matrix.T @ matrix, floor)
    vectors = _orthonormalize(matrix.T @ (vectors / energies.sqrt()) if is_wide else vectors)
    _check_eigenvectors(energies, vectors, lambda probe: matrix.T @ (matrix @ probe))
    return Directions(energies, complement.from_coordinates(vectors))


@torch.no_grad()
def moment_eigenvectors(moment: Tensor, excluded: Tensor | None = None) -> Directions:
    """Eigenvectors of a symmetric positive semidefinite matrix, such as the second moment of a layer's inputs.

    They are restricted to the complement of the orthonormal columns `excluded`.
    """
    complement, rounding = _OrthogonalComplement(excluded), max(_relative_rounding(moment), len(moment) * EPS)
    moment = moment.double()
    floor = rounding * float(moment.norm())
    moment = complement.to_coordinates(complement.to_coordinates(moment).T)
    energies, vectors = _top_eigenvectors(moment, floor)
    vectors = _orthonormalize(vectors)
    _check_eigenvectors(energies, vectors, moment.matmul)
    return Directions(energies, complement.from_coordinates(vectors))


@torch.no_grad()
def left_singular_vectors(matrix: Tensor, right: Directions) -> Tensor:
    """The left singular vectors of a matrix, computed from its right ones without a second decomposition."""
    return _orthonormalize(matrix.double() @ (right.vectors / right.energies.sqrt()))


def _relative_rounding(*tensors: Tensor | None) -> float:
    """The largest relative rounding error of the tensors' types; 16-bit tensors count as exact values in 32 bits."""
    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors if tensor is not None]
    return max(torch.finfo(dtype).eps for dtype in dtypes)


class _OrthogonalComplement:
    """Coordinates of the orthogonal complement of orthonormal columns, by Householder reflections.

    Accurate to 1e-15, even for columns in fp32. A decomposition in these coordinates works on a smaller matrix, and all
    its directions, however weak, are orthogonal to the columns.
    """

    def __init__(self, excluded: Tensor | None) -> None:
        self.count = 0 if excluded is None else excluded.shape[1]
        if excluded is not None and self.count:
            self.factors = torch.geqrf(excluded.double())
            error = self.factors[0].diagonal().abs() - 1
            assert error.abs().max() < 1e-3, "the excluded columns are not orthonormal"

    def to_coordinates(self, rows: Tensor) -> Tensor:
        """[..., d] -> [..., d - count]: the rows' components within the complement."""
        return torch.ormqr(*self.factors, rows, left=False)[:, self.count :] if self.count else rows

    def from_coordinates(self, vectors: Tensor) -> Tensor:
        """[d - count, r] -> [d, r]: columns given within the complement, in the original space."""
        zero_padded = torch.cat([vectors.new_zeros(self.count, vectors.shape[1]), vectors])
        return torch.ormqr(*self.factors, zero_padded) if self.count else vectors


def _top_eigenvectors(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues above `floor` and above their rounding error, descending, and their eigenvectors."""
    if not torch.isfinite(gram).all():
        raise ArithmeticError("the matrix to decompose is not finite")
    if not len(gram):
        return gram.new_zeros(0), gram
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(0), vectors.flip(1)
    count = int((energies > max(floor, len(gram) * EPS * float(energies[0]))).sum())
    return energies[:count], vectors[:, :count]


def _orthonormalize(vectors: Tensor) -> Tensor:
    """Make columns orthonormal to 1e-12 by Cholesky QR, which changes the leading columns least.

    This is needed where the other Gram matrix was decomposed: weak directions are then not orthogonal to strong ones.
    """
    eye = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    for _ in range(3):
        overlap = vectors.T @ vectors
        error = float((overlap - eye).abs().max()) if len(eye) else 0.0
        if error <= 1e-12:
            return vectors
        factor, failed = torch.linalg.cholesky_ex(overlap)
        if failed:
            break
        vectors = torch.linalg.solve_triangular(factor.T, vectors, upper=True, left=False)
    raise ArithmeticError(f"the directions of a matrix are not orthonormal, but off by {error:.1e}")


def _check_eigenvectors(energies: Tensor, vectors: Tensor, apply: Callable[[Tensor], Tensor]) -> None:
    """Check the eigenvectors on a few random combinations of them, which is cheap."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(energies), 4, dtype=torch.float64, generator=generator).to(vectors.device)
    expected = vectors @ (energies[:, None] * probe)
    error = float((apply(vectors @ probe) - expected).norm())
    if not error <= 1e-10 * float(expected.norm()):
        raise ArithmeticError(f"the directions of a matrix do not reproduce it, but are off by {error:.1e}")


def rank_from_ratio(ratio: float, rows: int, columns: int) -> int:
    """The number of directions to protect, `k = ⌊ratio · min(m, n)⌋`, safe from rounding: 0.29 of 100 is 29."""
    assert 0 <= ratio <= 1
    return math.floor(ratio * min(rows, columns) + 1e-9)


def rank_from_energy(directions: Directions, threshold: float) -> int:
    """The smallest number of leading directions that hold this fraction of the total energy."""
    assert 0 <= threshold <= 1
    cumulative = torch.cat([directions.energies.new_zeros(1), directions.energies.cumsum(0)])
    return int((cumulative < threshold * cumulative[-1] * (1 - 1e-12)).sum())


def protected_ratios_from_importance(importance: Tensor, min_ratio: float, max_ratio: float) -> Tensor:
    """The paper's protected fraction of each weight, `mrr + I (trr - mrr)`, with importance I of mean 1."""
    importance = importance.double()
    mean = importance.mean()
    if not (torch.isfinite(mean) and mean > 0):
        raise ArithmeticError(f"the mean importance of the weights is {float(mean):.3g}, it must be positive")
    return (min_ratio + importance / mean * (max_ratio - min_ratio)).clamp(0, 1)


@torch.no_grad()
def sum_cosine_similarity(inputs: Tensor, outputs: Tensor) -> Tensor:
    """`Σ cos(x, Wx)` over tokens in fp64; the paper's importance is the mean. Rows of zeros count 0."""
    assert inputs.shape == outputs.shape  # [..., width]
    inputs, outputs = inputs.double(), outputs.double()
    norms = inputs.norm(dim=-1) * outputs.norm(dim=-1)
    return ((inputs * outputs).sum(-1) / norms.masked_fill(norms == 0, 1)).sum()


def projection_flops(projection: str, rows: int, columns: int, right: int, left: int) -> int:
    """FLOPs of one projection of a weight or gradient, with `right` = k_v and `left` = k_u directions.

    input: 4mn k_v; two_sided: 4mn (k_v + k_u); paper: the smaller of 4mn k_v + 4m k_v k_u and 4mn k_u + 4n k_v k_u.
    """
    if projection == "paper":
        return 2 * min(_paper_projection_flops(rows, columns, right, left))
    return 4 * rows * columns * (right + (left if projection == "two_sided" else 0))


def _paper_projection_flops(rows: int, columns: int, right: int, left: int) -> tuple[int, int]:
    """FLOPs of `Uᵀ (W V)` and of `(Uᵀ W) V`; the products back, `(U D) Vᵀ` and `U (D Vᵀ)`, cost the same."""
    return 2 * rows * right * (columns + left), 2 * columns * left * (rows + right)


@dataclass(eq=False)
class ProtectedSubspace:
    """The protected directions of one weight [m, n], and the products with the weight that must stay fixed."""

    projection: str  # input, two_sided or paper
    right: Tensor  # V [n, k_v]
    left: Tensor  # U [m, k_u]; k_u = 0 for `input`
    image: Tensor  # the fixed W V [m, k_v]; [m, 0] for `paper`
    coimage: Tensor  # the fixed Uᵀ W [k_u, n] for `two_sided`, else [0, n]
    core: Tensor  # the fixed Uᵀ W V [k_u, k_v] for `paper`, else [0, 0]

    def __post_init__(self) -> None:
        assert self.projection in PROJECTIONS

    @classmethod
    def empty(cls, projection: str, weight: Tensor) -> ProtectedSubspace:
        """A subspace without directions, which protects nothing."""
        m, n = weight.shape
        shapes = ((n, 0), (m, 0), (m, 0), (0, n), (0, 0))
        return cls(projection, *(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes))

    @classmethod
    def from_state_dict(cls, projection: str, tensors: dict[str, Tensor]) -> ProtectedSubspace:
        """Rebuild a subspace from its `state_dict`."""
        return cls(projection, **tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint, by name."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}

    @property
    def num_directions(self) -> int:
        """The number of all input directions and, except for `input`, output directions, protected or free."""
        return len(self.right) + (0 if self.projection == "input" else len(self.left))

    @property
    def num_free(self) -> int:
        """The number of directions that are not protected."""
        return self.num_directions - self.right.shape[1] - self.left.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the weight has no free direction in which it can change."""
        full = [basis.shape[1] == len(basis) for basis in (self.right, self.left)]
        return all(full) if self.projection == "paper" else any(full)

    @torch.no_grad()
    def add_directions(self, weight: Tensor, right: Tensor, left: Tensor) -> None:
        """Append directions, orthonormal to the present ones, and fix the weight's products with them.

        `input` ignores `left`. The weight must already be projected. The products fixed earlier keep their bits.
        """
        old_right, old_left = self.right.shape[1], self.left.shape[1]
        self.right = _append_columns(self.right, right)
        self.left = _append_columns(self.left, self.left[:, :0] if self.projection == "input" else left)
        exact, U, V = weight.double(), self.left.double(), self.right.double()
        if self.projection == "paper":
            core = (U.T @ exact @ V).to(self.core.dtype)
            core[:old_left, :old_right] = self.core
            self.core = core
            return
        self.image = torch.cat([self.image, (exact @ V[:, old_right:]).to(self.image.dtype)], 1)
        if self.projection == "two_sided":
            self.coimage = torch.cat([self.coimage, (U[:, old_left:].T @ exact).to(self.coimage.dtype)])

    def remove_directions(self, right: slice, left: slice) -> None:
        """Stop protecting these columns of `right` and `left`."""
        keep_right = _remaining_indices(self.right.shape[1], right)
        keep_left = _remaining_indices(self.left.shape[1], left)
        self.right, self.left = self.right[:, keep_right], self.left[:, keep_left]
        if self.projection == "paper":
            self.core = self.core[keep_left][:, keep_right]
        else:
            self.image = self.image[:, keep_right]
            self.coimage = self.coimage[keep_left]

    @torch.no_grad()
    def project_weight_(self, weight: Tensor) -> None:
        """Replace the weight, in place, by the nearest matrix with the fixed products."""
        with matmul_precision("ieee", weight.device):
            self._subtract_protected_(weight, -1)

    @torch.no_grad()
    def project_gradient_(self, gradient: Tensor) -> None:
        """Remove the protected part of a gradient, in place; on a GPU about 1/1000 of it may remain (TF32)."""
        with matmul_precision("tf32", gradient.device):
            self._subtract_protected_(gradient, 0)

    def _subtract_protected_(self, matrix: Tensor, beta: int) -> None:
        """Subtract, in place, the protected part of the matrix (beta 0) or of its deviation from the target (beta -1).

        `addmm` subtracts the target within the product, so that only buffers of [m, k] and [k, n] are allocated.
        """
        U, V = self.left, self.right
        assert matrix.shape == (len(U), len(V))
        if self.projection == "paper":
            flops_right_first, flops_left_first = _paper_projection_flops(*matrix.shape, V.shape[1], U.shape[1])
            if flops_right_first <= flops_left_first:
                excess = torch.addmm(self.core, U.T, matrix @ V, beta=beta)
                matrix.addmm_(U @ excess, V.T, alpha=-1)
            else:
                excess = torch.addmm(self.core, U.T @ matrix, V, beta=beta)
                matrix.addmm_(U, excess @ V.T, alpha=-1)
            return
        matrix.addmm_(torch.addmm(self.image, matrix, V, beta=beta), V.T, alpha=-1)
        if self.projection == "two_sided":
            matrix.addmm_(U, torch.addmm(self.coimage, U.T, matrix, beta=beta), alpha=-1)

    @torch.no_grad()
    def protected_norm(self, change: Tensor) -> float:
        """The Frobenius norm of the protected part of a change of the weight, in fp64."""
        change, U, V = change.double(), self.left.double(), self.right.double()
        image = change @ V
        if self.projection == "paper":
            return float((U.T @ image).norm())
        coimage = U.T @ change - (U.T @ image) @ V.T  # without the part that `image` counts; empty for `input`
        return math.hypot(float(image.norm()), float(coimage.norm()))


@contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Set the precision of fp32 matrix products on GPUs: full fp32 (`ieee`), or TF32 (`tf32`), several times faster."""
    if device.type != "cuda":
        yield
        return
    backend = torch.backends.cuda.matmul
    previous = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = previous


def _remaining_indices(count: int, removed: slice) -> list[int]:
    removed_indices = set(range(count)[removed])
    return [index for index in range(count) if index not in removed_indices]


def placeholder_state(projection: str, m: int, n: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """Zero tensors with the shapes of `state_dict` for a weight [m, n] with `count` directions a side.

    Memory planning uses them before any direction is known.
    """
    left = 0 if projection == "input" else count
    shapes = {
        "right": (n, count),
        "left": (m, left),
        "image": (m, 0 if projection == "paper" else count),
        "coimage": (count if projection == "two_sided" else 0, n),
        "core": (count, count) if projection == "paper" else (0, 0),
    }
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def _append_columns(basis: Tensor, new: Tensor) -> Tensor:
    """Append columns to a basis, in the basis' dtype, after checking that they are orthonormal to it."""
    old_count, basis = basis.shape[1], torch.cat([basis, new.to(basis)], 1)
    eye = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    with matmul_precision("ieee", basis.device):
        error = basis.T @ basis[:, old_count:] - eye[:, old_count:]
    assert not error.numel() or error.abs().max() < 1e-4, "the directions to append are not orthonormal to the basis"
    return basis
