"""Prompts and labels as token ids, and a label's log probability from one plain forward pass."""

from __future__ import annotations

from typing import Any

import torch

EOS, PAD = 2, 0
LABELS = [[11, EOS], [11, 12, EOS], [13, 14, 15, EOS]]
PROMPTS = [[1, 20, 21, 22], [1, 30], [1, 40, 41, 42, 43, 44, 45], [1, 50, 51], [1, 60, 20, 33, 34]]


def reference_log_prob(module: Any, prompt: list[int], label: list[int]) -> float:
    """log p(label | prompt) from one forward pass over the prompt and the label."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(label))
