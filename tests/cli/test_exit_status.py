"""The exit status of every error, and of a command whose output pipe is closed early."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dscl.cli.app import run_with_error_report
from dscl.utils.errors import ExternalFailure, RunStopped, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def function_that_raises(error: BaseException) -> Any:
    def raise_error() -> int:
        raise error

    return raise_error


@pytest.mark.parametrize(
    ("error", "status", "expected_message"),
    [
        (UserError("x: given 1;\nallowed: 2"), 2, "dscl: x: given 1; allowed: 2\n"),
        (ExternalFailure("the disk is full"), 1, "dscl: the disk is full\n"),
        (RunStopped("stopped after step 3"), 75, "dscl: stopped after step 3\n"),
        (KeyboardInterrupt(), 1, "dscl: interrupted; run the same command again to resume\n"),
    ],
)
def test_exit_statuses(
    error: BaseException, status: int, expected_message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with_error_report(function_that_raises(error)) == status
    assert capsys.readouterr().err == expected_message
    assert (
        run_with_error_report(lambda: run_with_error_report(function_that_raises(error))) == status
    )  # only the inner call reports the error
    assert capsys.readouterr().err == expected_message


def test_an_internal_error_shows_its_traceback_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_error_report(lambda: run_with_error_report(function_that_raises(ZeroDivisionError("inside")))) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("Traceback (most recent call last)") == 1
    assert stderr.rstrip().endswith("ZeroDivisionError: inside")


def test_a_closed_output_pipe_is_no_failure() -> None:
    """As in `dscl generate ... | head -1`."""
    work = "lambda: [print('x', flush=True) for _ in range(9999)] and 0"
    program = f"import sys; from dscl.cli.app import run_with_error_report; sys.exit(run_with_error_report({work}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_an_abort_in_the_interpreters_shutdown_changes_no_status() -> None:
    """Threads of libraries may abort the shutdown. The atexit functions run, and all output is flushed."""
    code = (
        "import atexit, builtins, os, sys\n"
        "class Aborts:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "builtins.kept = Aborts()\n"
        "atexit.register(lambda: print('at the end'))\n"
        "sys.argv = ['dscl', 'trian']\n"
        "from dscl.cli.app import {how}\n"
        "sys.exit({how}())\n"
    )
    for how, status in (("main", -signal.SIGABRT), ("run_and_exit", 2)):  # `main` alone would abort
        process = subprocess.run(
            [sys.executable, "-c", code.format(how=how)], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert process.returncode == status, process.stderr
        assert process.stdout == "at the end\n"
        assert "trian: no such verb (did you mean 'train'?)" in process.stderr
