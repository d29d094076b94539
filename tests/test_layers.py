"""The house's order, read from the imports: who may import whom, and who alone may import a package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A file imports from its own layer and from those below. Folders count as one name.
LAYERS = {
    0.0: (
        "dscl",
        "dscl.errors",
        "dscl.config",
        "dscl.cache",
        "dscl.clock",
        "dscl.hardware",
        "dscl.spawn",
        "dscl.stamped",
        "dscl.maths",
    ),
    1.0: (
        "dscl.data",
        "dscl.model",
        "dscl.dist",
        "dscl.stopping",
        "dscl.pulse",
        "dscl.adamw",
        "dscl.owners",
        "dscl.shards",
        "dscl.steering",
        "dscl.router",
        "dscl.settings",
        "dscl.description",
    ),
    2.0: ("dscl.engine", "dscl.serve"),
    3.0: ("dscl.methods",),
    4.0: ("dscl.observe",),
    5.0: ("dscl.evaluate", "dscl.checkpoint", "dscl.harness"),
    6.0: ("dscl.recipe",),
    6.5: ("dscl.job", "dscl.pace", "dscl.watch", "dscl.run_dir", "dscl.doctor", "dscl.rehearsal"),
    7.0: ("dscl.train", "dscl.plan", "dscl.export", "dscl.report"),
    7.5: ("dscl.compare",),
    8.0: ("dscl.cli",),
    9.0: ("dscl.__main__",),
}
# What only one file may import.
ALONE = {"deepspeed": "dscl.engine", "torch.distributed": "dscl.dist", "triton": "dscl.maths.gates_kernel"}
# What a part may not import although it stands as high: data knows no ranks; a method neither steps nor communicates;
# what serves needs no DeepSpeed.
BARRED = {
    "dscl.data": ("dscl.dist", "dscl.model"),
    "dscl.methods": ("dscl.dist", "dscl.engine"),
    "dscl.serve": ("dscl.engine",),
}
# All that a folder may import beside itself and the standard library.
ONLY = {"dscl.maths": ("torch", "triton")}


def problems(sources: Mapping[str, str]) -> list[str]:
    """What is wrong in these modules (dotted name → source), one line each."""
    layer_of = {part: layer for layer, parts in LAYERS.items() for part in parts}
    found = []
    for module, source in sorted(sources.items()):
        part = _part(module)
        if part not in layer_of:
            found.append(f"{module} is missing from the table of layers")
            continue
        for name in sorted(imports(module, source, sources)):
            if name.split(".")[0] == "dscl" and layer_of.get(_part(name), 99.0) > layer_of[part]:
                found.append(f"{module} imports {name}, which stands higher")
            for package, owner in ALONE.items():
                if _within(name, package) and module != owner:
                    found.append(f"{module} imports {name}; only {owner} may")
            if any(_within(name, other) for other in BARRED.get(part, ())):
                found.append(f"{module} imports {name}, which {part} may not")
            allowed = (part, *ONLY.get(part, ()), *sys.stdlib_module_names)
            if part in ONLY and not any(_within(name, other) for other in allowed):
                found.append(f"{module} imports {name}; {part} may import only {', '.join(ONLY[part])}")
    return found


def imports(module: str, source: str, sources: Mapping[str, str]) -> set[str]:
    """Every module that a source imports, also within functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its layer; write it out"
            assert node.module is not None
            found |= {_imported(node.module, alias.name, sources) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            found.add("torch.distributed")  # reachable through `import torch` alone
    return found


def _imported(package: str, name: str, sources: Mapping[str, str]) -> str:
    """`from package import name` imports a module of that name, or else something within `package`."""
    dotted = f"{package}.{name}"
    return dotted if dotted in sources or dotted in ALONE or (package == "dscl" and name[0] != "_") else package


def _part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _sources() -> Iterator[tuple[str, str]]:
    for path in (REPOSITORY / "dscl").rglob("*.py"):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text("utf-8")


def test_house_is_in_order() -> None:
    sources = dict(_sources())
    assert len(sources) > 25  # the files were found
    assert not problems(sources)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dscl.config", "from dscl.engine import Engine"),
        ("dscl.config", "from dscl import engine"),
        ("dscl.config", "import dscl.engine as e"),
        ("dscl.config", "def f():\n    from dscl.train import train"),
        ("dscl.config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dscl.recipe import Recipe"),
        ("dscl.data.task", "from dscl.methods.base import Method"),
        ("dscl.data.task", "from dscl import dist"),
        ("dscl.data.task", "from dscl.dist import rank"),
        ("dscl.evaluate", "import deepspeed"),
        ("dscl.evaluate", "from deepspeed.runtime import zero"),
        ("dscl.evaluate", "import torch.distributed as torch_dist"),
        ("dscl.evaluate", "from torch import distributed"),
        ("dscl.evaluate", "from torch.distributed.nn import all_reduce"),
        ("dscl.evaluate", "import torch\ntorch.distributed.barrier()"),
        ("dscl.methods.sequential", "from dscl.engine import Engine"),
        ("dscl.methods.sequential", "from dscl import dist"),
        ("dscl.serve", "from dscl.engine import DTYPES"),
        ("dscl.serve", "from dscl.methods.asr import Asr"),
        ("dscl.maths.scores", "import numpy"),
        ("dscl.maths.scores", "from dscl.errors import UserError"),
        ("dscl.train", "from dscl import cli"),
        ("dscl.newcomer", ""),
        ("dscl.watch", "import dscl.newcomer"),
    ],
)
def test_broken_order_is_seen(module: str, source: str) -> None:
    assert len(problems({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dscl.engine", "import deepspeed\nfrom dscl import dist\nfrom dscl.config import nearest"),
        ("dscl.dist", "import torch.distributed as torch_dist"),
        (
            "dscl.maths.scores",
            "import math\nimport torch\nfrom torch.nn import functional\nfrom dscl.maths.text import f",
        ),
        ("dscl.data.task", "from dscl.data import readers\nimport numpy"),
        ("dscl.cli", "from dscl import __version__, train"),
    ],
)
def test_good_order_passes(module: str, source: str) -> None:
    assert not problems({module: source})
