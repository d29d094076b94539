"""ASR against sequential fine-tuning on real text: one table, equal samples, epochs, batches and evaluation.

    python tools/compare_on_text.py --data ../shared/data --out out/text

The base model and the tasks are those of the data folder (base/, cl_benchmark/). Runs: `asr` in two task orders, with
features of the default layer and of a later one, and `sequential` with all weights and with one LoRA. A run that is
complete is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ORDER = ("dbpedia", "amazon", "agnews", "sst2", "qqp", "boolq")
LORA = {"rank": 8, "alpha": 16.0}
RUNS: dict[str, tuple[dict[str, Any], float, int]] = {  # method, learning rate, direction of the order
    "asr": ({"name": "asr", "lora": LORA}, 4e-3, 1),
    "asr, reversed order": ({"name": "asr", "lora": LORA}, 4e-3, -1),
    "asr, layer 5": ({"name": "asr", "lora": LORA, "feature_layer": 5}, 4e-3, 1),
    "asr, layer 5, reversed order": ({"name": "asr", "lora": LORA, "feature_layer": 5}, 4e-3, -1),
    "sequential, one LoRA": ({"name": "sequential", "tune": "lora", "lora": LORA}, 4e-3, 1),
    "sequential, all weights": ({"name": "sequential", "tune": "full"}, 3e-4, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with base/ and cl_benchmark/")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--train", type=int, default=800, help="training samples a task (default 800)")
    parser.add_argument("--test", type=int, default=300, help="test samples a task (default 300)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", default="2")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS), help="some of the runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.only:
        run = options.out / name.replace(",", "").replace(" ", "-")
        seconds = perform(name, run, options)
        rows.append((name, json.loads((run / "scores.json").read_text("utf-8")), seconds))
    print(table(rows))
    print()
    print(routing(rows))


def perform(name: str, run: Path, options: argparse.Namespace) -> float:
    """Train, unless it is done; returns the seconds of it."""
    method, lr, direction = RUNS[name]
    recipe = {
        "run_dir": str(run),
        "seed": options.seed,
        "model": {"name": str(options.data / "base")},
        "method": method,
        "stream_defaults": {"train_limit": options.train, "test_limit": options.test, "epochs": options.epochs},
        "stream": [{"name": t, "path": str(options.data / "cl_benchmark" / t)} for t in ORDER[::direction]],
        "train": {"lr": lr, "schedule": "linear", "global_batch": 16, "micro_batch": 8, "max_length": 256,
                  "precision": "fp32"},
        "evaluate": {"batch": 50, "tasks": "seen", "before": False},
        "deepspeed": "ds_configs/zero1.json",
        "checkpoint": {"every": 1000},
        "observe": {"tensorboard": False},
    }  # fmt: skip
    path, clock = run.with_suffix(".yaml"), run.with_suffix(".seconds")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    print(f"# {name}: {path}", flush=True)
    start = time.monotonic()
    status = subprocess.call([sys.executable, "-m", "dscl", "train", str(path), "--nproc", options.nproc])
    if status:
        sys.exit(status)
    if not clock.is_file():
        clock.write_text(str(time.monotonic() - start))
    return float(clock.read_text())


def table(rows: list[tuple[str, dict[str, Any], float]]) -> str:
    """Final accuracy of each task, OP, BWT."""
    lines = [f"| method | {' | '.join(ORDER)} | OP | BWT | minutes |", "|---" * (len(ORDER) + 4) + "|"]
    for name, scores, seconds in rows:
        last = dict(zip(scores["tasks"], scores["matrix"][-1], strict=True))
        op, bwt = scores["summary"]["OP"], scores["summary"]["BWT"]
        cells = [*(f"{last[task]:.3f}" for task in ORDER), f"{op:.3f}", f"{bwt:+.3f}", f"{seconds / 60:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def routing(rows: list[tuple[str, dict[str, Any], float]]) -> str:
    """Where each task's test prompts went after the last task: to another task, and to none (rejected)."""
    lines = [f"| shares sent to another task, to none | {' | '.join(ORDER)} |", "|---" * (len(ORDER) + 1) + "|"]
    for name, scores, _ in rows:
        if "routed" in scores:
            shares = zip(scores["routed"][-1], scores["rejected"][-1], strict=True)
            last = dict(zip(scores["tasks"], shares, strict=True))
            cells = [f"{1 - right - none:.3f}, {none:.3f}" for right, none in (last[task] for task in ORDER)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
