"""A cached folder that one of several processes builds; its files are complete, and checked before each use."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dscl.utils.atomic_io import file_checksum
from dscl.utils.errors import ExternalFailure

log = logging.getLogger("dscl")
MARKER_FILE = "complete.json"


def build_folder_once(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `cache/name`; if it does not exist or is damaged, call `build` to fill it.

    All processes of a run may call this at once, whether they share a file system or not. One of them builds the
    folder, and the others wait for a file lock rather than in a collective, which could time out. The folder gets its
    final name when all of it is written. A killed process leaves only a `.tmp` folder, which the next call removes.
    """
    folder = cache / name
    if is_cache_intact(folder):  # checked first without a lock file, because the cache may be read-only
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with hold_file_lock(cache / f"{name}.lock"):
            if is_cache_intact(folder):
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
        raise ExternalFailure(f"{folder}: the cache cannot be written ({reason}); see data.cache_dir") from None
    return folder


def is_cache_intact(folder: Path) -> bool:
    """Whether the folder is complete and all its files have the checksums with which they were written."""
    try:
        checksums = json.loads((folder / MARKER_FILE).read_text())
        return bool(checksums == _file_checksums(folder))
    except (OSError, ValueError):
        return False


@contextmanager
def hold_file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; the system releases it when the process ends, even by a kill."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_marker(folder: Path) -> None:
    (folder / MARKER_FILE).write_text(json.dumps(_file_checksums(folder)))


def _file_checksums(folder: Path) -> dict[str, int]:
    return {path.name: file_checksum(path)["crc32"] for path in sorted(folder.iterdir()) if path.name != MARKER_FILE}
