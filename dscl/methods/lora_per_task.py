"""A LoRA a task, each for the prompts of its own task: what isolation can reach where the task is known.

What trains: a fresh LoRA for every task; what it has learnt is frozen into the bank. What may not change: the base
model and the LoRAs of ended tasks. Who decides at inference: the caller, who names the task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dscl.config.methods import LoraConfig, LoraPerTaskConfig
from dscl.data.batches import PromptBatch
from dscl.methods.base import Ended, Facts, Method, Ranks, Reader
from dscl.model.adapters.injection import matching
from dscl.model.adapters.lora_bank import Bank, add_routed, first_values
from dscl.model.adapters.peft_files import Adapter, Pair, file_name, read_adapter, write_adapter
from dscl.model.adapters.routing import Routing


class LoraPerTask(Method):
    Config: ClassVar[type] = LoraPerTaskConfig
    by_task = True
    bank: Bank

    def __init__(self, config: Any, facts: Facts) -> None:
        super().__init__(config, facts)
        self.lora: LoraConfig = config.lora or LoraConfig()
        self.routing = Routing(capacity=len(facts.tasks), rank=self.lora.rank)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self.adapt(model, matching(model, self.lora.targets))

    def adapt(self, model: nn.Module, targets: Sequence[str]) -> nn.Module:
        """Freeze the model, and have a LoRA train beside these projections."""
        self.bank = add_routed(model, self.routing, targets)
        for routed in self.bank.layers.values():
            routed.make_trainable(self.lora)
        return model

    def begin_task(self, index: int, name: str, ranks: Ranks) -> Reader:
        # By the task's name, not its place: what a task learns does not depend on the tasks before it.
        return lambda tensor, *stretch: first_values(self.facts.seed, f"{name}:{tensor}", *stretch)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        trained = ranks.whole(None)
        layers = {}
        for path, layer in self.bank.layers.items():
            a, b = (trained[f"{path}.lora_{side}"].to(layer.bank_a.dtype) for side in "ab")
            layers[path] = Pair(a, b, layer.scale)
        self._adapter = Adapter(name, self.facts.base, layers)
        self.bank.add(self._adapter, self._slot(name))
        each = sum(t.numel() * t.element_size() for pair in layers.values() for t in (pair.a, pair.b))
        return Ended(numbers={"capacity_bytes": float(len(self.bank.names) * each)})

    def leave(self, folder: Path, name: str) -> list[Path]:
        adapter = folder / "adapters" / file_name(name)
        write_adapter(adapter, self._adapter)
        return sorted(adapter.iterdir())

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        shapes = {path: (m.out_features, m.in_features) for path, m in self.bank.layers.items()}
        for name in names:
            adapter = read_adapter(folder / "adapters" / file_name(name), shapes)
            self.bank.add(dataclasses.replace(adapter, name=name), self._slot(name))

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is None:
            return nullcontext()
        slot = self.bank.slot(task) if task in self.bank.names else None  # not learned yet: the bare model
        return self.routing.using([slot], self.bank.like)

    def _slot(self, name: str) -> int:
        """Of the tasks by name, so that the bank is the same in every order of tasks."""
        return sorted(self.facts.tasks).index(name)
