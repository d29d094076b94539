"""Analytic Subspace Routing (arXiv 2503.13575): a LoRA a task, and a router in closed form that forgets nothing.

What trains: one LoRA in the layers from `feature_layer` on; what a task has learnt is frozen into the bank. What may
not change: everything below, so that a prompt's features are the same for ever. Who decides at inference: ridge
regression on the features of the prompt, which the training pass yields on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config import key
from dscl.data.batches import Batch, PromptBatch
from dscl.errors import UserError
from dscl.maths.rls import gather
from dscl.methods.base import Facts, Method, Ranks, Reader, answer_loss
from dscl.model.adapters import Adapter, Pair, file_name, read_adapter, write_adapter
from dscl.model.routed import Bank, Routing, add_routed, first_values, targets_above
from dscl.model.surgery import LoraConfig
from dscl.router import Router, Spec, load_task, save_task

# The paper's settings; a recipe that asks for them may not ask for others.
PAPER: dict[str, Any] = {
    "feature_layer": 4,
    "width": 10000,
    "ridge": 100.0,
    "reject": False,
    "lora": LoraConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class AsrConfig:
    name: str = key("asr")
    faithful: bool = key(False, help="the paper's settings and its features in floating point; sets all keys below")
    feature_layer: int | None = key(
        None,
        at_least=1,
        help="layers below are never adapted, the features are its input; default: an eighth of all, from 2",
    )
    width: int | None = key(None, at_least=8, at_most=65536, help="features; default: twice the hidden size, from 2048")
    ridge: float | None = key(
        None, above=0.0, help="in units of the features' mean square; default: chosen from the statistics"
    )
    reject: bool | None = key(None, help="prompts far from every task go to the base model; default: true")
    lora: LoraConfig | None = key(None, help="the adapters; default: as in sequential")

    def __post_init__(self) -> None:
        default = PAPER if self.faithful else {"reject": True, "lora": LoraConfig()}
        for name, value in default.items():
            given = getattr(self, name)
            if self.faithful and given is not None and given != value:
                raise UserError(
                    f"method.{name}: given {given} together with faithful: true, which sets {value}; remove one of them"
                )
            object.__setattr__(self, name, value if given is None else given)


class Asr(Method):
    Config = AsrConfig
    config: AsrConfig
    bank: Bank
    router: Router

    def __init__(self, config: AsrConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        assert config.lora is not None
        self.lora = config.lora
        self.routing = Routing(capacity=len(facts.tasks), rank=config.lora.rank)
        self._samples: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._finite: list[torch.Tensor] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            raise UserError(
                "method.name: asr needs a model whose layers stand in model.layers (llama, mistral, qwen2, ...); "
                f"this is a {type(model).__name__}"
            )
        device = next(model.parameters()).device
        self.router = Router(self._spec(model.config), self.config.ridge, bool(self.config.reject), device)
        layer = self.router.spec.layer
        for target in self.lora.targets:
            if not targets_above(model, layer, [target]):
                raise UserError(
                    f"method.lora.targets: given {target!r}, which stands in no layer from feature_layer={layer} on; "
                    "what comes before and after those layers is the same for all tasks, so leave it out"
                )
        targets = targets_above(model, layer, self.lora.targets)
        self.bank = add_routed(model, self.routing, layer, targets)
        for routed in self.bank.layers.values():
            routed.make_trainable(self.lora)
        return model

    def begin_task(self, index: int, name: str, ranks: Ranks) -> Reader:
        # By the task's name, not its place: what a task learns does not depend on the tasks before it.
        return lambda tensor, *stretch: first_values(self.facts.seed, f"{name}:{tensor}", *stretch)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if not batch.first or not batch.samples:
            return answer_loss(model, batch)
        with self.routing.pooling(batch.prompts) as pooled:
            loss = answer_loss(model, batch)
        # The answer stands behind its prompt, which therefore does not see it: these are the features of serving.
        self._samples += batch.samples
        states = pooled()
        self._finite.append(states.isfinite().all(1))  # not looked at now, which would make a GPU wait
        self._rows.append(self.router.expansion.rows(states.nan_to_num()))
        return loss

    def end_task(self, index: int, name: str, ranks: Ranks) -> str:
        samples, rows = self._gathered()
        assert len(set(samples)) == len(samples), "a sample was counted twice"
        statistics = gather(rows, self.router.expansion)
        for tensor in statistics.tensors():
            ranks.sum_(tensor)
        self.router.add(name, statistics)
        self._samples, self._rows, self._finite = [], [], []
        trained = ranks.whole()
        layers = {}
        for path, layer in self.bank.layers.items():
            a, b = (trained[f"{path}.lora_{side}"].to(layer.bank_a.dtype) for side in "ab")
            layers[path] = Pair(a, b, layer.scale)
        self._adapter = Adapter(name, self.facts.base, layers)
        self.bank.add(self._adapter, self._slot(name))
        joined = f"task {name}: {int(statistics.count)} prompts join the router"
        try:
            solution = self.router.solution()
        except UserError as error:  # what the task learnt is saved all the same; another ridge may serve
            return f"{joined}, which cannot be solved: {error}"
        told = f"ridge {solution.ridge:g}, condition {solution.condition:.1e}"
        return f"{joined}, which knows {len(solution.names)} tasks ({told})"

    def leave(self, folder: Path, name: str) -> list[Path]:
        adapter = folder / "adapters" / file_name(name)
        statistics = folder / "router" / f"{file_name(name)}.safetensors"
        for path in (adapter, statistics):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(adapter, self._adapter)
        save_task(statistics, self.router.spec, name, self.router.statistics(name))
        return [*sorted(adapter.iterdir()), statistics]

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        shapes = {path: (m.base.out_features, m.base.in_features) for path, m in self.bank.layers.items()}
        for name in names:
            adapter = read_adapter(folder / "adapters" / file_name(name), shapes)
            self.bank.add(dataclasses.replace(adapter, name=name), self._slot(name))
            found = load_task(folder / "router" / f"{file_name(name)}.safetensors", self.router.spec)
            self.router.add(name, found)

    @contextmanager
    def answering(self, batch: PromptBatch) -> Iterator[list[str | None]]:
        decided: list[str | None] = []

        def decide(pooled: torch.Tensor) -> list[int | None]:
            if self.router.names:
                decided.extend(self.router.route(self.router.rows(pooled)).task)
            else:
                decided.extend([None] * len(pooled))
            return [self.bank.slot(name) for name in decided]

        with self.routing.answering(batch.prompts, decide):
            yield decided

    def rows(self) -> dict[str, torch.Tensor]:
        samples, rows = self._gathered()
        return {"samples": torch.tensor(samples, dtype=torch.int64), "features": rows.cpu()}

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self._samples, self._rows = rows["samples"].tolist(), [rows["features"]]
        self._finite = [torch.ones(len(self._samples), dtype=torch.bool)]

    def _gathered(self) -> tuple[list[int], torch.Tensor]:
        """The task's prompts so far. One whose state is not finite does not count; its step has been told of."""
        device = self.router.device  # also where there are none: the ranks' sums meet on one kind of device
        if not self._rows:
            return [], self.router.rows(torch.zeros(0, self.router.spec.dim, device=device))
        finite = torch.cat([mask.to(device) for mask in self._finite])
        rows = torch.cat([part.to(device) for part in self._rows])
        return [sample for sample, ok in zip(self._samples, finite.tolist(), strict=True) if ok], rows[finite]

    def _slot(self, name: str) -> int:
        """Of the tasks by name, so that the bank is the same in every order of tasks."""
        return sorted(self.facts.tasks).index(name)

    def _spec(self, model: Any) -> Spec:
        return Spec(
            kind="paper" if self.config.faithful else "exact",
            layer=feature_layer_of(self.config, model),
            dim=model.hidden_size,
            width=width_of(self.config, model),
            seed=self.facts.seed,
            model=self.facts.model,
            tokenizer=self.facts.tokenizer,
            prompt_limit=self.facts.prompt_limit,
            precision=self.facts.precision,
        )


def feature_layer_of(config: AsrConfig, model: Any) -> int:
    """The feature layer, for a model of this configuration."""
    layers: int = model.num_hidden_layers
    layer = min(max(2, layers // 8), layers - 1) if config.feature_layer is None else config.feature_layer
    if not 1 <= layer < layers:
        raise UserError(
            f"feature_layer: given {layer}; the model has {layers} layers, of which at least the first stays frozen "
            f"and the last is adapted, so 1 to {layers - 1} is allowed"
        )
    return layer


def width_of(config: AsrConfig, model: Any) -> int:
    """How many features a prompt is expanded to, for a model of this configuration."""
    return config.width or max(2048, 2 * int(model.hidden_size))
