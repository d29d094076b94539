"""Complete runs in tests: two small tasks, a recipe for them, ways to end a run early, and the results of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dscl.distributed import comm
from dscl.distributed.preemption import StopHandler
from dscl.engine.engine import Engine
from dscl.engine.zero_shards import ZeroShards
from dscl.monitoring.throughput import is_measured_metric
from dscl.recipe.recipe import resolve_recipe
from dscl.training import checkpoint, evaluation
from dscl.training import run as training_run
from dscl.utils.errors import ExternalFailure, UserError

WORDS = (
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "fast",
    "slow",
    "today",
    "here",
    "there",
)


# AdamW's eps where runs are compared that round differently. With the default of 1e-8 the first step of an entry is the
# sign of its gradient, and where the gradient is nearly zero, rounding decides the sign.
EPS = 1e-3


class Killed(BaseException):
    """Ends a run in the middle as SIGKILL would; no handler catches it."""


def write_tasks(folder: Path) -> None:
    """Two small tasks in the CL_Benchmark layout; their sizes are no multiples of the batch size."""
    for task, (labels, train_size) in {
        "colour": (["warm", "cold"], 37),
        "animal": (["yes", "no", "maybe"], 30),
    }.items():
        generator = random.Random(task)
        (folder / task).mkdir(parents=True)
        (folder / task / "labels.json").write_text(json.dumps(labels))
        for split, size in (("train", train_size), ("test", 11)):
            records = [
                {
                    "label": generator.choice(labels),
                    "sentence": " ".join(generator.choices(WORDS, k=generator.randint(3, 9))),
                }
                for _ in range(size)
            ]
            (folder / task / f"{split}.json").write_text(json.dumps(records))


def recipe_of(folder: Path, run: str, stage: int = 0, **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "run_dir": str(folder / run),
        "model": {
            "shape": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "vocab_size": 300,
            }
        },
        "method": {"name": "sequential"},
        "stream": [{"name": name, "path": str(folder / name)} for name in ("colour", "animal")],
        "data": {"cache_dir": str(folder / "cache")},
        "train": {"lr": 3e-3, "global_batch": 8, "micro_batch": 2, "max_length": 48, "precision": "fp32", "epochs": 2},
        "deepspeed": f"ds_configs/zero{stage}.json",
        "checkpoint": {"every": 3},
        "observe": {"every": 2, "tensorboard": False, "live": "off"},
    }
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            document.setdefault(section, {})[name] = value
        else:
            document[section] = value
    return document


def merge_parts(method: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `method` with other keys. The keys of a part that both have are merged."""
    merged = dict(method)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if is_part else value
    return merged


def read_metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not is_measured_metric(name)} for record in records]


def run_outcome(run: Path) -> tuple[Any, ...]:
    """The results of a run: metrics, scores, and the checksums of its last checkpoint."""
    newest = sorted(p for p in (run / "checkpoints").iterdir())[-1]
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.iterdir()}
    return read_metrics(run), json.loads((run / "scores.json").read_text()), newest.name, files


def reference_recipe(folder: Path, stage: int = 0, world: int = 2, **changes: Any) -> tuple[dict[str, Any], int]:
    """The arguments of `undisturbed_run` (recipe, number of ranks) for a run with which others are compared."""
    name = hashlib.sha256(json.dumps([stage, world, changes], sort_keys=True).encode()).hexdigest()[:12]
    return recipe_of(folder, f"whole-{name}", stage, **changes), world


def copy_run(folder: Path, name: str) -> Path:
    """Copy a run directory to a new name beside it."""
    return Path(shutil.copytree(folder, folder.parent / name))


def run(document: dict[str, Any], check_cluster: bool = False) -> None:
    training_run.train(resolve_recipe(document), check_cluster=check_cluster)


