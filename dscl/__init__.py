"""dscl: continual learning with DeepSpeed."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dscl.load` is `dscl.serving.server.load`, imported on first use, so that
    `import dscl` stays light."""
    if name == "load":
        return import_module("dscl.serving.server").load
    raise AttributeError(f"module 'dscl' has no attribute {name!r}")
