"""The run: one task after another through one engine. Resumable at every step; the loop reads in one screen."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dscl.data.batches import Batch
from dscl.distributed import comm
from dscl.distributed.preemption import Stop
from dscl.engine.engine import Engine
from dscl.maths import scores
from dscl.methods.base import Look, Ranks
from dscl.monitoring.loss_monitor import Watch
from dscl.monitoring.observer import Observer, score_table
from dscl.monitoring.profiler import Tracer
from dscl.recipe.recipe import Recipe, read_run
from dscl.training import lm_eval, preflight
from dscl.training.checkpoint import Checkpoints, load
from dscl.training.evaluation import Mark, loss_on, take
from dscl.training.run_dir import held, refuse_another_base, refuse_another_run, write_whole
from dscl.training.setup import Job, Lesson, open_job
from dscl.utils import timers
from dscl.utils.errors import AGAIN, Failure, Stopped, UserError

log = logging.getLogger("dscl")


@dataclass
class Position:
    """Where a run stands: all that a restart needs to know besides the tensors."""

    task: int = 0  # the task that is being learned
    step: int = 0  # its steps done
    learned: bool = False  # its last step is done, its evaluation not
    total: int = 0  # steps done in the whole run
    tokens: int = 0  # seen in them
    beside: int = 0  # tokens of this task that were looked at beside its steps
    before: list[float] | None = None
    matrix: list[list[float | None]] = field(default_factory=list)
    # Where a method routes: the shares of prompts that went to their own task, and to none.
    routed: list[list[float | None]] = field(default_factory=list)
    rejected: list[list[float | None]] = field(default_factory=list)
    given: list[list[float | None]] = field(default_factory=list)  # where asked for: scores with the task given
    heldout: list[float] = field(default_factory=list)  # where asked for: before training, and after each task
    # Where a method routes: at the last evaluation, to which tasks (null: none) what share of each task's prompts went.
    went: list[list[list[Any]] | None] = field(default_factory=list)

    def name(self) -> str:
        """Of this position's checkpoint; later positions sort after earlier ones."""
        phase = "-learned" if self.learned else "-scored" if self.step == 0 and self.total else ""
        return f"step-{self.total:08d}{phase}"


def train(recipe: Recipe, stop: Stop | None = None, thorough: bool = False) -> None:
    """Train the recipe's stream, or what is left of it, and show the scores. The ranks have joined already.

    `thorough`: first see whether the cluster is fit for it.
    """
    refuse_another_run(recipe)
    if finished(recipe):
        return
    job = opened(recipe)
    refuse_needless_telling(job)
    if thorough:
        preflight.examine(job, log.info, strict=False)
    else:
        preflight.agree(job)
    with held(recipe):
        refuse_another_base(recipe, job.facts)
        follow(recipe, job, stop)
    finished(recipe)


def opened(recipe: Recipe, longest: int | None = None) -> Job:
    """The job, as all ranks have it: one of them may have prepared its data for hours."""
    job = open_job(recipe, longest)
    comm.meet()
    return job


def follow(recipe: Recipe, job: Job, stop: Stop | None) -> None:
    """Task after task, from wherever the newest checkpoint stands."""
    tracer = Tracer(recipe.folder, recipe.observe.profile)
    with tracer:
        engine = job.engine()
    with closing(engine), tracer:  # what is in memory when it runs out is still there when the tracer looks
        checkpoints = Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint)
        position = resume(checkpoints, engine, job)
        if stop is not None:
            stop.arm(recipe.checkpoint.grace)
        watched = recipe.folder, recipe.observe, comm.is_main(), job.steps(), position.total
        with Observer(*watched) as observer, checkpoints.settled():
            checkpoints.saved = observer.saved
            if missed := tracer.missed(position.total, sum(steps for _, steps in job.steps())):
                observer.note(missed)
            go_through(engine, job, position, checkpoints, observer, tracer, stop)


