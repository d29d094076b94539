"""The sub-expert layer on a GPU: no synchronization, deterministic passes, and bf16 close to fp32 on the CPU. Skipped
without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from dscl.model.adapters import sub_experts
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)

IN, OUT, TASKS = 256, 192, 3
SHAPE = SubExpertShape(num_experts=8, max_experts=10, rank=8, top_k=2, mask_density=0.25, scale=2.0, rank1=True)
KINDS = pytest.mark.parametrize("rank1", [True, False])


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within this context a synchronization with the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_layer(rank1: bool, dtype: torch.dtype, device: str, top: int = 2, dropout: float = 0.0) -> SubExpertLinear:
    """A layer with the frozen parameters of two tasks and a third task in training. The values are the same on every
    device."""
    torch.manual_seed(0)
    shape = SubExpertShape(**{**vars(SHAPE), "rank1": rank1, "top_k": top, "dropout": dropout})
    layer = SubExpertLinear(nn.Linear(IN, OUT), shape, Routing(TASKS, 0), torch.empty(0))
    layer.make_trainable()
    for task in range(TASKS):
        layer.set_allowed_masks(shape.num_experts + task, reuse=True)
        with torch.no_grad():
            for name in layer.trainable_names:
                parameter = getattr(layer, name)
                parameter.copy_((torch.randn(parameter.shape) / 16).bfloat16())
            for (
                name,
                count,
            ) in layer.mask_counts.items():  # so many are far from zero, so that a mask is the same in bf16
                part = layer._open_part(name, getattr(layer, f"score_{name}"))
                far = (torch.randperm(part.numel()) < count).view(part.shape)
                part[far] = (part[far].sign() + part[far]).bfloat16().float()
        if task < TASKS - 1:
            layer.freeze_task_params(task, {name: getattr(layer, name).detach() for name in layer.trainable_names})
    return layer.to(device, dtype)


def inputs(dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(6, 33, IN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def outputs_and_gradients(layer: SubExpertLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs and all gradients of a training pass."""
    layer.train()
    x = x.clone().requires_grad_()
    y = layer(x)
    return [
        y.detach(),
        *torch.autograd.grad(y.float().square().mean(), [x, *(getattr(layer, n) for n in layer.trainable_names)]),
    ]


@torch.no_grad()
def eval_output(layer: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = layer.eval()(x)
    return answer


def assign_rows(layer: SubExpertLinear, x: torch.Tensor) -> None:
    """Assign rows to both tasks and to none. The host copies the assignment to the GPU once per batch, not per
    layer."""
    layer.routing.assign_slots([0, 1, None, 1, 0, 0], x)
    rows = layer.routing.assignment
    assert rows is not None
    for assigned in (rows.slot_indices, rows.has_slot, *rows.rows_by_slot.values()):
        assert assigned.is_cuda == x.is_cuda


@KINDS
@pytest.mark.parametrize("top", [1, 2, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_host_waits(rank1: bool, top: int, dropout: float) -> None:
    layer, x = make_layer(rank1, torch.bfloat16, "cuda", top, dropout), inputs(torch.bfloat16, "cuda")
    assign_rows(layer, x)
    outputs_and_gradients(layer, x)  # libraries initialize in the first pass, and synchronize
    eval_output(layer, x)
    with no_waiting():
        outputs_and_gradients(layer, x)
        eval_output(layer, x)


def test_a_host_that_waits_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(True, torch.bfloat16, "cuda"), inputs(torch.bfloat16, "cuda")
    outputs_and_gradients(layer, x)
    apply_gates = sub_experts.apply_gates

    def apply_and_wait(read: torch.Tensor, *sizes: Any) -> torch.Tensor:
        gated = apply_gates(read, *sizes)
        return gated if bool(gated.any()) else gated * 0

    monkeypatch.setattr(sub_experts, "apply_gates", apply_and_wait)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        outputs_and_gradients(layer, x)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_gives_the_same_bits(rank1: bool, dtype: torch.dtype) -> None:
    layer, x = make_layer(rank1, dtype, "cuda"), inputs(dtype, "cuda")
    assign_rows(layer, x)
    first, answer = outputs_and_gradients(layer, x), eval_output(layer, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(layer, x), first, strict=True))
        assert torch.equal(eval_output(layer, x), answer)


@KINDS
@pytest.mark.parametrize("top", [2, 0])
def test_bf16_comes_close_to_the_cpu_in_fp32(rank1: bool, top: int) -> None:
    """Rounding may send a token to another expert, so a few rows may differ; the total error is bounded."""
    reference, layer = make_layer(rank1, torch.float32, "cpu", top), make_layer(rank1, torch.bfloat16, "cuda", top)
    x = inputs(torch.bfloat16, "cpu")
    assign_rows(reference, x.float())
    assign_rows(layer, x.cuda())
    pairs = [
        *zip(outputs_and_gradients(reference, x.float()), outputs_and_gradients(layer, x.cuda()), strict=True),
        (eval_output(reference, x.float()), eval_output(layer, x.cuda())),
    ]
    for index, (expected, output) in enumerate(pairs):
        error = (output.float().cpu() - expected).norm() / expected.norm()
        assert error < 0.1, index
    for name, mask in layer._tensors_by_mask("frozen_mask").items():
        assert torch.equal(mask.cpu(), getattr(reference, f"frozen_mask_{name}"))


@KINDS
def test_a_later_task_changes_no_bit(rank1: bool) -> None:
    layer, x = make_layer(rank1, torch.bfloat16, "cuda"), inputs(torch.bfloat16, "cuda")
    assign_rows(layer, x)
    before = eval_output(layer, x)
    layer.freeze_task_params(2, {name: getattr(layer, name).detach().float() for name in layer.trainable_names})
    assert torch.equal(eval_output(layer, x), before)
    layer.routing.assign_slots([2] * 6, x)
    assert not torch.equal(eval_output(layer, x), before)
