"""Asynchronous saving: the same bytes, the marker comes last, errors are reported; and the best checkpoint is kept."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dscl.distributed import comm
from dscl.recipe.recipe import resolve_recipe
from dscl.training import checkpoint
from dscl.training import run as training_run
from dscl.training.checkpoint import MARKER_FILE, CheckpointConfig, Checkpoints
from dscl.training.state import TrainState
from dscl.training.trainer import Trainer
from dscl.utils.errors import ExternalFailure, RunStopped, UserError
from dscl.utils.json_files import write_checked_json
from tests.support.runs import Killed, StopAtPoll, recipe_of, reference_recipe, run, run_outcome, write_tasks
from tests.support.score_boards import make_score_board


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    write_tasks(folder)
    return folder


class SlowWrites:
    """Within this context writing a file takes longer, and may fail; the names of writing threads are recorded."""

    def __init__(self, seconds: float, fails: bool = False) -> None:
        self.seconds, self.fails = seconds, fails
        self.original = checkpoint.write_tensors
        self.threads: set[str] = set()

    def __enter__(self) -> SlowWrites:
        def slow(path: Path, tensors: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            time.sleep(self.seconds)
            if self.fails and comm.rank() == comm.world_size() - 1 and path.name.startswith("rank-"):
                raise OSError(28, "No space left on device")
            return self.original(path, tensors)

        checkpoint.write_tensors = slow
        return self

    def __exit__(self, *_: object) -> None:
        checkpoint.write_tensors = self.original


def async_recipe(folder: Path, name: str, stage: int, **changes: Any) -> dict[str, Any]:
    document = recipe_of(folder, name, stage, **changes)
    document["checkpoint"] = {"every": 3, **document["checkpoint"], "async": True}
    return document


def run_slowly(document: dict[str, Any], seconds: float) -> tuple[set[str], list[str]]:
    """Run with slow writes; the names of the writing threads, and the checkpoint folder's files at each step."""
    folder_states: list[str] = []
    original = Checkpoints.finish_pending_if_written

    def finish_pending_if_written(self: Checkpoints) -> None:
        original(self)
        folder_states.append(",".join(sorted(path.name for path in self.folder.iterdir())))

    Checkpoints.finish_pending_if_written = finish_pending_if_written  # type: ignore[method-assign]
    try:
        with SlowWrites(seconds) as slow:
            run(document)
    finally:
        Checkpoints.finish_pending_if_written = original  # type: ignore[method-assign]
    return slow.threads, folder_states


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        (0, "sequential"), (1, "ewc"), (2, "osft"), (3, "moses"),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((3, "sequential"), (3, "asr"), (2, "moses"))),
    ],
)  # fmt: skip
def test_what_is_written_beside_training_is_what_was_there_then(
    ranks: Any, tasks: Path, stage: int, method: str
) -> None:
    """Training continues while a checkpoint is written and changes all weights. All checkpoints are compared, since the
    last one alone would not show a mixture."""
    method_keys = {
        "asr": {"router": {"num_features": 128, "layer": 1}}, "ewc": {"constraint": {"fisher_samples": 16}},
        "moses": {"router": {"num_features": 64, "layer": 1}},
    }.get(method, {})  # fmt: skip
    changes: dict[str, Any] = {
        "method": {"name": method, **method_keys}, "checkpoint": {"every": 2, "keep": 50}, "train__epochs": 1
    }  # fmt: skip
    plain = recipe_of(tasks, f"plain {method} {stage}", stage, **changes)
    asynchronous = async_recipe(tasks, f"beside {method} {stage}", stage, **changes)
    ranks(2)(run, plain)
    (threads, _), _ = ranks(2)(run_slowly, asynchronous, 0.05)
    assert threads == {"checkpoint"}
    plain_dir, asynchronous_dir = (Path(document["run_dir"]) for document in (plain, asynchronous))
    assert run_outcome(asynchronous_dir) == run_outcome(plain_dir)
    names = sorted(path.name for path in (plain_dir / "checkpoints").iterdir())
    assert sorted(path.name for path in (asynchronous_dir / "checkpoints").iterdir()) == names
    assert len(names) > 6
    for name in names:
        for path in sorted((plain_dir / "checkpoints" / name).iterdir()):
            assert (asynchronous_dir / "checkpoints" / name / path.name).read_bytes() == path.read_bytes(), (
                f"{name}/{path.name}"
            )


