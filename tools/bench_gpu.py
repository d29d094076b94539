"""Each method's training step on one large GPU, at shapes of 7B and 8B, in bf16; printed as Markdown.

    python tools/bench_gpu.py [--shape 7B 8B] [--method full osft lora asr moses] [--attention sdpa] [--rounds N]
                              [--samples N] [--limit SECONDS] [--no-offload]

A step has four micro-batches, each of one sample of 4096 tokens of which each is a target, by ds_configs/zero2.json.
Every row of the table is a process of its own, which says what it has found at once; one that fails or takes too long
is told, and the rest goes on. Activations are recomputed only where there is not enough memory else. Full fine-tuning
and OSFT are timed with the optimizer's state on the host too, for which the host needs about 18 bytes for each
parameter, 113 GiB and 135. Weights are drawn on the GPU: their values do not matter here, and what OSFT protects is
drawn too, instead of decomposed.

Beside each step stands its floor: what its operations (recomputation too, and projections in TF32 and fp32) would take
at the most that the device's maker states. MFU counts neither of these two.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dscl.utils.quiet import silence_libraries

silence_libraries()  # before the libraries are imported

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.utils import is_flash_attn_2_available  # noqa: E402

from dscl.config.parsing import parse_config  # noqa: E402
from dscl.data.batches import collate  # noqa: E402
from dscl.distributed import comm  # noqa: E402
from dscl.distributed.launcher import subprocess_environment  # noqa: E402
from dscl.engine.engine import Engine  # noqa: E402
from dscl.maths.subspace import projection_flops  # noqa: E402
from dscl.methods.base import Method, RunInfo  # noqa: E402
from dscl.methods.osft import Osft  # noqa: E402
from dscl.methods.registry import find_method  # noqa: E402
from dscl.model.backbone import Backbone, ModelConfig  # noqa: E402
from dscl.model.flops import count_flops  # noqa: E402
from dscl.model.weights import RandomWeights  # noqa: E402
from dscl.utils.hardware import peak_flops  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "7B": {  # Llama 2
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "8B": {  # Llama 3
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full fine-tuning", {"name": "sequential"}),
    "osft": ("OSFT", {"name": "osft", "constraint": {"protect_base": ["weights"]}}),
    "lora": ("LoRA", {"name": "sequential", "tune": "lora"}),
    "asr": ("ASR", {"name": "asr"}),
    "moses": ("MoSEs", {"name": "moses"}),
}
OFFLOADED = ("full", "osft")  # for what the others train, the optimizer's state is small
ATTENTION = ("sdpa", "flash_attention_2")
WARM = 2  # steps before those that are timed
TF32, FP32 = 2, 15  # times as slow as bf16, by the data sheets of A100, H100 and H200
ZERO = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    attention: str = "sdpa"
    offload: bool = False
    recompute: bool = False
    length: int = 4096
    rounds: int = 5
    samples: int = 4

    @property
    def title(self) -> str:
        return f"{self.shape}, {METHODS[self.method][0]}{', optimizer offloaded' * self.offload}, {self.attention}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--attention", choices=ATTENTION, nargs="+", help="default: all that this machine has")
    parser.add_argument("--rounds", type=int, default=5, help="how many steps are timed")
    parser.add_argument("--samples", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each row of the table")
    parser.add_argument("--no-offload", dest="offload", action="store_false", help="leave out what the host holds")
    parser.add_argument("--json", action="store_true", help="an object for each row, for tools/bench.py")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = Case(**json.loads(options.child))
        with comm.process_group():
            print(json.dumps(attempt(case, config_of(case))), flush=True)
        return
    if not options.json:
        print("| | MFU | target | |\n|---|---|---|---|", flush=True)
    for row in rows(options):
        print(json.dumps(row) if options.json else f"| {' | '.join(row.values())} |", flush=True)


def rows(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    if comm.device().type != "cuda":
        yield row_of("gpu: no GPU here, nothing was measured")
        return
    attention = options.attention or ATTENTION[: 1 + is_flash_attn_2_available()]
    if options.attention is None and len(attention) == 1:
        yield row_of("gpu: the package flash-attn is not here, so attention is torch's own (sdpa)")
    for shape, method, kind in product(options.shape, options.method, attention):
        case = Case(shape, method, kind, rounds=options.rounds, samples=options.samples)
        whole = tried(case, options.limit)
        yield row(case, whole)
        if method in OFFLOADED and options.offload:
            other = replace(case, offload=True)
            yield row(other, tried(other, options.limit), beside=whole)


def tried(case: Case, limit: float) -> dict[str, Any]:
    """With what a child process finds; activations are recomputed where a step finds too little memory."""
    found = child(case, limit)
    return child(replace(case, recompute=True), limit) if found.get("full") == "in a step" else found


def child(case: Case, limit: float) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=subprocess_environment(), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s (--limit)"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "recompute": case.recompute}
    said = done.stderr.strip().splitlines()[-1:]
    how = f"status {done.returncode}" if done.returncode > 0 else f"killed by signal {-done.returncode}"
    hint = " (9 is mostly the host's memory)" if done.returncode == -9 else ""
    return {"failed": ": ".join([f"failed: {how}{hint}", *said])[:300]}


def row(case: Case, found: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> dict[str, str]:
    if "seconds" not in found:
        return row_of(case.title, told=found.get("failed") or f"not enough memory of the device {found['full']}")
    told = [f"{found['tokens']:,.0f} tokens/s", f"step {found['seconds']:.3g} s", f"{found['peak_gib']:.1f} GiB"]
    if found["floor"]:
        told.insert(2, f"floor {found['floor']:.3g} s")
    told.append("activations recomputed" if found["recompute"] else "no activations recomputed")
    if beside is not None:
        told.append(f"{found['host_gib']:.0f} GiB of the host")
        told.append(
            f"{found['seconds'] / beside['seconds']:.1f} times the step that is not offloaded"
            if "seconds" in beside
            else "not offloaded there is none to compare"
        )
    figure = f"MFU {found['mfu']:.1%}" if found["mfu"] else f"{found['tflops']:.3g} TFLOP/s"
    return row_of(case.title, figure, "≥ 50 %" if case.method == "full" and not case.offload else "", ", ".join(told))


def row_of(what: str, figure: str = "", target: str = "", told: str = "") -> dict[str, str]:
    return {"what": what, "figure": figure, "target": target, "told": told}


# ---- in a process of its own, on its GPU


def config_of(case: Case) -> LlamaConfig:
    return LlamaConfig(**SHAPES[case.shape], max_position_embeddings=case.length, tie_word_embeddings=False)


def attempt(case: Case, config: LlamaConfig) -> dict[str, Any]:
    """What a step takes, or when the device's memory was full."""
    try:
        with redirect_stdout(io.StringIO()):
            engine, method = built(case, config)
    except torch.OutOfMemoryError:
        return {"full": "before the first step"}
    try:
        return large(case, config, engine, method)
    except torch.OutOfMemoryError:
        return {"full": "in a step"}
    finally:
        engine.close()


