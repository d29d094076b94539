"""Slot assignment: which adapter or task each row of a batch uses. All adapted projections of a model share it.

A slot is the index of an adapter in a LoRA bank, or of a task in a sub-expert bank. Either the caller assigns the
slots, or the forward pass chooses them from the prompts' features when it reaches the feature layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dscl.data.batches import PromptSpan
from dscl.model.adapters.injection import match_target_layers
from dscl.utils.errors import UserError

ChooseSlots = Callable[
    [torch.Tensor], Sequence[int | None]
]  # features [prompts, d] → slot of each prompt; None: no adapter


@dataclass(frozen=True)
class SlotAssignment:
    """The slot of each row; a single slot applies to all rows."""

    slots: tuple[int | None, ...]
    device: torch.device
    dtype: torch.dtype
    num_slots: int
    rank: int

    def _to_device(self, values: list[Any]) -> torch.Tensor:
        """Copy the values to the device without synchronising with it."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    @cached_property
    def slot_indices(self) -> torch.Tensor:
        """[rows]: the slot, or 0 where there is none."""
        return self._to_device([slot or 0 for slot in self.slots])

    @cached_property
    def has_slot(self) -> torch.Tensor:
        """[rows]: 1, or 0 where there is no slot."""
        return self._to_device([float(slot is not None) for slot in self.slots]).to(self.dtype)

    @cached_property
    def rows_by_slot(self) -> dict[int, torch.Tensor]:
        """The row indices of each slot that is used."""
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(self.slots):
            if slot is not None:
                rows_of.setdefault(slot, []).append(row)
        return {slot: self._to_device(rows) for slot, rows in sorted(rows_of.items())}

    @cached_property
    def column_gate(self) -> torch.Tensor:
        """[rows, num_slots · rank]: 1 in the columns of the row's slot, else 0."""
        gate = torch.zeros(len(self.slots), self.num_slots, 1)
        for row, slot in enumerate(self.slots):
            if slot is not None:
                gate[row, slot] = 1.0
        return gate.expand(-1, -1, self.rank).flatten(1).to(self.device, self.dtype, non_blocking=True)


@dataclass
class Routing:
    """The slot assignment of the current batch, and how features are pooled to choose it."""

    num_slots: int
    rank: int
    assignment: SlotAssignment | None = None  # None: no row uses an adapter
    _spans: Sequence[PromptSpan] | None = None
    _features: torch.Tensor | None = None
    _choose_slots: ChooseSlots | None = None

    @contextmanager
    def capture_features(self, spans: Sequence[PromptSpan]) -> Iterator[Callable[[], torch.Tensor]]:
        """A forward pass in this context pools the hidden state over the spans.

        The yielded function returns the pooled features, [spans, d] in fp32.
        """
        self._spans, self._features = spans, None
        try:
            yield self._pop_features
        finally:
            self._spans = None  # activation checkpointing runs the feature layer again in the backward pass

    @contextmanager
    def route_prompts(self, spans: Sequence[PromptSpan], choose_slots: ChooseSlots) -> Iterator[None]:
        """The first pass in this context chooses the slots at the feature layer; later passes keep them."""
        assert [row for row, _, _ in spans] == list(range(len(spans))), "each row must hold exactly one prompt"
        self._spans, self._choose_slots = spans, choose_slots
        try:
            yield
        finally:
            self._spans = self._choose_slots = self.assignment = None

    @contextmanager
    def use_slots(self, slots: Sequence[int | None], template: torch.Tensor) -> Iterator[None]:
        """In this context, rows use these slots; a single slot applies to all rows.

        `template`: a tensor of the activations' dtype and device.
        """
        self.assign_slots(slots, template)
        try:
            yield
        finally:
            self.assignment = None

    def assign_slots(self, slots: Sequence[int | None], template: torch.Tensor) -> None:
        """Set the slots of the rows; see `use_slots`."""
        self.assignment = SlotAssignment(tuple(slots), template.device, template.dtype, self.num_slots, self.rank)

    def on_feature_layer(self, hidden: torch.Tensor) -> None:
        """Pool the features or choose the slots. `hidden`: input of the feature layer, [rows, length, d]."""
        if self._spans is None:
            return
        if self._choose_slots is None:
            self._features = mean_pool_spans(hidden, self._spans)
        elif self.assignment is None:
            self.assign_slots(self._choose_slots(mean_pool_spans(hidden, self._spans)), hidden)

    def _pop_features(self) -> torch.Tensor:
        assert self._features is not None, "no forward pass has reached the feature layer"
        features, self._features = self._features, None
        return features


def mean_pool_spans(hidden: torch.Tensor, spans: Sequence[PromptSpan]) -> torch.Tensor:
    """The mean of the hidden state over each span, [spans, d] in fp32.

    Each span is summed separately, so padding and neighbouring spans do not change the order of summation.
    """
    if not spans:
        return hidden.new_zeros((0, hidden.shape[-1]), dtype=torch.float32)
    means = [hidden[row, start:stop].detach().mean(0, dtype=torch.float32) for row, start, stop in spans]
    return torch.stack(means)


class AdaptedLinear(nn.Linear):
    """Base class of projections with adapters. It replaces a linear layer; weight and bias keep their names."""

    def __init__(self, base_layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.train(base_layer.training)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def hook_feature_layer(model: nn.Module, routing: Routing, feature_layer: int) -> None:
    """Pass the input of this decoder layer to the routing in every forward pass."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)

    def pass_hidden(_module: nn.Module, args: tuple[Any, ...]) -> None:
        routing.on_feature_layer(args[0])

    def disable_dropout(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        for layer in layers[:feature_layer]:
            layer.eval()  # features must be the same in training and in serving

    model.register_forward_pre_hook(disable_dropout)
    layers[feature_layer].register_forward_pre_hook(pass_hidden)


def match_targets_from_layer(
    model: nn.Module, layer: int, targets: Sequence[str], setting: str = "method.tune.targets"
) -> list[str]:
    """The projections in decoder layers `layer` and above that match the targets; every target must match one."""
    matched = [name for name in match_target_layers(model, targets, setting) if layer_index(name) >= layer]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in matched):
            raise UserError(
                f"{setting}: given {target!r}, which stands in no layer from the router's layer ({layer}) on; what "
                "comes before and after those layers is the same for all tasks, so leave it out"
            )
    return matched


def layer_index(name: str) -> int:
    """The index of the decoder layer that contains the module; -1 if none does."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def make_template_tensor(model: nn.Module) -> torch.Tensor:
    """An empty tensor of the parameters' dtype and device, for `new_zeros`.

    Under ZeRO-3 a parameter itself is only a placeholder, so it cannot serve for this.
    """
    parameter = next(model.parameters())
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
