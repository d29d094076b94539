"""The sub-expert layer: a frozen projection beside which low-rank experts run, masked for the task, gated by the token.

    y = x Wᵀ + ((x Aᵀ) ∘ gate) Bᵀ     A [columns, in], B [out, columns]: all experts' matrices side by side
    gate = scale · experts · softmax(x Rᵀ), of the `top` largest, each for the `rank` columns of its expert

Two dense products and one pointwise (`dscl.maths.gates`), whoever is chosen: static shapes, no host that waits, and
under ZeRO-3 every rank touches every tensor. Where a token uses few of very many columns, training sorts tokens by
expert instead (`dscl.maths.grouped`), with all of that still true. A column of B with its row of A is an atom. A task's
mask opens some of the atoms, and then folds into the gate, or some of the elements of A and B.

What ended tasks have claimed stands in buffers, and the forward graph takes it from there: a later task may open it
too, but no step, no weight decay and no rounding can change it, at any stage of ZeRO. What trains are the same tensors
for every task; their claimed entries are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.maths import grouped
from dscl.maths.gates import chosen, gates, weigh
from dscl.maths.masks import count_of, opened, pack, strongest, unpack
from dscl.model.adapters.injection import draw_a
from dscl.model.adapters.routing import Projection, Routing, Rows, empty_like, put
from dscl.model.flops import Product, low_rank
from dscl.model.weights import draw_normal
from dscl.utils.errors import Failure

SPREAD = 0.5  # of the scores at a task's start: what little training changes of the masks is deliberate
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the sub-experts beside each of a model's projections."""

    experts: int  # open at first
    most: int  # that there is room for
    rank: int
    top: int  # experts of a token; 0: all of them, alike, without a token router
    share: float  # of the first experts' parameters, what a task's mask opens
    scale: float
    atoms: bool  # masks are of atoms, not of elements
    dropout: float = 0.0

    @property
    def columns(self) -> int:
        return self.most * self.rank

    def masks(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The shape of each mask beside a projection [rows, columns]."""
        if self.atoms:
            return {"atoms": (self.columns,)}
        return {"a": (self.columns, columns), "b": (rows, self.columns)}


class SubExperts(Projection):
    """In training mode with the task that learns; else with the tasks that the rows are routed to."""

    held_a: torch.Tensor
    held_b: torch.Tensor
    seats: torch.Tensor
    routers: torch.Tensor

    def __init__(self, plain: nn.Linear, shape: Shape, routing: Routing, like: torch.Tensor) -> None:
        super().__init__(plain)
        self.shape, self.routing = shape, routing
        tasks, size = routing.capacity, shape.columns
        self._keep("held_a", like.new_zeros(size, self.in_features))  # what is claimed; zero elsewhere
        self._keep("held_b", like.new_zeros(self.out_features, size))
        self.open = shape.experts  # experts, now: the first so many; training computes no others
        self._keep("seats", torch.ones(tasks, shape.most, dtype=torch.bool, device=like.device))  # for each task
        self._keep("routers", like.new_zeros(tasks, shape.most if shape.top else 0, self.in_features))
        self.mask_shapes = shape.masks(self.out_features, self.in_features)
        first = shape.experts * shape.rank
        self.first = {name: math.prod(s) // size * first for name, s in self.mask_shapes.items()}
        self.counts = {name: count_of(shape.share, whole) for name, whole in self.first.items()}
        for name, each in self.mask_shapes.items():
            self._keep(f"opens_{name}", torch.zeros(tasks, *each, dtype=torch.bool, device=like.device))
            self._keep(f"taken_{name}", torch.zeros(each, dtype=torch.bool, device=like.device))
            self._keep(f"allowed_{name}", torch.zeros(each, dtype=torch.bool, device=like.device))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _of(self, kind: str) -> Tensors:
        """`opens`, `taken`, `allowed` or `score`, by the mask's name."""
        return {name: getattr(self, f"{kind}_{name}") for name in self.mask_shapes}

    def _sides(self, masks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks as they apply to A and to B."""
        return (masks["atoms"][:, None], masks["atoms"]) if self.shape.atoms else (masks["a"], masks["b"])

    def make_trainable(self) -> None:
        """Add the tensors that train; `first_values` gives what a task starts from."""
        self.sub_a, self.sub_b = (nn.Parameter(torch.zeros_like(held)) for held in (self.held_a, self.held_b))
        for name, each in self.mask_shapes.items():
            self.register_parameter(f"score_{name}", nn.Parameter(self.held_a.new_zeros(each)))
        if self.shape.top:
            self.token_router = nn.Parameter(self.held_a.new_zeros(self.shape.most, self.in_features))

    @property
    def trained(self) -> list[str]:
        """The names of these tensors."""
        scores = [f"score_{name}" for name in self.mask_shapes]
        return ["sub_a", "sub_b", *scores, *(["token_router"] if self.shape.top else [])]

    def beside(self) -> list[list[Product]]:
        """What training computes beside the projection; how many columns, a grouped product decides by the tokens."""
        shape, like = self.shape, self.held_a
        experts = shape.top if self._sorts(like.device, like.dtype) else self.open
        router = [[Product(self.in_features, self.open, True)]] if shape.top else []
        return [*router, low_rank(self.in_features, experts * shape.rank, self.out_features, True)]

    def _sorts(self, device: torch.device, kind: torch.dtype) -> bool:
        """Whether tokens go to the columns of their own experts alone."""
        shape, widths = self.shape, (self.in_features, self.out_features)
        return grouped.pays(device, kind, self.open, shape.rank, shape.top, *widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self._learn(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        y, rows = super().forward(x), self.routing.rows
        if rows is None:
            return y
        return y + self._answer(x.reshape(len(rows.slots), -1, self.in_features), rows, y.dtype).reshape(y.shape)

    def _learn(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in], all of the task that learns."""
        shape, (a, b) = self.shape, self._sides_that_learn()
        where = x.device.type
        cast = where in ("cpu", "cuda") and torch.is_autocast_enabled(where)
        sort = self._sorts(x.device, torch.get_autocast_dtype(where) if cast else x.dtype)
        at_once = a[:0] if shape.dropout or sort else a  # what reads x as it is: one product, and so is its gradient
        router = self.token_router[: self.open] if shape.top else a[:0]
        y, read = _Beside.apply(x, self.weight, self.bias, torch.cat([at_once, router]))
        dropped = functional.dropout(x, shape.dropout) if shape.dropout else x
        if sort:
            return y.add_(self._sorted(dropped.to(y.dtype), a.to(y.dtype), b.to(y.dtype), read))
        if shape.dropout:
            low = functional.linear(dropped, a)
            read = torch.cat([low, read], 1) if shape.top else low
        low = weigh(read, self.open, shape.top, self._factor) if shape.top else read * shape.scale
        return y.addmm_(low.to(y.dtype), b.to(y.dtype))

    def _sorted(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What is added, where so many columns stand side by side that tokens better go to those of their experts."""
        a, b = (side.unflatten(0, (self.open, self.shape.rank)) for side in (a, b))
        shares, few = chosen(logits, self.shape.top)
        return grouped.mixed(x, a, b, few, (shares.gather(-1, few) * self._factor).to(x.dtype))

    @property
    def _factor(self) -> float:
        """Of a gate: an expert with as large a share as all others gives `scale` times what it has."""
        return self.shape.experts * self.shape.scale

    def _sides_that_learn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and Bᵀ of the open experts, as the task's masks open them; what they open of atoms counts in B, once."""
        scores, allowed, taken = (
            {name: self._now(name, of) for name, of in self._of(kind).items()} for kind in ("score", "allowed", "taken")
        )
        masks = {name: strongest(scores[name], allowed[name], count) for name, count in self.counts.items()}
        taken_a, taken_b = self._sides(taken)
        a = frozen(taken_a, self._now("a", self.held_a), self._now("a", self.sub_a))
        b = frozen(taken_b, self._now("b", self.held_b), self._now("b", self.sub_b))
        a, b = (a, b * masks["atoms"]) if self.shape.atoms else (a * masks["a"], b * masks["b"])
        return a, b.T.contiguous()  # the gradient of Bᵀ is the faster product

    def _now(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """Of A or B, of a mask of theirs, or of what is as large: the part of the open experts."""
        size = self.open * self.shape.rank
        return mask[:, :size] if name == "b" else mask[:size]

    def _answer(self, x: torch.Tensor, rows: Rows, kind: torch.dtype) -> torch.Tensor:
        """What is added for [rows, tokens, in], each row of its own task."""
        seats = self.seats[rows.index][:, None]
        if self.shape.top:
            gate = gates(x @ self.routers[rows.index].transpose(1, 2), self.shape.top, self._factor, seats)
        else:
            gate = seats.to(self.held_a.dtype) * self.shape.scale
        gate = gate[..., None].expand(*gate.shape, self.shape.rank).flatten(-2)
        if self.shape.atoms:
            columns = self._of("opens")["atoms"][rows.index].to(gate) * rows.present[:, None]
            return _low_rank(x, self.held_a, self.held_b, gate * columns[:, None])
        added = x.new_zeros(*x.shape[:2], self.out_features, dtype=kind)
        gate = gate.expand(*x.shape[:2], -1)
        for slot, mine in rows.by_slot.items():
            opens = {name: masks[slot] for name, masks in self._of("opens").items()}
            a, b = self.held_a * opens["a"], self.held_b * opens["b"]
            added.index_copy_(0, mine, _low_rank(x[mine], a, b, gate[mine]).to(kind))
        return added

    # ---- claiming

    def prepare(self, experts: int, reuse: bool) -> None:
        """What the next task's mask may open: of the first so many experts, without `reuse` only what is unclaimed."""
        self.open = experts
        column = torch.arange(self.shape.columns, device=self.held_a.device) < experts * self.shape.rank
        for name, taken in self._of("taken").items():
            within = column[:, None] if name == "a" else column
            getattr(self, f"allowed_{name}").copy_(within & (~taken | reuse))

    def lacking(self, experts: int) -> int:
        """How many of the first so many experts' parameters are unclaimed, short of what a mask opens; 0 if enough."""
        short = 0
        for name, taken in self._of("taken").items():
            whole = self.first[name] // self.shape.experts * experts
            short = max(short, self.counts[name] - (whole - int(taken.sum())))
        return short

    @torch.no_grad()
    def claim(self, slot: int, trained: Tensors) -> Tensors:
        """A task has ended: what its mask opens is claimed. Returns all that `take` needs to know of it."""
        kind, allowed = self.held_a.dtype, self._of("allowed")
        masks = {name: torch.zeros_like(where) for name, where in allowed.items()}
        if not all(bool(tensor.to(kind).isfinite().all()) for tensor in trained.values()):
            raise Failure("a sub-expert's values are not finite, so nothing is claimed; lower train.lr and run again")
        for name, count in self.counts.items():  # of the same part as in training: of scores alike the same are taken
            scores = self._now(name, trained[f"score_{name}"].to(kind))
            self._now(name, masks[name]).copy_(opened(scores, self._now(name, allowed[name]), count))
        new = self._hold(slot, masks)
        kept = {f"mask_{name}": pack(mask) for name, mask in masks.items()}
        kept |= {side: trained[f"sub_{side}"].to(kind)[where] for side, where in zip("ab", new, strict=True)}
        kept["open"] = torch.arange(self.shape.most, device=self.held_a.device) < self.open
        if self.shape.top:
            kept["router"] = trained["token_router"].to(kind)[: self.open]
        self._settle(slot, new, kept)
        return kept

    @torch.no_grad()
    def take(self, slot: int, kept: Tensors) -> None:
        """Take back what `claim` gave, in the order in which the tasks ended."""
        shapes, device = self.mask_shapes, self.held_a.device
        masks = {name: unpack(kept[f"mask_{name}"], shape).to(device) for name, shape in shapes.items()}
        self._settle(slot, self._hold(slot, masks), kept)

    def unclaimed(self, masks: Tensors) -> tuple[int, int]:
        """How many parameters of A and of B these masks open that nobody has claimed."""
        a, b = self._sides({name: mask & ~getattr(self, f"taken_{name}") for name, mask in masks.items()})
        return int(a.expand_as(self.held_a).sum()), int(b.expand_as(self.held_b).sum())

    def _hold(self, slot: int, masks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the masks the task's own; returns where in A and B they open what was unclaimed."""
        before = {name: taken.clone() for name, taken in self._of("taken").items()}
        for name, mask in masks.items():
            getattr(self, f"opens_{name}")[slot] = mask
            getattr(self, f"taken_{name}").logical_or_(mask)
        new = self._sides({name: mask & ~before[name] for name, mask in masks.items()})
        return new[0].expand_as(self.held_a), new[1].expand_as(self.held_b)

    def _settle(self, slot: int, new: tuple[torch.Tensor, torch.Tensor], kept: Tensors) -> None:
        for held, where, side in zip((self.held_a, self.held_b), new, "ab", strict=True):
            held[where] = kept[side].to(held)
        self.seats[slot] = kept["open"].to(self.seats)
        if self.shape.top:
            self.routers[slot, : len(kept["router"])] = kept["router"].to(self.routers)

    @property
    def claimed(self) -> int:
        """Parameters of A and B that are claimed."""
        a, b = self._sides(self._of("taken"))
        return int(a.expand_as(self.held_a).sum()) + int(b.expand_as(self.held_b).sum())

    def shared(self) -> torch.Tensor:
        """[tasks, tasks]: how much of what one task opens the other opens too."""
        rows = [masks.flatten(1).float() for masks in self._of("opens").values()]
        return torch.stack([each @ each.T for each in rows]).double().sum(0)


def frozen(taken: torch.Tensor, held: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """What is claimed as it is held, without a gradient; the rest as it trains."""
    return torch.where(taken, held, trained)


class _Beside(torch.autograd.Function):
    """A projection, and another product of the same input; the two gradients to it are added up in place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight, other)
        return functional.linear(x, weight, bias), functional.linear(x, other)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, read = gradients
        x, weight, other = (saved.to(y.dtype) for saved in ctx.saved_tensors)  # autocast may have cast them on the way
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            (y @ weight).addmm_(read, other) if to_x else None,
            y.T @ x if to_weight else None,
            y.sum(0) if to_bias else None,
            read.T @ x,
        )


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return functional.linear(functional.linear(x, a) * gate, b)


class Experts:
    """The sub-experts of one model, and the tasks that have claimed some of them."""

    def __init__(self, model: nn.Module, shape: Shape, routing: Routing) -> None:
        self.shape, self.routing = shape, routing
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, SubExperts)}
        self.count = shape.experts  # open now
        self.names: list[str] = []  # of the tasks that have ended, each in the slot of its place

    def lacking(self) -> int:
        """The most that any layer is short of unclaimed parameters for a mask."""
        return max(layer.lacking(self.count) for layer in self.layers.values())

    def prepare(self, reuse: bool) -> None:
        for layer in self.layers.values():
            layer.prepare(self.count, reuse)

    def trained(self) -> list[str]:
        """The names of the tensors that train."""
        return [f"{path}.{own}" for path, layer in self.layers.items() for own in layer.trained]

    def claim(self, name: str, trained: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
        """What a task leaves, by layer; `trained` by the tensors' full names."""
        slot = self._seat(name)
        return {
            path: layer.claim(slot, {own: trained[f"{path}.{own}"] for own in layer.trained})
            for path, layer in self.layers.items()
        }

    def take(self, name: str, kept: Mapping[str, Tensors]) -> None:
        slot = self._seat(name)
        for path, layer in self.layers.items():
            layer.take(slot, kept[path])
            self.count = int(layer.seats[slot].sum())

    def _seat(self, name: str) -> int:
        assert name not in self.names, f"{name} has claimed already"
        self.names.append(name)
        return len(self.names) - 1

    def slot(self, name: str | None) -> int | None:
        return None if name is None else self.names.index(name)

    def shared(self) -> torch.Tensor:
        """[tasks, tasks]: the share of what the one opens that the other opens too, in all layers."""
        known = len(self.names)
        counts = torch.stack([layer.shared().cpu() for layer in self.layers.values()]).sum(0)[:known, :known]
        return counts / counts.diagonal()[:, None].clamp_min(1)

    def used(self) -> float:
        """The share of the first experts' parameters that is claimed; above 1 where experts were added."""
        whole = sum(
            self.shape.experts * self.shape.rank * (m.in_features + m.out_features) for m in self.layers.values()
        )
        return sum(layer.claimed for layer in self.layers.values()) / whole


def add_experts(model: nn.Module, shape: Shape, routing: Routing, targets: Iterable[str]) -> Experts:
    """Put sub-experts beside the named projections of a frozen model."""
    like = empty_like(model)
    for name in targets:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        put(model, name, SubExperts(plain, shape, routing, like))
    return Experts(model, shape, routing)


def first_values(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """What a task starts from: nothing is added yet, and chance decides which parameters its masks open."""
    kind = name.rpartition(".")[2]
    if kind == "sub_b":
        return torch.zeros(stop - start)
    if kind.startswith("score_"):
        return draw_normal(seed, name, start, stop, SPREAD)
    return draw_a(seed, name, shape, start, stop)
