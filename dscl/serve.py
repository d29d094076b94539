"""Answering with what was learnt: a base model, an adapter a task, and the router that gives each prompt its own.

    model = dscl.load("out/export")
    model.route(["Some prompt"])            # which task each prompt belongs to
    model.generate(["Some prompt"])         # the answer of that task's adapter, or of the base model

A folder that holds all of this but the base model is an export. Nothing here needs DeepSpeed or a process group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import nn

from dscl import dist
from dscl.config import nearest, parse, plain
from dscl.data.batches import PromptBatch, prompt_batch
from dscl.data.encode import bos_id, encode_prompts, fingerprint
from dscl.data.records import fields_of, numbered, read_bytes, read_json, read_lines
from dscl.data.task import BadRecord, Sample, check_text
from dscl.errors import Failure, UserError
from dscl.maths.rls import gather
from dscl.model.adapters import CONFIG, WEIGHTS, Adapter, file_name, read_adapter
from dscl.model.backbone import DTYPES, Backbone, ModelConfig, open_backbone
from dscl.model.decode import generate
from dscl.model.routed import Bank, RoutedLinear, add_routed
from dscl.model.routing import Routing, layer_of, put
from dscl.model.tokenizer import load_tokenizer, pad_id
from dscl.router import Router, Spec

FORMAT = 1
DESCRIPTION, ADAPTERS, ROUTER, TOKENIZER = "dscl.json", "adapters", "router.safetensors", "tokenizer"
# What transformers reads a tokenizer from; the model's configuration can decide which kind of tokenizer it makes.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "config.json",
)  # fmt: skip
PROMPT_FILES = (".txt", ".json", ".jsonl")


@dataclass(frozen=True)
class Description:
    """What there is to serve."""

    model: ModelConfig  # the base, and the tokenizer's folder
    seed: int  # of a base that is built from a shape
    tasks: dict[str, Path]  # their adapters' folders
    router: Router


@dataclass(frozen=True)
class Route:
    """Where a prompt goes; see `dscl.router.Routes`."""

    task: str | None
    margin: float
    distance: float


@dataclass(frozen=True)
class Answer:
    text: str
    task: str | None  # whose adapter gave it; None: the base model alone
    margin: float | None  # None where the caller had named the task
    distance: float | None


class Model:
    """A base model with routed adapters. A prompt is one as the tasks' templates make it, and is read as in training.

    Usually a batch needs one pass: the route is decided when the prompts' features appear, on the way. An adapter that
    reaches below the feature layer, as those of other makers do, has to be chosen before; then the prompts pass through
    the layers below a first time, without adapters, to be routed.
    """

    def __init__(self, description: Description, device: torch.device, slots: int) -> None:
        spec = description.router.spec
        backbone = open_base(description)
        self._description, self._router, self._tokenizer = description, description.router, backbone.tokenizer
        self._router.device = device
        self._folders = dict(description.tasks)
        module = backbone.build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                values = backbone.weights.read(name, parameter.shape, 0, math.prod(parameter.shape))
                parameter.copy_(values.view(parameter.shape))
        self._module: Any = module.to(device).eval()
        self._shapes = {
            name: (layer.out_features, layer.in_features)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        }
        self._like = torch.empty(0, dtype=backbone.dtype, device=device)
        self._routing = Routing(slots, rank=0)  # the bank gets the rank and the layers that the adapters need
        self._bank = add_routed(self._module, self._routing, spec.layer, ())
        self._hold([self._read(name, folder) for name, folder in self._folders.items()])

    @property
    def tasks(self) -> list[str]:
        return self._router.names

    def route(self, prompts: Sequence[str], batch: int = 16) -> list[Route]:
        """Which task each prompt belongs to. The layers above the features are not run."""
        routes: dict[int, Route] = {}
        for places, tensors in self._batches(prompts, batch):
            routes.update(zip(places, self._decide(self._pooled(tensors)), strict=True))
        return [routes[place] for place in range(len(prompts))]

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        task: str | EllipsisType | None = ...,
        batch: int = 16,
    ) -> list[Answer]:
        """Greedy answers. A `task` that is given is used for all prompts, and nothing is routed; None: no adapter."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: given {max_new_tokens}; a whole number of at least 1 is needed")
        if isinstance(task, str):
            self._check_there(task)
        answers: dict[int, Answer] = {}
        for places, tensors in self._batches(prompts, batch):
            answers.update(zip(places, self._answer(tensors, max_new_tokens, task), strict=True))
        return [answers[place] for place in range(len(prompts))]

    def add(self, name: str, adapter_folder: str | Path, prompts: Sequence[str]) -> None:
        """A further task, of a PEFT adapter and some of the task's prompts; nothing is trained."""
        if not name.strip():
            raise UserError(f"the task's name: given {name!r}; text that is not blank is needed")
        if name in self.tasks:
            raise UserError(f"task {name!r} is there already; remove it first, or name the new one otherwise")
        if not prompts:
            raise UserError(f"task {name!r}: no prompts given; some of the task's prompts are needed to know others by")
        folder = Path(adapter_folder).expanduser().absolute()
        self._hold([self._read(name, folder)])
        try:
            rows = [self._router.rows(self._pooled(tensors)) for _, tensors in self._batches(prompts, 16)]
            self._router.add(name, gather(torch.cat(rows), self._router.expansion))
        except BaseException:
            self._bank.remove(name)
            raise
        self._folders[name] = folder

    def remove(self, name: str) -> None:
        """What is left routes and answers as if the task had never been there."""
        self._check_there(name)
        self._router.remove(name)
        self._bank.remove(name)
        del self._folders[name]

    def save(self, folder: str | Path) -> None:
        """Write an export, as it is now."""
        tasks = {name: self._folders[name] for name in self.tasks}
        write(dataclasses.replace(self._description, tasks=tasks), Path(folder).expanduser())

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
        limit = self._router.spec.prompt_limit
        ids = encode_prompts(samples, self._tokenizer, max_length=limit + 1, room=1).ids
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            tensors = prompt_batch([ids[place] for place in places], pad_id(self._tokenizer), bos_id(self._tokenizer))
            yield places, tensors.to(self._like.device)

    def _answer(self, tensors: PromptBatch, max_new_tokens: int, task: str | EllipsisType | None) -> list[Answer]:
        routes: list[Route] = []

        def decide(pooled: torch.Tensor) -> list[int | None]:
            routes.extend(self._decide(pooled))
            return [self._bank.slot(route.task) for route in routes]

        slots = None  # decided on the way
        if not isinstance(task, EllipsisType):
            slots = [self._bank.slot(task)] * len(tensors.prompts)
        elif any(layer_of(path) < self._router.spec.layer for path in self._bank.layers):
            slots = decide(self._pooled(tensors))
        with torch.no_grad(), self._routing.answering(tensors.prompts, decide):
            if slots is not None:
                self._routing.choose(slots, self._like)
            eos, pad = self._tokenizer.eos_token_id, pad_id(self._tokenizer)
            rows = generate(self._module, tensors, max_new_tokens, eos, pad)
        texts = [self._tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        if not isinstance(task, EllipsisType):
            return [Answer(text, task, None, None) for text in texts]
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

    def _decide(self, pooled: torch.Tensor) -> list[Route]:
        routes = self._router.route(self._router.rows(pooled))
        numbers = zip(routes.task, routes.margin.tolist(), routes.distance.tolist(), strict=True)
        return [Route(*three) for three in numbers]

    def _check_there(self, name: str) -> None:
        if name not in self.tasks:
            there = ", ".join(self.tasks) or "none"
            raise UserError(f"task {name!r} is not there{nearest(name, self.tasks)}; tasks here: {there}")

    def _read(self, name: str, folder: Path) -> Adapter:
        return dataclasses.replace(read_adapter(folder, self._shapes), name=name)

    def _hold(self, adapters: Sequence[Adapter]) -> None:
        """Put adapters into the bank, which grows in layers and rank where they need more."""
        pairs = {path: pair for adapter in adapters for path, pair in adapter.layers.items()}
        rank = max([self._routing.rank, *(len(p.a) for adapter in adapters for p in adapter.layers.values())])
        if rank > self._routing.rank or not set(pairs) <= set(self._bank.layers):
            adapters = [*(self._read(name, self._folders[name]) for name in self._bank.names), *adapters]
            self._routing.rank = rank
            for path in {**self._bank.layers, **pairs}:
                plain = self._module.get_submodule(path)
                put(self._module, path, RoutedLinear(plain, self._routing, self._like))
            self._bank = Bank(self._module, self._routing)
        for adapter in adapters:
            self._bank.add(adapter)


class _FarEnough(Exception):
    """Ends a pass of which only the features are wanted."""


def load(folder: str | Path, base: str | None = None, device: str | None = None, slots: int | None = None) -> Model:
    """The model that an export describes.

    `base`: where the base model lies, if not where it lay when the export was written. `device`: a GPU where there is
    one. `slots`: room for so many tasks, should any be added; by default for those that are there.
    """
    return open_model(read_description(Path(folder).expanduser().absolute(), base), device, slots)


def open_model(description: Description, device: str | None = None, slots: int | None = None) -> Model:
    count = len(description.tasks)
    if slots is not None and slots < count:
        raise UserError(f"slots: given {slots}; there are {count} tasks, so at least that many are needed")
    return Model(description, torch.device(device) if device else dist.device(), slots or count)


def open_base(description: Description) -> Backbone:
    """The base model, not built yet; refused if it is not the one that the router's features are of."""
    spec = description.router.spec
    dtype = DTYPES.get(spec.precision)
    if dtype is None:
        raise UserError(f"precision: given {spec.precision!r}; allowed: {', '.join(DTYPES)}; export the run again")
    backbone = open_backbone(description.model, seed=description.seed, dtype=dtype, cache=Path(), texts=lambda: ())
    here = dataclasses.replace(
        spec,
        dim=backbone.architecture.hidden_size,
        model=backbone.fingerprint(),
        tokenizer=fingerprint(backbone.tokenizer),
    )
    if difference := spec.difference(here):
        raise UserError(
            f"{description.model.name or 'the base model'}: {difference}; give the base model and the tokenizer of the "
            "training"
        )
    return backbone


def read_description(folder: Path, base: str | None = None) -> Description:
    """What an export holds; `base` in place of the base model that it names."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder}: no export there (it would hold {DESCRIPTION}); give one that dscl export wrote")
    document = read_json(path)
    try:
        version = document["format"]
        if version != FORMAT:
            raise UserError(f"{path}: an export of format {version}, this version reads {FORMAT}; export the run again")
        spec = parse(Spec, document["features"], f"{path}: features")
        model, seed = parse(ModelConfig, document["model"], f"{path}: model"), document["seed"]
        adapters = {task: folder / ADAPTERS / file_name(task) for task in document["tasks"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the description of an export ({error!r}); copy it again") from None
    if base is not None:
        model = ModelConfig(name=lasting(base))
    elif model.name is not None and Path(model.name).is_absolute() and not Path(model.name).is_dir():
        raise UserError(
            f"{folder}: its base model was at {model.name}, and is not there; say where it lies now (base=..., --base)"
        )
    router = Router.load(folder / ROUTER, spec)
    if set(router.names) != set(adapters):
        raise UserError(
            f"{folder}: {DESCRIPTION} names the tasks {', '.join(adapters)}, {ROUTER} holds {', '.join(router.names)}; "
            "the two do not belong together, so copy both again"
        )
    return Description(dataclasses.replace(model, tokenizer=str(folder / TOKENIZER)), seed, adapters, router)


def write(description: Description, folder: Path) -> None:
    """Write an export, in place of an earlier one; a process that is killed leaves no half of one by that name."""
    refuse_other(folder)
    folder = folder.resolve()
    if not description.tasks:
        raise UserError(f"{folder}: there is no task to write; add one first")
    model, router = description.model, description.router
    assert model.tokenizer is not None
    document = {
        "format": FORMAT,
        "model": {"name": model.name, "shape": model.shape},
        "seed": description.seed,
        "tasks": list(description.tasks),
        "features": plain(router.spec),
    }
    partial = old = folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        partial, old = workshop / "new", workshop / "old"
        for name, adapter in description.tasks.items():
            _copy(adapter, partial / ADAPTERS / file_name(name), (CONFIG, WEIGHTS))
        _copy(Path(model.tokenizer), partial / TOKENIZER, TOKENIZER_FILES)
        if fingerprint(load_tokenizer(partial / TOKENIZER)) != router.spec.tokenizer:
            raise UserError(f"{model.tokenizer}: not the tokenizer that the router was built with; restore it there")
        router.save(partial / ROUTER)
        (partial / DESCRIPTION).write_text(json.dumps(document, indent=1, ensure_ascii=False), "utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except OSError as error:
        raise Failure(f"{folder}: the export cannot be written ({error.strerror or error})") from None
    finally:
        if partial is not folder:
            shutil.rmtree(partial.parent, ignore_errors=True)


def lasting(name: str) -> str:
    """A model's name that holds from any working directory: the full path of a folder, or a hub id as it stands."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def refuse_other(folder: Path) -> None:
    """An export takes the place of nothing but an export."""
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder}: something else is there; give a new or an empty folder, or that of an export")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt, one a line; .json, a list of texts or of {"prompt": ...}; .jsonl, such a one a line.

    Lines that are blank are left out; what else stands in a record is of no concern.
    """
    if path.suffix not in PROMPT_FILES:
        raise UserError(f"{path}: a file of another kind; allowed: {', '.join(PROMPT_FILES)}")
    if path.suffix == ".txt":
        prompts = split_lines(read_bytes(path), str(path))
    elif path.suffix == ".jsonl":
        prompts = [_prompt(record, where) for where, record in read_lines(path)]
    else:
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: holds a {type(records).__name__}; a list of prompts is needed")
        prompts = [_prompt(record, where) for where, record in numbered(path, records)]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; give at least one")
    return prompts


def split_lines(content: bytes, where: str) -> list[str]:
    """One prompt a line; those that are blank are left out."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8; convert it") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _prompt(record: Any, where: str) -> str:
    try:
        if isinstance(record, BadRecord):
            raise record
        prompt = record if isinstance(record, str) else fields_of(record, ("prompt",))["prompt"]
        check_text(prompt, "the prompt")
        if not prompt.strip():
            raise BadRecord("the prompt is empty")
    except BadRecord as error:
        raise UserError(f"{where}: {error}; correct it there") from None
    return str(prompt)


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in patterns):
            shutil.copyfile(file, target / file.name)
