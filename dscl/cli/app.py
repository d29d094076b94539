"""The command line interface: verbs, their arguments, exit statuses, and error messages of one line.

Exit status 0: done; 1: a failure; 2: wrong input; 75: stopped on purpose, to be run again. Heavy imports happen inside
the functions of the verbs, so that `--help` and errors in the arguments appear at once.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dscl import __version__
from dscl.config.parsing import did_you_mean
from dscl.distributed.launcher import (
    die_with_parent,
    is_spawned_rank,
    launcher_local_rank,
    parse_nproc,
    prepare_rank_process,
    report_exit,
    resolve_exit_status,
    spawn_ranks,
)
from dscl.utils.errors import ExternalFailure, RunStopped, UserError
from dscl.utils.quiet import silence_libraries

if TYPE_CHECKING:
    from dscl.recipe.recipe import Recipe

ABOUT = """Fine-tune LLaMA-class language models on one task after another.

example:
  dscl train recipe.yaml --nproc 2

dscl VERB --help explains a verb."""

TRAIN_EXAMPLE = """example:
  dscl train recipe.yaml --nproc 2 run_dir=out/a train.lr=1e-4

Run it again with the same run_dir and it resumes; with --dry-run it checks everything up to the first step and stops.
Under torchrun, deepspeed or srun leave --nproc out: the ranks they started are joined."""

DOCTOR_EXAMPLE = """example:
  dscl doctor recipe.yaml --nproc 2
  torchrun ... -m dscl doctor recipe.yaml

All ranks compare their program versions, recipe, data, model and clocks, and check that they share run_dir. They
measure free memory, network bandwidth and compute speed. Every problem is printed with its host, and the exit status
is then 2. Nothing is trained. dscl train --doctor runs the same checks and then trains, as the launch scripts do."""

PLAN_EXAMPLE = """example:
  dscl plan recipe.yaml --nodes 8 --gpus-per-node 8 --gpu H100 --gpu-memory 80GiB --bandwidth 50GB

Prints for every ZeRO stage the memory of a rank (weights, optimizer state, the method's state, gradients, activations,
the peak), the bytes that it sends, the time of a step, and which stage and micro-batch fit. Neither the cluster nor a
GPU is needed: a step of the real engine runs on fake tensors. --bandwidth is how much one device sends to others in a
second."""

EVAL_EXAMPLE = """example:
  dscl eval out/a --nproc 2 evaluate.mode=generate

Evaluates the newest checkpoint of a run (or --checkpoint) on all its tasks and prints one JSON line; the run itself is
not changed."""

GENERATE_EXAMPLE = """example:
  dscl generate out/a --prompt "The film was a joy." --template "{prompt}\\nAnswer:"
  dscl generate out/export --file prompts.jsonl --json > answers.jsonl

Prompts must have the form that the tasks were trained on; --template brings them into it. A text file or the standard
input holds one prompt a line. Prompts of several lines go into a .json or .jsonl file. Before each answer stands the
task that the router chose (base: no task, so the base model answers) and its margin over the second best task. A model
that was trained without a router (router: oracle) needs --task."""

EXPORT_EXAMPLE = """example:
  dscl export out/a out/export
  dscl export out/a out/lora --task news

Writes a folder for dscl generate and, in Python, dscl.load: the adapters or sub-experts of the finished tasks, the
router, the tokenizer, the dense weights if they were trained too, and the path of the base model. For a method without
parameters of a single task (sequential, osft, ...) it writes the whole model in the format of transformers, or with
tune: lora its one LoRA.

With --task it writes one task as a LoRA for PEFT. That is exact for adapters, and for sub-experts with gate: uniform.
For sub-experts with a token router it is impossible, and the command says so."""

ROUTE_EXAMPLE = """example:
  dscl route-existing out/export --base models/llama --task news=adapters/news=news.txt \\
      --task law=adapters/law=law.jsonl

