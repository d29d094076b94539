from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _event_files_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts the counter in the names of event files anew. TensorBoard reads files of one second in the order
    of their names, so the tenth would come before the second."""
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))
