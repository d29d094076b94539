"""Speed of the trainer, as ratios within one run: over a bare DeepSpeed loop, and over Hugging Face's Trainer.

    python tools/bench.py [--section overhead trainer head evaluation start ranks methods gpu] [--rounds N] [--out FILE]

overhead    a training step with all monitoring, over a step of a bare DeepSpeed loop on the same batches, which are
            prepared beforehand; and over the same step without monitoring
trainer     useful tokens per second over those of Hugging Face's `Trainer`, with the same DeepSpeed configuration,
            samples and micro-batches: full fine-tuning, LoRA, and LoRA on short samples, which dscl packs into rows
head        logits and loss of many targets, computed in chunks, over all at once: time and peak memory
evaluation  ranking labels one prompt and one label at a time, over batches that pass each prompt once; and the share
            of a stream's evaluations that run with evaluate.tasks and evaluate.every
start       seconds from `dscl train` to the end of its first step, and how they divide into parts
ranks       `overhead` and `evaluation` again, on --nproc ranks of this machine (or start this script with torchrun)
methods     the methods' own benchmarks, which run as programs: OSFT, sub-experts, ASR, router
gpu         7B and 8B shapes on one GPU (tools/bench_gpu.py): each method's step, tokens per second, MFU and memory;
            --shape and --method select a part of it

The sides of a ratio take turns, so that other load on the machine affects both, and the table shows medians of the
ratios. A section that cannot measure anything here (`gpu` without a GPU) says so in a row. Without --section: all but
`ranks`, `methods` and `gpu`. Rows of another script join the table as they come; its other output goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dscl.utils.quiet import silence_libraries

silence_libraries()  # before the libraries are imported

import deepspeed  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from torch.nn import functional  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from dscl.data.batches import Batch  # noqa: E402
from dscl.data.encode import encode_answers  # noqa: E402
from dscl.distributed import comm  # noqa: E402
from dscl.distributed.launcher import subprocess_environment  # noqa: E402
from dscl.engine.engine import Engine  # noqa: E402
from dscl.engine.zero_layouts import load_parameters  # noqa: E402
from dscl.methods.registry import find_method  # noqa: E402
from dscl.model.lm_head import MAX_LOGITS, ChunkedCrossEntropy, answer_loss  # noqa: E402
from dscl.monitoring.observer import Observer  # noqa: E402
from dscl.monitoring.profiler import Tracer  # noqa: E402
from dscl.monitoring.score_board import ScoreBoard  # noqa: E402
from dscl.planning.simulate import MemoryTracker  # noqa: E402
from dscl.recipe.recipe import Recipe, resolve_recipe  # noqa: E402
from dscl.training import trainer as training_loop  # noqa: E402
from dscl.training.checkpoint import Checkpoints  # noqa: E402
from dscl.training.evaluation import EvaluateConfig, evaluate_task, should_evaluate  # noqa: E402
from dscl.training.setup import RunSetup, TaskData, build_setup  # noqa: E402
from dscl.training.state import TrainState  # noqa: E402
from dscl.utils import timers  # noqa: E402

TOOLS = Path(__file__).resolve().parent
BLOCK = 10  # steps of one turn, as many as between two updates of the monitoring
LABELS = ("business", "culture", "politics", "science", "sport", "travel", "the weather", "none of these")
LONG, SHORT = (20, 120), (4, 80)  # fewest and most words of a prompt; `write_task` says how lengths are distributed
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0}
# The methods' own benchmarks, with the arguments that select their sections with targets.
METHOD_BENCHMARKS = {
    "bench_osft.py": ("--section", "step", "setup"),
    "bench_experts.py": (),
    "bench_asr.py": (),
    "bench_router.py": (),
}
STREAM_TASKS = 8  # tasks of the stream whose evaluations are counted
MULTI_RANK_SECTIONS = ("overhead", "evaluation")  # sections that run on several ranks
TARGETS = 4096  # target tokens of `head`
HEAD_SIZES = {"cuda": (4096, 128256, torch.bfloat16), "cpu": (512, 32000, torch.float32)}  # width, vocabulary, dtype


@dataclass(frozen=True)
class Measurement:
    """A row of the table."""

    name: str
    value: str
    target: str = ""
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections: dict[str, Callable[[argparse.Namespace], Iterator[Measurement]]] = {
        "overhead": overhead,
        "trainer": trainer,
        "head": head,
        "evaluation": evaluation,
        "start": start,
        "ranks": ranks,
        "methods": methods,
        "gpu": gpu,
    }
    parser.add_argument("--section", choices=list(sections), nargs="+", default=list(sections)[:5])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model")
    parser.add_argument("--deepspeed", default="ds_configs/zero2.json", help="DeepSpeed configuration of both sides")
    parser.add_argument("--out", type=Path, help="file for a copy of the table")
    parser.add_argument("--nproc", type=int, default=2, help="number of ranks of the section `ranks`")
    parser.add_argument("--shape", nargs="+", help="shapes of the section `gpu`: 7B, 8B")
    parser.add_argument("--method", nargs="+", help="methods of the section `gpu`: full, osft, lora, asr, moses")
    parser.add_argument("--json", action="store_true", help="print each row as a JSON object instead of a table")
    options = parser.parse_args()
    if comm.world_size() > 1 and not set(options.section) <= set(MULTI_RANK_SECTIONS):
        parser.error(f"--section: only {', '.join(MULTI_RANK_SECTIONS)} run on more than one rank")
    lines = [] if options.json else [describe_machine(options), "", "| | ratio | target | |", "|---|---|---|---|"]
    print_lines(*lines)
    with comm.process_group():
        for name in options.section:
            for result in sections[name](options):
                row = f"| {result.name} | {result.value} | {result.target} | {result.note} |"
                lines.append(json.dumps(asdict(result)) if options.json else row)
                print_lines(lines[-1])
    if options.out and comm.is_main():
        options.out.write_text("\n".join(lines) + "\n", "utf-8")


def print_lines(*lines: str) -> None:
    for line in lines if comm.is_main() else ():
        print(line, flush=True)


def describe_machine(options: argparse.Namespace) -> str:
    here = comm.device()
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, DeepSpeed {deepspeed.__version__}; a LLaMA of {options.layers} layers of "
        f"width {options.hidden}; {Path(options.deepspeed).name}; medians of {options.rounds} turns"
    )


# ---- model and data of the measured run


def build_recipe(options: argparse.Namespace, folder: Path, words: tuple[int, int], **overrides: Any) -> Recipe:
    return resolve_recipe(recipe_document(options, folder, words, **overrides), source=str(TOOLS))


def recipe_document(
    options: argparse.Namespace, folder: Path, words: tuple[int, int], **overrides: Any
) -> dict[str, Any]:
    """The recipe of one task of random texts, whose prompts have `words` (fewest, most) words."""
    samples = BLOCK * overrides.get("train", {}).get("global_batch", 16) * (options.rounds + 2)
    if comm.is_main():
        write_task(folder / "task", words, samples)
    comm.barrier()
    heads = max(2, options.hidden // 64)
    document: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "shape": {
                "hidden_size": options.hidden,
                "num_hidden_layers": options.layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads // 2,
                "intermediate_size": options.hidden * 11 // 4 // 64 * 64,
                "vocab_size": 2048,
            }
        },
        "method": {"name": "sequential"},
        "stream": [{"name": "task", "path": str(folder / "task"), "test_limit": 64, "dev_share": 0}],
        "train": {
            "lr": 1e-4,
            "schedule": "constant",
            "warmup": 0.0,
            "precision": "bf16" if comm.device().type == "cuda" else "fp32",
            "global_batch": 16,
            "micro_batch": 8,
        },
        "data": {"cache_dir": str(folder / "cache")},
        "deepspeed": str(Path(options.deepspeed).resolve()),
        "checkpoint": {"every": 10**6},
        "observe": {"live": "off", "every": BLOCK},
    }
    for section, keys in overrides.items():
        document[section] = {**document[section], **keys}
    return document


def write_task(folder: Path, words: tuple[int, int], samples: int) -> None:
    """Write a task in the CL_Benchmark layout. LONG prompts have uniform lengths; most SHORT ones are short, as
    instructions are."""
    rng = random.Random(0)
    least, most = words

    def length() -> int:
        return rng.randint(least, most) if words == LONG else min(most, least + int(rng.expovariate(1 / 10)))

    vocabulary = ["".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(3)) for _ in range(500)]
    folder.mkdir(parents=True)
    for split, count in (("train", samples), ("test", 64)):
        texts = [" ".join(rng.choices(vocabulary, k=length())) for _ in range(count)]
        rows = [{"label": rng.choice(LABELS), "sentence": text} for text in texts]
        (folder / f"{split}.json").write_text(json.dumps(rows), "utf-8")
    (folder / "labels.json").write_text(json.dumps(list(LABELS)), "utf-8")


@contextmanager
def open_engine(
    options: argparse.Namespace, words: tuple[int, int], **overrides: Any
) -> Iterator[tuple[RunSetup, Engine]]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        setup = build_setup(build_recipe(options, Path(comm.broadcast_from_main(folder)), words, **overrides))
        with closing(setup.build_engine()) as engine:
            yield setup, engine
        comm.barrier()  # before the main rank removes its temporary folder
    gc.collect()


def ranks_suffix() -> str:
    return f", on {comm.world_size()} ranks" if comm.world_size() > 1 else ""


# ---- sections


def overhead(options: argparse.Namespace) -> Iterator[Measurement]:
    with open_engine(options, LONG) as (setup, engine):
        task_data, bare_loop = setup.training_data(0), BareLoop(setup)
        bare: list[float] = []
        unmonitored: list[float] = []

        def time_other_sides(number: int) -> None:
            numbers = range(number - BLOCK, number)
            bare_loop.prepare(task_data, numbers)
            bare.append(time_call(lambda: bare_loop.steps(task_data, numbers)))
            unmonitored.append(time_call(lambda: unmonitored_steps(engine, setup, task_data, numbers)))

        trainer_seconds = time_trainer_blocks(setup, engine, task_data, time_other_sides)
        bare_loop.close()
    yield Measurement(
        f"trainer: a step with all monitoring, over a step of a bare DeepSpeed loop{ranks_suffix()}",
        ratio(trainer_seconds, bare),
        "≤ 1.02",
        f"bare loop: {1e3 * statistics.median(bare) / BLOCK:.0f} ms",
    )
    yield Measurement(
        f"monitoring: a step with all monitoring, over one without{ranks_suffix()}",
        ratio(trainer_seconds, unmonitored),
        "≤ 1.01",
    )


class BareLoop:
    """The training loop of DeepSpeed's tutorial, on prepared batches."""

    def __init__(self, setup: RunSetup) -> None:
        self.module = build_module(setup)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], lr=1e-4, fused=True
        )
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=self.optimizer, config=deepspeed_config(setup)
            )
        self.batches: dict[int, list[Batch]] = {}  # by step

    def steps(self, task_data: TaskData, numbers: Sequence[int]) -> None:
        for number in numbers:
            targets, batches = task_data.sampler.step_plan(number).num_targets, self.batches[number]
            for batch in batches:
                # DeepSpeed divides the loss by the number of micro-batches and averages gradients over ranks.
                loss = answer_loss(self.engine, batch) * (comm.world_size() * len(batches) / targets)
                self.engine.backward(loss)
                self.engine.step()

    def prepare(self, task_data: TaskData, numbers: Sequence[int]) -> None:
        self.batches = {n: [batch.to(comm.device()) for batch in task_data.micro_batches(n)] for n in numbers}

    def close(self) -> None:
        self.engine.destroy()