Writes an export of PEFT adapters that were trained elsewhere, with a router for them. The router needs some prompts of
every task (hundreds, if available). They pass through the lower layers of the base model; nothing is trained. A .txt
file holds one prompt a line; a .json or .jsonl file holds texts or {"prompt": ...} objects."""

COMPARE_EXAMPLE = """example:
  dscl compare launch/comparisons/methods.yaml folder=data --methods sequential,asr,osft --seeds 3

The file is a recipe without method and train.lr, but with a section compare: the learning rates that every method tries
on the dev split (equally many each), and rows, which are methods with settings. --methods selects rows, or methods with
their defaults. All runs have the same samples, order, epochs, batches and evaluation. They run in parallel as far as
the machine allows. The same command resumes a comparison and does not repeat complete runs. At the end it writes a
report into run_dir."""

REPORT_EXAMPLE = """example:
  dscl report out/a out/b --out out/report

Writes report.html (one file that needs no network) and report.md: scores, score matrices, forgetting over time,
routing, bytes, time and memory. Runs that differ only in their seed are averaged. Runs of another stream or budget are
listed separately. A folder that contains runs stands for all of them."""

VERBS = {
    "train": ("train a recipe's stream of tasks", TRAIN_EXAMPLE),
    "plan": ("estimate memory, communication and time of a recipe on a cluster", PLAN_EXAMPLE),
    "doctor": ("check whether machines can run a recipe", DOCTOR_EXAMPLE),
    "eval": ("evaluate a checkpoint of a run", EVAL_EXAMPLE),
    "generate": ("answer prompts, each with the adapter of its task", GENERATE_EXAMPLE),
    "export": ("write what a run has learnt as a folder that is independent of the run", EXPORT_EXAMPLE),
    "compare": ("train several methods on one stream, with equal budgets", COMPARE_EXAMPLE),
    "report": ("write a page with the results of runs", REPORT_EXAMPLE),
    "route-existing": ("write an export of adapters that were trained elsewhere", ROUTE_EXAMPLE),
}
DISTRIBUTED_VERBS = ("train", "doctor", "eval")  # may run on several ranks
OVERRIDE_VERBS = (*DISTRIBUTED_VERBS, "plan", "compare")  # accept key=value
PROMPT_BATCH_SIZE = 64  # `generate` prints the answers after every so many prompts


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that a wrong argument is a UserError, which prints one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: sys.argv) and return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    words = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    return resolve_exit_status(run_with_error_report(lambda: _dispatch(words)))


def run_and_exit() -> NoReturn:
    """Run `main`, call the functions registered with atexit, and end the process without shutting Python down.

    Threads that libraries left running can abort the shutdown of the interpreter after everything is done and saved.
    """
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def run_with_error_report(work: Callable[[], int]) -> int:
    """Run `work` and return its exit status; an exception is reported on stderr and becomes an exit status."""
    try:
        return work()
    except UserError as error:
        return _report_error(2, error)
    except ExternalFailure as error:
        return _report_error(1, error)
    except RunStopped as error:
        return _report_error(75, error)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        report_exit(1, "dscl: interrupted; run the same command again to resume", delay=0.0)
    except Exception:
        report_exit(1, traceback.format_exc())
    return 1


def _report_error(status: int, error: Exception) -> int:
    report_exit(status, "dscl: " + " ".join(str(error).splitlines()))  # one line, even if a file name has line breaks
    return status


def _dispatch(words: list[str]) -> int:
    """Parse the command line, then run its verb here, or spawn ranks that do."""
    die_with_parent()
    prepare_rank_process()
    options = _parse_arguments(words)
    if options.verb not in DISTRIBUTED_VERBS:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{options.verb}: runs in one process; start it without a launcher (WORLD_SIZE is set)")
        silence_libraries()
        _configure_logging()
        return _run_single_process_verb(options)
    if options.nproc is not None and "RANK" in os.environ and not is_spawned_rank():
        raise UserError("--nproc: a launcher has already started the ranks (RANK is set); leave --nproc out")
    # Under a launcher the recipe is read after all ranks have connected. If a rank failed before that, the others would
    # wait for it.
    recipe = None if _has_launcher_environment() else _read_recipe(options)
    if options.nproc is not None and not is_spawned_rank():
        count = parse_nproc(options.nproc)
        if count > 1:
            return spawn_ranks(count, words)
    silence_libraries()
    _configure_logging()
    with disable_gc_for_imports():  # after silence_libraries(), which has to come before these imports
        from dscl.distributed import comm
        from dscl.distributed.liveness import Liveness

    def run_verb() -> int:
        return liveness.run_watched(lambda: _run_distributed_verb(options, recipe or _read_recipe(options)))

    # A rank reports its error before it leaves the process group, because that makes the other ranks fail.
    with comm.process_group(), Liveness() as liveness:
        return liveness.set_exit_status(run_with_error_report(run_verb))


@contextmanager
def disable_gc_for_imports() -> Iterator[None]:
    """Import heavy packages without garbage collection, and exclude their objects from later collections.

    The imports create a million objects, none of which is garbage. Collections would take a fifth of the import time,
    and later ones a third of a second each.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _has_launcher_environment() -> bool:
    """Whether this process is one of the ranks that `--nproc`, torchrun, deepspeed or srun has started."""
    return bool({"RANK", "SLURM_PROCID"} & set(os.environ))