def go_through(
    engine: Engine,
    job: Job,
    position: Position,
    checkpoints: Checkpoints,
    observer: Observer,
    tracer: Tracer,
    stop: Stop | None,
) -> None:
    """Learn and evaluate what is left of the stream."""
    recipe = job.recipe
    observer.recipe(recipe.text())
    if position.matrix or position.before or position.heldout:
        # A kill may have come between the checkpoint and what is shown of it.
        observer.scores(publish(recipe, job, position))
    if (recipe.evaluate.before or job.heldout) and position.before is None and not position.heldout:
        began = time.perf_counter()
        if recipe.evaluate.before:
            position.before = [examine(engine, job, lesson, observer, stop).score for lesson in job.lessons]
        position.heldout += general(engine, job, observer, stop)
        took = time.perf_counter() - began
        save(checkpoints, position, engine, job)
        observer.scores(publish(recipe, job, position), took)
    while position.task < len(job.lessons):
        if not position.learned:
            learn(engine, job, job.lesson(position.task), position, checkpoints, observer, tracer, stop)
            position.learned = True
            save(checkpoints, position, engine, job)
        if job.method.together:  # there is no score after each task, only one after all of them
            missing = len(job.lessons) - 1
            position.matrix = [[None] * len(job.lessons)] * missing
            position.task += missing
        began = time.perf_counter()
        row = [
            examine(engine, job, other, observer, stop) if asked(job, index, position.task) else None
            for index, other in enumerate(job.lessons)
        ]
        position.matrix.append([mark and mark.score for mark in row])
        if recipe.evaluate.given:
            told = [
                examine(engine, job, other, observer, stop, True) if asked(job, index, position.task) else None
                for index, other in enumerate(job.lessons)
            ]
            position.given.append([mark and mark.score for mark in told])
        position.routed.append([mark and mark.routed for mark in row])
        position.rejected.append([mark and mark.rejected for mark in row])
        if any(row):  # else it was not the turn for an evaluation
            position.went = [list(map(list, mark.went)) if mark and mark.went else None for mark in row]
        position.heldout += general(engine, job, observer, stop)
        took = time.perf_counter() - began
        position.task, position.step, position.learned = position.task + 1, 0, False
        save(checkpoints, position, engine, job)
        checkpoints.settle()  # before scores.json may say that the run is complete
        observer.scores(publish(recipe, job, position), took)


