"""The predictions of `dscl plan` for 7B, 13B and 70B at ZeRO 3 on 8, 64 and 512 GPUs; printed as Markdown.

    python tools/plan_sizes.py --tokenizer FOLDER [--methods sequential asr] [--sizes 7B] [--gpus 8 64]

One row of 4096 tokens per GPU and step, bf16, activation checkpointing. Nothing is measured: each line is the plan of a
recipe with random weights of that shape and random texts. Takes minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SIZES: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
LENGTH = 4096
GPU, BANDWIDTH = "H100", "50GB"
PARTS = {  # a rank's memory: column of the table, key of the plan
    "weights": "weights", "optimizer": "optimizer", "method's": "method_state", "gradients": "gradients",
    "activations": "activations", "peak": "peak",
}  # fmt: skip
HEAD = ["", "method", "GPUs", *PARTS, "sent a step", "step", "tokens/s a GPU"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder with a tokenizer of 32,000 pieces")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["sequential"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--deepspeed", default="ds_configs/zero3.json")
    options = parser.parse_args(arguments)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for size in options.sizes:
        for method in options.methods:
            for gpus in options.gpus:
                print(table_row(size, method, gpus, options), flush=True)


def table_row(size: str, method: str, gpus: int, options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder) / "task", samples=gpus)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_document(size, method, gpus, options)), "utf-8")
        arguments = ["--nodes", str(-(-gpus // 8)), "--gpus-per-node", str(min(8, gpus)), "--gpu", GPU, "--recipe-only"]
        arguments += ["--bandwidth", BANDWIDTH, "--json"]
        process = subprocess.run(
            [sys.executable, "-m", "dscl", "plan", str(recipe), *arguments], cwd=folder, capture_output=True, text=True
        )
    if process.returncode:
        raise SystemExit(process.stderr)
    plan = json.loads(process.stdout)
    stage, step = plan["stages"][plan["recipe"]], plan["step"]
    cells = [
        size,
        f"`{method}`",
        str(gpus),
        *(f"{stage[part] / 2**30:.1f}" for part in PARTS.values()),
        f"{step['bytes_sent'] / 1e9:.3g} GB",
        " to ".join(f"{seconds:.3g}" for seconds in step["seconds"]) + " s",
        " to ".join(f"{rate / gpus:,.0f}" for rate in step["tokens_per_second"]),
    ]
    return f"| {' | '.join(cells)} |"


def recipe_document(size: str, method: str, gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    shape = {"vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": LENGTH, **SIZES[size]}
    return {
        "run_dir": "never",
        "model": {"shape": shape, "tokenizer": options.tokenizer, "activation_checkpointing": True},
        "method": {"name": method},
        "stream": [{"name": "task", "path": "task"}],
        "data": {"cache_dir": "cache"},
        "folder": ".",
        "train": {"precision": "bf16", "global_batch": gpus, "micro_batch": 1, "max_length": LENGTH},
        "deepspeed": options.deepspeed,
    }


def write_task(folder: Path, samples: int) -> None:
    """Write a task in JSON lines, whose prompts fill a row."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in (("train", samples), ("test", 1)):
        rows = [
            {"prompt": " ".join(str(rng.randrange(1000)) for _ in range(LENGTH)), "completion": "a short answer"}
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


if __name__ == "__main__":
    main()
