"""Adapter modules that are injected into a model: LoRA banks and sub-experts, their files and their routing."""
