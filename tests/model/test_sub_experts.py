"""The sub-expert layer against a loop over experts and tokens; what is claimed stays, whatever comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dscl.maths.masks import unpack
from dscl.model.adapters import sub_experts as module
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.sub_experts import Experts, Shape, SubExperts, add_experts, first_values
from tests.support.sub_experts import IN, OUT, TASKS, scramble, shape_of


def layer(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> SubExperts:
    """With random values everywhere, none of them claimed."""
    torch.manual_seed(seed)
    made = SubExperts(nn.Linear(IN, OUT, dtype=dtype), shape, Routing(TASKS, 0), torch.empty(0, dtype=dtype))
    made.make_trainable()
    made.prepare(shape.experts, reuse=True)
    scramble(made, seed)
    return made


def claim(made: SubExperts, slot: int) -> dict[str, torch.Tensor]:
    return made.claim(slot, {name: getattr(made, name).detach().float() for name in made.trained})


def looped(made: SubExperts, x: torch.Tensor, tensors: dict[str, torch.Tensor], masks: list[torch.Tensor]) -> Any:
    """[.., in], token by token and expert by expert; the masks are of A's and of B's entries."""
    shape, rows = made.shape, []
    for token in x.reshape(-1, IN):
        y = functional.linear(token, made.weight, made.bias)
        gates = torch.ones(made.open, dtype=x.dtype)
        if shape.top:
            gates = (tensors["token_router"] @ token)[: made.open].softmax(0)
            chosen = gates.topk(shape.top).indices
        for e in range(made.open):
            if shape.top and e not in chosen:
                continue
            columns = slice(e * shape.rank, (e + 1) * shape.rank)
            a, b = (tensors["a"] * masks[0])[columns], (tensors["b"] * masks[1])[:, columns]
            weight = gates[e] * (shape.experts if shape.top else 1) * shape.scale
            y = y + weight * (b @ (a @ token))
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], OUT)


def as_entries(made: SubExperts, masks: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Masks of atoms count on one side, since both would count twice in gradients."""
    if made.shape.atoms:
        return [masks["atoms"][:, None].expand(-1, IN), torch.ones(OUT, made.shape.columns, dtype=torch.float64)]
    return [masks["a"], masks["b"]]


CASES = [(1, 1, 1), (2, 64, 1), (4, 3, 1), (4, 3, 2), (4, 3, 4), (8, 2, 5), (4, 3, 0)]


