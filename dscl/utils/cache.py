"""A folder made once: by whichever process comes first, never left half made, checked before each use."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dscl.utils.errors import Failure

log = logging.getLogger("dscl")
MARKER = "complete.json"


def folder_made_once(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `cache/name`, filled by `build` if it is not there yet.

    All processes of a run may call this at once, on a file system that they share or not: one of them builds and the
    others wait in the file lock, so no collective operation can time out meanwhile. The folder gets its name when all
    of it is written; a process that is killed leaves only a `.tmp` folder, which the next one removes.
    """
    folder = cache / name
    if is_intact(folder):  # for which nothing has to be written: the cache may be read-only
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock"):
            if is_intact(folder):
                return folder
            if folder.exists():
                log.warning("%s is damaged and is built again", folder)
                shutil.rmtree(folder)
            temporary = cache / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            build(temporary)
            _write_marker(temporary)
            os.replace(temporary, folder)
    except OSError as error:
        reason = error.strerror or error
        raise Failure(f"{folder}: the cache cannot be written ({reason}); see data.cache_dir") from None
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder is complete and its files are, byte for byte, those that were written."""
    try:
        sums = json.loads((folder / MARKER).read_text())
        return bool(sums == _sums(folder))
    except (OSError, ValueError):
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_marker(folder: Path) -> None:
    (folder / MARKER).write_text(json.dumps(_sums(folder)))


def _sums(folder: Path) -> dict[str, int]:
    return {path.name: _crc(path) for path in sorted(folder.iterdir()) if path.name != MARKER}


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
