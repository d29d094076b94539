"""`dscl compare`: methods side by side on one stream, with equal samples, order, epochs, batches and evaluation.

A comparison is a recipe whose `method` and `train.lr` are left out and which has a section `compare`. Every row (a
method and its settings) tries the same number of learning rates on the dev split, with the recipe's seed; the best one
then runs on the test split with every seed. Each run is a `dscl train` of its own, in a folder of its own: what is
complete is not run again, one that fails is told and does not keep the others from ending.
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

from dscl.config.methods import METHOD_CONFIGS
from dscl.config.parsing import convert, nearest, override, parse, read_yaml, show
from dscl.config.schema import CompareConfig
from dscl.distributed.launcher import cores, gpus, outside
from dscl.recipe.recipe import Recipe, resolve
from dscl.reporting import report
from dscl.utils.errors import Failure, UserError
from dscl.utils.formatting import duration

RUNS = "runs"  # the folder of a comparison's runs, in its run_dir
SHOWN = 3  # of what fails


@dataclass(frozen=True)
class Run:
    """One `dscl train`."""

    row: str
    rate: float
    seed: int
    split: str
    folder: Path
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row}: {'dev' if self.split == 'dev' else f'seed {self.seed}'}, rate {self.rate:g}"

    def scores(self) -> dict[str, Any] | None:
        """What it has come to; None while it is not complete."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "scores.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("complete") else None


@dataclass
class Comparison:
    """What is compared: rows by name, each a method's keys, and the rates that each tries."""

    folder: Path
    common: Mapping[str, Any]  # the recipe without method and rate
    source: str
    settings: CompareConfig
    rows: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, tuple[float, ...]]
    failed: list[dict[str, Any]] = field(default_factory=list)

    def run(self, row: str, rate: float, seed: int, split: str) -> Run:
        searching = split == "dev"
        folder = self.folder / RUNS / plain_name(row) / f"{'dev' if searching else f'seed-{seed}'}-{rate:g}"
        method = dict(self.rows[row])
        evaluate = {**self.common["evaluate"], "split": split}
        if searching:  # only OP counts, and BWT where it is to be kept
            stream = self.common.get("stream")
            every = len(stream) if isinstance(stream, list) and stream and self.settings.keeps is None else 1
            evaluate |= {"before": False, "tasks": "new", "every": every, "heldout": None}
        if "given" in evaluate and (searching or not _decides(method)):  # it answers alike whether it is told the task
            del evaluate["given"]
        recipe = {
            **self.common,
            **(self._limited() if searching else {}),
            "run_dir": str(folder),
            "seed": seed,
            "method": method,
            "train": {**self.common["train"], "lr": rate},
            "evaluate": evaluate,
            "observe": {**self.common["observe"], "live": "off"},
        }
        return Run(row, rate, seed, split, folder, recipe)

    def _limited(self) -> dict[str, Any]:
        """The stream, of which no task gives more samples than `search_limit`."""
        most, stream, defaults = self.settings.search_limit, self.common.get("stream"), self.common["stream_defaults"]
        if most is None:
            return {}

        def limited(task: Mapping[str, Any]) -> dict[str, Any]:
            return {**task, "train_limit": _least(task.get("train_limit"), most)}

        found: dict[str, Any] = {"stream_defaults": limited(defaults)}
        if isinstance(stream, list) and all(isinstance(task, dict) for task in stream):
            found["stream"] = [limited(task) if "train_limit" in task else task for task in stream]
        return found

    def search(self, row: str) -> list[Run]:
        rates = self.rates[row]
        return [self.run(row, rate, self.common["seed"], "dev") for rate in rates] if len(rates) > 1 else []

    def finals(self, row: str, rate: float) -> list[Run]:
        return [self.run(row, rate, seed, "test") for seed in self.settings.seeds]

    def every(self) -> list[Run]:
        """All runs that there may be, with the first rate standing for the one that the search will find."""
        return [run for row in self.rows for run in (*self.search(row), *self.finals(row, self.rates[row][0]))]


