"""The sub-expert layer on a GPU: no host waits, every pass gives the same bits, and bf16 comes close to the CPU's fp32.
Skipped where there is no GPU."""

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
    """Within, a host that waits for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layer(rank1: bool, dtype: torch.dtype, device: str, top: int = 2, dropout: float = 0.0) -> SubExpertLinear:
    """Two tasks have frozen what their masks select, and a third one learns. The same values on every device."""
    torch.manual_seed(0)
    shape = SubExpertShape(**{**vars(SHAPE), "rank1": rank1, "top_k": top, "dropout": dropout})
    made = SubExpertLinear(nn.Linear(IN, OUT), shape, Routing(TASKS, 0), torch.empty(0))
    made.make_trainable()
    for task in range(TASKS):
        made.set_allowed_masks(shape.num_experts + task, reuse=True)
        with torch.no_grad():
            for name in made.trainable_names:
                parameter = getattr(made, name)
                parameter.copy_((torch.randn(parameter.shape) / 16).bfloat16())
            for (
                name,
                count,
            ) in made.mask_counts.items():  # so many are far from zero, so that a mask is the same in bf16
                part = made._used_part(name, getattr(made, f"score_{name}"))
                far = (torch.randperm(part.numel()) < count).view(part.shape)
                part[far] = (part[far].sign() + part[far]).bfloat16().float()
        if task < TASKS - 1:
            made.freeze_task_params(task, {name: getattr(made, name).detach() for name in made.trainable_names})
    return made.to(device, dtype)


def inputs(dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(6, 33, IN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def learning(made: SubExpertLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """What comes out, and all gradients."""
    made.train()
    x = x.clone().requires_grad_()
    y = made(x)
    return [
        y.detach(),
        *torch.autograd.grad(y.float().square().mean(), [x, *(getattr(made, n) for n in made.trainable_names)]),
    ]


@torch.no_grad()
def answering(made: SubExpertLinear, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = made.eval()(x)
    return answer


def choose(made: SubExpertLinear, x: torch.Tensor) -> None:
    """Rows of both tasks and of none. Where rows go is told once a batch, from the host; no layer tells it again."""
    made.routing.assign_slots([0, 1, None, 1, 0, 0], x)
    rows = made.routing.assignment
    assert rows is not None
    for told in (rows.slot_indices, rows.has_slot, *rows.rows_by_slot.values()):
        assert told.is_cuda == x.is_cuda


@KINDS
@pytest.mark.parametrize("top", [1, 2, 0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_host_waits(rank1: bool, top: int, dropout: float) -> None:
    made, x = layer(rank1, torch.bfloat16, "cuda", top, dropout), inputs(torch.bfloat16, "cuda")
    choose(made, x)
    learning(made, x)  # libraries start up in the first pass, and wait
    answering(made, x)
    with no_waiting():
        learning(made, x)
        answering(made, x)


def test_a_host_that_waits_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(True, torch.bfloat16, "cuda"), inputs(torch.bfloat16, "cuda")
    learning(made, x)
    weigh = sub_experts.apply_gates

    def waiting(read: torch.Tensor, *sizes: Any) -> torch.Tensor:
        weighed = weigh(read, *sizes)
        return weighed if bool(weighed.any()) else weighed * 0

    monkeypatch.setattr(sub_experts, "apply_gates", waiting)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        learning(made, x)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_gives_the_same_bits(rank1: bool, dtype: torch.dtype) -> None:
    made, x = layer(rank1, dtype, "cuda"), inputs(dtype, "cuda")
    choose(made, x)
    first, answer = learning(made, x), answering(made, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(learning(made, x), first, strict=True))
        assert torch.equal(answering(made, x), answer)


@KINDS
@pytest.mark.parametrize("top", [2, 0])
def test_bf16_comes_close_to_the_cpu_in_fp32(rank1: bool, top: int) -> None:
    """A router may send a token elsewhere by a rounding, so a few rows may differ; as a whole they may not."""
    exact, made = layer(rank1, torch.float32, "cpu", top), layer(rank1, torch.bfloat16, "cuda", top)
    x = inputs(torch.bfloat16, "cpu")
    choose(exact, x.float())
    choose(made, x.cuda())
    pairs = [
        *zip(learning(exact, x.float()), learning(made, x.cuda()), strict=True),
        (answering(exact, x.float()), answering(made, x.cuda())),
    ]
    for index, (wanted, got) in enumerate(pairs):
        off = (got.float().cpu() - wanted).norm() / wanted.norm()
        assert off < 0.1, index
    for name, mask in made._tensors_by_mask("frozen_mask").items():
        assert torch.equal(mask.cpu(), getattr(exact, f"frozen_mask_{name}"))


@KINDS
def test_a_later_task_changes_no_bit(rank1: bool) -> None:
    made, x = layer(rank1, torch.bfloat16, "cuda"), inputs(torch.bfloat16, "cuda")
    choose(made, x)
    before = answering(made, x)
    made.freeze_task_params(2, {name: getattr(made, name).detach().float() for name in made.trainable_names})
    assert torch.equal(answering(made, x), before)
    made.routing.assign_slots([2] * 6, x)
    assert not torch.equal(answering(made, x), before)
