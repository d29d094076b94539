"""Real ranks for tests: processes that stay alive and run plain functions.

They are forked from a process that has imported torch, DeepSpeed and dscl once (`fork_context`)."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.context
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_SECONDS = 120.0  # seconds to import everything
PRELOADED_MODULES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "dscl.training.run",
    "dscl.cli.app",
    "tests.support.runs",
)


def fork_context() -> multiprocessing.context.BaseContext:
    """A context that forks from a server process, which has imported PRELOADED_MODULES and has no threads."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # both are read while importing
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    return context


class Pool:
    """`pool(function, *arguments)` runs the function on every rank and returns the results in rank order."""

    def __init__(self, world: int) -> None:
        context = fork_context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._links: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(theirs, rank, world, port), daemon=True
            )
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        for link in self._links:
            link.send((function.__module__, function.__qualname__, arguments))
        results, failures = [], []
        for rank, link in enumerate(self._links):
            if not link.poll(timeout + START_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} gave no result of {function.__qualname__} within {timeout} s")
            kind, value = link.recv()
            results.append(value)
            if kind == "error":
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()  # the ranks may be out of step with each other
            raise AssertionError("\n".join(failures))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(link: Connection, rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    from dscl.utils.quiet import silence_libraries

    silence_libraries()
    import torch

    from dscl.distributed import comm

    torch.set_num_threads(1)
    with comm.process_group():
        while True:
            try:
                module, name, arguments = link.recv()
            except EOFError:
                return
            try:
                function: Any = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                link.send(("result", function(*arguments)))
            except BaseException:
                link.send(("error", traceback.format_exc()))
