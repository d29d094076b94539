"""A run of any method resumes with any number of ranks and at any ZeRO stage with the same losses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from dscl.distributed import comm
from dscl.methods.registry import METHODS
from dscl.recipe.recipe import resolve_recipe
from dscl.training import run as training_run
from dscl.utils.errors import RunStopped
from tests.support.every_method import recipe_of_method
from tests.support.five_tasks import NAMES, read_scores, router_statistics, tasks
from tests.support.runs import StopAtPoll, large_eps, read_metrics, run_with_eps

__all__ = ["tasks"]  # the fixture
Chain = tuple[tuple[int, str], ...]
# Ranks and settings (of ds_configs) of each start of a run. Each start resumes the one before; the last one ends.
# In each of the four a task ends and another one begins, which is where methods differ.
TABLE: dict[str, Chain] = {
    "sequential": ((1, "zero3"), (2, "zero0"), (4, "zero2_offload"), (1, "zero1")),
    "joint": ((4, "zero0"), (2, "zero3_offload_all"), (1, "zero1"), (2, "zero2")),
    "replay": ((1, "zero2"), (4, "zero1"), (2, "zero3_offload"), (1, "zero0")),
    "agem": ((2, "zero1"), (1, "zero2_offload"), (2, "zero0"), (4, "zero3")),
    "ewc": ((2, "zero3_offload_all"), (4, "zero0"), (1, "zero1"), (2, "zero2")),
    "lwf": ((2, "zero2_offload"), (1, "zero3"), (4, "zero1"), (2, "zero0")),
    "olora": ((1, "zero0"), (4, "zero3_offload_all"), (1, "zero2"), (2, "zero1")),
    "lora_per_task": ((1, "zero1"), (2, "zero0"), (1, "zero3_offload_all"), (4, "zero2")),
    "asr": ((2, "zero3"), (1, "zero1"), (4, "zero2_offload"), (2, "zero0")),
    "osft": ((2, "zero3_offload"), (4, "zero0"), (1, "zero2_offload"), (2, "zero1")),
    "moses": ((4, "zero3_offload"), (2, "zero2"), (1, "zero1"), (2, "zero0")),
}
GROWING: Chain = ((1, "zero3"), (2, "zero0"), (4, "zero2"), (1, "zero1"))
CHANGING: Chain = ((2, "zero3"), (4, "zero3"), (1, "zero0"), (2, "zero2"))
SHARDED: Chain = ((2, "zero1"), (4, "zero3"), (1, "zero2"))
# The poll of `stop_requested` at which a start stops, and its newest checkpoint then: between the epochs of the second
# task, within the third task, and within the evaluation after the fourth.
STOPS = ((5, "step-00000004"), (4, "step-00000007"), (5, "step-00000010-learned"))


def test_the_table_covers_all_pairs() -> None:
    """All pairs of method, ZeRO stage, offload and ranks; and every stage resumes every other stage, every size every
    other size."""
    stages, sizes = ("zero0", "zero1", "zero2", "zero3"), (1, 2, 4)
    offloads = {"zero0": [""], "zero1": [""], "zero2": ["", "_offload"], "zero3": ["", "_offload", "_offload_all"]}
    starts = [
        (method, settings[:5], settings[5:], world) for method, chain in TABLE.items() for world, settings in chain
    ]
    pairs = [{(start[a], start[b]) for start in starts} for a, b in itertools.combinations(range(4), 2)]
    by_stage = {(stage, offload) for stage in stages for offload in offloads[stage]}
    kinds = ("", "_offload", "_offload_all")
    assert pairs[0] == set(itertools.product(METHODS, stages))
    assert {(method, bool(offload)) for method, offload in pairs[1]} == set(itertools.product(METHODS, (False, True)))
    assert pairs[2] == set(itertools.product(METHODS, sizes))
    assert pairs[3] == by_stage
    assert pairs[4] == set(itertools.product(stages, sizes))
    assert pairs[5] == set(itertools.product(kinds, sizes))
    steps = [pair for chain in TABLE.values() for pair in itertools.pairwise(chain)]
    assert {(a[:5], b[:5]) for (_, a), (_, b) in steps} == set(itertools.permutations(stages, 2))
    assert {(a, b) for (a, _), (b, _) in steps} == set(itertools.permutations(sizes, 2))


def run_until_poll(changed: Any, places: int) -> str:
    """Run and stop at the given poll, after a step or within an evaluation; the newest checkpoint."""
    with large_eps(), pytest.raises(RunStopped):
        training_run.train(
            resolve_recipe(changed), StopAtPoll(places - (comm.world_size() > 1))
        )  # the other ranks stop at their next poll
    return max(path.name for path in Path(changed["run_dir"], "checkpoints").iterdir())


def five_task_recipe(folder: Path, method: str, name: str) -> Any:
    """A recipe of five tasks with two steps each; the second task has four."""
    document = recipe_of_method(folder, method, f"of five {name}")
    document["model"]["shape"]["num_hidden_layers"] = 2
    document["stream"] = [
        {"name": task, "path": str(folder / task), "epochs": 2 if task == NAMES[1] else 1} for task in NAMES
    ]
    document["stream_defaults"] |= {"train_limit": 11, "test_limit": 5}
    document["evaluate"] = {"zero_shot": False, "tasks": "new"}
    return document


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        *(pytest.param(method, chain, id=method) for method, chain in TABLE.items()),
        *(
            pytest.param(method, chain, id=f"{method}-{name}", marks=pytest.mark.exhaustive)
            for name, chain in (("growing", GROWING), ("sharded", SHARDED), ("changing", CHANGING))
            for method in (METHODS if name != "changing" else ("sequential", "osft", "moses"))
        ),
    ],
)
def test_a_run_goes_on_at_other_sizes(ranks: Any, undisturbed_run: Any, tasks: Path, method: str, chain: Chain) -> None:
    whole = undisturbed_run(five_task_recipe(tasks, method, "whole"), 1, run_with_eps)
    changing = five_task_recipe(tasks, method, str(chain))
    for number, (world, settings) in enumerate(chain):
        changing = changing | {"deepspeed": f"ds_configs/{settings}.json"}
        if number + 1 < len(chain):
            place, newest = STOPS[number]
            stopped_at = ranks(world)(run_until_poll, changing, place)
            assert (
                stopped_at == [newest] * world or method == "joint"
            )  # joint training has no end of a task before the last
        else:
            ranks(world)(run_with_eps, changing)
    run_dir = Path(changing["run_dir"])
    expected, records = read_metrics(whole), read_metrics(run_dir)
    # No sample is repeated or lost, and the bytes of task artifacts are the same.
    for key in ("step", "task", "tokens", "targets", "capacity_bytes"):
        assert [record.get(key) for record in records] == [record.get(key) for record in expected]
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in expected], rel=1e-4)
    assert read_scores(run_dir)["complete"]
    if method in ("asr", "moses"):  # the router's statistics count every sample once
        sums, expected_sums = router_statistics(run_dir), router_statistics(whole)
        assert sums.keys() == expected_sums.keys()
        assert all(torch.equal(sums[name], values) for name, values in expected_sums.items())
