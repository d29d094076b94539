"""`dscl generate`: its arguments, its prompts, and the printing of the answers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dscl.cli.lazy_imports import disable_gc_for_imports, import_export_module
from dscl.cli.verb import ArgumentParser, Verb
from dscl.utils.errors import UserError

BATCH_SIZE = 64  # prompts; the answers are printed after every so many
EXAMPLE = """example:
  dscl generate out/a --prompt "The film was a joy." --template "{prompt}\\nAnswer:"
  dscl generate out/export --file prompts.jsonl --json > answers.jsonl

Prompts must have the form that the tasks were trained on; --template brings them into it. A text file or the standard
input holds one prompt a line. Prompts of several lines go into a .json or .jsonl file. Before each answer stands the
task that the router chose (base: no task, so the base model answers) and its margin over the second best task. A model
that was trained without a router (task_inference: given) needs --task."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_or_export", metavar="RUN_DIR|EXPORT")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--file", metavar="FILE", help=".txt, .json or .jsonl with prompts; -: the standard input")
    parser.add_argument(
        "--template", metavar="TEXT", help="text in which {prompt} is replaced by each prompt; \\n: line break"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument(
        "--task", metavar="NAME", help="the task of all prompts; without it a router finds each prompt's task"
    )
    parser.add_argument("--base", metavar="MODEL", help="the folder of an export's base model, if it was moved")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(options: argparse.Namespace) -> None:
    prompts = apply_template(_read_prompts(options), options.template)
    with disable_gc_for_imports():
        from dscl.serving.bundle import DESCRIPTION_FILE, read_bundle_description
        from dscl.serving.server import open_model

    folder = Path(options.run_or_export).expanduser()
    if (folder / DESCRIPTION_FILE).is_file():
        description = read_bundle_description(folder, options.base)
    elif options.base is not None:
        raise UserError("--base: only for an export; a run's base model is the one that its recipe names")
    else:
        description = import_export_module().describe_run(folder)
    model = open_model(description)
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        answers = model.generate(batch, options.max_new_tokens, ... if options.task is None else options.task)
        for prompt, answer in zip(batch, answers, strict=True):
            if options.json:
                record = {"prompt": prompt, "task": answer.task, "margin": answer.margin, "distance": answer.distance}
                print(json.dumps({**record, "answer": answer.text}, ensure_ascii=False), flush=True)
            else:
                margin = "" if answer.margin is None else f", margin {answer.margin:.2f}"
                print(f"[{answer.task or 'base'}{margin}] {answer.text}", flush=True)


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of `generate`: from --prompt, from --file, or from the standard input."""
    from dscl.data.prompts import read_prompts, split_lines

    if options.prompt is not None:
        return list(options.prompt)
    if options.file not in (None, "-"):
        return read_prompts(Path(options.file).expanduser())
    read_stdin = options.file == "-" or not sys.stdin.isatty()
    prompts = split_lines(sys.stdin.buffer.read(), "the standard input") if read_stdin else []
    if not prompts:
        raise UserError("no prompt given; give --prompt TEXT, --file FILE, or lines on the standard input")
    return prompts


def apply_template(prompts: list[str], template: str | None) -> list[str]:
    """Every prompt in the place of {prompt} in the template, in which \\n is a line break."""
    if template is None:
        return prompts
    if "{prompt}" not in template:
        raise UserError(f"--template: given {template!r}; it must hold {{prompt}}, where each prompt goes")
    return [template.replace("\\n", "\n").replace("{prompt}", prompt) for prompt in prompts]


GENERATE = Verb("answer prompts, each with the adapter of its task", EXAMPLE, add_arguments, run)
