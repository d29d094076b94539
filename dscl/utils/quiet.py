"""Silence warnings and progress bars of third-party libraries; their errors are still shown.

Most libraries read an environment variable for that when they are imported. A variable that the user has set stays as
it is, and with DSCL_VERBOSE=1 nothing is silenced.
"""

from __future__ import annotations

import logging
import os
import warnings

_QUIET_VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also the bars of transformers, for loading and writing weights
    "TOKENIZERS_PARALLELISM": "false",  # otherwise a process that has tokenised warns when it forks
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the log of c10d and gloo
    "TF_CPP_MIN_LOG_LEVEL": "2",  # tensorboard imports TensorFlow where it is installed
    "ABSL_MIN_LOG_LEVEL": "2",
}

# Deprecation warnings raised in these modules are for the authors of the libraries.
_QUIET_MODULES = r"(torch|deepspeed|transformers|datasets|peft|accelerate|tensorboard|huggingface_hub)\b"

_QUIET_LOGGERS = ("absl", "tensorboard", "torch.distributed", "torch.utils.cpp_extension", "huggingface_hub")


def is_verbose() -> bool:
    return os.environ.get("DSCL_VERBOSE", "0") not in ("", "0")


def silence_libraries() -> None:
    """Silence the libraries; must be called before torch, deepspeed, transformers or datasets is imported."""
    if is_verbose():
        return
    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_QUIET_MODULES)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
