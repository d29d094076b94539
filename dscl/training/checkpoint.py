"""Checkpoints: written atomically, verified by checksums before use, loadable by any number of ranks.

A checkpoint is one folder. Every rank writes its shards of the trainable tensors and of the method's rows
(safetensors). The main rank adds the method's state and the run's `TrainState` (state.json), and writes the marker
`complete.json` last, with the size and checksum of every file. Only then does the folder get its final name, so a kill
or a full disk never damages the previous checkpoint. The artifacts of finished tasks are written once, into the run's
folder; the marker holds their checksums too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dscl.config.parsing import did_you_mean
from dscl.config.schema import CheckpointConfig
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.optimizer import ParamShard
from dscl.maths import scores
from dscl.methods.base import Method
from dscl.utils.errors import ExternalFailure, RunStopped, UserError

log = logging.getLogger("dscl")
MARKER_FILE = "complete.json"
SAVED_FILE = ".saved"  # stands in the run's folder once a first checkpoint is complete
FORMAT = 2
FileChecksum = dict[str, int]  # {"bytes": size, "crc32": checksum}
FileContent = bytes | dict[str, torch.Tensor]
ROW_PREFIX = "rows"  # begins the key of a method's rows in a rank's file
MATRIX_FILE_PREFIX = "owned-"  # begins the name of the file with a rank's state of the matrices it owns


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
                    self.checksums[name] = _write_bytes(path, content)
                else:
                    self.checksums[name] = _write_tensors(path, content)
        except (OSError, SafetensorError) as error:
            self.problem = self.problem or f"rank {comm.rank()}: {error}"
        self.done.set()

    def start(self) -> None:
        """Write in a background thread, from a copy: training goes on and changes the tensors."""
        self._files = {name: _copy_to_host(content) for name, content in self._files.items()}
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
                    _fsync_file(path)
                    self._artifacts[str(path.relative_to(self.folder.parent))] = _compute_checksum(path)
            except (OSError, ExternalFailure) as error:
                problem = str(error)
        if problem := comm.broadcast_from_main(problem):
            self._raise_if_folder_removed(problem)
            raise ExternalFailure(
                f"{self.folder.parent}: cannot be written ({problem}); make room and run again to go on"
            )

    def save(self, name: str, position: Mapping[str, Any], engine: Engine, method: Method) -> None:
        """Write one checkpoint; all ranks call it. If any rank fails, the run stops and the previous one stays."""
        self.finish_pending()
        started, partial, problem = time.monotonic(), self.folder / f"{name}.partial", ""
        try:
            if comm.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()  # without parents: a run's folder that somebody removed is not created again
        except OSError as error:
            problem = str(error)
        comm.barrier()
        rows = {f"{ROW_PREFIX}|0|{name}": values for name, values in method.row_state_dict().items()}
        files: dict[str, FileContent] = {
            f"rank-{comm.rank():05d}.safetensors": {**dict(_name_tensors(engine.shards.disjoint_shards())), **rows},
        }
        if matrix_state := method.matrix_state_dict():
            files[f"{MATRIX_FILE_PREFIX}{comm.rank():05d}.safetensors"] = matrix_state
        if comm.is_main():
            state = {
                "format": FORMAT,
                "world": comm.world_size(),
                "optimizer_steps": engine.shards.step_count(),
                "loss_scale": engine.loss_scale_state(),
                "position": position,
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
                _write_bytes(partial / MARKER_FILE, json.dumps({"files": files, "left": self._artifacts}).encode())
                if final.exists():  # left by an earlier start; this start found it damaged
                    shutil.rmtree(final)
                _fsync_folder(partial)
                os.replace(partial, final)
                _fsync_folder(self.folder)
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
            damage = next(filter(None, comm.all_gather_objects(_find_damage(folder))), "")
            if not damage:
                self._artifacts = json.loads((folder / MARKER_FILE).read_text("utf-8")).get("left", {})
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
        if damage := next(filter(None, comm.all_gather_objects(_find_damage(folder))), ""):
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
            position = json.loads((folder / "state.json").read_text("utf-8"))["position"]
        except (OSError, ValueError, KeyError):  # damaged
            continue
        if position["step"] or position["learned"] or not position["matrix"]:
            continue
        if metric == "heldout":
            value = -position["heldout"][-1] if position["heldout"] else None
        else:
            value = scores.summarize(position["matrix"])[str(metric)]
        if value is not None and math.isfinite(value) and (best is None or (value, folder.name) > best[:2]):
            best = value, folder.name, folder
    return best[2] if best else None


def load_checkpoint(folder: Path, engine: Engine, method: Method) -> dict[str, Any]:
    """Load a checkpoint into the engine and the method; returns the fields of its `TrainState`."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    if state["format"] != FORMAT:
        raise ExternalFailure(
            f"{folder}: written in format {state['format']}, this dscl reads {FORMAT}; use the one that wrote it"
        )
    with ExitStack() as stack:
        engine.shards.restore_shards(_ShardReader(folder, stack).read, state["optimizer_steps"])
    engine.load_loss_scale_state(state["loss_scale"])
    with safe_open(folder / "method.safetensors", framework="pt") as file:
        method_state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    method.load_state_dict(method_state, _read_rows(folder))
    with ExitStack() as stack:
        method.load_matrix_state(_open_matrix_state(folder, stack))
    return dict(state["position"])


