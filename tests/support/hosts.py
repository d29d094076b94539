"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge in one more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


RANK_VARIABLES = ("DSCL_", "LOCAL_", "MASTER_", "PET_", "RANK", "RDZV_", "SBATCH_", "SLURM_", "WORLD_")


def environment_without_ranks() -> dict[str, str]:
    """The environment without the variables that launchers set for ranks."""
    return {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}


class Unavailable(Exception):
    """A service that a test needs cannot be set up on this machine; the message says why."""


class Hosts:
    def __init__(self, count: int) -> None:
        if shutil.which("ip") is None:
            raise Unavailable("no ip command; install iproute2")
        self.addresses = [f"10.77.{os.getpid() % 250}.{number + 1}" for number in range(count)]
        self._names = [f"dscl{os.getpid()}-{number}" for number in range(count)]
        self._bridge = f"dscl{os.getpid()}-s"
        self._started: list[subprocess.Popen[str]] = []
        try:
            for name in (*self._names, self._bridge):
                self._ip("netns", "add", name)
                self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self._bridge, "link", "set", "bridge", "up")
            for number, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
                port = f"port{number}"
                self._ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._bridge)
                self._ip("-n", self._bridge, "link", "set", port, "master", "bridge", "up")
                self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                self._ip("-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            self.close()
            raise Unavailable(f"network namespaces cannot be made ({error.stderr.strip()}); they need root") from None

    def start(self, number: int, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host. `close` ends it."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._names[number], *words],
            cwd=REPOSITORY,
            env={
                **environment_without_ranks(),
                "PYTHON": sys.executable,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "GLOO_SOCKET_IFNAME": "eth0",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def set_link(self, number: int, up: bool) -> None:
        """Set a host's network link down, or up again."""
        self._ip("-n", self._bridge, "link", "set", f"port{number}", "up" if up else "down")

    def close(self) -> None:
        for name in self._names:  # launchers and ranks stand in process groups of their own
            there = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for pid in map(int, there.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        for name in (*self._names, self._bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
