"""The names of OSFT's projections; `dscl.maths.subspace` defines them.

This module does not import torch, so that a recipe can be checked without it.
"""

PROJECTIONS = ("input", "two_sided", "paper")
