"""Each method's training step on one large GPU, at 7B and 8B shapes, in bf16; printed as Markdown.

    python tools/bench_gpu.py [--shape 7B 8B] [--method full osft lora asr moses] [--attention sdpa] [--rounds N]
                              [--samples N] [--limit SECONDS] [--no-offload]

A step has four micro-batches of one sample each. A sample has 4096 tokens, all of which are targets. The DeepSpeed
configuration is ds_configs/zero2.json. Each row of the table is measured by its own process and printed at once; a
process that fails or takes too long gives a row that says so, and the others continue. Activations are recomputed only
where memory runs out without recomputation. Full fine-tuning and OSFT are also timed with the optimizer state on the
host, which needs about 18 bytes of host memory per parameter: 113 GiB at 7B, 135 GiB at 8B. Weights are random, made on
the GPU, since their values do not matter here; OSFT's protected directions are random too, instead of a decomposition.

The floor beside a step is the time that its operations would take at the GPU's stated peak, including recomputation,
and including projections at the speed of TF32 and fp32. MFU counts neither recomputation nor projections.
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
OFFLOADED = ("full", "osft")  # the other methods train few parameters, so their optimizer state is small
ATTENTION = ("sdpa", "flash_attention_2")
WARMUP_STEPS = 2  # steps before the timing
TF32_COST, FP32_COST = 2, 15  # time over that of bf16, from the data sheets of A100, H100 and H200
DEEPSPEED_JSON = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"


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
    parser.add_argument(
        "--attention",
        choices=ATTENTION,
        nargs="+",
        help="attention implementations (default: all that this machine has)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--samples", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--limit", type=float, default=900, help="most seconds for each row of the table")
    parser.add_argument(
        "--no-offload", dest="offload", action="store_false", help="leave out the rows with the optimizer on the host"
    )
    parser.add_argument("--json", action="store_true", help="print each row as a JSON object, for tools/bench.py")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = Case(**json.loads(options.child))
        with comm.process_group():
            print(json.dumps(try_steps(case, model_config(case))), flush=True)
        return
    if not options.json:
        print("| | MFU | target | |\n|---|---|---|---|", flush=True)
    for row in rows(options):
        print(json.dumps(row) if options.json else f"| {' | '.join(row.values())} |", flush=True)


def rows(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    if comm.device().type != "cuda":
        yield make_row("gpu: this machine has no GPU, nothing was measured")
        return
    attention = options.attention or ATTENTION[: 1 + is_flash_attn_2_available()]
    if options.attention is None and len(attention) == 1:
        yield make_row("gpu: the package flash-attn is not installed, so attention is torch's own (sdpa)")
    for shape, method, implementation in product(options.shape, options.method, attention):
        case = Case(shape, method, implementation, rounds=options.rounds, samples=options.samples)
        result = measure_case(case, options.limit)
        yield row(case, result)
        if method in OFFLOADED and options.offload:
            offload_case = replace(case, offload=True)
            yield row(offload_case, measure_case(offload_case, options.limit), without_offload=result)


def measure_case(case: Case, limit: float) -> dict[str, Any]:
    """The result of a child process. If a step runs out of memory, a second one recomputes activations."""
    result = run_child(case, limit)
    return run_child(replace(case, recompute=True), limit) if result.get("out_of_memory") == "in a step" else result


def run_child(case: Case, limit: float) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    try:
        process = subprocess.run(words, capture_output=True, text=True, env=subprocess_environment(), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s (--limit)"}
    if process.returncode == 0:
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return {**result, "recompute": case.recompute}
    last_line = process.stderr.strip().splitlines()[-1:]
    status = f"status {process.returncode}" if process.returncode > 0 else f"killed by signal {-process.returncode}"
    hint = " (mostly because the host is out of memory)" if process.returncode == -9 else ""
    return {"failed": ": ".join([f"failed: {status}{hint}", *last_line])[:300]}


def row(case: Case, result: Mapping[str, Any], without_offload: Mapping[str, Any] | None = None) -> dict[str, str]:
    if "seconds" not in result:
        return make_row(case.title, note=result.get("failed") or f"out of GPU memory {result['out_of_memory']}")
    notes = [f"{result['tokens']:,.0f} tokens/s", f"step {result['seconds']:.3g} s", f"{result['peak_gib']:.1f} GiB"]
    if result["floor"]:
        notes.insert(2, f"floor {result['floor']:.3g} s")
    notes.append("activations recomputed" if result["recompute"] else "no activations recomputed")
    if without_offload is not None:
        notes.append(f"{result['host_gib']:.0f} GiB of host memory")
        notes.append(
            f"{result['seconds'] / without_offload['seconds']:.1f} times the step without offload"
            if "seconds" in without_offload
            else "no step without offload to compare with"
        )
    value = f"MFU {result['mfu']:.1%}" if result["mfu"] else f"{result['tflops']:.3g} TFLOP/s"
    return make_row(case.title, value, "≥ 50 %" if case.method == "full" and not case.offload else "", ", ".join(notes))


def make_row(name: str, value: str = "", target: str = "", note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "target": target, "note": note}


# ---- in the process of a row


def model_config(case: Case) -> LlamaConfig:
    return LlamaConfig(**SHAPES[case.shape], max_position_embeddings=case.length, tie_word_embeddings=False)


def try_steps(case: Case, config: LlamaConfig) -> dict[str, Any]:
    """The measurements of a case, or the moment at which the GPU ran out of memory."""
    try:
        with redirect_stdout(io.StringIO()):
            engine, method = build_engine(case, config)
    except torch.OutOfMemoryError:
        return {"out_of_memory": "before the first step"}
    try:
        return time_steps(case, config, engine, method)
    except torch.OutOfMemoryError:
        return {"out_of_memory": "in a step"}
    finally:
        engine.close()


def build_engine(case: Case, config: LlamaConfig) -> tuple[Engine, Method]:
    device = comm.device()
    model = ModelConfig(shape={}, attention=case.attention, activation_checkpointing=case.recompute)
    backbone = Backbone(model, config, None, RandomWeights(0, 0.02), torch.bfloat16)
    keys = METHODS[case.method][1]
    method_class = find_method(keys["name"])
    method = method_class(
        parse_config(method_class.Config, keys, "method"), RunInfo(0, ("a",), "", "", "", case.length, "bf16")
    )
    settings: dict[str, Any] = json.loads(DEEPSPEED_JSON.read_text("utf-8"))
    if case.offload:  # not pinned: pinned allocations are rounded up to powers of two
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}

    def build() -> Any:
        with device:
            return backbone.build()

    engine = Engine(
        settings, build=build, read=random_reader(device), prepare=method.prepare, constraint=method.constraint,
        gradient_hook=method.gradient_hook, precision="bf16",
    )  # fmt: skip
    if engine.constraint is None:
        no_context: Any = None  # these methods do not use the context
        engine.reset_optimizer(method.begin_task(0, "a", no_context))
    else:
        method.estimate_memory()  # allocates the bases without the decomposition, which takes minutes
        set_random_directions(method)
    return engine, method


def set_random_directions(method: Method) -> None:
    """Fill the protected bases with random orthonormal ones, as products with zeros run faster. Bases of the same size
    are equal."""
    assert isinstance(method, Osft)
    random_bases: dict[torch.Size, torch.Tensor] = {}
    for space in method.directions.subspaces.values():
        for side in (space.right, space.left):
            if side.shape not in random_bases:
                random_bases[side.shape] = torch.linalg.qr(torch.randn_like(side)).Q
            side.copy_(random_bases[side.shape])


def projection_cost(method: Method) -> float:
    """The operations of a step's projections, as the number of bf16 operations that take the same time."""
    assert isinstance(method, Osft)
    flops = sum(
        projection_flops(space.projection, len(space.left), len(space.right), space.right.shape[1], space.left.shape[1])
        for space in method.directions.subspaces.values()
    )
    return flops * (FP32_COST / method.project_every + TF32_COST * method.project_gradients)


