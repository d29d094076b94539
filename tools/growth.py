"""How costs grow with ranks, model, tasks and the router's width: formulas beside what is counted or timed.

    python tools/growth.py [--ranks 2 8 64] [--widths 1024 2048 4096] [--hidden 512] [--layers 8]

Bytes of a rank are counted by `dscl plan` (a step of the real engine, rehearsed on tensors without contents), at ZeRO 3
in bf16; operations by dscl/model/flops.py, which torch's own counter confirms; what a task leaves in memory, by
looking. The router is timed, and its times are set against the formula's by the first width. P: parameters; T: those
that train; W: ranks; L layers of width H, I within, V words; n tokens that see c others each; E: the router's width;
r: rank.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.maths.rls import FeatureMap, compute_statistics, fit_router
from dscl.model.flops import count_flops

VOCABULARY, LENGTH, MICRO_BATCHES = 512, 64, 2
Row = tuple[str, str, str, float, float]  # what, formula, at, found, foretold


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 64])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 2048, 4096], help="of the router, rising")
    parser.add_argument("--prompts", type=int, default=4096, help="that the router learns from")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args(given)
    print("| | grows as | at | found | formula | found / formula |\n|---|---|---|---|---|---|", flush=True)
    for section in (ranks, model, tasks, router):
        for what, formula, at, found, foretold in section(options):
            print(f"| {what} | {formula} | {at} | {found:.4g} | {foretold:.4g} | {found / foretold:.3f} |", flush=True)


def ranks(options: argparse.Namespace) -> Iterator[Row]:
    for world in options.ranks:
        at = f"{world} ranks"
        found, P, _ = planned(options, world, "sequential")
        yield "weights, bytes", "2 P / W", at, found["weights"], 2 * P / world
        yield "masters and moments, bytes", "12 P / W", at, found["optimizer"], 12 * P / world
        yield "gradients that a rank gives away in a micro-batch", "2 P", at, scattered(found), 2 * P
        yield "a checkpoint, bytes", "12 P", at, found["checkpoint"], 12 * P
        found, _, T = planned(options, world, "osft")
        exchanged = found["bytes_sent"]["all_to_all"]
        yield "OSFT: to the owners of matrices and back, a step", "16 T / W", at, exchanged, 16 * T / world
        found, _, T = planned(options, world, "asr")
        yield "ASR: gradients that a rank gives away in a micro-batch", "2 T", at, scattered(found), 2 * T


def scattered(found: dict[str, Any]) -> float:
    return float(found["bytes_sent"]["reduce_scatter"]) / MICRO_BATCHES


def planned(options: argparse.Namespace, world: int, name: str, **method: Any) -> tuple[dict[str, Any], int, int]:
    """A rank's bytes, the parameters, and those of them that train."""
    with tempfile.TemporaryDirectory() as folder:
        samples = world * MICRO_BATCHES
        write_task(Path(folder) / "task", samples)
        recipe = {
            "run_dir": "never",
            "model": {"shape": shape(options.hidden, options.layers)},
            "method": {"name": name, **method},
            "stream": [{"name": "task", "path": "task", "dev_share": 0}],
            "data": {"cache_dir": "cache"},
            "train": {"precision": "bf16", "global_batch": samples, "micro_batch": 1, "max_length": LENGTH},
            "deepspeed": "ds_configs/zero3.json",
        }
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
        words = ["recipe.yaml", "--recipe-only", "--json", "--gpus-per-node", str(world)]
        done = subprocess.run(
            [sys.executable, "-m", "dscl", "plan", *words], cwd=folder, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["stages"][told["recipe"]], told["parameters"], told["trainable"]


def shape(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": 3 * hidden, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip


def write_task(folder: Path, samples: int) -> None:
    """Prompts that fill a row."""
    draw = random.Random(0)
    folder.mkdir()
    for split, count in (("train", samples), ("test", 1)):
        texts = [" ".join(str(draw.randrange(1000)) for _ in range(LENGTH)) for _ in range(count)]
        rows = [{"prompt": text, "completion": "yes"} for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


def model(options: argparse.Namespace) -> Iterator[Row]:
    for hidden, layers in ((options.hidden, options.layers), (2 * options.hidden, 2 * options.layers)):
        with torch.device("meta"):
            built = LlamaForCausalLM(LlamaConfig(**shape(hidden, layers)))
        inside, tokens, seen = 3 * hidden, 4096, 2048
        matrices = layers * (4 * hidden**2 + 3 * hidden * inside)
        at = f"{layers} layers of width {hidden}, {tokens} tokens"
        count = sum(p.numel() for p in built.parameters())
        yield "parameters", "2 V H + L (4 H² + 3 H I)", at, count, 2 * VOCABULARY * hidden + matrices
        cost = count_flops(built)
        assert cost is not None
        found = cost.total_flops(tokens, tokens * seen, tokens)
        formula = 6 * tokens * (matrices + VOCABULARY * hidden) + 12 * layers * hidden * tokens * seen
        yield "operations of a step", "6 n (P - V H) + 12 L H n c", at, found, formula


def tasks(options: argparse.Namespace) -> Iterator[Row]:
    width, layers, hidden = options.widths[0], options.layers, options.hidden
    for rank in (8, 64):
        _, _, trained = planned(options, options.ranks[0], "asr", router={"layer": 1}, tune={"rank": rank})
        formula = rank * (layers - 1) * (8 * hidden + 3 * (hidden + 3 * hidden))
        what = "ASR: parameters of a task's adapters, above the first layer"
        yield what, "r (L - 1) (8 H + 3 (H + I))", f"r = {rank}", trained, formula
    drawn = torch.Generator().manual_seed(0)
    expansion = FeatureMap(64, width, seed=0)
    for count in (1, 4, 16):
        sums = [compute_statistics(rows_of(expansion, 8, drawn), expansion).compact() for _ in range(count)]
        held = sum(tensor.nbytes for one in sums for tensor in one.tensors())
        yield (
            "ASR: sums for the router, bytes",
            "tasks x 2 E²",
            f"{count} tasks, E = {width}",
            held,
            2 * count * width**2,
        )


def rows_of(expansion: FeatureMap, count: int, drawn: torch.Generator) -> torch.Tensor:
    return expansion.quantize(torch.randn(count, expansion.dim, generator=drawn))


def router(options: argparse.Namespace) -> Iterator[Row]:
    drawn = torch.Generator().manual_seed(0)
    works: tuple[tuple[str, str, int], ...] = (("sums of prompts", "n E²", 2), ("solution", "E³", 3))
    first: list[float] = []
    for width in options.widths:
        took = routed(width, options.prompts, drawn)
        first = first or took
        for (what, formula, power), seconds, start in zip(works, took, first, strict=True):
            at = f"E = {width}, {options.prompts} prompts"
            yield f"router: {what}, seconds", formula, at, seconds, start * (width / options.widths[0]) ** power


def routed(width: int, prompts: int, drawn: torch.Generator) -> list[float]:
    """Seconds for the sums of so many prompts, of two tasks, and for the solution."""
    expansion = FeatureMap(64, width, seed=0)
    some = [rows_of(expansion, prompts // 2, drawn) for _ in range(2)]
    expansion.compute_features(some[0][:1])  # draws what it expands by, once
    parts = {str(i): compute_statistics(rows, expansion).compact() for i, rows in enumerate(some)}
    return [
        fastest(lambda: [compute_statistics(rows, expansion) for rows in some]),
        fastest(lambda: fit_router(parts, ridge=0.1)),
    ]


def fastest(work: Callable[[], Any]) -> float:
    found = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
