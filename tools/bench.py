"""How fast the trainer is, as ratios within one run, against the barest loop and against what others would use.

    python tools/bench.py [--section overhead trainer head evaluation start ranks methods gpu] [--rounds N] [--out FILE]

overhead    a training step, with all that is watched and written down, over one of a DeepSpeed engine driven by hand on
            the same batches, which are ready; and over the same step unwatched
trainer     useful tokens a second over those of Hugging Face's `Trainer`, with the same DeepSpeed configuration,
            samples and micro-batches: full fine-tuning, LoRA, and LoRA on short samples, which we pack into rows
head        logits and loss of very many targets, made in parts, over the whole: time, and memory at the peak
evaluation  labels ranked prompt by prompt and label by label, over batches that pass each prompt once; and the
            evaluations of a stream that evaluate.tasks and evaluate.every leave, over all
start       seconds from `dscl train` to the end of its first step, and what they go into
ranks       overhead and evaluation again, on --nproc ranks of this machine (or start this script by torchrun)
methods     the bars of the methods' own benchmarks, each of which runs here: OSFT, sub-experts, routing, router
gpu         shapes of 7B and 8B on one GPU (tools/bench_gpu.py): each method's step, tokens a second, MFU and memory;
            with --shape and --method a part of it

Sides take turns, and medians of their ratios are told; so what else the machine does hits both. Which sections say
nothing on a machine (gpu without one) is told. Without --section: all but `ranks`, `methods` and `gpu`. What another
script says in its own words goes to the standard error; what it has found joins the table, row by row.
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
BLOCK = 10  # steps that a side takes in its turn: as many as between two updates of what is watched
LABELS = ("business", "culture", "politics", "science", "sport", "travel", "the weather", "none of these")
LONG, SHORT = (20, 120), (4, 80)  # words of a prompt; how many are short, see `write_task`
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0}
# The methods' own benchmarks, and which of their sections hold a bar.
OWN = {
    "bench_osft.py": ("--section", "step", "setup"),
    "bench_experts.py": (),
    "bench_asr.py": (),
    "bench_router.py": (),
}
STREAM = 8  # tasks, of a stream whose evaluations are counted
SEVERAL = ("overhead", "evaluation")  # what more than one rank can measure
TARGETS = 4096  # whose logits `head` makes
HEADS = {"cuda": (4096, 128256, torch.bfloat16), "cpu": (512, 32000, torch.float32)}  # width, vocabulary, dtype


@dataclass(frozen=True)
class Found:
    what: str
    figure: str
    target: str = ""
    told: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections: dict[str, Callable[[argparse.Namespace], Iterator[Found]]] = {
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
    parser.add_argument("--deepspeed", default="ds_configs/zero2.json", help="of both sides")
    parser.add_argument("--out", type=Path, help="where the table goes too")
    parser.add_argument("--nproc", type=int, default=2, help="of `ranks`")
    parser.add_argument("--shape", nargs="+", help="of `gpu`: 7B, 8B")
    parser.add_argument("--method", nargs="+", help="of `gpu`: full, osft, lora, asr, moses")
    parser.add_argument("--json", action="store_true", help="an object for each row, instead of a table")
    options = parser.parse_args()
    if comm.world_size() > 1 and not set(options.section) <= set(SEVERAL):
        parser.error(f"--section: with more than one rank only {', '.join(SEVERAL)} can be measured")
    lines = [] if options.json else [machine(options), "", "| | ratio | target | |", "|---|---|---|---|"]
    show(*lines)
    with comm.process_group():
        for name in options.section:
            for found in sections[name](options):
                row = f"| {found.what} | {found.figure} | {found.target} | {found.told} |"
                lines.append(json.dumps(asdict(found)) if options.json else row)
                show(lines[-1])
    if options.out and comm.is_main():
        options.out.write_text("\n".join(lines) + "\n", "utf-8")


def show(*lines: str) -> None:
    for line in lines if comm.is_main() else ():
        print(line, flush=True)


def machine(options: argparse.Namespace) -> str:
    here = comm.device()
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, DeepSpeed {deepspeed.__version__}; a LLaMA of {options.layers} layers of "
        f"width {options.hidden}; {Path(options.deepspeed).name}; medians of {options.rounds} turns"
    )


# ---- the run that is measured


def recipe_of(options: argparse.Namespace, folder: Path, words: tuple[int, int], **changed: Any) -> Recipe:
    return resolve_recipe(document_of(options, folder, words, **changed), source=str(TOOLS))


def document_of(options: argparse.Namespace, folder: Path, words: tuple[int, int], **changed: Any) -> dict[str, Any]:
    """Of a recipe for one task of made-up texts, prompts of so many words each."""
    samples = BLOCK * changed.get("train", {}).get("global_batch", 16) * (options.rounds + 2)
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
    for section, keys in changed.items():
        document[section] = {**document[section], **keys}
    return document


def write_task(folder: Path, words: tuple[int, int], samples: int) -> None:
    """In CL_Benchmark's layout. Lengths are spread evenly, or as those of instructions are: most of them short."""
    draw = random.Random(0)
    least, most = words

    def length() -> int:
        return draw.randint(least, most) if words == LONG else min(most, least + int(draw.expovariate(1 / 10)))

    known = ["".join(draw.choice("bdfgklmnprstv") + draw.choice("aeiou") for _ in range(3)) for _ in range(500)]
    folder.mkdir(parents=True)
    for split, count in (("train", samples), ("test", 64)):
        texts = [" ".join(draw.choices(known, k=length())) for _ in range(count)]
        rows = [{"label": draw.choice(LABELS), "sentence": text} for text in texts]
        (folder / f"{split}.json").write_text(json.dumps(rows), "utf-8")
    (folder / "labels.json").write_text(json.dumps(list(LABELS)), "utf-8")