def build_module(setup: RunSetup) -> Any:
    module = setup.backbone.build().to(comm.device())
    load_parameters(module, setup.backbone.weights.read)
    return module


def deepspeed_config(setup: RunSetup) -> dict[str, Any]:
    train = setup.recipe.train
    return {
        **setup.deepspeed_settings,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": max(1, train.global_batch // train.micro_batch // comm.world_size()),
        "gradient_clipping": train.grad_clip,
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
    }


def time_trainer_blocks(
    setup: RunSetup, engine: Engine, task_data: TaskData, between_blocks: Callable[[int], None]
) -> list[float]:
    """The seconds of each block of steps in the trainer's own loop. The other sides take their turns between blocks."""
    block_seconds: list[float] = []
    began = 0.0

    class BlockTimer(Observer):
        def log_steps(self, *records: Mapping[str, Any]) -> None:
            nonlocal began
            super().log_steps(*records)
            number = int(records[-1]["step"])
            if number % BLOCK == 0:
                if number > BLOCK:  # the first block is the warm-up
                    block_seconds.append(time.perf_counter() - began)
                    between_blocks(number)
                began = time.perf_counter()

    recipe = setup.recipe
    (recipe.run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint)
    tracer = Tracer(recipe.run_folder, recipe.observe.profile)
    with BlockTimer(recipe.run_folder, recipe.observe, comm.is_main(), setup.planned_steps()) as observer:
        scores = ScoreBoard("", (), ())
        loop = training_loop.Trainer(setup, engine, TrainState(), scores, checkpoints, observer, tracer, None)
        loop.train_task(task_data)
    return block_seconds[:-1]  # the last block includes the end of the task


