"""The analytic router against its written-out equations and the paper's recursion; what must be equal bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from dscl.maths import rls
from dscl.maths.rls import MIN_SHORTFALL, FeatureMap, FittedRouter, TaskStatistics, compute_statistics, fit_router

DIM, NUM_FEATURES = 24, 96


def make_states(seed: int, count: int, spread: float = 1.0, dim: int = DIM) -> Tensor:
    """States of one task: a common part of all tasks, the task's own, and each prompt's own."""
    common = 2 * torch.randn(dim, generator=torch.Generator().manual_seed(999))
    draw = torch.Generator().manual_seed(seed)
    return common + torch.randn(dim, generator=draw) + spread * torch.randn(count, dim, generator=draw)


def make_tasks(count: int, tasks: int = 5, num_features: int = NUM_FEATURES) -> tuple[FeatureMap, dict[str, Tensor]]:
    expansion = FeatureMap(DIM, num_features, seed=3)
    return expansion, {f"task{t}": expansion.quantize(make_states(t, count + 7 * t)) for t in range(tasks)}


def unpack_gram(statistics: TaskStatistics) -> Tensor:
    """The Gram matrix by its definition of packing: the upper triangle row after row."""
    gram = torch.zeros(statistics.num_features, statistics.num_features, dtype=torch.float64)
    place = torch.triu_indices(statistics.num_features, statistics.num_features)
    gram[place[0], place[1]] = statistics.gram.double()
    return gram.triu() + gram.triu(1).T


def equal_routers(a: FittedRouter, b: FittedRouter) -> bool:
    assert a.ood_detector is not None
    assert b.ood_detector is not None
    tensors = [
        (a.weights, b.weights),
        (a.mean, b.mean),
        (a.ood_detector.factor, b.ood_detector.factor),
        (a.ood_detector.shortfall, b.ood_detector.shortfall),
        (a.ood_detector.leverage, b.ood_detector.leverage),
    ]
    numbers = (a.names, a.intercept, a.ridge, a.condition) == (b.names, b.intercept, b.ridge, b.condition)
    return numbers and all(torch.equal(x, y) for x, y in tensors)


def equal_statistics(a: TaskStatistics, b: TaskStatistics) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("divisor", [None, 8])
def test_features_are_those_of_integer_arithmetic(divisor: int | None) -> None:
    expansion = FeatureMap(dim=40, num_features=30, seed=11)
    expansion.divisor = divisor or expansion.divisor
    rows = expansion.quantize(make_states(0, 50, dim=40))
    entries = []
    for i in range(40):
        digest = hashlib.shake_256(f"11:{i}".encode()).digest(30 * 4)
        entries.append([sum((b >> 4) + b % 16 for b in digest[4 * j : 4 * j + 4]) - 60 for j in range(30)])
    expected = []
    for row in rows.tolist():
        products = [sum(q * entries[i][j] for i, q in enumerate(row)) for j in range(30)]
        expected.append([min(255, (max(0, p) + expansion.divisor // 2) // expansion.divisor) for p in products])
    features = expansion.compute_features(rows)
    assert features.tolist() == expected
    assert 0.2 < float((features == 0).double().mean()) < 0.8  # the ReLU cuts, and not everything
    assert (float((features == 255).double().mean()) < 0.01) == (divisor is None)


@pytest.mark.parametrize(("dim", "extreme"), [(8192, False), (16384, True)])
def test_features_are_exact_for_large_models_and_extreme_rows(
    dim: int, extreme: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 is exact up to 2**24, which no row of a model of up to 20,000 dimensions exceeds."""
    monkeypatch.setattr(rls, "FEATURE_LIMIT", 1 << 24)
    expansion = FeatureMap(dim, 8, seed=0)
    expansion.divisor = 2
    matrix = expansion._draw_integers()
    rows = expansion.quantize(make_states(0, 4, dim=dim))
    if extreme:
        rows = (matrix[:, :4].T.sign() * 127).to(torch.int8)
    products = rows.long() @ matrix.long()
    assert (int(products.max()) > 1 << 24) == extreme
    assert torch.equal(expansion.compute_features(rows).long(), (products.clamp(min=0) + 1) // 2)


def test_a_row_has_the_same_features_in_any_batch() -> None:
    expansion, tasks = make_tasks(50)
    rows = torch.cat(list(tasks.values()))
    alone = torch.cat([expansion.compute_features(row[None]) for row in rows])
    assert torch.equal(expansion.compute_features(rows), alone)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expansion.compute_features(rows), alone)