def _read_recipe(options: argparse.Namespace) -> Recipe:
    """The checked recipe of a distributed verb (for `eval`, that of its run); imports no heavy package."""
    from dscl.recipe.recipe import read_recipe, read_run_recipe

    if options.verb == "eval":
        return read_run_recipe(options.run, options.assignments)
    return read_recipe(options.recipe, options.assignments)


def _run_distributed_verb(options: argparse.Namespace, recipe: Recipe) -> int:
    with disable_gc_for_imports():
        from dscl.distributed.preemption import StopHandler
        from dscl.training import trainer

    if options.verb == "train":
        with StopHandler().handle_signals() as stop:
            if options.dry_run:
                trainer.dry_run(recipe)
            else:
                trainer.train(recipe, stop, options.doctor)
    elif options.verb == "doctor":
        trainer.diagnose_cluster(recipe)
    else:
        lm_eval_tasks = [name.strip() for name in (options.lm_eval or "").split(",") if name.strip()]
        if options.limit is not None and (not lm_eval_tasks or options.limit < 1):
            raise UserError(f"--limit: given {options.limit}; it needs --lm-eval, and a number of at least 1")
        trainer.evaluate_run(options.run, options.assignments, lm_eval_tasks, options.limit, options.checkpoint)
    return 0


def _run_single_process_verb(options: argparse.Namespace) -> int:
    if options.verb == "generate":
        return _generate_answers(options)
    if options.verb == "compare":
        return _compare_methods(options)
    if options.verb == "plan":
        return _print_plan(options)
    if options.verb == "report":
        from dscl.reporting import report

        for path in report.write_report(
            [Path(run).expanduser() for run in options.runs], Path(options.out).expanduser()
        ):
            print(path)
        return 0
    export = _import_export_module()
    folder = Path(options.folder).expanduser()
    if options.verb == "export" and options.task is not None:
        export.export_task_adapter(Path(options.run).expanduser(), folder, options.task, options.checkpoint)
    elif options.verb == "export":
        export.export_run(Path(options.run).expanduser(), folder, options.checkpoint)
    else:
        names = ("feature_layer", "num_features", "max_length", "precision")
        settings = {name: getattr(options, name) for name in names}
        export.import_adapters(folder, options.base, _parse_adapter_tasks(options.task), **settings)
    return 0


