"""Exports of trained runs, and inference with them."""
