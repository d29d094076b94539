"""The setup of a run: model, data, method and settings, read and checked before the engine is built.

The cheapest checks come first, so that a mistake in the recipe is reported early.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dscl.config.deepspeed_json import read_deepspeed_json
from dscl.data.batches import Batch, BatchSampler, collate
from dscl.data.encode import (
    answer_token_budget,
    encode_answers,
    encode_dataset,
    encode_prompts,
    prepended_bos_id,
    tokenizer_fingerprint,
)
from dscl.data.replay_buffer import ConcatenatedDataset, TokenizedDataset
from dscl.data.stream import load_stream
from dscl.data.task import Task
from dscl.data.texts import encode_texts, read_texts
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.maths.schedule import learning_rate
from dscl.methods.base import Method, RunInfo
from dscl.methods.registry import find_method
from dscl.model.backbone import DTYPES, Backbone, resolve_backbone
from dscl.model.tokenizer import pad_id
from dscl.recipe.recipe import Recipe
from dscl.training.evaluation import EvalSet
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")


@dataclass(frozen=True)
class TaskData:
    """A task's training data with its batch sampler and learning rates, and its evaluation set."""

    task: Task
    dataset: TokenizedDataset
    sampler: BatchSampler
    eval_set: EvalSet
    packing: bool
    pad_id: int
    bos_id: int | None
    peak_lr: float
    lr_schedule: str
    warmup: float
    build_sampler: Callable[[TokenizedDataset, int], BatchSampler]  # dataset, epochs → sampler
    epochs: int
    mixed_in_tasks: tuple[str, ...] = ()  # names; their samples follow the task's own in `dataset`

    @property
    def num_steps(self) -> int:
        return self.sampler.num_steps

    @property
    def own_dataset(self) -> TokenizedDataset:
        """The task's own samples, without those of other tasks."""
        return self.dataset.datasets[0] if isinstance(self.dataset, ConcatenatedDataset) else self.dataset

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` of this task."""
        rows = self.sampler.micro_batches(step, comm.rank())
        first_epoch = step < self.sampler.steps_per_epoch
        return [collate(batch, self.dataset, self.pad_id, self.packing, self.bos_id, first_epoch) for batch in rows]

    def grouped_micro_batches(self, samples: int, size: int) -> list[list[Batch]]:
        """`samples` samples in groups of `size`; of each group, this rank's micro-batches.

        Which samples form a group does not depend on the number of ranks.
        """
        groups = self.sampler.grouped_micro_batches(samples, size, comm.rank())
        return [
            [collate(rows, self.dataset, self.pad_id, self.packing, self.bos_id) for rows in group] for group in groups
        ]

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.num_steps, peak=self.peak_lr, kind=self.lr_schedule, warmup=self.warmup)

    def sample_sources(self, step: int) -> list[str]:
        """Where the samples of step `step` come from (file and record), over all ranks; for messages."""
        return [self._source(i) for i in self.sampler.step_plan(step).sample_ids]

    def _source(self, sample: int) -> str:
        if not isinstance(self.dataset, ConcatenatedDataset):
            return self.task.train[sample].source
        part, index = self.dataset.locate(sample)
        if part == 0:
            return self.task.train[index].source
        return f"{self.mixed_in_tasks[part - 1]}, replayed sample {index}"

    def mix_with(self, others: Sequence[tuple[str, TokenizedDataset]]) -> TaskData:
        """A copy whose samples include those of other tasks, shuffled among the task's own."""
        if not others:
            return self
        dataset = ConcatenatedDataset([self.dataset, *(samples for _, samples in others)])
        names = tuple(name for name, _ in others)
        return replace(self, dataset=dataset, sampler=self.build_sampler(dataset, self.epochs), mixed_in_tasks=names)


@dataclass(frozen=True)
class RunSetup:
    """Everything a run needs: its recipe, model, method and data, all checked; the engine is not built yet."""

    recipe: Recipe
    deepspeed_settings: dict[str, Any]  # the content of DeepSpeed's JSON
    backbone: Backbone
    method: Method
    tasks: tuple[TaskData, ...]
    heldout_texts: list[list[int]]  # token ids of texts that no task trains on
    run_info: RunInfo

    def training_data(self, index: int) -> TaskData:
        """What task `index` trains on: its own data with replayed samples, or (joint training) all tasks as one."""
        if not self.method.joint:
            return self.tasks[index].mix_with([(buffer.task, buffer) for buffer in self.method.replay_samples()])
        first, *others = self.tasks
        if any(task_data.epochs != first.epochs for task_data in others):
            # Tasks have different epochs: a single epoch over as many copies of each task as it has epochs.
            copies = [
                (task_data.task.name, task_data.dataset) for task_data in self.tasks for _ in range(task_data.epochs)
            ]
            joint = replace(first, epochs=1).mix_with(copies[1:])
        else:
            joint = first.mix_with([(task_data.task.name, task_data.dataset) for task_data in others])
        return replace(joint, task=replace(first.task, name=f"all {len(self.tasks)} tasks"))

    def reference_data(self, task_data: TaskData) -> TaskData | None:
        """Samples of earlier tasks whose gradient the method sees at every step (A-GEM); None where it needs none."""
        buffers = self.method.reference_samples()
        if not buffers:
            return None
        dataset = ConcatenatedDataset(buffers)
        return replace(task_data, dataset=dataset, sampler=task_data.build_sampler(dataset, task_data.epochs))

    def planned_steps(self) -> list[tuple[str, int]]:
        """Names of the tasks in training order, each with its number of optimizer steps, replayed samples included."""
        if self.method.joint:
            return [(self.training_data(0).task.name, self.training_data(0).num_steps)]
        steps: list[tuple[str, int]] = []
        finished_sizes: list[int] = []
        global_batch = self.recipe.train.global_batch
        for task_data in self.tasks:
            num_samples = len(task_data.dataset) + sum(self.method.replay_counts(finished_sizes))
            steps.append((task_data.task.name, task_data.epochs * -(-num_samples // global_batch)))
            finished_sizes.append(len(task_data.dataset))
        return steps

    def build_engine(self) -> Engine:
        """Build the model and wrap it, the method's parts and the optimizer in the DeepSpeed engine."""
        train = self.recipe.train
        if (
            train.precision == "bf16"
            and comm.device().type == "cpu"
            and not _cpu_has_bf16(torch.cpu.get_capabilities())
        ):
            log.warning(
                "train.precision: this CPU emulates bf16, many times slower than fp32; set train.precision=fp32 here"
            )
        return Engine(
            self.deepspeed_settings,
            build=self.backbone.build,
            read=self.backbone.weights.read,
            prepare=self.method.prepare,
            constraint=self.method.constraint,
            gradient_hook=self.method.gradient_hook,
            precision=train.precision,
            micro_batch=train.micro_batch,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
        )


def build_setup(recipe: Recipe, max_answer_tokens: int | None = None) -> RunSetup:
    """Read and check everything that can be read without building the model.

    `max_answer_tokens`: how many tokens a prompt leaves free for its answer; evaluate.max_new_tokens by default.
    """
    deepspeed_settings = read_deepspeed_json(recipe.find_deepspeed_json())
    if recipe.train.packing and recipe.train.micro_batch > 1 and recipe.model.attention == "flash_attention_2":
        raise UserError(
            f"train.micro_batch: given {recipe.train.micro_batch}; with train.packing and model.attention="
            "flash_attention_2 only 1 is allowed, since flash attention separates packed samples only in a single row; "
            "set train.micro_batch=1 (and a larger train.max_length), or model.attention=sdpa"
        )
    tasks = load_stream(recipe.stream, recipe.data, recipe.seed)

    def texts() -> Iterator[str]:
        for task in tasks:
            for sample in task.train:
                yield f"{sample.prompt} {sample.answer}"

    backbone = resolve_backbone(
        recipe.model,
        seed=recipe.seed,
        dtype=DTYPES[recipe.train.precision],
        cache=recipe.data.cache,
        texts=texts,
    )
    # The whole stream shares one prompt limit, so that a prompt is truncated alike whichever task it belongs to.
    max_answer_tokens = recipe.evaluate.max_new_tokens if max_answer_tokens is None else max_answer_tokens
    answer_budget = max(answer_token_budget(task.labels, backbone.tokenizer, max_answer_tokens) for task in tasks)
    loaded_tasks = tuple(_load_task_data(recipe, task, backbone, answer_budget) for task in tasks)
    run_info = RunInfo(
        seed=recipe.seed,
        task_names=tuple(task.name for task in tasks),
        base_model=str(recipe.model.name or "model.shape"),
        model=backbone.fingerprint(),
        tokenizer=tokenizer_fingerprint(backbone.tokenizer),
        prompt_limit=recipe.train.max_length - answer_budget,
        precision=recipe.train.precision,
    )
    method = find_method(recipe.method.name)(recipe.method, run_info)
    if method.joint:
        _reject_different_task_rates(recipe.method.name, tasks)
    heldout_texts: list[list[int]] = []
    if recipe.evaluate.heldout is not None:
        raw_texts = read_texts(recipe.evaluate.heldout, "evaluate.heldout")
        heldout_texts = encode_texts(raw_texts, backbone.tokenizer, recipe.train.max_length)
    return RunSetup(recipe, deepspeed_settings, backbone, method, loaded_tasks, heldout_texts, run_info)


def _reject_different_task_rates(method: str, tasks: Sequence[Task]) -> None:
    rates = {task.name: task.settings.lr for task in tasks}
    if len(set(rates.values())) > 1:
        raise UserError(
            f"stream: given {', '.join(f'lr {lr} for {task}' for task, lr in rates.items())}; method {method} "
            "learns all tasks as one, so leave these out and set train.lr"
        )


def _cpu_has_bf16(cpu_capabilities: Mapping[str, Any]) -> bool:
    return any(cpu_capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _load_task_data(recipe: Recipe, task: Task, backbone: Backbone, answer_budget: int) -> TaskData:
    """Tokenize a task's training and evaluation samples; warn where prompts are too long."""
    train, tokenizer = recipe.train, backbone.tokenizer
    bos_id = prepended_bos_id(tokenizer)
    ranks_labels = task.labels is not None and recipe.evaluate.mode == "rank"
    dataset = encode_dataset(
        task.train, tokenizer, max_length=train.max_length, cache=recipe.data.cache, answer_budget=answer_budget
    )
    eval_samples = task.test if recipe.evaluate.split == "test" else task.dev
    if not eval_samples:
        raise UserError(f"evaluate.split: given dev, but task {task.name} has no dev split; set its dev_share above 0")
    prompts = encode_prompts(eval_samples, tokenizer, max_length=train.max_length, answer_budget=answer_budget)
    for split, num_truncated, num_samples in (
        ("training", dataset.num_truncated, len(dataset)),
        (recipe.evaluate.split, prompts.num_truncated, len(eval_samples)),
    ):
        if num_truncated and comm.is_main():
            log.warning(
                "task %s: %d of %d %s prompts are longer than train.max_length=%d allows and lose their beginning",
                task.name, num_truncated, num_samples, split, train.max_length,
            )  # fmt: skip

    epochs = task.settings.epochs or train.epochs

    def build_sampler(dataset: TokenizedDataset, epochs: int) -> BatchSampler:
        return BatchSampler(
            dataset.prompt_lengths,
            dataset.answer_lengths,
            seed=recipe.seed,
            epochs=epochs,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            world_size=comm.world_size(),
            max_length=train.max_length,
            packing=train.packing,
        )

    return TaskData(
        task=task,
        dataset=dataset,
        sampler=build_sampler(dataset, epochs),
        eval_set=EvalSet(
            task,
            eval_samples,
            prompts.ids,
            encode_answers(task.labels or (), tokenizer) if ranks_labels else None,
            bos_id,
        ),
        packing=train.packing,
        pad_id=pad_id(tokenizer),
        bos_id=bos_id,
        peak_lr=task.settings.lr or train.lr,
        lr_schedule=train.schedule,
        warmup=train.warmup,
        build_sampler=build_sampler,
        epochs=epochs,
    )
