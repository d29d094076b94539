"""The growth of costs with ranks, model, tasks and router features: formulas beside counts and timings.

    python tools/growth.py [--ranks 2 8 64] [--widths 1024 2048 4096] [--hidden 512] [--layers 8]

`dscl plan` counts the bytes of a rank at ZeRO 3 in bf16, in a dry run of the real engine on tensors without contents.
dscl/model/flops.py counts operations, which the tests compare with torch's counter. The bytes that a task leaves are
those of its tensors. The router is timed; its formulas are scaled to the time at the first width. P: parameters; T:
trainable parameters; W: ranks; L layers of hidden size H and intermediate size I; V words; n tokens that attend to c
others each; E: the router's features; r: rank of a LoRA.
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
Row = tuple[str, str, str, float, float]  # name, formula, size, measured, predicted


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 64])
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[1024, 2048, 4096], help="features of the router, in rising order"
    )
    parser.add_argument("--prompts", type=int, default=4096, help="prompts for the router")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args(arguments)
    print(
        "| | formula | measured at | measured | predicted | measured / predicted |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for section in (ranks, model, tasks, router):
        for name, formula, at, measured, predicted in section(options):
            print(
                f"| {name} | {formula} | {at} | {measured:.4g} | {predicted:.4g} | {measured / predicted:.3f} |",
                flush=True,
            )


def ranks(options: argparse.Namespace) -> Iterator[Row]:
    for world in options.ranks:
        at = f"{world} ranks"
        memory, P, _ = run_plan(options, world, "sequential")
        yield "weights, bytes", "2 P / W", at, memory["weights"], 2 * P / world
        yield "masters and moments, bytes", "12 P / W", at, memory["optimizer"], 12 * P / world
        yield "gradients that a rank sends in a micro-batch", "2 P", at, gradient_bytes(memory), 2 * P
        yield "a checkpoint, bytes", "12 P", at, memory["checkpoint"], 12 * P
        memory, _, T = run_plan(options, world, "osft")
        exchanged = memory["bytes_sent"]["all_to_all"]
        yield "OSFT: to the owners of matrices and back in a step", "16 T / W", at, exchanged, 16 * T / world
        memory, _, T = run_plan(options, world, "asr")
        yield "ASR: gradients that a rank sends in a micro-batch", "2 T", at, gradient_bytes(memory), 2 * T


def gradient_bytes(memory: dict[str, Any]) -> float:
    return float(memory["bytes_sent"]["reduce_scatter"]) / MICRO_BATCHES


def run_plan(options: argparse.Namespace, num_ranks: int, name: str, **method: Any) -> tuple[dict[str, Any], int, int]:
    """A rank's bytes by kind, the number of parameters, and the number of trainable parameters."""
    with tempfile.TemporaryDirectory() as folder:
        samples = num_ranks * MICRO_BATCHES
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
        arguments = ["recipe.yaml", "--recipe-only", "--json", "--gpus-per-node", str(num_ranks)]
        process = subprocess.run(
            [sys.executable, "-m", "dscl", "plan", *arguments], cwd=folder, capture_output=True, text=True
        )
    if process.returncode:
        raise SystemExit(process.stderr)
    plan = json.loads(process.stdout.splitlines()[-1])
    return plan["stages"][plan["recipe"]], plan["parameters"], plan["trainable"]


def shape(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": 3 * hidden, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip


def write_task(folder: Path, samples: int) -> None:
    """Write a task whose prompts fill a row."""
    rng = random.Random(0)
    folder.mkdir()
    for split, count in (("train", samples), ("test", 1)):
        texts = [" ".join(str(rng.randrange(1000)) for _ in range(LENGTH)) for _ in range(count)]
        rows = [{"prompt": text, "completion": "yes"} for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


def model(options: argparse.Namespace) -> Iterator[Row]:
    for hidden, layers in ((options.hidden, options.layers), (2 * options.hidden, 2 * options.layers)):
        with torch.device("meta"):
            meta_model = LlamaForCausalLM(LlamaConfig(**shape(hidden, layers)))
        intermediate, tokens, attended = 3 * hidden, 4096, 2048
        matrices = layers * (4 * hidden**2 + 3 * hidden * intermediate)
        at = f"{layers} layers of width {hidden}, {tokens} tokens"
        count = sum(p.numel() for p in meta_model.parameters())
        yield "parameters", "2 V H + L (4 H² + 3 H I)", at, count, 2 * VOCABULARY * hidden + matrices
        flops = count_flops(meta_model)
        assert flops is not None
        measured = flops.total_flops(tokens, tokens * attended, tokens)
        formula = 6 * tokens * (matrices + VOCABULARY * hidden) + 12 * layers * hidden * tokens * attended
        yield "operations of a step", "6 n (P - V H) + 12 L H n c", at, measured, formula


def tasks(options: argparse.Namespace) -> Iterator[Row]:
    width, layers, hidden = options.widths[0], options.layers, options.hidden
    for rank in (8, 64):
        _, _, trainable = run_plan(options, options.ranks[0], "asr", router={"layer": 1}, tune={"rank": rank})
        formula = rank * (layers - 1) * (8 * hidden + 3 * (hidden + 3 * hidden))
        name = "ASR: parameters of a task's adapters, above the first layer"
        yield name, "r (L - 1) (8 H + 3 (H + I))", f"r = {rank}", trainable, formula
    generator = torch.Generator().manual_seed(0)
    expansion = FeatureMap(64, width, seed=0)
    for count in (1, 4, 16):
        sums = [compute_statistics(random_features(expansion, 8, generator), expansion).compact() for _ in range(count)]
        total_bytes = sum(tensor.nbytes for one in sums for tensor in one.tensors())
        yield (
            "ASR: sums for the router, bytes",
            "tasks x 2 E²",
            f"{count} tasks, E = {width}",
            total_bytes,
            2 * count * width**2,
        )


def random_features(expansion: FeatureMap, count: int, generator: torch.Generator) -> torch.Tensor:
    return expansion.quantize(torch.randn(count, expansion.dim, generator=generator))


def router(options: argparse.Namespace) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    parts: tuple[tuple[str, str, int], ...] = (("sums of prompts", "n E²", 2), ("solution", "E³", 3))
    first: list[float] = []
    for width in options.widths:
        seconds_of = time_router(width, options.prompts, generator)
        first = first or seconds_of
        for (name, formula, power), seconds, start in zip(parts, seconds_of, first, strict=True):
            at = f"E = {width}, {options.prompts} prompts"
            yield f"router: {name}, seconds", formula, at, seconds, start * (width / options.widths[0]) ** power


def time_router(width: int, prompts: int, generator: torch.Generator) -> list[float]:
    """Seconds of the sums over the prompts of two tasks, and seconds of the solution."""
    expansion = FeatureMap(64, width, seed=0)
    features = [random_features(expansion, prompts // 2, generator) for _ in range(2)]
    expansion.compute_features(features[0][:1])  # initializes the random projection, once
    statistics = {str(i): compute_statistics(rows, expansion).compact() for i, rows in enumerate(features)}
    return [
        fastest_seconds(lambda: [compute_statistics(rows, expansion) for rows in features]),
        fastest_seconds(lambda: fit_router(statistics, ridge=0.1)),
    ]


def fastest_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
