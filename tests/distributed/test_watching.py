"""Performance metrics of a run: parts of the step time, bytes of collectives, slow ranks, traces and loss spikes."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dscl.data.batches import StepPlan
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.methods.sequential import Sequential
from dscl.monitoring.loss_monitor import SPIKE_MIN_STEPS, SPIKE_WINDOW, LossMonitor
from dscl.utils import timers
from dscl.utils.errors import ExternalFailure
from tests.support.runs import recipe_of, run, write_tasks

WORLD = 2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    write_tasks(folder)
    return folder


def read_raw_metrics(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(document["run_dir"]) / "metrics.jsonl").read_text().splitlines()]


def zero_bytes_sent(trained: int, stage: int) -> dict[str, float]:
    """The bytes that a rank sends in the collectives of a step with one fp32 micro-batch, by the definition of ZeRO.

    At stage 3 weights are gathered for the forward and again for the backward pass. Once DeepSpeed has traced their
    order, a model as small as this one stays gathered in between (stage3_max_reuse_distance); the numbers are that
    lower bound.
    """
    weights = 4.0 * trained
    return {
        0: {"all_reduce": weights},
        1: {"all_reduce": weights, "all_gather": weights / WORLD},
        2: {"all_reduce": weights, "all_gather": weights / WORLD},
        3: {"reduce_scatter": weights, "all_gather": weights / WORLD},
    }[stage]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_fit_into_the_step_and_bytes_are_those_of_the_stage(ranks: Any, tasks: Path, stage: int) -> None:
    changes = {"train__micro_batch": 4, "observe__peak_tflops": 1e-3, "train__epochs": 1}
    document = recipe_of(tasks, f"stage-{stage}", stage, **changes)
    ranks(WORLD)(run, document)
    records = read_raw_metrics(document)
    trained = records[-1]["trainable_parameters"]
    num_tokens, part_seconds, step_seconds = 0, 0.0, 0.0
    for record in records:
        parts = {part: record.get(f"{part}_seconds", 0.0) for part in timers.PARTS}
        assert all(parts[name] > 0 for name in ("data", "forward", "backward", "optimizer", "communication"))
        assert all(value >= 0 for value in parts.values())
        part_seconds, step_seconds = part_seconds + sum(parts.values()), step_seconds + record["seconds"]
        for kind, amount in zero_bytes_sent(trained, stage).items():  # and norms, flags and padding
            upper_bound = amount * (2 if stage == 3 and kind == "all_gather" else 1)
            assert amount <= record[f"{kind}_bytes"] <= 1.1 * upper_bound + 64, (kind, record)
        num_tokens += record["tokens"]
        assert record["tokens_seen"] == num_tokens
        assert record["tokens_per_s_per_device"] == record["tokens_per_s"] / WORLD
        assert record["mfu"] == pytest.approx(record["tflops_per_device"] / 1e-3)
        assert 0 <= record["padding"] < 1
        assert record["memory_host_bytes"] > 1e8
    assert part_seconds < 1.1 * step_seconds  # the ranks' windows begin at slightly different times


def test_every_evaluation_is_timed_and_the_first_one_shown(ranks: Any, tasks: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    document = recipe_of(tasks, "timed", 1, observe__tensorboard=True, train__epochs=1)
    ranks(WORLD)(run, document)
    records = read_raw_metrics(document)
    second = [record["step"] for record in records if record["task"] == "animal"]
    first, last = second[0], second[-1]
    timed = {record["step"]: record["evaluate_seconds"] for record in records if "evaluate_seconds" in record}
    assert set(timed) == {1, first, last}, "before training, and after each task"
    assert all(seconds > 0 for seconds in timed.values())
    assert records[-1]["save_seconds"] > 0
    events = accumulator.EventAccumulator(str(Path(document["run_dir"]) / "tensorboard")).Reload()
    curve_seconds = {event.step: event.value for event in events.Scalars("perf/evaluate_seconds")}
    assert curve_seconds == {
        0: pytest.approx(timed[1]),
        first - 1: pytest.approx(timed[first]),
        last: pytest.approx(timed[last]),
    }
    scores = json.loads((Path(document["run_dir"]) / "scores.json").read_text())
    curve = [(event.step, event.value) for event in events.Scalars("task/animal/score")]
    assert curve == [
        (0, pytest.approx(scores["zero_shot"][1])),
        (first - 1, pytest.approx(scores["matrix"][0][1])),
        (last, pytest.approx(scores["matrix"][1][1])),
    ]


def run_with_a_slow_rank(document: dict[str, Any], slow: int, seconds: float) -> None:
    """Run with one rank whose forward passes take longer."""
    original = Sequential.loss

    def loss(self: Sequential, model: Any, batch: Any) -> torch.Tensor:
        time.sleep(seconds * (comm.rank() == slow))
        return original(self, model, batch)

    Sequential.loss = loss  # type: ignore[method-assign]
    try:
        run(document)
    finally:
        Sequential.loss = original  # type: ignore[method-assign]


def test_a_slow_rank_is_named_once_a_task(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    messages_file = tmp_path / "said"
    document = recipe_of(tasks, "slow", 1, observe__live="auto", observe__every=1, train__epochs=1)
    ranks(WORLD)(run_slowly_and_write_messages, document, str(messages_file))
    lines = [line for line in messages_file.read_text().splitlines() if "is slow" in line]
    assert [line.split(":")[0] for line in lines] == ["task colour", "task animal"], messages_file.read_text()
    assert all("rank 1 on " in line for line in lines)
    assert all(0.3 < record["step_spread"] < 1 for record in read_raw_metrics(document)[2:])


def run_slowly_and_write_messages(document: dict[str, Any], path: str) -> None:
    """Run with a slow rank 1, and write the printed messages to a file."""
    from dscl.monitoring.observer import Observer

    original = Observer.print_message

    def note(self: Observer, text: str) -> None:
        if comm.is_main():
            with open(path, "a") as file:
                file.write(f"{text}\n")

    Observer.print_message = note  # type: ignore[method-assign]
    try:
        run_with_a_slow_rank(document, 1, 0.1)
    finally:
        Observer.print_message = original  # type: ignore[method-assign]


def run_out_of_memory(document: dict[str, Any]) -> list[str]:
    """Run out of memory in a step; the order of the memory snapshot and of the engine's end."""
    events: list[str] = []
    patch = pytest.MonkeyPatch()

    def loss(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    close = Engine.close
    with patch.context() as patched:
        patched.setattr(Sequential, "loss", loss)
        patched.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: events.append("snapshot"))
        patched.setattr(Engine, "close", lambda self: (events.append("close"), close(self)))
        with pytest.raises(ExternalFailure, match="CUDA out of memory"):
            run(document)
    return events