def run_while_writing_waits(document: dict[str, Any], name: str) -> tuple[bool, list[str]]:
    """Run; writing that checkpoint waits for three more steps. Returns whether they came, and the checkpoint folder's
    files at each step."""
    folder_states: list[str] = []
    has_enough_steps: list[bool] = []
    three_steps_done = threading.Event()
    finish_pending_if_written, write = Checkpoints.finish_pending_if_written, checkpoint.write_tensors

    def finish_and_record(self: Checkpoints) -> None:
        finish_pending_if_written(self)
        folder_states.append(",".join(sorted(path.name for path in self.folder.iterdir())))
        if sum(f"{name}.partial" in state for state in folder_states) > 2:
            three_steps_done.set()

    def wait_and_write(path: Path, tensors: Any) -> Any:
        if path.parent.name == f"{name}.partial":
            has_enough_steps.append(three_steps_done.wait(30))
        return write(path, tensors)

    Checkpoints.finish_pending_if_written, checkpoint.write_tensors = finish_and_record, wait_and_write  # type: ignore[method-assign]
    try:
        run(document)
    finally:
        Checkpoints.finish_pending_if_written, checkpoint.write_tensors = finish_pending_if_written, write  # type: ignore[method-assign]
    return bool(has_enough_steps) and all(has_enough_steps), folder_states


def test_training_goes_on_meanwhile_and_the_name_comes_as_soon_as_all_is_there(ranks: Any, tasks: Path) -> None:
    document = async_recipe(
        tasks, "meanwhile", 2, train__global_batch=4, checkpoint__every=8, evaluate={"zero_shot": False}
    )
    del document["stream"][1:]
    for trained_meanwhile, folder_states in ranks(2)(run_while_writing_waits, document, "step-00000008"):
        assert trained_meanwhile  # steps were made while it was being written
        named = [state for state in folder_states if "step-00000008" in state and ".partial" not in state]
        assert named
        assert not any("step-00000016" in state for state in named[:1])  # before the next one was begun


def run_into_trouble(document: dict[str, Any]) -> str:
    with SlowWrites(0.02, fails=True):
        try:
            run(document)
        except ExternalFailure as error:
            return str(error)
    return ""


