"""Task keys against gradient ascent on the mean cosine similarity, which they maximise."""

from __future__ import annotations

import pytest
import torch

from dscl.maths.keys import UnitFeatures, build_task_keys, compute_key_statistics
from dscl.maths.rls import TaskStatistics


def make_states(task: int, count: int = 30) -> torch.Tensor:
    draw = torch.Generator().manual_seed(task)
    return 1.5 * torch.randn(12, generator=draw) + torch.randn(count, 12, generator=draw)


def statistics_of(task: int) -> TaskStatistics:
    units = UnitFeatures(12)
    return compute_key_statistics(units.quantize(make_states(task)), units)


def test_a_key_is_where_gradient_ascent_on_the_cosine_ends() -> None:
    units = UnitFeatures(12)
    prompts = units.compute_features(units.quantize(make_states(0)))
    key = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    optimizer = torch.optim.Adam([key], lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (-torch.nn.functional.cosine_similarity(prompts, key[None]).mean()).backward()
        optimizer.step()
    direction = build_task_keys({"a": statistics_of(0)}).directions[0]
    torch.testing.assert_close(key.detach() / key.detach().norm(), direction, rtol=0, atol=1e-4)


def test_prompts_go_to_the_nearest_key() -> None:
    units = UnitFeatures(12)
    keys = build_task_keys({name: statistics_of(task) for task, name in enumerate("abc")})
    for task, name in enumerate("abc"):
        index, margin, distance = keys.route(units.compute_features(units.quantize(make_states(task))))
        correct = [keys.names[i] == name for i in index.tolist()]
        assert sum(correct) >= 28
        assert float(margin.min()) >= 0
        assert float(distance.min()) >= 0


@pytest.mark.parametrize("at", [1, 7, 29])
def test_shares_add_up_and_tasks_do_not_touch_each_other(at: int) -> None:
    units = UnitFeatures(12)
    rows = units.quantize(make_states(0))
    whole, parts = (
        compute_key_statistics(rows, units),
        compute_key_statistics(rows[:at], units) + compute_key_statistics(rows[at:], units),
    )
    torch.testing.assert_close(whole.feature_sum, parts.feature_sum, rtol=1e-14, atol=1e-14)
    assert int(parts.count) == 30
    single, several = (
        build_task_keys({"a": statistics_of(0)}),
        build_task_keys({"b": statistics_of(1), "a": statistics_of(0)}),
    )
    assert torch.equal(single.directions[0], several.directions[several.names.index("a")])


def test_features_have_length_one_and_no_state_is_no_direction() -> None:
    units = UnitFeatures(12)
    features = units.compute_features(units.quantize(torch.cat([make_states(0), torch.zeros(1, 12)])))
    torch.testing.assert_close(features[:-1].norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert not features[-1].any()
