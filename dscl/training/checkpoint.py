"""Checkpoints that can be trusted: complete or not there, checked before use, readable by any number of ranks.

One folder a checkpoint. Every rank writes its own stretches of the trainable tensors and its method's rows
(safetensors); the main rank adds the run's position (JSON), the method's state, and last of all the marker
`complete.json` with every file's size and checksum. The folder gets its final name only then, so a kill or a full disk
leaves the one before untouched. What ended tasks left for ever is written once, into the run's folder; the marker
vouches for it too.
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

from dscl.config.parsing import nearest
from dscl.config.schema import CheckpointConfig
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.optimizer import Fragment
from dscl.maths import scores
from dscl.methods.base import Method
from dscl.utils.errors import Failure, Stopped, UserError

log = logging.getLogger("dscl")
MARKER = "complete.json"
SAVED = ".saved"  # in the run's folder, as soon as a checkpoint has been whole
FORMAT = 2
Sum = dict[str, int]  # of a file: its bytes and its checksum
Content = bytes | dict[str, torch.Tensor]  # of a file
ROWS = "rows"  # of the method, among a rank's stretches
OWNED = "owned-"  # begins the name of a file with what a rank keeps of its own matrices


class Writing:
    """A rank's files of a checkpoint, on their way to the disk."""

    def __init__(self, name: str, folder: Path, files: Mapping[str, Content], began: float) -> None:
        self.name, self.folder, self.began = name, folder, began
        self.written: dict[str, Sum] = {}
        self.problem = ""
        self.done = comm.Flag()
        self._files = files
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            for name, content in self._files.items():
                path = self.folder / name
                if isinstance(content, bytes):
                    self.written[name] = _write_bytes(path, content)
                else:
                    self.written[name] = _write_tensors(path, content)
        except (OSError, SafetensorError) as error:
            self.problem = self.problem or f"rank {comm.rank()}: {error}"
        self.done.raise_()

    def start(self) -> None:
        """Beside what goes on, from a copy of what that changes."""
        self._files = {name: _copied(content) for name, content in self._files.items()}
        self._thread = threading.Thread(target=self._run_beside, name="checkpoint", daemon=True)
        self._thread.start()

    def _run_beside(self) -> None:
        try:
            self.run()
        except Exception as error:  # which nobody else would hear of
            self.problem = f"rank {comm.rank()}: {error!r}"
            self.done.raise_()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self.done.drop()


