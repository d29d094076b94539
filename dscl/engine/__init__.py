"""The DeepSpeed engine, its optimizer and hooks, and the owners of whole matrices."""
