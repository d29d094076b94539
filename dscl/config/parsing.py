"""Strict configuration: frozen dataclasses from nested mappings, with bounds, dotted overrides and clear errors.

Settings are declared as frozen dataclasses whose fields are made by `config_key`: `schema` declares the sections of a
recipe, `parts` the parts of a method, and `methods` which parts each method has. If a key is a reserved word of Python,
its field's name ends in an underscore. `parse_config` turns a mapping into such a dataclass. It refuses an unknown key
(and suggests the closest valid one), a wrong type and a value out of range. It converts only an int where a float is
expected, and a number such as `1e-4`, which YAML reads as text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml

from dscl.utils.errors import UserError

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING
MAX_RECIPE_LENGTH = 1_000_000  # characters of a recipe
MAX_RECIPE_NODES = 200_000  # values of a recipe, with every YAML alias written out
# Characters that no text of a recipe may hold: control characters (except tab and line feed), lone surrogates, other
# line breaks, and marks that reverse the direction of the text behind them.
FORBIDDEN_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NUMBER_PATTERN = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
TYPE_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def config_key(
    default: Any = REQUIRED,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field for one key, with its bounds, choices and help; without a default the key is required."""
    metadata = {
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "choices": None if choices is None else tuple(choices),
        "help": help,
    }
    assert not isinstance(default, list | dict), "use a tuple or a factory: defaults are shared"
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(cls: type[T], mapping: Any, path: str = "") -> T:
    """Build the dataclass `cls` from a mapping; `path` is the dotted key of the mapping, for error messages."""
    values = parse_partial(cls, mapping, path)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in values and field.default is REQUIRED and field.default_factory is REQUIRED:
            key_path = _join_path(path, key_name(field))
            raise UserError(f"{key_path}: missing; give it in the recipe or as {key_path}=VALUE")
    return cls(**values)


def parse_partial(cls: type, mapping: Any, path: str = "") -> dict[str, Any]:
    """The keys in `mapping`, converted and checked as in `parse_config`, without defaults for keys left out."""
    if not isinstance(mapping, Mapping):
        raise UserError(f"{path or 'the recipe'}: given {describe_value(mapping)}; a mapping of keys is needed")
    fields = {key_name(field): field for field in dataclasses.fields(cls)}
    check_key_names(mapping, fields, path)
    annotations = typing.get_type_hints(cls)
    values = {}
    for name, value in mapping.items():
        field, key_path = fields[name], _join_path(path, name)
        values[field.name] = _convert_value(annotations[field.name], value, key_path)
        _check_bounds(values[field.name], field.metadata, key_path)
    return values


def check_key_names(mapping: Mapping[Any, Any], valid_names: Iterable[str], path: str = "") -> None:
    """Refuse a mapping with a key that is not in `valid_names`."""
    valid_names = list(valid_names)
    for name in mapping:
        if name not in valid_names:
            key_path = shorten_to_line(_join_path(path, name))
            raise UserError(
                f"{key_path}: no such key{did_you_mean(str(name), valid_names)}; allowed here: {', '.join(valid_names)}"
            )


def to_plain_data(value: Any) -> Any:
    """The inverse of `parse_config`: nested dicts and lists that YAML and JSON can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key_name(field): to_plain_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_plain_data(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain_data(v) for v in value]
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; UserError for a missing file, bad syntax or a duplicate key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_RECIPE_LENGTH + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; give the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    if len(text) > MAX_RECIPE_LENGTH:
        raise UserError(
            f"{path}: longer than {MAX_RECIPE_LENGTH:,} characters, so hardly a recipe; give the path of a YAML file"
        )
    try:
        mapping = _load_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error}); correct it there") from None
    if not isinstance(mapping, dict):
        raise UserError(
            f"{path}: holds {describe_value(mapping)}; a recipe is a mapping of keys, such as run_dir: out/first"
        )
    return mapping


def apply_overrides(mapping: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with dotted `a.b.0.c=value` assignments applied; values are read as YAML."""
    try:
        result = _copy_nested(mapping)
    except RecursionError:
        raise UserError("the recipe: nested too deeply, or an alias that holds itself; write it out flat") from None
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        parts = dotted.split(".")
        if not equals or not all(parts):
            raise UserError(
                f"{shorten_to_line(repr(assignment))}: an override is written KEY=VALUE, for example train.lr=1e-4"
            )
        try:
            value = _load_yaml(text)
        except ValueError as error:
            raise UserError(
                f"{dotted}: given {shorten_to_line(repr(text))}, which is not valid YAML ({error}); "
                f"text with special characters needs quotes: '{dotted}=\"...\"'"
            ) from None
        _assign_path(result, parts, value)
    return result


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if a valid name is similar to `name`, else an empty string."""
    matches = difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def describe_value(value: Any) -> str:
    """A value and its type, in words for an error message."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{_short_repr(value)} ({type(value).__name__})"


