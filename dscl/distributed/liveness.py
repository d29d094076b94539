"""Which ranks are alive: a rank that dies is named on all others, which leave instead of waiting for it for ever.

Every rank keeps a line to the main one and gives a sign of life on it, from a thread beside the work. A process that is
killed breaks its line at once; a host that is switched off, or whose network is cut, falls silent. The main rank then
tells the others who it was. Without this a collective waits for its time limit (ten minutes), or on a GPU for ever.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from dscl.distributed.launcher import GRACE, POLL, joined, leave, spawned, tell
from dscl.utils.errors import AGAIN, Failure, Stopped, UserError

DEAD_AFTER = "DSCL_DEAD_AFTER"  # the environment's; it has to be known before any recipe is read
SECONDS = 60.0  # that is, unless it says otherwise
BEATS = 4  # signs of life within that time
SOON = 3.0  # seconds that a rank gets to end by itself when another one has died
KNOCK = 10.0  # seconds that whoever connects gets to say who it is
# What is said on a line, and then four bytes: of whom.
ALIVE, LEFT, FAILED, WRONG, TOLD, DEAD, SILENT = (bytes([letter]) for letter in b"alfwtds")
ENDS = {FAILED: 1, WRONG: 2, TOLD: 75}  # what a rank says that ends alone with such a status, and the others end with
WORDS = {
    FAILED: "has failed (its own message says why)",
    WRONG: "ends because of a wrong input (its own message says which)",
    TOLD: "was told to stop",
    DEAD: "is dead (its process ended without a word)",
    SILENT: "is silent for more than {seconds:g} s (see {name})",
}


class Line:
    """One end of a line to another rank. Who watches it notes when it was last heard."""

    def __init__(self, end: socket.socket, rank: int) -> None:
        self.end, self.rank, self.heard, self._rest = end, rank, 0.0, b""

    def say(self, what: bytes, rank: int = 0) -> None:
        with suppress(OSError):  # it is broken, which listening finds out
            self.end.sendall(what + rank.to_bytes(4, "big"))

    def listen(self) -> list[tuple[bytes, int]]:
        """What has come; DEAD when the other end is gone."""
        try:
            come = self.end.recv(1 << 12)
        except OSError:
            come = b""
        if not come:
            return [(DEAD, self.rank)]
        whole = self._rest + come
        count = len(whole) // 5
        self._rest = whole[5 * count :]
        return [(whole[i : i + 1], int.from_bytes(whole[i + 1 : i + 5], "big")) for i in range(0, 5 * count, 5)]


class Lines:
    """All lines of a rank."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}  # by the rank at the other end
        self._selector = selectors.DefaultSelector()

    def add(self, line: Line) -> None:
        self._lines[line.rank] = line
        self._selector.register(line.end, selectors.EVENT_READ, line)

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)

    def ready(self, seconds: float) -> list[Line]:
        """Wait until something has come, for so long at most; the lines on which it has."""
        return [key.data for key, _ in self._selector.select(seconds)]

    def drop(self, rank: int) -> None:
        self._selector.unregister(self._lines.pop(rank).end)

    def say(self, what: bytes, rank: int = 0) -> None:
        for line in self:
            line.say(what, rank)

    def close(self) -> None:
        self._selector.close()
        for line in self:
            line.end.close()


class Heartbeat:
    """Signs of life on all lines, and the end of a rank that gives none. Clock and lines are handed in."""

    def __init__(self, lines: Lines, seconds: float, clock: Callable[[], float]) -> None:
        self.lines, self.seconds, self._clock = lines, seconds, clock
        self._beat = seconds / BEATS
        self._spoken = float("-inf")
        self._woken = clock()
        for line in lines:
            line.heard = self._woken

    def turn(self) -> tuple[bytes, int] | None:
        """Say that this rank lives, if it is time to, and hear the others for a moment. If a rank is lost: how, and
        which; the others have been told."""
        if self._clock() - self._spoken > self._beat:
            self._spoken = self._clock()
            self.lines.say(ALIVE)
        lost = self._end_heard() or self._silence()
        if lost is not None:
            self.lines.say(*lost)
        return lost

    def _end_heard(self) -> tuple[bytes, int] | None:
        for line in self.lines.ready(min(self._beat, 0.2)):
            come = line.listen()
            line.heard = self._clock()
            for what, rank in come:
                if what == LEFT:
                    self.lines.drop(line.rank)
                    break
                if what != ALIVE:
                    return what, rank
        return None

    def _silence(self) -> tuple[bytes, int] | None:
        now = self._clock()
        if now - self._woken > self._beat:  # this very rank stood still, and cannot tell who else did
            for line in self.lines:
                line.heard = now
        self._woken = now
        for line in self.lines:
            if now - line.heard > self.seconds:
                return SILENT, line.rank
        return None