class MasterWeights:
    """The fp32 master weights in a checkpoint: whole tensors, each read on demand.

    `model_shapes` names all tensors of the model; `shapes` are those among them that were trained. The files stay open,
    so reading works to the end even if the checkpoint is removed meanwhile in favour of newer ones.
    """

    def __init__(self, folder: Path, model_shapes: Mapping[str, torch.Size]) -> None:
        self._shards = _ShardReader(folder, ExitStack())
        self.shapes = {name: shape for name, shape in model_shapes.items() if self._shards.has_tensor(name, "master")}

    def read(self, name: str) -> torch.Tensor:
        return self._shards.read(name, "master", 0, self.shapes[name].numel()).view(self.shapes[name])


def _read_rows(folder: Path) -> dict[str, torch.Tensor]:
    """This rank's part of the method's rows, redistributed from however many ranks wrote the checkpoint."""
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a dict
                if stored.startswith(f"{ROW_PREFIX}|"):
                    parts.setdefault(stored.split("|", 2)[2], []).append(file.get_tensor(stored))
    return {name: torch.cat(values)[comm.rank() :: comm.world_size()] for name, values in parts.items()}


def _open_matrix_state(folder: Path, stack: ExitStack) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function from a matrix's name to its saved tensors, whichever rank owned the matrix when it was saved."""
    entries: dict[str, dict[str, tuple[Any, str]]] = {}
    for path in sorted(folder.glob(f"{MATRIX_FILE_PREFIX}*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for stored in file.keys():  # noqa: SIM118 - not a dict
            matrix, kind = stored.rsplit("|", 1)
            entries.setdefault(matrix, {})[kind] = file, stored

    def read(matrix: str) -> dict[str, torch.Tensor]:
        return {kind: file.get_tensor(stored) for kind, (file, stored) in entries.get(matrix, {}).items()}

    return read


class _ShardReader:
    """Reads any range of elements of any saved tensor, from whichever ranks' files hold them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for stored in file.keys():  # noqa: SIM118 - not a dict
                kind, start, name = stored.split("|", 2)
                if kind == ROW_PREFIX:
                    continue
                (length,) = file.get_slice(stored).get_shape()
                self._pieces.setdefault((name, kind), []).append((int(start), int(start) + length, file, stored))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def has_tensor(self, name: str, kind: str) -> bool:
        return (name, kind) in self._pieces

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        parts, position = [], start
        for first, last, file, stored in self._pieces.get((name, kind), []):
            if first <= position < last:
                end = min(last, stop)
                parts.append(file.get_slice(stored)[position - first : end - first])
                position = end
                if position == stop:
                    return torch.cat(parts)
        raise ExternalFailure(
            f"the checkpoint lacks {kind} of {name} from element {position}: it belongs to another model or method"
        )


def _name_tensors(shards: Iterable[ParamShard]) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in shards:
        for kind, values in shard.state_tensors().items():
            yield f"{kind}|{shard.start}|{shard.name}", values


def _copy_to_host(content: FileContent) -> FileContent:
    """A copy on the host, which further training does not change."""
    if isinstance(content, bytes):
        return content
    return {name: value.detach().to("cpu", copy=True) for name, value in content.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileChecksum:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    _fsync_file(path)
    return _compute_checksum(path)


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, content: bytes) -> FileChecksum:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _compute_checksum(path)


def _compute_checksum(path: Path) -> FileChecksum:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _find_damage(folder: Path) -> str:
    """Verify this rank's share of the checkpoint's files; describes the first problem, or returns ""."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text("utf-8"))
        files = [(folder / name, checksum) for name, checksum in sorted(marker["files"].items())]
        files += [(folder.parent.parent / name, checksum) for name, checksum in sorted(marker.get("left", {}).items())]
    except (OSError, ValueError, KeyError):
        return f"{MARKER_FILE} is missing or unreadable"
    for index, (path, checksum) in enumerate(files):
        name = path.name if path.parent == folder else path.relative_to(folder.parent.parent)
        if index % comm.world_size() == comm.rank():
            try:
                size = path.stat().st_size
                actual = _compute_checksum(path) if size == checksum["bytes"] else None
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:  # for example a failing disk
                return f"{name} cannot be read ({error.strerror})"
            if actual is None:
                return f"{name} has {size} bytes of {checksum['bytes']}"
            if actual != checksum:
                return f"{name} does not match its checksum"
    return ""


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
