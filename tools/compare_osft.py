"""OSFT's settings against free fine-tuning on real text: equal samples, steps and evaluation, rates searched on dev.

    python tools/compare_osft.py --data ../shared/data --out out/osft
    python tools/compare_osft.py --data ../shared/data --out out/osft --stream eight --only default --rates 1e-3

The base model, its held-out texts and the tasks are those of the data folder. Every row searches its learning rate on
the same grid (seed 0, dev split, OP), unless that is a single rate, then runs with each seed on the test split. A run
that is complete is not run again, so the command can be stopped and given again, and other rows added.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

STREAMS = {
    "four": ("dbpedia", "amazon", "agnews", "sst2"),
    "eight": ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq", "mnli", "rte"),
    "eight, another order": ("rte", "agnews", "qqp", "dbpedia", "boolq", "sst2", "mnli", "amazon"),
}
# Every row but the first: osft with these keys beside the default's.
ROWS: dict[str, dict[str, Any]] = {
    "free": {"name": "sequential"},
    "default": {},
    "claim: none": {"claim": []},
    "claim: updates": {"claim": ["updates"]},
    "rest: free": {"rest": "free"},
    "basis: weights": {"basis": ["weights"]},
    "claim: sensitivity": {"claim": ["sensitivity"]},
    "claim: activations": {"claim": ["activations"]},
    "gradients too": {"gradients": True},
    "reading: two_sided": {"reading": "two_sided"},
    "reading: paper": {"reading": "paper"},
    "basis: weights, claim: none": {"basis": ["weights"], "claim": []},
    "basis: weights and activations": {"basis": ["weights", "activations"]},
    "basis: sensitivity": {"basis": ["sensitivity"]},
    "rest: protected": {"rest": "protected"},
    "share: 0.25": {"share": 0.25},
    "share: 0.4": {"share": 0.4},
    "share: 0.5": {"share": 0.5},
    "faithful": {"faithful": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with base/ and cl_benchmark/")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--stream", default="four", choices=list(STREAMS))
    parser.add_argument("--train", type=int, default=1000, help="training samples a task (default 1000)")
    parser.add_argument("--test", type=int, default=200, help="test samples a task (default 200; dev: 100)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 2e-3], help="the grid")
    parser.add_argument("--search", type=int, help="training samples a task in the search (default: as in the runs)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side, of one process and thread each")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), help="some of the rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        searches = {
            row: {
                lr: pool.submit(perform, row, lr, 0, "dev", options) for lr in options.rates if len(options.rates) > 1
            }
            for row in options.only
        }
        finals = {}
        for row, runs in searches.items():
            found = {lr: run.result()["summary"]["OP"] for lr, run in runs.items()}
            best = max(found, key=lambda lr: found[lr]) if found else options.rates[0]
            print(f"# {row}: OP on dev {', '.join(f'{lr:g}: {op:.3f}' for lr, op in found.items())}", flush=True)
            finals[row] = (
                best,
                [pool.submit(perform, row, best, seed, "test", options) for seed in range(options.seeds)],
            )
        print(table({row: (lr, [run.result() for run in runs]) for row, (lr, runs) in finals.items()}))


def perform(row: str, lr: float, seed: int, split: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run, unless it is done; its scores."""
    searching = split == "dev" and options.search
    run = options.out / "-".join([options.stream, row, f"{lr:g}", str(seed), split]).replace(" ", "_").replace(
        ",", ""
    ).replace(":", "")
    scores, path = run / "scores.json", run.with_name(run.name + ".yaml")
    recipe = {
        "run_dir": str(run),
        "seed": seed,
        "model": {"name": str(options.data / "base")},
        "method": {"name": "osft", **ROWS[row]},
        "data": {"bad_records": "skip", "cache_dir": str(options.out / "cache")},
        "stream_defaults": {
            "train_limit": options.search if searching else options.train,
            "test_limit": options.test,
            "dev_limit": 100,
            "epochs": options.epochs,
        },
        "stream": [{"name": t, "path": str(options.data / "cl_benchmark" / t)} for t in STREAMS[options.stream]],
        "train": {"lr": lr, "schedule": "linear", "global_batch": 8, "micro_batch": 8, "packing": True,
                  "max_length": 256, "precision": "fp32"},
        "evaluate": {"batch": 50, "tasks": "seen", "before": False, "split": split,
                     "heldout": str(options.data / "base" / "heldout.jsonl") if split == "test" else None},
        "deepspeed": "ds_configs/zero1.json",
        "checkpoint": {"every": 1000, "keep": 1},
        "observe": {"tensorboard": False, "live": "off"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    if not (scores.is_file() and json.loads(scores.read_text("utf-8"))["complete"]):
        print(f"# {path}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, "-m", "dscl", "train", str(path)]
        with open(run.with_name(run.name + ".log"), "w", encoding="utf-8") as log:
            status = subprocess.call(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}; see {log.name}")
    document: dict[str, Any] = json.loads(scores.read_text("utf-8"))
    return document


def table(rows: dict[str, tuple[float, list[dict[str, Any]]]]) -> str:
    """Means over the seeds, and the spread of OP; what a row is compared with stands in the first."""
    lines = [
        "| row | rate | OP | BWT | right after learning | held-out loss before → after |",
        "|---|---|---|---|---|---|",
    ]
    for row, (lr, found) in rows.items():
        op = [scores["summary"]["OP"] for scores in found]
        bwt = statistics.mean(scores["summary"]["BWT"] for scores in found)
        after = statistics.mean(statistics.mean(line[i] for i, line in enumerate(s["matrix"])) for s in found)
        loss = [statistics.mean(scores["heldout"][at] for scores in found) for at in (0, -1)]
        spread = f" ± {statistics.stdev(op):.3f}" if len(op) > 1 else ""
        cells = [row, f"{lr:g}", f"{statistics.mean(op):.3f}{spread}", f"{bwt:+.3f}", f"{after:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {loss[0]:.2f} → {loss[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
