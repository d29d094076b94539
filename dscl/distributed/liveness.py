"""Heartbeats between ranks: when a rank dies, the other ranks name it and exit instead of waiting for it forever.

Every rank keeps a TCP connection to the main rank. A background thread sends heartbeats on it. When a process is
killed, its connection closes at once. When a host is switched off or loses its network, its heartbeats stop. The main
rank then tells the other ranks which rank is lost. Without heartbeats a collective would wait for its time limit (ten
minutes), or on a GPU forever.
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

from dscl.distributed.launcher import (
    EXIT_GRACE_SECONDS,
    POLL_SECONDS,
    is_spawned_rank,
    mark_ranks_connected,
    report_exit,
    resolve_exit_status,
)
from dscl.utils.errors import RERUN_HINT, ExternalFailure, RunStopped, UserError

TIMEOUT_VARIABLE = "DSCL_DEAD_AFTER"  # not a key of the recipe, because it is needed before a recipe is read
DEFAULT_TIMEOUT = 60.0  # seconds of silence after which a rank counts as dead
MESSAGES_PER_TIMEOUT = 4  # heartbeats within that time
DEATH_GRACE_SECONDS = 3.0  # after the death of another rank, a rank gets this long to exit by itself
HANDSHAKE_SECONDS = 10.0  # after it connects, a rank gets this long to send the key and its number
# A message is one of these bytes, followed by four bytes: the number of the rank that it is about.
ALIVE, LEFT, FAILED, INVALID_INPUT, STOPPED, DEAD, SILENT = (bytes([letter]) for letter in b"alfwtds")
MESSAGE_SIZE = 5
# The exit status of a rank that ends alone, by the message that it sends. The other ranks exit with the same status.
EXIT_STATUSES = {FAILED: 1, INVALID_INPUT: 2, STOPPED: 75}
DESCRIPTIONS = {
    FAILED: "has failed (its own message says why)",
    INVALID_INPUT: "ends because of a wrong input (its own message says which)",
    STOPPED: "was told to stop",
    DEAD: "is dead (its process ended without a word)",
    SILENT: "is silent for more than {seconds:g} s (see {name})",
}


class PeerConnection:
    """The connection to another rank, with the time at which that rank was last heard (set by `Heartbeat`)."""

    def __init__(self, sock: socket.socket, rank: int) -> None:
        self.sock, self.rank, self.last_heard, self._partial_message = sock, rank, 0.0, b""

    def send(self, message: bytes, rank: int = 0) -> None:
        """Send the message about `rank`."""
        with suppress(OSError):  # `receive_messages` notices a broken connection
            self.sock.sendall(message + rank.to_bytes(4, "big"))

    def receive_messages(self) -> list[tuple[bytes, int]]:
        """The messages that have arrived, each with the rank that it is about; DEAD when the connection is closed."""
        try:
            received = self.sock.recv(1 << 12)
        except OSError:
            received = b""
        if not received:
            return [(DEAD, self.rank)]
        data = self._partial_message + received
        end = len(data) // MESSAGE_SIZE * MESSAGE_SIZE
        self._partial_message = data[end:]
        return [(data[i : i + 1], int.from_bytes(data[i + 1 : i + 5], "big")) for i in range(0, end, MESSAGE_SIZE)]


class PeerConnections:
    """The connections of a rank: on the main rank to all other ranks, elsewhere to the main rank."""

    def __init__(self) -> None:
        self._peers: dict[int, PeerConnection] = {}  # by rank
        self._selector = selectors.DefaultSelector()

    def add(self, peer: PeerConnection) -> None:
        self._peers[peer.rank] = peer
        self._selector.register(peer.sock, selectors.EVENT_READ, peer)

    def __iter__(self) -> Iterator[PeerConnection]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def wait_until_readable(self, seconds: float) -> list[PeerConnection]:
        """Wait for at most so many seconds until something arrives; the connections on which something has."""
        return [key.data for key, _ in self._selector.select(seconds)]

    def remove(self, rank: int) -> None:
        self._selector.unregister(self._peers.pop(rank).sock)

    def send_to_all(self, message: bytes, rank: int = 0) -> None:
        for peer in self:
            peer.send(message, rank)

    def close(self) -> None:
        self._selector.close()
        for peer in self:
            peer.sock.close()


class Heartbeat:
    """Sends heartbeats to all peers and finds a lost one. Tests pass a clock and connections of their own."""

    def __init__(self, peers: PeerConnections, timeout: float, clock: Callable[[], float]) -> None:
        self.peers, self.timeout, self._clock = peers, timeout, clock
        self._interval = timeout / MESSAGES_PER_TIMEOUT
        self._last_sent = float("-inf")
        self._last_polled = clock()
        for peer in peers:
            peer.last_heard = self._last_polled

    def poll(self) -> tuple[bytes, int] | None:
        """Send a heartbeat if one is due, and receive messages for a moment.

        Returns the message and the rank if a rank is lost. The message has then been passed on to all peers.
        """
        if self._clock() - self._last_sent > self._interval:
            self._last_sent = self._clock()
            self.peers.send_to_all(ALIVE)
        loss = self._receive_exit_message() or self._find_silent_peer()
        if loss is not None:
            self.peers.send_to_all(*loss)
        return loss

    def _receive_exit_message(self) -> tuple[bytes, int] | None:
        for peer in self.peers.wait_until_readable(min(self._interval, 0.2)):
            messages = peer.receive_messages()
            peer.last_heard = self._clock()
            for message, rank in messages:
                if message == LEFT:
                    self.peers.remove(peer.rank)
                    break
                if message != ALIVE:
                    return message, rank
        return None

    def _find_silent_peer(self) -> tuple[bytes, int] | None:
        now = self._clock()
        if now - self._last_polled > self._interval:  # this process was suspended, so it cannot judge its peers
            for peer in self.peers:
                peer.last_heard = now
        self._last_polled = now
        for peer in self.peers:
            if now - peer.last_heard > self.timeout:
                return SILENT, peer.rank
        return None


class Liveness:
    """A context in which all ranks watch each other."""

    def __init__(self) -> None:
        from dscl.distributed import comm  # imports torch, which the other classes of this file do not need

        self.timeout = _read_timeout()
        self._comm = comm
        self._peer_lost = threading.Event()
        self._closed = threading.Event()
        self._loss_message = ""
        self._final_message = LEFT
        self._status = 1
        self._hosts: list[str] = []

    def __enter__(self) -> Liveness:
        if self._comm.world_size() > 1:
            self._hosts = self._comm.all_gather_objects(socket.gethostname())
            self._connect_peers()
            self._thread = threading.Thread(target=self._watch_peers, name="liveness", daemon=True)
            self._thread.start()
        mark_ranks_connected()
        return self

    def run_watched(self, work: Callable[[], int]) -> int:
        """Run `work`. If it fails because another rank is lost, the error names that rank."""
        try:
            return work()
        except RunStopped as error:
            self._final_message = LEFT if error.all_ranks_agreed else STOPPED
            raise
        except UserError:
            self._final_message = INVALID_INPUT
            raise
        except ExternalFailure:
            self._final_message = FAILED
            raise
        except Exception:
            self._final_message = FAILED
            if self._comm.world_size() > 1 and self._peer_lost.wait(DEATH_GRACE_SECONDS):
                raise ExternalFailure(self._loss_message) from None
            raise

    def set_exit_status(self, status: int) -> int:
        """Note the exit status that this rank has reported and is about to end with."""
        self._status = status
        return status

    def __exit__(self, *_: object) -> None:
        if self._comm.world_size() == 1:
            return
        self._closed.set()
        self._thread.join()
        self._peers.send_to_all(self._final_message, self._comm.rank())
        self._peers.close()
        if self._loss_message:  # an orderly exit from the process group would wait for the lost rank
            sys.stdout.flush()
            os._exit(resolve_exit_status(self._status))

    def _connect_peers(self) -> None:
        """Connect each other rank to the main rank."""
        self._peers = PeerConnections()
        if self._comm.is_main():
            with _open_server() as server:
                key = secrets.token_bytes(16)  # programs other than the ranks may connect, and do not know the key
                self._comm.broadcast_from_main((server.getsockname()[1], key))
                server.settimeout(self.timeout)
                while len(self._peers) < self._comm.world_size() - 1:
                    sock, _ = server.accept()
                    sock.settimeout(HANDSHAKE_SECONDS)
                    try:
                        handshake = sock.recv(20, socket.MSG_WAITALL)
                    except OSError:
                        handshake = b""
                    if handshake[:16] != key:
                        sock.close()
                        continue
                    rank = int.from_bytes(handshake[16:], "big")
                    self._peers.add(PeerConnection(sock, rank))
        else:
            port, key = self._comm.broadcast_from_main(None)
            sock = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self.timeout)
            sock.sendall(key + self._comm.rank().to_bytes(4, "big"))
            self._peers.add(PeerConnection(sock, 0))
        for peer in self._peers:
            peer.sock.settimeout(HANDSHAKE_SECONDS)

    def _watch_peers(self) -> None:
        heartbeat = Heartbeat(self._peers, self.timeout, time.monotonic)
        while not self._closed.is_set():
            if loss := heartbeat.poll():
                return self._exit_after_loss(*loss)

    def _exit_after_loss(self, message: bytes, rank: int) -> None:
        """After the loss of `rank`, give the main thread time to exit by itself, then end the process.

        One rank of each host reports the loss: the first one that is not lost.
        """
        reason = DESCRIPTIONS[message].format(seconds=self.timeout, name=TIMEOUT_VARIABLE)
        if is_spawned_rank() and message == DEAD:
            time.sleep(10 * POLL_SECONDS)  # the spawner knows the signal that killed the rank, and reports first
        hint = "" if message == INVALID_INPUT else f": {RERUN_HINT}, from the newest checkpoint"
        self._loss_message = f"rank {rank} on {self._hosts[rank]} {reason}; all ranks leave{hint}"
        self._peer_lost.set()
        if self._closed.wait(EXIT_GRACE_SECONDS if message in EXIT_STATUSES else DEATH_GRACE_SECONDS):
            return
        status, own_rank = EXIT_STATUSES.get(message, 1), self._comm.rank()
        own_host = self._hosts[own_rank]
        remaining_here = (r for r, host in enumerate(self._hosts) if host == own_host and r != rank)
        # `next` has no rank left when this rank is alone on its host and is itself the silent one.
        if is_spawned_rank() or own_rank == next(remaining_here, own_rank):
            report_exit(status, f"dscl: {self._loss_message}", delay=0.0)
        os._exit(resolve_exit_status(status))


def _read_timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds < 1e6:
        raise UserError(f"{TIMEOUT_VARIABLE}: given {text!r} in the environment; allowed: seconds, at least 1")
    return seconds


def _open_server() -> socket.socket:
    """A socket that listens on all addresses of this host, because only the launcher knows which one is reachable."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError:
            pass
    return socket.create_server(("", 0), backlog=1024)
