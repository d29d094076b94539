"""Joint training on all tasks at once: the upper bound that continual-learning methods are compared with."""

from __future__ import annotations

from dscl.config.methods import JointPreset
from dscl.methods.sequential import Sequential


class Joint(Sequential):
    """Joint training."""

    Config = JointPreset
    joint = True