@contextmanager
def opened(options: argparse.Namespace, words: tuple[int, int], **changed: Any) -> Iterator[tuple[RunSetup, Engine]]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        setup = build_setup(recipe_of(options, Path(comm.broadcast_from_main(folder)), words, **changed))
        with closing(setup.build_engine()) as engine:
            yield setup, engine
        comm.barrier()  # the first rank's folder goes when all are done
    gc.collect()


def among() -> str:
    return f", on {comm.world_size()} ranks" if comm.world_size() > 1 else ""


# ---- sections


def overhead(options: argparse.Namespace) -> Iterator[Found]:
    with opened(options, LONG) as (setup, engine):
        task_data, by_hand = setup.training_data(0), Bare(setup)
        plain: list[float] = []
        unwatched: list[float] = []

        def others(number: int) -> None:
            numbers = range(number - BLOCK, number)
            by_hand.prepare(task_data, numbers)
            plain.append(seconds(lambda: by_hand.steps(task_data, numbers)))
            unwatched.append(seconds(lambda: steps(engine, setup, task_data, numbers, watched=False)))

        ours = watch(setup, engine, task_data, others)
        by_hand.close()
    yield Found(
        f"trainer: a step, everything included, over one of a bare DeepSpeed loop{among()}",
        ratio(ours, plain),
        "≤ 1.02",
        f"{1e3 * statistics.median(plain) / BLOCK:.0f} ms",
    )
    yield Found(
        f"watching: a step with all figures written down, over one without{among()}", ratio(ours, unwatched), "≤ 1.01"
    )


class Bare:
    """DeepSpeed as its tutorial has it, on batches that are ready."""

    def __init__(self, setup: RunSetup) -> None:
        self.module = built(setup)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], lr=1e-4, fused=True
        )
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=self.optimizer, config=deepspeed_config(setup)
            )
        self.ready: dict[int, list[Batch]] = {}

    def steps(self, task_data: TaskData, numbers: Sequence[int]) -> None:
        for number in numbers:
            targets, batches = task_data.sampler.step_plan(number).num_targets, self.ready[number]
            for batch in batches:
                # DeepSpeed divides by the batches of a step, and averages over ranks.
                loss = answer_loss(self.engine, batch) * (comm.world_size() * len(batches) / targets)
                self.engine.backward(loss)
                self.engine.step()

    def prepare(self, task_data: TaskData, numbers: Sequence[int]) -> None:
        self.ready = {n: [batch.to(comm.device()) for batch in task_data.micro_batches(n)] for n in numbers}

    def close(self) -> None:
        self.engine.destroy()


def built(setup: RunSetup) -> Any:
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