def read_comparison(
    path: str, assignments: Iterable[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
) -> Comparison:
    """Everything about a comparison, checked: each of its runs' recipes resolves."""
    given = override(read_yaml(path), assignments)
    settings = parse(CompareConfig, given.pop("compare", None) or {}, "compare")
    if seeds:
        settings = parse(CompareConfig, {**vars(settings), "seeds": list(seeds)}, "compare")
    if methods and "method" in given:  # a recipe: its stream is what is asked for
        del given["method"]
    if "method" in given:
        raise UserError(
            f"method: given {show(given['method'])} in a comparison; write it as a row of compare.rows, or name "
            "methods with --methods"
        )
    for section in ("train", "evaluate", "observe", "stream_defaults"):
        given[section] = given.get(section) or {}
        if not isinstance(given[section], dict):
            raise UserError(f"{section}: given {show(given[section])}; a mapping of keys is needed")
    if "lr" in given["train"] and settings.rates:
        raise UserError("train.lr: given in a comparison, whose rows try those of compare.rates; write it there")
    if "lr" in given["train"]:
        settings = parse(CompareConfig, {**vars(settings), "rates": [given["train"].pop("lr")]}, "compare")
    given.setdefault("seed", 0)
    named = {**{name: {"name": name} for name in METHOD_CONFIGS}, **settings.rows}
    chosen = list(methods or settings.rows)
    if not chosen:
        raise UserError("compare.rows: none given; give rows there, or names of methods with --methods")
    for name in chosen:
        if name not in named:
            raise UserError(f"--methods: given {name!r}; allowed: {', '.join(named)}{nearest(name, named)}")
    rows = {name: {k: v for k, v in named[name].items() if k != "rates"} for name in dict.fromkeys(chosen)}
    rates = {name: _rates(name, named[name], settings) for name in rows}
    folder = Path(os.path.expanduser(str(given.get("run_dir") or "")))
    comparison = Comparison(folder, given, path, settings, rows, rates)
    _refuse_unequal_trials(rates)
    taken: dict[Path, str] = {}
    for run in comparison.every():
        resolved(run, comparison)
        if taken.setdefault(run.folder.parent, run.row) != run.row:
            raise UserError(
                f"compare.rows: {run.row!r} and {taken[run.folder.parent]!r} would share the folder "
                f"{run.folder.parent.name}; rename one"
            )
    return comparison


def _least(given: Any, most: int) -> Any:
    """What is no number is told where the recipe is resolved."""
    return most if given is None else min(given, most) if isinstance(given, int) else given


def _decides(method: Mapping[str, Any]) -> bool:
    """Whether it finds out a prompt's task. What is wrong with the settings is told where the recipe is resolved."""
    from dscl.methods.registry import find_method  # with which torch comes

    try:
        made = find_method(str(method.get("name", "sequential")))
        return made.decides_with(parse(made.Config, method, "method"))
    except UserError:
        return True


def _rates(name: str, row: Mapping[str, Any], settings: CompareConfig) -> tuple[float, ...]:
    own = convert(CompareConfig, {"rates": row["rates"]}, f"compare.rows.{name}")["rates"] if "rates" in row else ()
    rates: tuple[float, ...] = tuple(own or settings.rates)
    if not rates:
        raise UserError(f"compare.rates: none given, and row {name!r} has none of its own; give a list of rates")
    return rates


def _refuse_unequal_trials(rates: Mapping[str, Sequence[float]]) -> None:
    (first, expected), *others = rates.items()
    for name, own in others:
        if len(own) != len(expected):
            raise UserError(
                f"compare.rows.{name}.rates: given {len(own)} rates, and {first} has {len(expected)}; every row tries "
                "equally many, so give as many"
            )


def resolved(run: Run, comparison: Comparison) -> Recipe:
    try:
        return resolve(run.recipe, source=comparison.source)
    except UserError as error:
        raise UserError(f"row {run.row!r}: {error}") from None


def plain_name(row: str) -> str:
    """As the name of a folder."""
    return re.sub(r"[^\w.+-]+", "-", row).strip("-.") or "row"


def choose(found: Mapping[float, Mapping[str, Any]], keeps: float | None) -> float:
    """Of the rates that were tried the one with the highest OP; among those that keep what was learnt, if asked for."""
    kept = [rate for rate, summary in found.items() if keeps is not None and (summary["BWT"] or 0.0) >= -keeps]
    return max(kept or found, key=lambda rate: float(found[rate]["OP"]))


def perform(comparison: Comparison, at_once: int | None = None, nproc: int = 1) -> list[Path]:
    """Run what is left of a comparison, then write its report; says which files."""
    from dscl.training.run_dir import refuse_another_run  # with which DeepSpeed comes; a wrong key was told before

    places = _places(at_once, nproc)
    for row, rates in comparison.rates.items():
        for run in (*comparison.search(row), *(run for rate in rates for run in comparison.finals(row, rate))):
            refuse_another_run(resolved(run, comparison))  # what is there must be of these very settings
    crew = Crew(comparison, places, nproc, len(comparison.every()))
    rows: dict[str, Any] = {}
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            tried = {row: [pool.submit(crew.run, run) for run in comparison.search(row)] for row in comparison.rows}
            finals = {}
            for row, futures in tried.items():
                found = {run.rate: scores["summary"] for run, scores in (f.result() for f in futures) if scores}
                rows[row] = {"rates": {f"{of:g}": summary for of, summary in found.items()}, "rate": None, "runs": []}
                if len(found) < len(futures):  # the others had more trials
                    continue
                rate = choose(found, comparison.settings.keeps) if found else comparison.rates[row][0]
                rows[row]["rate"] = rate
                if found:
                    shown = ", ".join(f"{of:g}: OP {s['OP']:.3f}" for of, s in found.items())
                    print(f"{row}: on dev {shown}; so {rate:g}", flush=True)
                finals[row] = [pool.submit(crew.run, run) for run in comparison.finals(row, rate)]
            for row, futures in finals.items():
                done = [run for run, scores in (future.result() for future in futures) if scores]
                rows[row]["runs"] = [str(run.folder.relative_to(comparison.folder)) for run in done]
        except BaseException:
            crew.stop()
            raise
    for row in rows:
        rows[row]["failed"] = [told for told in comparison.failed if told["row"] == row]
    document = {
        "stream": comparison.source,
        "rates": {row: list(rates) for row, rates in comparison.rates.items()},
        "keeps": comparison.settings.keeps,
        "search_limit": comparison.settings.search_limit,
        "at_once": len(places),
        "rows": rows,
        "deviations": deviations(comparison, rows),
    }
    (comparison.folder / "comparison.json").write_text(json.dumps(document, indent=1), "utf-8")
    written = report.write([comparison.folder], comparison.folder)
    if comparison.failed:
        names = "; ".join(f"{told['run']} ({told['said']}; {told['log']})" for told in comparison.failed[:SHOWN])
        raise Failure(
            f"{len(comparison.failed)} of the runs failed: {names}; run the same command again to repeat them"
        )
    return written


def deviations(comparison: Comparison, rows: Mapping[str, Any]) -> list[str]:
    """Where a row was not given what the others were, as its runs recorded it."""
    from dscl.methods.registry import METHODS

    found: list[str] = []
    taken: dict[str, tuple[int, int]] = {}
    for row, told in rows.items():
        for run in told["runs"][:1]:
            records = [json.loads(line) for line in (comparison.folder / run / "metrics.jsonl").open(encoding="utf-8")]
            tokens = {record["step"]: int(record["tokens"]) for record in records}
            taken[row] = len(tokens), sum(tokens.values())
            if beside := sum({record["step"]: int(record.get("tokens_beside", 0)) for record in records}.values()):
                found.append(f"{row}: looks at {beside:,} tokens beside those of its steps")
    if taken:
        ((usual, _),) = Counter(taken.values()).most_common(1)
        for row, (steps, seen) in taken.items():
            if (steps, seen) != usual:
                found.append(
                    f"{row}: {steps} steps and {seen:,} tokens of training, where others take {usual[0]} and "
                    f"{usual[1]:,}"
                )
    for row, own in comparison.rates.items():
        if own != comparison.settings.rates:
            found.append(f"{row}: tried rates of its own, {', '.join(f'{rate:g}' for rate in own)}")
        rate = rows[row]["rate"]
        if len(own) > 2 and rate in (min(own), max(own)):
            edge = "lowest" if rate == min(own) else "highest"
            found.append(f"{row}: its best rate, {rate:g}, is the {edge} that was tried; one beyond may be better")
        method = METHODS[str(comparison.rows[row].get("name", "sequential"))]
        if not _decides(comparison.rows[row]) and method.by_task:
            found.append(
                f"{row}: is told which task a prompt is of, and answers others, held-out texts among them, as the bare "
                "model does"
            )
    return found


class Crew:
    """Runs `dscl train` in so many places at once, and says how far the comparison is."""

    def __init__(self, comparison: Comparison, places: list[dict[str, str]], nproc: int, of: int) -> None:
        self._comparison, self._places, self._nproc, self._of = comparison, places, nproc, of
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._done, self._stopped, self._at_once = 0, False, len(places)
        self._seconds: list[float] = []  # that runs took

    def run(self, run: Run) -> tuple[Run, dict[str, Any] | None]:
        """Have it complete, unless it is; its scores, or None where it failed."""
        scores = run.scores()
        if scores is None and not self._stopped:
            start = time.monotonic()
            self._start(run)
            self._seconds.append(time.monotonic() - start)
            scores = run.scores()
        with self._lock:
            self._done += 1
            left = (self._of - self._done) * sum(self._seconds) / max(1, len(self._seconds)) / self._at_once
            about = f", about {duration(left)} left" if self._seconds and self._done < self._of else ""
            ended = f"OP {scores['summary']['OP']:.3f}" if scores else "failed"
            print(f"{self._done} of {self._of} runs: {run.name}: {ended}{about}", flush=True)
        return run, scores

    def _start(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe, log = (run.folder.parent / f"{run.folder.name}.{kind}" for kind in ("yaml", "log"))
        recipe.write_text(yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True), "utf-8")
        with self._lock:
            place = self._places.pop()
        words = [sys.executable, "-m", "dscl", "train", str(recipe), "--nproc", str(self._nproc)]
        try:
            with open(log, "wb") as file:
                environment = {**outside(), **place}
                process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
                status = process.wait()
                self._running.discard(process)
        finally:
            with self._lock:
                self._places.append(place)
        if status and run.scores() is None:  # what is complete is no less so where the process ended badly after it
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            said = lines[-1].strip() if lines else f"status {status}"
            told = {"row": run.row, "run": run.name, "status": status, "said": said, "log": str(log)}
            with self._lock:
                self._comparison.failed.append(told)

    def stop(self) -> None:
        """Where the comparison ends early: its runs end too, and can go on later."""
        self._stopped = True
        for process in list(self._running):
            with contextlib.suppress(OSError):
                process.terminate()


def _places(at_once: int | None, nproc: int) -> list[dict[str, str]]:
    """For each of the runs that go on side by side, what it is to have of this machine."""
    devices = gpus()
    most = max(1, (devices or cores()) // nproc)
    count = most if at_once is None else at_once
    if devices and count > most:
        raise UserError(
            f"--at-once: given {count}; {devices} GPUs serve {most} runs of {nproc} ranks, so at most {most}"
        )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // (count * nproc)))
    places = [{"OMP_NUM_THREADS": threads} for _ in range(count)]
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))).split(",")
    for number, place in enumerate(places):
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number * nproc : (number + 1) * nproc])
    return places