class Checkpoints:
    """The `checkpoints/` folder of a run. `saved` is told the seconds that each has taken."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.saved: Callable[[float], None] = lambda seconds: None
        self._left: dict[str, Sum] = {}  # files of ended tasks, by their path in the run's folder
        self._writing: Writing | None = None

    def leave(self, write: Callable[[], Iterable[Path]]) -> None:
        """The main rank writes what an ended task leaves; the checkpoints from now on vouch for these files."""
        self.settle()  # an earlier one does not
        problem = ""
        if comm.is_main():
            try:
                self.folder.stat()  # where it was removed, writing would make its parent anew
                for path in write():
                    _sync(path)
                    self._left[str(path.relative_to(self.folder.parent))] = _facts(path)
            except (OSError, Failure) as error:
                problem = str(error)
        if problem := comm.from_main(problem):
            self._refuse_removed(problem)
            raise Failure(f"{self.folder.parent}: cannot be written ({problem}); make room and run again to go on")

    def save(self, name: str, position: Mapping[str, Any], engine: Engine, method: Method) -> None:
        """Write one checkpoint, all ranks together; on any rank's failure the previous one stays and the run stops."""
        self.settle()
        began, partial, problem = time.monotonic(), self.folder / f"{name}.partial", ""
        try:
            if comm.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()  # no parents: a run's folder that somebody removed is not made anew, half empty
        except OSError as error:
            problem = str(error)
        comm.barrier()
        rows = {f"{ROWS}|0|{name}": values for name, values in method.rows().items()}
        files: dict[str, Content] = {
            f"rank-{comm.rank():05d}.safetensors": {**dict(_named(engine.shards.shares())), **rows},
        }
        if owned := method.owned():
            files[f"{OWNED}{comm.rank():05d}.safetensors"] = owned
        if comm.is_main():
            state = {
                "format": FORMAT,
                "world": comm.world(),
                "optimizer_steps": engine.shards.steps(),
                "loss_scale": engine.loss_scale(),
                "position": position,
            }
            files |= {"method.safetensors": method.state(), "state.json": json.dumps(state).encode()}
        self._writing = Writing(name, partial, files, began)
        self._writing.problem = problem
        if self.config.async_:
            self._writing.start()
        else:
            self._writing.run()
            self.settle()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """On leaving, nothing is still being written; where the ranks have lost each other, it is not waited for."""
        try:
            yield
        except Stopped:
            self.settle()
            raise
        self.settle()

    def poll(self) -> None:
        """After a step: give a checkpoint its name if all of it has been written meanwhile."""
        if self._writing is not None and self._writing.done.raised() == comm.world():
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written, and give it its name; all ranks call it, equally often."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.wait()
        final, partial = self.folder / writing.name, writing.folder
        reports = comm.gather((writing.written, writing.problem))
        problem = next((p for _, p in reports if p), "")
        if not problem and comm.is_main():
            try:
                files = {name: facts for report, _ in reports for name, facts in report.items()}
                _write_bytes(partial / MARKER, json.dumps({"files": files, "left": self._left}).encode())
                if final.exists():  # left by an earlier start, and found damaged by this one
                    shutil.rmtree(final)
                _sync_folder(partial)
                os.replace(partial, final)
                _sync_folder(self.folder)
                (self.folder.parent / SAVED).touch()
            except OSError as error:
                problem = str(error)
        problem = comm.from_main(problem)
        if problem:
            if comm.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            self._refuse_removed(problem)
            kept = self._complete()
            raise Failure(
                f"checkpoint {writing.name} could not be written to {self.folder} ({problem}); "
                + (f"{kept[-1].name} is intact: make room and run again to go on from it" if kept else "none was there")
            )
        if comm.is_main():
            self._remove_old(writing.name)
        self.saved(time.monotonic() - writing.began)
        comm.barrier()

    def _refuse_removed(self, problem: str) -> None:
        """A folder that somebody removed is no failure to start again after: that would train from the start."""
        if comm.from_main(not self.folder.is_dir()):
            raise UserError(
                f"{self.folder}: removed by somebody while the run went on ({problem}); put it back to go on from its "
                "newest checkpoint, or remove all of the run's folder to start from nothing"
            )

    def _remove_old(self, newest: str) -> None:
        # Later ones are damaged (newest() passed them over), so that they do not count as kept.
        there = [path for path in self._complete() if path.name <= newest]
        best = best_of(there, self.config.best)
        for old in there[: -self.config.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; damaged ones are passed over with a line each.

        None if there never was one; if none is whole, or none is there any more, that is for the user to decide on.
        """
        damage = ""
        for folder in reversed(comm.from_main(self._complete())):
            damage = next((found for found in comm.gather(_damage(folder)) if found), "")
            if not damage:
                self._left = json.loads((folder / MARKER).read_text("utf-8")).get("left", {})
                return folder
            log.warning("checkpoint %s is damaged (%s); going back to the one before", folder.name, damage)
        if damage:
            raise Failure(
                f"{self.folder}: no checkpoint there is whole ({damage}); restore that file, or remove the run's "
                "folder to start from nothing"
            )
        if comm.from_main((self.folder.parent / SAVED).exists()):
            raise UserError(
                f"run_dir: {self.folder.parent} has saved checkpoints, and none is there any more; put them "
                "back, choose another run_dir, or remove the run's folder to start from nothing"
            )
        return None

    def find(self, which: str | None) -> Path | None:
        """The newest (None), the `best`, or the one of that name; None if there is none."""
        if which is None:
            return self.newest()
        there = {path.name: path for path in comm.from_main(self._complete())}
        if which == "best" and self.config.best is not None:
            best = comm.from_main(best_of(there.values(), self.config.best))
            which = best.name if best else which
        if which not in there:
            why = "is not there" if which != "best" else "needs checkpoint.best in the recipe, and a task's end"
            allowed = f"allowed: {', '.join(there)}" if there else "there is none yet, so train first"
            raise UserError(f"--checkpoint: given {which}, which {why}{nearest(which, there)}; {allowed}")
        folder = there[which]
        if damage := next((found for found in comm.gather(_damage(folder)) if found), ""):
            raise Failure(f"checkpoint {folder.name} is damaged ({damage}); use another one")
        return folder

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))


def best_of(folders: Iterable[Path], by: str | None) -> Path | None:
    """The one after a task's evaluation where that figure was best; of equals the latest."""
    best: tuple[float, str, Path] | None = None
    for folder in folders if by is not None else ():
        try:
            position = json.loads((folder / "state.json").read_text("utf-8"))["position"]
        except (OSError, ValueError, KeyError):  # damaged
            continue
        if position["step"] or position["learned"] or not position["matrix"]:
            continue
        if by == "heldout":
            figure = -position["heldout"][-1] if position["heldout"] else None
        else:
            figure = scores.summary(position["matrix"])[str(by)]
        if figure is not None and math.isfinite(figure) and (best is None or (figure, folder.name) > best[:2]):
            best = figure, folder.name, folder
    return best[2] if best else None


def load(folder: Path, engine: Engine, method: Method) -> dict[str, Any]:
    """Bring the engine and the method to the checkpoint's state; returns the run's position."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    if state["format"] != FORMAT:
        raise Failure(
            f"{folder}: written in format {state['format']}, this dscl reads {FORMAT}; use the one that wrote it"
        )
    with ExitStack() as stack:
        engine.shards.restore(_Stretches(folder, stack).read, state["optimizer_steps"])
    engine.restore_loss_scale(state["loss_scale"])
    with safe_open(folder / "method.safetensors", framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    method.load_state(values, _rows(folder))
    with ExitStack() as stack:
        method.load_owned(_owned(folder, stack))
    return dict(state["position"])


class Masters:
    """The trained tensors among some, as a checkpoint holds them: whole, in fp32, each read when it is asked for.

    The files stay open, so that they can be read to the end even if newer checkpoints take this one's place.
    """

    def __init__(self, folder: Path, among: Mapping[str, torch.Size]) -> None:
        self._stretches = _Stretches(folder, ExitStack())
        self.shapes = {name: shape for name, shape in among.items() if self._stretches.holds(name, "master")}

    def read(self, name: str) -> torch.Tensor:
        return self._stretches.read(name, "master", 0, self.shapes[name].numel()).view(self.shapes[name])


def _rows(folder: Path) -> dict[str, torch.Tensor]:
    """This rank's part of the rows that all ranks had gathered, however many there were."""
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a dict
                if stored.startswith(f"{ROWS}|"):
                    parts.setdefault(stored.split("|", 2)[2], []).append(file.get_tensor(stored))
    return {name: torch.cat(values)[comm.rank() :: comm.world()] for name, values in parts.items()}


def _owned(folder: Path, stack: ExitStack) -> Callable[[str], dict[str, torch.Tensor]]:
    """What was kept of a matrix, whichever rank owned it then."""
    places: dict[str, dict[str, tuple[Any, str]]] = {}
    for path in sorted(folder.glob(f"{OWNED}*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for stored in file.keys():  # noqa: SIM118 - not a dict
            matrix, what = stored.rsplit("|", 1)
            places.setdefault(matrix, {})[what] = file, stored

    def read(matrix: str) -> dict[str, torch.Tensor]:
        return {what: file.get_tensor(stored) for what, (file, stored) in places.get(matrix, {}).items()}

    return read


class _Stretches:
    """Any stretch of any saved tensor, from whichever rank's file holds it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._held: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for stored in file.keys():  # noqa: SIM118 - not a dict
                kind, start, name = stored.split("|", 2)
                if kind == ROWS:
                    continue
                (length,) = file.get_slice(stored).get_shape()
                self._held.setdefault((name, kind), []).append((int(start), int(start) + length, file, stored))
        for pieces in self._held.values():
            pieces.sort(key=lambda piece: piece[:2])

    def holds(self, name: str, kind: str) -> bool:
        return (name, kind) in self._held

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        parts, at = [], start
        for first, last, file, stored in self._held.get((name, kind), []):
            if first <= at < last:
                end = min(last, stop)
                parts.append(file.get_slice(stored)[at - first : end - first])
                at = end
                if at == stop:
                    return torch.cat(parts)
        raise Failure(f"the checkpoint lacks {kind} of {name} from element {at}: it belongs to another model or method")


def _named(shares: Iterable[Fragment]) -> Iterator[tuple[str, torch.Tensor]]:
    for share in shares:
        for kind, values in share.tensors().items():
            yield f"{kind}|{share.start}|{share.name}", values


def _copied(content: Content) -> Content:
    """That what is trained from now on does not reach; on the host."""
    if isinstance(content, bytes):
        return content
    return {name: value.detach().to("cpu", copy=True) for name, value in content.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Sum:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    _sync(path)
    return _facts(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_bytes(path: Path, content: bytes) -> Sum:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return _facts(path)


def _facts(path: Path) -> Sum:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _damage(folder: Path) -> str:
    """What is wrong with this rank's share of the checkpoint's files; empty when all is well."""
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        files = [(folder / name, facts) for name, facts in sorted(marker["files"].items())]
        files += [(folder.parent.parent / name, facts) for name, facts in sorted(marker.get("left", {}).items())]
    except (OSError, ValueError, KeyError):
        return f"{MARKER} is missing or unreadable"
    for index, (path, facts) in enumerate(files):
        name = path.name if path.parent == folder else path.relative_to(folder.parent.parent)
        if index % comm.world() == comm.rank():
            try:
                size = path.stat().st_size
                found = _facts(path) if size == facts["bytes"] else None
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:  # a disk that is failing, say
                return f"{name} cannot be read ({error.strerror})"
            if found is None:
                return f"{name} has {size} bytes of {facts['bytes']}"
            if found != facts:
                return f"{name} does not match its checksum"
    return ""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
