"""The command line: verbs, exit statuses, and one clear line where something is wrong.

Exit status 0: done; 1: an internal failure; 2: the input is wrong; 75: stopped on purpose, to be run again. Heavy
imports happen inside the verbs, so that help and wrong words answer at once.
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
from dscl.config.parsing import nearest
from dscl.distributed.launcher import begin, die_with_parent, how_many, leave, local_rank, spawn, spawned, tell
from dscl.utils.errors import Failure, Stopped, UserError
from dscl.utils.quiet import quiet

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

All ranks compare their programs, recipe, data and model, their clocks and what they see of run_dir, and measure memory,
network and arithmetic. What is odd is named with its host, and the status is 2. Nothing is trained; dscl train --doctor
does the same and then trains, and so do the launch scripts."""

PLAN_EXAMPLE = """example:
  dscl plan recipe.yaml --nodes 8 --gpus-per-node 8 --gpu H100 --gpu-memory 80GiB --bandwidth 50GB

What a rank will hold (weights, optimizer, what the method keeps, gradients, activations, the peak) under every ZeRO
stage, what it sends, how long a step takes, and which stage and micro-batch fit. The cluster need not be there, nor a
GPU: a step of the real engine is rehearsed on tensors without contents. --bandwidth is what one device sends to others
in a second."""

EVAL_EXAMPLE = """example:
  dscl eval out/a --nproc 2 evaluate.mode=generate

Evaluates the newest checkpoint of a run (or --checkpoint) on all its tasks and prints one JSON line; the run itself is
not changed."""

GENERATE_EXAMPLE = """example:
  dscl generate out/a --prompt "The film was a joy." --template "{prompt}\\nAnswer:"
  dscl generate out/export --file prompts.jsonl --json > answers.jsonl

Prompts are answered in the form that the tasks were trained on: --template makes it of them, or they have it already.
A text file or the standard input holds one a line; prompts of several lines go into a .json or .jsonl file. Each answer
comes after the task that the prompt went to (base: to none, so the base model answers) and the lead that this task had
over the second best. What was trained with the task given (task_inference: given) does not find it out: give --task."""

EXPORT_EXAMPLE = """example:
  dscl export out/a out/export
  dscl export out/a out/lora --task news

Writes what the tasks that have ended left (adapters or sub-experts), the router, the tokenizer, the dense weights where
they were trained too, and where the base model lies, for dscl generate and, in Python, dscl.load. Of a method whose
tasks leave nothing of their own (sequential, osft, ...) it writes the whole model as transformers reads it, or with
tune: lora the one LoRA.

With --task it writes one task alone as a LoRA for PEFT. That is exact for adapters, and for sub-experts with gate:
uniform; where a token router sends every token to sub-experts of its own it cannot be, and the command says so."""

ROUTE_EXAMPLE = """example:
  dscl route-existing out/export --base models/llama --task news=adapters/news=news.txt \\
      --task law=adapters/law=law.jsonl

Writes an export of PEFT adapters that were trained elsewhere. Some prompts of every task (hundreds, if there are) pass
through the lower layers of the base model; nothing is trained. Prompts stand one a line in a .txt file, or as texts or
as {"prompt": ...} in a .json or .jsonl file."""

COMPARE_EXAMPLE = """example:
  dscl compare launch/comparisons/methods.yaml folder=data --methods sequential,asr,osft --seeds 3

The file is a recipe without method and train.lr, with a section compare: the rates that every method tries on the dev
split (equally many each), and rows, which are methods with settings. --methods names rows, or methods as they are by
default. Every run has the same samples, order, epochs, batches and evaluation; they go on side by side where there is
room. Give the command again and it goes on: what is complete is not run again. The end is a report in run_dir."""

REPORT_EXAMPLE = """example:
  dscl report out/a out/b --out out/report

Writes report.html (one file, no network) and report.md: scores, score matrices, forgetting over time, routing, bytes,
time and memory. Runs that differ in nothing but their seed are averaged, runs of another stream or budget stand apart.
A folder that holds runs stands for all of them."""

