"""What follows the backbone: logits of answers' tokens alone, and their cross-entropy.

Where there are very many logits (long answers, large vocabularies) they are never there all at once: some rows at a
time give their part of the loss and, as it is a sum, of its gradients, which then wait for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.data.batches import Batch

AT_ONCE = 1 << 26  # logits; more are made in parts
# Models whose logits are what the head gives; others scale or bound them afterwards.
PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the answers' tokens, in fp32."""
    head, owner = model.get_output_embeddings(), model.get_output_embeddings.__self__  # within whatever is around it
    # An adapter's head is more than one product; and fp16 needs its loss scale before gradients are rounded.
    if type(head) is nn.Linear and owner.config.model_type in PLAIN and head.weight.dtype != torch.float16:
        rows = max(1, AT_ONCE // head.out_features)
        if batch.places.numel() > rows:
            return _in_parts(model, head, batch, rows)
    return functional.cross_entropy(answer_logits(model, batch), batch.labels, ignore_index=-100, reduction="sum")


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """For each of `labels`, [targets, vocabulary] in fp32; for no other token are any made."""
    with _only_targets(model.get_output_embeddings(), batch):
        return _through(model, batch).float()


def _in_parts(model: Any, head: nn.Linear, batch: Batch, rows: int) -> torch.Tensor:
    """The loss takes the place of the head's output."""
    backward = torch.is_grad_enabled()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = PartByPart.apply(hidden, head.weight, head.bias, batch.labels, rows, backward)
        return found

    with _only_targets(head, batch), _instead(head, loss):
        return _through(model, batch)


class PartByPart(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        rows: int,
        backward: bool,
    ) -> torch.Tensor:
        wanted = [backward and needed for needed in ctx.needs_input_grad[:3]]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros_like(weight) if wanted[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        for start in range(0, hidden.shape[0], rows):
            part, label = hidden[start : start + rows], labels[start : start + rows, None]
            counts, label = label != -100, label.clamp(min=0)
            logits = functional.linear(part, weight, bias).to(exact)
            whole, own = logits.logsumexp(1, keepdim=True), logits.gather(1, label)
            loss += (whole - own).mul_(counts).sum()
            if any(wanted):
                back = logits.sub_(whole).exp_()  # the gradient: probabilities, and one less at the label
                back.scatter_(1, label, (own - whole).exp_() - 1).mul_(counts)
                back = back.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(back, weight, out=to_hidden[start : start + rows])
            if to_weight is not None:
                to_weight.addmm_(back.T, part)
            if to_bias is not None:
                to_bias += back.sum(0)
        ctx.made, ctx.rows = (to_hidden, to_weight, to_bias), rows
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = outer
        made, ctx.made = ctx.made, None  # they are changed in place, so this can be asked for once
        for found in made:
            for some in found.split(ctx.rows) if found is not None else ():
                some.copy_(some.to(scale.dtype) * scale)  # not rounding the factor
        return (*made, None, None, None)


def _through(model: Any, batch: Batch) -> torch.Tensor:
    """What the model makes of a batch."""
    found: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,  # with a cache, packed samples would see each other
    ).logits
    return found


@contextmanager
def _only_targets(head: nn.Module, batch: Batch) -> Iterator[None]:
    """Within, the head sees the tokens from which an answer's token is foretold, [targets, hidden]."""

    def before_a_target(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0].flatten(0, 1).index_select(0, batch.places), *given[1:])

    hook = head.register_forward_pre_hook(before_a_target)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _instead(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, the module computes this; its hooks, by which weights are gathered, stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