def _generate_answers(options: argparse.Namespace) -> int:
    prompts = _apply_template(_read_prompts(options), options.template)
    with disable_gc_for_imports():
        from dscl.serving.bundle import DESCRIPTION_FILE, read_bundle_description
        from dscl.serving.server import open_model

    folder = Path(options.run_or_export).expanduser()
    if (folder / DESCRIPTION_FILE).is_file():
        description = read_bundle_description(folder, options.base)
    elif options.base is not None:
        raise UserError("--base: only for an export; a run's base model is the one that its recipe names")
    else:
        description = _import_export_module().describe_run(folder)
    model = open_model(description)
    for start in range(0, len(prompts), PROMPT_BATCH_SIZE):
        batch = prompts[start : start + PROMPT_BATCH_SIZE]
        answers = model.generate(batch, options.max_new_tokens, ... if options.task is None else options.task)
        for prompt, answer in zip(batch, answers, strict=True):
            if options.json:
                record = {"prompt": prompt, "task": answer.task, "margin": answer.margin, "distance": answer.distance}
                print(json.dumps({**record, "answer": answer.text}, ensure_ascii=False), flush=True)
            else:
                margin = "" if answer.margin is None else f", margin {answer.margin:.2f}"
                print(f"[{answer.task or 'base'}{margin}] {answer.text}", flush=True)
    return 0


def _compare_methods(options: argparse.Namespace) -> int:
    """Run a comparison, or with --dry-run print its runs. Every run is a process of its own."""
    if options.at_once is not None and options.at_once < 1:
        raise UserError(f"--at-once: given {options.at_once}; at least 1 is needed")
    from dscl.reporting import compare

    methods = [name.strip() for name in (options.methods or "").split(",") if name.strip()]
    comparison = compare.read_comparison_plan(options.recipe, options.assignments, methods, _parse_seeds(options.seeds))
    if options.dry_run:
        for run in comparison.all_runs():
            print(run.name)
        return 0
    _choose_accelerator()
    for path in compare.run_comparison(comparison, options.at_once, parse_nproc(options.nproc or "1")):
        print(path)
    print((comparison.folder / "report.md").read_text("utf-8"))
    return 0


def _print_plan(options: argparse.Namespace) -> int:
    from dscl.recipe.recipe import read_recipe
    from dscl.utils.hardware import parse_gpu_peak, parse_size

    for name in ("nodes", "gpus_per_node", "tflops", "efficiency"):
        value = getattr(options, name)
        if value is not None and (value <= 0 or (name == "efficiency" and value > 1)):
            allowed = "a share above 0, up to 1" if name == "efficiency" else "more than 0"
            raise UserError(f"--{name.replace('_', '-')}: given {value:g}; {allowed} is needed")
    if options.gpu is not None and options.tflops is not None:
        raise UserError("--tflops: given beside --gpu, which says what the device can do; leave one of them out")
    memory = options.gpu_memory and parse_size("--gpu-memory", options.gpu_memory)
    bandwidth = options.bandwidth and parse_size("--bandwidth", options.bandwidth)
    peak = parse_gpu_peak(options.gpu) if options.gpu else options.tflops and 1e12 * options.tflops
    recipe = read_recipe(options.recipe, options.assignments)
    os.environ["DS_ACCELERATOR"] = "cpu"  # planning uses no GPU
    with disable_gc_for_imports():
        planning = import_module("dscl.planning.plan")
    cluster = planning.Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        device_memory=memory,
        bandwidth=bandwidth,
        peak_flops=peak,
        efficiency=options.efficiency,
    )
    plan = planning.make_plan(recipe, cluster, logging.getLogger("dscl").info, options.alone)
    print(json.dumps(plan.document()) if options.json else "\n".join(plan.lines()), flush=True)
    return 0


