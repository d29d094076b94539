"""Owners of matrices: work is balanced, and every owner gets whole matrices, however the ranks hold their shards."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from dscl.distributed import comm
from dscl.engine.matrix_owners import MAX_ROUND_ELEMENTS, OwnerExchange, ShardSlice, assign_owners
from dscl.maths.subspace import PROJECTIONS, projection_flops

CPU = torch.device("cpu")
LAYER_SHAPES = {
    **{f"{name}_proj": (4096, 4096) for name in "qkvo"},
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}


def llama_7b_costs(projection: str) -> dict[str, float]:
    """The projection cost of every matrix of a LLaMA model with 7B parameters, with half of each protected."""
    half = 2048
    return {
        f"model.layers.{layer}.{name}": float(projection_flops(projection, *shape, half, half))
        for layer in range(32)
        for name, shape in LAYER_SHAPES.items()
    }


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_work_is_balanced_for_a_7b_model(projection: str) -> None:
    costs = llama_7b_costs(projection)
    owners = assign_owners(costs, 64)
    assert sorted(owners) == sorted(costs)
    load = Counter[int]()
    for name, owner in owners.items():
        load[owner] += costs[name]  # type: ignore[assignment]
    assert set(load) == set(range(64))
    assert max(load.values()) <= 1.15 * sum(costs.values()) / 64


def test_owners_do_not_depend_on_the_order_of_matrices() -> None:
    costs = llama_7b_costs("input")
    mixed = list(costs)
    random.Random(1).shuffle(mixed)
    assert assign_owners({name: costs[name] for name in mixed}, 7) == assign_owners(costs, 7)


def test_owners_with_more_ranks_than_matrices() -> None:
    owners = assign_owners({"a": 1.0, "b": 3.0, "c": 2.0}, 8)
    assert len(set(owners.values())) == 3
    assert assign_owners({}, 3) == {}


# Layouts: each returns every rank's (start, stop) in a flattened matrix.
def random_cuts(size: int, world: int, rng: random.Random) -> list[tuple[int, int]]:
    """Random boundaries. Some ranks may hold nothing, or one rank everything."""
    cuts = sorted(rng.choice((0, size, rng.randint(0, size))) for _ in range(world - 1))
    return list(zip([0, *cuts], [*cuts, size], strict=True))


def replicated(size: int, world: int, _: random.Random) -> list[tuple[int, int]]:
    """Every rank holds everything, as at ZeRO 0."""
    return [(0, size)] * world


def equal_chunks(size: int, world: int, _: random.Random) -> list[tuple[int, int]]:
    """As at ZeRO 3: equal chunks, of which the last may be short or missing."""
    chunk = -(-size // world)
    return [(min(rank * chunk, size), min((rank + 1) * chunk, size)) for rank in range(world)]


def packed_in_order(size: int, world: int, rng: random.Random) -> list[tuple[int, int]]:
    """As at ZeRO 1 and 2: most matrices are complete on one rank, some lie across two."""
    at = rng.randrange(world)
    cut = size if world == 1 else rng.choice((size, rng.randint(0, size)))
    slices = [(0, 0)] * world
    slices[at] = (0, cut)
    if cut < size:
        slices[(at + 1) % world] = (cut, size)
    return slices


def mixed_layout(size: int, world: int, rng: random.Random) -> list[tuple[int, int]]:
    """One of the other layouts, chosen at random."""
    return rng.choice((random_cuts, replicated, equal_chunks, packed_in_order))(size, world, rng)


LAYOUTS = {f.__name__: f for f in (random_cuts, replicated, equal_chunks, packed_in_order, mixed_layout)}
STRIDE = 1000  # larger than any matrix here, so that a value encodes its matrix and its position


def exchange_and_check(layout: str, seed: int, max_elements: int, write_back: bool) -> tuple[int, int, list[str]]:
    """Process random matrices of a layout twice. Returns the numbers of rounds and of all-to-alls, and all problems.

    Problems are returned and not raised, because an exception on one rank would leave the others waiting.
    """
    rng, world, rank = random.Random(seed), comm.world_size(), comm.rank()
    shapes = {f"m{i}": torch.Size((rng.randint(1, 9), rng.randint(1, 9))) for i in range(11)}
    owners = {name: rng.randrange(world) for name in shapes}
    slices = {name: LAYOUTS[layout](shape.numel(), world, rng)[rank] for name, shape in shapes.items()}
    expected = {n: 1.0 + STRIDE * i + torch.arange(shapes[n].numel()) for i, n in enumerate(shapes)}
    local_tensors = {name: expected[name][slice(*slices[name])].clone() for name in shapes}
    local_slices = {name: ShardSlice(*ends) for name, ends in slices.items() if ends[0] < ends[1]}
    owner_exchange = OwnerExchange(owners, shapes, local_slices, CPU)
    largest = max(shape.numel() for shape in shapes.values())
    visited_names: list[list[str]] = [[]]
    received: list[torch.Tensor] = []
    all_to_all, num_calls = comm.all_to_all, [0]
    problems: list[str] = []

    def check(condition: bool, problem: str) -> None:
        if not condition:
            problems.append(problem)

    def recording_all_to_all(sent: Any, sizes: Any) -> list[torch.Tensor]:
        num_calls[0] += 1
        arrived_tensors = all_to_all(sent, sizes)
        received.extend(arrived_tensors)
        return arrived_tensors

    def check_matrix(name: str, weight: torch.Tensor) -> None:
        visited_names[-1].append(name)
        check(torch.equal(weight, expected[name].view(shapes[name])), f"the owner got {name} with wrong values")
        if write_back:
            weight.neg_()

    def on_progress(done: int, of: int) -> None:
        check(done == len(visited_names), "a round was not reported")
        check(
            sum(shapes[name].numel() for name in visited_names[-1]) <= max(max_elements, largest),
            "too many elements in a round",
        )
        visited_names.append([])

    comm.all_to_all = recording_all_to_all
    try:
        for names in (list(shapes), rng.sample(list(shapes), 5)):
            visited_names[:], received[:] = [[]], []
            owner_exchange.apply_on_owners(
                names,
                local_tensors,
                check_matrix,
                write_back=write_back,
                max_elements=max_elements,
                on_progress=on_progress,
            )
            owned = sorted(name for name in names if owners[name] == rank)
            visited = sorted(name for round_names in visited_names for name in round_names)
            check(visited == owned, "not each owned matrix was passed exactly once")
            for value in torch.cat([torch.empty(0), *received]).tolist():
                code = int(abs(value)) - 1
                name, position = f"m{code // STRIDE}", code % STRIDE
                # An owner receives unchanged elements of its own matrices; a rank gets back elements of its own slice.
                is_unchanged = (value > 0) == (expected[name][0] > 0)
                is_needed = owners[name] == rank if is_unchanged else slices[name][0] <= position < slices[name][1]
                check(is_needed, f"an element of {name} was sent to a rank that does not need it")
            for name in names if write_back else ():
                expected[name].neg_()
            for name, view in local_tensors.items():
                check(torch.equal(view, expected[name][slice(*slices[name])]), f"{name} was returned with wrong values")
    finally:
        comm.all_to_all = all_to_all
    return len(visited_names) - 1, num_calls[0], problems


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_owners_get_whole_matrices_and_shards_return(ranks: Any, world: int, layout: str) -> None:
    for seed, write_back in ((1, True), (2, True), (3, False)):
        results_by_limit = {
            max_elements: ranks(world)(exchange_and_check, layout, seed, max_elements, write_back)
            for max_elements in (1, 120, MAX_ROUND_ELEMENTS)
        }
        for results in results_by_limit.values():
            assert [problems for *_, problems in results] == [[]] * world
            assert len({num_rounds for num_rounds, _, _ in results}) == 1  # all ranks do the same rounds
        num_rounds = [results[0][0] for results in results_by_limit.values()]
        assert num_rounds[0] >= num_rounds[1] >= num_rounds[2] == 1
        if world > 1:
            needs_gather = layout != "replicated"  # if every rank holds everything, owners need not be sent anything
            assert results_by_limit[MAX_ROUND_ELEMENTS][0][1] == 2 * (needs_gather + write_back)
