"""Which row of a batch uses what: decided by the caller, or on the way, when a pass comes by the feature layer.

What the routed projections of one model share. A row's choice is a slot: an adapter's place in the bank, or a task's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dscl.data.batches import Span
from dscl.model.adapters.injection import matching
from dscl.utils.errors import UserError

Decision = Callable[[torch.Tensor], Sequence[int | None]]  # pooled [prompts, d] → each prompt's slot, None: none


@dataclass(frozen=True)
class Rows:
    """Each row's slot; a single one is for all rows."""

    slots: tuple[int | None, ...]
    device: torch.device
    dtype: torch.dtype
    capacity: int
    rank: int

    def _sent(self, values: list[Any]) -> torch.Tensor:
        """To the device, without waiting for what it is doing."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    @cached_property
    def index(self) -> torch.Tensor:
        """[rows]; 0 where there is none."""
        return self._sent([slot or 0 for slot in self.slots])

    @cached_property
    def present(self) -> torch.Tensor:
        """[rows]: 1, or 0 where there is no slot."""
        return self._sent([float(slot is not None) for slot in self.slots]).to(self.dtype)

    @cached_property
    def by_slot(self) -> dict[int, torch.Tensor]:
        """The rows of each slot that has some."""
        found: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            if slot is not None:
                found.setdefault(slot, []).append(row)
        return {slot: self._sent(rows) for slot, rows in sorted(found.items())}

    @cached_property
    def columns(self) -> torch.Tensor:
        """[rows, capacity · rank]: 1 in the columns of the row's slot, else 0."""
        gate = torch.zeros(len(self.slots), self.capacity, 1)
        for row, slot in enumerate(self.slots):
            if slot is not None:
                gate[row, slot] = 1.0
        return gate.expand(-1, -1, self.rank).flatten(1).to(self.device, self.dtype, non_blocking=True)


@dataclass
class Routing:
    """The number of slots, the rows of the present batch, and the pooling by which they are chosen."""

    capacity: int
    rank: int
    rows: Rows | None = None  # None: the bare model
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
        """The first pass decides each row's slot when it reaches the feature layer; later passes keep to that."""
        assert [row for row, _, _ in spans] == list(range(len(spans))), "one prompt a row"
        self._spans, self._decide = spans, decide
        try:
            yield
        finally:
            self._spans = self._decide = self.rows = None

    @contextmanager
    def using(self, slots: Sequence[int | None], like: torch.Tensor) -> Iterator[None]:
        """Within, rows use these slots; a single one is for all rows."""
        self.choose(slots, like)
        try:
            yield
        finally:
            self.rows = None

    def choose(self, slots: Sequence[int | None], like: torch.Tensor) -> None:
        self.rows = Rows(tuple(slots), like.device, like.dtype, self.capacity, self.rank)

    def at_feature_layer(self, hidden: torch.Tensor) -> None:
        if self._spans is None:
            return
        if self._decide is None:
            self._pooled = pool(hidden, self._spans)
        elif self.rows is None:
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


class Projection(nn.Linear):
    """A projection with something beside it, in the place of a plain one: weight and bias keep their names."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """In the place of the module of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def pool_at(model: nn.Module, routing: Routing, feature_layer: int) -> None:
    """Have the model's passes come by the routing at this layer's input."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        routing.at_feature_layer(args[0])

    def as_in_serving(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        for layer in layers[:feature_layer]:
            layer.eval()  # without dropout, or features would not be those of serving

    model.register_forward_pre_hook(as_in_serving)
    layers[feature_layer].register_forward_pre_hook(before)


def targets_above(
    model: nn.Module, layer: int, targets: Sequence[str], setting: str = "method.lora.targets"
) -> list[str]:
    """The projections that the targets mean in the decoder layers from `layer` on; each has to mean some."""
    found = [name for name in matching(model, targets, setting) if layer_of(name) >= layer]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in found):
            raise UserError(
                f"{setting}: given {target!r}, which stands in no layer from feature_layer={layer} on; what comes "
                "before and after those layers is the same for all tasks, so leave it out"
            )
    return found


def layer_of(name: str) -> int:
    """The decoder layer that a module stands in; -1 outside of them."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def empty_like(model: nn.Module) -> torch.Tensor:
    """An ordinary tensor of the parameters' kind; under ZeRO-3 a parameter's own is a stand-in."""
    like = next(model.parameters())
    return torch.empty(0, dtype=like.dtype, device=like.device)
