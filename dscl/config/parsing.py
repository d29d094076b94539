"""Strict configuration: frozen dataclasses from nested mappings, with bounds, dotted overrides and helpful refusals.

Settings are declared as frozen dataclasses whose fields are made by `key`: in `schema` those of a recipe's sections, in
`methods` those of every method. A field whose name would be one of Python's own words ends in an underscore, the key
does not. `parse` turns a mapping into such a dataclass and refuses whatever it does not know: an unknown name (with the
nearest valid one), a wrong type, a value out of range. Nothing is coerced except an int where a float is asked for, and
a YAML number such as `1e-4` that YAML reads as text.
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
LARGEST = 1_000_000  # characters of a recipe
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


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
    assert not isinstance(default, list | dict), "use a tuple or a factory: defaults are shared"
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], given: Any, path: str = "") -> T:
    """Build the dataclass `cls` from a mapping; `path` is the dotted name that messages start from."""
    values = convert(cls, given, path)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in values and field.default is REQUIRED and field.default_factory is REQUIRED:
            where = _join(path, key_of(field))
            raise UserError(f"{where}: missing; give it in the recipe or as {where}=VALUE")
    try:
        return cls(**values)
    except UserError as error:  # what a section finds wrong with itself it says as if it stood by itself
        if path.startswith("method.") and f"{path}." not in str(error):
            raise UserError(re.sub(r"\bmethod\.(?=[a-z_]+\b)", f"{path}.", str(error))) from None
        raise


def convert(cls: type, given: Any, path: str = "") -> dict[str, Any]:
    """The keys that `given` holds, checked as `parse` does it; what is left out stays out."""
    if not isinstance(given, Mapping):
        raise UserError(f"{path or 'the recipe'}: given {show(given)}; a mapping of keys is needed")
    fields = {key_of(field): field for field in dataclasses.fields(cls)}
    check_names(given, fields, path)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in given.items():
        field, where = fields[name], _join(path, name)
        values[field.name] = _convert(hints[field.name], value, where)
        _check_bounds(values[field.name], field.metadata, where)
    return values


def check_names(given: Mapping[Any, Any], valid: Iterable[str], path: str = "") -> None:
    """Refuse a key that is not among the valid ones."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            where = shorten(_join(path, name))
            raise UserError(f"{where}: no such key{nearest(str(name), valid)}; allowed here: {', '.join(valid)}")


def plain(value: Any) -> Any:
    """The opposite of `parse`: nested dicts and lists that YAML and JSON can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key_of(field): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """One YAML mapping from a file; a name given twice, bad syntax or a missing file is the user's error."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; give the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    if len(text) > LARGEST:
        raise UserError(f"{path}: longer than {LARGEST:,} characters, so hardly a recipe; give the path of a YAML file")
    try:
        given = _load(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error}); correct it there") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {show(given)}; a recipe is a mapping of keys, such as run_dir: out/first")
    return given


def override(given: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `given` with dotted `a.b.0.c=value` assignments applied; values are read as YAML."""
    try:
        result = _copy(given)
    except RecursionError:
        raise UserError("the recipe: nested too deeply, or an alias that holds itself; write it out flat") from None
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        parts = dotted.split(".")
        if not equals or not all(parts):
            raise UserError(f"{shorten(repr(assignment))}: an override is written KEY=VALUE, for example train.lr=1e-4")
        try:
            value = _load(text)
        except ValueError as error:
            raise UserError(
                f"{dotted}: given {shorten(repr(text))}, which is not valid YAML ({error}); "
                f"text with special characters needs quotes: '{dotted}=\"...\"'"
            ) from None
        _assign(result, parts, value)
    return result


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when something valid is close, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def show(value: Any) -> str:
    """What was given, as a message can show it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{_short(value)} ({type(value).__name__})"


def shorten(text: str) -> str:
    """A given text as one line of a message can hold it."""
    text = " ".join(text.splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a mapping which names a key twice is an error instead of the last one winning."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked as written, before merge keys (<<) bring in names that may well be given again.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if (name.tag, name.value) in seen:
                    problem = f"the key {name.value!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
                seen.add((name.tag, name.value))
        return node


def _load(text: str) -> Any:
    """YAML as Python's objects; ValueError in one line."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{place}{error.problem}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # numbers, dates and explicit tags that cannot be made fail in many ways
        raise ValueError(shorten(" ".join(str(error).split()))) from None


def _assign(node: Any, parts: list[str], value: Any) -> None:
    """Set what the dotted `parts` lead to; a section that is not there yet is made."""
    for depth, part in enumerate(parts):
        above, where = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        index: Any = part
        if isinstance(node, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                has = f"has the entries 0 to {len(node) - 1}" if node else "is empty"
                raise UserError(f"{where}: given {part!r}; the list {above} {has}, and new ones go into the recipe")
            index = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"{where}: {above} is {show(node)} and has no keys below it; leave .{part} out")
        elif not last and node.get(part) is None:
            node[part] = {}
        if last:
            node[index] = value
        else:
            node = node[index]


def key_of(field: dataclasses.Field[Any]) -> str:
    """How a recipe calls it."""
    return field.name.rstrip("_")


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to print the largest
        return f"a number of {value.bit_length()} bits"
    return shorten(repr(value))


def _copy(value: Any) -> Any:
    """Without sharing, so that an override of one place that a YAML alias filled leaves the others alone."""
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
        return _one_of(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: given {show(value)}; a list is needed")
        return tuple(_convert(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: given {show(value)}; a mapping is needed")
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{where}: given the key {show(name)}; text is needed, so write it in quotes")
        return {name: _convert(arguments[1], v, f"{where}.{name}") for name, v in value.items()}
    return _scalar(hint, value, where)


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """`value` as the first of the types that takes it; the refusal is the last one's."""
    if value is None and type(None) in hints:
        return None
    *others, last = (hint for hint in hints if hint is not type(None))
    for hint in others:
        try:
            return _convert(hint, value, where)
        except UserError:
            continue
    return _convert(last, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-4 as text; 1.0e-4 as a number
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{where}: given {show(value)}; a number that a float can hold is needed") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: given {value}; a finite number is needed")
    if isinstance(value, str) and hint is str and not value.strip():
        raise UserError(f"{where}: given {value!r}; text that is not blank is needed")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    quotable = hint is str and not isinstance(value, list | dict | type(None))
    quotes = ", so write it in quotes" if quotable else ""
    raise UserError(f"{where}: given {show(value)}; {KINDS[hint]} is needed{quotes}")


def _check_bounds(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    choices = metadata.get("choices")
    if choices is not None and isinstance(value, str) and value not in choices:
        raise UserError(f"{where}: given {_short(value)}; allowed: {', '.join(choices)}{nearest(value, choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high, above = metadata.get("at_least"), metadata.get("at_most"), metadata.get("above")
    if low is not None and value < low:
        raise UserError(f"{where}: given {_short(value)}; it must be at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{where}: given {_short(value)}; it must be above {above}")
    if high is not None and value > high:
        raise UserError(f"{where}: given {_short(value)}; it must be at most {high}")
