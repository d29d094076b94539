"""Seconds until dscl answers and until it trains, each also as a ratio to importing the libraries alone.

    python tools/bench_start.py [--rounds N] [--out DIR] [--json]
    python tools/bench_start.py RECIPE.yaml [key=value ...]

Without a recipe: a table of `dscl --help`, an unknown verb, an unknown recipe key, and `dscl train` on the quickstart's
tasks to the end of its first step, with one rank and warm caches. The base of the ratios is `python -c "import torch,
deepspeed, transformers"`, timed in the same rounds. Values are medians over the rounds. The tasks are made first (up to
a minute), in DIR, where a later start finds them, or in a temporary folder.

With a recipe: one `dscl train` of it to the end of its first step, timed part by part, for tools/bench.py. It prints a
JSON object: when it began and ended (seconds since 1970), and the seconds of each part.
"""

from __future__ import annotations

import time

BEGAN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import wraps  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from dscl.cli import app  # noqa: E402
from dscl.distributed.launcher import subprocess_environment  # noqa: E402
from dscl.utils.quiet import silence_libraries  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
QUICKSTART = REPOSITORY / "launch" / "recipes" / "quickstart.yaml"
TASKS = ("kind", "mood", "nation", "land", "tense")
BASE = "import torch, deepspeed, transformers"
DSCL = [sys.executable, "-m", "dscl"]
TIMEOUT = 300.0  # seconds until the first step, which takes a few
POLL_SECONDS = 0.005  # seconds between two checks of a run's metrics

part_seconds: dict[str, float] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="time one start of this recipe, part by part")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="overrides of recipe keys")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timings of each command (default: 5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of tasks and caches (default: temporary)")
    parser.add_argument("--json", action="store_true", help="print each row as a JSON object instead of a table")
    options, more = parser.parse_known_intermixed_args()
    if options.recipe is not None:
        time_parts([options.recipe, *options.assignments, *more])
    elif more:
        parser.error(f"{more[0]}: not understood; see --help")
    elif options.out is not None:
        compare(options.out.expanduser().absolute(), options.rounds, options.json)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options.rounds, options.json)


# ---- the table


def compare(folder: Path, rounds: int, as_json: bool) -> None:
    """Run every command once in each round, so that other load on the machine affects all alike."""
    keys = prepare_quickstart(folder)
    wrong = [str(QUICKSTART), "train.lrr=1", *keys]
    commands: dict[str, tuple[float | None, Callable[[], float]]] = {
        f'python -c "{BASE}"': (None, lambda: time_command([sys.executable, "-c", BASE], 0)),
        "dscl --help": (0.5, lambda: time_command([*DSCL, "--help"], 0)),
        "an unknown verb": (0.5, lambda: time_command([*DSCL, "nonsense"], 2)),
        "an unknown recipe key": (1.5, lambda: time_command([*DSCL, "train", *wrong], 2)),
        "dscl train to the end of its first step": (6.0, lambda: time_first_step(keys, folder / "run")),
    }
    print_progress("running each command once to warm the caches")
    for _, run in commands.values():
        run()
    times_of: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(1, rounds + 1):
        print_progress(f"round {number} of {rounds}")
        for name, (_, run) in commands.items():
            times_of[name].append(run())
    for line in format_table(times_of, {name: target for name, (target, _) in commands.items()}, as_json):
        print(line, flush=True)


def format_table(
    times_of: Mapping[str, Sequence[float]], targets: Mapping[str, float | None], as_json: bool
) -> list[str]:
    """A line for each command. The first command is the base of the ratios."""
    base = statistics.median(next(iter(times_of.values())))
    lines = [] if as_json else ["| | seconds | ratio | at most | fastest to slowest |", "|---|---|---|---|---|"]
    for name, times in times_of.items():
        median = statistics.median(times)
        target = "" if targets[name] is None else f"{targets[name]:g} s"
        spread = f"{min(times):.2f} to {max(times):.2f} s"
        if as_json:
            note = f"{median / base:.2f} of importing the libraries; {spread}"
            lines.append(json.dumps({"name": name, "value": f"{median:.2f} s", "target": target, "note": note}))
        else:
            lines.append(f"| {name} | {median:.2f} | {median / base:.2f} | {target} | {spread} |")
    return lines


def prepare_quickstart(folder: Path) -> list[str]:
    """Make the quickstart's tasks unless they exist. Returns the overrides with which its recipe reads them."""
    stage = folder / "stage"
    print_progress(f"making the quickstart's tasks in {stage}")
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "make_stage.py"), "--out", str(stage)],
        stdout=sys.stderr, cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    if process.returncode:
        raise SystemExit(f"tools/make_stage.py: status {process.returncode}")
    paths = [f"stream.{number}.path={stage / task}" for number, task in enumerate(TASKS)]
    return [f"model.name={stage / 'model'}", f"data.cache_dir={folder / 'cache'}", *paths]


def time_command(command: Sequence[str], status: int) -> float:
    """The seconds of a command. It must end with this exit status, and print one error line if that is not 0."""
    began = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    elapsed = time.perf_counter() - began
    if process.returncode != status or (status and len(process.stderr.splitlines()) != 1):
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}; {process.stderr[-300:]!r}")
    return elapsed


def time_first_step(keys: Sequence[str], run_dir: Path) -> float:
    """The seconds of `dscl train` from its start to the record of its first step. Then the process is killed."""
    shutil.rmtree(run_dir, ignore_errors=True)
    metrics, arguments = run_dir / "metrics.jsonl", [f"run_dir={run_dir}", "observe.every=1", *keys]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*DSCL, "train", str(QUICKSTART), *arguments],
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
            env=environment(),
        )
        try:
            while not has_content(metrics):
                if process.poll() is not None or time.perf_counter() - began > TIMEOUT:
                    output.seek(0)
                    raise SystemExit(f"dscl train: no first step; {output.read()[-300:]!r}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def has_content(metrics: Path) -> bool:
    with suppress(OSError):
        return metrics.stat().st_size > 0
    return False


def environment() -> dict[str, str]:
    return {**subprocess_environment(), "PYTHONPATH": str(REPOSITORY)}


def print_progress(text: str) -> None:
    print(f"bench_start: {text}", file=sys.stderr, flush=True)


# ---- one start, part by part


def time_parts(words: Sequence[str]) -> None:
    silence_libraries()  # before the libraries are imported
    began = time.perf_counter()
    with app.disable_gc_for_imports():
        from dscl.engine.engine import Engine
        from dscl.training import run
        from dscl.training.evaluation import Evaluator
        from dscl.training.trainer import Trainer

    part_seconds["imports"] = time.perf_counter() - began
    for owner, name, part in (
        (run, "build_setup", "tokenizer, data and checks"),
        (run.preflight, "require_consistent_ranks", "agreement of ranks"),
        (run.RunSetup, "build_engine", "model and DeepSpeed"),
        (run.Observer, "__init__", "TensorBoard"),
        (Evaluator, "evaluate", "evaluation before training"),
        (Trainer, "save_checkpoint", "checkpoints"),
        (Engine, "step", "first step"),
    ):
        time_function(owner, name, part)
    raise SystemExit(app.main(["train", *words]))  # reached only if there was no step


def time_function(owner: Any, name: str, part: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        result = original(*arguments, **keywords)
        part_seconds[part] = part_seconds.get(part, 0.0) + time.perf_counter() - began
        if part == "first step":
            result = {"began": BEGAN, "ended": time.time(), "parts": part_seconds}
            print("\n" + json.dumps(result), file=sys.__stdout__, flush=True)
            os._exit(0)
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
