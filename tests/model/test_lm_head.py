"""The loss over answer tokens, against the model's own logits."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dscl.data.batches import collate
from dscl.model import lm_head
from dscl.model.lm_head import answer_logits, answer_loss

SAMPLES = {0: ([1, 5, 6], [7, 2]), 1: ([1, 8], [9, 10, 11, 2]), 2: ([1, 12, 13, 14, 15], [2]), 3: ([1, 4], [3, 2])}


def make_model(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_answer_logits_equal_full_logits_at_targets(packing: bool, tied: bool, adapted: bool) -> None:
    rows = [[0, 1], [2, 3]] if packing else [[0], [1], [2], [3]]
    batch, module = collate(rows, SAMPLES, 0, packing), make_model(tied)
    if adapted:
        module = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], r=2))
    full_logits = module(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits.flatten(0, 1)
    head_rows: list[int] = []
    module.get_output_embeddings().register_forward_hook(
        lambda _m, inputs, _o: head_rows.append(inputs[0].numel() // 16)
    )
    torch.testing.assert_close(answer_logits(module, batch), full_logits[batch.loss_positions], rtol=1e-5, atol=1e-5)
    assert head_rows == [sum(len(answer) for _, answer in SAMPLES.values())]
    expected = functional.cross_entropy(full_logits[batch.loss_positions], batch.labels, reduction="sum")
    loss = answer_loss(module, batch)
    torch.testing.assert_close(loss, expected)
    trainable = [p for p in module.parameters() if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(loss, trainable), torch.autograd.grad(expected, trainable), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_failed_pass_leaves_the_model_unchanged() -> None:
    batch, module = collate([[0]], SAMPLES, 0, False), make_model(tied=False)
    broken = module.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_loss(module, batch)
    broken.remove()
    assert module(input_ids=batch.input_ids).logits.shape == (*batch.input_ids.shape, 32)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 4 * 32)  # four rows of the vocabulary


def gradients(module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(trainable, torch.autograd.grad(loss / 7, list(trainable.values())), strict=True))


@pytest.mark.parametrize("trained", ["all", "but the head", "the head"])
@pytest.mark.parametrize("tied", [False, True])
def test_chunked_loss_and_gradients_equal_the_full_ones(trained: str, tied: bool, small_parts: None) -> None:
    """In fp64, with one label that is ignored."""
    batch, module = collate([[0, 1], [2, 3]], SAMPLES, 0, True), make_model(tied).double()
    module.lm_head.bias = torch.nn.Parameter(torch.randn(32, dtype=torch.float64))
    batch.labels[2] = -100
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith("lm_head") == (trained == "the head"))
    logits = answer_logits(module, batch).double()
    assert logits.shape[0] == 9
    full_logits = module(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits.flatten(0, 1)[batch.loss_positions]
    expected = functional.cross_entropy(full_logits, batch.labels, reduction="sum")
    rows: list[int] = []
    original_linear = lm_head.functional.linear

    def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape[0] == 32 and weight.shape[1] == 16 and hidden.dim() == 2:
            rows.append(hidden.shape[0])
        return original_linear(hidden, weight, bias)

    lm_head.functional.linear = linear
    try:
        loss = answer_loss(module, batch)
    finally:
        lm_head.functional.linear = original_linear
    assert rows == [4, 4, 1]
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    expected_gradients = gradients(module, expected)
    for name, mine in gradients(module, loss).items():
        torch.testing.assert_close(mine, expected_gradients[name], rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(answer_loss(module, batch), expected, rtol=1e-12, atol=0)
    assert "forward" not in vars(module.lm_head)


def test_chunked_loss_in_bf16_is_as_exact_as_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*size, dtype=torch.float64).bfloat16() for size in ((512, 64), (1000, 64)))
    labels = torch.randint(0, 1000, (512,))

    def loss_and_gradients(kind: torch.dtype, rows: int | None) -> list[torch.Tensor]:
        leaves = [tensor.to(kind).clone().requires_grad_() for tensor in (hidden, weight)]
        if rows is None:
            loss = functional.cross_entropy(
                functional.linear(*leaves).to(torch.promote_types(kind, torch.float32)), labels, reduction="sum"
            )
        else:
            loss = lm_head.ChunkedCrossEntropy.apply(*leaves, None, labels, rows, True)
        (loss / 509).backward()
        return [loss.detach(), *(tensor.grad for tensor in leaves)]

    def relative_errors(kind: torch.dtype, rows: int | None) -> list[float]:
        pairs = zip(loss_and_gradients(kind, rows), loss_and_gradients(torch.float64, None), strict=True)
        return [float((mine.double() - exact).norm() / exact.norm()) for mine, exact in pairs]

    full_errors, chunked_errors = relative_errors(torch.bfloat16, None), relative_errors(torch.bfloat16, 64)
    assert chunked_errors[0] == pytest.approx(full_errors[0], rel=0.1)
    assert chunked_errors[1] < 1.3 * full_errors[1]
    assert chunked_errors[2] < 3 * full_errors[2]  # added up over eight parts, each of which is rounded


@pytest.mark.parametrize("kind", lm_head.PLAIN_HEAD_MODELS)
def test_plain_head_models_return_the_heads_output(kind: str, small_parts: None) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    batch = collate([[0, 1], [2, 3]], SAMPLES, 0, True)
    expected = functional.cross_entropy(answer_logits(module, batch), batch.labels, reduction="sum")
    torch.testing.assert_close(answer_loss(module, batch), expected)
    adapted = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], r=2))
    torch.testing.assert_close(answer_loss(adapted, batch), expected)


def test_other_model_types_use_the_full_loss(small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model may scale or bound its logits, so the chunked loss does not apply."""
    batch, module = collate([[0, 1], [2, 3]], SAMPLES, 0, True), make_model(False)
    expected = functional.cross_entropy(answer_logits(module, batch), batch.labels, reduction="sum")
    module.config.model_type = "gemma2"
    monkeypatch.setattr(lm_head, "_chunked_answer_loss", None)
    torch.testing.assert_close(answer_loss(module, batch), expected)