def unmonitored_steps(engine: Engine, setup: RunSetup, task_data: TaskData, numbers: Sequence[int]) -> None:
    with disable_timers():
        for number in numbers:
            plan = task_data.sampler.step_plan(number)
            engine.step(setup.method.loss, task_data.micro_batches(number), targets=plan.num_targets, lr=1e-4)
    timers.collect_timings()


@contextmanager
def disable_timers() -> Iterator[None]:
    originals = timers.timed_part, timers.timed_collective

    def no_timer(*_: Any) -> Any:
        return nullcontext()

    timers.timed_part = timers.timed_collective = no_timer  # type: ignore[assignment]
    try:
        yield
    finally:
        timers.timed_part, timers.timed_collective = originals


def time_call(work: Callable[[], Any]) -> float:
    synchronize()
    comm.barrier()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    assert pairs, "nothing was measured"
    return f"{statistics.median(pairs):.3f} ({min(pairs):.2f} to {max(pairs):.2f})"


def trainer(options: argparse.Namespace) -> Iterator[Measurement]:
    lora = {"name": "sequential", "tune": {"name": "lora", **LORA}}
    packed = {"packing": True, "global_batch": 64, "micro_batch": 16}
    cases: list[tuple[str, tuple[int, int], dict[str, Any], str]] = [
        ("full fine-tuning", LONG, {}, "≥ 1.0"),
        ("LoRA", LONG, {"method": lora}, "≥ 1.0"),
        (
            "LoRA, short samples of different lengths, which dscl packs",
            SHORT,
            {"method": lora, "train": packed},
            "≥ 1.5",
        ),
    ]
    for name, words, overrides, target in cases:
        with open_engine(options, words, **overrides) as (setup, engine):
            task_data = setup.training_data(0)
            peer = HuggingFacePeer(setup, task_data)
            peer_seconds: list[float] = []

            def time_peer(_: int, peer: HuggingFacePeer = peer, peer_seconds: list[float] = peer_seconds) -> None:
                peer_seconds.append(peer.time_block())

            dscl_seconds = time_trainer_blocks(setup, engine, task_data, time_peer)
            peer.close()
            tokens = sum(task_data.sampler.step_plan(n).num_tokens for n in range(BLOCK)) / BLOCK
        yield Measurement(
            f"{name}: useful tokens per second, over those of Hugging Face's Trainer",
            ratio(peer_seconds, dscl_seconds),
            target,
            f"dscl: {tokens * BLOCK / statistics.median(dscl_seconds):,.0f} tokens/s",
        )