def test_rows_keep_no_graph() -> None:
    states = make_states(0, 4).requires_grad_()
    assert not any(
        FeatureMap(DIM, NUM_FEATURES, seed=0, exact=is_exact).quantize(states).requires_grad
        for is_exact in (True, False)
    )


def test_rows_forget_scale_and_survive_huge_entries() -> None:
    expansion = FeatureMap(DIM, NUM_FEATURES, seed=0)
    states = make_states(0, 200)
    rows = expansion.quantize(states)
    assert rows.dtype == torch.int8
    assert torch.equal(expansion.quantize(states * 1000), rows)
    noisy = expansion.quantize(states * (1 + 1e-6 * torch.randn_like(states)))
    assert float((noisy != rows).double().mean()) < 1e-3
    large = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    large[:, :2] *= 1000
    assert (
        len(FeatureMap(4096, NUM_FEATURES, seed=0).quantize(large)[:, 2:].unique()) > 40
    )  # the others are not rounded to nothing
    assert not expansion.quantize(torch.zeros(3, DIM)).any()
    assert expansion.quantize(torch.zeros(0, DIM)).shape == (0, DIM)


@pytest.mark.parametrize("count", [0, 1, 700])
def test_statistics_are_the_sums(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rls, "STRIPE_ROWS", 40)
    monkeypatch.setattr(rls, "PROMPT_CHUNK", 300)
    expansion = FeatureMap(DIM, NUM_FEATURES, seed=3)
    rows = expansion.quantize(make_states(0, count))
    features = expansion.compute_features(rows).long()
    statistics = compute_statistics(rows, expansion)
    assert torch.equal(unpack_gram(statistics).long(), features.T @ features)
    assert torch.equal(statistics.feature_sum.long(), features.sum(0))
    assert statistics.count.tolist() == [count]
    assert equal_statistics(
        statistics.compact(), TaskStatistics(statistics.gram.int(), statistics.feature_sum, statistics.count)
    )


def test_sums_of_the_largest_features_are_exact() -> None:
    """255² is odd: one addition beyond 2**24 in fp32 would round."""

    class Largest(FeatureMap):
        def compute_features(self, rows: Tensor) -> Tensor:
            return torch.full((len(rows), self.num_features), 255.0)

    statistics = compute_statistics(torch.zeros(5001, DIM, dtype=torch.int8), Largest(DIM, 32, seed=0))
    assert statistics.gram.unique().tolist() == [5001 * 255**2]


def test_compact_keeps_what_does_not_fit() -> None:
    expansion, tasks = make_tasks(30)
    statistics = compute_statistics(tasks["task0"], expansion)
    large = TaskStatistics(statistics.gram + 2**40, statistics.feature_sum, statistics.count)
    assert large.compact().gram.dtype == torch.int64
    assert torch.equal(large.compact().gram.double(), large.gram)
    broken = TaskStatistics(statistics.gram + 0.5, statistics.feature_sum, statistics.count)
    assert equal_statistics(broken.compact(), broken)