def watch(setup: RunSetup, engine: Engine, task_data: TaskData, between: Callable[[int], None]) -> list[float]:
    """The seconds of every block of the trainer's own loop; between blocks others have their turn."""
    found: list[float] = []
    began = 0.0

    class Seen(Observer):
        def log_steps(self, *records: Mapping[str, Any]) -> None:
            nonlocal began
            super().log_steps(*records)
            number = int(records[-1]["step"])
            if number % BLOCK == 0:
                if number > BLOCK:  # the first block warms up
                    found.append(time.perf_counter() - began)
                    between(number)
                began = time.perf_counter()

    recipe = setup.recipe
    (recipe.run_folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint)
    tracer = Tracer(recipe.run_folder, recipe.observe.profile)
    with Seen(recipe.run_folder, recipe.observe, comm.is_main(), setup.planned_steps()) as observer:
        scores = ScoreBoard("", (), ())
        loop = training_loop.Trainer(setup, engine, TrainState(), scores, checkpoints, observer, tracer, None)
        loop.train_task(task_data)
    return found[:-1]  # in the last one the task ends


def steps(engine: Engine, setup: RunSetup, task_data: TaskData, numbers: Sequence[int], watched: bool = True) -> None:
    with unclocked() if not watched else nullcontext():
        for number in numbers:
            plan = task_data.sampler.step_plan(number)
            engine.step(setup.method.loss, task_data.micro_batches(number), targets=plan.num_targets, lr=1e-4)
    timers.collect_timings()


@contextmanager
def unclocked() -> Iterator[None]:
    before = timers.timed_part, timers.timed_collective

    def nothing(*_: Any) -> Any:
        return nullcontext()

    timers.timed_part = timers.timed_collective = nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        timers.timed_part, timers.timed_collective = before


def seconds(work: Callable[[], Any]) -> float:
    wait()
    comm.barrier()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if comm.device().type == "cuda":
        torch.cuda.synchronize()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    assert pairs, "nothing was measured"
    return f"{statistics.median(pairs):.3f} ({min(pairs):.2f} to {max(pairs):.2f})"


def trainer(options: argparse.Namespace) -> Iterator[Found]:
    lora = {"name": "sequential", "tune": {"name": "lora", **LORA}}
    packed = {"packing": True, "global_batch": 64, "micro_batch": 16}
    cases: list[tuple[str, tuple[int, int], dict[str, Any], str]] = [
        ("full fine-tuning", LONG, {}, "≥ 1.0"),
        ("LoRA", LONG, {"method": lora}, "≥ 1.0"),
        (
            "LoRA, short samples of unlike lengths, which we pack",
            SHORT,
            {"method": lora, "train": packed},
            "≥ 1.5",
        ),
    ]
    for name, words, changed, target in cases:
        with opened(options, words, **changed) as (setup, engine):
            task_data = setup.training_data(0)
            peer = Peer(setup, task_data)
            theirs: list[float] = []

            def turn(_number: int, peer: Peer = peer, theirs: list[float] = theirs) -> None:
                theirs.append(peer.block())

            ours = watch(setup, engine, task_data, turn)
            peer.close()
            tokens = sum(task_data.sampler.step_plan(n).num_tokens for n in range(BLOCK)) / BLOCK
        yield Found(
            f"{name}: useful tokens a second, over those of Hugging Face's Trainer",
            ratio(theirs, ours),
            target,
            f"{tokens * BLOCK / statistics.median(ours):,.0f} tokens/s here",
        )