def _parse_seeds(text: str | None) -> list[int]:
    """The seeds of `--seeds`: `3` means 0, 1 and 2; `3,4` means 3 and 4; none without the option."""
    if text is None:
        return []
    if not all(word.isdecimal() for word in text.split(",")) or text == "0":
        raise UserError(f"--seeds: given {text!r}; allowed: how many, or seeds like 3,4,5")
    numbers = [int(word) for word in text.split(",")]
    return numbers if "," in text else list(range(numbers[0]))


def _import_export_module() -> Any:
    """Import `dscl.serving.export`, which reads run directories and needs DeepSpeed for that."""
    _choose_accelerator()
    with disable_gc_for_imports():
        return import_module("dscl.serving.export")


def _choose_accelerator() -> None:
    """Set DS_ACCELERATOR=cpu on a machine without GPUs, before DeepSpeed is imported, which would print a warning."""
    from dscl.distributed import comm

    if comm.device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


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


def _apply_template(prompts: list[str], template: str | None) -> list[str]:
    """Every prompt in the place of {prompt} in the template, in which \\n is a line break."""
    if template is None:
        return prompts
    if "{prompt}" not in template:
        raise UserError(f"--template: given {template!r}; it must hold {{prompt}}, where each prompt goes")
    return [template.replace("\\n", "\n").replace("{prompt}", prompt) for prompt in prompts]


def _parse_adapter_tasks(words: list[str]) -> dict[str, tuple[Path, Path]]:
    """The tasks of `route-existing`, each given as NAME=ADAPTER_FOLDER=PROMPTS_FILE: both paths by task name."""
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


def _parse_arguments(words: list[str]) -> argparse.Namespace:
    allowed = f"allowed: {', '.join(VERBS)}; see dscl --help"
    if not words:
        raise UserError(f"no verb given; {allowed}")
    if words[0] not in VERBS and not words[0].startswith("-"):
        raise UserError(f"{words[0]}: no such verb{did_you_mean(words[0], VERBS)}; {allowed}")
    options, unknown_words = _build_parser().parse_known_args(words)
    for word in unknown_words:  # argparse does not collect positional arguments that follow an option
        allowed = "key=value and options" if options.verb in OVERRIDE_VERBS else "options"
        if word.startswith("-") or "=" not in word or options.verb not in OVERRIDE_VERBS:
            raise UserError(f"{word}: not understood; allowed: {allowed}, see dscl {options.verb} --help")
        options.assignments.append(word)
    return options


def _build_parser() -> ArgumentParser:
    raw_text = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="dscl", description=ABOUT, formatter_class=raw_text, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dscl {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=ArgumentParser)
    parsers = {}
    for verb, (summary, example) in VERBS.items():
        parsers[verb] = subparsers.add_parser(
            verb, help=summary, description=summary, epilog=example, formatter_class=raw_text, allow_abbrev=False
        )
        if verb in DISTRIBUTED_VERBS:
            parsers[verb].add_argument("--nproc", metavar="N|auto", help="start N ranks here (auto: one for each GPU)")
    train, evaluate = parsers["train"], parsers["eval"]
    any_number: dict[str, Any] = {"nargs": "*", "default": []}
    for parser_with_recipe in (train, parsers["doctor"], parsers["plan"]):
        parser_with_recipe.add_argument("recipe", metavar="RECIPE.yaml")
        parser_with_recipe.add_argument(
            "assignments", **any_number, metavar="key=value", help="dotted overrides of the recipe's keys"
        )
    train.add_argument("--doctor", action="store_true", help="first check whether the machines can run the recipe")
    train.add_argument("--dry-run", action="store_true", help="build and check everything, show the plan, stop")
    evaluate.add_argument("run", metavar="RUN_DIR")
    evaluate.add_argument("assignments", **any_number, metavar="evaluate.key=value", help="overrides of evaluate.*")
    evaluate.add_argument("--lm-eval", metavar="A,B", help="also evaluate these tasks of lm-eval, if it is installed")
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="with --lm-eval: how many samples of each of its tasks"
    )
    for parser_with_checkpoint in (evaluate, parsers["export"]):
        parser_with_checkpoint.add_argument(
            "--checkpoint", metavar="NAME|best", help="which checkpoint of the run (default: the newest)"
        )
    compare, report = parsers["compare"], parsers["report"]
    compare.add_argument("recipe", metavar="STREAM.yaml")
    compare.add_argument("assignments", **any_number, metavar="key=value", help="dotted overrides of the file's keys")
    compare.add_argument("--methods", metavar="A,B,C", help="rows of the file, or methods (default: all rows)")
    compare.add_argument("--seeds", metavar="N", help="how many, or seeds like 3,4,5 (default: the file's, or 3)")
    compare.add_argument("--at-once", type=int, metavar="N", help="runs side by side (default: as GPUs or cores allow)")
    compare.add_argument("--nproc", metavar="N", help="ranks of each run (default: 1)")
    compare.add_argument("--dry-run", action="store_true", help="check everything, name the runs, stop")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold some")
    report.add_argument("--out", required=True, metavar="DIR", help="where report.html and report.md go")
    _add_plan_arguments(parsers["plan"])
    _add_serving_arguments(parsers["generate"], parsers["export"], parsers["route-existing"])
    return parser