def test_a_disk_that_is_full_is_told_and_the_one_before_is_there(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = async_recipe(tasks, "full", 2, train__epochs=1)
    ranks(2)(stop_at, document, 4)
    before = [path.name for path in (tasks / "full" / "checkpoints").iterdir()]
    for message in ranks(2)(run_into_trouble, document):
        assert "could not be written to" in message
        assert "No space left on device" in message
        assert f"{max(before)} is intact" in message
    assert [path.name for path in (tasks / "full" / "checkpoints").iterdir()] == before
    ranks(2)(run, document)
    assert run_outcome(tasks / "full") == run_outcome(undisturbed_run(*reference_recipe(tasks, 2, train__epochs=1)))


def run_without_room_for_the_marker(document: dict[str, Any]) -> str:
    original = checkpoint.write_bytes

    def write_or_fail(path: Path, content: bytes) -> Any:
        if path.name == MARKER_FILE:
            raise OSError(28, "No space left on device")
        return original(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_bytes", write_or_fail)
        with pytest.raises(ExternalFailure) as raised:
            run(document)
    return str(raised.value)


def test_what_the_main_rank_cannot_write_ends_all_ranks(ranks: Any, tasks: Path) -> None:
    for message in ranks(2)(run_without_room_for_the_marker, recipe_of(tasks, "no marker", 2, train__epochs=1)):
        assert "No space left on device" in message


def stop_at(document: dict[str, Any], place: int) -> list[str]:
    """Run and stop at this poll; the names of all checkpoints."""
    with SlowWrites(0.2), pytest.raises(RunStopped):
        training_run.train(resolve_recipe(document), StopAtPoll(place))
    return sorted(path.name for path in (Path(document["run_dir"]) / "checkpoints").iterdir())


def test_a_run_that_stops_waits_for_what_is_being_written(ranks: Any, tasks: Path) -> None:
    document = async_recipe(tasks, "stops", 2, checkpoint__every=100)
    for names in ranks(2)(stop_at, document, 5):
        assert not [name for name in names if name.endswith(".partial")]
        assert names == ["step-00000000", "step-00000004"]  # before training, and where it stopped
    marker = json.loads((tasks / "stops" / "checkpoints" / names[-1] / MARKER_FILE).read_text())
    assert set(marker["files"]) == {"method.safetensors", "state.json", *(f"rank-{r:05d}.safetensors" for r in (0, 1))}


def scores_written(document: dict[str, Any]) -> list[bool]:
    """Run; for each task whether its checkpoint is complete when its scores are written."""
    original, marker_exists = Trainer.write_scores, []

    def record_and_write(self: Trainer) -> Any:
        marker_exists.append((self.checkpoints.folder / self.state.checkpoint_name() / MARKER_FILE).exists())
        return original(self)

    with SlowWrites(0.2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "write_scores", record_and_write)
        run(document)
    return marker_exists


def test_scores_are_written_when_their_checkpoint_is_there(ranks: Any, tasks: Path) -> None:
    document = async_recipe(tasks, "scores", 2, train__epochs=1, evaluate__zero_shot=False)
    assert ranks(2)(scores_written, document) == [[True, True]] * 2


def die_while_writing(document: dict[str, Any]) -> list[str]:
    """Run and die when the files of a checkpoint are written but its marker is not; the names in the folder."""
    original = Checkpoints.finish_pending

    def wait_and_die(self: Checkpoints) -> None:
        if self._pending is not None and self._pending.name == "step-00000006":
            self._pending.wait()
            raise Killed
        original(self)

    Checkpoints.finish_pending = wait_and_die  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            run(document)
    finally:
        Checkpoints.finish_pending = original  # type: ignore[method-assign]
    return sorted(path.name for path in (Path(document["run_dir"]) / "checkpoints").iterdir())


def test_without_its_marker_it_does_not_count(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    document = async_recipe(tasks, "dies", 3, train__epochs=1)
    for names in ranks(2)(die_while_writing, document):
        assert "step-00000006.partial" in names
        assert "step-00000006" not in names
    assert not (tasks / "dies" / "checkpoints" / "step-00000006.partial" / MARKER_FILE).exists()
    ranks(2)(run, document)
    assert run_outcome(tasks / "dies") == run_outcome(undisturbed_run(*reference_recipe(tasks, 3, train__epochs=1)))


def write_fake_checkpoint(checkpoints_dir: Path, total: int, row: list[float], heldout: float, **state: Any) -> None:
    folder = checkpoints_dir / f"step-{total:08d}{'-scored' if not state else ''}"
    folder.mkdir(parents=True)
    write_checked_json(folder / MARKER_FILE, {"files": {}, "artifacts": {}})
    scores = make_score_board([row] * len(row), heldout=[heldout])
    document = {"train_state": TrainState(**state).to_json(), "scores": scores.to_json()}
    (folder / "state.json").write_text(json.dumps(document))


@pytest.mark.parametrize(("by", "best"), [("OP", "step-00000020-scored"), ("heldout", "step-00000010-scored")])
def test_the_best_outlives_the_newest(tmp_path: Path, by: str, best: str) -> None:
    folder = tmp_path / "checkpoints"
    write_fake_checkpoint(folder, 0, [], 0.5)  # before any task
    write_fake_checkpoint(folder, 10, [0.5], 2.0)
    write_fake_checkpoint(folder, 15, [0.9], 1.0, step=5)  # within a task: not scored
    write_fake_checkpoint(folder, 20, [0.8, 0.6], 3.0)
    write_fake_checkpoint(folder, 30, [0.8, 0.5], 4.0)
    write_fake_checkpoint(folder, 40, [0.7, 0.5], 5.0)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1, best=by))
    checkpoints._remove_old("step-00000040-scored")
    assert sorted(path.name for path in folder.iterdir()) == sorted([best, "step-00000040-scored"])
    best_checkpoint = checkpoints.find_checkpoint("best")
    assert best_checkpoint is not None
    assert best_checkpoint.name == best
    assert checkpoints.find_checkpoint(None) == folder / "step-00000040-scored"
    for name in (best, "step-00000040-scored"):
        assert checkpoints.find_checkpoint(name) == folder / name


def test_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_fake_checkpoint(tmp_path, 10, [0.5], 2.0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(UserError, match=r"given best, which needs checkpoint\.best in the recipe"):
        checkpoints.find_checkpoint("best")
    with pytest.raises(UserError, match=r"given step-00000011-scored, which is not there \(did you mean"):
        checkpoints.find_checkpoint("step-00000011-scored")
    with pytest.raises(UserError, match="allowed: step-00000010-scored"):
        checkpoints.find_checkpoint(os.path.join("..", tmp_path.name, "step-00000010-scored"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_has_its_name_only_when_all_of_it_is_on_the_disk(
    ranks: Any, tasks: Path, asynchronous: bool
) -> None:
    changes = {"checkpoint__async": asynchronous, "checkpoint__keep": 50, "train__epochs": 1}
    document = recipe_of(tasks, f"synced {asynchronous}", **changes)
    folder = Path(document["run_dir"]) / "checkpoints"
    events = ranks(1)(run_and_record_syncs, document)[0]
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) > 4
    for name in names:
        partial = folder / f"{name}.partial"
        named = events.index(("named", str(folder / name)))
        marker = events.index(("synced", str(partial / MARKER_FILE)))
        assert events[marker + 1 : named + 2] == [
            ("synced", str(partial)),
            ("named", str(folder / name)),
            ("synced", str(folder)),
        ]
        others = {
            ("synced", str(partial / path.name)) for path in (folder / name).iterdir() if path.name != MARKER_FILE
        }
        assert others <= set(events[:marker])


def run_and_record_syncs(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Run; all calls of fsync and os.replace, in order."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def syncing(handle: int) -> None:
        fsync(handle)
        events.append(("synced", os.readlink(f"/proc/self/fd/{handle}")))

    def naming(source: Any, target: Any) -> None:
        replace(source, target)
        events.append(("named", str(target)))

    os.fsync, os.replace = syncing, naming  # type: ignore[assignment]
    try:
        run(document)
    finally:
        os.fsync, os.replace = fsync, replace
    return events


def test_the_time_that_saving_takes_is_reported(ranks: Any, tasks: Path) -> None:
    """In the record of the next step, or of the last one."""
    document = recipe_of(tasks, "timed", checkpoint__keep=50, train__epochs=1)
    folder = Path(document["run_dir"])
    ranks(2)(run_slowly, document, 0.05)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    save_seconds = {record["step"]: record["save_seconds"] for record in records if "save_seconds" in record}
    saved = {int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir()}
    assert len(saved) > 4
    assert set(save_seconds) == {min(step + 1, records[-1]["step"]) for step in saved}
    assert all(0.1 <= seconds < 60 for seconds in save_seconds.values())  # two files of the main rank


def test_the_best_of_a_run_is_kept(ranks: Any, tasks: Path) -> None:
    """Judged by a held-out text of the first task, which the second task makes worse."""
    (tasks / "warm.txt").write_text("warm cold " * 4)
    document = recipe_of(
        tasks,
        "best",
        checkpoint={"every": 3, "keep": 1, "best": "heldout"},
        evaluate={"heldout": str(tasks / "warm.txt")},
        train__lr=0.01,
    )
    folder = Path(document["run_dir"])
    ranks(2)(run, document)
    _, first, second = json.loads((folder / "scores.json").read_text())["heldout"]
    assert first < second
    best, newest = sorted((folder / "checkpoints").iterdir())
    assert json.loads((best / "state.json").read_text())["scores"]["heldout"][-1] == first
    assert json.loads((newest / "state.json").read_text())["scores"]["heldout"][-1] == second
    assert json.loads(ranks(2)(eval_output, folder, "best")[0])["checkpoint"] == best.name


def eval_output(folder: Path, which: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        training_run.evaluate_run(str(folder), [], checkpoint=which)
    return output.getvalue()
