"""A bank of frozen LoRA adapters beside each projection, and one trainable LoRA. Each row of a batch uses its adapter.

    y = x Wᵀ + ((x A_bankᵀ) ∘ gate) B_bankᵀ      gate [rows, columns]: 1 in the columns of the row's adapter, else 0

The layer computes two dense products and one pointwise product, whichever rows use which adapter. So shapes are static,
nothing is sorted, and under ZeRO-3 every rank touches every tensor. The bank has its full size from the start: adding
an adapter changes no shape and no order of summation, so the outputs of other adapters stay bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional

from dscl.config.parts import LoraConfig
from dscl.model.adapters.injection import sample_lora_a
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights
from dscl.model.adapters.routing import AdaptedLinear, Routing, make_template_tensor, replace_module
from dscl.model.flops import MatMul, low_rank_matmuls
from dscl.utils.errors import UserError


class RoutedLoraLinear(AdaptedLinear):
    """A projection with its trainable LoRA in training mode, and with each row's adapter in evaluation mode."""

    bank_a: torch.Tensor  # [slots · rank, in]
    bank_b: torch.Tensor  # [out, slots · rank]; includes each adapter's scale

    def __init__(self, base_layer: nn.Linear, routing: Routing, template: torch.Tensor) -> None:
        super().__init__(base_layer)
        self.routing = routing
        columns = routing.num_slots * routing.rank
        self.register_buffer("bank_a", template.new_zeros(columns, self.in_features), persistent=False)
        self.register_buffer("bank_b", template.new_zeros(self.out_features, columns), persistent=False)
        self.rank, self.scale, self.dropout = 0, 0.0, 0.0

    def make_trainable(self, config: LoraConfig) -> None:
        """Add the trainable LoRA."""
        self.lora_a = nn.Parameter(self.bank_a.new_zeros(config.rank, self.in_features))
        self.lora_b = nn.Parameter(self.bank_a.new_zeros(self.out_features, config.rank))
        self.rank, self.scale, self.dropout = config.rank, config.alpha / config.rank, config.dropout

    def adapter_matmuls(self) -> list[list[MatMul]]:
        """The matrix products of a training pass beside the projection."""
        return [low_rank_matmuls(self.in_features, self.rank, self.out_features, True)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.training:
            dropped_x = functional.dropout(x, self.dropout) if self.dropout else x
            return y + functional.linear(functional.linear(dropped_x, self.lora_a), self.lora_b) * self.scale
        if self.routing.assignment is None:
            return y
        gate = self.routing.assignment.column_gate
        if len(gate) != len(x):  # x is [tokens, in], or one slot applies to all rows
            assert len(x) % len(gate) == 0
            gate = gate.repeat_interleave(len(x) // len(gate), 0)
        low = functional.linear(x, self.bank_a) * (gate[:, None] if x.ndim == 3 else gate)
        return y + functional.linear(low, self.bank_b)

    @torch.no_grad()
    def set_adapter(self, slot: int, lora: LoraWeights | None) -> None:
        """Write an adapter's matrices into a slot; None empties the slot."""
        first = slot * self.routing.rank
        last = first + self.routing.rank
        self.bank_a[first:last] = 0.0
        self.bank_b[:, first:last] = 0.0
        if lora is not None:
            rank = len(lora.a)
            self.bank_a[first : first + rank] = lora.a
            self.bank_b[:, first : first + rank] = lora.b.to(self.bank_b) * lora.scale


class StackedLoraLinear(RoutedLoraLinear):
    """A projection with all adapters of the bank summed (O-LoRA), plus the trainable LoRA in training mode.

    Each training pass calls `on_overlap` with Σ |A_bank Aᵀ|, the overlap of the trainable LoRA's input directions with
    those in the bank. The layer computes it, because under ZeRO-3 both matrices are gathered only during its forward.
    """

    on_overlap: Callable[[torch.Tensor], None]

    def adapter_matmuls(self) -> list[list[MatMul]]:
        return [
            low_rank_matmuls(self.in_features, len(self.bank_a), self.out_features, False),
            *super().adapter_matmuls(),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(functional.linear(x, self.bank_a), self.bank_b)
        if self.training:
            self.on_overlap((self.bank_a.float() @ self.lora_a.float().T).abs().sum())
        return y + super().forward(x)


class LoraBank:
    """The adapters of one model by name. An adapter has the same slot in every adapted layer."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.routing = routing
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLoraLinear)}
        self.template = make_template_tensor(model)
        self._names: list[str | None] = [None] * routing.num_slots

    @property
    def names(self) -> list[str]:
        return [name for name in self._names if name is not None]

    def get_slot(self, name: str | None) -> int | None:
        return None if name is None else self._names.index(name)

    def add(self, adapter: LoraAdapter, slot: int | None = None) -> None:
        """Put an adapter into this slot; without `slot`, into the first free one."""
        if None not in self._names:
            raise UserError(
                f"the bank is full: it has {len(self._names)} slots ({', '.join(self.names)}) and {adapter.name!r} "
                "needs one more; remove a task, or give more slots"
            )
        unknown_layers = sorted(set(adapter.layers) - set(self.layers))
        assert not unknown_layers, f"{adapter.name}: no adapted layer {unknown_layers[0]}"
        slot = self._names.index(None) if slot is None else slot
        self._names[slot] = adapter.name
        for name, layer in self.layers.items():
            layer.set_adapter(slot, adapter.layers.get(name))

    def remove(self, name: str) -> None:
        slot = self._names.index(name)
        self._names[slot] = None
        for layer in self.layers.values():
            layer.set_adapter(slot, None)


def inject_lora_bank(
    model: nn.Module, routing: Routing, targets: Iterable[str], layer_class: type[RoutedLoraLinear] = RoutedLoraLinear
) -> LoraBank:
    """Freeze the model and put an empty bank beside each of the named projections."""
    model.requires_grad_(False)
    template = make_template_tensor(model)
    for name in targets:
        base_layer = model.get_submodule(name)
        assert isinstance(base_layer, nn.Linear)
        replace_module(model, name, layer_class(base_layer, routing, template))
    return LoraBank(model, routing)


def inject_stacked_bank(
    model: nn.Module, routing: Routing, targets: Iterable[str], on_overlap: Callable[[torch.Tensor], None]
) -> LoraBank:
    """As `inject_lora_bank`, with layers in which every row uses all adapters."""
    bank = inject_lora_bank(model, routing, targets, StackedLoraLinear)
    for layer in bank.layers.values():
        assert isinstance(layer, StackedLoraLinear)
        layer.on_overlap = on_overlap
    return bank


def initial_lora_values(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a trainable LoRA at the start of a task: A random by seed and name, B zero."""
    return torch.zeros(stop - start) if name.endswith("lora_b") else sample_lora_a(seed, name, shape, start, stop)
