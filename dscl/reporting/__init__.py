"""Comparisons of methods, and reports of finished runs."""
