"""Protected subspaces against dense projectors and a general SVD in fp64, and invariants of any matrix."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dscl.maths import subspace
from dscl.maths.subspace import (
    PROJECTIONS,
    Directions,
    ProtectedSubspace,
    left_singular_vectors,
    moment_eigenvectors,
    projection_flops,
    protected_ratios_from_importance,
    rank_from_energy,
    rank_from_ratio,
    right_singular_directions,
    sum_cosine_similarity,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (24, 24), (40, 16), (16, 40)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(draw(seed, rows, columns)).Q


def matrix_with_values(values: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its right singular vectors."""
    right = orthonormal(2, columns, len(values))
    return orthonormal(1, rows, len(values)) @ values.diag() @ right.T, right


def low_rank(rows: int, columns: int, rank: int) -> Tensor:
    return draw(1, rows, rank) @ draw(2, rank, columns)


def angle(a: Tensor, b: Tensor) -> float:
    """The sine of the largest principal angle, precise for small ones too."""
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))


def orthonormality_error(vectors: Tensor) -> float:
    return float((vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max()) if vectors.numel() else 0.0


def norm(matrix: Tensor) -> float:
    return float(matrix.norm())


def make_protected(projection: str, weight: Tensor, right: int, left: int) -> ProtectedSubspace:
    """The leading directions of the weight itself on both sides."""
    space = ProtectedSubspace.empty(projection, weight)
    space.add_directions(
        weight,
        right_singular_directions(weight).vectors[:, :right],
        right_singular_directions(weight.T).vectors[:, :left],
    )
    return space


def free_part(space: ProtectedSubspace, change: Tensor) -> Tensor:
    """The free part of a change by dense projectors."""
    on_right, on_left = space.right @ space.right.T, space.left @ space.left.T
    if space.projection == "paper":
        return change - on_left @ change @ on_right
    return (torch.eye(len(on_left)) - on_left) @ change @ (torch.eye(len(on_right)) - on_right)


# ---- directions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0, 3])  # decades from the largest to the smallest singular value
def test_directions_are_those_of_an_svd(shape: tuple[int, int], spread: int) -> None:
    values = torch.logspace(0, -spread, min(shape), dtype=torch.float64) if spread else None
    root = matrix_with_values(values, *shape)[0] if values is not None else draw(0, *shape)
    _, expected, right = torch.linalg.svd(root, full_matrices=False)
    for directions in (right_singular_directions(root), moment_eigenvectors(root.T @ root)):
        assert directions.energies.dtype == directions.vectors.dtype == torch.float64
        torch.testing.assert_close(directions.energies, expected.square(), rtol=1e-7, atol=0)
        assert orthonormality_error(directions.vectors) < 1e-12
        for k in range(1, min(shape) + 1):
            assert angle(right[:k].T, directions.vectors[:, :k]) < 1e-6


def test_directions_of_a_large_weight_are_those_of_an_svd() -> None:
    root = draw(0, 192, 512)
    right = torch.linalg.svd(root, full_matrices=False)[2]
    for k in (1, 96, 191):
        assert (
            angle(right[:k].T, right_singular_directions(root.float()).vectors[:, :k]) < 1e-4
        )  # rounding of the matrix
        assert angle(right[:k].T, right_singular_directions(root).vectors[:, :k]) < 1e-10


def test_without_a_gap_the_energy_agrees_though_the_directions_may_not() -> None:
    """Rounding decides which of the directions of equal singular values come first, but not their energy."""
    values = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    root, right = matrix_with_values(values, 12, 30)
    directions = right_singular_directions(root)
    assert angle(right[:, :2], directions.vectors[:, :2]) > 0.1  # with these seeds
    torch.testing.assert_close(directions.energies, values.square())
    assert norm(root @ directions.vectors[:, :2]) == pytest.approx(math.sqrt(13), rel=1e-12)
    for k in (1, 4):  # where there is a gap, they agree
        assert angle(right[:, :k], directions.vectors[:, :k]) < 1e-10


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 200)])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_numerically_zero_directions_are_left_out(shape: tuple[int, int], rank: int, kind: torch.dtype) -> None:
    root = low_rank(*shape, rank).to(kind)
    assert len(right_singular_directions(root).energies) == rank
    assert right_singular_directions(root).vectors.shape == (shape[1], rank)
    assert moment_eigenvectors(root.T @ root).vectors.shape == (shape[1], rank)


