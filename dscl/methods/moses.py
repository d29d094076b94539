"""Mixtures of sub-experts (after arXiv 2511.06237): tasks share sparse parameters, which nobody who uses them can lose.

What trains: low-rank sub-experts beside frozen projections, a mask that opens some of them, and a router that sends
every token to a few. What may not change: what earlier tasks' masks open; later tasks may open it too, as it is. Who
decides at inference: the caller, a key for each task, or the analytic router. With `weights`, the dense weights beside
the sub-experts train as well, in the subspace that OSFT leaves free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config.methods import MosesConfig
from dscl.data.batches import Batch, PromptBatch
from dscl.engine.matrix_owners import Constraint
from dscl.maths.masks import count_of
from dscl.methods.base import Ended, Facts, Matrix, Method, Ranks, Reader
from dscl.methods.osft import Osft
from dscl.methods.rls_router import Router
from dscl.methods.task_router import Deciding, feature_layer_of, spec_of, width_of
from dscl.model.adapters.peft_files import file_name
from dscl.model.adapters.routing import Routing, empty_like, pool_at, targets_above
from dscl.model.adapters.sub_experts import Shape, add_experts, first_values
from dscl.model.adapters.task_masks import Claims, read_claims, write_claims
from dscl.model.lm_head import answer_loss
from dscl.utils.errors import UserError


class Moses(Method):
    Config = MosesConfig
    config: MosesConfig
    by_task = True

    def __init__(self, config: MosesConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self.decides = self.decides_with(config)
        self.routing = Routing(capacity=len(facts.tasks), rank=0)
        self.weights = Osft(config.weights, facts) if config.weights is not None else None
        self.deciding: Deciding | None = None
        self._claims: list[Claims] = []  # of the tasks that have ended

    @classmethod
    def decides_with(cls, config: MosesConfig) -> bool:
        return config.task_inference != "given"

    def prepare(self, model: nn.Module) -> nn.Module:
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            raise UserError(
                "method.name: moses needs a model whose layers stand in model.layers (llama, mistral, qwen2, ...); "
                f"this is a {type(model).__name__}"
            )
        layer = self._prepare_deciding(model) if self.decides else 0
        model.requires_grad_(False)
        if self.weights is not None:
            self.weights.above, self.weights.setting = layer, "method.weights.targets"
            self.weights.prepare(model)
        self.like = empty_like(model)
        config = self.config
        columns = config.experts * config.rank
        atoms = config.masks == "atom"
        opened = count_of(config.share, columns) / config.rank if atoms else config.share * config.experts
        enough = math.ceil(len(self.facts.tasks) * opened - 1e-9)  # for tasks that share nothing
        shape = Shape(
            experts=config.experts,
            most=config.most or max(config.experts, enough),
            rank=config.rank,
            top=0 if config.gate == "uniform" else config.top_k or min(2, config.experts),
            share=config.share,
            scale=config.alpha / config.rank,
            atoms=atoms,
            dropout=config.dropout,
        )
        self.experts = add_experts(
            model, shape, self.routing, targets_above(model, layer, config.targets, "method.targets")
        )
        for each in self.experts.layers.values():
            each.make_trainable()
        return model

    def _prepare_deciding(self, model: Any) -> int:
        config, shape = self.config, model.config
        layer = feature_layer_of(config.feature_layer, shape.num_hidden_layers)
        kind = "exact" if config.task_inference == "rls" else "key"
        spec = spec_of(kind, layer, width_of(config.width, shape.hidden_size), shape.hidden_size, self.facts)
        router = Router(spec, config.ridge, config.reject is not False, next(model.parameters()).device)
        self.deciding = Deciding(router, self.routing)
        pool_at(model, self.routing, layer)
        return layer

    def rehearse(self) -> dict[str, float]:
        self.experts.count = self.experts.shape.most  # what training comes to when there is no more room
        self.experts.prepare(self.config.reuse)
        dense = self.weights.rehearse() if self.weights is not None else {}
        return {**dense, **(self.deciding.later() if self.deciding is not None else {})}

    def ending(self) -> float:
        return self.deciding.solving() if self.deciding is not None else 0.0

    def begin_task(self, index: int, name: str, ranks: Ranks) -> Reader:
        experts, policy = self.experts, self.config.when_full
        while (lacking := experts.lacking()) and policy == "grow" and experts.count < experts.shape.most:
            experts.count += 1
        if lacking and policy != "reuse":
            ways = [f"run again with method.when_full={other}" for other in self._ways(policy)]
            ways.append("start anew with a lower method.share, or a larger method.most")
            what = "atoms" if experts.shape.atoms else "entries"
            raise UserError(
                f"method moses: task {name} opens {lacking} more {what} of a layer than are unclaimed there; "
                + ", or ".join(ways)
            )
        experts.prepare(self.config.reuse)
        if self.weights is not None:
            self.weights.begin_task(index, name, ranks)

        def read(tensor: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor | None:
            if tensor.rpartition(".")[0] in experts.layers and not tensor.endswith((".weight", ".bias")):
                return first_values(self.facts.seed, f"{name}:{tensor}", shape, start, stop)
            return None  # a dense weight goes on from where it is

        return read

    def _ways(self, policy: str) -> list[str]:
        """The other policies that would let a task begin for which there is too little."""
        grow = policy == "stop" and self.experts.count < self.experts.shape.most
        return ["grow"] * grow + ["reuse"] * self.config.reuse

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.deciding.loss(model, batch) if self.deciding is not None else answer_loss(model, batch)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        told = [self.deciding.learn(name, ranks)] if self.deciding is not None else []
        experts = self.experts
        before, room = tuple(experts.names), self._room()
        kept = experts.claim(name, ranks.whole(experts.trained()))
        training = {name: getattr(self.facts, name) for name in ("model", "tokenizer", "prompt_limit", "precision")}
        self._claims.append(Claims(name, before, experts.shape, kept, training))
        told.append(f"{experts.used():.1%} of the first sub-experts' parameters are claimed{room}")
        numbers = self._numbers()
        if self.weights is not None:
            with self.routing.using([experts.slot(name)], self.like):
                ended = self.weights.end_task(index, name, ranks)
            told.append(ended.told)
            numbers["directions_bytes"] = ended.numbers["capacity_bytes"]  # of all tasks together
        return Ended("; ".join(filter(None, told)), numbers, self._overlap())

    def _room(self) -> str:
        """What was done where the task that ends found too little unclaimed."""
        experts, lacking = self.experts, self.experts.lacking()
        before = experts.shape.experts
        if self._claims:
            before = int(next(iter(self._claims[-1].layers.values()))["open"].sum())
        if experts.count > before:
            new = f"{experts.count - before} more of them"
            return f"; there was no room, so it got {new}: {experts.count} of {experts.shape.most} are open"
        what = "atoms" if experts.shape.atoms else "entries"
        return f"; there was no room, so at least {lacking} {what} of a layer are others' too" if lacking else ""

    def _numbers(self) -> dict[str, float]:
        """What the tasks so far take, in bytes, beside a LoRA for each of them with as many columns as a mask opens."""
        parts = [claims.sizes() for claims in self._claims]
        found = {f"{kind}_bytes": float(sum(part[kind] for part in parts)) for kind in parts[0]}
        shape, each = self.experts.shape, self.like.element_size()
        columns = count_of(shape.share, shape.experts * shape.rank)
        lora = sum(columns * each * (m.in_features + m.out_features) for m in self.experts.layers.values())
        if self.deciding is not None:
            found["deciding_bytes"] = self.deciding.kept()
        keys = found["deciding_bytes"] if self.config.task_inference == "key" else 0.0  # the rest is as in asr
        return {
            "capacity_bytes": sum(found[f"{kind}_bytes"] for kind in parts[0]) + keys,
            "capacity_share": self.experts.used(),
            "experts_open": float(self.experts.count),
            "lora_per_task_bytes": float(lora * len(parts)),
            **found,
        }

    def _overlap(self) -> Matrix:
        names = tuple(self.experts.names)
        return Matrix("masks: of the row's, opened by the column's too", names, self.experts.shared().tolist())

    def leave(self, folder: Path, name: str) -> list[Path]:
        path = folder / "experts" / f"{file_name(name)}.safetensors"
        write_claims(path, next(claims for claims in self._claims if claims.task == name))
        return [path] if self.deciding is None else [path, self.deciding.leave(folder, name)]

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            path = folder / "experts" / f"{file_name(name)}.safetensors"
            claims = read_claims(path, name, tuple(self.experts.names), self.experts)
            self.experts.take(name, claims.layers)
            self._claims.append(claims)
            if self.deciding is not None:
                self.deciding.recall(folder, name)
        self.experts.count = self._open
        self.experts.prepare(self.config.reuse)

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is not None:
            return self.routing.using([self._slot(task)], self.like)
        return self.deciding.answering(batch, self._slot) if self.deciding is not None else nullcontext()

    def _slot(self, name: str | None) -> int | None:
        """None where there is no task, or one that has not been learned yet: the bare model answers."""
        return self.experts.slot(name) if name in self.experts.names else None

    def state(self) -> dict[str, torch.Tensor]:
        return {"open": torch.tensor(self.experts.count)}

    def rows(self) -> dict[str, torch.Tensor]:
        return self.deciding.rows() if self.deciding is not None else {}

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self._open = int(state["open"])
        if self.deciding is not None:
            self.deciding.load_rows(rows)

    # ---- the dense weights

    def constraint(self) -> Constraint | None:
        return self.weights.constraint() if self.weights is not None else None

    def owned(self) -> dict[str, torch.Tensor]:
        return self.weights.owned() if self.weights is not None else {}

    def load_owned(self, read: Callable[[str], dict[str, torch.Tensor]]) -> None:
        if self.weights is not None:
            self.weights.load_owned(read)
