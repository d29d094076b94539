"""The recipe: one YAML file plus dotted overrides, resolved into frozen dataclasses that say everything about a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dscl.checkpoint import CheckpointConfig
from dscl.config import key, nearest, override, parse, plain, read_yaml
from dscl.data.task import DataConfig, TaskConfig
from dscl.engine import DTYPES, OWNED_BY_JSON, OWNED_BY_RECIPE
from dscl.errors import UserError
from dscl.evaluate import EvaluateConfig
from dscl.maths.schedule import SCHEDULES
from dscl.methods import find_method
from dscl.model.backbone import ModelConfig
from dscl.observe import ObserveConfig

# Changing these between two starts of one run does not change what it computes.
MAY_CHANGE = ("run_dir", "observe", "checkpoint", "data.cache_dir", "deepspeed", "evaluate.batch")


@dataclass(frozen=True)
class TrainConfig:
    lr: float = key(3.0e-4, above=0.0, help="peak learning rate")
    schedule: str = key("cosine", choices=SCHEDULES, help="decay after the warm-up, per task")
    warmup: float = key(0.03, at_least=0.0, at_most=1.0, help="share of a task's steps in which the rate rises")
    weight_decay: float = key(0.0, at_least=0.0, help="AdamW's decoupled weight decay")
    grad_clip: float = key(1.0, at_least=0.0, help="largest norm of a step's gradient; 0: no limit")
    epochs: int = key(1, at_least=1, help="passes over each task's training split")
    global_batch: int = key(16, at_least=1, help="samples in an optimizer step, over all ranks")
    micro_batch: int = key(4, at_least=1, help="rows that a rank passes through the model at once")
    max_length: int = key(256, at_least=8, help="tokens in a row; longer prompts are cut, answers never")
    packing: bool = key(False, help="put several samples into one row")
    precision: str = key("bf16", choices=tuple(DTYPES), help="precision of weights and activations; masters are fp32")
    non_finite: str = key("stop", choices=("stop", "skip"), help="at a loss that is NaN or infinite: stop, or skip the step")


@dataclass(frozen=True)
class Recipe:
    run_dir: str
    seed: int
    model: ModelConfig
    method: Any
    stream: tuple[TaskConfig, ...]
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    deepspeed: str
    checkpoint: CheckpointConfig
    observe: ObserveConfig
    source: str  # where the recipe stands; relative `deepspeed` paths are also looked for from there

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)

    def document(self) -> dict[str, Any]:
        """The resolved recipe, complete: what `recipe.yaml` of a run holds."""
        return {name: value for name, value in plain(self).items() if name != "source"}

    def text(self) -> str:
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110)

    def deepspeed_path(self) -> Path:
        """The DeepSpeed JSON: as given, beside the recipe or above it, or among those that come with dscl."""
        given = Path(self.deepspeed).expanduser()
        home = Path(__file__).resolve().parent.parent
        places = [given, *(above / given for above in Path(self.source).resolve().parents), home / given]
        for place in places:
            if place.is_file():
                return place
        there = sorted(p.name for p in (home / "ds_configs").glob("*.json"))
        raise UserError(
            f"deepspeed: given {self.deepspeed!r}; no such file here or beside the recipe"
            f"{nearest(given.name, there)}; dscl brings ds_configs/ with {', '.join(there)}"
        )


def read_recipe(path: str, assignments: Iterable[str] = ()) -> Recipe:
    """The recipe of a file, with overrides, or a UserError that names the key that is wrong."""
    return resolve(override(read_yaml(path), assignments), source=path)


def resolve(given: Mapping[str, Any], source: str = "recipe") -> Recipe:
    sections: dict[str, Any] = {
        "model": ModelConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "checkpoint": CheckpointConfig,
        "observe": ObserveConfig,
    }
    names = ["run_dir", "seed", *sections, "method", "stream", "stream_defaults", "deepspeed"]
    _refuse_deepspeed_keys(given)
    for name in given:
        if name not in names:
            raise UserError(f"{name}: no such key{nearest(str(name), names)}; allowed here: {', '.join(names)}")
    values = {name: parse(config, _section(given, name), name) for name, config in sections.items()}
    top = parse(_Top, {name: given[name] for name in ("run_dir", "seed", "deepspeed") if name in given})
    method = _section(given, "method")
    method_config = parse(find_method(method.get("name", "sequential")).Config, method, "method")
    return Recipe(
        method=method_config, stream=_stream(given), source=source, **vars(top), **values
    )


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """The first key, among those that matter to a run's result, in which two resolved recipes differ; else empty."""
    for name in {**old, **new}:
        dotted = f"{path}{name}"
        if dotted in MAY_CHANGE:
            continue
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if found := difference(before, after, f"{dotted}."):
                return found
        elif before != after:
            return f"{dotted} (there: {before!r}, given: {after!r})"
    return ""


@dataclass(frozen=True)
class _Top:
    run_dir: str = key(help="where the run writes everything")
    seed: int = key(0, at_least=0, help="decides data order, fresh weights and splits")
    deepspeed: str = key("ds_configs/zero1.json", help="a DeepSpeed JSON: ZeRO stage, offload, communication")


def _section(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = given.get(name, {})
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{name}: given {section!r}; a mapping of keys is needed")
    return section


def _stream(given: Mapping[str, Any]) -> tuple[TaskConfig, ...]:
    entries = given.get("stream")
    if not isinstance(entries, list) or not entries:
        raise UserError("stream: a list of tasks is needed, for example [{name: sst2, path: data/sst2}]")
    defaults = _section(given, "stream_defaults")
    tasks = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"stream.{index}: given {entry!r}; a mapping with name and path is needed")
        tasks.append(parse(TaskConfig, {**defaults, **entry}, f"stream.{index}"))
    return tuple(tasks)


def _refuse_deepspeed_keys(given: Mapping[str, Any]) -> None:
    train = given.get("train")
    places = (("", given), ("train.", train if isinstance(train, Mapping) else {}))
    for prefix, section in places:
        for name in section:
            if name in OWNED_BY_JSON or name in ("zero", "zero_stage", "stage", "offload_optimizer", "offload_param"):
                raise UserError(
                    f"{prefix}{name}: ZeRO, offload and communication belong to the DeepSpeed JSON; "
                    "remove it here and name a file in `deepspeed:`, for example ds_configs/zero3.json"
                )
            if name in OWNED_BY_RECIPE and name not in ("tensorboard",):
                raise UserError(f"{prefix}{name}: a DeepSpeed key; in a recipe it is {OWNED_BY_RECIPE[name]}")