def test_weak_directions_are_orthonormal_too() -> None:
    """Those of a wide matrix follow from U: at 1e-6 of the largest value with errors of 1e-10 before repair."""
    root, right = matrix_with_values(torch.logspace(0, -6, 60, dtype=torch.float64), 60, 200)
    directions = right_singular_directions(root)
    assert len(directions.energies) == 60
    assert orthonormality_error(directions.vectors) < 1e-12
    for k in (10, 30, 50):
        assert angle(right[:, :k], directions.vectors[:, :k]) < 1e-6


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
@pytest.mark.parametrize("left_over", [0, 1, 2, 10])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_was_taken_is_left_out(shape: tuple[int, int], left_over: int, kind: torch.dtype) -> None:
    """Also where the excluded columns span nearly all. In fp32 they are orthonormal to 1e-7; their span counts."""
    root, columns = draw(0, *shape), shape[1]
    excluded = orthonormal(3, columns, columns - left_over).to(kind)
    inside = torch.linalg.qr(excluded.double()).Q
    rest = root - root @ inside @ inside.T
    for directions in (right_singular_directions(root, excluded), moment_eigenvectors(root.T @ root, excluded)):
        assert directions.vectors.shape == (columns, min(shape[0], left_over))
        assert orthonormality_error(directions.vectors) < 1e-12
        assert float((excluded.double().T @ directions.vectors).abs().sum()) < 1e-10
        assert float(directions.energies.sum()) == pytest.approx(float(rest.square().sum()), rel=1e-10)
        torch.testing.assert_close((rest @ directions.vectors).square().sum(0), directions.energies, rtol=1e-7, atol=0)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_of_what_was_taken_nothing_remains(shape: tuple[int, int]) -> None:
    """Also where strong directions were rounded to fp32: rounding adds no directions."""
    root = low_rank(*shape, 6) * 1e3
    excluded = right_singular_directions(root).vectors.float()
    assert not len(right_singular_directions(root, excluded).energies)
    assert not len(moment_eigenvectors(root.T @ root, excluded).energies)
    assert len(right_singular_directions(root, excluded[:, :4]).energies) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_left_directions_follow_from_right_ones(shape: tuple[int, int]) -> None:
    """Also weak directions, which lose orthogonality where the other side is smaller."""
    values = torch.logspace(0, -5, min(shape), dtype=torch.float64)
    root = matrix_with_values(values, *shape)[0]
    left, right = torch.linalg.svd(root, full_matrices=False)[0], right_singular_directions(root)
    for k in range(len(values) + 1):
        vectors = left_singular_vectors(root, Directions(right.energies[:k], right.vectors[:, :k]))
        assert vectors.shape == (shape[0], k)
        assert orthonormality_error(vectors) < 1e-12
        assert not k or angle(left[:, :k], vectors) < 1e-6


def test_left_directions_are_those_of_the_transpose() -> None:
    root = draw(0, 20, 30)
    left = torch.linalg.svd(root)[0]
    assert angle(left[:, :5], right_singular_directions(root.T).vectors[:, :5]) < 1e-10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(8, 8), (3, 8), (8, 3)])
def test_what_is_not_finite_is_refused(bad: float, shape: tuple[int, int]) -> None:
    root = draw(0, *shape)
    root[1, 2] = bad
    excluded = orthonormal(1, shape[1], 1)
    for columns in (None, excluded):
        with pytest.raises(ArithmeticError, match="not finite"):
            right_singular_directions(root, columns)
        with pytest.raises(ArithmeticError, match="not finite"):
            moment_eigenvectors(root.T @ root, columns)