VERBS = {
    "train": ("train a recipe's stream of tasks", TRAIN_EXAMPLE),
    "plan": ("foresee memory, exchange and time of a recipe on a cluster", PLAN_EXAMPLE),
    "doctor": ("see whether machines are fit for a recipe", DOCTOR_EXAMPLE),
    "eval": ("evaluate a checkpoint of a run", EVAL_EXAMPLE),
    "generate": ("answer prompts, each by what its task has learnt", GENERATE_EXAMPLE),
    "export": ("write what a run has learnt as a folder that needs nothing of the run", EXPORT_EXAMPLE),
    "compare": ("train several methods on one stream, with equal budgets", COMPARE_EXAMPLE),
    "report": ("write what runs have come to as a page", REPORT_EXAMPLE),
    "route-existing": ("make an export of adapters that were trained elsewhere", ROUTE_EXAMPLE),
}
RANKED = ("train", "doctor", "eval")  # the verbs that ranks do together
ASSIGNED = (*RANKED, "plan", "compare")  # the verbs that take key=value
AT_ONCE = 64  # prompts that are answered before the first answer of them is shown


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong word is told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    given = [word for word in given if not word.startswith("--local_rank=")]  # DeepSpeed's launcher adds it
    return leave(guarded(lambda: _start(given)))


def program() -> NoReturn:
    """`main` as a process, which ends without taking the interpreter apart: threads that libraries left running can
    abort that, after everything was done and saved. Whoever asked to be called at the end is."""
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def guarded(work: Callable[[], int]) -> int:
    """The exit status of `work`; what goes wrong in it is told."""
    try:
        return work()
    except UserError as error:
        return _told(2, error)
    except Failure as error:
        return _told(1, error)
    except Stopped as error:
        return _told(75, error)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        tell(1, "dscl: interrupted; run the same command again to resume", patience=0.0)
    except Exception:
        tell(1, traceback.format_exc())
    return 1


def _told(status: int, error: Exception) -> int:
    tell(status, "dscl: " + " ".join(str(error).splitlines()))  # one line, whatever the names in it hold
    return status


def _start(given: list[str]) -> int:
    """Read the words; then be the spawner, or a rank."""
    die_with_parent()
    begin()
    options = _read(given)
    if options.verb not in RANKED:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{options.verb}: runs in one process; start it without a launcher (WORLD_SIZE is set)")
        quiet()
        _log()
        return _serve(options)
    if options.nproc is not None and "RANK" in os.environ and not spawned():
        raise UserError("--nproc: a launcher has already started the ranks (RANK is set); leave --nproc out")
    # What a launcher has started tells a mistake when all ranks have met, so that none waits for one that has left.
    recipe = None if _launched() else _recipe(options)
    if options.nproc is not None and not spawned():
        count = how_many(options.nproc)
        if count > 1:
            return spawn(count, given)
    quiet()
    _log()
    with importing():  # after the switches of quiet()
        from dscl.distributed import comm
        from dscl.distributed.liveness import Pulse

    with comm.session(), Pulse() as pulse:  # a rank tells its mistake before it leaves, which fails the others
        return pulse.end(guarded(lambda: pulse.beside(lambda: _run(options, recipe or _recipe(options)))))


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds. They make a million objects, all of which stay: to look for garbage among them
    takes a fifth of that time, and a third of a second whenever it is done later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _launched() -> bool:
    """Whether this process is one of the ranks that `--nproc`, torchrun, deepspeed or srun has started."""
    return bool({"RANK", "SLURM_PROCID"} & set(os.environ))


def _recipe(options: argparse.Namespace) -> Recipe:
    """What a verb that ranks do together works on, with all keys checked; no heavy package is imported for it."""
    from dscl.recipe.recipe import read_recipe, read_run

    if options.verb == "eval":
        return read_run(options.run, options.assignments)
    return read_recipe(options.recipe, options.assignments)


