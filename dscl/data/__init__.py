"""Data: reading tasks, tokenizing samples, assigning them to steps and collating micro-batches."""