def test_any_order_of_tasks_gives_the_same_bits() -> None:
    expansion, tasks = make_tasks(60)
    parts = {name: compute_statistics(rows, expansion) for name, rows in tasks.items()}
    expected = fit_router(parts)
    features = expansion.compute_features(torch.cat(list(tasks.values())))
    routes = expected.route(features)
    for order in itertools.permutations(parts):
        solution = fit_router({name: parts[name] for name in order})
        assert equal_routers(solution, expected)
        assert all(torch.equal(a, b) for a, b in zip(solution.route(features), routes, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_any_split_into_shares_gives_the_same_bits(world: int) -> None:
    expansion, tasks = make_tasks(60)
    whole = {name: compute_statistics(rows, expansion) for name, rows in tasks.items()}
    parts = {}
    for name, rows in tasks.items():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(world))
        shares = [compute_statistics(rows[order[rank::world]], expansion) for rank in range(world)]
        parts[name] = shares[0]
        for share in shares[1:]:
            parts[name] += share
        assert equal_statistics(parts[name], whole[name])
    assert equal_routers(fit_router(parts), fit_router(whole))


def test_what_was_added_can_be_taken_away_to_the_last_bit() -> None:
    expansion, tasks = make_tasks(60)
    first, second = (compute_statistics(tasks[name], expansion) for name in ("task0", "task1"))
    assert equal_statistics(first + second - second, first)
    assert equal_statistics(first.compact() + second.compact() - second.compact(), first)


def features_and_labels(expansion: FeatureMap, tasks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features of all prompts and their one-hot labels."""
    names = sorted(tasks)
    labels = torch.cat([torch.full((len(tasks[name]),), t) for t, name in enumerate(names)])
    features = torch.cat([expansion.compute_features(tasks[name]).double() for name in names])
    return features, torch.nn.functional.one_hot(labels).double()


@pytest.mark.parametrize("count", [12, 60])
def test_weights_solve_the_penalised_least_squares(count: int) -> None:
    """The reference: the normal equations with a weight for each prompt and the intercept as an unpenalised column."""
    expansion, tasks = make_tasks(count)
    features, labels = features_and_labels(expansion, tasks)
    shares = labels @ (1 / (5 * labels.sum(0)))
    solution = fit_router({name: compute_statistics(rows, expansion) for name, rows in tasks.items()}, ridge=0.1)
    mean = shares @ features
    ridge = 0.1 * float((shares @ features.square() - mean.square()).mean())
    design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    penalty = torch.full((NUM_FEATURES + 1,), ridge, dtype=torch.float64)
    penalty[-1] = 0
    normal = design.T @ (shares[:, None] * design) + penalty.diag()
    expected = torch.linalg.solve(normal, design.T @ (shares[:, None] * labels))
    assert relative_error(solution.weights, expected[:-1]) < 1e-8
    assert relative_error(solution.scores(features), design @ expected) < 1e-8
    assert solution.condition == pytest.approx(
        float(torch.linalg.cond(features.T @ (shares[:, None] * features) - torch.outer(mean, mean)
                                + ridge * torch.eye(NUM_FEATURES))), rel=0.1)  # fmt: skip


def test_every_task_counts_alike() -> None:
    expansion, tasks = make_tasks(40)
    parts = {name: compute_statistics(rows, expansion) for name, rows in tasks.items()}
    expected = fit_router(parts, ridge=0.1)
    parts["task2"] = parts["task2"] + parts["task2"] + parts["task2"]
    assert relative_error(fit_router(parts, ridge=0.1).weights, expected.weights) < 1e-9


@pytest.mark.parametrize("kind", ["paper", "exact"])
def test_the_papers_form_is_its_equation_and_its_recursion(kind: str) -> None:
    """(G + λI)⁻¹C, and the same by the recursive update over blocks of prompts, in the paper's setting λ = 100."""
    expansion = FeatureMap(DIM, NUM_FEATURES, seed=3, exact=kind == "exact")
    tasks = {f"task{t}": expansion.quantize(make_states(t, 50 + 9 * t)) for t in range(5)}
    solution = fit_router({name: compute_statistics(rows, expansion) for name, rows in tasks.items()}, paper_form=True)
    features, labels = features_and_labels(expansion, tasks)
    assert (features == 0).any()  # the ReLU is there
    eye = torch.eye(NUM_FEATURES, dtype=torch.float64)
    expected = torch.linalg.solve(features.T @ features + 100 * eye, features.T @ labels)
    assert relative_error(solution.weights, expected) < 1e-8
    inverse, weights = eye / 100, torch.zeros(NUM_FEATURES, 5, dtype=torch.float64)
    for block, y in zip(features.split(16), labels.split(16), strict=True):
        middle = torch.linalg.inv(torch.eye(len(block), dtype=torch.float64) + block @ inverse @ block.T)
        inverse = inverse - inverse @ block.T @ middle @ block @ inverse
        weights = weights + inverse @ block.T @ (y - block @ weights)
    assert relative_error(solution.weights, weights) < 1e-8
    assert torch.equal(solution.scores(features), features @ solution.weights)
    assert solution.ridge == 100
    assert solution.ood_detector is None


def leave_one_out(expansion: FeatureMap, tasks: dict[str, Tensor], factor: float) -> tuple[float, Tensor, Tensor]:
    """The leave-one-out error, and each task's shortfall and leverage, by explicit matrices over the prompts."""
    features, labels = features_and_labels(expansion, tasks)
    shares = labels @ (1 / (len(tasks) * labels.sum(0)))
    mean = shares @ features
    centred = features - mean
    gram = centred.T @ (shares[:, None] * centred)
    matrix = gram + factor * gram.diagonal().mean() * torch.eye(len(mean))
    weights = torch.linalg.solve(matrix, centred.T @ (shares[:, None] * (labels - 1 / len(tasks))))
    leverage = (centred @ torch.linalg.inv(matrix) * centred).sum(1)
    per_task = labels / labels.sum(0)
    own = 1 - per_task.T @ (shares * (1 + leverage))
    squares = per_task.T @ (labels - 1 / len(tasks) - centred @ weights).square() / own[:, None].square()
    return float(squares.sum() / len(tasks)), squares.diagonal().sqrt(), per_task.T @ leverage / own


@pytest.mark.parametrize("count", [6, 40, 400])
def test_ridge_and_distances_are_foretold_from_the_sums(count: int) -> None:
    expansion, tasks = make_tasks(count, num_features=64)
    parts = {name: compute_statistics(rows, expansion) for name, rows in tasks.items()}
    solution = fit_router(parts)
    errors = {
        factor: leave_one_out(expansion, tasks, factor)[0] for factor in rls.RIDGES_UPWARDS + rls.RIDGES_DOWNWARDS
    }
    assert solution.ridge == min(errors, key=errors.__getitem__)
    _, shortfall, leverage = leave_one_out(expansion, tasks, solution.ridge)
    assert solution.ood_detector is not None
    assert relative_error(solution.ood_detector.shortfall, shortfall) < 1e-6
    assert relative_error(solution.ood_detector.leverage, leverage) < 1e-6


def test_what_is_foretold_comes_true() -> None:
    """The reference: a fit without each prompt in turn, with a task of few prompts among large ones."""
    expansion = FeatureMap(DIM, 64, seed=3)
    tasks = {f"task{t}": expansion.quantize(make_states(t, count)) for t, count in enumerate((60, 12, 40))}
    features, labels = features_and_labels(expansion, tasks)
    shares = labels @ (1 / (3 * labels.sum(0)))
    for factor in (0.03, 0.3, 3.0):
        mean = shares @ features
        ridge = factor * float((shares @ features.square() - mean.square()).mean())
        per_task = torch.zeros(3, dtype=torch.float64)
        for i in range(len(features)):
            other_shares = shares.clone()
            other_shares[i] = 0
            centre, target = other_shares @ features / other_shares.sum(), other_shares @ labels / other_shares.sum()
            x, y = features - centre, labels - target
            gram = x.T @ (other_shares[:, None] * x) + ridge * torch.eye(64)
            score = x[i] @ torch.linalg.solve(gram, x.T @ (other_shares[:, None] * y)) + target
            t = int(labels[i].argmax())
            per_task[t] += (labels[i] - score).square().sum() / labels[:, t].sum()
        assert leave_one_out(expansion, tasks, factor)[0] == pytest.approx(float(per_task.mean()), rel=0.15)


def test_prompts_of_no_task_are_rejected_and_others_are_not() -> None:
    expansion = FeatureMap(DIM, 256, seed=3)
    parts = {f"task{t}": compute_statistics(expansion.quantize(make_states(t, 150, 0.5)), expansion) for t in range(4)}
    solution = fit_router(parts)

    def route(seed: int) -> Tensor:
        # Other prompts of the task than those of its statistics.
        return solution.route(expansion.compute_features(expansion.quantize(make_states(seed, 1150, 0.5)[150:])))[0]

    for t in range(4):
        index = route(t)
        assert float((index == t).double().mean()) > 0.96
        assert float((index == -1).double().mean()) < 0.03
    for other in range(10, 16):
        assert float((route(other) == -1).double().mean()) > 0.9
    assert (fit_router(parts, detect_ood=False).route(torch.zeros(1, 256))[0] >= 0).all()


def test_a_small_step_from_certainty_is_no_reason_to_reject() -> None:
    """Where tasks are so unlike that all prompts score 1, a prompt with a score of 0.95 is as near as the others."""
    expansion = FeatureMap(DIM, 256, seed=3)
    states = {f"task{t}": make_states(t, 1150, 0.01) for t in range(2)}
    solution = fit_router(
        {name: compute_statistics(expansion.quantize(rows[:150]), expansion) for name, rows in states.items()}
    )
    rejection = solution.ood_detector
    assert rejection is not None
    features = expansion.compute_features(expansion.quantize(states["task0"][150:]))
    own = solution.scores(features)[:, 0]
    assert (1 - own).square().mean().sqrt() < MIN_SHORTFALL / 10
    centred, index = features.double() - solution.mean, torch.zeros(len(own), dtype=torch.long)
    added = rejection.distance(centred, own - 0.05, index) - rejection.distance(centred, own, index)
    torch.testing.assert_close(added, torch.full_like(added, 0.05 / MIN_SHORTFALL))


@pytest.mark.parametrize("count", [20, 500])
def test_a_single_task_takes_its_prompts_and_no_others(count: int) -> None:
    expansion = FeatureMap(DIM, 256, seed=3)
    states = make_states(0, count + 1000, 0.5)
    solution = fit_router({"only": compute_statistics(expansion.quantize(states[:count]), expansion)})
    index, margin, distance = solution.route(expansion.compute_features(expansion.quantize(states[count:])))
    assert float((index == 0).double().mean()) > 0.95
    assert torch.isfinite(margin).all()
    assert float(distance.mean()) == pytest.approx(2, rel=0.2)
    far = solution.route(expansion.compute_features(expansion.quantize(make_states(10, 1000, 0.5))))[0]
    assert float((far == -1).double().mean()) > (0.9 if count == 500 else 0.5)


def test_a_single_prompt_makes_a_router() -> None:
    expansion = FeatureMap(DIM, 64, seed=3)
    only = {"only": compute_statistics(expansion.quantize(make_states(0, 1)), expansion)}
    index, margin, distance = fit_router(only).route(expansion.compute_features(expansion.quantize(make_states(1, 5))))
    assert index.tolist() == [0] * 5
    assert (margin.tolist(), distance.tolist()) == ([1.0] * 5, [0.0] * 5)


def test_margin_is_the_lead_over_the_second_best() -> None:
    expansion, tasks = make_tasks(40)
    solution = fit_router({name: compute_statistics(rows, expansion) for name, rows in tasks.items()}, detect_ood=False)
    features = expansion.compute_features(tasks["task1"])
    index, margin, distance = solution.route(features)
    ranked = solution.scores(features).sort(1, descending=True)
    assert torch.equal(index, ranked.indices[:, 0])
    assert torch.equal(margin, ranked.values[:, 0] - ranked.values[:, 1])
    assert not distance.any()


def test_what_cannot_be_solved_is_refused() -> None:
    expansion, tasks = make_tasks(10)
    parts = {name: compute_statistics(rows, expansion) for name, rows in tasks.items()}
    with pytest.raises(ValueError, match="'empty' has no samples"):
        fit_router({**parts, "empty": compute_statistics(tasks["task0"][:0], expansion)})
    with pytest.raises(ValueError, match=r"not positive definite with λ = .*give a larger ridge"):
        fit_router(parts, ridge=1e-30)
    with pytest.raises(ValueError, match=r"not positive definite with λ = 1e-30"):
        fit_router(parts, ridge=1e-30, paper_form=True)
    with pytest.raises(ValueError, match="the same features"):
        fit_router({name: compute_statistics(tasks["task0"][:1], expansion) for name in "ab"})
    broken = TaskStatistics(parts["task0"].gram * math.nan, parts["task0"].feature_sum, parts["task0"].count)
    with pytest.raises(ValueError, match="not finite"):
        fit_router({**parts, "task0": broken})
