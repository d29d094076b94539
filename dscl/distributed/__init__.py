"""Ranks: collectives, the local launcher, liveness of the other ranks, stopping on a signal."""
