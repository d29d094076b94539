"""Answering with what was learnt: a base model, what each task has left, and the router that gives each prompt its own.

    model = dscl.load("out/export")
    model.route(["Some prompt"])            # which task each prompt belongs to
    model.generate(["Some prompt"])         # the answer of that task's adapter or sub-experts, or of the base model

Nothing here needs DeepSpeed or a process group.
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

from dscl.config.parsing import nearest
from dscl.data.batches import PromptBatch, prompt_batch
from dscl.data.encode import bos_id, encode_prompts
from dscl.data.task import BadRecord, Sample, check_text
from dscl.distributed import comm
from dscl.maths.rls import gather
from dscl.methods.rls_router import Router
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.serving_bank import Adapters, Claimed
from dscl.model.generation import generate
from dscl.model.tokenizer import pad_id
from dscl.model.weight_overlay import laid_over
from dscl.serving.bundle import EXPERTS, Description, open_base, read_description, write
from dscl.utils.errors import UserError


@dataclass(frozen=True)
class Route:
    """Where a prompt goes; see `dscl.methods.rls_router.Routes`."""

    task: str | None
    margin: float
    distance: float


@dataclass(frozen=True)
class Answer:
    text: str
    task: str | None  # whose adapter or sub-experts gave it; None: the model without any
    margin: float | None  # None where the caller had named the task
    distance: float | None


class Model:
    """A base model and what tasks have left beside it. A prompt is one as the tasks' templates make it, and is read as
    in training.

    Usually a batch needs one pass: the route is decided when the prompts' features appear, on the way. An adapter that
    reaches below the feature layer, as those of other makers do, has to be chosen before; then the prompts pass through
    the layers below a first time, without adapters, to be routed.
    """

    def __init__(self, description: Description, device: torch.device, slots: int) -> None:
        backbone = open_base(description)
        self._description, self._tokenizer = description, backbone.tokenizer
        self._parts = dict(description.tasks)
        layer = None
        if description.router is not None:
            description.router.device, layer = device, description.router.spec.layer
        module = backbone.build()
        read = laid_over(backbone.weights.read, description.trained)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                values = read(name, parameter.shape, 0, math.prod(parameter.shape))
                parameter.copy_(values.view(parameter.shape))
        self._module: Any = module.to(device).eval()
        self._like = torch.empty(0, dtype=backbone.dtype, device=device)
        self._routing = Routing(slots, rank=0)  # a bank of adapters sets the rank that these need
        self._learnt: Adapters | Claimed
        if description.kind == EXPERTS:
            self._learnt = Claimed(self._module, self._routing, layer, self._parts)
        else:
            assert layer is not None
            self._learnt = Adapters(self._module, self._routing, layer, self._parts)

    @property
    def tasks(self) -> list[str]:
        return list(self._parts)

    def route(self, prompts: Sequence[str], batch: int = 16) -> list[Route]:
        """Which task each prompt belongs to. The layers above the features are not run."""
        routes: dict[int, Route] = {}
        for places, tensors in self._batches(prompts, batch):
            routes.update(zip(places, _routes(self._router, self._pooled(tensors)), strict=True))
        return [routes[place] for place in range(len(prompts))]

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        task: str | Sequence[str | None] | EllipsisType | None = ...,
        batch: int = 16,
    ) -> list[Answer]:
        """Greedy answers. A `task` that is given is used for all prompts, or a list of them for one prompt each, and
        nothing is routed; None: no task's adapter or sub-experts."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: given {max_new_tokens}; a whole number of at least 1 is needed")
        told: list[str | None] | None = None
        if not isinstance(task, EllipsisType):
            told = [task] * len(prompts) if task is None or isinstance(task, str) else list(task)
            if len(told) != len(prompts):
                raise UserError(f"task: given {len(told)} for {len(prompts)} prompts; give one each, or one for all")
            for name in dict.fromkeys(told):
                if name is not None:
                    self._check_there(name)
        answers: dict[int, Answer] = {}
        for places, tensors in self._batches(prompts, batch):
            tasks = told and [told[place] for place in places]
            answers.update(zip(places, self._answer(tensors, max_new_tokens, tasks), strict=True))
        return [answers[place] for place in range(len(prompts))]

    def add(self, name: str, adapter_folder: str | Path, prompts: Sequence[str]) -> None:
        """A further task, of a PEFT adapter and some of the task's prompts; nothing is trained."""
        self._check_loose("added")
        if not name.strip():
            raise UserError(f"the task's name: given {name!r}; text that is not blank is needed")
        if name in self.tasks:
            raise UserError(f"task {name!r} is there already; remove it first, or name the new one otherwise")
        if not prompts:
            raise UserError(f"task {name!r}: no prompts given; some of the task's prompts are needed to know others by")
        folder = Path(adapter_folder).expanduser().absolute()
        self._learnt.add(name, folder)
        try:
            rows = [self._router.rows(self._pooled(tensors)) for _, tensors in self._batches(prompts, 16)]
            self._router.add(name, gather(torch.cat(rows), self._router.expansion))
        except BaseException:
            self._learnt.remove(name)
            raise
        self._parts[name] = folder

    def remove(self, name: str) -> None:
        """What is left routes and answers as if the task had never been there."""
        self._check_loose("removed")
        self._check_there(name)
        self._router.remove(name)
        self._learnt.remove(name)
        del self._parts[name]

    def save(self, folder: str | Path) -> None:
        """Write an export, as it is now."""
        write(dataclasses.replace(self._description, tasks=dict(self._parts)), Path(folder).expanduser())

    @property
    def _router(self) -> Router:
        """Refused where there is none."""
        if self._description.router is None:
            raise UserError(
                "this model was trained with the task given, so it does not find out which task a prompt belongs to; "
                f"name the task (task=..., --task); tasks here: {', '.join(self.tasks)}"
            )
        return self._description.router

    def _batches(self, prompts: Sequence[str], size: int) -> Iterator[tuple[list[int], PromptBatch]]:
        """Batches, each with its prompts' places; alike lengths meet, so that there is little padding."""
        if isinstance(prompts, str):
            raise UserError("prompts: given a single text; a list of texts is needed")
        if size < 1:
            raise UserError(f"batch: given {size}; a whole number of at least 1 is needed")
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
        ids = encode_prompts(samples, self._tokenizer, max_length=limit + 1, room=1).ids
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            tensors = prompt_batch([ids[place] for place in places], pad_id(self._tokenizer), bos_id(self._tokenizer))
            yield places, tensors.to(self._like.device)

    def _answer(self, tensors: PromptBatch, max_new_tokens: int, tasks: list[str | None] | None) -> list[Answer]:
        routes: list[Route] = []

        def decide(pooled: torch.Tensor) -> list[int | None]:
            routes.extend(_routes(self._router, pooled))
            return [self._learnt.slot(route.task) for route in routes]

        slots = None  # decided on the way
        if tasks is not None:
            slots = [self._learnt.slot(task) for task in tasks]
        elif self._learnt.lowest < self._router.spec.layer:
            slots = decide(self._pooled(tensors))
        with torch.no_grad(), self._routing.answering(tensors.prompts, decide):
            if slots is not None:
                self._routing.choose(slots, self._like)
            eos, pad = self._tokenizer.eos_token_id, pad_id(self._tokenizer)
            rows = generate(self._module, tensors, max_new_tokens, eos, pad)
        texts = [self._tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        if tasks is not None:
            return [Answer(text, task, None, None) for text, task in zip(texts, tasks, strict=True)]
        return [Answer(text, r.task, r.margin, r.distance) for text, r in zip(texts, routes, strict=True)]

    def _pooled(self, tensors: PromptBatch) -> torch.Tensor:
        """The pooled hidden states of a batch, by a pass of the bare model that ends at the feature layer."""
        found: list[torch.Tensor] = []

        def take(pooled: torch.Tensor) -> list[int | None]:
            found.append(pooled)
            raise _FarEnough

        with torch.no_grad(), self._routing.answering(tensors.prompts, take), contextlib.suppress(_FarEnough):
            self._module(
                input_ids=tensors.input_ids,
                attention_mask=tensors.attention_mask,
                position_ids=tensors.position_ids,
                use_cache=False,
            )
        return found[0]

    def _check_there(self, name: str) -> None:
        if name not in self.tasks:
            there = ", ".join(self.tasks) or "none"
            raise UserError(f"task {name!r} is not there{nearest(name, self.tasks)}; tasks here: {there}")

    def _check_loose(self, how: str) -> None:
        if self._learnt.fixed:
            raise UserError(f"no task can be {how}: {self._learnt.fixed}; train another stream, and export that run")


def _routes(router: Router, pooled: torch.Tensor) -> list[Route]:
    found = router.route(router.rows(pooled))
    return [Route(*three) for three in zip(found.task, found.margin.tolist(), found.distance.tolist(), strict=True)]


class _FarEnough(Exception):
    """Ends a pass of which only the features are wanted."""


def load(folder: str | Path, base: str | None = None, device: str | None = None, slots: int | None = None) -> Model:
    """The model that an export describes.

    `base`: where the base model lies, if not where it lay when the export was written. `device`: a GPU where there is
    one. `slots`: of adapters, room for so many tasks, should any be added; by default for those that are there.
    """
    return open_model(read_description(Path(folder).expanduser().absolute(), base), device, slots)


def open_model(description: Description, device: str | None = None, slots: int | None = None) -> Model:
    count = len(description.tasks)
    if slots is not None and description.kind == EXPERTS:
        raise UserError(f"slots: given {slots}, but no task can be added: {Claimed.fixed}; leave it out")
    if slots is not None and slots < count:
        raise UserError(f"slots: given {slots}; there are {count} tasks, so at least that many are needed")
    return Model(description, torch.device(device) if device else comm.device(), slots or count)
