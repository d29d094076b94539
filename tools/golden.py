"""Compare the results of a commit and of the working tree bit for bit: losses, scores and final weights.

    python tools/golden.py HEAD~1              every method at ZeRO 0 (fp32) and ZeRO 3 (bf16), on two ranks
    python tools/golden.py HEAD~1 --only osft  the cases with this word in their name

Both trees run on this machine with the same packages, each with its own copy of this script, whose recipes use the keys
of that tree. Weights are compared by the contents of all saved tensors, so tensors and files may have other names. Exit
status 0: all results are equal; 1: some differ.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "joint": {},
    "replay": {"replay": {"size": 9}, "tune": {"name": "lora", "rank": 4, "dropout": 0.1}},
    "agem": {"constraint": {"memory_ratio": 0.2}},
    "ewc": {"constraint": {"ewc_lambda": 300.0, "fisher_samples": 16}},
    "lwf": {"loss": {"top_tokens": 50}},
    "olora": {"tune": {"rank": 4}},
    "lora_per_task": {"tune": {"rank": 4}},
    "asr": {"tune": {"rank": 4}, "router": {"num_features": 128}},
    "osft": {
        "constraint": {
            "protect_base": ["activations"],
            "protect_task": ["updates", "sensitivity"],
            "protected_ratio": 0.3,
            "on_full": "fair_share",
        }
    },
    "moses": {"tune": {"num_experts": 4, "top_k": 2, "rank": 2}, "router": {"num_features": 128}},
}
STAGES = {0: "fp32", 3: "bf16"}
TASKS = {"colour": ["warm", "cold"], "animal": ["yes", "no", "maybe"], "weather": ["wet", "dry"]}
WORDS = ("red", "blue", "green", "cat", "dog", "bird", "runs", "sleeps", "sings", "fast", "slow", "today", "here")
# Entries of scores.json that had another name in earlier commits.
RENAMED_SCORES = {"before": "zero_shot", "routed": "routing_accuracy", "rejected": "rejected_share"}
COMPARED_METRICS = ("step", "task", "loss", "grad_norm", "lr", "tokens", "targets")  # of each line of metrics.jsonl


def all_cases() -> list[tuple[str, str, int]]:
    return [(f"{method} zero{stage}", method, stage) for method in METHODS for stage in STAGES]


def write_tasks(folder: Path) -> None:
    """Write three small tasks of random sentences, whose sizes are no multiples of the batch."""
    for number, (task, labels) in enumerate(TASKS.items()):
        generator = random.Random(number)
        (folder / task).mkdir(parents=True)
        (folder / task / "labels.json").write_text(json.dumps(labels))
        for split, size in (("train", 29 + number), ("test", 11)):
            records = [
                {"label": generator.choice(labels), "sentence": " ".join(generator.choices(WORDS, k=3 + index % 7))}
                for index in range(size)
            ]
            (folder / task / f"{split}.json").write_text(json.dumps(records))


def recipe_document(folder: Path, method: str, stage: int) -> dict[str, Any]:
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 300,
    }  # fmt: skip
    return {
        "run_dir": str(folder / f"{method}-{stage}"),
        "model": {"shape": shape},
        "method": {"name": method, **METHODS[method]},
        "stream": [{"name": task, "path": str(folder / "tasks" / task)} for task in TASKS],
        "data": {"cache_dir": str(folder / "cache")},
        "train": {
            "lr": 3e-3, "weight_decay": 0.1, "global_batch": 8, "micro_batch": 2, "max_length": 48,
            "precision": STAGES[stage],
        },
        "deepspeed": f"ds_configs/zero{stage}.json",
        "checkpoint": {"every": 3},
        "observe": {"tensorboard": False, "live": "off"},
    }  # fmt: skip


# ---- the runs of one tree


def run_cases(out: Path, only: str) -> None:
    """Run the cases as one of the ranks. The main rank writes a line of results for each case."""
    from dscl.utils.quiet import silence_libraries

    silence_libraries()
    from dscl.distributed import comm
    from dscl.recipe.recipe import resolve_recipe
    from dscl.training.run import train

    with comm.process_group():
        for name, method, stage in all_cases():
            if only not in name:
                continue
            document = recipe_document(out, method, stage)
            with open(os.devnull, "w") as nowhere:
                sys.stdout = nowhere
                train(resolve_recipe(document))
                sys.stdout = sys.__stdout__
            if comm.is_main():
                with (out / "results.jsonl").open("a") as file:
                    file.write(json.dumps({"case": name, **read_results(Path(document["run_dir"]))}) + "\n")
                print(f"  {name}", flush=True)
            comm.barrier()


def read_results(run_dir: Path) -> dict[str, Any]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "steps": [{name: line.get(name) for name in COMPARED_METRICS} for line in map(json.loads, lines)],
        "scores": json.loads((run_dir / "scores.json").read_text()),
        "tensors": tensor_checksums(run_dir),
    }


def tensor_checksums(run_dir: Path) -> list[str]:
    """Dtype, shape and checksum of all tensors in the last checkpoint and in the files of the tasks."""
    from safetensors import safe_open

    newest = max((run_dir / "checkpoints").iterdir())
    checksums = []
    for path in run_dir.rglob("*.safetensors"):
        if run_dir / "checkpoints" in path.parents and newest not in path.parents:
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, as safe_open is no dictionary
                tensor = file.get_tensor(name)
                content = hashlib.sha256(tensor.contiguous().flatten().view(dtype=_uint8()).numpy().tobytes())
                checksums.append(f"{tensor.dtype} {list(tensor.shape)} {content.hexdigest()[:16]}")
    return sorted(checksums)


def _uint8() -> Any:
    import torch

    return torch.uint8


def run_tree(tree: Path, out: Path, only: str) -> dict[str, dict[str, Any]]:
    """Start that tree's copy of this script on all ranks. Returns the results by case."""
    write_tasks(out / "tasks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": str(tree), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    words = [sys.executable, str(tree / "tools" / "golden.py"), "--record", str(out), "--only", only]
    ranks = [
        subprocess.Popen(words, cwd=tree, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(RANKS)
    ]
    try:
        if sum(abs(rank.wait()) for rank in ranks):
            sys.exit(f"golden.py: a run failed in {tree}")
    finally:
        for rank in ranks:
            rank.kill()
    return {line["case"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


# ---- comparison


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A few words on the first difference; empty if the results are equal."""
    for step, other in zip(before["steps"], after["steps"], strict=False):
        for name in COMPARED_METRICS:
            if step[name] != other[name]:
                return f"{name} of step {step['step']}: {step[name]} before, {other[name]} now"
    if len(before["steps"]) != len(after["steps"]):
        return f"{len(before['steps'])} steps before, {len(after['steps'])} now"
    old_scores = {RENAMED_SCORES.get(name, name): value for name, value in before["scores"].items()}
    if old_scores != after["scores"]:
        names = [name for name in old_scores if old_scores[name] != after["scores"].get(name)]
        return f"scores.json: {', '.join(names) or 'new entries'}"
    old_tensors, new_tensors = collections.Counter(before["tensors"]), collections.Counter(after["tensors"])
    if old_tensors != new_tensors:
        missing, new = (old_tensors - new_tensors).total(), (new_tensors - old_tensors).total()
        return f"saved tensors: {missing} of {old_tensors.total()} are missing, {new} are new"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="the commit to compare with the working tree")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases with this text in their name, such as osft or zero3"
    )
    parser.add_argument("--record", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # the command of a rank
    options = parser.parse_args()
    if options.record:
        run_cases(options.record, options.only)
        return 0
    if not options.commit:
        parser.error("no commit given; name one, such as HEAD~1")
    if not any(options.only in name for name, *_ in all_cases()):
        parser.error(f"--only {options.only}: no case has this text in its name; cases are named METHOD zeroSTAGE")
    with tempfile.TemporaryDirectory(prefix="dscl-golden-") as scratch:
        old_tree = Path(scratch, "tree")
        old_tree.mkdir()
        archive = subprocess.run(["git", "archive", options.commit], cwd=ROOT, stdout=subprocess.PIPE, check=False)
        if archive.returncode:
            return 2
        subprocess.run(["tar", "-x"], cwd=old_tree, input=archive.stdout, check=True)
        if not (old_tree / "tools" / "golden.py").exists():
            parser.error(f"{options.commit} has no tools/golden.py")
        print(f"{options.commit}:", flush=True)
        before = run_tree(old_tree, Path(scratch, "before"), options.only)
        print("the working tree:", flush=True)
        after = run_tree(ROOT, Path(scratch, "now"), options.only)
    differing = 0
    for name, result in before.items():
        reason = difference(result, after[name]) if name in after else "is missing"
        differing += bool(reason)
        print(f"{name:24} {reason or 'equal'}")
    print(f"{len(before) - differing} of {len(before)} cases are equal")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