def random_reader(device: torch.device) -> Callable[[str, torch.Size, int, int], torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def read(_name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        values = torch.ones(stop - start, dtype=torch.bfloat16, device=device)
        return values.normal_(std=0.02, generator=generator) if len(shape) > 1 else values

    return read


def time_steps(case: Case, config: LlamaConfig, engine: Engine, method: Method) -> dict[str, Any]:
    device, length, targets = engine.device, case.length, case.length - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (length,), generator=generator).tolist()
    # Not packed: without sample boundaries sdpa uses its fastest kernel.
    batch = collate([[0]], {0: (ids[:1], ids[1:])}, 0, False, None, True).to(device)
    flops = count_flops(engine.module)
    assert flops is not None
    pairs = length * (length + 1) // 2
    useful, recomputed = (
        case.samples * count
        for count in (flops.total_flops(length, pairs, targets), flops.recompute_flops(length, pairs))
    )
    projected = projection_cost(method) if engine.constraint is not None else 0.0

    def step() -> float:
        began = time.perf_counter()
        engine.step(method.loss, [batch] * case.samples, targets=targets * case.samples, lr=1e-6)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(WARMUP_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_seconds = statistics.median(step() for _ in range(case.rounds))
    peak = peak_flops(device, torch.bfloat16)
    return {
        "seconds": step_seconds,
        "tokens": case.samples * length / step_seconds,
        "tflops": useful / step_seconds / 1e12,
        "mfu": useful / step_seconds / peak if peak else None,
        "floor": (useful + recomputed + projected) / peak if peak else None,
        "peak_gib": comm.max_peak_memory() / 2**30,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
