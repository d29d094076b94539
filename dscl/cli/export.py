"""`dscl export`: its arguments, and the call of `dscl.serving.export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dscl.cli.lazy_imports import import_export_module
from dscl.cli.verb import ArgumentParser, Verb, add_checkpoint_argument

EXAMPLE = """example:
  dscl export out/a out/export
  dscl export out/a out/lora --task news

Writes a folder for dscl generate and, in Python, dscl.load: the adapters or sub-experts of the finished tasks, the
router, the tokenizer, the dense weights if they were trained too, and the path of the base model. For a method without
parameters of a single task (sequential, osft, ...) it writes the whole model in the format of transformers, or with
tune: lora its one LoRA.

With --task it writes one task as a LoRA for PEFT. That is exact for adapters, and for sub-experts with gate: uniform.
For sub-experts with a token router it is impossible, and the command says so."""


def add_arguments(parser: ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--task", metavar="NAME", help="write this task alone, as a LoRA that PEFT loads")


def run(options: argparse.Namespace) -> None:
    export = import_export_module()
    run_dir, folder = Path(options.run).expanduser(), Path(options.folder).expanduser()
    if options.task is not None:
        export.export_task_adapter(run_dir, folder, options.task, options.checkpoint)
    else:
        export.export_run(run_dir, folder, options.checkpoint)


EXPORT = Verb("write what a run has learnt as a folder that is independent of the run", EXAMPLE, add_arguments, run)
