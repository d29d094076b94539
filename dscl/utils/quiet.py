"""Quiet the chatter of third-party libraries, so that what a run prints is the run's own; real errors still pass.

Each library is silenced by the switch that it offers, read when it is imported. A switch that the user has set stays
as it is, and DSCL_VERBOSE=1 leaves everything on.
"""

from __future__ import annotations

import logging
import os
import warnings

_SWITCHES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the bars of transformers too: loading and writing of weights
    "TOKENIZERS_PARALLELISM": "false",  # else a warning when a process that has tokenised forks
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # c10d's and gloo's own log lines
    "TF_CPP_MIN_LOG_LEVEL": "2",  # tensorboard imports TensorFlow where it is installed
    "ABSL_MIN_LOG_LEVEL": "2",
}

# Advice to the authors of these libraries, about each other.
_ADVISED = r"(torch|deepspeed|transformers|datasets|peft|accelerate|tensorboard|huggingface_hub)\b"

_LOGGERS = ("absl", "tensorboard", "torch.distributed", "torch.utils.cpp_extension", "huggingface_hub")


def verbose() -> bool:
    return os.environ.get("DSCL_VERBOSE", "0") not in ("", "0")


def quiet() -> None:
    """Call this before torch, deepspeed, transformers or datasets is imported."""
    if verbose():
        return
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_ADVISED)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
