"""Checkpoints: written atomically, verified by checksums before use, loadable by any number of ranks.

A checkpoint is one folder. Every rank writes its shards of the trainable tensors and of the method's rows
(safetensors). The main rank adds the method's state, and the run's `TrainState` and `ScoreBoard` (state.json). It
writes the marker `complete.json` last, with the size and checksum of every file. Only then does the folder get its
final name, so a kill or a full disk never damages the previous checkpoint. The artifacts of finished tasks are written
once, into the run's folder; the marker holds their checksums too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dscl.config.parsing import did_you_mean
from dscl.config.schema import CheckpointConfig
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.methods.base import Method, RunInfo
from dscl.monitoring.score_board import ScoreBoard
from dscl.training.checkpoint_files import (
    MARKER_FILE,
    MATRIX_FILE_PREFIX,
    ROW_PREFIX,
    FileContent,
    ShardReader,
    copy_to_host,
    find_damage,
    fsync_file,
    fsync_folder,
    name_tensors,
    open_matrix_state,
    read_marker,
    read_rows,
    write_bytes,
    write_tensors,
)
from dscl.training.state import Phase, TrainState
from dscl.utils.atomic_io import FileChecksum, file_checksum
from dscl.utils.errors import ExternalFailure, RunStopped, UserError
from dscl.utils.json_files import add_checksum

log = logging.getLogger("dscl")
SAVED_FILE = ".saved"  # stands in the run's folder once a first checkpoint is complete
FORMAT = 3


class CheckpointWriter:
    """Writes one rank's files of one checkpoint, now (`run`) or in a background thread (`start`)."""

    def __init__(self, name: str, folder: Path, files: Mapping[str, FileContent], started: float) -> None:
        self.name, self.folder, self.started = name, folder, started
        self.checksums: dict[str, FileChecksum] = {}
        self.problem = ""
        self.done = comm.SharedFlag()
        self._files = files
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            for name, content in self._files.items():
                path = self.folder / name
                if isinstance(content, bytes):
                    self.checksums[name] = write_bytes(path, content)
                else:
                    self.checksums[name] = write_tensors(path, content)
        except (OSError, SafetensorError) as error:
            self.problem = self.problem or f"rank {comm.rank()}: {error}"
        self.done.set()

    def start(self) -> None:
        """Write in a background thread, from a copy: training goes on and changes the tensors."""
        self._files = {name: copy_to_host(content) for name, content in self._files.items()}
        self._thread = threading.Thread(target=self._run_in_thread, name="checkpoint", daemon=True)
        self._thread.start()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except Exception as error:  # an exception in a thread would go unnoticed
            self.problem = f"rank {comm.rank()}: {error!r}"
            self.done.set()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self.done.close()


