"""`dscl plan`: its arguments, and the call of `dscl.planning.plan`."""

from __future__ import annotations

import argparse
import json
import logging
import os
from importlib import import_module

from dscl.cli.lazy_imports import disable_gc_for_imports
from dscl.cli.verb import ArgumentParser, Verb, add_recipe_arguments, read_recipe_argument
from dscl.utils.errors import UserError

EXAMPLE = """example:
  dscl plan recipe.yaml --nodes 8 --gpus-per-node 8 --gpu H100 --gpu-memory 80GiB --bandwidth 50GB

Prints for every ZeRO stage the memory of a rank (weights, optimizer state, the method's state, gradients, activations,
the peak), the bytes that it sends, the time of a step, and which stage and micro-batch fit. Neither the cluster nor a
GPU is needed: a step of the real engine runs on fake tensors. --bandwidth is how much one device sends to others in a
second."""


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="ranks on each (default: 1)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of one device, like 80GiB, to show what fits")
    parser.add_argument("--bandwidth", metavar="SIZE", help="what one device sends in a second, like 50GB")
    parser.add_argument("--gpu", metavar="NAME", help="the GPU model, like H100, for its peak FLOPS in bf16")
    parser.add_argument(
        "--tflops", type=float, metavar="N", help="peak TFLOPS of one device, if --gpu does not know it"
    )
    parser.add_argument(
        "--recipe-only", action="store_true", help="plan the recipe's own DeepSpeed JSON only, not every ZeRO stage"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, with all sizes in bytes")
    parser.add_argument(
        "--efficiency", type=float, default=0.4, metavar="SHARE", help="share of the peak that a step reaches (0.4)"
    )


def run(options: argparse.Namespace) -> None:
    from dscl.utils.hardware import parse_gpu_peak, parse_size

    for name in ("nodes", "gpus_per_node", "tflops", "efficiency"):
        value = getattr(options, name)
        if value is not None and (value <= 0 or (name == "efficiency" and value > 1)):
            allowed = "a share above 0, up to 1" if name == "efficiency" else "more than 0"
            raise UserError(f"--{name.replace('_', '-')}: given {value:g}; {allowed} is needed")
    if options.gpu is not None and options.tflops is not None:
        raise UserError("--tflops: given beside --gpu, which says what the device can do; leave one of them out")
    memory = options.gpu_memory and parse_size("--gpu-memory", options.gpu_memory)
    bandwidth = options.bandwidth and parse_size("--bandwidth", options.bandwidth)
    peak = parse_gpu_peak(options.gpu) if options.gpu else options.tflops and 1e12 * options.tflops
    recipe = read_recipe_argument(options)
    os.environ["DS_ACCELERATOR"] = "cpu"  # planning uses no GPU
    with disable_gc_for_imports():
        planning = import_module("dscl.planning.plan")
    cluster = planning.Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        device_memory=memory,
        bandwidth=bandwidth,
        peak_flops=peak,
        efficiency=options.efficiency,
    )
    plan = planning.make_plan(recipe, cluster, logging.getLogger("dscl").info, options.recipe_only)
    print(json.dumps(plan.document()) if options.json else "\n".join(plan.lines()), flush=True)


PLAN = Verb(
    "estimate memory, communication and time of a recipe on a cluster",
    EXAMPLE,
    add_arguments,
    run,
    accepts_overrides=True,
)
