"""The recipe: one YAML file plus dotted overrides, resolved into frozen dataclasses with all settings of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dscl.config.deepspeed_json import OWNED_BY_JSON, OWNED_BY_RECIPE
from dscl.config.methods import find_preset
from dscl.config.parsing import (
    apply_overrides,
    check_key_names,
    describe_value,
    did_you_mean,
    key_name,
    parse_config,
    parse_partial,
    read_yaml,
    shorten_to_line,
    to_plain_data,
)
from dscl.config.schema import (
    SECTION_CONFIGS,
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

# Keys that may be changed when a run is resumed: they do not affect its results.
CHANGEABLE_KEYS = (
    "run_dir",
    "observe",
    "checkpoint",
    "data.cache_dir",
    "deepspeed",
    "evaluate.batch",
    "method.router.ridge",
    "method.router.ood_fallback",
    "method.constraint.on_full",
    "method.tune.on_full",
)
# Prefixes of DeepSpeed JSON keys that users may try at a recipe's top level or under `train`.
DEEPSPEED_KEY_PREFIXES = ("zero", "stage", "offload", "overlap_", "contiguous_", "reduce_", "allgather_", "sub_group")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: every setting of a run, checked, with defaults filled in."""

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
    source: str  # the recipe's file; relative `deepspeed` paths are also searched in the folders above it

    @property
    def run_folder(self) -> Path:
        """`run_dir` as a path, with `~` expanded."""
        return Path(os.path.expanduser(self.run_dir))

    def to_dict(self) -> dict[str, Any]:
        """The complete resolved recipe, as written to a run's `recipe.yaml`."""
        return {name: value for name, value in to_plain_data(self).items() if name != "source"}

    def to_yaml(self) -> str:
        """`to_dict` as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def find_deepspeed_json(self) -> Path:
        """The path of the DeepSpeed JSON: as given, in the recipe's folder or one above it, or shipped with dscl."""
        path = Path(os.path.expanduser(self.deepspeed))
        repository = Path(__file__).resolve().parents[2]
        for candidate in (
            path,
            *(parent / path for parent in Path(self.source).resolve().parents),
            repository / path,
        ):
            if candidate.is_file():
                return candidate
        shipped = sorted(file.name for file in (repository / "ds_configs").glob("*.json"))
        raise UserError(
            f"deepspeed: given {self.deepspeed!r}; no such file here or beside the recipe"
            f"{did_you_mean(path.name, shipped)}; dscl brings ds_configs/ with {', '.join(shipped)}"
        )


PART_KEYS = {"tune", "constraint", "router", "loss"}  # the keys of `method` that select a part by its name
PART_BY_WORD = re.compile(r"^(method\.(?:tune|constraint|router|loss))=(?!null$)([a-z_0-9]+)$")  # method.tune=lora
EXAMPLE_TASK = "{name: sst2, path: data/sst2}"
TOP_LEVEL_KEYS = (
    *(field.name for field in dataclasses.fields(TopConfig)),
    "method",
    "stream",
    "stream_defaults",
    "order",
    "folder",
    *SECTION_CONFIGS,
)


