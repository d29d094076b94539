"""Replace files such that readers see either the old content or the new one, never a part; and checksums of files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READ_BLOCK_BYTES = 1 << 20
FileChecksum = dict[str, int]  # a file's "bytes" and "crc32"


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield the path at which to write the new file; on success its content is on the disk, and it replaces `path`.

    A killed process leaves a `.partial` file, which the next call overwrites.
    """
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text_atomically(path: Path, text: str, errors: str = "strict") -> None:
    with replace_atomically(path) as partial:
        partial.write_text(text, "utf-8", errors=errors)


def file_checksum(path: Path) -> FileChecksum:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
