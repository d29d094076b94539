"""Inference with a base model, its tasks' adapters or sub-experts, and the router that finds each prompt's task.

    model = dscl.load("out/export")
    model.route(["Some prompt"])            # the task of each prompt
    model.generate(["Some prompt"])         # the answer of that task's adapter or sub-experts, or of the base model

This module needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from dscl.config.parsing import did_you_mean
from dscl.data.batches import PromptBatch, collate_prompts
from dscl.data.encode import encode_prompts, prepended_bos_id
from dscl.data.task import BadRecord, Sample, check_text
from dscl.distributed import comm
from dscl.maths.rls import compute_statistics
from dscl.methods.rls_router import Router
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.serving_bank import LoraServingBank, SubExpertServingBank
from dscl.model.generation import generate
from dscl.model.tokenizer import pad_id
from dscl.model.weight_overlay import overlay_weights
from dscl.serving.bundle import EXPERTS, BundleDescription, open_base_model, read_bundle_description, write_export
from dscl.utils.errors import UserError


@dataclass(frozen=True)
class Route:
    """The router's decision on one prompt; see `dscl.methods.rls_router.RoutingResult`."""

    task: str | None  # None: no task is near enough, so the base model answers
    margin: float
    distance: float


@dataclass(frozen=True)
class Answer:
    """A generated text and the task that generated it."""

    text: str
    task: str | None  # the task whose adapter or sub-experts were used; None: the base model alone
    margin: float | None  # None if the caller named the task
    distance: float | None


