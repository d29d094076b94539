"""What ASR costs, as ratios within one run: gathering features while training, layers that stay frozen, mixed batches.

    python tools/bench_asr.py [--section step|frozen|mixed] [--model FOLDER] [--rounds N]

step     a training step that gathers features over the same step without; and the sums at a task's end, spread over the
         steps of an epoch
frozen   a training step with adapters from a feature layer on over one with adapters in all layers
mixed    generating for a batch whose rows use eight adapters: this package over PEFT's `adapter_names`

Both sides of a ratio take turns; medians are compared. On GPUs the same script runs in bf16 on the first of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics as numbers
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig

from dscl.config.methods import AsrPreset, SequentialPreset
from dscl.config.parsing import parse_config
from dscl.data.batches import Batch, collate, collate_prompts
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.maths.rls import compute_statistics
from dscl.methods.asr import Asr
from dscl.methods.base import Method, RunInfo, TaskContext
from dscl.methods.sequential import Sequential
from dscl.model.backbone import Backbone, ModelConfig, resolve_model_folder
from dscl.model.generation import generate
from dscl.model.lm_head import answer_loss
from dscl.model.weights import RandomWeights, SafetensorsWeights
from dscl.utils.quiet import silence_libraries

PROMPT, ANSWER, ROWS = 120, 8, 8
ADAPTERS, NEW_TOKENS = 8, 24
LORA = {"rank": 8, "alpha": 16.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"step": step, "frozen": frozen, "mixed": mixed}
    parser.add_argument("--section", choices=list(sections), nargs="*", default=list(sections))
    parser.add_argument("--model", help="a model folder; default: fresh weights, 8 layers of width 256")
    parser.add_argument("--hidden", type=int, default=256, help="width of the fresh model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the fresh model")
    parser.add_argument("--rounds", type=int, default=20, help="how often each side is timed")
    parser.add_argument("--json", action="store_true", help="also the bars as objects, for tools/bench.py")
    options = parser.parse_args()
    silence_libraries()
    with comm.process_group():
        built = backbone(options)
        torch.manual_seed(0)
        for section in options.section:
            sections[section](built, options)


def backbone(options: argparse.Namespace) -> Backbone:
    dtype = torch.bfloat16 if comm.device().type == "cuda" else torch.float32
    if options.model:
        folder = resolve_model_folder(options.model, "--model")
        config = LlamaConfig.from_pretrained(folder, local_files_only=True)
        return Backbone(ModelConfig(name=options.model), config, None, SafetensorsWeights(Path(folder)), dtype)
    config = LlamaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128), intermediate_size=options.hidden * 11 // 4 // 64 * 64,
        vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return Backbone(ModelConfig(shape={}), config, None, RandomWeights(0, 0.02), dtype)


def engine_of(built: Backbone, method: Method) -> Engine:
    precision = "bf16" if built.dtype == torch.bfloat16 else "fp32"
    made = Engine({}, build=built.build, read=built.weights.read, prepare=method.prepare, precision=precision)
    made.reset_optimizer(method.begin_task(0, "a", alone(made)))
    return made


def alone(engine: Engine) -> TaskContext:
    def nothing(*_: Any) -> Any:
        return iter(())

    return TaskContext(
        engine.device,
        engine.module,
        engine.probe_activations,
        nothing,
        engine.shards.gather_full_weights,
        engine.apply_on_owners,
        comm.all_reduce_sum,
        *[nothing] * 6,
    )


def asr(**router: Any) -> Asr:
    return Asr(parse_config(AsrPreset, {"name": "asr", "tune": LORA, "router": router}), FACTS)


FACTS = RunInfo(0, ("a",), "", "", "", 0, "")


def batch(first: bool, number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    samples = {i: (torch.randint(5, 4000, (PROMPT,), generator=generator).tolist(), [7] * ANSWER) for i in range(ROWS)}
    return collate([[i] for i in range(ROWS)], samples, 0, False, None, first)


def step(built: Backbone, options: argparse.Namespace) -> None:
    method = asr()
    engine = engine_of(built, method)
    task_router = method.task_router
    width = task_router.router.spec.num_features

    def train(first: bool) -> Callable[[], None]:
        def one() -> None:
            engine.step(method.loss, [batch(first), batch(first)], targets=2 * ROWS * ANSWER, lr=1e-3)
            task_router._sample_ids, task_router._features = [], task_router._features[-1:]

        return one

    gathering, plain = compared(train(True), train(False), options.rounds)
    rows = task_router._features[0][:1].repeat(800, 1)
    (end,) = timed([lambda: compute_statistics(rows, task_router.router.feature_map)], 3)
    each = end / (len(rows) / (2 * ROWS))
    print(f"step: {1e3 * plain:.1f} ms; gathering features {gathering / plain:.4f} of it")
    print(f"      the sums at the end of a task of {len(rows)} samples at E = {width}, spread over an epoch's steps: "
          f"{each / plain:.4f} of a step more; in all {(gathering + each) / plain:.4f}")  # fmt: skip
    tell(options, "ASR: a step that gathers features over one without", f"{(gathering + each) / plain:.3f}", "≤ 1.03")
    engine.close()


def frozen(built: Backbone, options: argparse.Namespace) -> None:
    layers = built.hf_config.num_hidden_layers
    everywhere = Sequential(parse_config(SequentialPreset, {"tune": {"name": "lora", **LORA}}), FACTS)
    engine = engine_of(built, everywhere)

    def work(engine: Engine) -> Callable[[], None]:
        return lambda: discard(engine.step(answer_loss, [batch(False)], targets=ROWS * ANSWER, lr=1e-3))

    for layer in sorted({max(1, layers // 8), layers // 4, layers // 2}):
        other = engine_of(built, asr(layer=layer))
        above, all_ = compared(work(other), work(engine), options.rounds)
        print(f"frozen: adapters from layer {layer} of {layers} on take {above / all_:.3f} of the step "
              f"with adapters in all ({1e3 * all_:.1f} ms)")  # fmt: skip
        other.close()
    engine.close()


@torch.no_grad()
def mixed(built: Backbone, options: argparse.Namespace) -> None:
    names = tuple(f"task{i}" for i in range(ADAPTERS))
    config = parse_config(AsrPreset, {"name": "asr", "tune": LORA, "router": {"layer": 1}})
    method = Asr(config, RunInfo(0, names, "", "", "", 0, ""))
    model = built.build().to(comm.device()).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(built.weights.read(name, parameter.shape, 0, parameter.numel()).view_as(parameter))
    plain = copy.deepcopy(model)
    method.prepare(model)
    model.eval()
    targets = list(method.bank.layers)
    other: Any = None
    for slot, name in enumerate(names):
        settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        other = peft.get_peft_model(plain, settings, name) if other is None else other
        if slot:
            other.add_adapter(name, settings)
        draw(other, method, name, slot)
    other.eval()
    generator = torch.Generator().manual_seed(1)
    rows = 2 * ADAPTERS
    prompts = [torch.randint(5, 4000, (64,), generator=generator).tolist() for _ in range(rows)]
    given = collate_prompts(prompts, 0).to(comm.device())
    slots = [row % ADAPTERS for row in range(rows)]

    def ours() -> Any:
        with method.routing.route_prompts(given.prompt_spans, lambda _: slots):
            return generate(model, given, NEW_TOKENS, -1, 0)

    def peers() -> Any:
        chosen = [names[slot] for slot in slots]
        return generate(lambda **inputs: other(**inputs, adapter_names=chosen), given, NEW_TOKENS, -1, 0)

    same = sum(a == b for a, b in zip(ours(), peers(), strict=True))
    theirs, mine = compared(peers, ours, max(3, options.rounds // 4))
    print(f"mixed: {rows} rows, {ADAPTERS} adapters, {NEW_TOKENS} new tokens: PEFT takes {theirs / mine:.2f} times "
          f"as long ({1e3 * mine:.0f} ms here); {same} of {rows} rows have the same tokens")  # fmt: skip
    tell(options, f"mixed batches, {ADAPTERS} adapters: PEFT's generation over ours", f"{theirs / mine:.3f}", "> 1")


def tell(options: argparse.Namespace, what: str, figure: str, target: str, told: str = "") -> None:
    """A row of tools/bench.py's table, where that asks."""
    if options.json:
        print(json.dumps({"what": what, "figure": figure, "target": target, "told": told}), flush=True)


def draw(other: Any, method: Asr, name: str, slot: int) -> None:
    """The same random adapter on both sides."""
    torch.manual_seed(slot)
    for path, layer in method.bank.layers.items():
        theirs = other.get_submodule(f"base_model.model.{path}")
        a, b = theirs.lora_A[name].weight, theirs.lora_B[name].weight
        a.copy_(0.05 * torch.randn_like(a))
        b.copy_(0.05 * torch.randn_like(b))
        first = slot * method.routing.rank
        layer.bank_a[first : first + len(a)] = a
        layer.bank_b[:, first : first + len(a)] = b * 2.0


def compared(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> list[float]:
    one()
    other()
    return timed([one, other], rounds)


def timed(works: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each; they take turns, so that what else the machine does hits them alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, found in zip(works, seconds, strict=True):
            wait()
            start = time.perf_counter()
            work()
            wait()
            found.append(time.perf_counter() - start)
    return [numbers.median(found) for found in seconds]


def wait() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def discard(_: Any) -> None:
    pass


if __name__ == "__main__":
    main()
