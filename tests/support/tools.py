"""The scripts of tools/ for tests, forked from a process that has imported what they need (see `programs`)."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dscl.distributed.launcher import EXIT_WITH_PID_VARIABLE
from tests.support.programs import Program, redirect_streams, reset_process_state

TOOLS = Path(__file__).resolve().parents[2] / "tools"


class Tool(Program):
    """A running `python tools/NAME.py WORDS`.

    `changes` are attributes to set in the script's module first. Scripts that the script starts are forked too.
    """

    def __init__(
        self,
        words: Sequence[str],
        changes: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # The parent of a fork is another process than the one that `die_with_parent` expects.
        variables = {name: value for name, value in (environment or {}).items() if name != EXIT_WITH_PID_VARIABLE}
        super().__init__([words, changes or {}], cwd=TOOLS.parent, **variables)  # type: ignore[list-item]

    def _target(self) -> Callable[..., None]:
        return _tool


class ForkedTool:
    """Replaces the subprocess.Popen with which a tool starts another tool and reads its lines."""

    def __init__(self, words: Sequence[str], stdout: int, text: bool, env: Mapping[str, str]) -> None:
        assert (words[0], stdout, text) == (sys.executable, subprocess.PIPE, True)
        self._tool = Tool(words[1:], environment=env)

    @property
    def stdout(self) -> Iterator[str]:
        out, err = self._tool.communicate(timeout=100)
        sys.stderr.write(err)
        return io.StringIO(out)

    def wait(self) -> int:
        return self._tool.wait()


def forked_run(
    words: Sequence[str], capture_output: bool, text: bool, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Replaces the subprocess.run with which a tool starts another tool."""
    assert (words[0], capture_output, text) == (sys.executable, True, True)
    tool = Tool(words[1:], environment=env)
    out, err = tool.communicate(timeout=100)
    return subprocess.CompletedProcess(words, tool.wait(), out, err)


SUBPROCESS = SimpleNamespace(Popen=ForkedTool, run=forked_run, PIPE=subprocess.PIPE)


def _tool(arguments: list[Any], cwd: str, session: bool, environment: dict[str, str], files: list[str]) -> None:
    (script, *words), changes = arguments
    redirect_streams(cwd, files)
    reset_process_state([script, *words], environment, session)
    status = 0
    try:
        module: Any = importlib.import_module(f"tools.{Path(script).stem}")
        if hasattr(module, "subprocess"):
            module.subprocess = SUBPROCESS
        for name, value in changes.items():
            assert hasattr(module, name), name
            setattr(module, name, value)
        module.main()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