def shorten_to_line(text: str) -> str:
    """`text` as one line of at most 80 characters, for an error message."""
    text = " ".join(text.splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader with two more errors: a duplicate key (PyYAML would keep the last value), and aliases that
    multiply to a huge document."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_RECIPE_NODES:
            problem = f"its aliases multiply to more than {MAX_RECIPE_NODES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before merge keys (<<) are resolved, because a mapping may override a merged key.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if (name.tag, name.value) in seen:
                    problem = f"the key {name.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
                seen.add((name.tag, name.value))
        return node


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a YAML node holds, with every alias written out; `sizes` holds those of nodes seen before."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if sizes.get(id(node)) == 0:
        raise yaml.MarkedYAMLError(problem="an alias that holds itself", problem_mark=node.start_mark)
    if id(node) not in sizes:
        sizes[id(node)] = 0  # as long as its children are counted
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
        )
        sizes[id(node)] = min(MAX_RECIPE_NODES + 1, 1 + sum(_expanded_size(child, sizes) for child in children))
    return sizes[id(node)]


def _load_yaml(text: str) -> Any:
    """Parse YAML; bad YAML raises a ValueError with a message of one line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{position}{error.problem}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # invalid numbers, dates and tags raise exceptions of many types
        raise ValueError(shorten_to_line(" ".join(str(error).split()))) from None


def _assign_path(node: Any, parts: list[str], value: Any) -> None:
    """Set the value at the dotted path `parts` below `node`; missing sections on the way are created."""
    for depth, part in enumerate(parts):
        parent_path, key_path = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        is_last = depth == len(parts) - 1
        index: Any = part
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                extent = f"has the entries 0 to {len(node) - 1}" if node else "is empty"
                raise UserError(
                    f"{key_path}: given {part!r}; the list {parent_path} {extent}, and new ones go into the recipe"
                )
            index = int(part)
        elif not isinstance(node, dict):
            raise UserError(
                f"{key_path}: {parent_path} is {describe_value(node)} and has no keys below it; leave .{part} out"
            )
        elif not is_last and node.get(part) is None:
            node[part] = {}
        if is_last:
            node[index] = value
        else:
            node = node[index]


def key_name(field: dataclasses.Field[Any]) -> str:
    """The name of the recipe key for a dataclass field: `async_` is the key `async`."""
    return field.name.rstrip("_")


def _join_path(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _short_repr(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print very large integers
        return f"a number of {value.bit_length()} bits"
    return shorten_to_line(repr(value))


def _copy_nested(value: Any) -> Any:
    """A copy of nested dicts and lists in which a YAML alias is a copy too, so that overrides change one place only."""
    if isinstance(value, dict):
        return {k: _copy_nested(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy_nested(v) for v in value]
    return value


def _convert_value(annotation: Any, value: Any, key_path: str) -> Any:
    """`value` converted to the annotated type; UserError if it has another type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key_path)
    if dataclasses.is_dataclass(annotation):
        return _convert_section([typing.cast(type, annotation)], value, key_path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key_path}: given {describe_value(value)}; a list is needed")
        return tuple(_convert_value(arguments[0], v, f"{key_path}.{i}") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{key_path}: given {describe_value(value)}; a mapping is needed")
        for name in value:
            if not isinstance(name, str):
                raise UserError(
                    f"{key_path}: given the key {describe_value(name)}; text is needed, so write it in quotes"
                )
        return {name: _convert_value(arguments[1], v, f"{key_path}.{name}") for name, v in value.items()}
    return _convert_scalar(annotation, value, key_path)


def _convert_union(annotations: tuple[Any, ...], value: Any, key_path: str) -> Any:
    """`value` converted to the first type that accepts it; if none does, the error of the last type."""
    if value is None and type(None) in annotations:
        return None
    if dataclasses.is_dataclass(annotations[0]):
        return _convert_section([a for a in annotations if a is not type(None)], value, key_path)
    *others, last = (annotation for annotation in annotations if annotation is not type(None))
    for annotation in others:
        try:
            return _convert_value(annotation, value, key_path)
        except UserError:
            continue
    return _convert_value(last, value, key_path)


def _convert_section(classes: list[type], value: Any, key_path: str) -> Any:
    """`value` as the dataclass that its key `name` selects; by default the first. Text stands for {name: text}."""
    names = {cls: str(getattr(cls, "name", "")) for cls in classes}
    if not names[classes[0]]:  # not selected by a name
        return parse_config(classes[0], value, key_path)
    if isinstance(value, str):
        value = {"name": value}
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UserError(
            f"{key_path}: given {describe_value(value)}; one of {', '.join(names.values())} or a mapping is needed"
        )
    selected = next((cls for cls, name in names.items() if name == value.get("name", names[classes[0]])), None)
    if selected is None:
        raise UserError(
            f"{key_path}.name: given {describe_value(value['name'])}; allowed: {', '.join(names.values())}"
            f"{did_you_mean(str(value['name']), names.values())}"
        )
    for key in value:
        owners = [name for cls, name in names.items() if any(key == key_name(f) for f in dataclasses.fields(cls))]
        if owners and names[selected] not in owners:
            raise UserError(
                f"{key_path}.{key}: a key of {' and '.join(owners)}, but {key_path}.name is {names[selected]}; remove "
                f"it, or set {key_path}.name={owners[0]}"
            )
    return parse_config(selected, value, key_path)


def _convert_scalar(annotation: type, value: Any, key_path: str) -> Any:
    if annotation is float and isinstance(value, str) and NUMBER_PATTERN.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-4 as text and 1.0e-4 as a number
    if annotation is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise UserError(
                f"{key_path}: given {describe_value(value)}; a number that a float can hold is needed"
            ) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key_path}: given {value}; a finite number is needed")
    if isinstance(value, str) and annotation is str and not value.strip():
        raise UserError(f"{key_path}: given {value!r}; text that is not blank is needed")
    if isinstance(value, str) and annotation is str and (match := FORBIDDEN_CHARACTERS.search(value)):
        raise UserError(
            f"{key_path}: given {_short_repr(value)}, which holds the character U+{ord(match[0]):04X}; remove it"
        )
    if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    quotable = annotation is str and not isinstance(value, list | dict | type(None))
    quotes = ", so write it in quotes" if quotable else ""
    raise UserError(f"{key_path}: given {describe_value(value)}; {TYPE_DESCRIPTIONS[annotation]} is needed{quotes}")


def _check_bounds(value: Any, metadata: Mapping[str, Any], key_path: str) -> None:
    choices = metadata.get("choices")
    if choices is not None and isinstance(value, str) and value not in choices:
        raise UserError(
            f"{key_path}: given {_short_repr(value)}; allowed: {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above = metadata.get("at_least"), metadata.get("at_most"), metadata.get("above")
    if low is not None and value < low:
        raise UserError(f"{key_path}: given {_short_repr(value)}; it must be at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{key_path}: given {_short_repr(value)}; it must be above {above}")
    if high is not None and value > high:
        raise UserError(f"{key_path}: given {_short_repr(value)}; it must be at most {high}")
