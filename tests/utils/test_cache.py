"""A cached folder: one of many processes builds it, it is never incomplete, and it is rebuilt when damaged."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dscl.utils.cache import MARKER_FILE, build_folder_once, is_cache_intact
from dscl.utils.errors import ExternalFailure

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESS = """
import sys, time
from pathlib import Path
from dscl.utils.cache import build_folder_once

cache, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(folder):
    with open(cache / "builds", "a") as log:
        log.write("x")
    (folder / "one").write_text("first half")
    time.sleep(seconds)
    (folder / "two").write_text("second half")

print((build_folder_once(cache, "name", build) / "two").read_text())
"""


def start_build(cache: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(cache), str(seconds)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def build(folder: Path) -> None:
    (folder / "two").write_text("second half")


def fail_on_build(folder: Path) -> None:
    raise AssertionError("built again")


def test_concurrent_processes_build_the_folder_once(tmp_path: Path) -> None:
    processes = [start_build(tmp_path, 0.5) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["second half\n"] * 3
    assert (tmp_path / "builds").read_text() == "x"


def test_a_killed_build_leaves_no_partial_folder(tmp_path: Path) -> None:
    process = start_build(tmp_path, 600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "name.tmp" / "one").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "name").exists()
    folder = build_folder_once(tmp_path, "name", build)
    assert [path.name for path in sorted(folder.iterdir())] == [MARKER_FILE, "two"]
    assert not (tmp_path / "name.tmp").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / "two"),
        lambda folder: (folder / "two").write_text("second"),
        lambda folder: (folder / "two").unlink(),
        lambda folder: (folder / MARKER_FILE).unlink(),
        lambda folder: (folder / MARKER_FILE).write_text("{"),
    ],
)
def test_a_damaged_folder_is_reported_and_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    folder = build_folder_once(tmp_path, "name", build)
    assert build_folder_once(tmp_path, "name", fail_on_build) == folder
    assert not caplog.messages
    damage(folder)  # type: ignore[operator]
    assert not is_cache_intact(folder)
    with caplog.at_level(logging.WARNING, logger="dscl"):
        assert build_folder_once(tmp_path, "name", build) == folder
    assert "is damaged and is built again" in caplog.text
    assert (folder / "two").read_text() == "second half"


def test_a_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        build_folder_once(tmp_path, "name", fail_on_build)
    assert not (tmp_path / "name").exists()
    assert build_folder_once(tmp_path, "name", build).is_dir()


def test_an_unwritable_cache_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExternalFailure, match="the cache cannot be written"):
        build_folder_once(tmp_path / "file", "name", build)
