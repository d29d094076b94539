"""A run goes on with any number of ranks and at any ZeRO stage, whatever the method: the losses stay what they were."""

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
# Ranks and settings (of ds_configs) of each start of a run; every one goes on from the one before, the last to the end.
# Within each of the four a task ends and another one begins, which is where methods differ.
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
# At which of the places at which a run asks it stops, and the checkpoint that is then the newest: between the second
# task's epochs, within the third task, and within the evaluation after the fourth.
STOPS = ((5, "step-00000004"), (4, "step-00000007"), (5, "step-00000010-learned"))


def test_the_table_covers_all_pairs() -> None:
    """Of method, ZeRO stage, offload and ranks; and every stage goes on from every other, and so does every size."""
    stages, sizes = ("zero0", "zero1", "zero2", "zero3"), (1, 2, 4)
    offloads = {"zero0": [""], "zero1": [""], "zero2": ["", "_offload"], "zero3": ["", "_offload", "_offload_all"]}
    starts = [
        (method, settings[:5], settings[5:], world) for method, chain in TABLE.items() for world, settings in chain
    ]
    found = [{(start[a], start[b]) for start in starts} for a, b in itertools.combinations(range(4), 2)]
    by_stage = {(stage, offload) for stage in stages for offload in offloads[stage]}
    kinds = ("", "_offload", "_offload_all")
    assert found[0] == set(itertools.product(METHODS, stages))
    assert {(method, bool(offload)) for method, offload in found[1]} == set(itertools.product(METHODS, (False, True)))
    assert found[2] == set(itertools.product(METHODS, sizes))
    assert found[3] == by_stage
    assert found[4] == set(itertools.product(stages, sizes))
    assert found[5] == set(itertools.product(kinds, sizes))
    steps = [pair for chain in TABLE.values() for pair in itertools.pairwise(chain)]
    assert {(a[:5], b[:5]) for (_, a), (_, b) in steps} == set(itertools.permutations(stages, 2))
    assert {(a, b) for (a, _), (b, _) in steps} == set(itertools.permutations(sizes, 2))


def run_for(changed: Any, places: int) -> str:
    """Stop at that many places at which a run asks: after a step, or within an evaluation. The newest checkpoint."""
    with large_eps(), pytest.raises(RunStopped):
        training_run.train(
            resolve_recipe(changed), StopAtPoll(places - (comm.world_size() > 1))
        )  # others hear of it when they ask next
    return max(path.name for path in Path(changed["run_dir"], "checkpoints").iterdir())


def five_tasks(folder: Path, method: str, name: str) -> Any:
    """Of two steps each, the second one of four."""
    made = recipe_of_method(folder, method, f"of five {name}")
    made["model"]["shape"]["num_hidden_layers"] = 2
    made["stream"] = [
        {"name": task, "path": str(folder / task), "epochs": 2 if task == NAMES[1] else 1} for task in NAMES
    ]
    made["stream_defaults"] |= {"train_limit": 11, "test_limit": 5}
    made["evaluate"] = {"zero_shot": False, "tasks": "new"}
    return made


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
def test_a_run_goes_on_at_other_sizes(ranks: Any, undisturbed: Any, tasks: Path, method: str, chain: Chain) -> None:
    whole = undisturbed(five_tasks(tasks, method, "whole"), 1, run_with_eps)
    changing = five_tasks(tasks, method, str(chain))
    for number, (world, settings) in enumerate(chain):
        changing = changing | {"deepspeed": f"ds_configs/{settings}.json"}
        if number + 1 < len(chain):
            place, newest = STOPS[number]
            stopped = ranks(world)(run_for, changing, place)
            assert stopped == [newest] * world or method == "joint"  # which knows no end of a task
        else:
            ranks(world)(run_with_eps, changing)
    run_dir = Path(changing["run_dir"])
    expected, found = read_metrics(whole), read_metrics(run_dir)
    # No sample twice, and none lost; and what is stored for the tasks is counted on all ranks.
    for what in ("step", "task", "tokens", "targets", "capacity_bytes"):
        assert [record.get(what) for record in found] == [record.get(what) for record in expected]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-4)
    assert read_scores(run_dir)["complete"]
    if method in ("asr", "moses"):  # what the router has seen: every sample once, on whichever rank it was
        seen, all_seen = router_statistics(run_dir), router_statistics(whole)
        assert seen.keys() == all_seen.keys()
        assert all(torch.equal(seen[name], values) for name, values in all_seen.items())
