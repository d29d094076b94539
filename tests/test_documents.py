"""The documents: links and named tests exist, and commands have the verbs, options and recipe keys of the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dscl.config.methods import METHOD_PRESETS
from dscl.config.schema import SECTION_CONFIGS, CompareConfig, TaskConfig, TopConfig
from dscl.recipe.recipe import read_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("dscl", "ds_configs", "launch", "tests", "tools")
DOCUMENTS = [REPOSITORY / "README.md", *sorted(p for name in FOLDERS for p in (REPOSITORY / name).rglob("*.md"))]
PROGRAMS = ("dscl ", "python ", "./launch/", "./tests/")
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=\S+")
OWN_METHOD = "method.name=head"  # the example of a new method


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a page: lines of code blocks, and inline code that begins as a command."""
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    for code in (*blocks, *inline):
        words = shlex.split(code, comments=True) if code.startswith((*PROGRAMS, "NNODES=", "HOSTFILE=")) else []
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            words = words[1:]
        if len(words) > 1 or (words and words[0].startswith("./")):
            yield words


def method_of(page: Path) -> str:
    """The method that a page describes; its keys stand there without the method's name."""
    return page.stem if page.stem in METHOD_PRESETS else "asr"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 130 and not line.startswith("|") and "](" not in line] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if file.is_dir() or not file.is_file():
            broken.append(target)
        elif heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            if heading not in map(anchor, headings):
                broken.append(target)
    # A link to a folder shows its README.md, but a reader of a plain checkout needs the file.
    assert broken == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=page_name)
def test_named_tests_and_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    sources = "\n".join(path.read_text("utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"\btest_\w+_\w+_\w+\b(?!\.py)", text) if f"def {name}(" not in sources]
    for path in re.findall(r"\b((?:tests|tools|launch|dscl|ds_configs)/[\w/.-]+\.(?:py|sh|yaml|json|env))\b", text):
        is_there = any((folder / path).is_file() for folder in (REPOSITORY, REPOSITORY / "tests"))
        if not is_there and not path.endswith(("/head.py", "/NAME.py")):  # those are yet to be written
            missing.append(path)
    assert missing == []


@pytest.fixture(scope="session")
def verb_help() -> dict[str, str]:
    """The help of every verb that a document mentions."""
    verbs = {words[1] for page in DOCUMENTS for words in commands(page.read_text("utf-8")) if words[0] == "dscl"}
    verbs = {verb for verb in verbs if re.fullmatch(r"[a-z-]+", verb)}
    run = [sys.executable, "-m", "dscl"]
    helps = {verb: subprocess.run([*run, verb, "--help"], capture_output=True, text=True) for verb in sorted(verbs)}
    assert [verb for verb, process in helps.items() if process.returncode] == []
    return {verb: process.stdout for verb, process in helps.items()}


@pytest.mark.parametrize("page", DOCUMENTS, ids=page_name)
def test_commands_have_known_options(page: Path, verb_help: dict[str, str]) -> None:
    shared = (REPOSITORY / "launch" / "supervise.sh").read_text("utf-8")
    unknown = []
    for words in commands(page.read_text("utf-8")):
        if words[0] == "dscl":
            known = verb_help.get(words[1], "VERB RECIPE.yaml --help")
        elif words[0].startswith("./"):
            known = (REPOSITORY / words[0]).read_text("utf-8") + shared
            known += (REPOSITORY / "tests" / "support" / "suite.py").read_text("utf-8")
        elif words[1].endswith(".py") and words[1] != "tools/NAME.py":
            known = (REPOSITORY / words[1]).read_text("utf-8") + " --help"
        else:
            continue
        options = [word for word in words[1:] if word.startswith("--")]
        unknown += [f"{words[1]} {option}" for option in options if option.partition("=")[0] not in known]
    assert unknown == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=page_name)
def test_overrides_are_keys_of_a_recipe(page: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stream = [{"name": f"task{i}", "path": "data"} for i in range(3)]
    document = {"run_dir": "out/a", "model": {"name": "base"}, "method": {"name": "asr"}, "stream": stream}
    recipe.write_text(yaml.safe_dump(document))
    text = page.read_text("utf-8")
    inline = [code.split() for code in re.findall(r"`([^`]+)`", text)]
    lists = [words[2:] for words in commands(text) if words[0] == "dscl" and words[1] in ("train", "plan", "doctor")]
    lists += [words for words in inline if all(OVERRIDE.fullmatch(word) and "." in word for word in words)]
    for words in lists:
        overrides = [word for word in words if OVERRIDE.fullmatch(word) and "..." not in word]
        overrides = [word.replace("NAME", "asr") for word in overrides if not word.startswith(("order=", "folder="))]
        if OWN_METHOD not in overrides:
            read_recipe(str(recipe), ["method.name=" + method_of(page), *overrides])


def test_every_key_of_a_recipe_is_described() -> None:
    page = (REPOSITORY / "dscl" / "recipe" / "README.md").read_text("utf-8")
    for config in (TopConfig, TaskConfig, *SECTION_CONFIGS.values()):
        for field in dataclasses.fields(config):
            name = field.name.rstrip("_")
            assert f"| `{name}` |" in page or f"| `{name}." in page, f"{config.__name__}.{field.name}"
    page = (REPOSITORY / "dscl" / "reporting" / "README.md").read_text("utf-8")
    for field in dataclasses.fields(CompareConfig):
        assert f"| `{field.name}` |" in page, field.name