@pytest.mark.parametrize(("experts", "rank", "top"), CASES)
@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(("claimed", "more"), [(False, 0), (True, 0), (True, 1), (False, 2)])
def test_training_equals_the_loop_and_so_do_its_gradients(
    experts: int, rank: int, top: int, atoms: bool, share: float, claimed: bool, more: int
) -> None:
    """With masks that open all, some, and, at a share of 0, nothing; with some claimed, of which no more may be opened
    then; and with room for more sub-experts, which hold anything and count for nothing, but for one that was added."""
    shape = shape_of(atoms, experts=experts, rank=rank, top=top, share=share or 0.4, most=experts + more)
    made = layer(shape).train()
    if claimed:
        claim(made, 0)
        made.prepare(min(experts + 1, made.shape.most), reuse=more == 0)
    scramble(made, 1)
    if not share:
        for name in made.mask_shapes:
            getattr(made, f"allowed_{name}").zero_()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 5, OUT, dtype=torch.float64)
    got = made(x)
    gradients = torch.autograd.grad((got * out).sum(), [x, *(getattr(made, n) for n in made.trained)])

    free = {name: getattr(made, name).detach().clone().requires_grad_() for name in made.trained}
    taken = as_entries(made, {n: getattr(made, f"taken_{n}").double() for n in made.mask_shapes})
    if atoms:
        taken[1] = made.taken_atoms.double().expand(OUT, -1)
    tensors = {
        "a": torch.where(taken[0].bool(), made.held_a, free["sub_a"]),
        "b": torch.where(taken[1].bool(), made.held_b, free["sub_b"]),
        "token_router": free.get("token_router"),
    }
    masks = {}
    for name, count in made.counts.items():
        size, allowed = free[f"score_{name}"].abs(), getattr(made, f"allowed_{name}")
        chosen = torch.zeros(size.numel(), dtype=torch.float64)
        places = allowed.flatten().nonzero()[:, 0]
        best = size.flatten()[places].topk(min(count, len(places))).indices
        chosen[places[best]] = 1.0
        masks[name] = chosen.view(size.shape) + (size - size.detach()) * allowed  # straight through
    expected = looped(made, x, tensors, as_entries(made, masks))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * out).sum(), [x, *free.values()])
    for name, ours, theirs in zip(["x", *made.trained], gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert not gradients[1][taken[0].bool()].any()
    assert not gradients[2][taken[1].bool()].any()
    assert claimed or not share or gradients[1].any()


@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("top", [1, 2, 4, 0])
@pytest.mark.parametrize("slots", [[0, 1, 2, 0], [None, 2, None, 1], [None] * 4])
def test_answering_equals_the_loop_row_by_row(atoms: bool, top: int, slots: list[int | None]) -> None:
    made = layer(shape_of(atoms, top=top))
    kept = []
    for task in range(TASKS):
        scramble(made, task)
        kept.append(claim(made, task))
    made.eval()
    x = torch.randn(4, 5, IN, dtype=torch.float64)
    made.routing.choose(slots, x)
    expected = functional.linear(x, made.weight, made.bias)
    for row, slot in enumerate(slots):
        if slot is not None:
            masks = {n: unpack(kept[slot][f"mask_{n}"], s).double() for n, s in made.mask_shapes.items()}
            tensors = {"a": made.held_a, "b": made.held_b, "token_router": kept[slot].get("router")}
            expected[row] = looped(made, x[row], tensors, as_entries(made, masks))  # type: ignore[arg-type]
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
    repeated = x.repeat_interleave(3, 0)  # the labels of each prompt, side by side
    torch.testing.assert_close(made(repeated), expected.repeat_interleave(3, 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made(x.flatten(0, 1)), expected.flatten(0, 1), rtol=1e-12, atol=1e-12)
    if slots[0] is not None and len(set(slots)) > 1:
        made.routing.choose([slots[0]], x)  # one for all rows
        torch.testing.assert_close(made(x)[0], expected[0], rtol=1e-12, atol=1e-12)
    made.routing.rows = None
    assert torch.equal(made(x), functional.linear(x, made.weight, made.bias))


@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tasks_change_no_bit(atoms: bool, dtype: torch.dtype) -> None:
    made = layer(shape_of(atoms, experts=4, most=6), dtype).eval()
    x = torch.randn(4, 7, IN).to(dtype)
    answers = []
    for task in range(TASKS):
        made.prepare(4 + task, reuse=True)  # one more expert each time
        scramble(made, task)
        claim(made, task)
        for earlier, answer in enumerate(answers):
            made.routing.choose([earlier] * 4, x)
            assert torch.equal(made(x), answer)
        made.routing.choose([task] * 4, x)
        answers.append(made(x))
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("atoms", [True, False])
def test_the_test_of_claimed_parameters_notices_when_they_move(atoms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training does to claimed entries must not be seen, in the passes that train or after claiming."""

    def outcome() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = layer(shape_of(atoms))
        claim(made, 0)
        x = torch.randn(1, 4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        made.routing.choose([0], x)
        first, training = made.eval()(x), made.train()(x)
        with torch.no_grad():
            for side, where in zip("ab", made._sides(made._of("taken")), strict=True):
                trained = getattr(made, f"sub_{side}")
                trained += where.expand_as(trained) * 7.0
        return first, training, made.train()(x)

    _, before, after = outcome()
    assert torch.equal(before, after)
    monkeypatch.setattr(module, "frozen", lambda _taken, _held, trained: trained)
    _, before, after = outcome()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("top", [2, 0])
def test_a_fresh_layer_takes_back_what_was_claimed(atoms: bool, top: int) -> None:
    made, fresh = (layer(shape_of(atoms, most=5, top=top), torch.float32) for _ in range(2))
    for task in range(TASKS):
        made.prepare(4 + (task > 1), reuse=task != 1)
        scramble(made, task)
        fresh.take(task, {name: tensor.clone() for name, tensor in claim(made, task).items()})
    for (name, ours), (_, theirs) in zip(made.named_buffers(), fresh.named_buffers(), strict=True):
        if not name.startswith(("allowed", "open")) or name.startswith("opens"):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("atoms", [True, False])
def test_masks_keep_to_what_they_may_open(atoms: bool) -> None:
    made = layer(shape_of(atoms, experts=4, most=6, share=0.25))
    whole = 12 * (IN + OUT) if not atoms else 12
    assert sum(made.counts.values()) == whole // 4
    first = claim(made, 0)
    made.prepare(4, reuse=False)
    scramble(made, 1)
    second = claim(made, 1)
    shared = made.shared()
    assert shared[0, 0] == shared[1, 1] == whole // 4
    assert shared[0, 1] == shared[1, 0] == 0
    assert first["a"].numel() + first["b"].numel() == second["a"].numel() + second["b"].numel() == made.claimed / 2
    assert made.lacking(4) == 0
    for task in (2, 0, 1):  # slots are written over, to fill the layer
        made.prepare(4, reuse=False)
        scramble(made, 5 + task)
        claim(made, task)
    assert made.lacking(4) > 0
    assert made.lacking(5) == 0
    made.prepare(4, reuse=True)
    scramble(made, 9)
    before = made.claimed
    kept = claim(made, 0)
    assert kept["a"].numel() == 0  # all of it is claimed already
    assert made.claimed == before
    for name, each in made.mask_shapes.items():
        mask = unpack(kept[f"mask_{name}"], each)
        column = mask.movedim(0 if name == "a" else -1, 0).flatten(1).any(1) if mask.ndim > 1 else mask
        assert not column[12:].any()


def test_overlap_is_of_all_layers() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(IN, OUT, dtype=torch.float64) for name in "pq"})
    shape = shape_of(share=0.5)
    found = add_experts(model, shape, Routing(TASKS, 0), "pq")
    for each in found.layers.values():
        each.make_trainable()
    for task, name in enumerate("xyz"):
        found.prepare(reuse=name != "y")
        for number, each in enumerate(found.layers.values()):
            scramble(each, 10 * task + number)
        trained = {n: p.detach().float() for n, p in model.named_parameters() if n in found.trained()}
        found.claim(name, trained)
    shared = found.shared()
    assert torch.equal(shared.diagonal(), torch.ones(3, dtype=torch.float64))
    assert shared[0, 1] == shared[1, 0] == 0
    assert 0 < shared[0, 2] < 1
    assert found.used() == 1.0
    assert found.slot("y") == 1
    assert found.slot(None) is None
    with pytest.raises(AssertionError, match="claimed already"):
        found.claim("x", trained)


@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_no_host_waits_and_the_graph_has_no_break(atoms: bool, training: bool) -> None:
    """On tensors without values, of which nobody can ask one; and compiled as one graph."""
    made = layer(shape_of(atoms), torch.float32).train(training)
    claim(made, 0)
    x = torch.randn(3, 5, IN)
    made.routing.choose([0, None, 0], x)
    expected = made(x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    if training:
        x.requires_grad_()
        wanted, found = (gradients_of(made, passed, x) for passed in (made, compiled))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    made.to("meta")
    made.routing.choose([0, None, 0], x.to("meta"))
    assert made(x.to("meta")).shape == expected.shape


def gradients_of(made: SubExperts, passed: Any, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)  # of dropout
    return list(torch.autograd.grad(passed(x).square().sum(), [x, *(getattr(made, n) for n in made.trained)]))


SORTED = {"experts": 64, "rank": 8}  # so many columns that tokens are sorted by expert


@pytest.mark.parametrize("atoms", [True, False])
@pytest.mark.parametrize("size", [{}, SORTED])
def test_recomputed_and_repeated_passes_agree(atoms: bool, size: dict[str, int]) -> None:
    made = layer(shape_of(atoms, dropout=0.3, **size), torch.float32).train()
    assert made._sorts(torch.device("cpu"), torch.float32) == bool(size)
    claim(made, 0)
    x = torch.randn(3, 5, IN, requires_grad=True)
    plain = gradients_of(made, made, x)
    for passed in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients_of(made, passed, x), strict=True))


@pytest.mark.parametrize(("size", "top"), [({}, 2), ({}, 0), (SORTED, 2)])
@pytest.mark.parametrize("atoms", [True, False])
def test_autocast_computes_in_bf16_and_decides_in_fp32(size: dict[str, int], top: int, atoms: bool) -> None:
    made = layer(shape_of(atoms, top=top, **size), torch.float32).train()
    assert made._sorts(torch.device("cpu"), torch.bfloat16) == bool(size)
    x = torch.randn(3, 5, IN, requires_grad=True)

    def passed(cast: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = made(x)
        return y, list(torch.autograd.grad(y.float().square().sum(), [x, made.sub_a, made.sub_b]))

    (y, gradients), (expected, exact) = passed(True), passed(False)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).detach().norm() / expected.detach().norm()) < 0.02
    for found, wanted in zip(gradients, exact, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.05
    claim(made, 0)
    made.eval().routing.choose([0, None, 0], x)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.02


def test_first_values_add_nothing_and_depend_on_the_name() -> None:
    whole = torch.Size([6, 5])
    assert not first_values(0, "t:l.sub_b", whole, 0, 30).any()
    for kind in ("sub_a", "score_atoms", "token_router"):
        drawn = first_values(0, f"t:l.{kind}", whole, 0, 30)
        assert drawn.std() > 0.02
        assert not torch.equal(drawn, first_values(0, f"u:l.{kind}", whole, 0, 30))
        assert torch.equal(drawn[7:11], first_values(0, f"t:l.{kind}", whole, 7, 11))


def test_names_of_the_weights_stay() -> None:
    model = nn.ModuleDict({"p": nn.Linear(IN, OUT)})
    weight = model["p"].weight
    found = add_experts(model, shape_of(), Routing(1, 0), "p")
    assert isinstance(found, Experts)
    assert dict(model.named_parameters())["p.weight"] is weight
    assert isinstance(model["p"], nn.Linear)