def built(case: Case, config: LlamaConfig) -> tuple[Engine, Method]:
    here = comm.device()
    model = ModelConfig(shape={}, attention=case.attention, activation_checkpointing=case.recompute)
    bare = Backbone(model, config, None, RandomWeights(0, 0.02), torch.bfloat16)
    given = METHODS[case.method][1]
    kind = find_method(given["name"])
    method = kind(parse_config(kind.Config, given, "method"), RunInfo(0, ("a",), "", "", "", case.length, "bf16"))
    settings: dict[str, Any] = json.loads(ZERO.read_text("utf-8"))
    if case.offload:  # not pinned: that is taken in powers of two, so up to twice as much of the host
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}

    def build() -> Any:
        with here:
            return bare.build()

    engine = Engine(
        settings, build=build, read=filling(here), prepare=method.prepare, constraint=method.constraint,
        gradient_hook=method.gradient_hook, precision="bf16",
    )  # fmt: skip
    if engine.constraint is None:
        nobody: Any = None  # none of these asks other ranks for anything
        engine.reset_optimizer(method.begin_task(0, "a", nobody))
    else:
        method.estimate_memory()  # as much is protected as after a decomposition, which takes minutes
        draw_directions(method)
    return engine, method


def draw_directions(method: Method) -> None:
    """Products with zeros are quicker than others, so what is protected is drawn; one basis serves all of its size."""
    assert isinstance(method, Osft)
    drawn: dict[torch.Size, torch.Tensor] = {}
    for space in method.directions.subspaces.values():
        for side in (space.right, space.left):
            if side.shape not in drawn:
                drawn[side.shape] = torch.linalg.qr(torch.randn_like(side)).Q
            side.copy_(drawn[side.shape])


def projections(method: Method) -> float:
    """The operations of a step's projections, by the time that they take as operations in bf16."""
    assert isinstance(method, Osft)
    once = sum(
        projection_flops(space.projection, len(space.left), len(space.right), space.right.shape[1], space.left.shape[1])
        for space in method.directions.subspaces.values()
    )
    return once * (FP32 / method.project_every + TF32 * method.project_gradients)


def filling(here: torch.device) -> Callable[[str, torch.Size, int, int], torch.Tensor]:
    generator = torch.Generator(here).manual_seed(0)

    def read(_name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        values = torch.ones(stop - start, dtype=torch.bfloat16, device=here)
        return values.normal_(std=0.02, generator=generator) if len(shape) > 1 else values

    return read


def large(case: Case, config: LlamaConfig, engine: Engine, method: Method) -> dict[str, Any]:
    here, length, targets = engine.device, case.length, case.length - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (length,), generator=generator).tolist()
    # Not packed: with nothing to keep apart, sdpa takes its fastest kernel.
    batch = collate([[0]], {0: (ids[:1], ids[1:])}, 0, False, None, True).to(here)
    work = count_flops(engine.module)
    assert work is not None
    pairs = length * (length + 1) // 2
    useful, again = (
        case.samples * count
        for count in (work.total_flops(length, pairs, targets), work.recompute_flops(length, pairs))
    )
    held = projections(method) if engine.constraint is not None else 0.0

    def step() -> float:
        began = time.perf_counter()
        engine.step(method.loss, [batch] * case.samples, targets=targets * case.samples, lr=1e-6)
        if here.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(WARM):
        step()
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = statistics.median(step() for _ in range(case.rounds))
    most = peak_flops(here, torch.bfloat16)
    return {
        "seconds": took,
        "tokens": case.samples * length / took,
        "tflops": useful / took / 1e12,
        "mfu": useful / took / most if most else None,
        "floor": (useful + again + held) / most if most else None,
        "peak_gib": comm.max_peak_memory() / 2**30,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
