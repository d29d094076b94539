"""The language-model head: logits and cross-entropy of the answer tokens only.

With very many logits (long answers, large vocabularies), the loss is computed in chunks of rows, so that the logits are
never in memory all at once. The forward pass then computes the gradients chunk by chunk too, and keeps them for the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.data.batches import Batch

MAX_LOGITS = 1 << 26  # logits computed at once; more are computed in chunks
# Model types whose logits are the plain output of the head; others scale or cap the logits.
PLAIN_HEAD_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the answer tokens, in fp32."""
    head, owner = model.get_output_embeddings(), model.get_output_embeddings.__self__  # the model inside wrappers
    # A head with an adapter is more than one product; and fp16 gradients must be scaled before they are rounded.
    if type(head) is nn.Linear and owner.config.model_type in PLAIN_HEAD_MODELS and head.weight.dtype != torch.float16:
        chunk_rows = max(1, MAX_LOGITS // head.out_features)
        if batch.loss_positions.numel() > chunk_rows:
            return _chunked_answer_loss(model, head, batch, chunk_rows)
    return functional.cross_entropy(answer_logits(model, batch), batch.labels, ignore_index=-100, reduction="sum")


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits for the answer tokens `batch.labels` only, [targets, vocabulary] in fp32."""
    with _select_targets(model.get_output_embeddings(), batch):
        return _forward_batch(model, batch).float()


def _chunked_answer_loss(model: Any, head: nn.Linear, batch: Batch, chunk_rows: int) -> torch.Tensor:
    """The answer loss, computed in chunks of rows inside the head's forward pass."""
    backward = torch.is_grad_enabled()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = ChunkedCrossEntropy.apply(
            hidden, head.weight, head.bias, batch.labels, chunk_rows, backward
        )
        return output

    with _select_targets(head, batch), _replace_forward(head, loss):
        return _forward_batch(model, batch)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`, in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_rows: int,
        backward: bool,
    ) -> torch.Tensor:
        needs_grad = [backward and needed for needed in ctx.needs_input_grad[:3]]
        loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=loss_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = torch.zeros_like(weight) if needs_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_grad[2] else None
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk, chunk_labels = hidden[start : start + chunk_rows], labels[start : start + chunk_rows, None]
            is_target, chunk_labels = chunk_labels != -100, chunk_labels.clamp(min=0)
            logits = functional.linear(chunk, weight, bias).to(loss_dtype)
            log_normalizer, label_logits = logits.logsumexp(1, keepdim=True), logits.gather(1, chunk_labels)
            loss += (log_normalizer - label_logits).mul_(is_target).sum()
            if any(needs_grad):
                grad_logits = logits.sub_(log_normalizer).exp_()  # gradient of the loss: softmax minus one-hot label
                grad_logits.scatter_(1, chunk_labels, (label_logits - log_normalizer).exp_() - 1).mul_(is_target)
                grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + chunk_rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, chunk)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.grads, ctx.chunk_rows = (grad_hidden, grad_weight, grad_bias), chunk_rows
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        grads, ctx.grads = ctx.grads, None  # scaled in place, so backward can run only once
        for grad in grads:
            for rows in grad.split(ctx.chunk_rows) if grad is not None else ():
                rows.copy_(rows.to(scale.dtype) * scale)  # multiplies before rounding
        return (*grads, None, None, None)


def _forward_batch(model: Any, batch: Batch) -> torch.Tensor:
    """The model's logits for a batch; or the loss, inside `_chunked_answer_loss`."""
    output: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,  # with a cache, packed samples would see each other
    ).logits
    return output


@contextmanager
def _select_targets(head: nn.Module, batch: Batch) -> Iterator[None]:
    """In this context, the head receives only the positions that predict an answer token, [targets, hidden]."""

    def select_targets(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, batch.loss_positions), *inputs[1:])

    hook = head.register_forward_pre_hook(select_targets)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _replace_forward(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """In this context, the module runs this forward function. Its hooks, which gather ZeRO-3 weights, still run."""
    original_forward = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original_forward is None:
            del module.forward
        else:
            module.forward = original_forward
