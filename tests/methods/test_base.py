"""The loss that methods share, against the model's own logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.data.batches import collate
from dscl.methods.base import answer_logits, answer_loss

SAMPLES = {0: ([1, 5, 6], [7, 2]), 1: ([1, 8], [9, 10, 11, 2]), 2: ([1, 12, 13, 14, 15], [2]), 3: ([1, 4], [3, 2])}


def model(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_logits_are_those_of_the_whole_rows_and_made_of_targets_alone(packing: bool, tied: bool, adapted: bool) -> None:
    rows = [[0, 1], [2, 3]] if packing else [[0], [1], [2], [3]]
    batch, module = collate(rows, SAMPLES, 0, packing), model(tied)
    if adapted:
        module = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], r=2))
    whole = module(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits.flatten(0, 1)
    seen: list[int] = []
    module.get_output_embeddings().register_forward_hook(lambda _m, given, _o: seen.append(given[0].numel() // 16))
    torch.testing.assert_close(answer_logits(module, batch), whole[batch.places], rtol=1e-5, atol=1e-5)
    assert seen == [sum(len(answer) for _, answer in SAMPLES.values())]
    expected = functional.cross_entropy(whole[batch.places], batch.labels, reduction="sum")
    loss = answer_loss(module, batch)
    torch.testing.assert_close(loss, expected)
    wanted = [p for p in module.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_pass_that_fails_leaves_the_model_as_it_was() -> None:
    batch, module = collate([[0]], SAMPLES, 0, False), model(tied=False)
    broken = module.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_loss(module, batch)
    broken.remove()
    assert module(input_ids=batch.input_ids).logits.shape == (*batch.input_ids.shape, 32)