class Checkpoints:
    """The `checkpoints/` folder of a run. `on_saved` is called with the seconds that each checkpoint took."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.on_saved: Callable[[float], None] = lambda seconds: None
        self._artifacts: dict[str, FileChecksum] = {}  # of finished tasks, by path in the run's folder
        self._pending: CheckpointWriter | None = None

    def write_task_artifacts(self, write: Callable[[], Iterable[Path]]) -> None:
        """The main rank calls `write`, which writes a finished task's files and returns their paths.

        The marker of every later checkpoint holds their checksums.
        """
        self.finish_pending()  # a checkpoint from before these files must not list them
        problem = ""
        if comm.is_main():
            try:
                self.folder.stat()  # raises if the folder was removed: `write` would create its parent again
                for path in write():
                    fsync_file(path)
                    self._artifacts[str(path.relative_to(self.folder.parent))] = file_checksum(path)
            except (OSError, ExternalFailure) as error:
                problem = str(error)
        if problem := comm.broadcast_from_main(problem):
            self._raise_if_folder_removed(problem)
            raise ExternalFailure(
                f"{self.folder.parent}: cannot be written ({problem}); make room and run again to go on"
            )

    def save(self, train_state: TrainState, score_board: ScoreBoard, engine: Engine, method: Method) -> None:
        """Write one checkpoint; all ranks call it. If any rank fails, the run stops and the previous one stays."""
        self.finish_pending()
        name = train_state.checkpoint_name()
        started, partial, problem = time.monotonic(), self.folder / f"{name}.partial", ""
        try:
            if comm.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()  # without parents: a run's folder that somebody removed is not created again
        except OSError as error:
            problem = str(error)
        comm.barrier()
        rows = {f"{ROW_PREFIX}|0|{key}": values for key, values in method.row_state_dict().items()}
        files: dict[str, FileContent] = {
            f"rank-{comm.rank():05d}.safetensors": {**dict(name_tensors(engine.shards.disjoint_shards())), **rows},
        }
        if matrix_state := method.matrix_state_dict():
            files[f"{MATRIX_FILE_PREFIX}{comm.rank():05d}.safetensors"] = matrix_state
        if comm.is_main():
            state = {
                "format": FORMAT,
                "world_size": comm.world_size(),
                "optimizer_steps": engine.shards.step_count(),
                "loss_scale": engine.loss_scale_state(),
                "base_model": _base_model(method.run_info),
                "train_state": train_state.to_json(),
                "scores": score_board.to_json(),
            }
            files |= {"method.safetensors": method.state_dict(), "state.json": json.dumps(state).encode()}
        self._pending = CheckpointWriter(name, partial, files, started)
        self._pending.problem = problem
        if self.config.async_:
            self._pending.start()
        else:
            self._pending.run()
            self.finish_pending()

    @contextmanager
    def finish_pending_on_exit(self) -> Iterator[None]:
        """Finish the pending checkpoint on exit and on `RunStopped`, but not on other errors: ranks may be gone."""
        try:
            yield
        except RunStopped:
            self.finish_pending()
            raise
        self.finish_pending()

    def finish_pending_if_written(self) -> None:
        """Finish the pending checkpoint if all ranks have written their files; called after every step."""
        if self._pending is not None and self._pending.done.count_ranks_set() == comm.world_size():
            self.finish_pending()

    def finish_pending(self) -> None:
        """Wait for the pending checkpoint, write its marker and give the folder its final name; all ranks call it."""
        writer, self._pending = self._pending, None
        if writer is None:
            return
        writer.wait()
        final, partial = self.folder / writer.name, writer.folder
        reports = comm.all_gather_objects((writer.checksums, writer.problem))
        problem = next((p for _, p in reports if p), "")
        if not problem and comm.is_main():
            try:
                files = {name: checksum for report, _ in reports for name, checksum in report.items()}
                marker = json.dumps(add_checksum({"files": files, "artifacts": self._artifacts})).encode()
                write_bytes(partial / MARKER_FILE, marker)
                if final.exists():  # left by an earlier start; this start found it damaged
                    shutil.rmtree(final)
                fsync_folder(partial)
                os.replace(partial, final)
                fsync_folder(self.folder)
                (self.folder.parent / SAVED_FILE).touch()
            except OSError as error:
                problem = str(error)
        problem = comm.broadcast_from_main(problem)
        if problem:
            if comm.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            self._raise_if_folder_removed(problem)
            complete = self._list_complete()
            raise ExternalFailure(
                f"checkpoint {writer.name} could not be written to {self.folder} ({problem}); "
                + (
                    f"{complete[-1].name} is intact: make room and run again to go on from it"
                    if complete
                    else "none was there"
                )
            )
        if comm.is_main():
            self._remove_old(writer.name)
        self.on_saved(time.monotonic() - writer.started)
        comm.barrier()

    def _raise_if_folder_removed(self, problem: str) -> None:
        """Raise a `UserError` if the folder is gone: an automatic restart would train from the start."""
        if comm.broadcast_from_main(not self.folder.is_dir()):
            raise UserError(
                f"{self.folder}: removed by somebody while the run went on ({problem}); put it back to go on from its "
                "newest checkpoint, or remove all of the run's folder to start from nothing"
            )

    def _remove_old(self, newest: str) -> None:
        # Checkpoints later than the newest are damaged (`find_newest` skipped them) and do not count for `keep`.
        folders = [path for path in self._list_complete() if path.name <= newest]
        best = find_best_checkpoint(folders, self.config.best)
        for folder in folders[: -self.config.keep]:
            if folder != best:
                shutil.rmtree(folder, ignore_errors=True)

    def find_newest(self) -> Path | None:
        """The newest intact checkpoint, the same on every rank; damaged ones are skipped with a warning.

        None if there never was a checkpoint. If all are damaged or gone, an error: the user has to decide.
        """
        damage = ""
        for folder in reversed(comm.broadcast_from_main(self._list_complete())):
            damage = next(filter(None, comm.all_gather_objects(find_damage(folder))), "")
            if not damage:
                self._artifacts = read_marker(folder)["artifacts"]
                return folder
            log.warning("checkpoint %s is damaged (%s); going back to the one before", folder.name, damage)
        if damage:
            raise ExternalFailure(
                f"{self.folder}: no checkpoint there is whole ({damage}); restore that file, or remove the run's "
                "folder to start from nothing"
            )
        if comm.broadcast_from_main((self.folder.parent / SAVED_FILE).exists()):
            raise UserError(
                f"run_dir: {self.folder.parent} has saved checkpoints, and none is there any more; put them "
                "back, choose another run_dir, or remove the run's folder to start from nothing"
            )
        return None

    def find_checkpoint(self, name: str | None) -> Path | None:
        """The checkpoint of that name, the best one ("best"), or the newest (None); None if there is no checkpoint."""
        if name is None:
            return self.find_newest()
        folders = {path.name: path for path in comm.broadcast_from_main(self._list_complete())}
        if name == "best" and self.config.best is not None:
            best = comm.broadcast_from_main(find_best_checkpoint(folders.values(), self.config.best))
            name = best.name if best else name
        if name not in folders:
            why = "is not there" if name != "best" else "needs checkpoint.best in the recipe, and a task's end"
            allowed = f"allowed: {', '.join(folders)}" if folders else "there is none yet, so train first"
            raise UserError(f"--checkpoint: given {name}, which {why}{did_you_mean(name, folders)}; {allowed}")
        folder = folders[name]
        if damage := next(filter(None, comm.all_gather_objects(find_damage(folder))), ""):
            raise ExternalFailure(f"checkpoint {folder.name} is damaged ({damage}); use another one")
        return folder

    def _list_complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))


def find_best_checkpoint(folders: Iterable[Path], metric: str | None) -> Path | None:
    """The checkpoint with the best value of `metric` (checkpoint.best); among equals the latest.

    Only checkpoints right after an evaluation count.
    """
    best: tuple[float, str, Path] | None = None
    for folder in folders if metric is not None else ():
        try:
            train_state, score_board = read_progress(folder)
        except (OSError, ValueError, KeyError):  # damaged
            continue
        if train_state.phase is not Phase.TRAINING or train_state.task_step or not score_board.rows:
            continue
        if metric == "heldout":
            value = -score_board.heldout_losses[-1] if score_board.heldout_losses else None
        else:
            value = score_board.summary[str(metric)]
        if value is not None and math.isfinite(value) and (best is None or (value, folder.name) > best[:2]):
            best = value, folder.name, folder
    return best[2] if best else None


def reject_other_base_model(folder: Path, run_info: RunInfo) -> None:
    """Raise a `UserError` if the base model or the tokenizer is not the one that the checkpoint's run started from."""
    saved = json.loads((folder / "state.json").read_text("utf-8")).get("base_model", {})
    changed = [name for name, fingerprint in _base_model(run_info).items() if saved.get(name) != fingerprint]
    if changed := comm.broadcast_from_main(changed):
        raise UserError(
            f"run_dir: {folder.parent.parent} was started with another {' and '.join(changed)} than "
            f"{run_info.base_model} holds now; put back what was there, or choose another run_dir"
        )