def learn(
    engine: Engine,
    job: Job,
    lesson: Lesson,
    position: Position,
    checkpoints: Checkpoints,
    observer: Observer,
    tracer: Tracer,
    stop: Stop | None,
) -> None:
    """Train on one task from wherever `position` stands in it, to where it has ended."""
    recipe, name = job.recipe, lesson.task.name
    skipping = recipe.train.non_finite == "skip"
    if position.step == 0:
        ranks = ranks_of(engine, lesson, f"beginning {name}", observer, position)
        engine.start_over(job.method.begin_task(position.task, name, ranks))
    review = job.review(lesson)
    peak = recipe.observe.peak_tflops and 1e12 * recipe.observe.peak_tflops
    watch = Watch(
        engine,
        name,
        recipe.observe.every,
        skipping,
        lesson.sources,
        observer.step,
        observer.note,
        peak,
        position.tokens,
    )
    watch.begin()
    stopping = False
    for number in range(position.step, lesson.steps):
        # Each step draws from a seed of its own, so that neither a restart, nor an evaluation in between, nor the
        # tasks before this one change anything.
        torch.manual_seed(hash((recipe.seed, zlib.crc32(name.encode()), number, comm.rank())))
        plan, lr = lesson.schedule.step(number), lesson.learning_rate(number)
        position.step, position.total, position.tokens = number + 1, position.total + 1, position.tokens + plan.tokens
        last = position.step == lesson.steps
        saving = position.total % recipe.checkpoint.every == 0 and not last
        tracer.before(position.total)
        with timers.part("data"):
            batches = lesson.micro_batches(number)
            past = review.micro_batches(number % review.steps) if review is not None else []
        reviewed = review.schedule.step(number % review.steps) if review is not None else None
        if reviewed is not None:
            engine.sense(job.method.loss, past, reviewed.targets, job.method.reviewed)
            position.beside += reviewed.tokens
        loss = engine.step(
            job.method.loss,
            batches,
            targets=plan.targets,
            lr=lr,
            skip_non_finite=skipping,
            hold=last or saving or position.step % engine.hold_every == 0,
        )
        computed = sum(batch.input_ids.numel() for batch in (*batches, *past))
        watch.add(number, position.total, plan, lr, loss, last, computed, reviewed)
        with watch.aside():
            if written := tracer.after(position.total, last):
                observer.note(written)
        stopping = stopping or (stop is not None and stop.asked())
        # Where steps go unheld, one that is held comes soon; to hold this one would change what follows.
        leaving = stopping and not last and (saving or position.step % engine.hold_every == 0)
        if saving or leaving:
            watch.flush()
        with watch.aside():
            if saving or leaving:
                save(checkpoints, position, engine, job)
            else:
                checkpoints.poll()
        if leaving:
            raise Stopped(f"stopped after step {position.total}, with everything saved; {AGAIN}")
    ended = job.method.end_task(position.task, name, ranks_of(engine, lesson, f"ending {name}", observer, position))
    watch.finish({**ended.numbers, **({"tokens_beside": float(position.beside)} if position.beside else {})})
    position.beside = 0
    observer.ended(name, ended, position.total)
    checkpoints.leave(lambda: job.method.leave(recipe.folder, name))


def ranks_of(engine: Engine, lesson: Lesson, doing: str, observer: Observer, position: Position) -> Ranks:
    """What a method may ask of all ranks around this lesson's training; what it looks at is counted."""

    def batches(samples: int) -> Iterator[Batch]:
        seen = 0
        for number in range(lesson.schedule.steps_per_epoch):
            if seen >= samples:
                return
            yield from (batch.to(engine.device) for batch in lesson.micro_batches(number))
            seen += len(lesson.schedule.step(number).samples)
            position.beside += lesson.schedule.step(number).tokens

    def groups(samples: int, size: int) -> list[list[Batch]]:
        position.beside += lesson.schedule.tokens(samples)
        return lesson.groups(samples, size)

    def said(what: str, done: int, of: int) -> None:
        observer.working(f"{doing}, {what}", done, of)

    def visit(look: Look, names: Sequence[str]) -> None:
        engine.visit(look, names, lambda done, of: said("matrices", done, of))

    def refuse(problem: str) -> None:
        if problem := next(filter(None, comm.gather(problem)), ""):
            raise UserError(problem)

    return Ranks(
        device=engine.device,
        module=engine.module,
        probe=engine.probe,
        batches=batches,
        whole=engine.shards.whole,
        visit=visit,
        sum_=comm.sum_,
        said=said,
        refuse=refuse,
        samples=lambda: lesson.own,
        stretches=engine.shards.fragments,
        groups=groups,
        sense=lambda loss, batches, shown: engine.sense(loss, batches, 1, shown),
    )


def examine(
    engine: Engine, job: Job, lesson: Lesson, observer: Observer, stop: Stop | None, given: bool = False
) -> Mark:
    def said(done: int, of: int) -> None:
        observer.evaluating(lesson.task.name, done, of)
        leave_evaluation(stop)

    return take(lesson.exam, engine, job.method, job.backbone.tokenizer, job.recipe.evaluate, said, given)


def leave_evaluation(stop: Stop | None) -> None:
    """The checkpoint that came before an evaluation holds everything."""
    if stop is not None and stop.asked():
        raise Stopped(f"stopped in an evaluation, before which everything was saved; {AGAIN}")


