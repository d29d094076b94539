"""Advice of libraries is silenced in a fresh process, other warnings are not, and DSCL_VERBOSE shows all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from dscl.utils.quiet import silence_libraries
silence_libraries()
heavy = [m for m in ("torch", "numpy", "deepspeed", "transformers", "datasets", "tensorboard") if m in sys.modules]
assert not heavy, heavy

import logging, os, warnings
for category in (FutureWarning, DeprecationWarning, UserWarning):
    for module in ("torch.distributed.c10d_logger", "transformers.modeling_utils", "somebody", "torchlike"):
        warnings.warn_explicit(f"{category.__name__} from {module}", category, "file.py", 1, module=module)
warnings.warn_explicit("UserWarning of ours", UserWarning, "file.py", 1, module="dscl.engine.engine")
for name in ("absl", "tensorboard", "somebody"):
    logging.getLogger(name).warning("log warning from %s", name)
    logging.getLogger(name).error("log error from %s", name)
print("verbosity", os.environ.get("TRANSFORMERS_VERBOSITY"))
"""


def run_program(**environment: str) -> tuple[str, str]:
    ours = ("TRANSFORMERS_VERBOSITY", "DSCL_VERBOSE", "PYTHONWARNINGS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, process.stderr


def test_advice_between_libraries_is_hidden_and_all_else_passes() -> None:
    stdout, stderr = run_program()
    for hidden in (
        "FutureWarning from torch.distributed",
        "FutureWarning from transformers",
        "log warning from absl",
        "log warning from tensorboard",
    ):
        assert hidden not in stderr
    for passed in (
        "UserWarning from torch.distributed",
        "UserWarning from transformers",
        "FutureWarning from somebody",
        "FutureWarning from torchlike",
        "UserWarning of ours",
        "log error from absl",
        "log error from tensorboard",
        "log warning from somebody",
    ):
        assert passed in stderr
    assert "verbosity error" in stdout


def test_the_user_has_the_last_word() -> None:
    assert "verbosity debug" in run_program(TRANSFORMERS_VERBOSITY="debug")[0]


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_verbose_leaves_everything_on(value: str, shown: bool) -> None:
    stdout, stderr = run_program(DSCL_VERBOSE=value)
    for line in ("FutureWarning from torch.distributed", "log warning from absl"):
        assert (line in stderr) == shown
    assert ("verbosity None" in stdout) == shown
