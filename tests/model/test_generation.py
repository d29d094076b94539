"""Answering against brute force and against transformers' own generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from dscl.data.batches import collate_prompts
from dscl.model.generation import MAX_TREE_TOKENS, generate, label_log_probs
from tests.support.decoding import EOS, LABELS, PAD, PROMPTS, reference_log_prob
from tests.support.toy_model import VOCABULARY, toy_model

BATCH = collate_prompts(PROMPTS, PAD)


def expected(module: Any, labels: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[reference_log_prob(module, prompt, label) for label in labels] for prompt in PROMPTS]).float()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_label_log_probs_equal_one_plain_pass_per_label(attention: str) -> None:
    module = toy_model()
    module.set_attn_implementation(attention)
    with torch.no_grad():
        got = label_log_probs(module, BATCH, LABELS)
    torch.testing.assert_close(got, expected(module, LABELS), rtol=1e-5, atol=1e-5)


def passes(module: Any) -> list[tuple[int, ...]]:
    """Where the shapes of what the model reads will stand."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _m, _a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True)
    return shapes


def test_shared_label_prefixes_are_computed_once() -> None:
    module = toy_model()
    shapes = passes(module)
    labels = [[11, 12, 13, EOS], [14, EOS], [11, 12, 15, EOS], [16], [11, EOS]]
    with torch.no_grad():
        got = label_log_probs(module, BATCH, labels)
    assert shapes == [(5, BATCH.input_ids.shape[1]), (5, 5)]  # 11, 11 12, 11 12 13, 11 12 15 and 14
    torch.testing.assert_close(got, expected(module, labels), rtol=1e-5, atol=1e-5)


def test_many_labels_are_processed_in_parts() -> None:
    """So that memory does not grow with the label set."""
    module = toy_model()
    shapes = passes(module)
    labels = [[token, *([12] * (token % 5)), EOS] for token in range(20, 51)]
    with torch.no_grad():
        got = label_log_probs(module, BATCH, labels)
    assert len(shapes) > 3
    assert max(shape[1] for shape in shapes[1:]) <= MAX_TREE_TOKENS
    torch.testing.assert_close(got, expected(module, labels), rtol=1e-5, atol=1e-5)


def test_sliding_window_attention_processes_single_labels() -> None:
    """No mask of a tree's can be given to it; and the window is that of a plain pass."""
    torch.manual_seed(0)
    module = MistralForCausalLM(
        MistralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4,
        )
    ).eval()  # fmt: skip
    shapes = passes(module)
    with torch.no_grad():
        got = label_log_probs(module, BATCH, LABELS)
    assert [shape[1] for shape in shapes[1:]] == [1, 2, 3]
    torch.testing.assert_close(got, expected(module, LABELS), rtol=1e-5, atol=1e-5)


def test_single_token_labels_need_no_second_pass() -> None:
    module = toy_model()
    with torch.no_grad():
        got = label_log_probs(module, BATCH, [[5], [6]])
    torch.testing.assert_close(got, expected(module, [[5], [6]]), rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_transformers() -> None:
    module = toy_model()
    for layer in module.model.layers:  # large enough for the attention to depend on positions
        for weight in layer.parameters():
            weight.data *= 8.0
    with torch.no_grad():
        frequent = generate(module, BATCH, 12, VOCABULARY, PAD)[0][3]  # a token that does come up: let it end rows
        got = generate(module, BATCH, 12, frequent, PAD)
        for prompt, row in zip(PROMPTS, got, strict=True):
            whole = module.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=12, eos_token_id=frequent, pad_token_id=PAD, use_cache=True,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert row == (whole[: whole.index(frequent)] if frequent in whole else whole)
