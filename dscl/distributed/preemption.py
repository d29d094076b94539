"""Stopping on a signal: a signal to any rank stops all ranks at the same point of the run, with everything saved.

A signal may arrive at any moment, but ranks must make the same collectives in the same order. So a signal only sets a
flag, and the run polls it (`stop_requested`) at points that all ranks pass. If the run passes no such point within the
grace period, or if a second signal arrives, the process exits at once. The next start then resumes from the newest
checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dscl.distributed import comm
from dscl.distributed.launcher import FORWARDED_SIGNALS, handle_signal_before_training, report_exit
from dscl.utils.errors import RERUN_HINT


class StopHandler:
    """Turns signals into a request to stop that all ranks see at the same point.

    Before `enable_graceful_stop` nothing has been trained, and a signal ends the process at once.
    """

    def __init__(self) -> None:
        self._flag: comm.SharedFlag | None = None
        self._first_signal = ""
        self._timer: threading.Timer | None = None

    @contextmanager
    def handle_signals(self) -> Iterator[StopHandler]:
        """Handle signals within this context. Python allows that in the main thread only; elsewhere do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # Python runs a signal handler only after the main thread returns from the call it is in. That call may wait for
        # a rank that is dead. The wakeup pipe gets the signal's number at once, and a thread reads it.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        previous_handlers = {signum: signal.signal(signum, self._stop_if_untrained) for signum in FORWARDED_SIGNALS}
        previous_wakeup_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._read_signals, args=(read_end,), daemon=True).start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(previous_wakeup_fd)
            for signum, handler in previous_handlers.items():
                signal.signal(signum, handler)
            os.close(write_end)
            if self._timer is not None:
                self._timer.cancel()

    def enable_graceful_stop(self, grace: float) -> None:
        """From now on a signal requests a stop with a save, which may take `grace` seconds. All ranks call this."""
        self._grace = grace
        self._flag = comm.SharedFlag()

    def stop_requested(self) -> bool:
        """Whether a rank has got a signal: the same answer on all ranks, which all call this equally often."""
        return self._flag is not None and self._flag.count_ranks_set() > 0

    def _stop_if_untrained(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler; once there is something to save, `_read_signals` handles signals instead."""
        if self._flag is None:
            handle_signal_before_training(signum, frame)

    def _read_signals(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as signal_numbers:
            while signum := signal_numbers.read(1):
                if signum[0] in FORWARDED_SIGNALS and self._flag is not None:
                    self._request_stop(signum[0])

    def _request_stop(self, signum: int) -> None:
        assert self._flag is not None
        name = signal.Signals(signum).name
        if self._first_signal:
            message = f"{self._first_signal}, then {name}: left at once; {RERUN_HINT}, from the newest checkpoint"
            self._exit_now(128 + signum, message)
        self._first_signal = name
        self._flag.set()
        message = (
            f"{name}: not saved within checkpoint.grace={self._grace:g} s; {RERUN_HINT}, from the newest checkpoint"
        )
        self._timer = threading.Timer(self._grace, self._exit_now, (1, message))
        self._timer.daemon = True
        self._timer.start()

    @staticmethod
    def _exit_now(status: int, message: str) -> None:
        report_exit(status, f"dscl: {message}", delay=0.0)
        os._exit(status)
