"""Every method at every ZeRO stage, with and without offload, on two ranks: equal to one process that shards nothing.

The README's table of methods and stages is made of what is found here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dscl.methods import METHODS
from dscl.model import head
from tests.support.five_tasks import NAMES, recipe, scores, tasks
from tests.support.runs import metrics, run

__all__ = ["tasks"]  # the fixture
README = Path(__file__).resolve().parents[2] / "README.md"
STAGES = {
    "ZeRO 0": "zero0",
    "1": "zero1",
    "2": "zero2",
    "3": "zero3",
    "3, optimizer and weights offloaded": "zero3_offload_all",
}
SMALL: dict[str, dict[str, Any]] = {
    "asr": {"width": 128, "feature_layer": 1, "lora": {"rank": 4}},
    "ewc": {"strength": 100.0, "samples": 16},
    "lora_per_task": {"lora": {"rank": 4}},
    "olora": {"lora": {"rank": 4}},
    "moses": {"experts": 4, "top_k": 2, "rank": 2},
}
EQUAL: dict[tuple[str, str], bool] = {}  # by method and stage


def document(folder: Path, method: str, stage: str, world: int) -> Any:
    made = recipe(folder, f"{method} {stage} {world}", 0, NAMES[:2], evaluate={"before": False, "tasks": "seen"})
    made["train"] |= {"lr": 3e-3, "epochs": 1}
    made["stream_defaults"] = {"dev_share": 0}
    return made | {"method": {"name": method, **SMALL.get(method, {})}, "deepspeed": f"ds_configs/{stage}.json"}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_at_every_stage(ranks: Any, tasks: Path, method: str) -> None:
    alone = document(tasks, method, "zero0", 1)
    ranks(1)(run, alone)
    expected = [record["loss"] for record in metrics(Path(alone["run_dir"]))]
    assert len(expected) > 4
    for stage, settings in STAGES.items():
        shared = document(tasks, method, settings, 2)
        ranks(2)(run, shared)
        assert scores(Path(shared["run_dir"]))["complete"]
        losses = [record["loss"] for record in metrics(Path(shared["run_dir"]))]
        EQUAL[method, stage] = losses == pytest.approx(expected, rel=5e-4)
    wrong = [stage for (name, stage), equal in EQUAL.items() if name == method and not equal]
    assert not wrong


def run_in_parts(document: dict[str, Any]) -> None:
    """With logits that are made a few rows at a time."""
    before, original, served = head.AT_ONCE, head._in_parts, []

    def in_parts(*given: Any) -> Any:
        served.append(given)
        return original(*given)

    head.AT_ONCE, head._in_parts = 1024, in_parts
    try:
        run(document)
    finally:
        head.AT_ONCE, head._in_parts = before, original
    assert served


@pytest.mark.parametrize("method", ["sequential", "lora_per_task"])
def test_logits_in_parts_change_nothing_at_any_stage(ranks: Any, tasks: Path, method: str) -> None:
    """Where the head trains, and where it is frozen."""
    alone = document(tasks, method, "zero0", 1)
    alone["run_dir"] += " whole"
    ranks(1)(run, alone)
    expected = [record["loss"] for record in metrics(Path(alone["run_dir"]))]
    for settings in STAGES.values():
        shared = document(tasks, method, settings, 2)
        shared["run_dir"] += " in parts"
        ranks(2)(run_in_parts, shared)
        losses = [record["loss"] for record in metrics(Path(shared["run_dir"]))]
        assert losses == pytest.approx(expected, rel=5e-4), settings


def test_the_readme_shows_it() -> None:
    """Comes last in this file; alone it has nothing to show."""
    if len(EQUAL) < len(METHODS) * len(STAGES):
        pytest.skip("the tests of the methods did not run in this process")
    rows = [["method", *STAGES], ["---"] * (1 + len(STAGES))]
    rows += [[f"`{m}`", *("equal" if EQUAL[m, stage] else "no" for stage in STAGES)] for m in METHODS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert table in README.read_text("utf-8"), f"the README's table of methods and stages should be:\n\n{table}\n"
