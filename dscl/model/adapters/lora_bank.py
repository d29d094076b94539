"""The routed low-rank layer: a frozen projection, one LoRA that trains, and a bank of frozen ones of which each row of
a batch uses its own.

    y = x Wᵀ + ((x A_bankᵀ) ∘ gate) B_bankᵀ      gate [rows, columns]: 1 in the columns of the row's adapter, else 0

Two dense products and one pointwise, whichever rows use which adapter: static shapes, no sorting, and under ZeRO-3
every rank touches every tensor. The bank has its full size from the start, so that a further adapter changes neither a
shape nor the order of a sum: what a row gets is the same to the last bit, however full the bank is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import LoraConfig
from dscl.model.adapters.injection import draw_a
from dscl.model.adapters.peft_files import Adapter, Pair
from dscl.model.adapters.routing import Projection, Routing, empty_like, put
from dscl.model.flops import Product, low_rank
from dscl.utils.errors import UserError


class RoutedLinear(Projection):
    """In training mode the projection with the LoRA that trains; else with what the gate opens of the bank."""

    bank_a: torch.Tensor
    bank_b: torch.Tensor

    def __init__(self, plain: nn.Linear, routing: Routing, like: torch.Tensor) -> None:
        super().__init__(plain)
        self.routing = routing
        columns = routing.capacity * routing.rank
        self.register_buffer("bank_a", like.new_zeros(columns, self.in_features), persistent=False)
        self.register_buffer("bank_b", like.new_zeros(self.out_features, columns), persistent=False)
        self.rank, self.scale, self.dropout = 0, 0.0, 0.0

    def make_trainable(self, config: LoraConfig) -> None:
        self.lora_a = nn.Parameter(self.bank_a.new_zeros(config.rank, self.in_features))
        self.lora_b = nn.Parameter(self.bank_a.new_zeros(self.out_features, config.rank))
        self.rank, self.scale, self.dropout = config.rank, config.alpha / config.rank, config.dropout

    def beside(self) -> list[list[Product]]:
        """What training computes beside the projection."""
        return [low_rank(self.in_features, self.rank, self.out_features, True)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.training:
            dropped = functional.dropout(x, self.dropout) if self.dropout else x
            return y + functional.linear(functional.linear(dropped, self.lora_a), self.lora_b) * self.scale
        if self.routing.rows is None:
            return y
        gate = self.routing.rows.columns
        if len(gate) != len(x):  # one slot for all rows; or a row's tokens stand one after the other
            assert len(x) % len(gate) == 0
            gate = gate.repeat_interleave(len(x) // len(gate), 0)
        low = functional.linear(x, self.bank_a) * (gate[:, None] if x.ndim == 3 else gate)
        return y + functional.linear(low, self.bank_b)

    @torch.no_grad()
    def fill(self, slot: int, pair: Pair | None) -> None:
        """Put an adapter's matrices into a slot; None empties it. The scale goes into B."""
        first = slot * self.routing.rank
        last = first + self.routing.rank
        self.bank_a[first:last] = 0.0
        self.bank_b[:, first:last] = 0.0
        if pair is not None:
            rank = len(pair.a)
            self.bank_a[first : first + rank] = pair.a
            self.bank_b[:, first : first + rank] = pair.b.to(self.bank_b) * pair.scale


class StackedLinear(RoutedLinear):
    """With all of the bank open, always; and in training mode with the LoRA that trains as well.

    Each training pass tells `overlap` how much the input directions of that LoRA share with those in the bank:
    Σ |A_bank Aᵀ|, while both are at hand, which under ZeRO-3 they are only here.
    """

    overlap: Callable[[torch.Tensor], None]

    def beside(self) -> list[list[Product]]:
        return [low_rank(self.in_features, len(self.bank_a), self.out_features, False), *super().beside()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(functional.linear(x, self.bank_a), self.bank_b)
        if self.training:
            self.overlap((self.bank_a.float() @ self.lora_a.float().T).abs().sum())
        return y + super().forward(x)


class Bank:
    """The adapters of one model by name, each in a slot of every routed layer."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.routing = routing
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
        self.like = empty_like(model)
        self._names: list[str | None] = [None] * routing.capacity

    @property
    def names(self) -> list[str]:
        return [name for name in self._names if name is not None]

    def slot(self, name: str | None) -> int | None:
        return None if name is None else self._names.index(name)

    def add(self, adapter: Adapter, slot: int | None = None) -> None:
        """Into the given slot, or the first that is free."""
        if None not in self._names:
            raise UserError(
                f"the bank is full: it has {len(self._names)} slots ({', '.join(self.names)}) and {adapter.name!r} "
                "needs one more; remove a task, or give more slots"
            )
        strangers = sorted(set(adapter.layers) - set(self.layers))
        assert not strangers, f"{adapter.name}: no routed layer {strangers[0]}"
        slot = self._names.index(None) if slot is None else slot
        self._names[slot] = adapter.name
        for name, layer in self.layers.items():
            layer.fill(slot, adapter.layers.get(name))

    def remove(self, name: str) -> None:
        slot = self._names.index(name)
        self._names[slot] = None
        for layer in self.layers.values():
            layer.fill(slot, None)


def add_routed(
    model: nn.Module, routing: Routing, targets: Iterable[str], kind: type[RoutedLinear] = RoutedLinear
) -> Bank:
    """Freeze the model and make the named projections routed."""
    model.requires_grad_(False)
    like = empty_like(model)
    for name in targets:
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        put(model, name, kind(plain, routing, like))
    return Bank(model, routing)


def add_stacked(
    model: nn.Module, routing: Routing, targets: Iterable[str], overlap: Callable[[torch.Tensor], None]
) -> Bank:
    """The same, with all of the bank open to all rows."""
    bank = add_routed(model, routing, targets, StackedLinear)
    for layer in bank.layers.values():
        assert isinstance(layer, StackedLinear)
        layer.overlap = overlap
    return bank


def first_values(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Where a LoRA that trains starts from: A drawn by name, B zero."""
    return torch.zeros(stop - start) if name.endswith("lora_b") else draw_a(seed, name, shape, start, stop)
