"""The sub-expert layer against a loop over experts and tokens; frozen parameters stay bitwise equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dscl.maths.masks import unpack_bits
from dscl.model.adapters import sub_experts as module
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.sub_expert_bank import SubExpertBank, initial_expert_values, inject_sub_experts
from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape
from tests.support.sub_experts import IN, OUT, TASKS, make_shape, randomize_parameters


def make_layer(shape: SubExpertShape, dtype: torch.dtype = torch.float64, seed: int = 0) -> SubExpertLinear:
    """A layer with random values; no parameters are frozen."""
    torch.manual_seed(seed)
    layer = SubExpertLinear(nn.Linear(IN, OUT, dtype=dtype), shape, Routing(TASKS, 0), torch.empty(0, dtype=dtype))
    layer.make_trainable()
    layer.set_allowed_masks(shape.num_experts, reuse=True)
    randomize_parameters(layer, seed)
    return layer


def freeze_task(layer: SubExpertLinear, slot: int) -> dict[str, torch.Tensor]:
    return layer.freeze_task_params(
        slot, {name: getattr(layer, name).detach().float() for name in layer.trainable_names}
    )


def loop_output(
    layer: SubExpertLinear, x: torch.Tensor, tensors: dict[str, torch.Tensor], masks: list[torch.Tensor]
) -> Any:
    """The output for x [.., in], token by token and expert by expert; `masks`: element masks of A and B."""
    shape, rows = layer.shape, []
    for token in x.reshape(-1, IN):
        y = functional.linear(token, layer.weight, layer.bias)
        gates = torch.ones(layer.num_used_experts, dtype=x.dtype)
        if shape.top_k:
            gates = (tensors["token_router"] @ token)[: layer.num_used_experts].softmax(0)
            chosen = gates.topk(shape.top_k).indices
        for e in range(layer.num_used_experts):
            if shape.top_k and e not in chosen:
                continue
            columns = slice(e * shape.rank, (e + 1) * shape.rank)
            a, b = (tensors["a"] * masks[0])[columns], (tensors["b"] * masks[1])[:, columns]
            weight = gates[e] * (shape.num_experts if shape.top_k else 1) * shape.scale
            y = y + weight * (b @ (a @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], OUT)


def element_masks(layer: SubExpertLinear, masks: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Element masks of A and B. A rank-1 mask is applied to A only; on both sides its gradient would count twice."""
    if layer.shape.rank1:
        return [masks["rank1"][:, None].expand(-1, IN), torch.ones(OUT, layer.shape.columns, dtype=torch.float64)]
    return [masks["a"], masks["b"]]


CASES = [(1, 1, 1), (2, 64, 1), (4, 3, 1), (4, 3, 2), (4, 3, 4), (8, 2, 5), (4, 3, 0)]


