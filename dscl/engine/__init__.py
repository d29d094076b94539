"""One DeepSpeed engine for the whole stream of tasks, and what a rank holds of each matrix."""
