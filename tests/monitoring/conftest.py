from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _event_files_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one second, they are told apart by a number that the process counts up, and read in the order of their names:
    the tenth before the second."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))
