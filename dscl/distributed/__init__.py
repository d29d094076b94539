"""Ranks: collectives, the local launcher, heartbeats between ranks, stopping on a signal."""
