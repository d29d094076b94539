"""The memory and time that a run will need."""
