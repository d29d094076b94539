"""`dscl compare`: train several methods on one stream, with equal samples, order, epochs, batches and evaluation.

A comparison is a recipe without `method` and `train.lr`, but with a section `compare`. A row of the comparison is a
method with its settings. Every row tries the same number of learning rates on the dev split, with the recipe's seed.
The best learning rate is then trained with every seed and evaluated on the test split. Each run is a `dscl train`
process with its own folder. Complete runs are not repeated. A failed run is reported; the other runs go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dscl.config.methods import METHOD_PRESETS
from dscl.config.parsing import apply_overrides, describe_value, did_you_mean, parse_config, parse_partial, read_yaml
from dscl.config.schema import CompareConfig
from dscl.distributed.launcher import count_cores, count_gpus, subprocess_environment
from dscl.recipe.recipe import Recipe, resolve_recipe
from dscl.reporting import report
from dscl.utils.errors import ExternalFailure, UserError
from dscl.utils.formatting import format_duration

RUNS_FOLDER = "runs"  # the folder of a comparison's runs, in its run_dir
MAX_LISTED_FAILURES = 3  # failed runs that the error message names


@dataclass(frozen=True)
class PlannedRun:
    """One `dscl train` process of a comparison."""

    row: str
    learning_rate: float
    seed: int
    split: str  # "dev" in the search for a learning rate, else "test"
    folder: Path
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row}: {'dev' if self.split == 'dev' else f'seed {self.seed}'}, rate {self.learning_rate:g}"

    def read_scores(self) -> dict[str, Any] | None:
        """The content of the run's scores.json; None while the run is not complete."""
        try:
            scores: dict[str, Any] = json.loads((self.folder / "scores.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return scores if scores.get("complete") else None


@dataclass
class ComparisonPlan:
    """The rows of a comparison and the recipes of all its runs."""

    folder: Path
    shared_recipe: Mapping[str, Any]  # the recipe without `method` and `train.lr`
    source: str  # the recipe's file
    settings: CompareConfig
    rows: Mapping[str, Mapping[str, Any]]  # row name → the row's `method` section
    learning_rates: Mapping[str, tuple[float, ...]]  # row name → the learning rates that the row tries
    failures: list[dict[str, Any]] = field(default_factory=list)  # records of failed runs, as in comparison.json

    def plan_run(self, row: str, learning_rate: float, seed: int, split: str) -> PlannedRun:
        """Write the recipe of one run. A run on the dev split evaluates only what the choice of a rate needs."""
        is_search = split == "dev"
        folder = (
            self.folder
            / RUNS_FOLDER
            / row_folder_name(row)
            / f"{'dev' if is_search else f'seed-{seed}'}-{learning_rate:g}"
        )
        method = dict(self.rows[row])
        evaluate = {**self.shared_recipe["evaluate"], "split": split}
        if is_search:  # OP is needed; BWT too if the comparison limits forgetting
            stream = self.shared_recipe.get("stream")
            every = len(stream) if isinstance(stream, list) and stream and self.settings.keeps is None else 1
            evaluate |= {"zero_shot": False, "tasks": "new", "every": every, "heldout": None}
        if "oracle_task_id" in evaluate and (is_search or not _infers_task_id(method)):
            # A method that does not infer the task answers alike, whether or not the task is given.
            del evaluate["oracle_task_id"]
        recipe = {
            **self.shared_recipe,
            **(self._limit_train_samples() if is_search else {}),
            "run_dir": str(folder),
            "seed": seed,
            "method": method,
            "train": {**self.shared_recipe["train"], "lr": learning_rate},
            "evaluate": evaluate,
            "observe": {**self.shared_recipe["observe"], "live": "off"},
        }
        return PlannedRun(row, learning_rate, seed, split, folder, recipe)

    def _limit_train_samples(self) -> dict[str, Any]:
        """The recipe's stream sections, in which no task trains on more than `search_limit` samples."""
        max_samples, stream = self.settings.search_limit, self.shared_recipe.get("stream")
        if max_samples is None:
            return {}

        def limit_task(task: Mapping[str, Any]) -> dict[str, Any]:
            return {**task, "train_limit": _cap_limit(task.get("train_limit"), max_samples)}

        sections: dict[str, Any] = {"stream_defaults": limit_task(self.shared_recipe["stream_defaults"])}
        if isinstance(stream, list) and all(isinstance(task, dict) for task in stream):
            sections["stream"] = [limit_task(task) if "train_limit" in task else task for task in stream]
        return sections

    def search_runs(self, row: str) -> list[PlannedRun]:
        """The runs on the dev split, one for each learning rate; none if the row has a single learning rate."""
        rates = self.learning_rates[row]
        return [self.plan_run(row, rate, self.shared_recipe["seed"], "dev") for rate in rates] if len(rates) > 1 else []

    def final_runs(self, row: str, learning_rate: float) -> list[PlannedRun]:
        """The runs on the test split, one for each seed."""
        return [self.plan_run(row, learning_rate, seed, "test") for seed in self.settings.seeds]

    def all_runs(self) -> list[PlannedRun]:
        """All runs of the comparison. Before the search, final runs are planned with the row's first learning rate."""
        return [
            run
            for row in self.rows
            for run in (*self.search_runs(row), *self.final_runs(row, self.learning_rates[row][0]))
        ]


def read_comparison_plan(
    path: str, assignments: Iterable[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> ComparisonPlan:
    """Read a comparison's recipe and check it: the recipe of every run must be valid.

    `methods` chooses the rows: names of `compare.rows`, or names of methods with their default settings.
    """
    recipe = apply_overrides(read_yaml(path), assignments)
    settings = parse_config(CompareConfig, recipe.pop("compare", None) or {}, "compare")
    if seeds:
        settings = parse_config(CompareConfig, {**vars(settings), "seeds": list(seeds)}, "compare")
    # The recipe of a single run serves as a stream for the methods named on the command line.
    if methods and "method" in recipe:
        del recipe["method"]
    if "method" in recipe:
        raise UserError(
            f"method: given {describe_value(recipe['method'])} in a comparison; write it as a row of compare.rows, "
            "or name methods with --methods"
        )
    for section in ("train", "evaluate", "observe", "stream_defaults"):
        recipe[section] = recipe.get(section) or {}
        if not isinstance(recipe[section], dict):
            raise UserError(f"{section}: given {describe_value(recipe[section])}; a mapping of keys is needed")
    if "lr" in recipe["train"] and settings.rates:
        raise UserError("train.lr: given in a comparison, whose rows try those of compare.rates; write it there")
    if "lr" in recipe["train"]:
        settings = parse_config(CompareConfig, {**vars(settings), "rates": [recipe["train"].pop("lr")]}, "compare")
    recipe.setdefault("seed", 0)
    known_rows = {**{name: {"name": name} for name in METHOD_PRESETS}, **settings.rows}
    row_names = list(methods or settings.rows)
    if not row_names:
        raise UserError("compare.rows: none given; give rows there, or names of methods with --methods")
    for name in row_names:
        if name not in known_rows:
            raise UserError(
                f"--methods: given {name!r}; allowed: {', '.join(known_rows)}{did_you_mean(name, known_rows)}"
            )
    rows = {
        name: {key: value for key, value in known_rows[name].items() if key != "rates"}
        for name in dict.fromkeys(row_names)
    }
    learning_rates = {name: _row_learning_rates(name, known_rows[name], settings) for name in rows}
    folder = Path(os.path.expanduser(str(recipe.get("run_dir") or "")))
    comparison = ComparisonPlan(folder, recipe, path, settings, rows, learning_rates)
    _check_equal_trials(learning_rates)
    folder_rows: dict[Path, str] = {}
    for run in comparison.all_runs():
        resolve_run_recipe(run, comparison)
        if folder_rows.setdefault(run.folder.parent, run.row) != run.row:
            raise UserError(
                f"compare.rows: {run.row!r} and {folder_rows[run.folder.parent]!r} would share the folder "
                f"{run.folder.parent.name}; rename one"
            )
    return comparison


def _cap_limit(limit: Any, max_samples: int) -> Any:
    """The smaller of two limits. A limit that is no number is returned as it is: resolving the recipe rejects it."""
    return max_samples if limit is None else min(limit, max_samples) if isinstance(limit, int) else limit


def _infers_task_id(method: Mapping[str, Any]) -> bool:
    """Whether the method finds out each prompt's task. Wrong settings are reported when the recipe is resolved."""
    from dscl.methods.registry import find_method  # imports torch

    try:
        method_class = find_method(str(method.get("name", "sequential")))
        return method_class.infers_task_id_with(parse_config(method_class.Config, method, "method"))
    except UserError:
        return True


def _row_learning_rates(name: str, row: Mapping[str, Any], settings: CompareConfig) -> tuple[float, ...]:
    own = (
        parse_partial(CompareConfig, {"rates": row["rates"]}, f"compare.rows.{name}")["rates"] if "rates" in row else ()
    )
    rates: tuple[float, ...] = tuple(own or settings.rates)
    if not rates:
        raise UserError(f"compare.rates: none given, and row {name!r} has none of its own; give a list of rates")
    return rates


def _check_equal_trials(rates: Mapping[str, Sequence[float]]) -> None:
    (first_row, first_rates), *others = rates.items()
    for name, own_rates in others:
        if len(own_rates) != len(first_rates):
            raise UserError(
                f"compare.rows.{name}.rates: given {len(own_rates)} rates, and {first_row} has {len(first_rates)}; "
                "every row tries equally many, so give as many"
            )


def resolve_run_recipe(run: PlannedRun, comparison: ComparisonPlan) -> Recipe:
    """Check the recipe of a run and fill in its defaults."""
    try:
        return resolve_recipe(run.recipe, source=comparison.source)
    except UserError as error:
        raise UserError(f"row {run.row!r}: {error}") from None


def row_folder_name(row: str) -> str:
    """The row's name with only such characters as a folder name may have."""
    return re.sub(r"[^\w.+-]+", "-", row).strip("-.") or "row"


def choose_learning_rate(summaries: Mapping[float, Mapping[str, Any]], max_forgetting: float | None) -> float:
    """The learning rate with the highest OP on the dev split.

    With `max_forgetting`, only rates with BWT ≥ -max_forgetting are considered, unless there are none.
    """
    eligible = [
        rate
        for rate, summary in summaries.items()
        if max_forgetting is not None and (summary["BWT"] or 0.0) >= -max_forgetting
    ]
    return max(eligible or summaries, key=lambda rate: float(summaries[rate]["OP"]))


def run_comparison(comparison: ComparisonPlan, max_parallel: int | None = None, nproc: int = 1) -> list[Path]:
    """Train the runs that are not complete yet, then write the report. Return the report's files."""
    # This import loads DeepSpeed, so it comes only after all recipes have been checked.
    from dscl.training.run_dir import reject_other_recipe

    shares = _machine_shares(max_parallel, nproc)
    for row, rates in comparison.learning_rates.items():
        for run in (*comparison.search_runs(row), *(run for rate in rates for run in comparison.final_runs(row, rate))):
            reject_other_recipe(resolve_run_recipe(run, comparison))  # an existing run must have the same settings
    run_pool = RunPool(comparison, shares, nproc, len(comparison.all_runs()))
    rows: dict[str, Any] = {}
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            search_futures = {
                row: [pool.submit(run_pool.complete_run, run) for run in comparison.search_runs(row)]
                for row in comparison.rows
            }
            final_futures = {}
            for row, futures in search_futures.items():
                result_tables = [future.result() for future in futures]
                summaries = {run.learning_rate: scores["summary"] for run, scores in result_tables if scores}
                trials = {f"{rate:g}": summary for rate, summary in summaries.items()}
                rows[row] = {"rates": trials, "rate": None, "runs": []}
                if len(summaries) < len(futures):  # a search run failed, so the other rows had more trials
                    continue
                best_rate = comparison.learning_rates[row][0]
                if summaries:
                    best_rate = choose_learning_rate(summaries, comparison.settings.keeps)
                    op_list = ", ".join(f"{rate:g}: OP {summary['OP']:.3f}" for rate, summary in summaries.items())
                    print(f"{row}: on dev {op_list}; so {best_rate:g}", flush=True)
                rows[row]["rate"] = best_rate
                final_futures[row] = [
                    pool.submit(run_pool.complete_run, run) for run in comparison.final_runs(row, best_rate)
                ]
            for row, futures in final_futures.items():
                completed = [run for run, scores in (future.result() for future in futures) if scores]
                rows[row]["runs"] = [str(run.folder.relative_to(comparison.folder)) for run in completed]
        except BaseException:
            run_pool.stop()
            raise
    for row in rows:
        rows[row]["failed"] = [failure for failure in comparison.failures if failure["row"] == row]
    document = {
        "stream": comparison.source,
        "rates": {row: list(rates) for row, rates in comparison.learning_rates.items()},
        "keeps": comparison.settings.keeps,
        "search_limit": comparison.settings.search_limit,
        "at_once": len(shares),
        "rows": rows,
        "deviations": find_deviations(comparison, rows),
    }
    (comparison.folder / "comparison.json").write_text(json.dumps(document, indent=1), "utf-8")
    report_files = report.write_report([comparison.folder], comparison.folder)
    if comparison.failures:
        listed = comparison.failures[:MAX_LISTED_FAILURES]
        names = "; ".join(f"{failure['run']} ({failure['said']}; {failure['log']})" for failure in listed)
        raise ExternalFailure(
            f"{len(comparison.failures)} of the runs failed: {names}; run the same command again to repeat them"
        )
    return report_files


def find_deviations(comparison: ComparisonPlan, rows: Mapping[str, Any]) -> list[str]:
    """List how a row's budget differs from that of the other rows, as its runs have recorded it."""
    from dscl.methods.registry import METHODS

    deviations: list[str] = []
    budgets: dict[str, tuple[int, int]] = {}  # row → training steps and tokens
    for row, entry in rows.items():
        for run in entry["runs"][:1]:
            records = [json.loads(line) for line in (comparison.folder / run / "metrics.jsonl").open(encoding="utf-8")]
            tokens = {record["step"]: int(record["tokens"]) for record in records}
            budgets[row] = len(tokens), sum(tokens.values())
            extra_tokens = sum({record["step"]: int(record.get("tokens_beside", 0)) for record in records}.values())
            if extra_tokens:
                deviations.append(f"{row}: reads {extra_tokens:,} tokens in addition to those of its training steps")
    if budgets:
        ((usual_budget, _),) = Counter(budgets.values()).most_common(1)
        for row, (num_steps, num_tokens) in budgets.items():
            if (num_steps, num_tokens) != usual_budget:
                deviations.append(
                    f"{row}: {num_steps} steps and {num_tokens:,} tokens of training, where others take "
                    f"{usual_budget[0]} and {usual_budget[1]:,}"
                )
    for row, own_rates in comparison.learning_rates.items():
        if own_rates != comparison.settings.rates:
            deviations.append(f"{row}: tried rates of its own, {', '.join(f'{rate:g}' for rate in own_rates)}")
        best_rate = rows[row]["rate"]
        if len(own_rates) > 2 and best_rate in (min(own_rates), max(own_rates)):
            edge = "lowest" if best_rate == min(own_rates) else "highest"
            deviations.append(
                f"{row}: its best rate, {best_rate:g}, is the {edge} that was tried; one beyond may be better"
            )
        method = METHODS[str(comparison.rows[row].get("name", "sequential"))]
        if not _infers_task_id(comparison.rows[row]) and method.uses_task_id:
            deviations.append(
                f"{row}: is told each prompt's task; prompts of no task, such as held-out texts, are answered by the "
                "base model alone"
            )
    return deviations


class RunPool:
    """Runs several `dscl train` processes in parallel and prints the progress of the comparison."""

    def __init__(self, comparison: ComparisonPlan, shares: list[dict[str, str]], nproc: int, total_runs: int) -> None:
        """`shares`: for each parallel process, its environment variables (see `_machine_shares`)."""
        self._comparison, self._free_shares, self._nproc, self._total_runs = comparison, shares, nproc, total_runs
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._num_done, self._stopped, self._num_parallel = 0, False, len(shares)
        self._seconds: list[float] = []  # the duration of each run

    def complete_run(self, run: PlannedRun) -> tuple[PlannedRun, dict[str, Any] | None]:
        """Train a run unless it is complete. Return the run with its scores, or with None if it failed."""
        scores = run.read_scores()
        if scores is None and not self._stopped:
            start = time.monotonic()
            self._train_run(run)
            self._seconds.append(time.monotonic() - start)
            scores = run.read_scores()
        with self._lock:
            self._num_done += 1
            remaining_runs = self._total_runs - self._num_done
            remaining = remaining_runs * sum(self._seconds) / max(1, len(self._seconds)) / self._num_parallel
            estimate = f", about {format_duration(remaining)} left" if self._seconds and remaining_runs > 0 else ""
            outcome = f"OP {scores['summary']['OP']:.3f}" if scores else "failed"
            print(f"{self._num_done} of {self._total_runs} runs: {run.name}: {outcome}{estimate}", flush=True)
        return run, scores

    def _train_run(self, run: PlannedRun) -> None:
        """Run `dscl train` in a process and wait for its end. A failure is recorded in the comparison."""
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe_path, log = (run.folder.parent / f"{run.folder.name}.{suffix}" for suffix in ("yaml", "log"))
        recipe_path.write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True), "utf-8")
        with self._lock:
            share = self._free_shares.pop()
        command = [sys.executable, "-m", "dscl", "train", str(recipe_path), "--nproc", str(self._nproc)]
        try:
            with open(log, "wb") as file:
                environment = {**subprocess_environment(), **share}
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
                self._processes.add(process)
                status = process.wait()
                self._processes.discard(process)
        finally:
            with self._lock:
                self._free_shares.append(share)
        if status and run.read_scores() is None:  # a run with complete scores counts even if its process failed later
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            message = lines[-1].strip() if lines else f"status {status}"
            failure = {"row": run.row, "run": run.name, "status": status, "said": message, "log": str(log)}
            with self._lock:
                self._comparison.failures.append(failure)

    def stop(self) -> None:
        """Terminate all processes when the comparison ends early. Running it again resumes them."""
        self._stopped = True
        for process in list(self._processes):
            with contextlib.suppress(OSError):
                process.terminate()


def _machine_shares(max_parallel: int | None, nproc: int) -> list[dict[str, str]]:
    """Divide the machine's cores and GPUs among the parallel runs, as environment variables of each run."""
    num_gpus = count_gpus()
    capacity = max(1, (num_gpus or count_cores()) // nproc)
    num_parallel = capacity if max_parallel is None else max_parallel
    if num_gpus and num_parallel > capacity:
        raise UserError(
            f"--at-once: given {num_parallel}; {num_gpus} GPUs serve {capacity} runs of {nproc} ranks, so at most "
            f"{capacity}"
        )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // (num_parallel * nproc)))
    shares = [{"OMP_NUM_THREADS": threads} for _ in range(num_parallel)]
    visible_gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))).split(",")
    for i, share in enumerate(shares):
        if num_gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus[i * nproc : (i + 1) * nproc])
    return shares
