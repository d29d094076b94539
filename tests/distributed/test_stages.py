"""Every method at every ZeRO stage, with and without offload, on two ranks: equal to one process that shards nothing.

The table of methods and stages in dscl/methods/README.md shows the result. In the fast suite test_sizes.py takes every
method through all stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dscl.methods.registry import METHODS
from dscl.model import lm_head
from tests.support.every_method import recipe_of_method
from tests.support.five_tasks import read_scores, tasks
from tests.support.runs import read_metrics, run

__all__ = ["tasks"]  # the fixture
METHODS_PAGE = Path(__file__).resolve().parents[2] / "dscl" / "methods" / "README.md"
STAGES = {
    "ZeRO 0": "zero0",
    "1": "zero1",
    "2": "zero2",
    "3": "zero3",
    "3, optimizer and weights offloaded": "zero3_offload_all",
}
EQUAL: dict[tuple[str, str], bool] = {}  # by method and stage


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


def norms(run_dir: Path) -> list[float]:
    """The gradient norms; AdamW and clipping hide a wrong scale of gradients in the losses."""
    return [record["grad_norm"] for record in read_metrics(run_dir)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_at_every_stage(ranks: Any, undisturbed_run: Any, tasks: Path, method: str) -> None:
    expected = losses(undisturbed_run(recipe_of_method(tasks, method, "alone"), 1))
    assert len(expected) > 4
    for stage, settings in STAGES.items():
        shared = recipe_of_method(tasks, method, f"at {settings}", settings)
        ranks(2)(run, shared)
        assert read_scores(Path(shared["run_dir"]))["complete"]
        EQUAL[method, stage] = losses(Path(shared["run_dir"])) == pytest.approx(expected, rel=5e-4)
    wrong = [stage for (name, stage), equal in EQUAL.items() if name == method and not equal]
    assert not wrong


def run_in_parts(document: dict[str, Any]) -> None:
    """Run with logits that are computed in chunks of rows."""
    max_logits, original, calls = lm_head.MAX_LOGITS, lm_head._chunked_answer_loss, []

    def in_parts(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    lm_head.MAX_LOGITS, lm_head._chunked_answer_loss = 1024, in_parts
    try:
        run(document)
    finally:
        lm_head.MAX_LOGITS, lm_head._chunked_answer_loss = max_logits, original
    assert calls


PARTS = [("sequential", "zero0"), ("sequential", "zero3"), ("lora_per_task", "zero1"), ("lora_per_task", "zero2")]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(method, settings, marks=() if (method, settings) in PARTS else pytest.mark.exhaustive)
        for method in ("sequential", "lora_per_task")
        for settings in STAGES.values()
    ],
)
def test_logits_in_parts_change_nothing_at_any_stage(
    ranks: Any, undisturbed_run: Any, tasks: Path, method: str, settings: str
) -> None:
    """With a trained and with a frozen LM head."""
    whole = undisturbed_run(recipe_of_method(tasks, method, "alone"), 1)
    shared = recipe_of_method(tasks, method, f"in parts at {settings}", settings)
    ranks(2)(run_in_parts, shared)
    for numbers in (losses, norms):
        assert numbers(Path(shared["run_dir"])) == pytest.approx(numbers(whole), rel=5e-4)


@pytest.mark.exhaustive
def test_the_methods_page_shows_it() -> None:
    """Needs the results of the tests above, so it is skipped when it runs alone."""
    if len(EQUAL) < len(METHODS) * len(STAGES):
        pytest.skip("the tests of the methods did not run in this process")
    rows = [["method", *STAGES], ["---"] * (1 + len(STAGES))]
    rows += [[f"`{m}`", *("equal" if EQUAL[m, stage] else "no" for stage in STAGES)] for m in METHODS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = METHODS_PAGE.read_text("utf-8")
    assert table in text, f"the table of methods and stages in {METHODS_PAGE} should be:\n\n{table}\n"
