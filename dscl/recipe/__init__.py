"""A recipe: its sections and its method, read, checked and written."""
