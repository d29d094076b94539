"""The readings of OSFT's constraint, by name; `subspace` has what each keeps. Without torch, so that a recipe can be
checked before it is imported."""

READINGS = ("input", "two_sided", "paper")
