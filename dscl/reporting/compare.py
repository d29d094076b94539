"""`dscl compare`: train several methods on one stream, with equal samples, order, epochs, batches and evaluation.

A comparison is a recipe without `method` and `train.lr`, but with a section `compare`. A row of the comparison is a
method with its settings. Every row tries the same number of learning rates on the dev split, with the recipe's seed.
The best learning rate is then trained with every seed and evaluated on the test split. Each run is a `dscl train`
process with its own folder. Complete runs are not repeated. A failed run is reported; the other runs go on.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.config.methods import METHOD_PRESETS
from dscl.config.parsing import apply_overrides, describe_value, did_you_mean, parse_config, parse_partial, read_yaml
from dscl.config.schema import CompareConfig
from dscl.recipe.recipe import Recipe, resolve_recipe
from dscl.reporting import report
from dscl.reporting.run_pool import PlannedRun, RunPool, machine_shares
from dscl.utils.atomic_io import write_text_atomically
from dscl.utils.errors import ExternalFailure, UserError

RUNS_FOLDER = "runs"  # the folder of a comparison's runs, in its run_dir
MAX_LISTED_FAILURES = 3  # failed runs that the error message names


@dataclass
class ComparisonPlan:
    """The rows of a comparison and the recipes of all its runs."""

    folder: Path
    shared_recipe: Mapping[str, Any]  # the recipe without `method` and `train.lr`
    source: str  # the recipe's file
    settings: CompareConfig
    rows: Mapping[str, Mapping[str, Any]]  # row name → the row's `method` section
    learning_rates: Mapping[str, tuple[float, ...]]  # row name → the learning rates that the row tries

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
            every = len(stream) if isinstance(stream, list) and stream and self.settings.max_forgetting is None else 1
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
    if "lr" in recipe["train"] and settings.learning_rates:
        raise UserError(
            "train.lr: given in a comparison, whose rows try those of compare.learning_rates; write it there"
        )
    if "lr" in recipe["train"]:
        settings = parse_config(
            CompareConfig, {**vars(settings), "learning_rates": [recipe["train"].pop("lr")]}, "compare"
        )
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
        name: {key: value for key, value in known_rows[name].items() if key != "learning_rates"}
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
    own = {key: value for key, value in row.items() if key == "learning_rates"}
    parsed = parse_partial(CompareConfig, own, f"compare.rows.{name}")
    learning_rates: tuple[float, ...] = tuple(parsed.get("learning_rates") or settings.learning_rates)
    if not learning_rates:
        raise UserError(f"compare.learning_rates: none given, and row {name!r} has none of its own; give a list")
    return learning_rates


def _check_equal_trials(learning_rates: Mapping[str, Sequence[float]]) -> None:
    (first_row, first_rates), *others = learning_rates.items()
    for name, own_rates in others:
        if len(own_rates) != len(first_rates):
            raise UserError(
                f"compare.rows.{name}.learning_rates: given {len(own_rates)}, and {first_row} has {len(first_rates)}; "
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

    shares = machine_shares(max_parallel, nproc)
    for row, rates in comparison.learning_rates.items():
        for run in (*comparison.search_runs(row), *(run for rate in rates for run in comparison.final_runs(row, rate))):
            reject_other_recipe(resolve_run_recipe(run, comparison))  # an existing run must have the same settings
    run_pool = RunPool(shares, nproc, len(comparison.all_runs()))
    rows = _train_rows(comparison, run_pool, len(shares))
    document = {
        "stream": comparison.source,
        "learning_rates": {row: list(rates) for row, rates in comparison.learning_rates.items()},
        "max_forgetting": comparison.settings.max_forgetting,
        "search_limit": comparison.settings.search_limit,
        "max_parallel": len(shares),
        "rows": rows,
        "deviations": find_deviations(comparison, rows),
    }
    write_text_atomically(comparison.folder / "comparison.json", json.dumps(document, indent=1))
    report_files = report.write_report([comparison.folder], comparison.folder)
    if run_pool.failures:
        listed = run_pool.failures[:MAX_LISTED_FAILURES]
        names = "; ".join(f"{failure['run']} ({failure['message']}; {failure['log']})" for failure in listed)
        raise ExternalFailure(
            f"{len(run_pool.failures)} of the runs failed: {names}; run the same command again to repeat them"
        )
    return report_files


def _train_rows(comparison: ComparisonPlan, run_pool: RunPool, num_parallel: int) -> dict[str, Any]:
    """Search each row's learning rate, then train the row with it. Return the entry of each row in comparison.json."""
    rows: dict[str, Any] = {}
    with ThreadPoolExecutor(num_parallel) as pool:
        try:
            search_futures = {
                row: [pool.submit(run_pool.complete_run, run) for run in comparison.search_runs(row)]
                for row in comparison.rows
            }
            final_futures = {}
            for row, futures in search_futures.items():
                result_tables = [future.result() for future in futures]
                summaries = {run.learning_rate: scores.summary for run, scores in result_tables if scores}
                trials = {f"{rate:g}": summary for rate, summary in summaries.items()}
                rows[row] = {"trials": trials, "learning_rate": None, "runs": []}
                if len(summaries) < len(futures):  # a search run failed, so the other rows had more trials
                    continue
                best_rate = comparison.learning_rates[row][0]
                if summaries:
                    best_rate = choose_learning_rate(summaries, comparison.settings.max_forgetting)
                    op_list = ", ".join(f"{rate:g}: OP {summary['OP']:.3f}" for rate, summary in summaries.items())
                    print(f"{row}: on dev {op_list}; so {best_rate:g}", flush=True)
                rows[row]["learning_rate"] = best_rate
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
        rows[row]["failed"] = [failure for failure in run_pool.failures if failure["row"] == row]
    return rows


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
            extra_tokens = sum({record["step"]: int(record.get("extra_tokens", 0)) for record in records}.values())
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
        if own_rates != comparison.settings.learning_rates:
            deviations.append(f"{row}: tried rates of its own, {', '.join(f'{rate:g}' for rate in own_rates)}")
        best_rate = rows[row]["learning_rate"]
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
