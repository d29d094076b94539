"""The peak memory of a process (Linux)."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


class PeakMemory:
    """The growth of this process's anonymous memory up to its peak; mapped files are not counted."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # Freed tensors go back to the system at once. By default glibc keeps freed blocks, randomly up to half a
        # model; they would count as used memory, or hide later allocations.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 500_000)
        ctypes.CDLL(None).malloc_trim(0)
        self._first = self._highest = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._highest - self._first

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self._highest = max(self._highest, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
