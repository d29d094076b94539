"""Damaged or hostile recipes are refused quickly, in one line, without a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dscl.recipe.recipe import read_recipe
from dscl.utils.errors import UserError

RECIPE = """
run_dir: out
model: {name: models/llama}
method: {name: sequential}
stream: [{name: news, path: data/news}]
"""


def refusal(folder: Path, text: str, *assignments: str) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        read_recipe(str(path), assignments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def test_aliases_that_multiply_are_refused_before_they_are_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    started = time.perf_counter()
    assert "its aliases multiply to more than 200,000 values" in refusal(tmp_path, "\n".join(lines))
    assert time.perf_counter() - started < 5
    assert "an alias that holds itself" in refusal(tmp_path, "a: &a [*a]")


def test_an_alias_that_stays_small_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{name: news", "&task {name: news") + "order: [news]\n")
    assert read_recipe(str(path)).stream[0].name == "news"


@pytest.mark.parametrize("entry", ["[news]", "{news: 1}", "3", "null", "other"])
def test_an_order_of_anything_but_names_is_refused(tmp_path: Path, entry: str) -> None:
    assert "order.0: given" in refusal(tmp_path, RECIPE + f"order: [{entry}]\n")


@pytest.mark.parametrize(
    "character", ["\\0", "\\e", "\\r", "\\x7f", "\\x9b", "\\u2028", "\\u202e", "\\ud800"], ids=lambda text: text[1:]
)
@pytest.mark.parametrize("key", ["run_dir", "stream.0.name", "stream.0.path", "model.name"])
def test_characters_that_are_not_text_are_refused(tmp_path: Path, character: str, key: str) -> None:
    message = refusal(tmp_path, RECIPE, f'{key}="a{character}b"')
    assert message.startswith(f"{key}: given")
    assert "which holds the character U+" in message


def test_templates_may_have_lines_and_tabs_and_any_script(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    template = '"{prompt}\\n\\tनमस्ते 👩‍💻 情感分析\\u00a0:"'
    recipe = read_recipe(str(path), [f"stream.0.template={template}"])
    assert recipe.stream[0].template == "{prompt}\n\tनमस्ते 👩\u200d💻 情感分析\u00a0:"


@pytest.mark.parametrize(
    ("assignment", "limit"),
    [
        ("method={name: asr, tune: {rank: 1000000}}", "16384"),
        ("method={name: moses, tune: {num_experts: 1000000}}", "4096"),
        ("method={name: moses, tune: {max_experts: 1000000}}", "65536"),
    ],
)
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, assignment: str, limit: str) -> None:
    assert limit in refusal(tmp_path, RECIPE, assignment)
