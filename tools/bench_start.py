"""How soon dscl answers, and how soon it trains: seconds, and each as a ratio to importing the libraries alone.

    python tools/bench_start.py [--rounds N] [--out DIR] [--json]
    python tools/bench_start.py RECIPE.yaml [key=value ...]

Without a recipe: a table of `dscl --help`, a wrong word, a wrong key of a recipe, and `dscl train` on the quickstart's
tasks to the end of its first step, with one rank and warm caches. The base of the ratios is `python -c "import torch,
deepspeed, transformers"`, measured in the same rounds. Each figure is the median over the rounds. The tasks are made
first (up to a minute), in DIR where they are found again the next time, or in a temporary folder.

With a recipe: one `dscl train` of it to the end of its first step, with a clock on its parts; for tools/bench.py.
Prints an object: when it began and ended (seconds since 1970), and the seconds of each part.
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
PATIENCE = 300.0  # seconds for a first step; it takes a few
LOOK = 0.005  # seconds between two looks at what a run has written

spent: dict[str, float] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="clock one start of this recipe, part by part")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="overrides of the recipe's keys")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each command (default: 5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where tasks and caches are kept (default: temporary)")
    parser.add_argument("--json", action="store_true", help="an object for each row, instead of a table")
    options, more = parser.parse_known_intermixed_args()
    if options.recipe is not None:
        clock_parts([options.recipe, *options.assignments, *more])
    elif more:
        parser.error(f"{more[0]}: not understood; see --help")
    elif options.out is not None:
        compare(options.out.expanduser().absolute(), options.rounds, options.json)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options.rounds, options.json)


# ---- the table


def compare(folder: Path, rounds: int, as_json: bool) -> None:
    """Run every command once in each round, so that what else the machine does falls on all alike."""
    keys = quickstart(folder)
    wrong = [str(QUICKSTART), "train.lrr=1", *keys]
    commands: dict[str, tuple[float | None, Callable[[], float]]] = {
        f'python -c "{BASE}"': (None, lambda: seconds([sys.executable, "-c", BASE], 0)),
        "dscl --help": (0.5, lambda: seconds([*DSCL, "--help"], 0)),
        "a wrong word": (0.5, lambda: seconds([*DSCL, "nonsense"], 2)),
        "a wrong key of a recipe": (1.5, lambda: seconds([*DSCL, "train", *wrong], 2)),
        "dscl train to the end of its first step": (6.0, lambda: first_step(keys, folder / "run")),
    }
    tell("once each, so that caches are warm")
    for _, run in commands.values():
        run()
    found: dict[str, list[float]] = {what: [] for what in commands}
    for number in range(1, rounds + 1):
        tell(f"round {number} of {rounds}")
        for what, (_, run) in commands.items():
            found[what].append(run())
    for line in table(found, {what: most for what, (most, _) in commands.items()}, as_json):
        print(line, flush=True)


def table(found: Mapping[str, Sequence[float]], most: Mapping[str, float | None], as_json: bool) -> list[str]:
    """A line for each command; ratios are to the first one."""
    base = statistics.median(next(iter(found.values())))
    lines = [] if as_json else ["| | seconds | ratio | at most | fastest to slowest |", "|---|---|---|---|---|"]
    for what, times in found.items():
        middle = statistics.median(times)
        target = "" if most[what] is None else f"{most[what]:g} s"
        spread = f"{min(times):.2f} to {max(times):.2f} s"
        if as_json:
            told = f"{middle / base:.2f} of importing the libraries; {spread}"
            lines.append(json.dumps({"what": what, "figure": f"{middle:.2f} s", "target": target, "told": told}))
        else:
            lines.append(f"| {what} | {middle:.2f} | {middle / base:.2f} | {target} | {spread} |")
    return lines


def quickstart(folder: Path) -> list[str]:
    """Make the quickstart's tasks, unless they are there; the keys with which its recipe reads them."""
    stage = folder / "stage"
    tell(f"the quickstart's tasks, in {stage}")
    made = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "make_stage.py"), "--out", str(stage)],
        stdout=sys.stderr, cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"tools/make_stage.py: status {made.returncode}")
    paths = [f"stream.{number}.path={stage / task}" for number, task in enumerate(TASKS)]
    return [f"model.name={stage / 'model'}", f"data.cache_dir={folder / 'cache'}", *paths]


def seconds(command: Sequence[str], status: int) -> float:
    """What a command takes; it has to end with this status, and one that refuses something says so in one line."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    took = time.perf_counter() - began
    if done.returncode != status or (status and len(done.stderr.splitlines()) != 1):
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}; {done.stderr[-300:]!r}")
    return took


def first_step(keys: Sequence[str], run: Path) -> float:
    """What the program takes from its start to the record of its first step; then it is ended."""
    shutil.rmtree(run, ignore_errors=True)
    metrics, words = run / "metrics.jsonl", [f"run_dir={run}", "observe.every=1", *keys]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [*DSCL, "train", str(QUICKSTART), *words], stdout=said, stderr=said, cwd=REPOSITORY, env=environment()
        )
        try:
            while not written(metrics):
                if child.poll() is not None or time.perf_counter() - began > PATIENCE:
                    said.seek(0)
                    raise SystemExit(f"dscl train: no first step; {said.read()[-300:]!r}")
                time.sleep(LOOK)
            return time.perf_counter() - began
        finally:
            child.kill()
            child.wait()


def written(metrics: Path) -> bool:
    with suppress(OSError):
        return metrics.stat().st_size > 0
    return False


def environment() -> dict[str, str]:
    return {**subprocess_environment(), "PYTHONPATH": str(REPOSITORY)}


def tell(text: str) -> None:
    print(f"bench_start: {text}", file=sys.stderr, flush=True)


# ---- one start, part by part


def clock_parts(words: Sequence[str]) -> None:
    silence_libraries()  # before the libraries are imported
    began = time.perf_counter()
    with app.disable_gc_for_imports():
        from dscl.engine.engine import Engine
        from dscl.training import run
        from dscl.training.evaluation import Evaluator
        from dscl.training.trainer import Trainer

    spent["imports"] = time.perf_counter() - began
    for place, name, what in (
        (run, "build_setup", "tokenizer, data and checks"),
        (run.preflight, "require_consistent_ranks", "agreement of ranks"),
        (run.RunSetup, "build_engine", "model and DeepSpeed"),
        (run.Observer, "__init__", "TensorBoard"),
        (Evaluator, "evaluate", "evaluation before training"),
        (Trainer, "save_checkpoint", "checkpoints"),
        (Engine, "step", "first step"),
    ):
        clock(place, name, what)
    raise SystemExit(app.main(["train", *words]))  # it comes here only if there was no step


def clock(place: Any, name: str, what: str) -> None:
    original = getattr(place, name)

    @wraps(original)
    def clocked(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = original(*given, **named)
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - began
        if what == "first step":
            found = {"began": BEGAN, "ended": time.time(), "parts": spent}
            print("\n" + json.dumps(found), file=sys.__stdout__, flush=True)
            os._exit(0)  # the rest is not asked for
        return found

    setattr(place, name, clocked)


if __name__ == "__main__":
    main()
