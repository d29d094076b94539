"""The contract of a method, one suite for all of them: its state and its task artifacts are restored by fresh objects,
also on another number of ranks, and a run that is killed around a task ends as an undisturbed run.

Each method trains one reference run of two short tasks; all tests of the method start from what was recorded there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dscl.data.batches import collate_prompts
from dscl.engine.engine import Engine
from dscl.methods.base import TaskContext
from dscl.methods.registry import METHODS, find_method
from dscl.recipe.recipe import resolve_recipe
from dscl.training import run as training_run
from dscl.training.checkpoint import Checkpoints
from dscl.training.setup import RunSetup, build_setup
from dscl.training.state import TrainState
from tests.support.five_tasks import NAMES, recipe, tasks
from tests.support.osft_runs import with_few_texts
from tests.support.runs import Killed, run, run_outcome
from tests.support.toy_model import assemble

__all__ = ["tasks"]  # the fixture
Tensors = dict[str, torch.Tensor]
MID_TASK, FINAL = "step-00000004", "step-00000006-scored"  # checkpoints: in the second task, and of the complete run
ARTIFACTS = ("adapters", "router", "experts", "samples")  # folders of a run for the artifacts of ended tasks
LORA = {"rank": 4, "dropout": 0.2}


class Case(NamedTuple):
    """A method under settings that give it much state, where it runs, and which state that is."""

    settings: dict[str, Any]
    world: int
    deepspeed: str
    state: tuple[str, ...] = ()  # in the second task, on every rank, besides the trained tensors
    artifacts: tuple[str, ...] = ()


CASES = {
    "sequential": Case({}, 1, "zero1"),
    "joint": Case({"tune": {"name": "lora", **LORA}}, 1, "zero0"),
    "replay": Case({"replay": {"size": 3}, "tune": {"name": "lora", **LORA}}, 2, "zero0", ("samples",), ("samples",)),
    "agem": Case({"constraint": {"memory_ratio": 0.2}}, 2, "zero2_offload", ("samples",), ("samples",)),
    "ewc": Case(
        {"constraint": {"ewc_lambda": 300.0, "gamma": 0.5, "fisher_samples": 16}},
        2, "zero3_offload_all", ("fisher", "anchor"),
    ),
    "lwf": Case({"loss": {"top_tokens": 50}}, 2, "zero1", ("state",)),
    "olora": Case({"tune": LORA}, 1, "zero0", (), ("adapters",)),
    "lora_per_task": Case({"tune": LORA}, 1, "zero2", (), ("adapters",)),
    "asr": Case(
        {"tune": LORA, "router": {"num_features": 64, "layer": 1, "ood_fallback": False}},
        2, "zero1", ("rows",), ("adapters", "router"),
    ),
    "osft": Case(
        {
            "constraint": {
                "projection": "two_sided", "protect_base": ["weights", "activations"], "rank_allocation": "energy",
                "protected_ratio": 0.3, "protect_task": ["updates", "sensitivity"], "energy_threshold": 0.9,
                "on_full": "release_base", "project_every": 2,
            }
        },
        2, "zero1", ("owned",),
    ),
    "moses": Case(
        {
            "tune": {"num_experts": 2, "rank": 2, "mask_density": 0.75, "masks": "element", "dropout": 0.2},
            "router": {"num_features": 64, "layer": 1, "ood_fallback": False},
        },
        2, "zero2", ("state", "rows"), ("experts", "router"),
    ),
}  # fmt: skip


def test_every_method_has_a_case() -> None:
    assert list(CASES) == list(METHODS)


def contract_recipe(folder: Path, method: str, name: str) -> Any:
    """Two tasks of three steps each (for joint training six steps at once), with a checkpoint within each."""
    document = recipe(folder, f"{method} {name}", 0, NAMES[:2], checkpoint={"every": 2, "keep": 99}, layers=2)
    document["train"] |= {"lr": 1e-2, "epochs": 1, "weight_decay": 0.1}
    document["stream_defaults"] = {"dev_share": 0, "train_limit": 21, "test_limit": 5}
    document["evaluate"] = {"zero_shot": False, "tasks": "seen"}
    document["deepspeed"] = f"ds_configs/{CASES[method].deepspeed}.json"
    return document | {"method": {"name": method, **CASES[method].settings}}


# ---- snapshots of a method and its engine


@dataclass
class Snapshot:
    """Everything that a method and its engine hold on one rank."""

    shards: dict[str, list[tuple[int, torch.Tensor]]]  # by kind and parameter: first element, values
    optimizer_steps: int
    state: Tensors
    rows: Tensors
    owned: Tensors
    samples: list[Any]  # of ended tasks, for replay or as reference batches
    buffers: Tensors  # of the model; they hold the frozen parameters of ended tasks
    answers: dict[str | None, Any]  # logits and routing decisions, with each task id given and with none


def take_snapshot(engine: Engine, setup: RunSetup) -> Snapshot:
    method = setup.method
    shards: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for shard in engine.shards.disjoint_shards():
        for kind, values in shard.state_tensors().items():
            shards.setdefault(f"{kind} {shard.name}", []).append((shard.start, values.clone()))
    return Snapshot(
        shards=shards,
        optimizer_steps=engine.shards.step_count(),
        state=clone_tensors(method.state_dict()),
        rows=clone_tensors(method.row_state_dict()),
        owned=clone_tensors(method.matrix_state_dict()),
        samples=[(buffer.task, buffer.samples) for buffer in (*method.replay_samples(), *method.reference_samples())],
        buffers=clone_tensors(dict(engine.module.named_buffers())),
        answers=compute_answers(engine, setup),
    )


def clone_tensors(tensors: Tensors) -> Tensors:
    return {name: values.clone() for name, values in tensors.items()}


@torch.no_grad()
def compute_answers(engine: Engine, setup: RunSetup) -> dict[str | None, Any]:
    answers_by_task: dict[str | None, Any] = {}
    prompts = [task_data.eval_set.prompt_ids[i] for i in range(3) for task_data in setup.tasks]
    batch = collate_prompts(prompts, setup.tasks[0].pad_id, setup.tasks[0].bos_id)
    training = engine.module.training
    engine.module.eval()
    for task in (None, *(task_data.task.name for task_data in setup.tasks)):
        with setup.method.inference_context(batch, task) as routes:
            logits = engine.module(batch.input_ids, batch.attention_mask, batch.position_ids).logits
        answers_by_task[task] = logits, list(routes or ())
    engine.module.train(training)
    return answers_by_task


def restored_snapshot(document: dict[str, Any], checkpoint: str) -> Snapshot:
    """Of a fresh job and engine that were brought to a checkpoint of the run."""
    setup = build_setup(resolve_recipe(document))
    engine = setup.build_engine()
    training_run.restore_checkpoint(Path(document["run_dir"]) / "checkpoints" / checkpoint, engine, setup)
    snapshot = take_snapshot(engine, setup)
    engine.close()
    return snapshot


def assert_identical(actual: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, whatever the structure."""
    if dataclasses.is_dataclass(expected):
        actual, expected = vars(actual), vars(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_identical(actual[name], value, f"{where} {name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for number, value in enumerate(expected):
            assert_identical(actual[number], value, f"{where} {number}")
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        assert actual.contiguous().numpy().tobytes() == expected.contiguous().numpy().tobytes(), where
    else:
        assert actual == expected, where


# ---- the reference run


Requests = dict[tuple[str, int], int]  # by phase ("begin_task", "end_task") and task: how many requests to the ranks
REQUESTS = (
    "probe_activations",
    "iter_batches",
    "gather_full_weights",
    "apply_on_owners",
    "all_reduce_sum",
    "task_samples",
    "local_shards",
    "sample_groups",
    "compute_gradients",
)


class ReferenceRun(NamedTuple):
    folder: Path
    mid_task: list[Snapshot]  # rank by rank
    final: list[Snapshot]
    requests: Requests


def run_and_record(document: dict[str, Any]) -> tuple[Snapshot, Snapshot, Requests]:
    """Run undisturbed; on this rank, the snapshots at both checkpoints, and the requests around each task."""
    snapshots: dict[str, Snapshot] = {}
    requests: Requests = {}
    setups: list[RunSetup] = []
    save = Checkpoints.save

    def build_and_record_setup(*arguments: Any) -> RunSetup:
        setups.append(build_setup(*arguments))
        return setups[-1]

    def save_and_snapshot(self: Checkpoints, train_state: TrainState, scores: Any, engine: Engine, method: Any) -> None:
        save(self, train_state, scores, engine, method)
        name = train_state.checkpoint_name()
        if name in (MID_TASK, FINAL):
            snapshots[name] = take_snapshot(engine, setups[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "build_setup", build_and_record_setup)
        patch.setattr(Checkpoints, "save", save_and_snapshot)
        for phase in ("begin_task", "end_task"):
            count_requests(patch, find_method(document["method"]["name"]), phase, requests)
        run(document)
    return snapshots[MID_TASK], snapshots[FINAL], requests


def count_requests(patch: pytest.MonkeyPatch, method: type, phase: str, requests: Requests) -> None:
    original = getattr(method, phase)

    def counting(self: Any, index: int, name: str, ranks: TaskContext) -> Any:
        def count() -> None:
            requests[phase, index] += 1

        requests[phase, index] = 0
        return original(self, index, name, with_callback(ranks, count))

    patch.setattr(method, phase, counting)


def with_callback(ranks: TaskContext, callback: Callable[[], None]) -> TaskContext:
    """The same ranks; `callback` is called after each request."""

    def wrapped(request: Callable[..., Any]) -> Callable[..., Any]:
        def requesting(*arguments: Any) -> Any:
            result = request(*arguments)
            callback()
            return result

        return requesting

    return dataclasses.replace(ranks, **{name: wrapped(getattr(ranks, name)) for name in REQUESTS})


@pytest.fixture(scope="module")
def reference(ranks: Any, tasks: Path) -> Callable[[str], ReferenceRun]:
    """A method's reference run. It is made once; nobody may write into its folder."""
    runs: dict[str, ReferenceRun] = {}

    def get(method: str) -> ReferenceRun:
        if method not in runs:
            document = contract_recipe(tasks, method, "reference")
            mid_task, final, requests = zip(
                *ranks(CASES[method].world)(with_few_texts, run_and_record, document), strict=True
            )
            assert all(counts == requests[0] for counts in requests)  # every rank makes the same requests
            runs[method] = ReferenceRun(Path(document["run_dir"]), list(mid_task), list(final), requests[0])
        return runs[method]

    return get


# ---- state and artifacts


@pytest.mark.parametrize("method", list(METHODS))
def test_state_is_restored_in_a_fresh_object(ranks: Any, tasks: Path, reference: Any, method: str) -> None:
    """In the middle of the second task: weights, moments, state, rows, owned tensors, samples and buffers."""
    case, expected = CASES[method], reference(method).mid_task
    for snapshot in expected:
        state = {name for name in ("state", "rows", "owned", "samples") if getattr(snapshot, name)}
        state |= {name.partition(" ")[0] for name in snapshot.shards} - {"master", "exp_avg", "exp_avg_sq"}
        assert state == set(case.state)
        assert snapshot.optimizer_steps == (4 if method == "joint" else 1)
    restored = ranks(case.world)(
        with_few_texts, restored_snapshot, contract_recipe(tasks, method, "reference"), MID_TASK
    )
    assert sorted_rows(restored) == sorted_rows(expected)  # any rank may get any row
    assert_identical(*([dataclasses.replace(snapshot, rows={}) for snapshot in each] for each in (restored, expected)))


@pytest.mark.parametrize("method", list(METHODS))
def test_task_artifacts_are_restored_in_a_fresh_object(ranks: Any, tasks: Path, reference: Any, method: str) -> None:
    """After the last task: the frozen parameters and every answer. A method that answers by task has two answers."""
    case, reference_run = CASES[method], reference(method)
    assert {path.relative_to(reference_run.folder).parts[0] for path in artifact_files(reference_run.folder)} == set(
        case.artifacts
    )
    for snapshot in reference_run.final:
        first, second = (snapshot.answers[task][0] for task in NAMES[:2])
        assert torch.equal(first, second) != METHODS[method].uses_task_id
    restored = ranks(case.world)(with_few_texts, restored_snapshot, contract_recipe(tasks, method, "reference"), FINAL)
    assert_identical(restored, reference_run.final)


def sorted_rows(snapshots: list[Snapshot]) -> list[Any]:
    """Of all ranks, in an order of their own."""
    return sorted(
        tuple(values[row].numpy().tobytes() for values in snapshot.rows.values())
        for snapshot in snapshots
        for row in range(len(next(iter(snapshot.rows.values()), ())))
    )


def artifact_files(folder: Path) -> list[Path]:
    return sorted(path for name in ARTIFACTS for path in (folder / name).rglob("*") if path.is_file())


# ---- another number of ranks


def merge_ranks(snapshots: list[Snapshot]) -> dict[str, Any]:
    """The state of all ranks together, however it is divided among them."""
    first, *others = snapshots
    for other in others:
        for name in ("state", "samples", "buffers", "optimizer_steps"):
            assert_identical(getattr(other, name), getattr(first, name), name)
    owned: Tensors = {}
    for snapshot in snapshots:
        assert not owned.keys() & snapshot.owned.keys()  # each matrix has one owner
        owned |= snapshot.owned
    shards = assemble([snapshot.shards for snapshot in snapshots])
    return {**vars(first), "owned": owned, "rows": sorted_rows(snapshots), "shards": shards, "answers": None}


@pytest.mark.parametrize(
    ("method", "world"),
    [
        *((method, 3 - CASES[method].world) for method in METHODS),
        *(pytest.param(method, 4, marks=[] if method == "osft" else [pytest.mark.exhaustive]) for method in METHODS),
    ],
)
def test_another_number_of_ranks_restores_the_same_state(
    ranks: Any, tasks: Path, reference: Any, method: str, world: int
) -> None:
    """Matrices get other owners; rows and shards are divided anew."""
    expected = reference(method).mid_task
    restored = ranks(world)(with_few_texts, restored_snapshot, contract_recipe(tasks, method, "reference"), MID_TASK)
    assert_identical(merge_ranks(restored), merge_ranks(expected))
    if "owned" in CASES[method].state:
        assert all(snapshot.owned for snapshot in restored)


# ---- kills


# A call, and its number in the process that dies after it; for begin_task and end_task the task in which it dies.
# "leave" dies between end_task and the task's artifacts, "left" after they are written; "marker" when all files of a
# checkpoint are written but its marker.
KILLS = (
    ("begin_task", 0), ("step", 3), ("end_task", 0), ("leave", 1), ("left", 1),
    ("begin_task", 1), ("step", 2), ("end_task", 1), ("leave", 1), ("marker", 3),
)  # fmt: skip
KILLS_OF_ONE_TASK = (("begin_task", 0), ("step", 3), ("step", 3), ("end_task", 0), ("leave", 1), ("left", 1))


def die_within(patch: pytest.MonkeyPatch, method: type, phase: str, task: int, request: int) -> None:
    """While a task begins or ends: after that request to the ranks; where there is none, when the phase is over."""
    original = getattr(method, phase)

    def dying(self: Any, index: int, name: str, ranks: TaskContext) -> Any:
        if index != task:
            return original(self, index, name, ranks)
        calls = [0]

        def count() -> None:
            calls[0] += 1
            if calls[0] == request:
                raise Killed

        original(self, index, name, with_callback(ranks, count))
        assert request == 0
        raise Killed

    patch.setattr(method, phase, dying)


def die_at(patch: pytest.MonkeyPatch, owner: type, name: str, number: int, before: bool = False) -> None:
    """Before or after a call of a function."""
    original, calls = getattr(owner, name), [0]

    def dying(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == number:
            raise Killed
        result = original(*arguments, **more)
        if calls[0] == number:
            raise Killed
        return result

    patch.setattr(owner, name, dying)


def run_with_kills(document: dict[str, Any], kills: Iterable[tuple[str, int]], requests: Requests) -> None:
    """Run and die again and again, each time with fresh objects; then run to the end."""
    method = find_method(document["method"]["name"])
    for place, number in kills:
        with pytest.MonkeyPatch.context() as patch:
            if place in ("begin_task", "end_task"):
                die_within(patch, method, place, number, -(-requests[place, number] // 2))
            elif place == "step":
                die_at(patch, Engine, "step", number)
            elif place == "marker":
                die_at(patch, Checkpoints, "finish_pending", number, before=True)
            else:
                die_at(patch, Checkpoints, "write_task_artifacts", number, before=place == "leave")
            with pytest.raises(Killed):
                run(document)
    run(document)


def checksums(folder: Path) -> dict[str, str]:
    """Of every checkpoint's files and of all task artifacts."""
    files = [path for path in sorted((folder / "checkpoints").rglob("*")) if path.is_file()] + artifact_files(folder)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_killed_run_ends_as_an_undisturbed_run(ranks: Any, tasks: Path, reference: Any, method: str) -> None:
    """Killed while a task begins and ends, between steps, and around the writing of artifacts and checkpoints."""
    document, undisturbed = contract_recipe(tasks, method, "killed"), reference(method)
    kills = KILLS_OF_ONE_TASK if METHODS[method].joint else KILLS
    ranks(CASES[method].world)(with_few_texts, run_with_kills, document, kills, undisturbed.requests)
    assert run_outcome(Path(document["run_dir"])) == run_outcome(undisturbed.folder)
    assert checksums(Path(document["run_dir"])) == checksums(undisturbed.folder)