def read_recipe(path: str, assignments: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides; raise a UserError that names the wrong key.

    If an override selects another method, or another part of it, than the file (`method.name=`, `method.tune.name=`),
    the file's keys for the other one are ignored.
    """
    document = read_yaml(path)
    assignments = [PART_BY_WORD.sub(r"\1.name=\2", assignment) for assignment in assignments]
    if isinstance(document.get("method"), dict):
        document["method"] = _drop_keys_of_other_parts(document["method"], assignments)
    return resolve_recipe(apply_overrides(document, assignments), source=path)


def _drop_keys_of_other_parts(section: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The file's `method` section without keys of a method or part in whose place an override selects another one.

    A part that is written as its name alone becomes a mapping, so that overrides can add keys to it.
    """
    selected = {}
    for assignment in assignments:
        key_path = assignment.partition("=")[0]
        if re.fullmatch(r"method\.([a-z_]+\.)?name", key_path):
            value: Any = apply_overrides({}, [assignment])
            for key in key_path.split("."):
                value = value[key]
            selected[key_path] = value
    if selected.get("method.name", section.get("name", "sequential")) != section.get("name", "sequential"):
        return {}
    section = dict(section)
    for part in PART_KEYS & section.keys():
        keys = {"name": section[part]} if isinstance(section[part], str) else section[part]
        selected_name = selected.get(f"method.{part}.name")
        if isinstance(keys, dict) and "name" in keys and selected_name not in (None, keys["name"]):
            keys = {}
        section[part] = keys
    return section


def read_run_recipe(run_dir: str, assignments: Sequence[str] = ()) -> Recipe:
    """Read the recipe of an existing run, for an evaluation; only `evaluate` may be overridden."""
    for assignment in assignments:
        if not assignment.startswith("evaluate."):
            raise UserError(
                f"{assignment}: only evaluate.* can be changed for an evaluation; the rest is the run's own"
            )
    recipe_file = Path(run_dir).expanduser() / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{run_dir}: no run there (it would hold recipe.yaml); give the run_dir of a training run")
    run_dir_assignment = f"run_dir={json.dumps(run_dir, ensure_ascii=False)}"
    return read_recipe(str(recipe_file), [*assignments, run_dir_assignment])


def resolve_recipe(document: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Resolve a recipe document: check it as far as possible without reading data or a model, and fill in defaults."""
    _refuse_deepspeed_keys(document, TOP_LEVEL_KEYS)
    check_key_names(document, TOP_LEVEL_KEYS)
    if isinstance(document.get("deepspeed"), Mapping):
        raise UserError("deepspeed: given a mapping; the path of a DeepSpeed JSON is needed, so put these keys there")
    document = _resolve_data_folder(document)
    top = parse_config(TopConfig, {field: document[field] for field in _key_names(TopConfig) if field in document})
    method = _get_section(document, "method")
    name = method.get("name", "sequential")
    if not isinstance(name, str):
        raise UserError(
            f"method.name: given {describe_value(name)}; the name of a method is needed, for example sequential"
        )
    return Recipe(
        method=_parse_section(find_preset(name), method, "method"),
        stream=_parse_stream(document),
        source=source,
        **vars(top),
        **{
            section: _parse_section(config, _get_section(document, section), section)
            for section, config in SECTION_CONFIGS.items()
        },
    )


def _resolve_data_folder(document: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the key `folder`, if it is given, and remove it.

    The tasks' paths (by default their names) become paths in the folder. So do the model and the held-out texts, if
    they exist there.
    """
    document = dict(document)
    if (folder := document.pop("folder", None)) is None:
        return document
    if not isinstance(folder, str) or not Path(folder).expanduser().is_dir():
        raise UserError(
            f"folder: given {describe_value(folder)}, which is no folder; give the one in which the data lies"
        )
    if isinstance(document.get("stream"), list):
        document["stream"] = [
            {**entry, "path": os.path.join(folder, str(entry.get("path", entry["name"])))}
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
            else entry
            for entry in document["stream"]
        ]
    for section, name in (("model", "name"), ("evaluate", "heldout")):
        values = document.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            path_in_folder = os.path.join(folder, values[name])
            if Path(path_in_folder).expanduser().exists():
                document[section] = {**values, name: path_in_folder}
    return document


def find_difference(old: Any, new: Any, path: str = "", ignored_keys: Sequence[str] = CHANGEABLE_KEYS) -> str:
    """Describe the first key in which two resolved recipes differ; empty if they do not.

    `ignored_keys` may differ; by default those that do not affect a run's results.
    """
    if path in ignored_keys or old == new:
        return ""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(str(name), old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *values) for index, values in enumerate(zip(old, new, strict=True))]
    else:
        return f"{path} (there: {_summarize_value(old)}, given: {_summarize_value(new)})"
    differences = (
        find_difference(old_value, new_value, f"{path}.{name}" if path else name, ignored_keys)
        for name, old_value, new_value in pairs
    )
    return next(filter(None, differences), "")


def _summarize_value(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else shorten_to_line(repr(value))


def _key_names(config: type) -> tuple[str, ...]:
    return tuple(key_name(field) for field in dataclasses.fields(config))


def _get_section(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of the document; empty if it is left out or all its keys are commented out."""
    section = document.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UserError(f"{name}: given {describe_value(section)}; a mapping of keys is needed")
    return section


def _parse_section(config: type, document: Mapping[str, Any], path: str) -> Any:
    _refuse_deepspeed_keys(document, _key_names(config), path + ".")
    return parse_config(config, document, path)


def _parse_stream(document: Mapping[str, Any]) -> tuple[TaskConfig, ...]:
    entries = document.get("stream")
    if not isinstance(entries, list) or not entries:
        description = "an empty list" if entries == [] else describe_value(entries)
        raise UserError(f"stream: given {description}; a list of tasks is needed, for example [{EXAMPLE_TASK}]")
    stream_defaults = _get_section(document, "stream_defaults")
    _refuse_deepspeed_keys(stream_defaults, _key_names(TaskConfig), "stream_defaults.")
    defaults = parse_partial(TaskConfig, stream_defaults, "stream_defaults")
    tasks = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(
                f"stream.{index}: given {describe_value(entry)}; a mapping is needed, for example {EXAMPLE_TASK}"
            )
        tasks.append(parse_config(TaskConfig, {**defaults, **entry}, f"stream.{index}"))
    return _apply_order(tasks, document.get("order"))


def _apply_order(tasks: Sequence[TaskConfig], order: Any) -> tuple[TaskConfig, ...]:
    """The tasks that `order` names, in that order; all tasks if there is no `order`."""
    if order is None:
        return tuple(tasks)
    tasks_by_name = {task.name: task for task in tasks}
    if not isinstance(order, list) or not order:
        raise UserError(f"order: given {describe_value(order)}; a list of names of the stream's tasks is needed")
    for index, name in enumerate(order):
        if not isinstance(name, str) or name not in tasks_by_name:
            raise UserError(
                f"order.{index}: given {describe_value(name)}, "
                f"which is no task of the stream{did_you_mean(str(name), tasks_by_name)}; "
                f"allowed: {', '.join(tasks_by_name)}"
            )
    if len(set(order)) < len(order):
        raise UserError(f"order: given {describe_value(order)}, where a task comes twice; name each once")
    return tuple(tasks_by_name[name] for name in order)


def _refuse_deepspeed_keys(document: Mapping[str, Any], valid: Iterable[str], prefix: str = "") -> None:
    """For a key of DeepSpeed, raise a UserError that says where to set it, instead of `no such key`."""
    owners = {name.partition(".")[0]: owner for name, owner in OWNED_BY_RECIPE.items()}
    for name in document:
        if name in valid or not isinstance(name, str):
            continue
        if name in owners:
            raise UserError(f"{prefix}{name}: a key of DeepSpeed; in a recipe it is {owners[name]}, so set that")
        if name in OWNED_BY_JSON or name.startswith(DEEPSPEED_KEY_PREFIXES):
            raise UserError(
                f"{prefix}{name}: ZeRO, offload and communication belong to the DeepSpeed JSON; "
                "remove it here and name a file in deepspeed, for example deepspeed: ds_configs/zero3.json"
            )
