"""The recipe: one YAML file plus dotted overrides, resolved into frozen dataclasses that say everything about a run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dscl.config.deepspeed_json import OWNED_BY_JSON, OWNED_BY_RECIPE
from dscl.config.methods import method_config
from dscl.config.parsing import check_names, convert, key_of, nearest, override, parse, plain, read_yaml, shorten, show
from dscl.config.schema import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    ObserveConfig,
    TaskConfig,
    TopConfig,
    TrainConfig,
)
from dscl.utils.errors import UserError

# Changing these between two starts of one run does not change what it computes.
MAY_CHANGE = (
    "run_dir",
    "observe",
    "checkpoint",
    "data.cache_dir",
    "deepspeed",
    "evaluate.batch",
    "method.ridge",
    "method.reject",
    "method.when_short",
    "method.when_full",
    "method.weights.when_short",
)
# How keys begin that people look for at a recipe's top level or under `train`, and that stand in the DeepSpeed JSON.
INSIDE_ZERO = ("zero", "stage", "offload", "overlap_", "contiguous_", "reduce_", "allgather_", "sub_group")


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
        return Path(os.path.expanduser(self.run_dir))

    def document(self) -> dict[str, Any]:
        """The resolved recipe, complete: what `recipe.yaml` of a run holds."""
        return {name: value for name, value in plain(self).items() if name != "source"}

    def text(self) -> str:
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110)

    def deepspeed_path(self) -> Path:
        """The DeepSpeed JSON: as given, beside the recipe or above it, or among those that come with dscl."""
        given = Path(os.path.expanduser(self.deepspeed))
        home = Path(__file__).resolve().parent.parent
        for place in (given, *(above / given for above in Path(self.source).resolve().parents), home / given):
            if place.is_file():
                return place
        there = sorted(path.name for path in (home / "ds_configs").glob("*.json"))
        raise UserError(
            f"deepspeed: given {self.deepspeed!r}; no such file here or beside the recipe"
            f"{nearest(given.name, there)}; dscl brings ds_configs/ with {', '.join(there)}"
        )


EXAMPLE = "{name: sst2, path: data/sst2}"
NAMES = (
    *(field.name for field in dataclasses.fields(TopConfig)),
    "method",
    "stream",
    "stream_defaults",
    "order",
    "folder",
    *SECTIONS,
)


def read_recipe(path: str, assignments: Iterable[str] = ()) -> Recipe:
    """The recipe of a file, with overrides, or a UserError that names the key that is wrong.

    An override of `method.name` means another method: the file's keys for the one that it names do not apply to it.
    """
    given, assignments = read_yaml(path), list(assignments)
    named = [override({}, [word])["method"]["name"] for word in assignments if word.startswith("method.name=")]
    section = given.get("method")
    if named and isinstance(section, dict) and named[-1] != section.get("name", "sequential"):
        given = {**given, "method": {}}
    return resolve(override(given, assignments), source=path)


def read_run(run_dir: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe that a run was started with, for an evaluation; only `evaluate` may be overridden."""
    for assignment in assignments:
        if not assignment.startswith("evaluate."):
            raise UserError(
                f"{assignment}: only evaluate.* can be changed for an evaluation; the rest is the run's own"
            )
    stored = Path(run_dir).expanduser() / "recipe.yaml"
    if not stored.is_file():
        raise UserError(f"{run_dir}: no run there (it would hold recipe.yaml); give the run_dir of a training run")
    place = f"run_dir={json.dumps(run_dir, ensure_ascii=False)}"
    return read_recipe(str(stored), [*assignments, place])