def _run(options: argparse.Namespace, recipe: Recipe) -> int:
    with importing():
        from dscl.distributed.preemption import Stop
        from dscl.training import trainer

    if options.verb == "train":
        with Stop().listening() as stop:
            if options.dry_run:
                trainer.rehearse(recipe)
            else:
                trainer.train(recipe, stop, options.doctor)
    elif options.verb == "doctor":
        trainer.diagnose(recipe)
    else:
        general = [name.strip() for name in (options.lm_eval or "").split(",") if name.strip()]
        if options.limit is not None and (not general or options.limit < 1):
            raise UserError(f"--limit: given {options.limit}; it needs --lm-eval, and a number of at least 1")
        trainer.evaluate(options.run, options.assignments, general, options.limit, options.checkpoint)
    return 0


def _serve(options: argparse.Namespace) -> int:
    if options.verb == "generate":
        return _generate(options)
    if options.verb == "compare":
        return _compare(options)
    if options.verb == "plan":
        return _plan(options)
    if options.verb == "report":
        from dscl.reporting import report

        for path in report.write([Path(run).expanduser() for run in options.runs], Path(options.out).expanduser()):
            print(path)
        return 0
    export = _export()
    folder = Path(options.folder).expanduser()
    if options.verb == "export" and options.task is not None:
        export.export_task(Path(options.run).expanduser(), folder, options.task, options.checkpoint)
    elif options.verb == "export":
        export.export(Path(options.run).expanduser(), folder, options.checkpoint)
    else:
        settings = {name: getattr(options, name) for name in ("feature_layer", "width", "max_length", "precision")}
        export.route_existing(folder, options.base, _existing(options.task), **settings)
    return 0


