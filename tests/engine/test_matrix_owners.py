"""Owners: the deal is balanced, and a matrix reaches its owner whole and comes back in place, however it is held."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from dscl.distributed import comm
from dscl.engine.matrix_owners import BUCKET, Rounds, Stretch, deal
from dscl.maths.subspace import READINGS, hold_flops

CPU = torch.device("cpu")
LAYER = {
    **{f"{name}_proj": (4096, 4096) for name in "qkvo"},
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}


def costs(reading: str) -> dict[str, float]:
    """Of every matrix of a LLaMA with 7B parameters, half of each protected."""
    half = 2048
    return {
        f"model.layers.{layer}.{name}": float(hold_flops(reading, *shape, half, half))
        for layer in range(32)
        for name, shape in LAYER.items()
    }


@pytest.mark.parametrize("reading", READINGS)
def test_the_work_of_a_large_model_is_balanced(reading: str) -> None:
    work = costs(reading)
    owners = deal(work, 64)
    assert sorted(owners) == sorted(work)
    load = Counter[int]()
    for name, owner in owners.items():
        load[owner] += work[name]  # type: ignore[assignment]
    assert set(load) == set(range(64))
    assert max(load.values()) <= 1.15 * sum(work.values()) / 64


def test_the_deal_depends_on_the_work_alone() -> None:
    work = costs("input")
    mixed = list(work)
    random.Random(1).shuffle(mixed)
    assert deal({name: work[name] for name in mixed}, 7) == deal(work, 7)


def test_more_ranks_than_matrices() -> None:
    owners = deal({"a": 1.0, "b": 3.0, "c": 2.0}, 8)
    assert len(set(owners.values())) == 3
    assert deal({}, 3) == {}


# Ways in which the ranks may hold a matrix: where each one's stretch begins and ends.
def by_chance(size: int, world: int, draw: random.Random) -> list[tuple[int, int]]:
    """Cut anywhere; some ranks may hold nothing, or one of them everything."""
    cuts = sorted(draw.choice((0, size, draw.randint(0, size))) for _ in range(world - 1))
    return list(zip([0, *cuts], [*cuts, size], strict=True))


def everywhere(size: int, world: int, _: random.Random) -> list[tuple[int, int]]:
    """As at ZeRO 0."""
    return [(0, size)] * world


def scattered(size: int, world: int, _: random.Random) -> list[tuple[int, int]]:
    """As at ZeRO 3: equal chunks, of which the last may be short or missing."""
    chunk = -(-size // world)
    return [(min(rank * chunk, size), min((rank + 1) * chunk, size)) for rank in range(world)]


def one_after_another(size: int, world: int, draw: random.Random) -> list[tuple[int, int]]:
    """As at ZeRO 1 and 2: most matrices are complete on one rank, some lie across two."""
    at = draw.randrange(world)
    cut = size if world == 1 else draw.choice((size, draw.randint(0, size)))
    held = [(0, 0)] * world
    held[at] = (0, cut)
    if cut < size:
        held[(at + 1) % world] = (cut, size)
    return held


def anyhow(size: int, world: int, draw: random.Random) -> list[tuple[int, int]]:
    return draw.choice((by_chance, everywhere, scattered, one_after_another))(size, world, draw)


PLANS = {f.__name__: f for f in (by_chance, everywhere, scattered, one_after_another, anyhow)}
STRIDE = 1000  # more than any matrix here has elements: a value tells its matrix and its place in it


def visited(plan: str, seed: int, at_once: int, change: bool) -> tuple[int, int, list[str]]:
    """Random matrices held in this way are visited, twice: in how many rounds and exchanges, and what went wrong.

    What goes wrong on one rank must not keep the others waiting, so it is told at the end.
    """
    draw, world, me = random.Random(seed), comm.world(), comm.rank()
    shapes = {f"m{i}": torch.Size((draw.randint(1, 9), draw.randint(1, 9))) for i in range(11)}
    owners = {name: draw.randrange(world) for name in shapes}
    held = {name: PLANS[plan](shape.numel(), world, draw)[me] for name, shape in shapes.items()}
    wholes = {n: 1.0 + STRIDE * i + torch.arange(shapes[n].numel()) for i, n in enumerate(shapes)}
    views = {name: wholes[name][slice(*held[name])].clone() for name in shapes}
    held_here = {name: Stretch(*ends) for name, ends in held.items() if ends[0] < ends[1]}
    rounds = Rounds(owners, shapes, held_here, CPU)
    largest = max(shape.numel() for shape in shapes.values())
    seen: list[list[str]] = [[]]
    came: list[torch.Tensor] = []
    exchange, calls = comm.exchange, [0]
    wrong: list[str] = []

    def check(right: bool, what: str) -> None:
        if not right:
            wrong.append(what)

    def watched(sent: Any, sizes: Any) -> list[torch.Tensor]:
        calls[0] += 1
        arrived = exchange(sent, sizes)
        came.extend(arrived)
        return arrived

    def act(name: str, weight: torch.Tensor) -> None:
        seen[-1].append(name)
        check(torch.equal(weight, wholes[name].view(shapes[name])), f"{name} is shown with other values")
        if change:
            weight.neg_()

    def said(done: int, of: int) -> None:
        check(done == len(seen), "a round is not told")
        check(sum(shapes[name].numel() for name in seen[-1]) <= max(at_once, largest), "too much at once")
        seen.append([])

    comm.exchange = watched
    try:
        for names in (list(shapes), draw.sample(list(shapes), 5)):
            seen[:], came[:] = [[]], []
            rounds.visit(names, views, act, change=change, at_once=at_once, said=said)
            mine = sorted(name for name in names if owners[name] == me)
            check(sorted(name for turn in seen for name in turn) == mine, "others are shown than mine, once each")
            for value in torch.cat([torch.empty(0), *came]).tolist():
                place = int(abs(value)) - 1
                name, at = f"m{place // STRIDE}", place % STRIDE
                # On the way there only what is mine to work on, on the way back only what is mine to hold.
                there = (value > 0) == (wholes[name][0] > 0)
                right = owners[name] == me if there else held[name][0] <= at < held[name][1]
                check(right, f"an element of {name} came that is none of mine")
            for name in names if change else ():
                wholes[name].neg_()
            for name, view in views.items():
                check(torch.equal(view, wholes[name][slice(*held[name])]), f"{name} came back with other values")
    finally:
        comm.exchange = exchange
    return len(seen) - 1, calls[0], wrong


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_matrices_reach_their_owners_and_come_back(ranks: Any, world: int, plan: str) -> None:
    for seed, change in ((1, True), (2, True), (3, False)):
        told = {at_once: ranks(world)(visited, plan, seed, at_once, change) for at_once in (1, 120, BUCKET)}
        for results in told.values():
            assert [wrong for *_, wrong in results] == [[]] * world
            assert len({turns for turns, _, _ in results}) == 1  # all ranks go through the same rounds
        turns = [results[0][0] for results in told.values()]
        assert turns[0] >= turns[1] >= turns[2] == 1
        if world > 1:
            there = plan != "everywhere"  # where every rank holds everything, nothing has to travel first
            assert told[BUCKET][0][1] == 2 * (there + change)
