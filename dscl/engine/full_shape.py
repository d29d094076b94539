"""The shape of a parameter before sharding, which a method may ask for without knowing the ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch


def full_shape(parameter: Any) -> torch.Size:
    """The parameter's shape before sharding. ZeRO-3 replaces the parameter itself by an empty tensor, and stores the
    shape in an attribute."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