def _base_model(run_info: RunInfo) -> dict[str, str]:
    """The fingerprints of what a run starts from."""
    return {"model": run_info.model, "tokenizer": run_info.tokenizer}


def read_progress(folder: Path) -> tuple[TrainState, ScoreBoard]:
    """How far the run had come at a checkpoint, and its results until then."""
    return _parse_progress(json.loads((folder / "state.json").read_text("utf-8")))


def _parse_progress(state: Mapping[str, Any]) -> tuple[TrainState, ScoreBoard]:
    """The two parts of state.json that training goes on from."""
    return TrainState.from_json(state["train_state"]), ScoreBoard.from_json(state["scores"])


def load_checkpoint(folder: Path, engine: Engine, method: Method) -> tuple[TrainState, ScoreBoard]:
    """Load a checkpoint into the engine and the method; returns how far the run had come, and its results."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    if state["format"] != FORMAT:
        raise ExternalFailure(
            f"{folder}: written in format {state['format']}, this dscl reads {FORMAT}; use the one that wrote it"
        )
    with ExitStack() as stack:
        engine.shards.restore_shards(ShardReader(folder, stack).read, state["optimizer_steps"])
    engine.load_loss_scale_state(state["loss_scale"])
    with safe_open(folder / "method.safetensors", framework="pt") as file:
        method_state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    method.load_state_dict(method_state, read_rows(folder))
    with ExitStack() as stack:
        method.load_matrix_state(open_matrix_state(folder, stack))
    return _parse_progress(state)
