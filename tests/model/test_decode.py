"""Answering against brute force and against transformers' own generation."""

from __future__ import annotations

from typing import Any

import torch

from dscl.data.batches import prompt_batch
from dscl.engine import fill
from dscl.model.decode import generate, label_likelihoods
from tests.distributed.test_engine import VOCABULARY, backbone

EOS, PAD = 2, 0
LABELS = [[11, EOS], [11, 12, EOS], [13, 14, 15, EOS]]
PROMPTS = [[1, 20, 21, 22], [1, 30], [1, 40, 41, 42, 43, 44, 45], [1, 50, 51], [1, 60, 20, 33, 34]]
BATCH = prompt_batch(PROMPTS, PAD)


def model() -> Any:
    built = backbone()
    made = built.build()
    fill(made, built.weights.read)
    return made.eval()


def alone(module: Any, prompt: list[int], label: list[int]) -> float:
    """log p(label | prompt) from one plain forward pass over the two together."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(label))


def test_likelihoods_equal_one_plain_pass_each() -> None:
    module = model()
    with torch.no_grad():
        got = label_likelihoods(module, BATCH, LABELS, PAD)
    expected = torch.tensor([[alone(module, prompt, label) for label in LABELS] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_many_labels_are_ranked_a_few_at_a_time() -> None:
    """So that memory does not grow with the label set; the values are those of all labels at once."""
    module, rows = model(), []
    labels = [[token, *([12] * (token % 3)), EOS] for token in range(20, 31)]
    module.register_forward_pre_hook(lambda _m, _a, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        got = label_likelihoods(module, BATCH, labels, PAD)
    assert max(rows) <= 4 * len(PROMPTS)
    expected = torch.tensor([[alone(module, prompt, label) for label in labels] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_single_token_labels_need_no_second_pass() -> None:
    module = model()
    with torch.no_grad():
        got = label_likelihoods(module, BATCH, [[5], [6]], PAD)
    expected = torch.tensor([[alone(module, prompt, [label]) for label in (5, 6)] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_transformers() -> None:
    module = model()
    with torch.no_grad():
        frequent = generate(module, BATCH, 12, VOCABULARY, PAD)[0][3]  # a token that does come up: let it end rows
        got = generate(module, BATCH, 12, frequent, PAD)
        for prompt, row in zip(PROMPTS, got, strict=True):
            expected = module.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=12, eos_token_id=frequent, pad_token_id=PAD, use_cache=True,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert row == expected[: expected.index(frequent)] if frequent in expected else expected
