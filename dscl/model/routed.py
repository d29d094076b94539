"""The routed low-rank layer: a frozen projection, one LoRA that trains, and a bank of frozen ones of which each row of
a batch uses its own.

    y = x Wᵀ + ((x A_bankᵀ) ∘ gate) B_bankᵀ      gate [rows, columns]: 1 in the columns of the row's adapter, else 0

Two dense products and one pointwise, whichever rows use which adapter: static shapes, no sorting, and under ZeRO-3
every rank touches every tensor. The bank has its full size from the start, so that a further adapter changes neither a
shape nor the order of a sum: what a row gets is the same to the last bit, however full the bank is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.data.batches import Span
from dscl.errors import UserError
from dscl.model.adapters import Adapter, Pair
from dscl.model.surgery import LoraConfig, draw_a, matching

Decision = Callable[[torch.Tensor], Sequence[int | None]]  # pooled [prompts, d] → each prompt's slot, None: no adapter


@dataclass
class Routing:
    """What the routed layers of one model share: the bank's slots, the gate of the present batch, the pooling."""

    capacity: int
    rank: int
    gate: torch.Tensor | None = None  # None: the bare model
    _spans: Sequence[Span] | None = None
    _pooled: torch.Tensor | None = None
    _decide: Decision | None = None

    @contextmanager
    def pooling(self, spans: Sequence[Span]) -> Iterator[Callable[[], torch.Tensor]]:
        """During a pass, pool the hidden state over these spans; afterwards the call gives [spans, d] in fp32."""
        self._spans, self._pooled = spans, None
        try:
            yield self._take
        finally:
            self._spans = None  # activation checkpointing passes here once more, when it is no longer asked for

    @contextmanager
    def answering(self, spans: Sequence[Span], decide: Decision) -> Iterator[None]:
        """The first pass decides each row's adapter when it reaches the feature layer; later passes keep to that."""
        assert [row for row, _, _ in spans] == list(range(len(spans))), "one prompt a row"
        self._spans, self._decide = spans, decide
        try:
            yield
        finally:
            self._spans = self._decide = self.gate = None

    def choose(self, slots: Sequence[int | None], like: torch.Tensor) -> None:
        """Open the gate for each row's slot."""
        gate = torch.zeros(len(slots), self.capacity, 1)
        for row, slot in enumerate(slots):
            if slot is not None:
                gate[row, slot] = 1.0
        self.gate = gate.expand(-1, -1, self.rank).flatten(1).to(device=like.device, dtype=like.dtype)

    def at_feature_layer(self, hidden: torch.Tensor) -> None:
        if self._spans is None:
            return
        if self._decide is None:
            self._pooled = pool(hidden, self._spans)
        elif self.gate is None:
            self.choose(self._decide(pool(hidden, self._spans)), hidden)

    def _take(self) -> torch.Tensor:
        assert self._pooled is not None, "no pass has come by the feature layer"
        pooled, self._pooled = self._pooled, None
        return pooled


def pool(hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """The mean over each span, in fp32. Each is summed by itself, so padding and neighbours cannot change the order."""
    if not spans:
        return hidden.new_zeros((0, hidden.shape[-1]), dtype=torch.float32)
    means = [hidden[row, start:stop].detach().mean(0, dtype=torch.float32) for row, start, stop in spans]
    return torch.stack(means)


class RoutedLinear(nn.Module):
    """In training mode the projection with the LoRA that trains; else with what the gate opens of the bank."""

    bank_a: torch.Tensor
    bank_b: torch.Tensor

    def __init__(self, base: nn.Linear, routing: Routing, like: torch.Tensor) -> None:
        super().__init__()
        self.base, self.routing = base, routing
        columns = routing.capacity * routing.rank
        self.register_buffer("bank_a", like.new_zeros(columns, base.in_features), persistent=False)
        self.register_buffer("bank_b", like.new_zeros(base.out_features, columns), persistent=False)
        self.scale, self.dropout = 0.0, 0.0

    def make_trainable(self, config: LoraConfig) -> None:
        self.lora_a = nn.Parameter(self.bank_a.new_zeros(config.rank, self.base.in_features))
        self.lora_b = nn.Parameter(self.bank_a.new_zeros(self.base.out_features, config.rank))
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        if self.training:
            dropped = functional.dropout(x, self.dropout) if self.dropout else x
            return y + functional.linear(functional.linear(dropped, self.lora_a), self.lora_b) * self.scale
        gate = self.routing.gate
        if gate is None:
            return y
        if len(gate) != len(x):  # the labels of a prompt stand side by side; or a prompt's tokens, one after the other
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


class Bank:
    """The adapters of one model by name, each in a slot of every routed layer."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.routing = routing
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
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


def add_routed(model: nn.Module, routing: Routing, feature_layer: int, targets: Iterable[str]) -> Bank:
    """Freeze the model and make the named projections routed; the routes are decided at `feature_layer`'s input."""
    model.requires_grad_(False)
    like = next(model.parameters())
    for name in targets:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, RoutedLinear(getattr(owner, last), routing, _plain(like)).train(model.training))
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        routing.at_feature_layer(args[0])

    def as_in_serving(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        for layer in layers[:feature_layer]:
            layer.eval()  # without dropout, or features would not be those of serving

    model.register_forward_pre_hook(as_in_serving)
    layers[feature_layer].register_forward_pre_hook(before)
    return Bank(model, routing)


def targets_above(model: nn.Module, layer: int, targets: Sequence[str]) -> list[str]:
    """The projections that the targets mean in the decoder layers from `layer` on."""
    return [name for name in matching(model, targets) if layer_of(name) >= layer]


def layer_of(name: str) -> int:
    """The decoder layer that a module stands in; -1 outside of them."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def first_values(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Where a LoRA that trains starts from: A drawn by name, B zero."""
    return torch.zeros(stop - start) if name.endswith("lora_b") else draw_a(seed, name, shape, start, stop)


def _plain(like: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor of the same kind; under ZeRO-3 a parameter's own is a stand-in."""
    return torch.empty(0, dtype=like.dtype, device=like.device)
