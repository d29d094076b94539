"""The cost of ASR, as ratios within one run: collecting features during training, frozen lower layers, mixed batches.

    python tools/bench_asr.py [--section step|frozen|mixed] [--model FOLDER] [--rounds N]

step     a training step that collects features for the router, over the same step without; and the router's sums at the
         end of a task, spread over the steps of an epoch
frozen   a training step with adapters from a feature layer on, over one with adapters in all layers
mixed    generation for a batch whose rows use eight adapters: PEFT's `adapter_names` over dscl

The sides of a ratio take turns, and medians are compared. On a machine with GPUs everything runs in bf16 on the first.
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
    parser.add_argument("--model", help="a model folder (default: random weights, 8 layers of width 256)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model with random weights")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model with random weights")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each side")
    parser.add_argument(
        "--json", action="store_true", help="also print the ratios with targets as JSON objects, for tools/bench.py"
    )
    options = parser.parse_args()
    silence_libraries()
    with comm.process_group():
        base = build_backbone(options)
        torch.manual_seed(0)
        for section in options.section:
            sections[section](base, options)


def build_backbone(options: argparse.Namespace) -> Backbone:
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


def build_engine(base: Backbone, method: Method) -> Engine:
    precision = "bf16" if base.dtype == torch.bfloat16 else "fp32"
    engine = Engine({}, build=base.build, read=base.weights.read, prepare=method.prepare, precision=precision)
    engine.reset_optimizer(method.begin_task(0, "a", single_rank_context(engine)))
    return engine


def single_rank_context(engine: Engine) -> TaskContext:
    def no_data(*_: Any) -> Any:
        return iter(())

    return TaskContext(
        engine.device,
        engine.module,
        engine.probe_activations,
        no_data,
        engine.shards.gather_full_weights,
        engine.apply_on_owners,
        comm.all_reduce_sum,
        *[no_data] * 6,
    )


def build_asr(**router: Any) -> Asr:
    return Asr(parse_config(AsrPreset, {"name": "asr", "tune": LORA, "router": router}), RUN_INFO)


RUN_INFO = RunInfo(0, ("a",), "", "", "", 0, "")


def random_batch(first_epoch: bool) -> Batch:
    """`first_epoch`: the samples are in their first epoch, in which a router collects features."""
    generator = torch.Generator().manual_seed(0)
    samples = {i: (torch.randint(5, 4000, (PROMPT,), generator=generator).tolist(), [7] * ANSWER) for i in range(ROWS)}
    return collate([[i] for i in range(ROWS)], samples, 0, False, None, first_epoch)


def step(base: Backbone, options: argparse.Namespace) -> None:
    method = build_asr()
    engine = build_engine(base, method)
    task_router = method.task_router
    width = task_router.router.spec.num_features

    def train_step(collect: bool) -> Callable[[], None]:
        def run() -> None:
            micro_batches = [random_batch(collect), random_batch(collect)]
            engine.step(method.loss, micro_batches, targets=2 * ROWS * ANSWER, lr=1e-3)
            task_router._sample_ids, task_router._features = [], task_router._features[-1:]

        return run

    collecting, plain = time_pair(train_step(True), train_step(False), options.rounds)
    rows = task_router._features[0][:1].repeat(800, 1)
    (sums,) = time_in_turns([lambda: compute_statistics(rows, task_router.router.feature_map)], 3)
    per_step = sums / (len(rows) / (2 * ROWS))
    total = (collecting + per_step) / plain
    print(f"step: {1e3 * plain:.1f} ms; with the collection of features {collecting / plain:.4f} of it")
    print(f"      the sums at the end of a task of {len(rows)} samples at E = {width}, spread over an epoch's steps: "
          f"{per_step / plain:.4f} of a step; total {total:.4f}")  # fmt: skip
    print_row(options, "ASR: a step that collects features, over one without", f"{total:.3f}", "≤ 1.03")
    engine.close()


def frozen(base: Backbone, options: argparse.Namespace) -> None:
    layers = base.hf_config.num_hidden_layers
    lora_everywhere = Sequential(parse_config(SequentialPreset, {"tune": {"name": "lora", **LORA}}), RUN_INFO)
    engine = build_engine(base, lora_everywhere)

    def train_step(engine: Engine) -> Callable[[], None]:
        return lambda: ignore(engine.step(answer_loss, [random_batch(False)], targets=ROWS * ANSWER, lr=1e-3))

    for layer in sorted({max(1, layers // part) for part in (8, 4, 2)}):
        upper_engine = build_engine(base, build_asr(layer=layer))
        upper, all_ = time_pair(train_step(upper_engine), train_step(engine), options.rounds)
        print(f"frozen: a step with adapters from layer {layer} of {layers} on takes {upper / all_:.3f} of the step "
              f"with adapters in all layers ({1e3 * all_:.1f} ms)")  # fmt: skip
        upper_engine.close()
    engine.close()


@torch.no_grad()
def mixed(base: Backbone, options: argparse.Namespace) -> None:
    names = tuple(f"task{i}" for i in range(ADAPTERS))
    config = parse_config(AsrPreset, {"name": "asr", "tune": LORA, "router": {"layer": 1}})
    method = Asr(config, RunInfo(0, names, "", "", "", 0, ""))
    model = base.build().to(comm.device()).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(base.weights.read(name, parameter.shape, 0, parameter.numel()).view_as(parameter))
    plain = copy.deepcopy(model)
    method.prepare(model)
    model.eval()
    targets = list(method.bank.layers)
    peft_model: Any = None
    for slot, name in enumerate(names):
        settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        peft_model = peft.get_peft_model(plain, settings, name) if peft_model is None else peft_model
        if slot:
            peft_model.add_adapter(name, settings)
        set_random_adapter(peft_model, method, name, slot)
    peft_model.eval()
    generator = torch.Generator().manual_seed(1)
    rows = 2 * ADAPTERS
    prompts = [torch.randint(5, 4000, (64,), generator=generator).tolist() for _ in range(rows)]
    batch = collate_prompts(prompts, 0).to(comm.device())
    slots = [row % ADAPTERS for row in range(rows)]

    def dscl_generate() -> Any:
        with method.routing.route_prompts(batch.prompt_spans, lambda _: slots):
            return generate(model, batch, NEW_TOKENS, -1, 0)

    def peft_generate() -> Any:
        adapters = [names[slot] for slot in slots]
        return generate(lambda **inputs: peft_model(**inputs, adapter_names=adapters), batch, NEW_TOKENS, -1, 0)

    same = sum(a == b for a, b in zip(dscl_generate(), peft_generate(), strict=True))
    theirs, ours = time_pair(peft_generate, dscl_generate, max(3, options.rounds // 4))
    print(f"mixed: {rows} rows, {ADAPTERS} adapters, {NEW_TOKENS} new tokens: PEFT takes {theirs / ours:.2f} times "
          f"as long as dscl ({1e3 * ours:.0f} ms); {same} of {rows} rows have the same tokens")  # fmt: skip
    print_row(
        options, f"mixed batches, {ADAPTERS} adapters: PEFT's generation over dscl's", f"{theirs / ours:.3f}", "> 1"
    )


def print_row(options: argparse.Namespace, name: str, value: str, target: str, note: str = "") -> None:
    """With --json: print a row of tools/bench.py's table."""
    if options.json:
        print(json.dumps({"name": name, "value": value, "target": target, "note": note}), flush=True)


def set_random_adapter(peft_model: Any, method: Asr, name: str, slot: int) -> None:
    """Give both models the same random adapter."""
    torch.manual_seed(slot)
    for path, layer in method.bank.layers.items():
        lora = peft_model.get_submodule(f"base_model.model.{path}")
        a, b = lora.lora_A[name].weight, lora.lora_B[name].weight
        a.copy_(0.05 * torch.randn_like(a))
        b.copy_(0.05 * torch.randn_like(b))
        first = slot * method.routing.rank
        layer.bank_a[first : first + len(a)] = a
        layer.bank_b[:, first : first + len(a)] = b * 2.0


def time_pair(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> list[float]:
    one()
    other()
    return time_in_turns([one, other], rounds)


def time_in_turns(works: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each call. The calls take turns, so that other load on the machine affects all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
    return [numbers.median(times) for times in seconds]


def synchronize() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def ignore(_: Any) -> None:
    pass


if __name__ == "__main__":
    main()