def test_a_wrong_decomposition_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    root, eigh = draw(0, 12, 12), torch.linalg.eigh

    def rotated(gram: Tensor) -> tuple[Tensor, Tensor]:
        return eigh(gram)[0], eigh(gram)[1] @ orthonormal(1, 12, 12)

    def duplicated(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(gram)
        vectors[:, 3] = vectors[:, 4]
        return values, vectors

    for wrong, message in ((rotated, "do not reproduce it"), (duplicated, "not orthonormal")):
        monkeypatch.setattr(torch.linalg, "eigh", wrong)
        with pytest.raises(ArithmeticError, match=message):
            right_singular_directions(root)
    monkeypatch.undo()
    with pytest.raises(ArithmeticError, match="do not reproduce it"):
        moment_eigenvectors(draw(0, 5, 5).abs() + 10 * torch.eye(5))  # not symmetric
    with pytest.raises(AssertionError, match="excluded columns are not orthonormal"):
        right_singular_directions(root, draw(1, 12, 3))


# ---- numbers of directions


@pytest.mark.parametrize(
    ("share", "rows", "columns", "count"),
    [(0.3, 10, 99, 3), (0.29, 200, 100, 29), (0.57, 100, 100, 57), (0.1 * 3, 10, 10, 3), (0.7 - 0.4, 10, 10, 3),
     (0.299, 10, 10, 2), (0.5, 7, 5, 2), (0.0, 5, 5, 0), (1.0, 5, 9, 5), (1.0, 0, 9, 0)],
)  # fmt: skip
def test_count_by_share(share: float, rows: int, columns: int, count: int) -> None:
    assert rank_from_ratio(share, rows, columns) == count


def test_count_by_energy_is_the_fewest_that_hold_the_share() -> None:
    def count(energies: list[float], share: float) -> int:
        return rank_from_energy(Directions(torch.tensor(energies, dtype=torch.float64), torch.zeros(0)), share)

    assert [count([6, 3, 1], share) for share in (0, 0.1, 0.6, 0.61, 0.9, 0.91, 1)] == [0, 1, 1, 2, 2, 3, 3]
    assert [count([0.1] * 10, share / 10) for share in range(11)] == list(range(11))
    assert [count([1 / 3] * 7, share) for share in (0, 0.99, 1)] == [0, 7, 7]
    assert [count([], share) for share in (0, 0.5, 1)] == [0, 0, 0]
    assert count([1, 1e-9], 1) == 2
    assert count([0.7, 0.3, 0.1], 7 / 11) == 1  # rounding aside: 0.7 < 7 / 11 * (0.7 + 0.3 + 0.1)


def test_shares_by_importance_are_the_papers() -> None:
    shares = protected_ratios_from_importance(torch.tensor([0.1, 0.2, 0.3, 0.2]), 0.1, 0.8)
    assert shares.tolist() == pytest.approx([0.45, 0.8, 1.0, 0.8])  # 0.1 + 1.5 · 0.7 = 1.15 is clipped
    assert protected_ratios_from_importance(torch.tensor([-0.5, 2.5]), 0.1, 0.8).tolist() == pytest.approx([0.0, 1.0])
    assert protected_ratios_from_importance(torch.tensor([3.0]), 0.1, 0.8).tolist() == pytest.approx([0.8])
    for bad in ([0.0, 0.0], [-1.0, 0.5], [math.nan, 1.0]):
        with pytest.raises(ArithmeticError, match="must be positive"):
            protected_ratios_from_importance(torch.tensor(bad), 0.1, 0.8)


def test_cosines_add_over_batches() -> None:
    before, after = draw(0, 4, 5, 6).float(), draw(1, 4, 5, 6).float()
    before[1, 2] = 0
    after[3, 4] = 0
    expected = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).sum()
    torch.testing.assert_close(sum_cosine_similarity(before, after), expected, rtol=1e-12, atol=0)
    parts = sum(sum_cosine_similarity(x, y) for x, y in zip(before, after, strict=True))
    torch.testing.assert_close(sum_cosine_similarity(before, after), parts, rtol=1e-12, atol=0)
    assert float(sum_cosine_similarity(before, before * 3)) == pytest.approx(19)
    assert float(sum_cosine_similarity(before[:0], after[:0])) == 0
    tiny = torch.full((1, 3), 1e-30)
    assert float(sum_cosine_similarity(tiny, tiny)) == pytest.approx(1)


# ---- the weight