class Pulse:
    """Within it the other ranks are watched, and watch this one."""

    def __init__(self) -> None:
        from dscl.distributed import comm  # torch comes with it, which a heartbeat has no use for

        self.seconds = _seconds()
        self._dist = comm
        self._gone = threading.Event()  # somebody is
        self._closed = threading.Event()
        self._why = ""
        self._last = LEFT
        self._status = 1
        self._hosts: list[str] = []

    def __enter__(self) -> Pulse:
        if self._dist.world() > 1:
            self._hosts = self._dist.gather(socket.gethostname())
            self._connect()
            self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
            self._thread.start()
        joined()
        return self

    def beside(self, work: Callable[[], int]) -> int:
        """The work. An error in it that comes of another rank's end is told as that."""
        try:
            return work()
        except Stopped as error:
            self._last = LEFT if error.together else TOLD
            raise
        except UserError:
            self._last = WRONG
            raise
        except Failure:
            self._last = FAILED
            raise
        except Exception:
            self._last = FAILED
            if self._dist.world() > 1 and self._gone.wait(SOON):
                raise Failure(self._why) from None
            raise

    def end(self, status: int) -> int:
        """What this rank is about to end with, and has told."""
        self._status = status
        return status

    def __exit__(self, *_: object) -> None:
        if self._dist.world() == 1:
            return
        self._closed.set()
        self._thread.join()
        self._lines.say(self._last, self._dist.rank())
        self._lines.close()
        if self._why:  # to take leave of the others would be to wait for the one that is gone
            sys.stdout.flush()
            os._exit(leave(self._status))

    def _connect(self) -> None:
        """A line from each other rank to the main one."""
        self._lines = Lines()
        if self._dist.is_main():
            with _server() as server:
                key = secrets.token_bytes(16)  # others than the ranks may knock
                self._dist.from_main((server.getsockname()[1], key))
                server.settimeout(self.seconds)
                while len(self._lines) < self._dist.world() - 1:
                    end, _ = server.accept()
                    end.settimeout(KNOCK)
                    try:
                        said = end.recv(20, socket.MSG_WAITALL)
                    except OSError:
                        said = b""
                    if said[:16] != key:
                        end.close()
                        continue
                    rank = int.from_bytes(said[16:], "big")
                    self._lines.add(Line(end, rank))
        else:
            port, key = self._dist.from_main(None)
            end = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self.seconds)
            end.sendall(key + self._dist.rank().to_bytes(4, "big"))
            self._lines.add(Line(end, 0))
        for line in self._lines:
            line.end.settimeout(KNOCK)

    def _watch(self) -> None:
        heartbeat = Heartbeat(self._lines, self.seconds, time.monotonic)
        while not self._closed.is_set():
            if lost := heartbeat.turn():
                return self._lose(*lost)

    def _lose(self, what: bytes, rank: int) -> None:
        """Leave, and tell why, if that is this rank's part."""
        host, how = self._hosts[rank], WORDS[what].format(seconds=self.seconds, name=DEAD_AFTER)
        if spawned() and what == DEAD:
            time.sleep(10 * POLL)  # the spawner knows more, and says it first
        again = "" if what == WRONG else f": {AGAIN}, from the newest checkpoint"
        self._why = f"rank {rank} on {host} {how}; all ranks leave{again}"
        self._gone.set()
        if self._closed.wait(GRACE if what in ENDS else SOON):
            return
        status, here = ENDS.get(what, 1), self._hosts[self._dist.rank()]
        others_here = (r for r, name in enumerate(self._hosts) if name == here and r != rank)
        if spawned() or self._dist.rank() == next(others_here, self._dist.rank()):  # or it was itself that fell silent
            tell(status, f"dscl: {self._why}", patience=0.0)
        os._exit(leave(status))


def _seconds() -> float:
    given = os.environ.get(DEAD_AFTER, str(SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds < 1e6:
        raise UserError(f"{DEAD_AFTER}: given {given!r} in the environment; allowed: seconds, at least 1")
    return seconds


def _server() -> socket.socket:
    """Listens on all of this host's addresses: which of them the others know it by is the launcher's affair."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError:
            pass
    return socket.create_server(("", 0), backlog=1024)