@pytest.mark.parametrize(("experts", "rank", "top"), CASES)
@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(("with_frozen", "more"), [(False, 0), (True, 0), (True, 1), (False, 2)])
def test_training_output_and_gradients_equal_a_loop(
    experts: int, rank: int, top: int, rank1: bool, share: float, with_frozen: bool, more: int
) -> None:
    """With masks of all, some and (at share 0) no parameters; with frozen parameters, which new masks may exclude; and
    with room for more sub-experts, whose values must not matter, except those of one that was added."""
    shape = make_shape(
        rank1, num_experts=experts, rank=rank, top_k=top, mask_density=share or 0.4, max_experts=experts + more
    )
    layer = make_layer(shape).train()
    if with_frozen:
        freeze_task(layer, 0)
        layer.set_allowed_masks(min(experts + 1, layer.shape.max_experts), reuse=more == 0)
    randomize_parameters(layer, 1)
    if not share:
        for name in layer.mask_shapes:
            getattr(layer, f"allowed_{name}").zero_()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 5, OUT, dtype=torch.float64)
    output = layer(x)
    gradients = torch.autograd.grad((output * out).sum(), [x, *(getattr(layer, n) for n in layer.trainable_names)])

    free = {name: getattr(layer, name).detach().clone().requires_grad_() for name in layer.trainable_names}
    frozen_masks = element_masks(layer, {n: getattr(layer, f"frozen_mask_{n}").double() for n in layer.mask_shapes})
    if rank1:
        frozen_masks[1] = layer.frozen_mask_rank1.double().expand(OUT, -1)
    tensors = {
        "a": torch.where(frozen_masks[0].bool(), layer.frozen_a, free["sub_a"]),
        "b": torch.where(frozen_masks[1].bool(), layer.frozen_b, free["sub_b"]),
        "token_router": free.get("token_router"),
    }
    masks = {}
    for name, count in layer.mask_counts.items():
        size, allowed = free[f"score_{name}"].abs(), getattr(layer, f"allowed_{name}")
        chosen = torch.zeros(size.numel(), dtype=torch.float64)
        allowed_indices = allowed.flatten().nonzero()[:, 0]
        top_indices = size.flatten()[allowed_indices].topk(min(count, len(allowed_indices))).indices
        chosen[allowed_indices[top_indices]] = 1.0
        masks[name] = chosen.view(size.shape) + (size - size.detach()) * allowed  # straight through
    expected = loop_output(layer, x, tensors, element_masks(layer, masks))  # type: ignore[arg-type]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = torch.autograd.grad((expected * out).sum(), [x, *free.values()])
    for name, ours, theirs in zip(["x", *layer.trainable_names], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert not gradients[1][frozen_masks[0].bool()].any()
    assert not gradients[2][frozen_masks[1].bool()].any()
    assert with_frozen or not share or gradients[1].any()


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("top", [1, 2, 4, 0])
@pytest.mark.parametrize("slots", [[0, 1, 2, 0], [None, 2, None, 1], [None] * 4])
def test_inference_equals_a_loop_over_rows(rank1: bool, top: int, slots: list[int | None]) -> None:
    layer = make_layer(make_shape(rank1, top_k=top))
    task_tensors = []
    for task in range(TASKS):
        randomize_parameters(layer, task)
        task_tensors.append(freeze_task(layer, task))
    layer.eval()
    x = torch.randn(4, 5, IN, dtype=torch.float64)
    layer.routing.assign_slots(slots, x)
    expected = functional.linear(x, layer.weight, layer.bias)
    for row, slot in enumerate(slots):
        if slot is not None:
            masks = {n: unpack_bits(task_tensors[slot][f"mask_{n}"], s).double() for n, s in layer.mask_shapes.items()}
            tensors = {"a": layer.frozen_a, "b": layer.frozen_b, "token_router": task_tensors[slot].get("router")}
            expected[row] = loop_output(layer, x[row], tensors, element_masks(layer, masks))  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    repeated = x.repeat_interleave(3, 0)  # the labels of each prompt, side by side
    torch.testing.assert_close(layer(repeated), expected.repeat_interleave(3, 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-12, atol=1e-12)
    if slots[0] is not None and len(set(slots)) > 1:
        layer.routing.assign_slots([slots[0]], x)  # one for all rows
        torch.testing.assert_close(layer(x)[0], expected[0], rtol=1e-12, atol=1e-12)
    layer.routing.assignment = None
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tasks_leave_earlier_outputs_bitwise_equal(rank1: bool, dtype: torch.dtype) -> None:
    layer = make_layer(make_shape(rank1, num_experts=4, max_experts=6), dtype).eval()
    x = torch.randn(4, 7, IN).to(dtype)
    answers = []
    for task in range(TASKS):
        layer.set_allowed_masks(4 + task, reuse=True)  # one more expert each time
        randomize_parameters(layer, task)
        freeze_task(layer, task)
        for earlier, answer in enumerate(answers):
            layer.routing.assign_slots([earlier] * 4, x)
            assert torch.equal(layer(x), answer)
        layer.routing.assign_slots([task] * 4, x)
        answers.append(layer(x))
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("rank1", [True, False])
def test_training_ignores_trained_values_of_frozen_params(rank1: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of the trained values of frozen parameters must not show in training passes or after freezing."""

    def outcome() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = make_layer(make_shape(rank1))
        freeze_task(layer, 0)
        x = torch.randn(1, 4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        layer.routing.assign_slots([0], x)
        first, training = layer.eval()(x), layer.train()(x)
        with torch.no_grad():
            for side, where in zip("ab", layer._side_masks(layer._tensors_by_mask("frozen_mask")), strict=True):
                trained = getattr(layer, f"sub_{side}")
                trained += where.expand_as(trained) * 7.0
        return first, training, layer.train()(x)

    _, before, after = outcome()
    assert torch.equal(before, after)
    monkeypatch.setattr(module, "merge_frozen_params", lambda _mask, _frozen, trained: trained)
    _, before, after = outcome()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("top", [2, 0])
def test_load_task_params_restores_all_buffers(rank1: bool, top: int) -> None:
    layer, fresh = (make_layer(make_shape(rank1, max_experts=5, top_k=top), torch.float32) for _ in range(2))
    for task in range(TASKS):
        layer.set_allowed_masks(4 + (task > 1), reuse=task != 1)
        randomize_parameters(layer, task)
        fresh.load_task_params(task, {name: tensor.clone() for name, tensor in freeze_task(layer, task).items()})
    for (name, ours), (_, theirs) in zip(layer.named_buffers(), fresh.named_buffers(), strict=True):
        if not name.startswith("allowed"):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("rank1", [True, False])
def test_masks_select_only_allowed_params(rank1: bool) -> None:
    layer = make_layer(make_shape(rank1, num_experts=4, max_experts=6, mask_density=0.25))
    whole = 12 * (IN + OUT) if not rank1 else 12
    assert sum(layer.mask_counts.values()) == whole // 4
    first = freeze_task(layer, 0)
    layer.set_allowed_masks(4, reuse=False)
    randomize_parameters(layer, 1)
    second = freeze_task(layer, 1)
    shared = layer.mask_overlap()
    assert shared[0, 0] == shared[1, 1] == whole // 4
    assert shared[0, 1] == shared[1, 0] == 0
    assert (
        first["a"].numel() + first["b"].numel()
        == second["a"].numel() + second["b"].numel()
        == layer.num_frozen_params / 2
    )
    assert layer.count_missing_params(4) == 0
    for task in (2, 0, 1):  # slots are written over, to fill the layer
        layer.set_allowed_masks(4, reuse=False)
        randomize_parameters(layer, 5 + task)
        freeze_task(layer, task)
    assert layer.count_missing_params(4) > 0
    assert layer.count_missing_params(5) == 0
    layer.set_allowed_masks(4, reuse=True)
    randomize_parameters(layer, 9)
    before = layer.num_frozen_params
    task_tensors = freeze_task(layer, 0)
    assert task_tensors["a"].numel() == 0  # all of its parameters are frozen already
    assert layer.num_frozen_params == before
    for name, each in layer.mask_shapes.items():
        mask = unpack_bits(task_tensors[f"mask_{name}"], each)
        column = mask.movedim(0 if name == "a" else -1, 0).flatten(1).any(1) if mask.ndim > 1 else mask
        assert not column[12:].any()


def test_mask_overlap_sums_all_layers() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(IN, OUT, dtype=torch.float64) for name in "pq"})
    shape = make_shape(mask_density=0.5)
    bank = inject_sub_experts(model, shape, Routing(TASKS, 0), "pq")
    for each in bank.layers.values():
        each.make_trainable()
    for task, name in enumerate("xyz"):
        bank.set_allowed_masks(reuse=name != "y")
        for number, each in enumerate(bank.layers.values()):
            randomize_parameters(each, 10 * task + number)
        trained = {n: p.detach().float() for n, p in model.named_parameters() if n in bank.trainable_names()}
        bank.freeze_task_params(name, trained)
    shared = bank.mask_overlap()
    assert torch.equal(shared.diagonal(), torch.ones(3, dtype=torch.float64))
    assert shared[0, 1] == shared[1, 0] == 0
    assert 0 < shared[0, 2] < 1
    assert bank.frozen_share() == 1.0
    assert bank.get_slot("y") == 1
    assert bank.get_slot(None) is None
    with pytest.raises(AssertionError, match="ended already"):
        bank.freeze_task_params("x", trained)


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_layer_needs_no_host_sync_and_compiles_as_one_graph(rank1: bool, training: bool) -> None:
    """The layer runs on meta tensors, whose values cannot be read, and compiles as one graph."""
    layer = make_layer(make_shape(rank1), torch.float32).train(training)
    freeze_task(layer, 0)
    x = torch.randn(3, 5, IN)
    layer.routing.assign_slots([0, None, 0], x)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    if training:
        x.requires_grad_()
        expected_gradients, bank = (compute_gradients(layer, forward, x) for forward in (layer, compiled))
        for ours, theirs in zip(bank, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    layer.to("meta")
    layer.routing.assign_slots([0, None, 0], x.to("meta"))
    assert layer(x.to("meta")).shape == expected.shape


def compute_gradients(layer: SubExpertLinear, forward: Any, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)  # seed of dropout
    return list(
        torch.autograd.grad(forward(x).square().sum(), [x, *(getattr(layer, n) for n in layer.trainable_names)])
    )


SORTED = {"num_experts": 64, "rank": 8}  # enough columns for sorting tokens by expert


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("size", [{}, SORTED])
def test_recomputed_and_repeated_passes_are_equal(rank1: bool, size: dict[str, int]) -> None:
    layer = make_layer(make_shape(rank1, dropout=0.3, **size), torch.float32).train()
    assert layer._uses_grouped_mm(torch.device("cpu"), torch.float32) == bool(size)
    freeze_task(layer, 0)
    x = torch.randn(3, 5, IN, requires_grad=True)
    plain = compute_gradients(layer, layer, x)
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(plain, compute_gradients(layer, forward, x), strict=True))


@pytest.mark.parametrize(("size", "top"), [({}, 2), ({}, 0), (SORTED, 2)])
@pytest.mark.parametrize("rank1", [True, False])
def test_autocast_computes_in_bf16_and_selects_in_fp32(size: dict[str, int], top: int, rank1: bool) -> None:
    layer = make_layer(make_shape(rank1, top_k=top, **size), torch.float32).train()
    assert layer._uses_grouped_mm(torch.device("cpu"), torch.bfloat16) == bool(size)
    x = torch.randn(3, 5, IN, requires_grad=True)

    def forward(cast: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = layer(x)
        return y, list(torch.autograd.grad(y.float().square().sum(), [x, layer.sub_a, layer.sub_b]))

    (y, gradients), (expected, exact) = forward(True), forward(False)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).detach().norm() / expected.detach().norm()) < 0.02
    for bank, expected_gradients in zip(gradients, exact, strict=True):
        assert float((bank - expected_gradients).norm() / expected_gradients.norm()) < 0.05
    freeze_task(layer, 0)
    layer.eval().routing.assign_slots([0, None, 0], x)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02


def test_initial_expert_values_add_nothing_and_depend_on_the_name() -> None:
    whole = torch.Size([6, 5])
    assert not initial_expert_values(0, "t:l.sub_b", whole, 0, 30).any()
    for kind in ("sub_a", "score_rank1", "token_router"):
        drawn = initial_expert_values(0, f"t:l.{kind}", whole, 0, 30)
        assert drawn.std() > 0.02
        assert not torch.equal(drawn, initial_expert_values(0, f"u:l.{kind}", whole, 0, 30))
        assert torch.equal(drawn[7:11], initial_expert_values(0, f"t:l.{kind}", whole, 7, 11))


def test_injection_keeps_weight_names() -> None:
    model = nn.ModuleDict({"p": nn.Linear(IN, OUT)})
    weight = model["p"].weight
    bank = inject_sub_experts(model, make_shape(), Routing(1, 0), "p")
    assert isinstance(bank, SubExpertBank)
    assert dict(model.named_parameters())["p.weight"] is weight
    assert isinstance(model["p"], nn.Linear)