def resolve(given: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check everything that can be checked without reading data or a model."""
    _refuse_deepspeed_keys(given, NAMES)
    check_names(given, NAMES)
    if isinstance(given.get("deepspeed"), Mapping):
        raise UserError("deepspeed: given a mapping; the path of a DeepSpeed JSON is needed, so put these keys there")
    given = _placed(given)
    top = parse(TopConfig, {field: given[field] for field in _names(TopConfig) if field in given})
    method = _section(given, "method")
    name = method.get("name", "sequential")
    if not isinstance(name, str):
        raise UserError(f"method.name: given {show(name)}; the name of a method is needed, for example sequential")
    return Recipe(
        method=_parse(method_config(name), method, "method"),
        stream=_stream(given),
        source=source,
        **vars(top),
        **{section: _parse(config, _section(given, section), section) for section, config in SECTIONS.items()},
    )


def _placed(given: Mapping[str, Any]) -> dict[str, Any]:
    """With every path in `folder`, where that is given: the tasks' (by default their names), and the model and the
    held-out texts where they are there. A resolved recipe names the places themselves."""
    given = dict(given)
    if (folder := given.pop("folder", None)) is None:
        return given
    if not isinstance(folder, str) or not Path(folder).expanduser().is_dir():
        raise UserError(f"folder: given {show(folder)}, which is no folder; give the one in which the data lies")
    if isinstance(given.get("stream"), list):
        given["stream"] = [
            {**entry, "path": os.path.join(folder, str(entry.get("path", entry["name"])))}
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
            else entry
            for entry in given["stream"]
        ]
    for section, name in (("model", "name"), ("evaluate", "heldout")):
        values = given.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            inside = os.path.join(folder, values[name])
            if Path(inside).expanduser().exists():
                given[section] = {**values, name: inside}
    return given


def difference(old: Any, new: Any, path: str = "", but: Sequence[str] = MAY_CHANGE) -> str:
    """The first key in which two resolved recipes differ, except in these (by default: all that do not change a run's
    result); else empty."""
    if path in but or old == new:
        return ""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(str(name), old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *both) for index, both in enumerate(zip(old, new, strict=True))]
    else:
        return f"{path} (there: {_summary(old)}, given: {_summary(new)})"
    found = (difference(before, after, f"{path}.{name}" if path else name, but) for name, before, after in pairs)
    return next(filter(None, found), "")


def _summary(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else shorten(repr(value))


def _names(config: type) -> tuple[str, ...]:
    return tuple(key_of(field) for field in dataclasses.fields(config))


def _section(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section that is left out, or whose keys are all commented out, is empty."""
    section = given.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{name}: given {show(section)}; a mapping of keys is needed")
    return section


def _parse(config: type, given: Mapping[str, Any], path: str) -> Any:
    _refuse_deepspeed_keys(given, _names(config), path + ".")
    return parse(config, given, path)


def _stream(given: Mapping[str, Any]) -> tuple[TaskConfig, ...]:
    entries = given.get("stream")
    if not isinstance(entries, list) or not entries:
        what = "an empty list" if entries == [] else show(entries)
        raise UserError(f"stream: given {what}; a list of tasks is needed, for example [{EXAMPLE}]")
    shared = _section(given, "stream_defaults")
    _refuse_deepspeed_keys(shared, _names(TaskConfig), "stream_defaults.")
    defaults = convert(TaskConfig, shared, "stream_defaults")
    tasks = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"stream.{index}: given {show(entry)}; a mapping is needed, for example {EXAMPLE}")
        tasks.append(parse(TaskConfig, {**defaults, **entry}, f"stream.{index}"))
    return _ordered(tasks, given.get("order"))


def _ordered(tasks: Sequence[TaskConfig], order: Any) -> tuple[TaskConfig, ...]:
    """Those that `order` names, in its order; without it all, as they stand."""
    if order is None:
        return tuple(tasks)
    named = {task.name: task for task in tasks}
    if not isinstance(order, list) or not order:
        raise UserError(f"order: given {show(order)}; a list of names of the stream's tasks is needed")
    for index, name in enumerate(order):
        if name not in named:
            raise UserError(
                f"order.{index}: given {show(name)}, which is no task of the stream{nearest(str(name), named)}; "
                f"allowed: {', '.join(named)}"
            )
    if len(set(order)) < len(order):
        raise UserError(f"order: given {show(order)}, where a task comes twice; name each once")
    return tuple(named[name] for name in order)


def _refuse_deepspeed_keys(given: Mapping[str, Any], valid: Iterable[str], prefix: str = "") -> None:
    """Every setting has one owner: what DeepSpeed calls by another name is told here, instead of `no such key`."""
    owners = {name.partition(".")[0]: owner for name, owner in OWNED_BY_RECIPE.items()}
    for name in given:
        if name in valid or not isinstance(name, str):
            continue
        if name in owners:
            raise UserError(f"{prefix}{name}: a key of DeepSpeed; in a recipe it is {owners[name]}, so set that")
        if name in OWNED_BY_JSON or name.startswith(INSIDE_ZERO):
            raise UserError(
                f"{prefix}{name}: ZeRO, offload and communication belong to the DeepSpeed JSON; "
                "remove it here and name a file in deepspeed, for example deepspeed: ds_configs/zero3.json"
            )