def general(engine: Engine, job: Job, observer: Observer, stop: Stop | None) -> list[float]:
    """The loss on held-out texts, where there are any."""
    if not job.heldout:
        return []

    def said(done: int, of: int) -> None:
        observer.evaluating("held-out texts", done, of)
        leave_evaluation(stop)

    return [loss_on(job.heldout, engine, job.method, job.backbone.tokenizer, said)]


def asked(job: Job, task: int, after: int) -> bool:
    """Whether a task is evaluated after that one has been learnt."""
    settings = job.recipe.evaluate
    if after + 1 == len(job.lessons):
        return True
    wanted = {"all": True, "seen": task <= after, "new": task == after}
    return (after + 1) % settings.every == 0 and wanted[settings.tasks]


def save(checkpoints: Checkpoints, position: Position, engine: Engine, job: Job) -> None:
    checkpoints.save(position.name(), dataclasses.asdict(position), engine, job.method)


def resume(checkpoints: Checkpoints, engine: Engine, job: Job) -> Position:
    """Go on from the newest whole checkpoint, or start from nothing."""
    newest = checkpoints.newest()
    if newest is None:
        return Position()
    position = restore(newest, engine, job)
    log.info("resumed from %s: task %d of %d", newest.name, min(position.task + 1, len(job.lessons)), len(job.lessons))
    return position


def restore(folder: Path, engine: Engine, job: Job) -> Position:
    """Bring the engine and the method to where they were at this checkpoint."""
    position = Position(**load(folder, engine, job.method))
    ended = [lesson.task.name for lesson in job.lessons[: position.task + position.learned]]
    job.method.recall(job.recipe.folder, ended)
    return position


def publish(recipe: Recipe, job: Job, position: Position) -> dict[str, Any]:
    """Write `scores.json`."""
    document = scores.build(
        method=recipe.method.name,
        tasks=[lesson.task.name for lesson in job.lessons],
        metrics=[lesson.task.metric for lesson in job.lessons],
        matrix=position.matrix,
        before=position.before,
        complete=position.task == len(job.lessons),
    )
    if any(share is not None for row in position.routed for share in row):
        document |= {"routed": position.routed, "rejected": position.rejected}
        document["confusion"] = confusion(document["tasks"], position)
    if position.given:
        document["given"] = {"matrix": position.given, "summary": scores.summary(position.given)}
    if position.heldout:
        document["heldout"] = position.heldout
    if comm.is_main():
        path = recipe.folder / "scores.json"
        try:
            write_whole(path, json.dumps(document, indent=1))
        except OSError as error:
            raise Failure(f"{path}: cannot be written ({error.strerror}); make room and run again to go on") from None
    return document


def confusion(tasks: Sequence[str], position: Position) -> dict[str, Any]:
    """Whose prompts were answered by whom, at the last evaluation."""
    asked = {task: dict(map(tuple, found)) for task, found in zip(tasks, position.went, strict=False) if found}
    names = [*tasks, None]
    shares = [[found.get(name, 0.0) for name in names] for found in asked.values()]
    return {"tasks": list(asked), "answered_by": names, "shares": shares}


def refuse_needless_telling(job: Job) -> None:
    """Evaluating with the task given as well is for methods that else find it out."""
    if job.recipe.evaluate.given and not job.method.decides:
        how = "is told every prompt's task anyway" if job.method.by_task else "answers alike whatever the task"
        raise UserError(f"evaluate.given: given true, but this method ({job.recipe.method.name}) {how}; remove it")


def finished(recipe: Recipe) -> bool:
    """Whether the run in this directory is complete; if so, its scores and where to look are shown."""
    try:
        document: dict[str, Any] = json.loads((recipe.folder / "scores.json").read_text("utf-8"))
    except (OSError, ValueError):  # not there yet; a damaged one is written anew from the checkpoint
        return False
    if not document.get("complete"):
        return False
    if comm.is_main():
        print(f"\n{score_table(document)}\n")
        print(f"complete: {recipe.run_dir} (scores.json, metrics.jsonl, checkpoints/)")
        print(f"look:     {sys.executable} -m tensorboard.main --logdir {recipe.folder / 'tensorboard'}")
        print("again:    remove that folder, or give another run_dir", flush=True)
    return True


