"""dscl: continual learning with DeepSpeed."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dscl.load` is `dscl.serve.load`, imported when it is asked for: the command line starts by importing this."""
    if name == "load":
        return import_module("dscl.serve").load
    raise AttributeError(f"module 'dscl' has no attribute {name!r}")