@contextmanager
def large_eps() -> Iterator[None]:
    """Within this context every engine's AdamW uses EPS."""
    original = Engine.__init__

    def init_with_eps(self: Engine, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        for group in self.optimizer.param_groups:
            group["eps"] = EPS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", init_with_eps)
        yield


def run_with_eps(document: dict[str, Any]) -> None:
    with large_eps():
        run(document)


def run_killed_after(document: dict[str, Any], deaths: list[tuple[str, int]], places: dict[str, Any]) -> None:
    """Run and die right after the n-th call of a function, once for each entry of `deaths`; then run to the end."""
    for name, count in deaths:
        owner, attribute = places[name]
        original, calls = getattr(owner, attribute), [0]

        def call_and_die(
            *a: Any, original: Any = original, calls: list[int] = calls, count: int = count, **k: Any
        ) -> Any:
            result = original(*a, **k)
            calls[0] += 1
            if calls[0] == count:
                raise Killed
            return result

        setattr(owner, attribute, call_and_die)
        try:
            with pytest.raises(Killed):
                run(document)
        finally:
            setattr(owner, attribute, original)
    run(document)


def run_until(document: dict[str, Any], deaths: list[tuple[str, int]]) -> None:
    """Run and die at the n-th call of a function, once for each entry of `deaths`; then run to the end."""
    places: dict[str, Any] = {
        "step": (Engine, "step"),
        "save": (checkpoint.Checkpoints, "save"),
        "gather": (comm, "all_gather_objects"),
        "take": (evaluation, "evaluate_task"),
        "shares": (ZeroShards, "disjoint_shards"),
    }
    for name, count in deaths:
        owner, attribute = places[name]
        original, calls = getattr(owner, attribute), [0]

        def count_and_die(
            *a: Any, original: Any = original, calls: list[int] = calls, count: int = count, **k: Any
        ) -> Any:
            calls[0] += 1
            if calls[0] == count:
                raise Killed
            return original(*a, **k)

        setattr(owner, attribute, count_and_die)
        try:
            run(document)
            raise AssertionError(f"{name} was called only {calls[0]} times")
        except Killed:
            pass
        finally:
            setattr(owner, attribute, original)
    run(document)


def run_until_killed(document: dict[str, Any], steps: int) -> None:
    original, calls = Engine.step, [0]

    def count_and_die(*a: Any, **k: Any) -> Any:
        calls[0] += 1
        if calls[0] == steps:
            raise Killed
        return original(*a, **k)

    Engine.step = count_and_die  # type: ignore[method-assign]
    try:
        run(document)
    except Killed:
        pass
    finally:
        Engine.step = original  # type: ignore[method-assign]


def run_listening(document: dict[str, Any], check_cluster: bool = False) -> list[str]:
    """Run; the messages that this rank printed."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    original = training_run.Observer.print_message
    training_run.Observer.print_message = lambda _self, text: lines.append(text)  # type: ignore[method-assign]
    logger = logging.getLogger("dscl")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        run(document, check_cluster)
    finally:
        training_run.Observer.print_message = original  # type: ignore[method-assign]
        logger.removeHandler(handler)
    return lines


def run_error(document: dict[str, Any]) -> tuple[str, str]:
    try:
        run(document)
    except (ExternalFailure, UserError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def truncate(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


class StopAtPoll(StopHandler):
    """Sets the stop flag on one rank at the n-th call of `stop_requested`, as a signal would."""

    def __init__(self, poll: int) -> None:
        super().__init__()
        self.polls_left = poll

    def stop_requested(self) -> bool:
        self.polls_left -= 1
        if self.polls_left == 0 and comm.rank() == comm.world_size() - 1:
            assert self._flag is not None
            self._flag.set()
        return super().stop_requested()


def make_easy(folder: Path, task: str) -> None:
    """Add the task's name to each sentence, and give all samples the same label, which the other task does not have."""
    label = json.loads((folder / task / "labels.json").read_text())[0]
    for split in ("train", "test"):
        path = folder / task / f"{split}.json"
        sentences = [f"{task} {record['sentence']} {task}" for record in json.loads(path.read_text())]
        path.write_text(json.dumps([{"label": label, "sentence": sentence} for sentence in sentences]))