def diagnose(recipe: Recipe) -> None:
    """`dscl doctor`: whether the cluster is fit for this recipe; nothing is trained."""
    job = opened(recipe)
    preflight.examine(job, lambda line: print(line, flush=True) if comm.is_main() else None)


def rehearse(recipe: Recipe) -> None:
    """`--dry-run`: build and check everything up to the first step, say what would happen, and write no run."""
    job = opened(recipe)
    with closing(job.engine()) as engine:
        names = engine.shards.fingerprints()
        sizes = {
            name: p.ds_numel if hasattr(p, "ds_numel") else p.numel() for name, p in engine.module.named_parameters()
        }
    if not comm.is_main():
        return
    trained = sum(sizes[name] for name in names)
    print(recipe.text())
    print(f"model:    {sum(sizes.values()):,} parameters, of which {trained:,} train ({recipe.method.name})")
    print(f"ranks:    {comm.world()} on {engine.device.type}, ZeRO stage {engine.stage} ({recipe.deepspeed_path()})")
    steps = [count for _, count in job.steps()]
    for number, lesson in enumerate(job.lessons):
        task, epochs = lesson.task, lesson.schedule.steps // lesson.schedule.steps_per_epoch
        tokens = int(lesson.data.prompt_lengths.sum() + lesson.data.answer_lengths.sum())
        taken = f"{steps[number]} steps" if number < len(steps) else "with the first"
        print(
            f"task:     {task.name}: {len(task.train)} train, {len(task.dev)} dev, {len(task.test)} test samples; "
            f"{tokens:,} tokens an epoch, {epochs} epochs, {taken}; {task.metric}"
        )
    print(f"steps:    {sum(steps)} in all; nothing was trained", flush=True)


def evaluate(
    run_dir: str,
    assignments: Sequence[str],
    general: Sequence[str] = (),
    limit: int | None = None,
    which: str | None = None,
) -> None:
    """`dscl eval`: a checkpoint of a run on all its tasks, as one line of JSON; and on lm-eval's `general`."""
    recipe = read_run(run_dir, assignments)
    # Prompts keep the room for answers that they had in training.
    job = opened(recipe, read_run(run_dir).evaluate.max_new_tokens)
    refuse_needless_telling(job)
    with closing(job.engine()) as engine:
        chosen = Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint).find(which)
        if chosen is None:
            raise UserError(f"{run_dir}: no checkpoint there yet; train first")
        position = restore(chosen, engine, job)
        asked_too = lm_eval.ask(general, limit, engine, job.backbone.tokenizer, recipe.evaluate.batch)
        marks = {
            lesson.task.name: take(lesson.exam, engine, job.method, job.backbone.tokenizer, recipe.evaluate)
            for lesson in job.lessons
        }
        told = {
            lesson.task.name: take(
                lesson.exam, engine, job.method, job.backbone.tokenizer, recipe.evaluate, given=True
            ).score
            for lesson in job.lessons
            if recipe.evaluate.given
        }
        heldout = [loss_on(job.heldout, engine, job.method, job.backbone.tokenizer)] if job.heldout else []
    found: dict[str, Any] = {"checkpoint": chosen.name, "tasks_trained": position.task}
    found["scores"] = {name: mark.score for name, mark in marks.items()}
    if any(mark.routed is not None for mark in marks.values()):
        found["routed"] = {name: mark.routed for name, mark in marks.items()}
        found["rejected"] = {name: mark.rejected for name, mark in marks.items()}
    if told:
        found["given"] = told
    if heldout:
        found["heldout"] = heldout[0]
    if asked_too:
        found["lm_eval"] = asked_too
    if comm.is_main():
        print(json.dumps(found), flush=True)
