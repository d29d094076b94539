"""Files that are replaced whole or not at all, and their checksums."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from dscl.utils import atomic_io
from dscl.utils.atomic_io import file_checksum, replace_atomically, write_text_atomically


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_text_atomically(path, "old")
    with suppress(ZeroDivisionError), replace_atomically(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_content_is_on_the_disk_before_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(os, "replace", lambda source, target: (events.append(str(target)), replace(source, target)))
    write_text_atomically(tmp_path / "a", "text")
    assert events == [str(tmp_path / "a.partial"), str(tmp_path / "a")]


def test_text_that_utf8_cannot_hold_is_replaced_where_allowed(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a", "x\udcff", errors="replace")
    assert (tmp_path / "a").read_text("utf-8") == "x?"


@pytest.mark.parametrize("size", [0, 5, atomic_io.READ_BLOCK_BYTES + 1])
def test_a_checksum_is_of_the_whole_file(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(content)
    assert file_checksum(tmp_path / "a") == {"bytes": size, "crc32": zlib.crc32(content)}
