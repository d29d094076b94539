"""Modules that are put into a model: LoRA banks, sub-experts, their files and their routing."""
