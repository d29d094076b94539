"""The keys of a recipe with their types and bounds; no file here imports torch."""
