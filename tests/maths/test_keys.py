"""Keys against gradient ascent on the mean cosine, which is what they stand for."""

from __future__ import annotations

import pytest
import torch

from dscl.maths.keys import Units, gather_keys, keys_of
from dscl.maths.rls import Statistics


def states(task: int, count: int = 30) -> torch.Tensor:
    draw = torch.Generator().manual_seed(task)
    return 1.5 * torch.randn(12, generator=draw) + torch.randn(count, 12, generator=draw)


def gathered(task: int) -> Statistics:
    units = Units(12)
    return gather_keys(units.rows(states(task)), units)


def test_a_key_is_where_gradient_ascent_on_the_cosine_ends() -> None:
    units = Units(12)
    prompts = units.features(units.rows(states(0)))
    key = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    optimizer = torch.optim.Adam([key], lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        (-torch.nn.functional.cosine_similarity(prompts, key[None]).mean()).backward()
        optimizer.step()
    found = keys_of({"a": gathered(0)}).directions[0]
    torch.testing.assert_close(key.detach() / key.detach().norm(), found, rtol=0, atol=1e-4)


def test_prompts_go_to_the_nearest_key() -> None:
    units = Units(12)
    keys = keys_of({name: gathered(task) for task, name in enumerate("abc")})
    for task, name in enumerate("abc"):
        index, margin, distance = keys.route(units.features(units.rows(states(task))))
        right = [keys.names[i] == name for i in index.tolist()]
        assert sum(right) >= 28
        assert float(margin.min()) >= 0
        assert float(distance.min()) >= 0


@pytest.mark.parametrize("at", [1, 7, 29])
def test_shares_add_up_and_tasks_do_not_touch_each_other(at: int) -> None:
    units = Units(12)
    rows = units.rows(states(0))
    whole, parts = gather_keys(rows, units), gather_keys(rows[:at], units) + gather_keys(rows[at:], units)
    torch.testing.assert_close(whole.total, parts.total, rtol=1e-14, atol=1e-14)
    assert int(parts.count) == 30
    alone, among = keys_of({"a": gathered(0)}), keys_of({"b": gathered(1), "a": gathered(0)})
    assert torch.equal(alone.directions[0], among.directions[among.names.index("a")])


def test_features_have_length_one_and_no_state_is_no_direction() -> None:
    units = Units(12)
    features = units.features(units.rows(torch.cat([states(0), torch.zeros(1, 12)])))
    torch.testing.assert_close(features[:-1].norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert not features[-1].any()