def direction_counts(projection: str, rows: int, columns: int) -> list[tuple[int, int]]:
    """Numbers of right and left directions: none, few, unequal, all."""
    least = min(rows, columns)
    return sorted(
        {(0, 0), (1, 1), (least // 2, least // 2), (0, least), (least, 1), (least // 3, least), (least, least)}
    )


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_hold_is_the_dense_projection_of_the_change(projection: str, shape: tuple[int, int]) -> None:
    weight, change = draw(0, *shape), draw(9, *shape)
    for right, left in direction_counts(projection, *shape):
        space = make_protected(projection, weight, right, left)
        moved = weight + change
        space.project_weight_(moved)
        expected = weight + free_part(space, change)
        assert norm(moved - expected) < 1e-12 * norm(weight)
        assert space.protected_norm(moved - weight) < 1e-12 * norm(weight)
        assert space.protected_norm(change) == pytest.approx(norm(change - free_part(space, change)), abs=1e-12)
        again = moved.clone()
        space.project_weight_(again)
        assert norm(again - moved) < 1e-12 * norm(weight)
        gradient = change.clone()
        space.project_gradient_(gradient)  # the linear part of `project_weight_`
        assert norm(gradient - (moved - weight)) < 1e-12 * norm(weight)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_nothing_protected_changes_nothing_and_everything_stops_the_weight(projection: str) -> None:
    weight, change = draw(0, 12, 12).float(), draw(9, 12, 12).float()
    moved = weight + change
    expected = moved.clone()
    ProtectedSubspace.empty(projection, weight).project_weight_(moved)
    assert torch.equal(moved, expected)
    assert ProtectedSubspace.empty(projection, weight).protected_norm(change) == 0
    everything = make_protected(projection, weight, 12, 12)
    everything.project_weight_(moved)
    assert norm(moved - weight) < 1e-6 * norm(weight)
    assert everything.protected_norm(change) == pytest.approx(norm(change), rel=1e-6)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_zero_or_deficient_weight_is_held_as_well(projection: str) -> None:
    for weight in (torch.zeros(6, 9, dtype=torch.float64), low_rank(6, 9, 2)):
        space = ProtectedSubspace.empty(projection, weight)
        space.add_directions(weight, orthonormal(1, 9, 4), orthonormal(2, 6, 3))  # beyond its rank, as from activations
        moved = weight + draw(3, 6, 9)
        space.project_weight_(moved)
        assert norm(moved - weight - free_part(space, draw(3, 6, 9))) < 1e-12


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_constraint_does_not_drift_in_fp32(projection: str) -> None:
    weight = draw(0, 48, 64).float()
    space, moved = make_protected(projection, weight, 24, 24), weight.clone()
    assert {tensor.dtype for tensor in space.state_dict().values()} == {torch.float32}
    for step in range(200):
        moved += 0.1 * draw(step, 48, 64).float()
        space.project_weight_(moved)
    change = moved.double() - weight.double()
    assert norm(change) > 0.5 * norm(weight)
    assert space.protected_norm(change) < 1e-6 * norm(weight)


class Tf32(TorchDispatchMode):
    """Computes matrix products as in TF32: their factors are rounded to ten bits of the fraction."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            args = (*args[:-2], *(((m.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for m in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_quick_products_leave_in_gradients_is_undone_in_the_weight(
    projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace, "matmul_precision", lambda kind, device: Tf32() if kind == "tf32" else nullcontext())
    weight = draw(0, 48, 64).float()
    space, moved = make_protected(projection, weight, 24, 24), weight.clone()
    for step in range(50):
        gradient = draw(step, 48, 64).float()
        whole, exact = space.protected_norm(gradient), free_part(space, gradient)
        space.project_gradient_(gradient)
        assert 1e-5 * whole < space.protected_norm(gradient) < 1e-3 * whole
        assert norm(gradient - exact) < 1e-3 * whole  # the free part is not changed otherwise
        moved -= 0.1 * gradient
        space.project_weight_(moved)
    change = moved.double() - weight.double()
    assert norm(change) > 0.25 * norm(weight)
    assert space.protected_norm(change) < 1e-6 * norm(weight)


@pytest.mark.parametrize(("projection", "share"), [("input", 0.5), ("two_sided", 0.25), ("paper", 0.75)])
def test_how_much_stays_free_at_half_the_rank(projection: str, share: float) -> None:
    space = make_protected(projection, draw(0, 12, 12), 6, 6)
    images = []
    for unit in torch.eye(144, dtype=torch.float64):
        change = unit.reshape(12, 12).clone()
        space.project_gradient_(change)
        images.append(change.flatten())
    projector = torch.stack(images)
    assert int(torch.linalg.matrix_rank(projector)) == share * 144
    torch.testing.assert_close(projector, projector.T)
    torch.testing.assert_close(projector @ projector, projector)


def test_outputs_for_protected_inputs_stay() -> None:
    inputs = draw(1, 500, 10) @ draw(2, 10, 32)  # of a task whose inputs span 10 of 32 dimensions
    weight = draw(0, 20, 32).float()
    moved = weight + draw(5, 20, 32).float()
    before, free = inputs.float() @ weight.T, inputs.float() @ moved.T
    directions = moment_eigenvectors(inputs.T @ inputs)
    assert len(directions.energies) == 10
    space = ProtectedSubspace.empty("input", weight)
    space.add_directions(weight, directions.vectors, torch.zeros(20, 0))
    space.project_weight_(moved)
    assert norm(moved - weight) > 0.5 * norm(weight)
    assert norm(inputs.float() @ moved.T - before) < 1e-6 * norm(before)
    assert norm(free - before) > 0.5 * norm(before)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_growth_is_nested(projection: str, kind: torch.dtype) -> None:
    """Over tasks: earlier directions stay bit for bit, and the last weight meets every earlier constraint."""
    weight = draw(0, 20, 30).to(kind)
    space, first, snapshots = ProtectedSubspace.empty(projection, weight), weight.clone(), []
    precision = 1e-6 if kind == torch.float32 else 1e-12
    for task in range(5):
        before = ProtectedSubspace.from_state_dict(
            projection, {name: tensor.clone() for name, tensor in space.state_dict().items()}
        )
        count = (4, 0, 3, 5, 2)[task]
        right = right_singular_directions(weight, space.right).vectors[:, :count]
        left = right_singular_directions(weight.T, space.left).vectors[:, : (4, 3, 0, 2, 2)[task]]
        space.add_directions(weight, right, left)
        for name, tensor in before.state_dict().items():
            entries = getattr(space, name)[tuple(map(slice, tensor.shape))]
            assert torch.equal(entries, tensor), name
        snapshots.append((ProtectedSubspace.from_state_dict(projection, space.state_dict()), weight.clone()))
        assert orthonormality_error(space.right.double()) < precision
        assert orthonormality_error(space.left.double()) < precision
        weight = weight + draw(task + 50, 20, 30).to(kind)
        space.project_weight_(weight)
    assert space.right.shape == (30, 14)
    assert space.left.shape == (20, 0 if projection == "input" else 11)
    assert norm(weight - first) > 0.2 * norm(first)
    for earlier, weight_then in snapshots:
        assert earlier.protected_norm(weight.double() - weight_then.double()) < 2 * precision * norm(first)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_removed_directions_move_again_and_the_rest_stays(projection: str) -> None:
    """Afterwards the subspace equals one that was built of the remaining directions alone."""
    weight = draw(0, 12, 10)
    space = make_protected(projection, weight, 5, 4)
    left = slice(1, 1) if projection == "input" else slice(1, 3)
    right, other = space.right.clone(), space.left.clone()
    space.remove_directions(slice(2, 4), left)
    remaining = ProtectedSubspace.empty(projection, weight)
    rows = [] if projection == "input" else [0, 3]
    remaining.add_directions(weight, right[:, [0, 1, 4]], other[:, rows])
    for name, tensor in remaining.state_dict().items():
        torch.testing.assert_close(space.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_growth_refuses_directions_that_are_held() -> None:
    weight = draw(0, 8, 8)
    space = make_protected("two_sided", weight, 3, 3)
    for right, left in ((space.right[:, :1], space.left[:, :0]), (space.right[:, :0], draw(1, 8, 2))):
        with pytest.raises(AssertionError, match="not orthonormal to the basis"):
            ProtectedSubspace.from_state_dict(space.projection, space.state_dict()).add_directions(weight, right, left)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_parameter_is_held_through_a_checkpoint(projection: str) -> None:
    weight = torch.nn.Parameter(draw(0, 10, 14).float())
    space = make_protected(projection, weight, 4, 5)
    stored = space.state_dict()
    assert list(stored) == ["right", "left", "image", "coimage", "core"]
    assert not any(tensor.requires_grad for tensor in stored.values())
    first = weight.detach().clone()
    weight.data += 1
    again = weight.detach().clone()
    space.project_weight_(weight)
    ProtectedSubspace.from_state_dict(projection, stored).project_weight_(again)
    assert torch.equal(weight, again)
    assert space.protected_norm(weight.detach() - first) < 1e-6 * norm(first)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("sizes", [(10, 14, 4, 4), (14, 10, 4, 4), (10, 14, 2, 7), (10, 14, 7, 2), (10, 14, 0, 3)])
def test_operations_are_those_of_the_products(
    projection: str, sizes: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by torch, whose counter lacks the in-place product."""

    def in_place(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    rows, columns, right, left = sizes
    weight = draw(0, rows, columns)
    space = make_protected(projection, weight, right, left)
    for work in (space.project_weight_, space.project_gradient_):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            work(weight)
        assert counter.get_total_flops() == projection_flops(projection, rows, columns, right, left)
    if projection == "paper":  # whichever side is multiplied first
        once = weight + 1
        expected = once.clone()
        space.project_weight_(expected)
        forward = subspace._paper_projection_flops(rows, columns, right, left)
        monkeypatch.setattr(subspace, "_paper_projection_flops", lambda *_: forward[::-1])
        space.project_weight_(once)
        torch.testing.assert_close(once, expected)
