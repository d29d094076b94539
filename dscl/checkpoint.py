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
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dscl import dist
from dscl.config import key
from dscl.engine import Engine, Fragment
from dscl.errors import Failure
from dscl.methods import Method

log = logging.getLogger("dscl")
MARKER = "complete.json"
FORMAT = 2
Sum = dict[str, int]  # of a file: its bytes and its checksum
ROWS = "rows"  # of the method, among a rank's stretches
OWNED = "owned-"  # begins the name of a file with what a rank keeps of its own matrices


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(200, at_least=1, help="optimizer steps between checkpoints; one is always written after a task")
    keep: int = key(2, at_least=1, help="how many of the newest are kept")
    grace: float = key(120.0, above=0.0, help="seconds that a signal leaves for coming to a step's end and saving")


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._left: dict[str, Sum] = {}  # files of ended tasks, by their path in the run's folder

    def leave(self, write: Callable[[], Iterable[Path]]) -> None:
        """The main rank writes what an ended task leaves; the checkpoints from now on vouch for these files."""
        problem = ""
        if dist.is_main():
            try:
                for path in write():
                    _sync(path)
                    self._left[str(path.relative_to(self.folder.parent))] = _facts(path)
            except (OSError, Failure) as error:
                problem = str(error)
        if problem := dist.from_main(problem):
            raise Failure(f"{self.folder.parent}: cannot be written ({problem}); make room and run again to go on")

    def save(self, name: str, position: Mapping[str, Any], engine: Engine, method: Method) -> None:
        """Write one checkpoint, all ranks together; on any rank's failure the previous one stays and the run stops."""
        final, partial = self.folder / name, self.folder / f"{name}.partial"
        written: dict[str, Sum] = {}
        problem = ""
        try:
            if dist.is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
        dist.barrier()
        try:
            mine = partial / f"rank-{dist.rank():05d}.safetensors"
            rows = {f"{ROWS}|0|{name}": values for name, values in method.rows().items()}
            written[mine.name] = _write_tensors(mine, {**dict(_named(engine.shares())), **rows})
            if owned := method.owned():
                path = partial / f"{OWNED}{dist.rank():05d}.safetensors"
                written[path.name] = _write_tensors(path, owned)
            if dist.is_main():
                written["method.safetensors"] = _write_tensors(partial / "method.safetensors", method.state())
                state = {
                    "format": FORMAT,
                    "world": dist.world(),
                    "optimizer_steps": engine.optimizer_steps(),
                    "loss_scale": engine.loss_scale(),
                    "position": position,
                }
                written["state.json"] = _write_bytes(partial / "state.json", json.dumps(state).encode())
        except (OSError, SafetensorError) as error:
            problem = problem or f"rank {dist.rank()}: {error}"
        reports = dist.gather((written, problem))
        problem = next((p for _, p in reports if p), "")
        if not problem and dist.is_main():
            try:
                files = {name: facts for report, _ in reports for name, facts in report.items()}
                _write_bytes(partial / MARKER, json.dumps({"files": files, "left": self._left}).encode())
                if final.exists():  # left by an earlier start, and found damaged by this one
                    shutil.rmtree(final)
                os.replace(partial, final)
                _sync_folder(self.folder)
            except OSError as error:
                problem = str(error)
        problem = dist.from_main(problem)
        if problem:
            if dist.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            kept = self._complete()
            raise Failure(
                f"checkpoint {name} could not be written to {self.folder} ({problem}); "
                + (f"{kept[-1].name} is intact: make room and run again to go on from it" if kept else "none was there")
            )
        if dist.is_main():
            # Later ones are damaged (newest() passed them over), so that they do not count as kept.
            for old in [p for p in self._complete() if p.name <= name][: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; damaged ones are passed over with a line each.

        None if there are none at all; if none of those that are there is whole, that is for the user to decide on.
        """
        damage = ""
        for folder in reversed(dist.from_main(self._complete())):
            damage = next((found for found in dist.gather(_damage(folder)) if found), "")
            if not damage:
                self._left = json.loads((folder / MARKER).read_text("utf-8")).get("left", {})
                return folder
            log.warning("checkpoint %s is damaged (%s); going back to the one before", folder.name, damage)
        if damage:
            raise Failure(
                f"{self.folder}: no checkpoint there is whole ({damage}); restore that file, or remove the run's "
                "folder to start from nothing"
            )
        return None

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))


def load(folder: Path, engine: Engine, method: Method) -> dict[str, Any]:
    """Bring the engine and the method to the checkpoint's state; returns the run's position."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    if state["format"] != FORMAT:
        raise Failure(
            f"{folder}: written in format {state['format']}, this dscl reads {FORMAT}; use the one that wrote it"
        )
    with ExitStack() as stack:
        engine.restore(_Stretches(folder, stack).read, state["optimizer_steps"])
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
    return {name: torch.cat(values)[dist.rank() :: dist.world()] for name, values in parts.items()}


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
        if index % dist.world() == dist.rank():
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {facts['bytes']}"
            if _facts(path) != facts:
                return f"{name} does not match its checksum"
    return ""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
