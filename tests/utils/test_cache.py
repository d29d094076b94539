"""A cached folder: made once by many, never half, made anew when damaged."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dscl.utils.cache import MARKER, folder_made_once, is_intact
from dscl.utils.errors import Failure

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESS = """
import sys, time
from pathlib import Path
from dscl.utils.cache import folder_made_once

cache, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(folder):
    with open(cache / "builds", "a") as log:
        log.write("x")
    (folder / "one").write_text("first half")
    time.sleep(seconds)
    (folder / "two").write_text("second half")

print((folder_made_once(cache, "name", build) / "two").read_text())
"""


def start(cache: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(cache), str(seconds)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def build(folder: Path) -> None:
    (folder / "two").write_text("second half")


def fail(folder: Path) -> None:
    raise AssertionError("built again")


def test_many_at_once_build_it_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.5) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["second half\n"] * 3
    assert (tmp_path / "builds").read_text() == "x"


def test_killed_half_way_leaves_no_half_cache(tmp_path: Path) -> None:
    process = start(tmp_path, 600)
    deadline = time.monotonic() + 60
    while not (tmp_path / "name.tmp" / "one").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "name").exists()
    folder = folder_made_once(tmp_path, "name", build)
    assert [path.name for path in sorted(folder.iterdir())] == [MARKER, "two"]
    assert not (tmp_path / "name.tmp").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "two"),
        lambda folder: (folder / "two").write_text("second"),
        lambda folder: (folder / "two").unlink(),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / MARKER).write_text("{"),
    ],
)
def test_damage_is_seen_told_and_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object) -> None:
    folder = folder_made_once(tmp_path, "name", build)
    assert folder_made_once(tmp_path, "name", fail) == folder
    assert not caplog.messages
    damage(folder)  # type: ignore[operator]
    assert not is_intact(folder)
    with caplog.at_level(logging.WARNING, logger="dscl"):
        assert folder_made_once(tmp_path, "name", build) == folder
    assert "is damaged and is built again" in caplog.text
    assert (folder / "two").read_text() == "second half"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        folder_made_once(tmp_path, "name", fail)
    assert not (tmp_path / "name").exists()
    assert folder_made_once(tmp_path, "name", build).is_dir()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="the cache cannot be written"):
        folder_made_once(tmp_path / "file", "name", build)