def _add_plan_arguments(plan: ArgumentParser) -> None:
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    plan.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="ranks on each (default: 1)")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="memory of one device, like 80GiB, to show what fits")
    plan.add_argument("--bandwidth", metavar="SIZE", help="what one device sends in a second, like 50GB")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU model, like H100, for its peak FLOPS in bf16")
    plan.add_argument("--tflops", type=float, metavar="N", help="peak TFLOPS of one device, if --gpu does not know it")
    plan.add_argument(
        "--alone", action="store_true", help="plan the recipe's own DeepSpeed JSON only, not every ZeRO stage"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object, with all sizes in bytes")
    plan.add_argument(
        "--efficiency", type=float, default=0.4, metavar="SHARE", help="share of the peak that a step reaches (0.4)"
    )


def _add_serving_arguments(generate: ArgumentParser, export: ArgumentParser, route: ArgumentParser) -> None:
    generate.add_argument("run_or_export", metavar="RUN_DIR|EXPORT")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--file", metavar="FILE", help=".txt, .json or .jsonl with prompts; -: the standard input")
    generate.add_argument(
        "--template", metavar="TEXT", help="text in which {prompt} is replaced by each prompt; \\n: line break"
    )
    generate.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    generate.add_argument(
        "--task", metavar="NAME", help="the task of all prompts; without it a router finds each prompt's task"
    )
    generate.add_argument("--base", metavar="MODEL", help="the folder of an export's base model, if it was moved")
    generate.add_argument("--json", action="store_true", help="one JSON object a line")
    export.add_argument("run", metavar="RUN_DIR")
    export.add_argument("folder", metavar="DIR")
    export.add_argument("--task", metavar="NAME", help="write this task alone, as a LoRA that PEFT loads")
    route.add_argument("folder", metavar="DIR")
    route.add_argument("--base", required=True, metavar="MODEL", help="a model folder or a hub id")
    route.add_argument(
        "--task", action="append", required=True, metavar="NAME=ADAPTER_FOLDER=PROMPTS_FILE", help="one for each task"
    )
    route.add_argument(
        "--feature-layer", type=int, metavar="N", help="the router reads this layer's input (default: an eighth of all)"
    )
    route.add_argument(
        "--num-features", type=int, metavar="E", help="random features (default: twice the hidden size, at least 1024)"
    )
    route.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="N",
        help="how many of a prompt's last tokens the router uses (default: 512)",
    )
    route.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="precision of the base model (default: bf16)"
    )


def _configure_logging() -> None:
    """Print dscl's log messages on stderr, one line each, from one rank of each machine."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dscl: %(message)s"))
    logger = logging.getLogger("dscl")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if launcher_local_rank() == 0 else logging.CRITICAL)
