"""A job: everything that a run is made of, read and checked in the order in which mistakes are cheapest to tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dscl.config.deepspeed_json import read_settings
from dscl.data.batches import Batch, Schedule, collate
from dscl.data.encode import answer_room, bos_id, encode, encode_answers, encode_prompts, fingerprint
from dscl.data.replay_buffer import Joined, Samples
from dscl.data.stream import load_stream
from dscl.data.task import Task
from dscl.data.texts import encode_texts, read_texts
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.maths.schedule import learning_rate
from dscl.methods.base import Facts, Method
from dscl.methods.registry import find_method
from dscl.model.backbone import DTYPES, Backbone, open_backbone
from dscl.model.tokenizer import pad_id
from dscl.recipe.recipe import Recipe
from dscl.training.evaluation import Exam
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")


@dataclass(frozen=True)
class Lesson:
    """One task, ready to be trained on and examined."""

    task: Task
    data: Samples
    schedule: Schedule
    exam: Exam
    packing: bool
    pad: int
    bos: int | None
    peak: float
    decay: str
    warmup: float
    planned: Callable[[Samples, int], Schedule]  # of samples that are gone through so often
    epochs: int
    mixed: tuple[str, ...] = ()  # whose samples follow the task's own

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def own(self) -> Samples:
        """The task's own samples, without those mixed in."""
        return self.data.parts[0] if isinstance(self.data, Joined) else self.data

    def micro_batches(self, step: int) -> list[Batch]:
        rows = self.schedule.micro_batches(step, comm.rank())
        first = step < self.schedule.steps_per_epoch
        return [collate(batch, self.data, self.pad, self.packing, self.bos, first) for batch in rows]

    def groups(self, samples: int, size: int) -> list[list[Batch]]:
        """Some of the samples in groups that do not depend on the ranks; each as this rank's micro-batches."""
        groups = self.schedule.groups(samples, size, comm.rank())
        return [[collate(rows, self.data, self.pad, self.packing, self.bos) for rows in group] for group in groups]

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, peak=self.peak, kind=self.decay, warmup=self.warmup)

    def sources(self, step: int) -> list[str]:
        """The records that step `step` learns from, over all ranks."""
        return [self._source(i) for i in self.schedule.step(step).samples]

    def _source(self, sample: int) -> str:
        if not isinstance(self.data, Joined):
            return self.task.train[sample].source
        part, place = self.data.place(sample)
        return f"{self.mixed[part - 1]}, sample {place} of those mixed in" if part else self.task.train[place].source

    def mixed_with(self, others: Sequence[tuple[str, Samples]]) -> Lesson:
        """With samples of other tasks, shuffled among the task's own."""
        if not others:
            return self
        data = Joined([self.data, *(samples for _, samples in others)])
        mixed = tuple(name for name, _ in others)
        return replace(self, data=data, schedule=self.planned(data, self.epochs), mixed=mixed)


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    settings: dict[str, Any]  # DeepSpeed's
    backbone: Backbone
    method: Method
    lessons: tuple[Lesson, ...]
    heldout: list[list[int]]  # texts that show what the model can do in general
    facts: Facts

    def lesson(self, index: int) -> Lesson:
        """A task as it is trained: with what the method mixes in, or all tasks as one."""
        if not self.method.together:
            return self.lessons[index].mixed_with([(kept.task, kept) for kept in self.method.mixed_in()])
        first, *others = self.lessons
        if any(lesson.epochs != first.epochs for lesson in others):  # once through as many copies of each
            once = replace(first, epochs=1)
            parts = [(lesson.task.name, lesson.data) for lesson in self.lessons for _ in range(lesson.epochs)]
            whole = once.mixed_with(parts[1:])
        else:
            whole = first.mixed_with([(lesson.task.name, lesson.data) for lesson in others])
        return replace(whole, task=replace(first.task, name=f"all {len(self.lessons)} tasks"))

    def review(self, lesson: Lesson) -> Lesson | None:
        """What is gone through beside a lesson, batch by batch, only to see its gradient."""
        kept = self.method.reviews()
        if not kept:
            return None
        data = Joined(kept)
        return replace(lesson, data=data, schedule=lesson.planned(data, lesson.epochs))

    def steps(self) -> list[tuple[str, int]]:
        """What is trained, one after the other, and how many steps each takes."""
        if self.method.together:
            return [(self.lesson(0).task.name, self.lesson(0).steps)]
        found: list[tuple[str, int]] = []
        ended: list[int] = []
        batch = self.recipe.train.global_batch
        for lesson in self.lessons:
            samples = len(lesson.data) + sum(self.method.mixes(ended))
            found.append((lesson.task.name, lesson.epochs * -(-samples // batch)))
            ended.append(len(lesson.data))
        return found

    def engine(self) -> Engine:
        train = self.recipe.train
        if train.precision == "bf16" and comm.device().type == "cpu" and not _has_bf16(torch.cpu.get_capabilities()):
            log.warning(
                "train.precision: this CPU emulates bf16, many times slower than fp32; set train.precision=fp32 here"
            )
        return Engine(
            self.settings,
            build=self.backbone.build,
            read=self.backbone.weights.read,
            prepare=self.method.prepare,
            constraint=self.method.constraint,
            steering=self.method.steering,
            precision=train.precision,
            micro_batch=train.micro_batch,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
        )


def open_job(recipe: Recipe, longest: int | None = None) -> Job:
    """Read and check everything that can be without building the model.

    `longest`: the tokens that prompts leave free for answers, where they are not evaluate.max_new_tokens.
    """
    settings = read_settings(recipe.deepspeed_path())
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

    backbone = open_backbone(
        recipe.model,
        seed=recipe.seed,
        dtype=DTYPES[recipe.train.precision],
        cache=recipe.data.cache,
        texts=texts,
    )
    # One limit for the whole stream, so that a prompt is read the same whichever task it belongs to.
    longest = recipe.evaluate.max_new_tokens if longest is None else longest
    room = max(answer_room(task.labels, backbone.tokenizer, longest) for task in tasks)
    lessons = tuple(_lesson(recipe, task, backbone, room) for task in tasks)
    facts = Facts(
        seed=recipe.seed,
        tasks=tuple(task.name for task in tasks),
        base=str(recipe.model.name or "model.shape"),
        model=backbone.fingerprint(),
        tokenizer=fingerprint(backbone.tokenizer),
        prompt_limit=recipe.train.max_length - room,
        precision=recipe.train.precision,
    )
    method = find_method(recipe.method.name)(recipe.method, facts)
    if method.together:
        _refuse_own_rates(recipe.method.name, tasks)
    heldout: list[list[int]] = []
    if recipe.evaluate.heldout is not None:
        texts_there = read_texts(recipe.evaluate.heldout, "evaluate.heldout")
        heldout = encode_texts(texts_there, backbone.tokenizer, recipe.train.max_length)
    return Job(recipe, settings, backbone, method, lessons, heldout, facts)


def _refuse_own_rates(method: str, tasks: Sequence[Task]) -> None:
    values = {task.name: task.settings.lr for task in tasks}
    if len(set(values.values())) > 1:
        raise UserError(
            f"stream: given {', '.join(f'lr {value} for {task}' for task, value in values.items())}; method {method} "
            "learns all tasks as one, so leave these out and set train.lr"
        )


def _has_bf16(capabilities: Mapping[str, Any]) -> bool:
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _lesson(recipe: Recipe, task: Task, backbone: Backbone, room: int) -> Lesson:
    train, tokenizer = recipe.train, backbone.tokenizer
    bos = bos_id(tokenizer)
    ranked = task.labels is not None and recipe.evaluate.mode == "rank"
    data = encode(task.train, tokenizer, max_length=train.max_length, cache=recipe.data.cache, room=room)
    examined = task.test if recipe.evaluate.split == "test" else task.dev
    if not examined:
        raise UserError(f"evaluate.split: given dev, but task {task.name} has no dev split; set its dev_share above 0")
    prompts = encode_prompts(examined, tokenizer, max_length=train.max_length, room=room)
    for split, cut, count in (("training", data.cut, len(data)), (recipe.evaluate.split, prompts.cut, len(examined))):
        if cut and comm.is_main():
            log.warning(
                "task %s: %d of %d %s prompts are longer than train.max_length=%d allows and lose their beginning",
                task.name, cut, count, split, train.max_length,
            )  # fmt: skip

    epochs = task.settings.epochs or train.epochs

    def planned(samples: Samples, times: int) -> Schedule:
        return Schedule(
            samples.prompt_lengths,
            samples.answer_lengths,
            seed=recipe.seed,
            epochs=times,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            world=comm.world(),
            max_length=train.max_length,
            packing=train.packing,
        )

    return Lesson(
        task=task,
        data=data,
        schedule=planned(data, epochs),
        exam=Exam(task, examined, prompts.ids, encode_answers(task.labels or (), tokenizer) if ranked else None, bos),
        packing=train.packing,
        pad=pad_id(tokenizer),
        bos=bos,
        peak=task.settings.lr or train.lr,
        decay=train.schedule,
        warmup=train.warmup,
        planned=planned,
        epochs=epochs,
    )
