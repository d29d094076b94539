"""A run goes on with any number of ranks and at any ZeRO stage, whatever the method: the losses stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dscl import train
from dscl.errors import Stopped
from dscl.methods import METHODS
from dscl.recipe import resolve
from tests.distributed.test_stages import document
from tests.support.five_tasks import scores, tasks
from tests.support.runs import Told, metrics, run

__all__ = ["tasks"]  # the fixture
# Ranks and stage of each start; every one goes on from the one before, the last to the end.
GROWING = ((1, 3), (2, 0), (4, 2), (1, 1))
CHANGING = ((2, 3), (4, 3), (1, 0), (2, 2))
SHARDED = ((2, 1), (4, 3), (1, 2))


def run_for(changed: Any, places: int) -> None:
    """Stop at that many places at which a run asks: after a step, or within an evaluation."""
    with pytest.raises(Stopped):
        train.train(resolve(changed), Told(places))


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        *((method, chain) for method in METHODS for chain in (GROWING, SHARDED)),
        *((method, CHANGING) for method in ("sequential", "osft", "moses")),
    ],
)
def test_a_run_goes_on_at_other_sizes(ranks: Any, tasks: Path, method: str, chain: Any) -> None:
    whole = document(tasks, method, "zero0", 1) | {"run_dir": str(tasks / f"{method} whole")}
    whole["train"]["epochs"] = 3
    if not Path(whole["run_dir"]).exists():
        ranks(1)(run, whole)
    changing = whole | {"run_dir": str(tasks / f"{method} {chain}")}
    for number, (world, stage) in enumerate(chain):
        changing = changing | {"deepspeed": f"ds_configs/zero{stage}.json"}
        if number + 1 < len(chain):
            ranks(world)(run_for, changing, (3, 4, 5)[number])
        else:
            ranks(world)(run, changing)
    expected, found = metrics(Path(whole["run_dir"])), metrics(Path(changing["run_dir"]))
    for what in ("step", "task", "tokens", "targets"):  # no sample twice, and none lost
        assert [record.get(what) for record in found] == [record.get(what) for record in expected]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-4)
    assert scores(Path(changing["run_dir"]))["complete"]
