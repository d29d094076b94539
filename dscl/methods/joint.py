"""All tasks at once, shuffled: no continual learning, but what its methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from dscl.config import key
from dscl.methods.sequential import Sequential, SequentialConfig


@dataclass(frozen=True)
class JointConfig(SequentialConfig):
    name: str = key("joint")


class Joint(Sequential):
    Config = JointConfig
    together = True
