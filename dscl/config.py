"""Strict configuration: frozen dataclasses from nested mappings, with bounds, dotted overrides and helpful refusals.

A component declares its own settings as a frozen dataclass whose fields are made by `key`. `parse` turns a mapping
into such a dataclass and refuses whatever it does not know: an unknown name (with the nearest valid one), a wrong type,
a value out of range. Nothing is coerced except an int where a float is asked for, and a YAML number such as `1e-4`
that YAML reads as text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml

from dscl.errors import UserError

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING


def key(
    default: Any = REQUIRED,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
    help: str = "",
) -> Any:
    """A dataclass field with its bounds and its one line of help; without a default it is required."""
    metadata = {
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "choices": None if choices is None else tuple(choices),
        "help": help,
    }
    if isinstance(default, list | dict):
        raise AssertionError("use a tuple or a factory: defaults are shared")
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], given: Any, path: str = "") -> T:
    """Build the dataclass `cls` from a mapping; `path` is the dotted name that messages start from."""
    if not isinstance(given, Mapping):
        raise UserError(f"{path or 'the recipe'}: given {_show(given)}; a mapping of keys is needed")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in given:
        if name not in fields:
            raise UserError(_unknown(_join(path, name), str(name), fields))
    values = {}
    for name, field in fields.items():
        where = _join(path, name)
        if name in given:
            values[name] = _convert(hints[name], given[name], where)
            _check_bounds(values[name], field.metadata, where)
        elif field.default is REQUIRED and field.default_factory is REQUIRED:
            raise UserError(f"{where}: missing; give it in the recipe or as {where}=VALUE")
    return cls(**values)


def plain(value: Any) -> Any:
    """The opposite of `parse`: nested dicts and lists that YAML and JSON can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """One YAML mapping from a file; a name given twice, bad syntax or a missing file is the user's error."""
    try:
        with open(path, encoding="utf-8") as file:
            given = yaml.load(file, Loader=_UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {_show(given)}; a recipe is a mapping of keys")
    return given


def override(given: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `given` with dotted `a.b.0.c=value` assignments applied; values are read as YAML."""
    result = _copy(given)
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise UserError(f"{assignment!r}: an override is written KEY=VALUE, for example train.lr=1e-4")
        try:
            value = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError:
            raise UserError(f"{dotted}: given {text!r}, which is not valid YAML") from None
        parts = dotted.split(".")
        node: Any = result
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            where = ".".join(parts[: depth + 1])
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    raise UserError(f"{where}: given {part!r}; the list has entries 0 to {len(node) - 1}")
                index: Any = int(part)
            elif isinstance(node, dict):
                index = part
                if not last and node.get(part) is None:
                    node[part] = {}
            else:
                raise UserError(f"{where}: {'.'.join(parts[:depth])} is {_show(node)} and has no keys below it")
            if last:
                node[index] = value
            else:
                node = node[index]
    return result


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something valid is close, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a mapping which names a key twice is an error instead of the last one winning."""


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        name = loader.construct_object(key_node, deep=True)
        if name in result:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key_node.start_mark)
        result[name] = loader.construct_object(value_node, deep=True)
    return result


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{value!r} ({type(value).__name__})"


def _unknown(where: str, name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    return f"{where}: no such key{nearest(name, valid)}; allowed here: {', '.join(valid)}"


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or a refusal."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
        return _convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: given {_show(value)}; a list is needed")
        return tuple(_convert(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is dict or origin is Mapping or str(origin).endswith("Mapping'>"):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: given {_show(value)}; a mapping is needed")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") if arguments else v for k, v in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text; 1.0e-4 as a number
            value = float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: given {_show(value)}; {kinds.get(hint, hint.__name__)} is needed")


def _check_bounds(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    choices = metadata.get("choices")
    if choices is not None and isinstance(value, str) and value not in choices:
        raise UserError(f"{where}: given {value!r}; allowed: {', '.join(choices)}{nearest(value, choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: given {value}; a finite number is needed")
    low, high, above = metadata.get("at_least"), metadata.get("at_most"), metadata.get("above")
    if low is not None and value < low:
        raise UserError(f"{where}: given {value}; it must be at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{where}: given {value}; it must be above {above}")
    if high is not None and value > high:
        raise UserError(f"{where}: given {value}; it must be at most {high}")
