"""One LoRA per task, used only for prompts of its task: full parameter isolation, for known task ids.

What trains: a fresh LoRA for every task, which is frozen into a bank when the task ends. What may not change: the base
model and the LoRAs of ended tasks. At inference the caller names the prompt's task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dscl.config.methods import LoraPerTaskPreset
from dscl.config.parts import LoraConfig
from dscl.data.batches import PromptBatch
from dscl.methods.base import Method, RunInfo, TaskContext, TaskSummary, TensorReader
from dscl.model.adapters.injection import match_target_layers
from dscl.model.adapters.lora_bank import LoraBank, initial_lora_values, inject_lora_bank
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights, read_adapter, task_file_name, write_adapter
from dscl.model.adapters.routing import Routing


class LoraPerTask(Method):
    """One LoRA per task. Base class of the methods that keep a bank of LoRAs."""

    Config: ClassVar[type] = LoraPerTaskPreset
    uses_task_id = True
    bank: LoraBank

    def __init__(self, config: Any, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        self.lora: LoraConfig = config.tune
        self.routing = Routing(num_slots=len(run_info.task_names), rank=self.lora.rank)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self.add_adapters(model, match_target_layers(model, self.lora.targets))

    def add_adapters(self, model: nn.Module, targets: Sequence[str]) -> nn.Module:
        """Freeze the model, and add a trainable LoRA to these projections."""
        self.bank = inject_lora_bank(model, self.routing, targets)
        for layer in self.bank.layers.values():
            layer.make_trainable(self.lora)
        return model

    def begin_task(self, index: int, name: str, context: TaskContext) -> TensorReader:
        # Seeded by the task's name and not by its position, so that the start does not depend on earlier tasks.
        return lambda tensor, *extent: initial_lora_values(self.run_info.seed, f"{name}:{tensor}", *extent)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        trained_weights = context.gather_full_weights(None)
        layers = {}
        for path, layer in self.bank.layers.items():
            a, b = (trained_weights[f"{path}.lora_{side}"].to(layer.bank_a.dtype) for side in "ab")
            layers[path] = LoraWeights(a, b, layer.scale)
        self._adapter = LoraAdapter(name, self.run_info.base_model, layers)
        self.bank.add(self._adapter, self._slot_of_task(name))
        lora_bytes = sum(t.numel() * t.element_size() for weights in layers.values() for t in (weights.a, weights.b))
        return TaskSummary(metrics={"capacity_bytes": float(len(self.bank.names) * lora_bytes)})

    def save_task_artifacts(self, folder: Path, name: str) -> list[Path]:
        adapter_folder = folder / "adapters" / task_file_name(name)
        write_adapter(adapter_folder, self._adapter)
        return sorted(adapter_folder.iterdir())

    def load_task_artifacts(self, folder: Path, names: Sequence[str]) -> None:
        shapes = {path: (m.out_features, m.in_features) for path, m in self.bank.layers.items()}
        for name in names:
            adapter = read_adapter(folder / "adapters" / task_file_name(name), shapes)
            self.bank.add(dataclasses.replace(adapter, name=name), self._slot_of_task(name))

    def inference_context(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is None:
            return nullcontext()
        slot = self.bank.get_slot(task) if task in self.bank.names else None  # an untrained task uses the base model
        return self.routing.use_slots([slot], self.bank.template)

    def _slot_of_task(self, name: str) -> int:
        """The task's slot: its position among the sorted names, so that the bank is the same for every task order."""
        return sorted(self.run_info.task_names).index(name)
