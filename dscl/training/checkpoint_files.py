"""The files of a checkpoint: written with checksums, verified, and read by any number of ranks.

Every rank writes `rank-NNNNN.safetensors`: its shards of the trainable tensors, and its rows of the method's state. A
key names what is stored, the first element, and the tensor: `master|0|model.layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dscl.distributed import comm
from dscl.engine.optimizer import ParamShard
from dscl.utils.atomic_io import FileChecksum, file_checksum
from dscl.utils.errors import ExternalFailure
from dscl.utils.json_files import parse_checked_json

MARKER_FILE = "complete.json"
FileContent = bytes | dict[str, torch.Tensor]
ROW_PREFIX = "rows"  # begins the key of a method's rows in a rank's file
MATRIX_FILE_PREFIX = "owned-"  # begins the name of the file with a rank's state of the matrices it owns


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileChecksum:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    fsync_file(path)
    return file_checksum(path)


def fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> FileChecksum:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return file_checksum(path)


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_marker(folder: Path) -> dict[str, dict[str, FileChecksum]]:
    """The checksums of a checkpoint's "files", and of the "artifacts" of finished tasks in the run's folder."""
    return parse_checked_json((folder / MARKER_FILE).read_bytes())


def find_damage(folder: Path) -> str:
    """Verify this rank's share of the checkpoint's files; describes the first problem, or returns ""."""
    try:
        marker = read_marker(folder)
    except OSError:
        return f"{MARKER_FILE} is missing or unreadable"
    except ValueError as error:
        return f"{MARKER_FILE} is damaged: {error}"
    files = [(folder / name, checksum) for name, checksum in sorted(marker["files"].items())]
    files += [(folder.parent.parent / name, checksum) for name, checksum in sorted(marker["artifacts"].items())]
    for index, (path, checksum) in enumerate(files):
        name = path.name if path.parent == folder else path.relative_to(folder.parent.parent)
        if index % comm.world_size() == comm.rank():
            try:
                size = path.stat().st_size
                actual = file_checksum(path) if size == checksum["bytes"] else None
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:  # for example a failing disk
                return f"{name} cannot be read ({error.strerror})"
            if actual is None:
                return f"{name} has {size} bytes of {checksum['bytes']}"
            if actual != checksum:
                return f"{name} does not match its checksum"
    return ""


def name_tensors(shards: Iterable[ParamShard]) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in shards:
        for kind, values in shard.state_tensors().items():
            yield f"{kind}|{shard.start}|{shard.name}", values


def copy_to_host(content: FileContent) -> FileContent:
    """A copy on the host, which further training does not change."""
    if isinstance(content, bytes):
        return content
    return {name: value.detach().to("cpu", copy=True) for name, value in content.items()}


class ShardReader:
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


class MasterWeights:
    """The fp32 master weights in a checkpoint: whole tensors, each read on demand.

    `model_shapes` names all tensors of the model; `shapes` are those among them that were trained. The files stay open,
    so reading works to the end even if the checkpoint is removed meanwhile in favour of newer ones.
    """

    def __init__(self, folder: Path, model_shapes: Mapping[str, torch.Size]) -> None:
        self._shards = ShardReader(folder, ExitStack())
        self.shapes = {name: shape for name, shape in model_shapes.items() if self._shards.has_tensor(name, "master")}

    def read(self, name: str) -> torch.Tensor:
        return self._shards.read(name, "master", 0, self.shapes[name].numel()).view(self.shapes[name])


def read_rows(folder: Path) -> dict[str, torch.Tensor]:
    """This rank's part of the method's rows, redistributed from however many ranks wrote the checkpoint."""
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a dict
                if stored.startswith(f"{ROW_PREFIX}|"):
                    parts.setdefault(stored.split("|", 2)[2], []).append(file.get_tensor(stored))
    return {name: torch.cat(values)[comm.rank() :: comm.world_size()] for name, values in parts.items()}


def open_matrix_state(folder: Path, stack: ExitStack) -> Callable[[str], dict[str, torch.Tensor]]:
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
