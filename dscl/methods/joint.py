"""All tasks at once, shuffled: no continual learning, but what its methods are measured against."""

from __future__ import annotations

from dscl.config.methods import JointConfig
from dscl.methods.sequential import Sequential


class Joint(Sequential):
    Config = JointConfig
    together = True
