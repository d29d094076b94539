"""Imports of heavy packages, which a verb makes only after its arguments have been checked."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def disable_gc_for_imports() -> Iterator[None]:
    """Import heavy packages without garbage collection, and exclude their objects from later collections.

    The imports create a million objects, none of which is garbage. Collections would take a fifth of the import time,
    and later ones a third of a second each.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_training_runs() -> Any:
    with disable_gc_for_imports():
        return import_module("dscl.training.run")


def import_export_module() -> Any:
    """Import `dscl.serving.export`, which reads run directories and needs DeepSpeed for that."""
    choose_accelerator()
    with disable_gc_for_imports():
        return import_module("dscl.serving.export")


def choose_accelerator() -> None:
    """Set DS_ACCELERATOR=cpu on a machine without GPUs, before DeepSpeed is imported, which would print a warning."""
    from dscl.distributed import comm

    if comm.device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