def test_when_memory_runs_out_the_engine_is_still_in_the_snapshot(ranks: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "too-large", 1, evaluate={"zero_shot": False})
    assert ranks(1)(run_out_of_memory, document) == [["snapshot", "close"]]


def test_traces_are_written_by_the_ranks_that_were_asked(ranks: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "traced", 2, observe__profile={"steps": [2, 3], "ranks": [1]}, train__epochs=1)
    ranks(WORLD)(run, document)
    (path,) = (Path(document["run_dir"]) / "traces").iterdir()
    assert path.name == "rank-1-steps-2-3.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    for part in ("data", "forward", "backward", "optimizer"):
        assert names.count(part) >= 2, part
    assert names.count("communication: all_reduce") >= 2


def test_a_router_is_shown_at_every_evaluation_that_is_asked_for(ranks: Any, tasks: Path) -> None:
    """Also with tasks after which no evaluation follows."""
    names = ("colour", "animal", "hue", "beast")
    stream = [
        {"name": name, "path": str(tasks / place), "train_limit": 8}
        for name, place in zip(names, ("colour", "animal") * 2, strict=True)
    ]
    document = recipe_of(
        tasks,
        "seldom",
        1,
        stream=stream,
        method={"name": "asr", "router": {"num_features": 64}},
        evaluate={"every": 2, "tasks": "seen"},
    )
    document["observe"]["tensorboard"] = True
    ranks(WORLD)(run, document)
    scores = json.loads((Path(document["run_dir"]) / "scores.json").read_text())
    assert [any(score is not None for score in row) for row in scores["matrix"]] == [False, True, False, True]
    assert scores["confusion"]["tasks"] == list(names)


