"""Recipes are checked strictly: names, types, bounds, YAML and overrides; every error is one line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.config.parsing import apply_overrides, config_key, did_you_mean, parse_config, read_yaml, to_plain_data
from dscl.utils.errors import UserError


@dataclass(frozen=True)
class Inner:
    rank: int = config_key(8, at_least=1)
    names: tuple[str, ...] = config_key(("a", "b"))


@dataclass(frozen=True)
class Config:
    name: str = config_key()
    rate: float = config_key(0.5, above=0.0, at_most=10.0)
    steps: int = config_key(1, at_least=1)
    flag: bool = config_key(False)
    kind: str = config_key("full", choices=("full", "lora"))
    note: str | None = config_key(None)
    size: float | None = config_key(None, at_least=0)
    columns: Mapping[str, str] | None = config_key(None)
    shape: dict[str, Any] | None = config_key(None)
    inner: Inner = config_key(Inner)
    other: Inner | None = config_key(None)


def read_refusal(document: Any) -> str:
    """The message of the error that a document raises."""
    with pytest.raises(UserError) as caught:
        parse_config(Config, document)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_defaults_and_values() -> None:
    assert parse_config(Config, {"name": "x"}) == Config("x")
    document = {"name": "x", "rate": 3, "inner": {"names": ["c"]}, "other": {"rank": 2}, "columns": {"a": "b"}}
    config = parse_config(Config, document)
    assert config == Config("x", rate=3.0, inner=Inner(names=("c",)), other=Inner(rank=2), columns={"a": "b"})
    assert type(config.rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 1.0  # type: ignore[misc]


def test_to_plain_data_is_the_inverse_of_parse_config() -> None:
    config = parse_config(Config, {"name": "x", "rate": 1e-5, "other": {"names": []}, "shape": {"a": [1, {"b": None}]}})
    assert parse_config(Config, yaml.safe_load(yaml.safe_dump(to_plain_data(config)))) == config


@pytest.mark.parametrize(
    ("given", "expected_message"),
    [
        # names, at every depth
        ({"name": "x", "stesp": 1}, r"^stesp: no such key \(did you mean 'steps'\?\); allowed here: name, rate"),
        (
            {"name": "x", "inner": {"rnk": 1}},
            r"^inner\.rnk: no such key \(did you mean 'rank'\?\); allowed here: rank, names$",
        ),
        ({"name": "x", "other": {"zzz": 1}}, r"^other\.zzz: no such key; allowed here: rank, names$"),
        ({"name": "x", 1: 1}, r"^1: no such key"),
        ({"name": "x", "a\nb" * 99: 1}, r"no such key"),
        ({}, r"^name: missing; give it in the recipe or as name=VALUE$"),
        # types
        ([], r"^the recipe: given a list; a mapping of keys is needed$"),
        ({"name": 1}, r"^name: given 1 \(int\); text is needed, so write it in quotes$"),
        ({"name": False}, r"^name: given False \(bool\); text is needed, so write it in quotes$"),
        ({"name": None}, r"^name: given nothing \(null\); text is needed$"),
        ({"name": ["x"]}, r"^name: given a list; text is needed$"),
        ({"name": " "}, r"^name: given ' '; text that is not blank is needed$"),
        ({"name": "x", "steps": 1.0}, r"^steps: given 1\.0 \(float\); a whole number is needed$"),
        ({"name": "x", "steps": True}, r"^steps: given True \(bool\); a whole number is needed$"),
        ({"name": "x", "steps": "3"}, r"^steps: given '3' \(str\); a whole number is needed$"),
        ({"name": "x", "rate": True}, r"^rate: given True \(bool\); a number is needed$"),
        ({"name": "x", "rate": "fast"}, r"^rate: given 'fast' \(str\); a number is needed$"),
        ({"name": "x", "rate": "1_0"}, r"^rate: given '1_0' \(str\); a number is needed$"),
        ({"name": "x", "rate": "infinity"}, r"^rate: given 'infinity' \(str\); a number is needed$"),
        ({"name": "x", "rate": 10**400}, r"^rate: given a number of 1329 bits \(int\); a number that a float can hold"),
        ({"name": "x", "flag": 1}, r"^flag: given 1 \(int\); true or false is needed$"),
        ({"name": "x", "flag": "yes"}, r"^flag: given 'yes' \(str\); true or false is needed$"),
        ({"name": "x", "note": 3}, r"^note: given 3 \(int\); text is needed, so write it in quotes$"),
        ({"name": "x", "inner": None}, r"^inner: given nothing \(null\); a mapping of keys is needed$"),
        ({"name": "x", "inner": [1]}, r"^inner: given a list; a mapping of keys is needed$"),
        ({"name": "x", "inner": {"names": "ab"}}, r"^inner\.names: given 'ab' \(str\); a list is needed$"),
        ({"name": "x", "inner": {"names": ["a", 2]}}, r"^inner\.names\.1: given 2 \(int\); text is needed"),
        ({"name": "x", "columns": "a"}, r"^columns: given 'a' \(str\); a mapping is needed$"),
        ({"name": "x", "columns": {"a": 1}}, r"^columns\.a: given 1 \(int\); text is needed"),
        (
            {"name": "x", "columns": {1: "a"}},
            r"^columns: given the key 1 \(int\); text is needed, so write it in quotes$",
        ),
        (
            {"name": "x" * 9999, "steps": "y" * 9999},
            r"^steps: given 'y{60,80}\.\.\. \(str\); a whole number is needed$",
        ),
        # bounds
        ({"name": "x", "steps": 0}, r"^steps: given 0; it must be at least 1$"),
        ({"name": "x", "rate": 0}, r"^rate: given 0\.0; it must be above 0\.0$"),
        ({"name": "x", "rate": 11}, r"^rate: given 11\.0; it must be at most 10\.0$"),
        ({"name": "x", "rate": float("nan")}, r"^rate: given nan; a finite number is needed$"),
        ({"name": "x", "rate": "1e999"}, r"^rate: given inf; a finite number is needed$"),
        ({"name": "x", "size": -1}, r"^size: given -1\.0; it must be at least 0$"),
        (
            {"name": "x", "inner": {"rank": -(10**5000)}},
            r"^inner\.rank: given a number of 16610 bits; it must be at least 1$",
        ),
        ({"name": "x", "kind": "lorra"}, r"^kind: given 'lorra'; allowed: full, lora \(did you mean 'lora'\?\)$"),
    ],
)
def test_refusals(given: Any, expected_message: str) -> None:
    assert re.search(expected_message, read_refusal(given)), read_refusal(given)


def test_numbers_that_yaml_reads_as_text() -> None:
    for text in ("1e-4", "1E-4", "+.5e-3", "2e0", "3.", "7"):
        assert parse_config(Config, {"name": "x", "rate": text}).rate == float(text)
    assert parse_config(Config, yaml.safe_load("{name: x, rate: 1e-4}")).rate == 1e-4


def test_did_you_mean_suggests_similar_names_only() -> None:
    assert did_you_mean("epoch", ["epochs", "lr"]) == " (did you mean 'epochs'?)"
    assert did_you_mean("qqq", ["epochs", "lr"]) == ""


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        (b"", r"holds nothing \(null\); a recipe is a mapping"),
        (b"- a\n- b", r"holds a list; a recipe is a mapping"),
        (b"just words", r"holds 'just words' \(str\); a recipe is a mapping"),
        (b"a: 1\nb: [1, 2", r"not valid YAML \(line 2, column 9: expected"),
        (b"a: 1\na: 2", r"not valid YAML \(line 2, column 1: the key 'a' is given twice\)"),
        (b"a: {b: {c: 1, d: 2, c: 1}}", r"line 1, column 21: the key 'c' is given twice"),
        (b"\xff\xfe\x00", r"not a text file in UTF-8"),
        (b"a: \x00", r"not valid YAML \(unacceptable character"),
        (b"a: 1\n---\nb: 2", r"not valid YAML \(line 2, column 1: but found another document"),
        (b"a: !!python/object/apply:os.system [ls]", r"not valid YAML \(line 1, column 4: could not determine"),
        (b"a: 2024-13-45", r"not valid YAML \(month must be"),
        (b"a: !!bool maybe", r"not valid YAML"),
        (b"? [a]\n: 1", r"line 1, column 3: found unhashable key"),
        (b"a: " + b"9" * 5000, r"not valid YAML \(Exceeds the limit"),
        (b"[" * 20000, r"not valid YAML \(nested too deeply\)"),
        (b"a: b\n" * 200_001, r"longer than 1,000,000 characters"),
    ],
)
def test_invalid_recipe_files_are_refused(tmp_path: Path, content: bytes, expected_message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected_message) as caught:
        read_yaml(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such recipe; give the path of a YAML file$"):
        read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r": cannot be read \(Is a directory\); give the path of a YAML file$"):
        read_yaml(str(tmp_path))


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: &b {x: 1, y: 2}\none: {<<: *b, x: 3}\ntwo: {in: &c {<<: *b, y: 5}, <<: *c}\n")
    document = read_yaml(str(path))
    assert document["one"] == {"x": 3, "y": 2}
    assert document["two"] == {"in": {"x": 1, "y": 5}, "x": 1, "y": 5}


def test_a_recursive_alias_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a [*a]\n")
    with pytest.raises(UserError, match="an alias that holds itself"):
        apply_overrides(read_yaml(str(path)), [])


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a.x=2", {"a": {"x": 2}, "list": [{"k": 1}, {"k": 2}], "s": "t"}),
        ("list.1.k=9", {"a": {"x": 1}, "list": [{"k": 1}, {"k": 9}], "s": "t"}),
        ("list.0={q: 1}", {"a": {"x": 1}, "list": [{"q": 1}, {"k": 2}], "s": "t"}),
        ("new.shape.size=64", {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "t", "new": {"shape": {"size": 64}}}),
        ("list=[1, two]", {"a": {"x": 1}, "list": [1, "two"], "s": "t"}),
        ("a=", {"a": None, "list": [{"k": 1}, {"k": 2}], "s": "t"}),
        ('s="1"', {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "1"}),
        ("s=b=c", {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "b=c"}),
        ("s=out/é ü", {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "out/é ü"}),
    ],
)
def test_overrides(assignment: str, expected: dict[str, Any]) -> None:
    document = {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "t"}
    assert apply_overrides(document, [assignment]) == expected
    assert document == {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "s": "t"}


def test_later_overrides_win_and_create_null_sections() -> None:
    assert apply_overrides({"a": None}, ["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}
    assert apply_overrides({"a": {"name": "x"}}, ["a.name=", "a.shape.size=4"]) == {
        "a": {"name": None, "shape": {"size": 4}}
    }


def test_an_override_of_an_alias_changes_one_place_only() -> None:
    shared = {"k": 1}
    assert apply_overrides({"list": [shared, shared]}, ["list.0.k=2"]) == {"list": [{"k": 2}, {"k": 1}]}


@pytest.mark.parametrize(
    ("assignment", "expected_message"),
    [
        ("=b", r"^'=b': an override is written KEY=VALUE, for example train\.lr=1e-4$"),
        ("a", r"^'a': an override is written KEY=VALUE"),
        ("a..b=1", r"an override is written KEY=VALUE"),
        (".a=1", r"an override is written KEY=VALUE"),
        ("a.=1", r"an override is written KEY=VALUE"),
        ("s.x.y=1", r"^s\.x: s is 't' \(str\) and has no keys below it; leave \.x out$"),
        ("list.2.k=1", r"^list\.2: given '2'; the list list has the entries 0 to 1"),
        ("list.-1.k=1", r"^list\.-1: given '-1'; the list list has the entries 0 to 1"),
        ("list.k=1", r"^list\.k: given 'k'; the list list has the entries 0 to 1"),
        ("list.²=1", r"^list\.²: given '²'"),
        ("list." + "9" * 5000 + "=1", r"the list list has the entries 0 to 1"),
        ("empty.0=1", r"^empty\.0: given '0'; the list empty is empty"),
        (
            "a=[1",
            r"^a: given '\[1', which is not valid YAML \(line 1, column 3: .*\); text .* needs quotes: 'a=\"\.\.\.\"'$",
        ),
        ("a={x: 1, x: 2}", r"the key 'x' is given twice"),
        ("a=*b", r"not valid YAML"),
    ],
)
def test_invalid_overrides_are_refused(assignment: str, expected_message: str) -> None:
    document = {"a": {"x": 1}, "list": [{"k": 1}, {"k": 2}], "empty": [], "s": "t"}
    with pytest.raises(UserError, match=expected_message) as caught:
        apply_overrides(document, [assignment])
    assert len(str(caught.value).splitlines()) == 1


def test_parsing_imports_no_torch() -> None:
    check = "import sys, dscl.config.parsing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[2]).returncode == 0
