"""Methods and their settings on real text: equal samples, steps and evaluation; learning rates searched on dev.

    python tools/compare_on_text.py asr --data ../shared/data --out out/compare
    python tools/compare_on_text.py osft --data ../shared/data --out out/compare --search 500
    python tools/compare_on_text.py moses --data ../shared/data --out out/compare --stream eight --only atoms elements
    python tools/compare_on_text.py moses --data out/ten --out out/compare --stream "ten, generated" --rates 2e-3

The base model, its held-out texts and the tasks are those of the data folder (base/, cl_benchmark/), or those of a
folder that `tools/make_stage.py --tasks 10` made, for the streams that are called generated. Every row
searches its learning rate on the same grid (seed 0, dev split), unless that is a single rate: of the
rates whose BWT on dev is at least -0.05 it takes the one with the highest OP, of all rates where there is none. Then it
runs with each seed on the test split. A run that is complete is not run again, so the command can be stopped, given
again, and rows added.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

STREAMS = {
    "four": ("dbpedia", "amazon", "agnews", "sst2"),
    "six": ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq"),
    "six, reversed": ("boolq", "qqp", "sst2", "agnews", "amazon", "dbpedia"),
    "eight": ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq", "mnli", "rte"),
    "nine": ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq", "mnli", "rte", "wic"),
    "ten, generated": (
        "kind",
        "mood",
        "nation",
        "land",
        "tense",
        "craft",
        "weather",
        "colour",
        "hour",
        "age",
    ),
    "eight, another order": ("rte", "agnews", "qqp", "dbpedia", "boolq", "sst2", "mnli", "amazon"),
}

FORGETS_LITTLE = 0.05  # of BWT


@dataclass(frozen=True)
class Table:
    """Some rows, and what they have in common."""

    rows: Mapping[str, Mapping[str, Any]]  # the recipe's `method`
    stream: str
    samples: int  # of training, a task
    epochs: int
    batch: int
    rates: Sequence[float]
    packing: bool = True
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    heldout: bool = False


LORA = {"rank": 8, "alpha": 16.0}
# As many columns as a task's masks open, beside the same projections.
SAME = {"rank": 16, "alpha": 32.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def osft(**settings: Any) -> dict[str, Any]:
    return {"name": "osft", **settings}


def moses(**settings: Any) -> dict[str, Any]:
    return {"name": "moses", **settings}


TABLES = {
    "asr": Table(
        rows={
            "asr": {"name": "asr", "lora": LORA},
            "asr, layer 5": {"name": "asr", "lora": LORA, "feature_layer": 5},
            "sequential, one LoRA": {"name": "sequential", "tune": "lora", "lora": LORA},
            "sequential, all weights": {"name": "sequential"},
        },
        stream="six", samples=500, epochs=2, batch=16, rates=(3e-4, 4e-3), packing=False,
    ),
    "osft": Table(
        rows={
            "free": {"name": "sequential"},
            "default": osft(),
            "claim: none": osft(claim=[]),
            "claim: updates": osft(claim=["updates"]),
            "claim: activations": osft(claim=["activations"]),
            "claim: sensitivity": osft(claim=["sensitivity"]),
            "basis: weights": osft(basis=["weights"]),
            "basis: weights and activations": osft(basis=["weights", "activations"]),
            "basis: sensitivity": osft(basis=["sensitivity"]),
            "basis: weights, claim: none": osft(basis=["weights"], claim=[]),
            "rest: free": osft(rest="free"),
            "rest: protected": osft(rest="protected"),
            "gradients: as they are": osft(gradients=False),
            "reading: two_sided": osft(reading="two_sided"),
            "reading: paper": osft(reading="paper"),
            "share: 0.25": osft(share=0.25),
            "share: 0.4": osft(share=0.4),
            "share: 0.5": osft(share=0.5),
            "faithful": osft(faithful=True),
        },
        stream="four", samples=1000, epochs=1, batch=8, rates=(3e-4, 5e-4, 1e-3), heldout=True,
    ),
    "moses": Table(
        rows={
            "sequential, one LoRA": {"name": "sequential", "tune": "lora", "lora": SAME},
            "a LoRA a task": {"name": "lora_per_task", "lora": SAME},
            "asr": {"name": "asr", "lora": SAME},
            "atoms": moses(),
            "elements": moses(masks="element"),
            "atoms, no reuse": moses(reuse=False),
            "atoms, gate: uniform": moses(gate="uniform"),
            "atoms, key": moses(task_inference="key"),
            "atoms and free weights (osft)": moses(weights={"name": "osft"}),
        },
        stream="four", samples=500, epochs=2, batch=8, rates=(1e-3, 2e-3, 4e-3), evaluate={"given": True},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", type=Path, required=True, help="a folder with base/ and cl_benchmark/, or a stage")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--stream", choices=list(STREAMS), help="default: the table's own")
    parser.add_argument("--epochs", type=int, help="of a task (default: the table's own)")
    parser.add_argument("--train", type=int, help="training samples a task (default: the table's own)")
    parser.add_argument("--test", type=int, default=200, help="test samples a task, of dev as many (default 200)")
    parser.add_argument("--rates", type=float, nargs="+", help="the grid (default: the table's own)")
    parser.add_argument("--search", type=int, help="training samples a task in the search (default: as in the runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs on the test split")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side, of one process and thread each")
    parser.add_argument("--only", nargs="*", help="some of the rows")
    options = parser.parse_args()
    chosen = TABLES[options.table]
    options.stream = options.stream or chosen.stream
    options.train = options.train or chosen.samples
    made = (options.data / "stage.json").is_file()
    if made != options.stream.endswith("generated"):
        parser.error(f"--stream: given {options.stream!r}, which {options.data} does not hold; see --data")
    options.model = options.data / ("model" if made else "base")
    options.tasks = options.data if made else options.data / "cl_benchmark"
    rates = options.rates or chosen.rates
    for row in options.only or ():
        if row not in chosen.rows:
            parser.error(f"--only: given {row!r}; rows of {options.table}: {', '.join(chosen.rows)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        searches = {
            row: {lr: pool.submit(perform, row, lr, 0, "dev", options) for lr in rates if len(rates) > 1}
            for row in options.only or chosen.rows
        }
        finals = {}
        for row, runs in searches.items():
            best = choose(row, {lr: run.result()["summary"] for lr, run in runs.items()}) if runs else rates[0]
            finals[row] = best, [pool.submit(perform, row, best, seed, "test", options) for seed in options.seeds]
        show({row: (lr, [run.result() for run in runs]) for row, (lr, runs) in finals.items()})


def choose(row: str, found: Mapping[float, Mapping[str, Any]]) -> float:
    """The rate with the highest OP on dev, among those that forget little if there are any."""
    shown = (f"{lr:g}: {of['OP']:.3f} ({of['BWT'] or 0:+.3f})" for lr, of in found.items())
    keep = [lr for lr, of in found.items() if (of["BWT"] or 0) >= -FORGETS_LITTLE]
    best = max(keep or found, key=lambda lr: float(found[lr]["OP"]))
    print(f"# {row}: OP (BWT) on dev {', '.join(shown)}; so {best:g}", flush=True)
    return best


def perform(row: str, lr: float, seed: int, split: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run, unless it is done; its scores, with what it took."""
    chosen = TABLES[options.table]
    searching = split == "dev" and options.search
    words = "-".join([options.table, options.stream, row, f"{lr:g}", str(seed), split])
    run = options.out / "".join(c for c in words.replace(" ", "_") if c not in ",:()")
    scores, path, clock = run / "scores.json", run.with_name(run.name + ".yaml"), run.with_name(run.name + ".seconds")
    evaluate: dict[str, Any] = {"batch": 50, "tasks": "seen", "before": False, "split": split}
    if split == "test":
        by_task = chosen.rows[row]["name"] in ("asr", "moses")
        evaluate |= {k: v for k, v in chosen.evaluate.items() if k != "given" or by_task}
        evaluate["heldout"] = str(options.data / "base" / "heldout.jsonl") if chosen.heldout else None
    recipe = {
        "run_dir": str(run),
        "seed": seed,
        "model": {"name": str(options.model)},
        "method": dict(chosen.rows[row]),
        "data": {"bad_records": "skip", "cache_dir": str(options.out / "cache")},
        "stream_defaults": {
            "train_limit": options.search if searching else options.train,
            "test_limit": options.test,
            "dev_limit": options.test,
            "epochs": options.epochs or chosen.epochs,
        },
        "stream": [{"name": t, "path": str(options.tasks / t)} for t in STREAMS[options.stream]],
        "train": {"lr": lr, "schedule": "linear", "global_batch": chosen.batch, "micro_batch": 8,
                  "packing": chosen.packing, "max_length": 256, "precision": "fp32"},
        "evaluate": evaluate,
        "deepspeed": "ds_configs/zero1.json",
        "checkpoint": {"every": 1000, "keep": 1},
        "observe": {"tensorboard": False, "live": "off"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    if not (scores.is_file() and json.loads(scores.read_text("utf-8"))["complete"]):
        print(f"# {path}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, "-m", "dscl", "train", str(path)]
        start = time.monotonic()
        with open(run.with_name(run.name + ".log"), "w", encoding="utf-8") as log:
            status = subprocess.call(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}; see {log.name}")
        clock.write_text(str(time.monotonic() - start))
    document: dict[str, Any] = json.loads(scores.read_text("utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = {name: [r[name] for r in records if name in r] for name in ("capacity_bytes", "lora_per_task_bytes")}
    seconds = float(clock.read_text()) if clock.is_file() else None
    return document | kept | {"seconds": seconds}


Runs = Mapping[str, tuple[float, list[dict[str, Any]]]]


def show(rows: Runs) -> None:
    """Means over the seeds, with the spread of OP; then every task's score at the end, and where prompts went."""
    every = [document for _, found in rows.values() for document in found]
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "OP": lambda found: mean(found, lambda s: s["summary"]["OP"], spread=True),
        "BWT": lambda found: mean(found, lambda s: s["summary"]["BWT"], "+.3f"),
        "right after learning": lambda found: mean(found, diagonal),
    }
    if any("given" in s for s in every):
        columns["OP, task given"] = lambda found: mean(found, lambda s: s["given"]["summary"]["OP"])
        columns["BWT, task given"] = lambda found: mean(found, lambda s: s["given"]["summary"]["BWT"], "+.3f")
        columns["routed right"] = lambda found: mean(found, lambda s: statistics.mean(s["routed"][-1]))
    if any("heldout" in s for s in every):
        columns["held-out loss before → after"] = lambda found: " → ".join(
            mean(found, part, ".2f") for part in (lambda s: s["heldout"][0], lambda s: s["heldout"][-1])
        )
    if any(s["capacity_bytes"] for s in every):
        columns["kept, KiB"] = lambda found: mean(found, lambda s: s["capacity_bytes"][-1] / 1024, ".0f")
    columns["minutes"] = lambda found: mean(found, lambda s: s["seconds"] / 60, ".1f")
    table(["row", "rate", *columns], [[row, f"{lr:g}", *(of(found) for of in columns.values())]
                                      for row, (lr, found) in rows.items()])  # fmt: skip
    names = every[0]["tasks"]
    places = range(len(names))
    table(["at the end", *names], [[row, *(mean(found, partial(at_end, "matrix", j)) for j in places)]
                                   for row, (_, found) in rows.items()])  # fmt: skip
    kinds = ("capacity_bytes", ""), ("lora_per_task_bytes", ", were it a LoRA a task")
    kept = [
        [row + words, *(mean(found, partial(after, kind, j), ".0f") for j in places)]
        for row, (_, found) in rows.items() for kind, words in kinds if found[0][kind]
    ]  # fmt: skip
    if kept:
        table(["KiB kept after", *names], kept)
    routed = {row: found for row, (_, found) in rows.items() if "routed" in found[0]}
    if routed:
        table(["right, to none", *names], [
            [row, *(", ".join(mean(found, partial(at_end, of, j)) for of in ("routed", "rejected")) for j in places)]
            for row, found in routed.items()
        ])  # fmt: skip


def at_end(what: str, task: int, document: Mapping[str, Any]) -> float:
    value: float = document[what][-1][task]
    return value


def after(what: str, task: int, document: Mapping[str, Any]) -> float:
    value: float = document[what][task] / 1024
    return value


def diagonal(document: Mapping[str, Any]) -> float:
    return statistics.mean(row[i] for i, row in enumerate(document["matrix"]))


def mean(found: Sequence[Mapping[str, Any]], of: Callable[[Any], float], how: str = ".3f", spread: bool = False) -> str:
    """Over the seeds; - where a run has no such figure."""
    try:
        values = [of(document) for document in found]
        shown = format(statistics.mean(values), how)
    except (KeyError, TypeError, IndexError):
        return "-"
    return f"{shown} ± {statistics.stdev(values):.3f}" if spread and len(values) > 1 else shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print()
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
