"""One LoRA per task on real ranks: a task's adapter depends on no other task, and later tasks do not change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dscl.serving.export import describe_run
from dscl.utils.errors import UserError
from tests.support.five_tasks import NAMES, artifact_checksums, read_scores, recipe, tasks
from tests.support.runs import run, run_outcome, run_until

__all__ = ["tasks"]  # the fixture
METHOD = {"name": "lora_per_task", "tune": {"rank": 4, "dropout": 0.2, "targets": ["v_proj", "down_proj"]}}


def lora_recipe(folder: Path, name: str, stage: int, names: tuple[str, ...], every: int = 1) -> Any:
    evaluate = {"zero_shot": False, "every": every}
    document = recipe(folder, name, stage, names, evaluate=evaluate, train={"epochs": 1}, layers=2)
    return document | {"method": METHOD}


@pytest.mark.parametrize("stage", [0, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (1, 2)), 3])
def test_a_task_leaves_the_same_wherever_it_comes(ranks: Any, tasks: Path, stage: int) -> None:
    """Adapters are bitwise the same with dropout. With the task id known, every score stays."""
    names = NAMES[:3]
    ranks(2)(run, lora_recipe(tasks, f"all{stage}", stage, names))
    checksums = artifact_checksums(tasks / f"all{stage}")
    assert len(checksums) == 2 * len(names)
    assert len(set(checksums.values())) == len(names) + 1  # of adapters; their settings are alike
    ranks(2)(run, lora_recipe(tasks, f"back{stage}", stage, names[::-1], len(names)))
    assert artifact_checksums(tasks / f"back{stage}") == checksums
    matrix = read_scores(tasks / f"all{stage}")["matrix"]
    for task in range(len(names)):
        assert len({row[task] for row in matrix[task:]}) == 1
    assert "routing_accuracy" not in read_scores(tasks / f"all{stage}")


def test_stages_agree(ranks: Any, tasks: Path) -> None:
    for stage in (0, 3):
        ranks(1)(run, lora_recipe(tasks, f"one{stage}", stage, NAMES[:2], 2))
    files = sorted((tasks / "one0" / "adapters").rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        other = load_file(tasks / "one3" / path.relative_to(tasks / "one0"))
        for name, tensor in load_file(path).items():
            assert float(tensor.norm()) > 0.1
            assert float((tensor - other[name]).norm()) <= 1e-4 * float(tensor.norm())


@pytest.mark.exhaustive
def test_a_run_that_died_ends_as_one_that_did_not(ranks: Any, tasks: Path) -> None:
    ranks(2)(run, lora_recipe(tasks, "whole", 2, NAMES[:2]))
    ranks(2)(run_until, lora_recipe(tasks, "died", 2, NAMES[:2]), [("step", 2), ("take", 1), ("step", 1), ("save", 1)])
    assert (run_outcome(tasks / "died"), artifact_checksums(tasks / "died")) == (
        run_outcome(tasks / "whole"),
        artifact_checksums(tasks / "whole"),
    )


def test_an_export_is_refused_with_the_way_to_one(ranks: Any, tasks: Path) -> None:
    ranks(1)(run, lora_recipe(tasks, "export", 0, NAMES[:1]))
    with pytest.raises(UserError, match=r"which has no router .*export.adapters\) with dscl import-adapters"):
        describe_run(tasks / "export")
