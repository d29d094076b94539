"""Stopping on purpose: a signal to any rank ends the run at one and the same place on all of them, with all saved.

Signals come at any moment, collectives must not: so a signal only raises a flag, and the run asks at places that all
ranks come by (`asked`). If it comes by none in time, or a second signal comes, the process leaves at once; what it goes
on from later is then the newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dscl.distributed import comm
from dscl.distributed.launcher import FORWARDED, stop_early, tell
from dscl.utils.errors import AGAIN


class Stop:
    """The flag. Before `arm`, when nothing has been trained yet, a signal ends the process there and then."""

    def __init__(self) -> None:
        self._flag: comm.Flag | None = None
        self._heard = ""
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Within, signals are heard here. Only a program's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # A handler runs when the main thread is back from whatever it waits for, which may be a rank that is gone; the
        # number of a signal is written at once.
        heard, written = os.pipe()
        os.set_blocking(written, False)
        before = {number: signal.signal(number, self._early) for number in FORWARDED}
        wakes = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakes)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(written)
            if self._timer is not None:
                self._timer.cancel()

    def arm(self, grace: float) -> None:
        """From now on there is something to save, in at most so many seconds after a signal. All ranks call it."""
        self._grace = grace
        self._flag = comm.Flag()

    def asked(self) -> bool:
        """Whether a rank was told to stop; the same answer on all of them, who all ask equally often."""
        return self._flag is not None and self._flag.raised() > 0

    def _early(self, number: int, frame: FrameType | None) -> None:
        """There is nothing to save yet."""
        if self._flag is None:
            stop_early(number, frame)

    def _listen(self, heard: int) -> None:
        with open(heard, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in FORWARDED and self._flag is not None:
                    self._hear(number[0])

    def _hear(self, number: int) -> None:
        assert self._flag is not None
        name = signal.Signals(number).name
        if self._heard:
            self._leave(128 + number, f"{self._heard}, then {name}: left at once; {AGAIN}, from the newest checkpoint")
        self._heard = name
        self._flag.raise_()
        late = f"{name}: not saved within checkpoint.grace={self._grace:g} s; {AGAIN}, from the newest checkpoint"
        self._timer = threading.Timer(self._grace, self._leave, (1, late))
        self._timer.daemon = True
        self._timer.start()

    @staticmethod
    def _leave(status: int, text: str) -> None:
        tell(status, f"dscl: {text}", patience=0.0)
        os._exit(status)