class HuggingFacePeer:
    """Hugging Face's Trainer on the same samples in the same order, one block of steps at a time. It runs in its own
    thread, which pauses after each block until the next call of `time_block`."""

    def __init__(self, setup: RunSetup, task_data: TaskData) -> None:
        train = setup.recipe.train
        order = [i for n in range(task_data.sampler.num_steps) for i in task_data.sampler.step_plan(n).sample_ids]
        rows = [dict(zip(("prompt", "answer"), task_data.dataset[i], strict=True)) for i in order]
        model = find_method("sequential")(setup.recipe.method, setup.run_info).prepare(build_module(setup))
        arguments = TrainingArguments(
            output_dir=str(setup.recipe.run_folder / "peer"), max_steps=task_data.sampler.num_steps, save_strategy="no",
            per_device_train_batch_size=train.micro_batch, report_to=[], disable_tqdm=True, logging_steps=BLOCK,
            gradient_accumulation_steps=train.global_batch // train.micro_batch // comm.world_size(),
            learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=train.grad_clip, optim="adamw_torch_fused", weight_decay=0.0,
            bf16=train.precision == "bf16", use_cpu=comm.device().type == "cpu", remove_unused_columns=False,
            deepspeed=peer_deepspeed_config(setup),
        )  # fmt: skip
        pad = task_data.pad_id

        def collate_samples(samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
            width = -(-max(len(s["prompt"]) + len(s["answer"]) for s in samples) // 8) * 8
            ids, mask, labels = (torch.full((len(samples), width), value) for value in (pad, 0, -100))
            for row, sample in enumerate(samples):
                whole = [*sample["prompt"], *sample["answer"]]
                ids[row, : len(whole)] = torch.tensor(whole)
                mask[row, : len(whole)] = 1
                labels[row, len(sample["prompt"]) : len(whole)] = torch.tensor(list(sample["answer"]))
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        peer = self
        self._block_done, self._block_start, self._stop = threading.Event(), threading.Event(), False
        self._error: BaseException | None = None

        class PauseAfterBlock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                if state.global_step % BLOCK == 0:
                    synchronize()
                    peer._pause()
                    control.should_training_stop = peer._stop
                return control

        class InOrderTrainer(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

            def log(self, *_: Any, **__: Any) -> None:
                pass

        self.trainer = InOrderTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate_samples,
            callbacks=[PauseAfterBlock()],
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._run_block()  # the first block is the warm-up
        assert isinstance(self.trainer.model_wrapped, deepspeed.DeepSpeedEngine), (
            "Hugging Face's Trainer runs without DeepSpeed"
        )

    def _run(self) -> None:
        self._block_start.wait()
        self._block_start.clear()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
        self._block_done.set()

    def _pause(self) -> None:
        self._block_done.set()
        self._block_start.wait()
        self._block_start.clear()

    def _run_block(self) -> None:
        self._block_start.set()
        self._block_done.wait()
        self._block_done.clear()
        if self._error is not None:
            raise self._error

    def time_block(self) -> float:
        return time_call(self._run_block)

    def close(self) -> None:
        self._stop = True
        self._block_start.set()
        self._thread.join()


def peer_deepspeed_config(setup: RunSetup) -> dict[str, Any]:
    """The DeepSpeed configuration with `auto` where transformers fills in the values of TrainingArguments."""
    from_arguments = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**copy.deepcopy(deepspeed_config(setup)), **dict.fromkeys(from_arguments, "auto")}
    del settings["steps_per_print"]
    return settings


def head(options: argparse.Namespace) -> Iterator[Measurement]:
    device = comm.device()
    width, vocabulary, dtype = HEAD_SIZES["cuda" if device.type == "cuda" else "cpu"]
    targets, chunk = TARGETS, MAX_LOGITS // vocabulary
    hidden = torch.randn(targets, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (targets,), device=device)

    def at_once() -> None:
        logits = functional.linear(hidden, weight).float()
        functional.cross_entropy(logits, labels, reduction="sum").backward()

    def in_chunks() -> None:
        ChunkedCrossEntropy.apply(hidden, weight, None, labels, chunk, True).backward()

    def peak_of(work: Callable[[], None]) -> int:
        hidden.grad = weight.grad = None
        with MemoryTracker() as tracker:
            work()
        return tracker.peak

    peaks = [peak_of(work) for work in (in_chunks, at_once)]
    pairs = [(time_call(in_chunks), time_call(at_once)) for _ in range(options.rounds)]
    yield Measurement(
        f"head: {targets} targets of {vocabulary:,} words in chunks of {chunk}, over all at once: time",
        ratio(*zip(*pairs, strict=True)), "≤ 1.0", f"width {width}",
    )  # fmt: skip
    yield Measurement(
        "the same: peak memory of its tensors", f"{peaks[0] / peaks[1]:.3f}", "",
        f"{peaks[0] / 2**30:.2f} GiB instead of {peaks[1] / 2**30:.2f}",
    )  # fmt: skip


def evaluation(options: argparse.Namespace) -> Iterator[Measurement]:
    with open_engine(options, LONG) as (setup, engine), torch.no_grad():
        eval_set, module, tokenizer = setup.tasks[0].eval_set, engine.module.eval(), setup.backbone.tokenizer
        labels = encode_answers(LABELS, tokenizer)

        def one_by_one() -> None:
            if comm.is_main() or engine.layout.forward_needs_all_ranks:
                for prompt in eval_set.prompt_ids:
                    for label in labels:
                        ids = torch.tensor([[*prompt, *label]], device=engine.device)
                        module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            comm.barrier()

        def in_batches() -> None:
            evaluate_task(eval_set, engine, setup.method, tokenizer, EvaluateConfig(batch=16))

        in_batches()
        pairs = [(time_call(one_by_one), time_call(in_batches)) for _ in range(max(2, options.rounds // 2))]
    single, batched = zip(*pairs, strict=True)
    task_seconds = statistics.median(batched)
    yield Measurement(
        f"evaluation: ranking {len(LABELS)} labels one by one on one rank, over batches of 16{ranks_suffix()}",
        ratio(single, batched), "", f"in batches: {1e3 * task_seconds / len(eval_set.prompt_ids):.1f} ms per prompt",
    )  # fmt: skip
    if comm.world_size() == 1:
        yield from evaluation_shares(setup, task_seconds)


def evaluation_shares(setup: RunSetup, task_seconds: float) -> Iterator[Measurement]:
    """The share of a stream's evaluations that run with evaluate.tasks and evaluate.every. `task_seconds`: the
    evaluation of one task."""
    stream = replace(setup, tasks=setup.tasks * STREAM_TASKS)
    for keys in ({"tasks": "seen"}, {"tasks": "new"}, {"every": 4}, {"tasks": "new", "every": 4}):
        changed = replace(stream, recipe=replace(setup.recipe, evaluate=EvaluateConfig(**keys)))
        numbers = range(STREAM_TASKS)
        passes = sum(should_evaluate(changed, task, after) for after in numbers for task in numbers)
        assignments = ", ".join(f"evaluate.{key}={value}" for key, value in keys.items())
        yield Measurement(
            f"evaluation after each of {STREAM_TASKS} tasks: {assignments}, over all tasks each time",
            f"{passes / STREAM_TASKS**2:.3f}", "", f"{passes} of {STREAM_TASKS**2} evaluations, "
            f"{passes * task_seconds:.1f} s of {STREAM_TASKS**2 * task_seconds:.1f}",
        )  # fmt: skip


def start(options: argparse.Namespace) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        one_round = argparse.Namespace(**{**vars(options), "rounds": 1})
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_document(one_round, Path(folder), LONG)), "utf-8")
        for cache in ("empty cache", "cached tokenizer and data"):
            began = time.time()
            words = [str(TOOLS / "bench_start.py"), str(recipe), f"run_dir={folder}/{cache.replace(' ', '-')}"]
            child = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, env=subprocess_environment()
            )
            if child.returncode:
                yield Measurement(
                    f"start, {cache}", "", "", f"failed: status {child.returncode}; {child.stderr[-200:]!r}"
                )
                return
            yield Measurement(
                f"start: seconds from `dscl train` to the end of its first step, {cache}",
                *summarize_start(json.loads(child.stdout.splitlines()[-1]), began),
            )


def summarize_start(record: Mapping[str, Any], began: float) -> tuple[str, str, str]:
    """Value, target and note of a start's row. The note lists the parts in the order in which they ran."""
    total, python = record["ended"] - began, record["began"] - began
    rest = total - python - sum(record["parts"].values())
    parts = {"Python": python, **record["parts"], "the rest": rest}
    return f"{total:.1f} s", "", ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


def ranks(options: argparse.Namespace) -> Iterator[Measurement]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.nproc}"]
    sizes = [f"--{name}={getattr(options, name)}" for name in ("rounds", "hidden", "layers", "deepspeed")]
    yield from run_script(*launcher, __file__, "--section", *MULTI_RANK_SECTIONS, *sizes)


def methods(options: argparse.Namespace) -> Iterator[Measurement]:
    for script, words in METHOD_BENCHMARKS.items():
        yield from run_script(str(TOOLS / script), *words)


def gpu(options: argparse.Namespace) -> Iterator[Measurement]:
    selections = {"--shape": options.shape, "--method": options.method}
    parts = [word for name, values in selections.items() if values for word in (name, *values)]
    yield from run_script(str(TOOLS / "bench_gpu.py"), "--rounds", str(options.rounds), *parts)


def run_script(*words: str) -> Iterator[Measurement]:
    """Run a script and yield its rows as they come. Its other output goes to stderr."""
    child = subprocess.Popen(
        [sys.executable, *words, "--json"], stdout=subprocess.PIPE, text=True, env=subprocess_environment()
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            yield Measurement(**json.loads(line))
        else:
            print(line, end="", file=sys.stderr, flush=True)
    if status := child.wait():
        yield Measurement(
            next(Path(word).name for word in words if word.endswith(".py")), "", "", f"failed: status {status}"
        )


if __name__ == "__main__":
    main()
