"""The order of the folders, read from the imports: who may import whom, and who alone may import a package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# From the bottom to the top. A file imports from its own folder and from those before it.
ORDER = (
    "dscl.utils",
    "dscl.maths",
    "dscl.config",
    "dscl.distributed",
    "dscl.data",
    "dscl.model",
    "dscl.model.adapters",
    "dscl.engine",
    "dscl.methods",
    "dscl.recipe",
    "dscl.monitoring",
    "dscl.training",
    "dscl.planning",
    "dscl.serving",
    "dscl.reporting",
    "dscl.cli",
    "dscl.__main__",
)
# Packages that only one folder may import.
ALONE = {"deepspeed": "dscl.engine", "torch.distributed": "dscl.distributed", "triton": "dscl.maths"}
# The files of the engine that a method may not see.
ENGINE_ITSELF = ("deepspeed_patches", "engine", "projector", "zero_layouts", "zero_shards")
# Lower folders that a folder may still not import: data know no ranks; a method neither steps nor communicates; serving
# needs no DeepSpeed.
BARRED = {
    "dscl.data": ("dscl.distributed",),
    "dscl.methods": ("dscl.distributed", *(f"dscl.engine.{name}" for name in ENGINE_ITSELF)),
    "dscl.serving.server": ("dscl.engine", "dscl.training"),
    "dscl.serving.bundle": ("dscl.engine", "dscl.training"),
}
# The only packages that a folder may import beside itself and the standard library.
ONLY = {"dscl.maths": ("torch", "triton")}


def problems(sources: Mapping[str, str]) -> list[str]:
    """A message for each forbidden import of these modules (dotted name → source)."""
    messages = []
    for module, source in sorted(sources.items()):
        folder = folder_of(module)
        if folder is None:
            messages.append(f"{module} is in no folder of the order")
            continue
        for name in sorted(imports(module, source, sources)):
            other = folder_of(name)
            if _within(name, "dscl") and name != "dscl" and (other is None or ORDER.index(other) > ORDER.index(folder)):
                messages.append(f"{module} imports {name}, which stands higher")
            for package, owner in ALONE.items():
                if _within(name, package) and folder != owner:
                    messages.append(f"{module} imports {name}; only {owner} may")
            for place, barred in BARRED.items():
                if _within(module, place) and any(_within(name, each) for each in barred):
                    messages.append(f"{module} imports {name}, which {place} may not")
            allowed = (folder, *ONLY.get(folder, ()), *sys.stdlib_module_names)
            if folder in ONLY and not any(_within(name, each) for each in allowed):
                messages.append(f"{module} imports {name}; {folder} may import only {', '.join(ONLY[folder])}")
    return messages


def folder_of(module: str) -> str | None:
    """The longest entry of the order that a module is in."""
    return max((folder for folder in ORDER if _within(module, folder)), key=len, default=None)


def imports(module: str, source: str, sources: Mapping[str, str]) -> set[str]:
    """Every module that a source imports, also within functions and under TYPE_CHECKING."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its layer; write it out"
            assert node.module is not None
            modules |= {_imported(node.module, alias.name, sources) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            modules.add("torch.distributed")  # reachable through `import torch` alone
    return modules


def _imported(package: str, name: str, sources: Mapping[str, str]) -> str:
    """`from package import name` imports a module of that name, or else something within `package`."""
    dotted = f"{package}.{name}"
    return dotted if dotted in sources or dotted in ALONE or (package == "dscl" and name[0] != "_") else package


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _sources() -> Iterator[tuple[str, str]]:
    for path in (REPOSITORY / "dscl").rglob("*.py"):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text("utf-8")


def test_the_folders_are_in_order() -> None:
    sources = {name: source for name, source in _sources() if name != "dscl"}
    assert len(sources) > 90  # the files were found
    assert not problems(sources)


def test_no_folder_is_too_large_to_see() -> None:
    folders = {path.parent for path in (REPOSITORY / "dscl").rglob("*.py")}
    for folder in folders:
        entries = [path for path in folder.iterdir() if path.name[0] not in "_." and path.suffix != ".md"]
        assert len(entries) <= 15, folder


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dscl.config.parsing", "from dscl.engine.engine import Engine"),
        ("dscl.config.parsing", "from dscl.engine import engine"),
        ("dscl.config.parsing", "import dscl.engine.engine as e"),
        ("dscl.config.parsing", "def f():\n    from dscl.training.trainer import train"),
        ("dscl.data.task", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dscl.recipe import recipe"),
        ("dscl.data.task", "from dscl.methods.base import Method"),
        ("dscl.data.task", "from dscl.distributed import comm"),
        ("dscl.model.flops", "from dscl.model.adapters.lora_bank import Bank"),
        ("dscl.training.evaluation", "import deepspeed"),
        ("dscl.training.evaluation", "from deepspeed.runtime import zero"),
        ("dscl.training.evaluation", "import torch.distributed as torch_dist"),
        ("dscl.training.evaluation", "from torch import distributed"),
        ("dscl.training.evaluation", "from torch.distributed.nn import all_reduce"),
        ("dscl.training.evaluation", "import torch\ntorch.distributed.barrier()"),
        ("dscl.methods.sequential", "from dscl.engine.engine import Engine"),
        ("dscl.methods.sequential", "from dscl.distributed import comm"),
        ("dscl.serving.server", "from dscl.training.setup import open_job"),
        ("dscl.maths.scores", "import numpy"),
        ("dscl.maths.scores", "from dscl.utils.errors import UserError"),
        ("dscl.training.trainer", "from dscl.cli import app"),
        ("dscl.newcomer", ""),
        ("dscl.training.trainer", "import dscl.newcomer"),
    ],
)
def test_broken_order_is_seen(module: str, source: str) -> None:
    assert len(problems({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dscl.engine.engine", "import deepspeed\nfrom dscl.distributed import comm\nfrom dscl.config import parsing"),
        ("dscl.distributed.comm", "import torch.distributed as torch_dist"),
        (
            "dscl.maths.scores",
            "import math\nimport torch\nfrom torch.nn import functional\nfrom dscl.maths.text import f",
        ),
        ("dscl.data.task", "from dscl.data import readers\nimport numpy"),
        ("dscl.model.adapters.lora_bank", "from dscl.model import flops"),
        ("dscl.cli.app", "from dscl import __version__\nfrom dscl.training import trainer"),
    ],
)
def test_good_order_passes(module: str, source: str) -> None:
    assert not problems({module: source})
