"""A run: setup, the loop over tasks, evaluation, checkpoints, the run directory."""
