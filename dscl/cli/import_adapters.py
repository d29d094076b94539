"""`dscl import-adapters`: its arguments, and the call of `dscl.serving.export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dscl.cli.lazy_imports import import_export_module
from dscl.cli.verb import ArgumentParser, Verb
from dscl.utils.errors import UserError

EXAMPLE = """example:
  dscl import-adapters out/export --base models/llama --task news=adapters/news=news.txt \\
      --task law=adapters/law=law.jsonl

Writes an export of PEFT adapters that were trained elsewhere, with a router for them. The router needs some prompts of
every task (hundreds, if available). They pass through the lower layers of the base model; nothing is trained. A .txt
file holds one prompt a line; a .json or .jsonl file holds texts or {"prompt": ...} objects."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--base", required=True, metavar="MODEL", help="a model folder or a hub id")
    parser.add_argument(
        "--task", action="append", required=True, metavar="NAME=ADAPTER_FOLDER=PROMPTS_FILE", help="one for each task"
    )
    parser.add_argument(
        "--feature-layer", type=int, metavar="N", help="the router reads this layer's input (default: an eighth of all)"
    )
    parser.add_argument(
        "--num-features",
        type=int,
        metavar="E",
        help="random features (default: twice the hidden size, at least 2048)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="N",
        help="how many of a prompt's last tokens the router uses (default: 512)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="precision of the base model (default: bf16)"
    )


def run(options: argparse.Namespace) -> None:
    export = import_export_module()
    export.import_adapters(
        Path(options.folder).expanduser(),
        options.base,
        _parse_adapter_tasks(options.task),
        feature_layer=options.feature_layer,
        num_features=options.num_features,
        max_length=options.max_length,
        precision=options.precision,
    )


def _parse_adapter_tasks(words: list[str]) -> dict[str, tuple[Path, Path]]:
    """The tasks of `import-adapters`, each given as NAME=ADAPTER_FOLDER=PROMPTS_FILE: both paths by task name."""
    tasks: dict[str, tuple[Path, Path]] = {}
    for word in words:
        parts = word.split("=")
        if len(parts) != 3 or not all(part.strip() for part in parts):
            raise UserError(f"--task: given {word!r}; NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed")
        name, adapter, prompts = parts
        if name in tasks:
            raise UserError(f"--task: {name!r} is given twice; give each task a name of its own")
        tasks[name] = (Path(adapter).expanduser(), Path(prompts).expanduser())
    return tasks


IMPORT_ADAPTERS = Verb("write an export of adapters that were trained elsewhere", EXAMPLE, add_arguments, run)
