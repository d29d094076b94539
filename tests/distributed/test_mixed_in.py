"""Replay and joint training on real ranks: which samples are replayed, and how buffers are stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from dscl.data.replay_buffer import ReplayBuffer
from dscl.engine.engine import Engine
from dscl.methods.replay import Replay
from dscl.recipe.recipe import resolve_recipe
from dscl.training.setup import build_setup
from dscl.training.trainer import Trainer
from dscl.utils.errors import UserError
from tests.support.five_tasks import NAMES, SIZES, read_scores, recipe, tasks
from tests.support.runs import read_metrics, run, run_outcome, run_until

__all__ = ["tasks"]  # the fixture
EPOCHS = 2


def replay_recipe(folder: Path, name: str, method: dict[str, Any], stage: int = 1, every: int = 3) -> Any:
    evaluate = {"zero_shot": False, "every": every}
    document = recipe(folder, name, stage, NAMES[:3], evaluate=evaluate, checkpoint={"every": 4}, layers=2)
    document["train"]["epochs"] = EPOCHS
    document["stream_defaults"] = {"dev_share": 0}
    return document | {"method": method}


def run_and_count_prompts(document: dict[str, Any]) -> list[Counter[tuple[str, str]]]:
    """Run; for each task, how often this rank trains on each prompt."""
    counters: list[Counter[tuple[str, str]]] = []
    train_task, step = Trainer.train_task, Engine.step

    def count_task(*arguments: Any) -> None:
        counters.append(Counter())
        train_task(*arguments)

    def count_and_step(self: Engine, loss: Any, batches: Any, **more: Any) -> Any:
        for batch in batches:
            for row, start, stop in batch.prompt_spans:
                counters[-1][str(batch.input_ids[row, start:stop].tolist())] += 1
        return step(self, loss, batches, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_task", count_task)
        patch.setattr(Engine, "step", count_and_step)
        run(document)
    return counters


def task_prompts(document: dict[str, Any]) -> list[list[str]]:
    """The prompts of each task's training samples."""
    return [
        [str(task_data.dataset[i][0][int(task_data.bos_id is not None) :]) for i in range(len(task_data.dataset))]
        for task_data in build_setup(resolve_recipe(document)).tasks
    ]


def sum_over_ranks(counters: list[list[Counter[str]]]) -> list[Counter[str]]:
    return [sum(parts, Counter()) for parts in zip(*counters, strict=True)]


@pytest.mark.parametrize(
    ("method", "counts"), [({"replay": {"ratio": 0.2}}, [7, 6]), ({"replay": {"size": 8}}, [8, 4, 4]), ({}, [4, 3])]
)
def test_each_later_task_learns_some_of_the_earlier_ones_again(
    ranks: Any, tasks: Path, method: dict[str, Any], counts: list[int]
) -> None:
    document = replay_recipe(tasks, f"again{len(method)}{counts[0]}", {"name": "replay", **method})
    first, second, third = sum_over_ranks(ranks(2)(run_and_count_prompts, document))
    own = [Counter(names) for names in task_prompts(document)]
    assert first == Counter({prompt: EPOCHS * times for prompt, times in own[0].items()})
    replayed = second - Counter({prompt: EPOCHS * times for prompt, times in own[1].items()})
    assert replayed.total() == EPOCHS * counts[0]
    assert replayed.keys() <= own[0].keys()
    assert set(replayed.values()) == {EPOCHS}  # each buffered sample as often as a new one
    replayed_last = third - Counter({prompt: EPOCHS * times for prompt, times in own[2].items()})
    replayed_counts = [sum(times for prompt, times in replayed_last.items() if prompt in task) for task in own[:2]]
    expected_counts = counts[1:] if "size" in method.get("replay", {}) else counts
    assert replayed_counts == [EPOCHS * count for count in expected_counts]
    if "size" not in method.get("replay", {}):
        assert {prompt for prompt in replayed_last if prompt in own[0]} == set(replayed)  # the same ones again
    steps = [record["task"] for record in read_metrics(tasks / f"again{len(method)}{counts[0]}")]
    batch = document["train"]["global_batch"]
    sizes = [SIZES[0], SIZES[1] + counts[0], SIZES[2] + sum(expected_counts)]
    assert Counter(steps) == {name: EPOCHS * -(-size // batch) for name, size in zip(NAMES, sizes, strict=False)}


def test_what_is_kept_is_read_from_files(ranks: Any, tasks: Path) -> None:
    document = replay_recipe(tasks, "kept", {"name": "replay", "replay": {"ratio": 0.3}})
    ranks(1)(run, document)
    setup = build_setup(resolve_recipe(document))
    for task_data, count in zip(setup.tasks, (11, 9, 6), strict=True):
        path = tasks / "kept" / "samples" / f"{task_data.task.name}.safetensors"
        buffer = ReplayBuffer.read(path, task_data.task.name)
        assert len(buffer) == count
        samples = [task_data.dataset[i] for i in range(len(task_data.dataset))]
        assert all(tuple(map(list, pair)) in samples for pair in buffer.samples)
        assert buffer.num_bytes == sum(tensor.nbytes for tensor in load_file(path).values())
    capacities = [record["capacity_bytes"] for record in read_metrics(tasks / "kept") if "capacity_bytes" in record]
    files = sorted((tasks / "kept" / "samples").iterdir())
    assert capacities[-1] == sum(t.nbytes for path in files for t in load_file(path).values())
    with pytest.raises(UserError, match="samples of task 'colour', here 'animal' is needed"):
        ReplayBuffer.read(tasks / "kept" / "samples" / "colour.safetensors", "animal")


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 3])
def test_a_replaying_run_that_died_ends_as_one_that_did_not(ranks: Any, tasks: Path, stage: int) -> None:
    method = {"name": "replay", "replay": {"size": 9}, "tune": "lora"}
    ranks(2)(run, replay_recipe(tasks, f"whole{stage}", method, stage, every=1))
    deaths = [("step", 12), ("take", 1), ("step", 3), ("save", 1), ("step", 6)]
    ranks(2)(run_until, replay_recipe(tasks, f"died{stage}", method, stage, every=1), deaths)
    assert run_outcome(tasks / f"died{stage}") == run_outcome(tasks / f"whole{stage}")


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.exhaustive) for s in (0, 2)), 1, 3])
def test_all_tasks_at_once(ranks: Any, undisturbed_run: Any, tasks: Path, stage: int) -> None:
    document = replay_recipe(tasks, f"joint{stage}", {"name": "joint"}, stage)
    (counts,) = sum_over_ranks(ranks(2)(run_and_count_prompts, document))
    own = sum((Counter(names) for names in task_prompts(document)), Counter())
    assert counts == Counter({prompt: EPOCHS * times for prompt, times in own.items()})
    result = read_scores(tasks / f"joint{stage}")
    assert result["complete"]
    assert result["matrix"][:2] == [[None] * 3] * 2
    assert result["summary"]["OP"] == pytest.approx(sum(result["matrix"][2]) / 3)
    assert result["summary"]["BWT"] is None
    losses = [record["loss"] for record in read_metrics(tasks / f"joint{stage}")]
    reference = undisturbed_run(replay_recipe(tasks, "reference", {"name": "joint"}, 0), 1)
    assert losses == pytest.approx([record["loss"] for record in read_metrics(reference)], rel=1e-4)


