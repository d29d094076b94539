"""dscl: continual learning with DeepSpeed."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `dscl.load` (`dscl.serving.server.load`) on first use, so that `import dscl` imports no heavy package."""
    if name == "load":
        return import_module("dscl.serving.server").load
    raise AttributeError(f"module 'dscl' has no attribute {name!r}")