def _generate(options: argparse.Namespace) -> int:
    prompts = _templated(_prompts(options), options.template)
    with importing():
        from dscl.serving.bundle import DESCRIPTION, read_description
        from dscl.serving.server import open_model

    place = Path(options.place).expanduser()
    if (place / DESCRIPTION).is_file():
        description = read_description(place, options.base)
    elif options.base is not None:
        raise UserError("--base: only for an export; a run's base model is the one that its recipe names")
    else:
        description = _export().describe(place)
    model = open_model(description)
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answers = model.generate(some, options.max_new_tokens, ... if options.task is None else options.task)
        for prompt, answer in zip(some, answers, strict=True):
            if options.json:
                found = {"prompt": prompt, "task": answer.task, "margin": answer.margin, "distance": answer.distance}
                print(json.dumps({**found, "answer": answer.text}, ensure_ascii=False), flush=True)
            else:
                margin = "" if answer.margin is None else f", margin {answer.margin:.2f}"
                print(f"[{answer.task or 'base'}{margin}] {answer.text}", flush=True)
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Its runs are programs of their own; DeepSpeed comes with what looks at their folders."""
    if options.at_once is not None and options.at_once < 1:
        raise UserError(f"--at-once: given {options.at_once}; at least 1 is needed")
    from dscl.reporting import compare

    methods = [name.strip() for name in (options.methods or "").split(",") if name.strip()]
    comparison = compare.read_comparison(options.recipe, options.assignments, methods, _seeds(options.seeds))
    if options.dry_run:
        for run in comparison.every():
            print(run.name)
        return 0
    _choose_accelerator()
    for path in compare.perform(comparison, options.at_once, how_many(options.nproc or "1")):
        print(path)
    print((comparison.folder / "report.md").read_text("utf-8"))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dscl.recipe.recipe import read_recipe
    from dscl.utils.hardware import peak_named, size_of

    for name in ("nodes", "gpus_per_node", "tflops", "efficiency"):
        value = getattr(options, name)
        if value is not None and (value <= 0 or (name == "efficiency" and value > 1)):
            allowed = "a share above 0, up to 1" if name == "efficiency" else "more than 0"
            raise UserError(f"--{name.replace('_', '-')}: given {value:g}; {allowed} is needed")
    if options.gpu is not None and options.tflops is not None:
        raise UserError("--tflops: given beside --gpu, which says what the device can do; leave one of them out")
    memory = options.gpu_memory and size_of("--gpu-memory", options.gpu_memory)
    bandwidth = options.bandwidth and size_of("--bandwidth", options.bandwidth)
    peak = peak_named(options.gpu) if options.gpu else options.tflops and 1e12 * options.tflops
    recipe = read_recipe(options.recipe, options.assignments)
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is put on a GPU, if there is one
    with importing():
        made = import_module("dscl.planning.plan")
    cluster = made.Cluster(
        nodes=options.nodes,
        per_node=options.gpus_per_node,
        memory=memory,
        bandwidth=bandwidth,
        peak=peak,
        efficiency=options.efficiency,
    )
    plan = made.plan(recipe, cluster, logging.getLogger("dscl").info, options.alone)
    print(json.dumps(plan.document()) if options.json else "\n".join(plan.lines()), flush=True)
    return 0


def _seeds(given: str | None) -> list[int]:
    """`--seeds 3`: 0, 1 and 2; `--seeds 3,4`: these."""
    if given is None:
        return []
    if not all(word.isdecimal() for word in given.split(",")) or given == "0":
        raise UserError(f"--seeds: given {given!r}; allowed: how many, or seeds like 3,4,5")
    numbers = [int(word) for word in given.split(",")]
    return numbers if "," in given else list(range(numbers[0]))


def _export() -> Any:
    """The module that reads runs."""
    _choose_accelerator()
    with importing():
        return import_module("dscl.serving.export")


def _choose_accelerator() -> None:
    """Before DeepSpeed is imported, which would warn where there is no GPU to be found."""
    from dscl.distributed import comm

    if comm.device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def _prompts(options: argparse.Namespace) -> list[str]:
    from dscl.data.prompts import read_prompts, split_lines

    if options.prompt is not None:
        return list(options.prompt)
    if options.file not in (None, "-"):
        return read_prompts(Path(options.file).expanduser())
    piped = options.file == "-" or not sys.stdin.isatty()
    prompts = split_lines(sys.stdin.buffer.read(), "the standard input") if piped else []
    if not prompts:
        raise UserError("no prompt given; give --prompt TEXT, --file FILE, or lines on the standard input")
    return prompts


def _templated(prompts: list[str], template: str | None) -> list[str]:
    if template is None:
        return prompts
    if "{prompt}" not in template:
        raise UserError(f"--template: given {template!r}; it must hold {{prompt}}, where each prompt goes")
    return [template.replace("\\n", "\n").replace("{prompt}", prompt) for prompt in prompts]


def _existing(words: list[str]) -> dict[str, tuple[Path, Path]]:
    """The tasks that route-existing was given, by name."""
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


def _read(given: list[str]) -> argparse.Namespace:
    allowed = f"allowed: {', '.join(VERBS)}; see dscl --help"
    if not given:
        raise UserError(f"no verb given; {allowed}")
    if given[0] not in VERBS and not given[0].startswith("-"):
        raise UserError(f"{given[0]}: no such verb{nearest(given[0], VERBS)}; {allowed}")
    options, rest = _parser().parse_known_args(given)
    for word in rest:  # argparse loses positional words that follow an option
        allowed = "key=value and options" if options.verb in ASSIGNED else "options"
        if word.startswith("-") or "=" not in word or options.verb not in ASSIGNED:
            raise UserError(f"{word}: not understood; allowed: {allowed}, see dscl {options.verb} --help")
        options.assignments.append(word)
    return options


def _parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="dscl", description=ABOUT, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dscl {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    made = {}
    for verb, (what, example) in VERBS.items():
        made[verb] = subparsers.add_parser(
            verb, help=what, description=what, epilog=example, formatter_class=raw, allow_abbrev=False
        )
        if verb in RANKED:
            made[verb].add_argument("--nproc", metavar="N|auto", help="start N ranks here (auto: one for each GPU)")
    trainer, evaluate = made["train"], made["eval"]
    words: dict[str, Any] = {"nargs": "*", "default": []}
    for one in (trainer, made["doctor"], made["plan"]):
        one.add_argument("recipe", metavar="RECIPE.yaml")
        one.add_argument("assignments", **words, metavar="key=value", help="dotted overrides of the recipe's keys")
    trainer.add_argument("--doctor", action="store_true", help="first see whether the machines are fit for it")
    trainer.add_argument("--dry-run", action="store_true", help="build and check everything, show the plan, stop")
    evaluate.add_argument("run", metavar="RUN_DIR")
    evaluate.add_argument("assignments", **words, metavar="evaluate.key=value", help="overrides of evaluate.*")
    evaluate.add_argument("--lm-eval", metavar="A,B", help="also ask these tasks of lm-eval, if it is installed")
    evaluate.add_argument("--limit", type=int, metavar="N", help="with --lm-eval: samples of each of its tasks")
    for one in (evaluate, made["export"]):
        one.add_argument("--checkpoint", metavar="NAME|best", help="which of the run's (default: the newest)")
    compare, report = made["compare"], made["report"]
    compare.add_argument("recipe", metavar="STREAM.yaml")
    compare.add_argument("assignments", **words, metavar="key=value", help="dotted overrides of the file's keys")
    compare.add_argument("--methods", metavar="A,B,C", help="rows of the file, or methods (default: all rows)")
    compare.add_argument("--seeds", metavar="N", help="how many, or seeds like 3,4,5 (default: the file's, or 3)")
    compare.add_argument("--at-once", type=int, metavar="N", help="runs side by side (default: as GPUs or cores allow)")
    compare.add_argument("--nproc", metavar="N", help="ranks of each run (default: 1)")
    compare.add_argument("--dry-run", action="store_true", help="check everything, name the runs, stop")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold some")
    report.add_argument("--out", required=True, metavar="DIR", help="where report.html and report.md go")
    _add_planning(made["plan"])
    _add_serving(made["generate"], made["export"], made["route-existing"])
    return parser


def _add_planning(plan: Parser) -> None:
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    plan.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="ranks on each (default: 1)")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of one device, like 80GiB: for what fits")
    plan.add_argument("--bandwidth", metavar="SIZE", help="what one device sends in a second, like 50GB")
    plan.add_argument("--gpu", metavar="NAME", help="a common GPU, for what it can do in bf16, like H100")
    plan.add_argument("--tflops", type=float, metavar="N", help="what one device can do at most, where it is another")
    plan.add_argument(
        "--alone", action="store_true", help="of the recipe's DeepSpeed JSON only, not of every ZeRO stage"
    )
    plan.add_argument("--json", action="store_true", help="one JSON object, with all sizes in bytes")
    plan.add_argument("--efficiency", type=float, default=0.4, metavar="SHARE", help="of it that is reached (0.4)")


def _add_serving(generate: Parser, export: Parser, route: Parser) -> None:
    generate.add_argument("place", metavar="RUN_DIR|EXPORT")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--file", metavar="FILE", help=".txt, .json or .jsonl with prompts; -: the standard input")
    generate.add_argument("--template", metavar="TEXT", help="what each {prompt} is put into; \\n: a new line")
    generate.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    generate.add_argument("--task", metavar="NAME", help="the task that all prompts are of; none is routed")
    generate.add_argument("--base", metavar="MODEL", help="where an export's base model lies, if it was moved")
    generate.add_argument("--json", action="store_true", help="one JSON object a line")
    export.add_argument("run", metavar="RUN_DIR")
    export.add_argument("folder", metavar="DIR")
    export.add_argument("--task", metavar="NAME", help="write this task alone, as a LoRA that PEFT loads")
    route.add_argument("folder", metavar="DIR")
    route.add_argument("--base", required=True, metavar="MODEL", help="a model folder or a hub id")
    route.add_argument(
        "--task", action="append", required=True, metavar="NAME=ADAPTER_FOLDER=PROMPTS_FILE", help="one for each task"
    )
    route.add_argument("--feature-layer", type=int, metavar="N", help="its input decides (default: an eighth of all)")
    route.add_argument("--width", type=int, metavar="E", help="features (default: twice the hidden size, from 1024)")
    route.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="N",
        help="tokens of a prompt that count, its last (default: 512)",
    )
    route.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the base (default: bf16)")


def _log() -> None:
    """dscl's own warnings, one line each, from one rank a machine."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dscl: %(message)s"))
    logger = logging.getLogger("dscl")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if local_rank() == 0 else logging.CRITICAL)