class EngineStub:
    """The attributes of an engine that LossMonitor reads."""

    uses_loss_scaling = False


def make_loss_monitor(messages: list[str]) -> LossMonitor:
    return LossMonitor(
        EngineStub(), "x", 1, False, lambda number: [f"record {number}"], lambda record: None, messages.append
    )  # type: ignore[arg-type]


def spike_steps(losses: torch.Tensor) -> list[str]:
    """The steps at which a spike is reported."""
    messages: list[str] = []
    monitor = make_loss_monitor(messages)
    for number, loss in enumerate(losses.tolist()):
        monitor._check_for_spike(number, number + 1, loss)
    return [line.split(":")[0].removeprefix("task x, step ") for line in messages]


def test_a_loss_that_leaps_is_told_with_its_records() -> None:
    messages: list[str] = []
    monitor = make_loss_monitor(messages)
    for number in range(SPIKE_WINDOW):
        monitor._check_for_spike(number, number + 1, 1.0 + 0.01 * (number % 5))
    assert not messages
    monitor._check_for_spike(100, 101, 1.2)
    assert not messages, "a loss may move"
    monitor._check_for_spike(101, 102, 9.0)
    assert len(messages) == 1
    assert "step 102: the loss leaps to 9, after a median of 1.02" in messages[0]
    assert "record 101" in messages[0]
    for number in range(102, 102 + 2 * SPIKE_MIN_STEPS):
        monitor._check_for_spike(number, number + 1, 9.0)
    assert len(messages) == 1, "a lasting level is not reported again"
    monitor._check_for_spike(200, 201, 12.0)
    assert len(messages) == 2, "an earlier spike does not hide the next"


@pytest.mark.parametrize("steep", [0.0, 8.0], ids=["level", "after-a-steep-start"])
@pytest.mark.parametrize("spread", [0.05, 0.1])
def test_a_loss_that_nearly_doubles_is_told(steep: float, spread: float) -> None:
    """A jump from 2 to 3.9 is reported in each of a hundred runs."""
    step = torch.arange(101.0)
    for seed in range(100):
        losses = torch.randn(101, generator=torch.Generator().manual_seed(seed)) * spread
        losses += 2.0 + steep * torch.exp(-step / 15)
        losses[100] = 3.9
        assert spike_steps(losses) == ["101"]


def test_ordinary_noise_is_not_told() -> None:
    """20 runs of 500 steps of each kind. No spike is reported for normally distributed losses, and hardly any for very
    skewed losses and for losses with few outlying samples."""
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(20, 500, generator=chance)
    skewed = -torch.rand(20, 500, 2, generator=chance).log().mean(2)
    wrong = 0.7 - 2 * torch.rand(20, 500, 8, generator=chance).log()
    wrong *= torch.rand(20, 500, 8, generator=chance) < 0.1
    steep = 8.0 * torch.exp(-torch.arange(500.0) / 15)
    kinds = {
        "small": 2 + 0.05 * normal, "large": 2 + 0.6 * normal, "steep": 2 + steep + 0.6 * normal, "skewed": skewed,
        "wrong": wrong.mean(2),
    }  # fmt: skip
    num_spikes = {kind: sum(len(spike_steps(run)) for run in runs) for kind, runs in kinds.items()}
    assert max(num_spikes.pop("skewed"), num_spikes.pop("wrong")) <= 2
    assert not any(num_spikes.values()), num_spikes


def test_pairs_are_those_of_each_sample_alone() -> None:
    from dscl.data.batches import BatchSampler

    lengths = torch.tensor([5, 1, 3]).numpy()
    schedule = BatchSampler(
        lengths - 1, lengths * 0 + 1,
        seed=0, epochs=1, global_batch=2, micro_batch=1, world_size=1, max_length=8, packing=True,
    )  # fmt: skip
    steps: list[StepPlan] = [schedule.step_plan(number) for number in range(2)]
    assert sum(step.attention_pairs for step in steps) == 15 + 1 + 6
    assert sum(step.num_tokens for step in steps) == 9
