"""Complete runs on real ranks: resuming is bitwise, evaluation changes nothing, errors are reported and lose
nothing."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.zero_shards import ZeroShards
from dscl.recipe.recipe import Recipe, resolve_recipe
from dscl.training import checkpoint_files, run_dir
from dscl.training import run as training_run
from dscl.training.checkpoint import Checkpoints
from dscl.training.setup import build_setup
from dscl.utils.errors import ExternalFailure, UserError
from dscl.utils.json_files import write_checked_json
from tests.support.runs import (
    copy_run,
    flip,
    read_metrics,
    recipe_of,
    reference_recipe,
    run,
    run_error,
    run_listening,
    run_outcome,
    run_until,
    run_until_killed,
    truncate,
    write_tasks,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def killed(ranks: Any, tasks: Path) -> Path:
    """A run that was killed in its ninth step, to be copied."""
    document = recipe_of(tasks, "killed")
    ranks(2)(run_until_killed, document, 9)
    return Path(document["run_dir"])


def test_evaluating_less_often_changes_nothing_else(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    seldom = recipe_of(tasks, "seldom", 1, evaluate={"every": 2})
    new = recipe_of(tasks, "new", 1, evaluate={"tasks": "new"})
    for document in (seldom, new):
        ranks(2)(run, document)
    runs = [undisturbed_run(*reference_recipe(tasks, 1)), *(Path(document["run_dir"]) for document in (seldom, new))]
    a, b, c = (json.loads((run / "scores.json").read_text()) for run in runs)
    assert b["matrix"] == [[None, None], a["matrix"][1]]
    assert c["matrix"] == [[a["matrix"][0][0], None], a["matrix"][1]]
    assert b["summary"]["OP"] == c["summary"]["OP"] == a["summary"]["OP"]
    assert b["summary"]["BWT"] is None
    assert c["summary"]["BWT"] == a["summary"]["BWT"]
    assert c["summary"]["FWT"] is None
    assert read_metrics(runs[1]) == read_metrics(runs[2]) == read_metrics(runs[0])


DEATHS = {
    "steps": [("step", 2), ("step", 4), ("step", 7)],
    "evaluations": [("take", 1), ("take", 3), ("save", 3), ("step", 1)],
    "saving": [("shares", 5), ("gather", 4), ("step", 3)],
}
FAST = [(0, "steps"), (0, "saving"), (3, "evaluations"), (3, "saving")]


def changes_with_much_state(folder: Path) -> dict[str, Any]:
    """Settings with much state: a replay buffer, packed rows, held-out texts, the best checkpoint."""
    (folder / "warm.txt").write_text("warm cold " * 4)
    return {
        "method": {"name": "replay", "replay": {"size": 9}},
        "train__packing": True,
        "train__weight_decay": 0.1,
        "train__epochs": 1,
        "evaluate": {"heldout": str(folder / "warm.txt")},
        "checkpoint": {"every": 3, "keep": 2, "best": "heldout"},
    }


@pytest.mark.parametrize(
    ("stage", "deaths"),
    [
        pytest.param(stage, deaths, marks=() if (stage, deaths) in FAST else pytest.mark.exhaustive)
        for stage in (0, 1, 2, 3)
        for deaths in DEATHS
    ],
)
def test_a_run_that_died_ends_as_one_that_did_not(
    ranks: Any, undisturbed_run: Any, tasks: Path, stage: int, deaths: str
) -> None:
    changes = changes_with_much_state(tasks) if stage == 3 else {}
    expected = run_outcome(undisturbed_run(*reference_recipe(tasks, stage, **changes)))
    assert expected[1]["complete"]
    name = f"died{stage}-{deaths}"
    ranks(2)(run_until, recipe_of(tasks, name, stage, **changes), DEATHS[deaths])
    assert run_outcome(tasks / name) == expected


def run_forgetting_moments(document: dict[str, Any]) -> None:
    original = ZeroShards.restore_shards

    def restore_masters_only(self: ZeroShards, read: Any, steps: int) -> None:
        def read_or_zero(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            values: torch.Tensor = read(name, kind, start, stop)
            return values if kind == "master" else torch.zeros_like(values)

        original(self, read_or_zero, steps)

    ZeroShards.restore_shards = restore_masters_only  # type: ignore[method-assign]
    try:
        run_until(document, [("step", 6)])
    finally:
        ZeroShards.restore_shards = original  # type: ignore[method-assign]


def test_losing_the_moments_would_be_noticed(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    ranks(2)(run_forgetting_moments, recipe_of(tasks, "moments-lost", 1))
    assert read_metrics(tasks / "moments-lost") != read_metrics(undisturbed_run(*reference_recipe(tasks, 1)))


LORA: dict[str, Any] = {
    "method": {"name": "sequential", "tune": {"name": "lora", "dropout": 0.2}}, "train__epochs": 1
}  # fmt: skip
STAGES = [pytest.param(0, marks=pytest.mark.exhaustive), 3]


@pytest.mark.parametrize("stage", STAGES)
def test_evaluating_changes_no_loss(ranks: Any, undisturbed_run: Any, tasks: Path, stage: int) -> None:
    """With dropout: a random number that an evaluation draws would change the losses."""
    little = recipe_of(tasks, f"little{stage}", stage, evaluate={"zero_shot": False, "tasks": "seen"}, **LORA)
    ranks(2)(run, little)
    assert read_metrics(tasks / f"little{stage}") == read_metrics(
        undisturbed_run(*reference_recipe(tasks, stage, **LORA))
    )


def test_a_run_goes_on_at_another_size_and_stage(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    ranks(2)(run_until_killed, recipe_of(tasks, "size", 3), 7)
    moved = recipe_of(tasks, "size", 1)
    ranks(1)(run, moved)
    expected, changed = read_metrics(undisturbed_run(*reference_recipe(tasks))), read_metrics(tasks / "size")
    assert [r["step"] for r in changed] == [r["step"] for r in expected]
    assert [r["loss"] for r in changed] == pytest.approx([r["loss"] for r in expected], rel=1e-4)


def unmark(folder: Path) -> None:
    (folder / "complete.json").unlink()


def falsify(folder: Path) -> None:
    """Damage a file, and its checksum in the marker so that it agrees."""
    state = folder / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"task_step": ', b'"task_step":  '))
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"]["state.json"] = checkpoint_files.file_checksum(state)
    (folder / "complete.json").write_text(json.dumps(marker))


def blank_out(folder: Path) -> None:
    (folder / "complete.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, flip, unmark, falsify, blank_out])
def test_a_damaged_checkpoint_is_passed_over(
    ranks: Any, undisturbed_run: Any, killed: Path, tasks: Path, damage: Any
) -> None:
    name = f"damaged-{damage.__name__}"
    checkpoint_dirs = sorted((copy_run(killed, name) / "checkpoints").iterdir())
    assert len(checkpoint_dirs) == 2
    damage(checkpoint_dirs[-1])
    lines = ranks(2)(run_listening, recipe_of(tasks, name))[0]
    assert any(f"checkpoint {checkpoint_dirs[-1].name} is damaged" in line for line in lines)
    assert any(f"resumed from {checkpoint_dirs[-2].name}" in line for line in lines)
    assert run_outcome(tasks / name) == run_outcome(undisturbed_run(*reference_recipe(tasks)))


def run_on_a_full_disk(document: dict[str, Any], call: int) -> tuple[str, str]:
    """The `call`-th write of tensors on rank 1 finds the disk full."""
    original, calls = checkpoint_files.save_file, [0]

    def write_or_fail(tensors: Any, path: Path) -> None:
        calls[0] += 1
        if comm.rank() == 1 and calls[0] == call:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    checkpoint_files.save_file = write_or_fail
    try:
        return run_error(document)
    finally:
        checkpoint_files.save_file = original


def test_a_full_disk_keeps_the_checkpoint_before(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "full")
    for kind, message in ranks(2)(run_on_a_full_disk, document, 3):
        assert kind == "ExternalFailure"
        assert "No space left on device" in message
        assert "step-00000003 is intact" in message
    assert [p.name for p in sorted((tasks / "full" / "checkpoints").iterdir())] == ["step-00000000", "step-00000003"]
    ranks(2)(run, document)
    assert run_outcome(tasks / "full") == run_outcome(undisturbed_run(*reference_recipe(tasks)))


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def endless_slope(loss: torch.Tensor) -> torch.Tensor:
    """The same loss with an infinite gradient: that of a square root at zero."""
    return loss + (loss * 0.0).sqrt()


def run_with_non_finite_step(document: dict[str, Any], at: int, spoil: Any = not_a_number) -> tuple[str, str]:
    """The loss of step `at` is NaN on rank 1, or its gradient."""
    original, calls = Engine.step, [0]

    def step(self: Engine, loss: Any, batches: Any, **k: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and comm.rank() == 1:
            return original(self, lambda m, b: spoil(loss(m, b)), batches, **k)
        return original(self, loss, batches, **k)

    Engine.step = step  # type: ignore[method-assign]
    try:
        return run_error(document)
    finally:
        Engine.step = original  # type: ignore[method-assign]


def run_and_lose_the_folder(document: dict[str, Any], steps: int) -> str:
    original, calls = Engine.step, [0]

    def remove_and_step(*a: Any, **k: Any) -> Any:
        calls[0] += 1
        if calls[0] == steps and comm.is_main():
            shutil.rmtree(document["run_dir"])
        return original(*a, **k)

    Engine.step = remove_and_step  # type: ignore[method-assign]
    try:
        run(document)
    except UserError as error:  # which no launcher starts again after
        return str(error)
    finally:
        Engine.step = original  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize(("method", "at"), [("sequential", 5), ("lora_per_task", 10)])  # at 10: a task's end
def test_a_folder_that_somebody_removed_is_noticed(ranks: Any, tasks: Path, method: str, at: int) -> None:
    """The run directory is not created again, because the artifacts of ended tasks would be missing."""
    observe = {"every": 50, "tensorboard": False, "live": "off"}
    changes: dict[str, Any] = {"method": {"name": method}, "observe": observe, "checkpoint__every": 3}
    document = recipe_of(tasks, f"removed {method}", 2, **changes)
    for message in ranks(2)(run_and_lose_the_folder, document, at):
        assert f"{tasks / f'removed {method}' / 'checkpoints'}: removed by somebody while the run went on" in message
        assert "No such file or directory" in message
    assert not list((tasks / f"removed {method}").rglob("*.safetensors"))


def test_a_run_whose_checkpoints_were_removed_is_not_started_anew(
    ranks: Any, undisturbed_run: Any, killed: Path, tasks: Path
) -> None:
    """The refused run changes nothing. When the checkpoints are put back, it resumes bitwise."""
    document = recipe_of(tasks, "emptied")
    folder = copy_run(killed, "emptied")
    lines = (folder / "metrics.jsonl").read_bytes()
    for is_folder_left in (False, True):  # or removed as a whole
        shutil.move(folder / "checkpoints", tasks / "aside")
        if is_folder_left:
            (folder / "checkpoints").mkdir()
        for kind, message in ranks(2)(run_error, document):
            assert kind == "UserError"
            assert f"run_dir: {folder} has saved checkpoints, and none is there any more" in message
        for kind, message in ranks(2)(run_error, {**document, "seed": 5}):
            assert (kind, "seed" in message) == ("UserError", True)
        assert (folder / "metrics.jsonl").read_bytes() == lines
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.move(tasks / "aside", folder / "checkpoints")
    ranks(2)(run, document)
    assert run_outcome(folder) == run_outcome(undisturbed_run(*reference_recipe(tasks)))


def test_a_run_killed_before_its_first_checkpoint_starts_over(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    changes: dict[str, Any] = {"evaluate": {"zero_shot": False}, "checkpoint__every": 8, "train__epochs": 1}
    ranks(2)(run_until_killed, recipe_of(tasks, "early", **changes), 5)
    assert read_metrics(tasks / "early")
    assert not list((tasks / "early" / "checkpoints").glob("step-*"))
    ranks(2)(run, recipe_of(tasks, "early", **changes))
    assert run_outcome(tasks / "early") == run_outcome(undisturbed_run(*reference_recipe(tasks, **changes)))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_stops_the_run(ranks: Any, tasks: Path, stage: int) -> None:
    name = f"nan{stage}"
    for kind, message in ranks(2)(run_with_non_finite_step, recipe_of(tasks, name, stage), 5):
        assert kind == "ExternalFailure"
        assert "task colour, step 5: the loss is nan" in message
        assert "train.json, record" in message
    assert sorted(p.name for p in (tasks / name / "checkpoints").iterdir())[-1] == "step-00000003"
    bad = read_metrics(tasks / name)[-1]
    assert bad["step"] >= 5


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.exhaustive), (0, "bf16"), (1, "bf16"),
        pytest.param(2, "fp32", marks=pytest.mark.exhaustive), (3, "fp32"),
    ],
)  # fmt: skip
def test_a_gradient_that_is_not_finite_stops_the_run(ranks: Any, tasks: Path, stage: int, precision: str) -> None:
    """Also with a finite loss: the weights of the step are lost, or DeepSpeed has skipped the step."""
    name = f"slope{stage}{precision}"
    document = recipe_of(tasks, name, stage, train__precision=precision, checkpoint__every=4)
    for kind, message in ranks(2)(run_with_non_finite_step, document, 4, endless_slope):
        assert kind == "ExternalFailure"
        assert "task colour, step 4: the gradient is not finite" in message
    assert sorted(p.name for p in (tasks / name / "checkpoints").iterdir()) == ["step-00000000"]


def test_a_loss_that_is_not_finite_may_be_skipped(ranks: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "skip", 2, train__non_finite="skip", train__epochs=1)
    assert ranks(2)(run_with_non_finite_step, document, 5) == [("nothing", "")] * 2
    losses = [record["loss"] for record in read_metrics(tasks / "skip")]
    assert losses[4] is None
    assert all(loss is not None for i, loss in enumerate(losses) if i != 4)


@pytest.mark.parametrize("stage", STAGES)
def test_lora_resumes_bitwise_and_stores_only_itself(ranks: Any, undisturbed_run: Any, tasks: Path, stage: int) -> None:
    expected = undisturbed_run(*reference_recipe(tasks, stage, **LORA))
    ranks(2)(run_until, recipe_of(tasks, f"lora-died{stage}", stage, **LORA), [("step", 5), ("step", 4)])
    assert run_outcome(tasks / f"lora-died{stage}") == run_outcome(expected)
    newest = max((expected / "checkpoints").iterdir())
    paths = list(newest.glob("rank-*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("stage", STAGES)
def test_packing_changes_no_loss(ranks: Any, tasks: Path, stage: int) -> None:
    """In a complete run, with a global batch that does not divide the number of samples."""
    changes = {"train__global_batch": 12, "train__epochs": 1}
    ranks(2)(run, recipe_of(tasks, f"loose{stage}", stage, **changes))
    ranks(2)(run, recipe_of(tasks, f"packed{stage}", stage, **changes, train__packing=True))
    loose, packed = read_metrics(tasks / f"loose{stage}"), read_metrics(tasks / f"packed{stage}")
    assert [r["loss"] for r in packed] == pytest.approx([r["loss"] for r in loose], rel=1e-5)
    assert {r["targets"] for r in loose} == {r["targets"] for r in packed}


@pytest.mark.parametrize(
    ("stage", "packing"), [pytest.param(0, False, marks=pytest.mark.exhaustive), (0, True), (3, False), (3, True)]
)
def test_a_task_with_fewer_samples_than_ranks(ranks: Any, tasks: Path, stage: int, packing: bool) -> None:
    stream = [{"name": n, "path": str(tasks / n), "train_limit": 1, "test_limit": 1} for n in ("colour", "animal")]
    name = f"single{stage}{packing}"
    ranks(2)(run, recipe_of(tasks, name, stage, stream=stream, train__packing=packing, train__epochs=3))
    assert len(read_metrics(tasks / name)) == 6


def eval_output(run_dir: Path) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        training_run.evaluate_run(str(run_dir), [])
    return output.getvalue()


@pytest.mark.parametrize("stage", STAGES)
def test_eval_repeats_the_last_row(ranks: Any, tasks: Path, stage: int) -> None:
    run_dir = tasks / f"scored{stage}"
    ranks(2)(run, recipe_of(tasks, run_dir.name, stage, train__lr=0.05))
    document = json.loads((run_dir / "scores.json").read_text())
    assert document["matrix"][-1] != document["zero_shot"]
    for world in (1, 2):
        line = json.loads(ranks(world)(eval_output, run_dir)[0])
        assert list(line["scores"].values()) == document["matrix"][-1]
        assert line["tasks_trained"] == 2


def rates_and_splits(document: dict[str, Any]) -> list[tuple[float, bool, bool]]:
    """For each task its highest learning rate, and whether it is evaluated on the dev and on the test split."""
    setup = build_setup(resolve_recipe(document))
    return [
        (
            max(map(task_data.learning_rate, range(task_data.num_steps))),
            task_data.eval_set.samples == task_data.task.dev,
            task_data.eval_set.samples == task_data.task.test,
        )
        for task_data in setup.tasks
    ]


@pytest.mark.parametrize(("split", "on"), [("dev", (True, False)), ("test", (False, True))])
def test_a_tasks_own_rate_and_the_split_that_is_evaluated(
    ranks: Any, tasks: Path, split: str, on: tuple[bool, bool]
) -> None:
    document = recipe_of(tasks, "prepared", evaluate__split=split, train__schedule="constant", train__warmup=0.0)
    document["stream"][1]["lr"] = 0.02
    assert ranks(1)(rates_and_splits, document) == [[(3e-3, *on), (0.02, *on)]]


def test_packing_with_flash_attention_needs_single_rows(ranks: Any, tasks: Path) -> None:
    """transformers' flash attention detects packed samples only in batches of one row; in larger ones it would mix
    samples."""
    document = recipe_of(tasks, "flash", train__packing=True, model__attention="flash_attention_2")
    ((kind, message),) = ranks(1)(run_error, document)
    assert kind == "UserError"
    assert "train.micro_batch: given 2" in message


def test_a_damaged_later_checkpoint_does_not_count_as_kept(ranks: Any, killed: Path, tasks: Path) -> None:
    folder = copy_run(killed, "later") / "checkpoints"
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000003", "step-00000006"]
    truncate(folder / "step-00000006")
    ranks(2)(run_until_killed, recipe_of(tasks, "later", checkpoint={"every": 1, "keep": 1}), 2)
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000004", "step-00000006"]


def find_checkpoint_error(document: dict[str, Any], name: str) -> str:
    """The error message when a checkpoint is selected by name; empty without an error."""
    recipe = resolve_recipe(document)
    try:
        Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint).find_checkpoint(name)
    except ExternalFailure as error:
        return str(error)
    return ""


def test_damage_to_one_ranks_share_of_a_chosen_checkpoint_ends_all_ranks(ranks: Any, killed: Path, tasks: Path) -> None:
    folder = copy_run(killed, "chosen") / "checkpoints"
    assert ranks(2)(find_checkpoint_error, recipe_of(tasks, "chosen"), "step-00000003") == ["", ""]
    truncate(folder / "step-00000003")
    for message in ranks(2)(find_checkpoint_error, recipe_of(tasks, "chosen"), "step-00000003"):
        assert message.startswith("checkpoint step-00000003 is damaged (")


def run_without_room_for(document: dict[str, Any], name: str) -> str:
    """The error message of a run whose main rank cannot write this file of the run directory."""
    original = run_dir.write_text_atomically

    def write_or_fail(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        original(path, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir, "write_text_atomically", write_or_fail)
        with pytest.raises(UserError) as raised:
            run(document)
    return str(raised.value)


@pytest.mark.parametrize("name", ["recipe.yaml"])
def test_a_run_directory_that_the_main_rank_cannot_write_to_ends_all_ranks(ranks: Any, tasks: Path, name: str) -> None:
    for message in ranks(2)(run_without_room_for, recipe_of(tasks, f"no {name}"), name):
        assert "cannot be written (No space left on device); choose another" in message


def test_scores_say_complete_only_when_the_last_checkpoint_is_there(
    ranks: Any, undisturbed_run: Any, tasks: Path
) -> None:
    ranks(2)(run_until, recipe_of(tasks, "last"), [("save", 10)])  # the last one
    assert run_outcome(tasks / "last") == run_outcome(undisturbed_run(*reference_recipe(tasks)))


def test_a_finished_run_without_checkpoints_is_not_another_ones(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "cleared")
    copy_run(undisturbed_run(*reference_recipe(tasks, world=1)), "cleared")
    shutil.rmtree(tasks / "cleared" / "checkpoints")
    document["train"]["lr"] = 1e-5
    ((kind, message),) = ranks(1)(run_error, document)
    assert kind == "UserError"
    assert "train.lr" in message


def run_with_fixed_tensors(document: dict[str, Any], which: str) -> Any:
    """Run; tensors whose name contains `which` are restored after every step. The messages of this rank, or its
    error."""
    original = Engine.step

    def step(self: Engine, *a: Any, **k: Any) -> Any:
        saved_masters = {(f.name, f.start): f.master.clone() for f in self.shards.local_shards() if which in f.name}
        result = original(self, *a, **k)
        for fragment in self.shards.local_shards():
            if which in fragment.name:
                fragment.master.copy_(saved_masters[(fragment.name, fragment.start)])
        return result

    Engine.step = step  # type: ignore[method-assign]
    try:
        return run_listening(document)
    except ExternalFailure as failure:
        return str(failure)
    finally:
        Engine.step = original  # type: ignore[method-assign]


def test_training_that_does_nothing_stops(ranks: Any, tasks: Path) -> None:
    for message in ranks(2)(run_with_fixed_tensors, recipe_of(tasks, "stands", 2), ""):
        assert "after 10 steps no trainable tensor has moved" in message


def test_a_tensor_that_never_moves_is_named(ranks: Any, tasks: Path) -> None:
    lines = ranks(2)(run_with_fixed_tensors, recipe_of(tasks, "one-stands", 2), "layers.1.mlp.up_proj")[0]
    still = [line for line in lines if "never" in line]
    assert len(still) == 2  # once a task
    assert "1 of 20 trainable tensors have never moved: model.layers.1.mlp.up_proj.weight" in still[0]


def test_lora_moves_in_full_and_is_not_complained_about(ranks: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "lora", 3, method={"name": "sequential", "tune": "lora"}, train__epochs=1)
    assert not [line for line in ranks(2)(run_listening, document)[0] if "moved" in line]


def test_other_settings_on_the_same_run_are_refused(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "refused", 0)
    copy_run(undisturbed_run(*reference_recipe(tasks, world=1)), "refused")
    document["train"]["lr"] = 1e-5
    ((kind, message),) = ranks(1)(run_error, document)
    assert kind == "UserError"
    assert "train.lr" in message
    assert "0.003" in message
    assert "1e-05" in message


def test_another_model_in_the_same_place_is_refused(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "other base", 0)
    folder = copy_run(undisturbed_run(*reference_recipe(tasks, world=1)), "other base")
    (folder / "scores.json").unlink()  # as if it had died at the very end
    newest = max((folder / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["base_model"]["model"] = "another"
    marker = checkpoint_files.read_marker(newest)
    marker["files"]["state.json"] = checkpoint_files.write_bytes(newest / "state.json", json.dumps(state).encode())
    write_checked_json(newest / "complete.json", marker)
    ((kind, message),) = ranks(1)(run_error, document)
    assert kind == "UserError"
    assert "was started with another model than" in message


def test_a_run_of_a_version_that_lacked_a_key_goes_on(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = recipe_of(tasks, "older", 0)
    recipe_file = copy_run(undisturbed_run(*reference_recipe(tasks, world=1)), "older") / "recipe.yaml"
    stored_recipe = yaml.safe_load(recipe_file.read_text())
    del stored_recipe["evaluate"]["every"], stored_recipe["observe"]["profile"]
    recipe_file.write_text(yaml.safe_dump(stored_recipe))
    ranks(1)(run, document)
    document["evaluate"] = {"every": 2}
    ((kind, message),) = ranks(1)(run_error, document)
    assert kind == "UserError"
    assert "evaluate.every (there: 1, given: 2)" in message


def test_recipes_round_trip(tasks: Path) -> None:
    recipe = resolve_recipe(recipe_of(tasks, "trip"))
    reread = resolve_recipe(yaml.safe_load(recipe.to_yaml()))
    assert isinstance(reread, Recipe)
    assert reread.to_dict() == recipe.to_dict()