class ServingModel:
    """A base model with the adapters or sub-experts of its tasks.

    Prompts are complete texts, as the tasks' templates produce them, and are tokenized as in training.

    Usually the prompts pass through the model once: the router chooses the tasks when the hidden states of the feature
    layer are computed. Imported adapters may also change layers below the feature layer. Then the task has to be chosen
    earlier, so the prompts first pass through the lower layers without adapters.
    """

    def __init__(self, description: BundleDescription, device: torch.device, slots: int) -> None:
        backbone = open_base_model(description)
        self._description, self._tokenizer = description, backbone.tokenizer
        self._artifact_paths = dict(description.tasks)
        layer = None
        if description.router is not None:
            description.router.device, layer = device, description.router.spec.layer
        module = backbone.build()
        read = overlay_weights(backbone.weights.read, description.trained_weights)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                values = read(name, parameter.shape, 0, math.prod(parameter.shape))
                parameter.copy_(values.view(parameter.shape))
        self._module: Any = module.to(device).eval()
        self._reference_tensor = torch.empty(0, dtype=backbone.dtype, device=device)
        self._routing = Routing(slots, rank=0)  # a bank of adapters raises the rank to that of its adapters
        self._task_modules: LoraServingBank | SubExpertServingBank
        if description.kind == EXPERTS:
            self._task_modules = SubExpertServingBank(self._module, self._routing, layer, self._artifact_paths)
        else:
            assert layer is not None
            self._task_modules = LoraServingBank(self._module, self._routing, layer, self._artifact_paths)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self._artifact_paths)

    def route(self, prompts: Sequence[str], batch_size: int = 16) -> list[Route]:
        """Find the task of each prompt. The layers above the feature layer are not run."""
        routes: dict[int, Route] = {}
        for indices, tensors in self._make_batches(prompts, batch_size):
            routes.update(zip(indices, _route_prompts(self._router, self._pool_hidden_states(tensors)), strict=True))
        return [routes[index] for index in range(len(prompts))]

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        task: str | Sequence[str | None] | EllipsisType | None = ...,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Generate a greedy answer to each prompt.

        `task`: by default the router chooses each prompt's task. A name is used for all prompts; a list holds one entry
        for each prompt; None stands for the base model alone.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: given {max_new_tokens}; a whole number of at least 1 is needed")
        chosen_tasks: list[str | None] | None = None  # None: the router chooses
        if not isinstance(task, EllipsisType):
            chosen_tasks = [task] * len(prompts) if task is None or isinstance(task, str) else list(task)
            if len(chosen_tasks) != len(prompts):
                raise UserError(
                    f"task: given {len(chosen_tasks)} for {len(prompts)} prompts; give one each, or one for all"
                )
            for name in dict.fromkeys(chosen_tasks):
                if name is not None:
                    self._check_task_exists(name)
        answers: dict[int, Answer] = {}
        for indices, tensors in self._make_batches(prompts, batch_size):
            tasks = chosen_tasks and [chosen_tasks[index] for index in indices]
            answers.update(zip(indices, self._generate_batch(tensors, max_new_tokens, tasks), strict=True))
        return [answers[index] for index in range(len(prompts))]

    def add_task(self, name: str, adapter_folder: str | Path, prompts: Sequence[str]) -> None:
        """Add a task from a PEFT adapter and example prompts, which the router needs. Nothing is trained."""
        self._check_tasks_can_change("added")
        if not name.strip():
            raise UserError(f"the task's name: given {name!r}; text that is not blank is needed")
        if name in self.tasks:
            raise UserError(f"task {name!r} is there already; remove it first, or give the new one another name")
        if not prompts:
            raise UserError(
                f"task {name!r}: no prompts given; the router needs some of the task's prompts to recognise others"
            )
        folder = Path(adapter_folder).expanduser().absolute()
        self._task_modules.add(name, folder)
        try:
            rows = [
                self._router.quantize(self._pool_hidden_states(tensors))
                for _, tensors in self._make_batches(prompts, 16)
            ]
            self._router.add(name, compute_statistics(torch.cat(rows), self._router.feature_map))
        except BaseException:
            self._task_modules.remove(name)
            raise
        self._artifact_paths[name] = folder

    def remove_task(self, name: str) -> None:
        """Remove a task. Routes and answers are then as if the task had never been added."""
        self._check_tasks_can_change("removed")
        self._check_task_exists(name)
        self._router.remove(name)
        self._task_modules.remove(name)
        del self._artifact_paths[name]

    def save_export(self, folder: str | Path) -> None:
        """Write an export with the present tasks."""
        write_export(
            dataclasses.replace(self._description, tasks=dict(self._artifact_paths)), Path(folder).expanduser()
        )

    @property
    def _router(self) -> Router:
        """The task router. Raise UserError if there is none."""
        if self._description.router is None:
            raise UserError(
                "this model has no task router (its run has router: oracle); "
                f"name the task (task=..., --task); tasks here: {', '.join(self.tasks)}"
            )
        return self._description.router

    def _make_batches(self, prompts: Sequence[str], size: int) -> Iterator[tuple[list[int], PromptBatch]]:
        """Yield batches with the indices of their prompts. Sorting the prompts by length saves padding."""
        if isinstance(prompts, str):
            raise UserError("prompts: given a single text; a list of texts is needed")
        if size < 1:
            raise UserError(f"batch_size: given {size}; a whole number of at least 1 is needed")
        samples = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                check_text(prompt, f"prompt {number}")
            except BadRecord as error:
                raise UserError(f"{error}; give text") from None
            if not prompt.strip():
                raise UserError(f"prompt {number} is empty; give some text")
            samples.append(Sample(prompt, "", (), f"prompt {number}"))
        limit = self._description.training.prompt_limit
        ids = encode_prompts(samples, self._tokenizer, max_length=limit + 1, answer_budget=1).ids
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            tensors = collate_prompts(
                [ids[index] for index in indices], pad_id(self._tokenizer), prepended_bos_id(self._tokenizer)
            )
            yield indices, tensors.to(self._reference_tensor.device)

    def _generate_batch(
        self, tensors: PromptBatch, max_new_tokens: int, tasks: list[str | None] | None
    ) -> list[Answer]:
        routes: list[Route] = []

        def choose_slots(pooled: torch.Tensor) -> list[int | None]:
            routes.extend(_route_prompts(self._router, pooled))
            return [self._task_modules.get_slot(route.task) for route in routes]

        slots = None  # None: `choose_slots` is called during the first pass
        if tasks is not None:
            slots = [self._task_modules.get_slot(task) for task in tasks]
        elif self._task_modules.first_adapted_layer < self._router.spec.layer:
            slots = choose_slots(self._pool_hidden_states(tensors))
        with torch.no_grad(), self._routing.route_prompts(tensors.prompt_spans, choose_slots):
            if slots is not None:
                self._routing.assign_slots(slots, self._reference_tensor)
            eos, pad = self._tokenizer.eos_token_id, pad_id(self._tokenizer)
            token_ids = generate(self._module, tensors, max_new_tokens, eos, pad)
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in token_ids]
        if tasks is not None:
            return [Answer(text, task, None, None) for text, task in zip(texts, tasks, strict=True)]
        return [Answer(text, r.task, r.margin, r.distance) for text, r in zip(texts, routes, strict=True)]

    def _pool_hidden_states(self, tensors: PromptBatch) -> torch.Tensor:
        """Pool the prompts' hidden states at the feature layer, where the pass of the base model ends."""
        pooled_states: list[torch.Tensor] = []  # one entry: [prompts, hidden_size]

        def store_and_stop(pooled: torch.Tensor) -> list[int | None]:
            pooled_states.append(pooled)
            raise _StopForward

        with (
            torch.no_grad(),
            self._routing.route_prompts(tensors.prompt_spans, store_and_stop),
            contextlib.suppress(_StopForward),
        ):
            self._module(
                input_ids=tensors.input_ids,
                attention_mask=tensors.attention_mask,
                position_ids=tensors.position_ids,
                use_cache=False,
            )
        return pooled_states[0]

    def _check_task_exists(self, name: str) -> None:
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise UserError(f"task {name!r} is not there{did_you_mean(name, self.tasks)}; tasks here: {known}")

    def _check_tasks_can_change(self, action: str) -> None:
        if self._task_modules.fixed_reason:
            raise UserError(
                f"no task can be {action}: {self._task_modules.fixed_reason}; train another stream, and export that run"
            )


def _route_prompts(router: Router, pooled: torch.Tensor) -> list[Route]:
    routes = router.route(router.quantize(pooled))
    columns = routes.task, routes.margin.tolist(), routes.distance.tolist()
    return [Route(*fields) for fields in zip(*columns, strict=True)]


class _StopForward(Exception):
    """Ends a forward pass at the feature layer."""


def load(
    folder: str | Path, base: str | None = None, device: str | None = None, slots: int | None = None
) -> ServingModel:
    """Load an export.

    `base`: the folder of the base model, if it has moved since the export was written. `device`: by default a GPU if
    there is one. `slots`: the largest number of tasks, if adapters will be added; by default the present number.
    """
    return open_model(read_bundle_description(Path(folder).expanduser().absolute(), base), device, slots)


def open_model(description: BundleDescription, device: str | None = None, slots: int | None = None) -> ServingModel:
    """Build the model of a bundle; `device` and `slots` as in `load`."""
    count = len(description.tasks)
    if slots is not None and description.kind == EXPERTS:
        raise UserError(
            f"slots: given {slots}, but no task can be added: {SubExpertServingBank.fixed_reason}; leave it out"
        )
    if slots is not None and slots < count:
        raise UserError(f"slots: given {slots}; there are {count} tasks, so at least that many are needed")
    return ServingModel(description, torch.device(device) if device else comm.device(), slots or count)