@pytest.mark.exhaustive
def test_a_joint_run_that_died_ends_as_one_that_did_not(ranks: Any, tasks: Path) -> None:
    ranks(2)(run, replay_recipe(tasks, "joint", {"name": "joint"}, 2))
    ranks(2)(
        run_until, replay_recipe(tasks, "joint, died", {"name": "joint"}, 2), [("step", 5), ("take", 2), ("save", 1)]
    )
    assert run_outcome(tasks / "joint, died") == run_outcome(tasks / "joint")


def test_all_tasks_at_once_each_as_often_as_it_asks_for(ranks: Any, tasks: Path) -> None:
    document = replay_recipe(tasks, "plans", {"name": "joint"})
    document["stream"][1]["epochs"] = 3
    (counts,) = sum_over_ranks(ranks(2)(run_and_count_prompts, document))
    own = [Counter(names) for names in task_prompts(document)]
    times = [3 if number == 1 else EPOCHS for number in range(len(own))]
    expected: Counter[str] = Counter()
    for count, task in zip(times, own, strict=True):
        expected.update({prompt: count * often for prompt, often in task.items()})
    assert counts == expected


def test_rates_of_their_own_are_refused_where_tasks_are_learnt_at_once(tasks: Path) -> None:
    document = replay_recipe(tasks, "rates", {"name": "joint"})
    document["stream"][1]["lr"] = 0.5
    with pytest.raises(UserError, match=r"given lr None for colour, lr 0.5 for animal, .*set train.lr"):
        build_setup(resolve_recipe(document))


def test_no_more_is_kept_than_was_asked_for(tasks: Path, tmp_path: Path) -> None:
    method = build_setup(resolve_recipe(replay_recipe(tasks, "size", {"name": "replay", "replay": {"size": 8}}))).method
    samples = ReplayBuffer("any", tuple(([number], [0]) for number in range(30)))
    for index, expected in enumerate(([8], [4, 4], [2, 2, 2])):
        summary: Any = method.end_task(index, NAMES[index], SimpleNamespace(task_samples=lambda: samples))  # type: ignore[arg-type]
        method.save_task_artifacts(tmp_path, NAMES[index])
        buffers: list[ReplayBuffer] = list(method.replay_samples())  # type: ignore[call-overload]
        assert [len(buffer) for buffer in buffers] == expected
        assert summary.metrics["capacity_bytes"] == sum(buffer.num_bytes for buffer in buffers)
    method.load_task_artifacts(tmp_path, NAMES[:3])
    assert [buffer.samples for buffer in method.replay_samples()] == [buffer.samples for buffer in buffers]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"method.replay.size: given 1; each of the 2 tasks"):
        build_setup(resolve_recipe(replay_recipe(tasks, "too few", {"name": "replay", "replay": {"size": 1}})))


def test_both_limits_are_refused(tasks: Path) -> None:
    with pytest.raises(UserError, match=r"method.replay.size: given 5 together with ratio: 0.5"):
        resolve_recipe(replay_recipe(tasks, "limits", {"name": "replay", "replay": {"ratio": 0.5, "size": 5}}))
    assert Replay.Config().replay.ratio == 0.1
