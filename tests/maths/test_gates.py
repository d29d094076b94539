"""The pointwise part of sub-experts: its kernel against the torch form, on Triton's interpreter, and built for GPUs."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dscl.maths import gates
from tests.support.gates import SIZES, check_against_reference, outputs_and_gradients, random_inputs

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")


def expert_by_expert(read: torch.Tensor, experts: int, top: int, factor: float) -> torch.Tensor:
    """The reference, token by token."""
    rank = read.shape[1] // experts - 1
    rows = []
    for row in read:
        shares = row[experts * rank :].softmax(0)
        few = shares.sort(descending=True).indices[:top].tolist()
        columns = row[: experts * rank].view(experts, rank)
        rows.append(torch.cat([columns[e] * shares[e] * (factor if e in few else 0.0) for e in range(experts)]))
    return torch.stack(rows)


@pytest.mark.parametrize("size", SIZES[:6])
def test_the_torch_form_is_what_each_expert_gives(size: tuple[int, ...]) -> None:
    tokens, experts, rank, top = size
    read, toward = random_inputs(tokens, experts, rank, torch.float64)
    found = outputs_and_gradients(gates.apply_gates, read, toward, experts, top, 1.5)
    for ours, theirs in zip(
        found, outputs_and_gradients(expert_by_expert, read, toward, experts, top, 1.5), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Any]:
    """A process in which Triton interprets: it has to know that before it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield lambda function, *given: pool.apply(function, given)


def by_the_kernel(read: torch.Tensor, toward: torch.Tensor, *sizes: Any) -> list[torch.Tensor]:
    started = []
    from dscl.maths import gates_kernel as kernel

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", "sub-experts")
        start = kernel.launch_kernel
        patch.setattr(kernel, "launch_kernel", lambda which, *given: started.append(which) or start(which, *given))
        gates._kernel_matches_reference.cache_clear()
        found = outputs_and_gradients(gates.apply_gates, read, toward, *sizes)
    assert started[-2:] == [kernel.apply_gates_kernel, kernel.apply_gates_backward_kernel]
    return found


SIZES_OF_KINDS = [
    pytest.param(
        kind, size, id=f"kind{turn}-size{row}",
        # In the fast suite fp32 has every size, and each of the other two types has every second one.
        marks=[] if turn == 0 or (row + turn) % 2 == 0 else [pytest.mark.exhaustive],
    )
    for turn, kind in enumerate((torch.float32, torch.bfloat16, torch.float16))
    for row, size in enumerate(SIZES)
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("kind", "size"), SIZES_OF_KINDS)
def test_the_kernel_equals_the_torch_form(interpreter: Any, size: tuple[int, ...], kind: torch.dtype) -> None:
    tokens, experts, rank, top = size
    read, toward = random_inputs(tokens, experts, rank, kind)
    found = interpreter(by_the_kernel, read, toward, experts, top, 1.5)
    cut = 0 if kind == torch.float32 else 1.5 * torch.finfo(kind).eps  # the interpreter does not round to nearest
    check_against_reference(found, read, toward, experts, top, 1.5, tolerance=cut)


@needs_triton
def test_of_experts_that_are_alike_it_chooses_as_many(interpreter: Any) -> None:
    read, toward = torch.ones(40, 8 * 5), torch.ones(40, 8 * 4)
    weighed, to_read = interpreter(by_the_kernel, read, toward, 8, 3, 1.0)
    assert torch.equal((weighed.view(40, 8, 4) == 1 / 8).all(2).sum(1), torch.full((40,), 3))
    assert torch.equal((weighed == 0).sum(1), torch.full((40,), 5 * 4))
    assert torch.equal(to_read[:, :32], weighed)


def wrong(read: torch.Tensor, toward: torch.Tensor, experts: int, top: int) -> tuple[list[str], torch.Tensor]:
    """With a kernel that gives zeros."""
    from dscl.maths import gates_kernel as kernel

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        patch.setattr(kernel, "launch_kernel", lambda which, read, other, *_: other.zero_())
        gates._kernel_matches_reference.cache_clear()
        for _ in range(2):
            weighed = gates.apply_gates(read, experts, top, 1.5)
        gates._kernel_matches_reference.cache_clear()
    return [str(one.message) for one in said], weighed


@needs_triton
def test_a_kernel_that_is_wrong_is_told_and_not_used(interpreter: Any) -> None:
    read, toward = random_inputs(5, 8, 8, torch.float32)
    said, weighed = interpreter(wrong, read, toward, 8, 2)
    assert said == [
        "sub-experts are computed without their Triton kernel on cpu: its results differ from those of torch"
    ]
    assert torch.equal(weighed, gates.apply_gates_reference(read, 8, 2, 1.5))


def test_it_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gates, "_has_triton", lambda: True)
    fits = functools.partial(gates.kernel_fits, num_experts=8, rank=8)
    read = torch.zeros(4, 72)
    assert fits(read)
    assert not fits(read.double())
    assert not fits(read.T)
    assert not gates.kernel_fits(read, num_experts=65, rank=64)  # more columns than a program holds
    assert not gates.kernel_fits(read, num_experts=257, rank=1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fits(read)
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not fits(read)


def recomputed(read: torch.Tensor, toward: torch.Tensor, *sizes: Any) -> list[torch.Tensor]:
    """In a layer that is computed again in the backward pass, in which the kernel is tried for the first time."""

    def layer(leaf: torch.Tensor) -> torch.Tensor:
        return gates.apply_gates(leaf * 1.0, *sizes).sin()

    gates._kernel_matches_reference.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sub-experts")
        return outputs_and_gradients(lambda leaf: checkpoint(layer, leaf, use_reentrant=False), read, toward)


@needs_triton
def test_it_can_be_tried_in_a_layer_that_is_computed_again(interpreter: Any) -> None:
    read, toward = random_inputs(5, 8, 8, torch.float32)
    found = interpreter(recomputed, read, toward, 8, 2, 1.5)
    wanted = outputs_and_gradients(lambda leaf: gates.apply_gates_reference(leaf, 8, 2, 1.5).sin(), read, toward)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


GPU_BUILDS = [
    pytest.param(
        name, kind, size, arch, id=f"{name}-{kind}-size{row}-{arch}",
        marks=[] if (row + place + turn) % 2 == 0 else [pytest.mark.exhaustive],  # each pair is in the fast half
    )
    for turn, name in enumerate(("apply_gates_kernel", "apply_gates_backward_kernel"))
    for row, (kind, size) in enumerate(
        [("bf16", (8, 8, 2)), ("fp16", (3, 5, 2)), ("fp32", (64, 64, 2)), ("bf16", (256, 16, 8))]
    )
    for place, arch in enumerate((80, 90))
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("name", "kind", "size", "arch"), GPU_BUILDS)
def test_it_can_be_built_for_gpus(name: str, arch: int, kind: str, size: tuple[int, int, int]) -> None:
    """To machine code, by the assembler that Triton brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dscl.maths import gates_kernel

    kernel, sizes = getattr(gates_kernel, name), gates_kernel.kernel_sizes(*size)
    kinds = {**dict.fromkeys(("projected", "gated", "grad_output", "grad_projected"), f"*{kind}"), "scale": "fp32"}
    signature = {a: "constexpr" if a in sizes else kinds.get(a, "i32") for a in kernel.arg_names}
    built = triton.compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", arch, 32))
    assert len(built.asm["cubin"]) > 1000
