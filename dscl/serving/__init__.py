"""Exported models: their folder, their answers."""