class Peer:
    """Hugging Face's Trainer on the same samples in the same order, block by block: it goes on in a thread of its own,
    which runs only while `block` waits for it."""

    def __init__(self, setup: RunSetup, task_data: TaskData) -> None:
        train = setup.recipe.train
        order = [i for n in range(task_data.sampler.num_steps) for i in task_data.sampler.step_plan(n).sample_ids]
        rows = [dict(zip(("prompt", "answer"), task_data.dataset[i], strict=True)) for i in order]
        model = find_method("sequential")(setup.recipe.method, setup.run_info).prepare(built(setup))
        arguments = TrainingArguments(
            output_dir=str(setup.recipe.run_folder / "peer"), max_steps=task_data.sampler.num_steps, save_strategy="no",
            per_device_train_batch_size=train.micro_batch, report_to=[], disable_tqdm=True, logging_steps=BLOCK,
            gradient_accumulation_steps=train.global_batch // train.micro_batch // comm.world_size(),
            learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=train.grad_clip, optim="adamw_torch_fused", weight_decay=0.0,
            bf16=train.precision == "bf16", use_cpu=comm.device().type == "cpu", remove_unused_columns=False,
            deepspeed=settings_of(setup),
        )  # fmt: skip
        pad = task_data.pad_id

        def collated(samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
            width = -(-max(len(s["prompt"]) + len(s["answer"]) for s in samples) // 8) * 8
            ids, mask, labels = (
                torch.full((len(samples), width), load_parameters) for load_parameters in (pad, 0, -100)
            )
            for row, sample in enumerate(samples):
                whole = [*sample["prompt"], *sample["answer"]]
                ids[row, : len(whole)] = torch.tensor(whole)
                mask[row, : len(whole)] = 1
                labels[row, len(sample["prompt"]) : len(whole)] = torch.tensor(list(sample["answer"]))
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        peer = self
        self._ours, self._theirs, self._left = threading.Event(), threading.Event(), False
        self._failed: BaseException | None = None

        class Turns(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                if state.global_step % BLOCK == 0:
                    wait()
                    peer._pass()
                    control.should_training_stop = peer._left
                return control

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

            def log(self, *_: Any, **__: Any) -> None:
                pass

        self.trainer = InOrder(
            model=model, args=arguments, train_dataset=rows, data_collator=collated, callbacks=[Turns()]
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._pass_on()  # its first block warms up
        assert isinstance(self.trainer.model_wrapped, deepspeed.DeepSpeedEngine), "it trains without DeepSpeed"

    def _run(self) -> None:
        self._theirs.wait()
        self._theirs.clear()
        try:
            self.trainer.train()
        except BaseException as error:
            self._failed = error
        self._ours.set()

    def _pass(self) -> None:
        self._ours.set()
        self._theirs.wait()
        self._theirs.clear()

    def _pass_on(self) -> None:
        self._theirs.set()
        self._ours.wait()
        self._ours.clear()
        if self._failed is not None:
            raise self._failed

    def block(self) -> float:
        return seconds(self._pass_on)

    def close(self) -> None:
        self._left = True
        self._theirs.set()
        self._thread.join()


def settings_of(setup: RunSetup) -> dict[str, Any]:
    """The same, as transformers wants it: what its own arguments say stands there as `auto`."""
    own = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**copy.deepcopy(deepspeed_config(setup)), **dict.fromkeys(own, "auto")}
    del settings["steps_per_print"]
    return settings


def head(options: argparse.Namespace) -> Iterator[Found]:
    here = comm.device()
    width, vocabulary, kind = HEADS["cuda" if here.type == "cuda" else "cpu"]
    targets, rows = TARGETS, MAX_LOGITS // vocabulary
    hidden = torch.randn(targets, width, device=here, dtype=kind, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=here, dtype=kind).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (targets,), device=here)

    def whole() -> None:
        logits = functional.linear(hidden, weight).float()
        functional.cross_entropy(logits, labels, reduction="sum").backward()

    def parts() -> None:
        ChunkedCrossEntropy.apply(hidden, weight, None, labels, rows, True).backward()

    def peak_of(work: Callable[[], None]) -> int:
        hidden.grad = weight.grad = None
        with MemoryTracker() as tracker:
            work()
        return tracker.peak

    peaks = [peak_of(work) for work in (parts, whole)]
    pairs = [(seconds(parts), seconds(whole)) for _ in range(options.rounds)]
    yield Found(
        f"head: {targets} targets of {vocabulary:,} words in parts of {rows}, over all at once: time",
        ratio(*zip(*pairs, strict=True)), "≤ 1.0", f"width {width}",
    )  # fmt: skip
    yield Found(
        "the same: memory that its tensors take at the peak", f"{peaks[0] / peaks[1]:.3f}", "",
        f"{peaks[0] / 2**30:.2f} GiB instead of {peaks[1] / 2**30:.2f}",
    )  # fmt: skip


def evaluation(options: argparse.Namespace) -> Iterator[Found]:
    with opened(options, LONG) as (setup, engine), torch.no_grad():
        eval_set, module, tokenizer = setup.tasks[0].eval_set, engine.module.eval(), setup.backbone.tokenizer
        labels = encode_answers(LABELS, tokenizer)

        def one_by_one() -> None:
            if comm.is_main() or engine.layout.forward_needs_all_ranks:
                for prompt in eval_set.prompt_ids:
                    for label in labels:
                        ids = torch.tensor([[*prompt, *label]], device=engine.device)
                        module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            comm.barrier()

        def together() -> None:
            evaluate_task(eval_set, engine, setup.method, tokenizer, EvaluateConfig(batch=16))

        together()
        pairs = [(seconds(one_by_one), seconds(together)) for _ in range(max(2, options.rounds // 2))]
    one, all_ = zip(*pairs, strict=True)
    took = statistics.median(all_)
    yield Found(
        f"evaluation: {len(LABELS)} labels one by one on one rank, over batches of 16{among()}", ratio(one, all_), "",
        f"{1e3 * took / len(eval_set.prompt_ids):.1f} ms a prompt here",
    )  # fmt: skip
    if comm.world_size() == 1:
        yield from left_out(setup, took)


def left_out(setup: RunSetup, took: float) -> Iterator[Found]:
    """How much of a stream's evaluation is asked for, where `took` are the seconds of one task's."""
    stream = replace(setup, tasks=setup.tasks * STREAM)
    for said in ({"tasks": "seen"}, {"tasks": "new"}, {"every": 4}, {"tasks": "new", "every": 4}):
        wanted = replace(stream, recipe=replace(setup.recipe, evaluate=EvaluateConfig(**said)))
        passes = sum(should_evaluate(wanted, task, after) for after in range(STREAM) for task in range(STREAM))
        keys = ", ".join(f"evaluate.{key}={value}" for key, value in said.items())
        yield Found(
            f"evaluation after each of {STREAM} tasks: {keys}, over all tasks each time", f"{passes / STREAM**2:.3f}",
            "", f"{passes} of {STREAM**2} evaluations, {passes * took:.1f} s of {STREAM**2 * took:.1f}",
        )  # fmt: skip


def start(options: argparse.Namespace) -> Iterator[Found]:
    with tempfile.TemporaryDirectory() as folder:
        few = argparse.Namespace(**{**vars(options), "rounds": 1})
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(document_of(few, Path(folder), LONG)), "utf-8")
        for how in ("all made anew", "tokenizer and data found"):
            began = time.time()
            words = [str(TOOLS / "bench_start.py"), str(recipe), f"run_dir={folder}/{how.replace(' ', '-')}"]
            child = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, env=subprocess_environment()
            )
            if child.returncode:
                yield Found(f"start, {how}", "", "", f"failed: status {child.returncode}; {child.stderr[-200:]!r}")
                return
            yield Found(
                f"start: seconds from `dscl train` to the end of its first step, {how}",
                *started(json.loads(child.stdout.splitlines()[-1]), began),
            )


def started(found: Mapping[str, Any], began: float) -> tuple[str, str, str]:
    """The figure of it, and the parts in the order in which they came."""
    whole, python = found["ended"] - began, found["began"] - began
    rest = whole - python - sum(found["parts"].values())
    parts = {"Python": python, **found["parts"], "the rest": rest}
    return f"{whole:.1f} s", "", ", ".join(f"{name} {took:.1f}" for name, took in parts.items())


def ranks(options: argparse.Namespace) -> Iterator[Found]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.nproc}"]
    same = [f"--{name}={getattr(options, name)}" for name in ("rounds", "hidden", "layers", "deepspeed")]
    yield from told_by(*launcher, __file__, "--section", *SEVERAL, *same)


def methods(options: argparse.Namespace) -> Iterator[Found]:
    for script, words in OWN.items():
        yield from told_by(str(TOOLS / script), *words)


def gpu(options: argparse.Namespace) -> Iterator[Found]:
    chosen = {"--shape": options.shape, "--method": options.method}
    parts = [word for name, given in chosen.items() if given for word in (name, *given)]
    yield from told_by(str(TOOLS / "bench_gpu.py"), "--rounds", str(options.rounds), *parts)


def told_by(*words: str) -> Iterator[Found]:
    """The rows of another script, as they come."""
    child = subprocess.Popen(
        [sys.executable, *words, "--json"], stdout=subprocess.PIPE, text=True, env=subprocess_environment()
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            yield Found(**json.loads(line))
        else:
            print(line, end="", file=sys.stderr, flush=True)
    if status := child.wait():
        yield Found(next(Path(word).name for word in words if word.endswith(".py")), "", "", f"failed: status {status}")


if __name__ == "__main__":
    main()
