"""Keys against gradient ascent on the mean cosine, which is what they stand for."""

from __future__ import annotations

import pytest
import torch

from dscl.maths.keys import UnitFeatures, build_task_keys, compute_key_statistics
from dscl.maths.rls import TaskStatistics


def states(task: int, count: int = 30) -> torch.Tensor:
    draw = torch.Generator().manual_seed(task)
    return 1.5 * torch.randn(12, generator=draw) + torch.randn(count, 12, generator=draw)


def gathered(task: int) -> TaskStatistics:
    units = UnitFeatures(12)
    return compute_key_statistics(units.quantize(states(task)), units)


def test_a_key_is_where_gradient_ascent_on_the_cosine_ends() -> None:
    units = UnitFeatures(12)
    prompts = units.compute_features(units.quantize(states(0)))
    key = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    optimizer = torch.optim.Adam([key], lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (-torch.nn.functional.cosine_similarity(prompts, key[None]).mean()).backward()
        optimizer.step()
    found = build_task_keys({"a": gathered(0)}).directions[0]
    torch.testing.assert_close(key.detach() / key.detach().norm(), found, rtol=0, atol=1e-4)


def test_prompts_go_to_the_nearest_key() -> None:
    units = UnitFeatures(12)
    keys = build_task_keys({name: gathered(task) for task, name in enumerate("abc")})
    for task, name in enumerate("abc"):
        index, margin, distance = keys.route(units.compute_features(units.quantize(states(task))))
        right = [keys.names[i] == name for i in index.tolist()]
        assert sum(right) >= 28
        assert float(margin.min()) >= 0
        assert float(distance.min()) >= 0


@pytest.mark.parametrize("at", [1, 7, 29])
def test_shares_add_up_and_tasks_do_not_touch_each_other(at: int) -> None:
    units = UnitFeatures(12)
    rows = units.quantize(states(0))
    whole, parts = (
        compute_key_statistics(rows, units),
        compute_key_statistics(rows[:at], units) + compute_key_statistics(rows[at:], units),
    )
    torch.testing.assert_close(whole.feature_sum, parts.feature_sum, rtol=1e-14, atol=1e-14)
    assert int(parts.count) == 30
    alone, among = build_task_keys({"a": gathered(0)}), build_task_keys({"b": gathered(1), "a": gathered(0)})
    assert torch.equal(alone.directions[0], among.directions[among.names.index("a")])


def test_features_have_length_one_and_no_state_is_no_direction() -> None:
    units = UnitFeatures(12)
    features = units.compute_features(units.quantize(torch.cat([states(0), torch.zeros(1, 12)])))
    torch.testing.assert_close(features[:-1].norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert not features[-1].any()
