"""The training loop: one task after another through one engine, resumable from any checkpoint."""

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
from dscl.distributed.preemption import StopHandler
from dscl.engine.engine import Engine
from dscl.maths import scores
from dscl.methods.base import MatrixFn, TaskContext
from dscl.monitoring.loss_monitor import LossMonitor
from dscl.monitoring.observer import Observer, score_table
from dscl.monitoring.profiler import Tracer
from dscl.recipe.recipe import Recipe, read_run_recipe
from dscl.training import lm_eval, preflight
from dscl.training.checkpoint import Checkpoints, load_checkpoint
from dscl.training.evaluation import EvalResult, evaluate_task, mean_token_loss
from dscl.training.run_dir import lock_run_dir, reject_other_base_model, reject_other_recipe, write_text_atomically
from dscl.training.setup import RunSetup, TaskData, build_setup
from dscl.utils import timers
from dscl.utils.errors import RERUN_HINT, ExternalFailure, RunStopped, UserError

log = logging.getLogger("dscl")


@dataclass
class TrainState:
    """Progress and scores of a run: all that a restart needs besides tensors. Saved as "position" in state.json."""

    task: int = 0  # index of the current task
    step: int = 0  # optimizer steps done in the current task
    learned: bool = False  # the current task is trained, but not evaluated yet
    total: int = 0  # optimizer steps done in the whole run
    tokens: int = 0  # tokens trained on in the whole run
    beside: int = 0  # tokens of the current task that passed the model outside of its training steps
    before: list[float] | None = None  # scores before training (evaluate.zero_shot)
    # Row i: the scores of all tasks after training task i; None where a task was not evaluated.
    matrix: list[list[float | None]] = field(default_factory=list)
    # Likewise, if the method infers tasks: the shares of prompts that were routed to their own task, and to no task.
    routed: list[list[float | None]] = field(default_factory=list)
    rejected: list[list[float | None]] = field(default_factory=list)
    given: list[list[float | None]] = field(default_factory=list)  # scores with the true task id
    heldout: list[float] = field(default_factory=list)  # losses: before training, then after each task
    # Likewise, at the last evaluation: for each task, pairs (task or None, share of the prompts routed to it).
    went: list[list[list[Any]] | None] = field(default_factory=list)

    def checkpoint_name(self) -> str:
        """The name of this state's checkpoint folder; names sort in the order of training."""
        phase = "-learned" if self.learned else "-scored" if self.step == 0 and self.total else ""
        return f"step-{self.total:08d}{phase}"


def train(recipe: Recipe, stop: StopHandler | None = None, check_cluster: bool = False) -> None:
    """`dscl train`: train the recipe's stream, or resume it, and print the scores. Called on every rank.

    `check_cluster`: run the checks of `dscl doctor` first.
    """
    reject_other_recipe(recipe)
    if report_if_complete(recipe):
        return
    setup = build_setup_on_all_ranks(recipe)
    reject_needless_oracle_evaluation(setup)
    if check_cluster:
        preflight.run_checks(setup, log.info, strict=False)
    else:
        preflight.require_consistent_ranks(setup)
    with lock_run_dir(recipe):
        reject_other_base_model(recipe, setup.run_info)
        run(recipe, setup, stop)
    report_if_complete(recipe)


def build_setup_on_all_ranks(recipe: Recipe, max_answer_tokens: int | None = None) -> RunSetup:
    """`build_setup`, then wait for all ranks without a timeout: preparing the data may take one of them hours."""
    setup = build_setup(recipe, max_answer_tokens)
    comm.wait_for_all_ranks()
    return setup


def run(recipe: Recipe, setup: RunSetup, stop: StopHandler | None) -> None:
    """Build the engine, resume from the newest checkpoint and train what is left of the stream."""
    tracer = Tracer(recipe.run_folder, recipe.observe.profile)
    with tracer:
        engine = setup.build_engine()
    with closing(engine), tracer:  # the tracer exits first: after an out-of-memory error it dumps the memory
        checkpoints = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint)
        train_state = resume_from_newest(checkpoints, engine, setup)
        if stop is not None:
            stop.enable_graceful_stop(recipe.checkpoint.grace)
        planned_steps = setup.planned_steps()
        observer = Observer(recipe.run_folder, recipe.observe, comm.is_main(), planned_steps, train_state.total)
        with observer, checkpoints.finish_pending_on_exit():
            checkpoints.on_saved = observer.log_save_time
            if message := tracer.explain_untraced(train_state.total, sum(steps for _, steps in planned_steps)):
                observer.print_message(message)
            train_stream(engine, setup, train_state, checkpoints, observer, tracer, stop)


def train_stream(
    engine: Engine,
    setup: RunSetup,
    train_state: TrainState,
    checkpoints: Checkpoints,
    observer: Observer,
    tracer: Tracer,
    stop: StopHandler | None,
) -> None:
    """Train and evaluate every task from `train_state` on; save a checkpoint and the scores after each."""
    recipe = setup.recipe
    observer.log_recipe(recipe.to_yaml())
    if train_state.matrix or train_state.before or train_state.heldout:
        # The run may have been killed after it saved a checkpoint and before it wrote the scores.
        observer.log_scores(write_scores(recipe, setup, train_state))
    if (recipe.evaluate.zero_shot or setup.heldout_texts) and train_state.before is None and not train_state.heldout:
        started = time.perf_counter()
        if recipe.evaluate.zero_shot:
            train_state.before = [
                evaluate_with_progress(engine, setup, task_data, observer, stop).score for task_data in setup.tasks
            ]
        train_state.heldout += heldout_loss(engine, setup, observer, stop)
        seconds = time.perf_counter() - started
        save_checkpoint(checkpoints, train_state, engine, setup)
        observer.log_scores(write_scores(recipe, setup, train_state), seconds)
    while train_state.task < len(setup.tasks):
        if not train_state.learned:
            task_data = setup.training_data(train_state.task)
            train_task(engine, setup, task_data, train_state, checkpoints, observer, tracer, stop)
            train_state.learned = True
            save_checkpoint(checkpoints, train_state, engine, setup)
        if setup.method.joint:  # joint training has scores after the last task only
            skipped = len(setup.tasks) - 1
            train_state.matrix = [[None] * len(setup.tasks)] * skipped
            train_state.task += skipped
        started = time.perf_counter()
        row = [
            evaluate_with_progress(engine, setup, task_data, observer, stop)
            if should_evaluate(setup, index, train_state.task)
            else None
            for index, task_data in enumerate(setup.tasks)
        ]
        train_state.matrix.append([result and result.score for result in row])
        if recipe.evaluate.oracle_task_id:
            oracle_row = [
                evaluate_with_progress(engine, setup, task_data, observer, stop, oracle_task_id=True)
                if should_evaluate(setup, index, train_state.task)
                else None
                for index, task_data in enumerate(setup.tasks)
            ]
            train_state.given.append([result and result.score for result in oracle_row])
        train_state.routed.append([result and result.routing_accuracy for result in row])
        train_state.rejected.append([result and result.rejected_share for result in row])
        if any(row):  # False where no task was due for evaluation
            train_state.went = [
                list(map(list, result.routing_shares)) if result and result.routing_shares else None for result in row
            ]
        train_state.heldout += heldout_loss(engine, setup, observer, stop)
        seconds = time.perf_counter() - started
        train_state.task, train_state.step, train_state.learned = train_state.task + 1, 0, False
        save_checkpoint(checkpoints, train_state, engine, setup)
        checkpoints.finish_pending()  # before scores.json may say that the run is complete
        observer.log_scores(write_scores(recipe, setup, train_state), seconds)


def train_task(
    engine: Engine,
    setup: RunSetup,
    task_data: TaskData,
    train_state: TrainState,
    checkpoints: Checkpoints,
    observer: Observer,
    tracer: Tracer,
    stop: StopHandler | None,
) -> None:
    """Train one task from step `train_state.step` to its end, and end it with the method.

    Raises `RunStopped` after a checkpoint if `stop` asks for it.
    """
    recipe, name = setup.recipe, task_data.task.name
    skip_non_finite = recipe.train.non_finite == "skip"
    if train_state.step == 0:
        context = build_task_context(engine, task_data, f"beginning {name}", observer, train_state)
        engine.reset_optimizer(setup.method.begin_task(train_state.task, name, context))
    reference = setup.reference_data(task_data)
    monitor = LossMonitor(
        engine,
        name,
        recipe.observe.every,
        skip_non_finite,
        task_data.sample_sources,
        observer.log_steps,
        observer.print_message,
        recipe.observe.peak_tflops and 1e12 * recipe.observe.peak_tflops,
        train_state.tokens,
    )
    monitor.start_task()
    stop_requested = False
    for number in range(train_state.step, task_data.num_steps):
        # Every step has its own seed: random numbers (dropout) do not depend on restarts, evaluations or earlier tasks.
        torch.manual_seed(hash((recipe.seed, zlib.crc32(name.encode()), number, comm.rank())))
        plan, lr = task_data.sampler.step_plan(number), task_data.learning_rate(number)
        train_state.step, train_state.total = number + 1, train_state.total + 1
        train_state.tokens += plan.num_tokens
        is_last = train_state.step == task_data.num_steps
        save_due = train_state.total % recipe.checkpoint.every == 0 and not is_last
        tracer.begin_step(train_state.total)
        with timers.timed_part("data"):
            batches = task_data.micro_batches(number)
            reference_batches = reference.micro_batches(number % reference.num_steps) if reference is not None else []
        reference_plan = reference.sampler.step_plan(number % reference.num_steps) if reference is not None else None
        if reference_plan is not None:
            engine.compute_gradients(
                setup.method.loss, reference_batches, reference_plan.num_targets, setup.method.on_reference_gradients
            )
            train_state.beside += reference_plan.num_tokens
        loss = engine.step(
            setup.method.loss,
            batches,
            targets=plan.num_targets,
            lr=lr,
            skip_non_finite=skip_non_finite,
            project=is_last or save_due or train_state.step % engine.project_every == 0,
        )
        padded_tokens = sum(batch.input_ids.numel() for batch in (*batches, *reference_batches))
        monitor.record_step(number, train_state.total, plan, lr, loss, is_last, padded_tokens, reference_plan)
        with monitor.outside_step():
            if message := tracer.end_step(train_state.total, is_last):
                observer.print_message(message)
        stop_requested = stop_requested or (stop is not None and stop.stop_requested())
        # Stop only after a step whose weights are projected anyway: an extra projection would change the results.
        stop_now = stop_requested and not is_last and (save_due or train_state.step % engine.project_every == 0)
        if save_due or stop_now:
            monitor.flush()
        with monitor.outside_step():
            if save_due or stop_now:
                save_checkpoint(checkpoints, train_state, engine, setup)
            else:
                checkpoints.finish_pending_if_written()
        if stop_now:
            raise RunStopped(f"stopped after step {train_state.total}, with everything saved; {RERUN_HINT}")
    context = build_task_context(engine, task_data, f"ending {name}", observer, train_state)
    summary = setup.method.end_task(train_state.task, name, context)
    extra_tokens = {"tokens_beside": float(train_state.beside)} if train_state.beside else {}
    monitor.end_task({**summary.metrics, **extra_tokens})
    train_state.beside = 0
    observer.log_task_summary(name, summary, train_state.total)
    checkpoints.write_task_artifacts(lambda: setup.method.save_task_artifacts(recipe.run_folder, name))


def build_task_context(
    engine: Engine, task_data: TaskData, activity: str, observer: Observer, train_state: TrainState
) -> TaskContext:
    """What a method may ask of all ranks when a task begins or ends.

    Tokens that the method reads are counted in `train_state.beside`; its progress is shown under the name `activity`.
    """

    def iter_batches(num_samples: int) -> Iterator[Batch]:
        num_seen = 0
        for number in range(task_data.sampler.steps_per_epoch):
            if num_seen >= num_samples:
                return
            yield from (batch.to(engine.device) for batch in task_data.micro_batches(number))
            num_seen += len(task_data.sampler.step_plan(number).sample_ids)
            train_state.beside += task_data.sampler.step_plan(number).num_tokens

    def sample_groups(num_samples: int, size: int) -> list[list[Batch]]:
        train_state.beside += task_data.sampler.count_tokens(num_samples)
        return task_data.grouped_micro_batches(num_samples, size)

    def report_progress(item: str, done: int, total: int) -> None:
        observer.show_activity(f"{activity}, {item}", done, total)

    def apply_on_owners(function: MatrixFn, names: Sequence[str]) -> None:
        engine.apply_on_owners(function, names, lambda done, total: report_progress("matrices", done, total))

    def raise_on_all_ranks(problem: str) -> None:
        if problem := next(filter(None, comm.all_gather_objects(problem)), ""):
            raise UserError(problem)

    return TaskContext(
        device=engine.device,
        model=engine.module,
        probe_activations=engine.probe_activations,
        iter_batches=iter_batches,
        gather_full_weights=engine.shards.gather_full_weights,
        apply_on_owners=apply_on_owners,
        all_reduce_sum=comm.all_reduce_sum,
        report_progress=report_progress,
        raise_on_all_ranks=raise_on_all_ranks,
        task_samples=lambda: task_data.own_dataset,
        local_shards=engine.shards.local_shards,
        sample_groups=sample_groups,
        compute_gradients=lambda loss, batches, callback: engine.compute_gradients(loss, batches, 1, callback),
    )


def evaluate_with_progress(
    engine: Engine,
    setup: RunSetup,
    task_data: TaskData,
    observer: Observer,
    stop: StopHandler | None,
    oracle_task_id: bool = False,
) -> EvalResult:
    """Evaluate one task and show the progress; raises `RunStopped` after a batch if `stop` asks for it."""

    def on_progress(done: int, total: int) -> None:
        observer.show_evaluation(task_data.task.name, done, total)
        stop_if_requested(stop)

    method, tokenizer = setup.method, setup.backbone.tokenizer
    return evaluate_task(
        task_data.eval_set, engine, method, tokenizer, setup.recipe.evaluate, on_progress, oracle_task_id
    )


def stop_if_requested(stop: StopHandler | None) -> None:
    """Stop during an evaluation. Nothing is saved here: a checkpoint was saved before the evaluation."""
    if stop is not None and stop.stop_requested():
        raise RunStopped(f"stopped in an evaluation, before which everything was saved; {RERUN_HINT}")


def heldout_loss(engine: Engine, setup: RunSetup, observer: Observer, stop: StopHandler | None) -> list[float]:
    """The loss on the held-out texts as a list of one; an empty list if the recipe names no such texts."""
    if not setup.heldout_texts:
        return []

    def on_progress(done: int, total: int) -> None:
        observer.show_evaluation("held-out texts", done, total)
        stop_if_requested(stop)

    return [mean_token_loss(setup.heldout_texts, engine, setup.method, setup.backbone.tokenizer, on_progress)]


def should_evaluate(setup: RunSetup, task: int, after: int) -> bool:
    """Whether task `task` is evaluated after training task `after` (evaluate.every, evaluate.tasks); both are indices.

    After the last task, all tasks are evaluated.
    """
    settings = setup.recipe.evaluate
    if after + 1 == len(setup.tasks):
        return True
    selected = {"all": True, "seen": task <= after, "new": task == after}
    return (after + 1) % settings.every == 0 and selected[settings.tasks]


def save_checkpoint(checkpoints: Checkpoints, train_state: TrainState, engine: Engine, setup: RunSetup) -> None:
    checkpoints.save(train_state.checkpoint_name(), dataclasses.asdict(train_state), engine, setup.method)


def resume_from_newest(checkpoints: Checkpoints, engine: Engine, setup: RunSetup) -> TrainState:
    """Load the newest intact checkpoint; without one, return the state of a new run."""
    newest = checkpoints.find_newest()
    if newest is None:
        return TrainState()
    train_state = restore_checkpoint(newest, engine, setup)
    num_tasks = len(setup.tasks)
    log.info("resumed from %s: task %d of %d", newest.name, min(train_state.task + 1, num_tasks), num_tasks)
    return train_state


def restore_checkpoint(folder: Path, engine: Engine, setup: RunSetup) -> TrainState:
    """Load a checkpoint, and the artifacts of the tasks trained by then, into the engine and the method."""
    train_state = TrainState(**load_checkpoint(folder, engine, setup.method))
    learned = [task_data.task.name for task_data in setup.tasks[: train_state.task + train_state.learned]]
    setup.method.load_task_artifacts(setup.recipe.run_folder, learned)
    return train_state


def write_scores(recipe: Recipe, setup: RunSetup, train_state: TrainState) -> dict[str, Any]:
    """Write `scores.json` (main rank) and return its content (all ranks)."""
    document = scores.build_document(
        method=recipe.method.name,
        tasks=[task_data.task.name for task_data in setup.tasks],
        metrics=[task_data.task.metric for task_data in setup.tasks],
        matrix=train_state.matrix,
        zero_shot=train_state.before,
        complete=train_state.task == len(setup.tasks),
    )
    if any(share is not None for row in train_state.routed for share in row):
        document |= {"routed": train_state.routed, "rejected": train_state.rejected}
        document["confusion"] = build_confusion(document["tasks"], train_state)
    if train_state.given:
        document["given"] = {"matrix": train_state.given, "summary": scores.summarize(train_state.given)}
    if train_state.heldout:
        document["heldout"] = train_state.heldout
    if comm.is_main():
        path = recipe.run_folder / "scores.json"
        try:
            write_text_atomically(path, json.dumps(document, indent=1))
        except OSError as error:
            raise ExternalFailure(
                f"{path}: cannot be written ({error.strerror}); make room and run again to go on"
            ) from None
    return document


def build_confusion(tasks: Sequence[str], train_state: TrainState) -> dict[str, Any]:
    """The confusion matrix of routing at the last evaluation: which task's prompts were answered by which task."""
    shares_of = {task: dict(map(tuple, pairs)) for task, pairs in zip(tasks, train_state.went, strict=False) if pairs}
    names = [*tasks, None]
    shares = [[by_name.get(name, 0.0) for name in names] for by_name in shares_of.values()]
    return {"tasks": list(shares_of), "answered_by": names, "shares": shares}


def reject_needless_oracle_evaluation(setup: RunSetup) -> None:
    """Refuse evaluate.oracle_task_id for a method that infers no task: its scores would not change."""
    if setup.recipe.evaluate.oracle_task_id and not setup.method.infers_task_id:
        how = "is told every prompt's task anyway" if setup.method.uses_task_id else "answers alike whatever the task"
        raise UserError(
            f"evaluate.oracle_task_id: given true, but this method ({setup.recipe.method.name}) {how}; remove it"
        )


def report_if_complete(recipe: Recipe) -> bool:
    """Whether the run in this directory is complete; if so, its scores and the paths of its files are printed."""
    try:
        document: dict[str, Any] = json.loads((recipe.run_folder / "scores.json").read_text("utf-8"))
    except (OSError, ValueError):  # missing or damaged: it is written again from the checkpoint
        return False
    if not document.get("complete"):
        return False
    if comm.is_main():
        print(f"\n{score_table(document)}\n")
        print(f"complete: {recipe.run_dir} (scores.json, metrics.jsonl, checkpoints/)")
        print(f"look:     {sys.executable} -m tensorboard.main --logdir {recipe.run_folder / 'tensorboard'}")
        print("again:    remove that folder, or give another run_dir", flush=True)
    return True


def diagnose_cluster(recipe: Recipe) -> None:
    """`dscl doctor`: check whether the cluster can run this recipe; nothing is trained."""
    setup = build_setup_on_all_ranks(recipe)
    preflight.run_checks(setup, lambda line: print(line, flush=True) if comm.is_main() else None)


def dry_run(recipe: Recipe) -> None:
    """`dscl train --dry-run`: build and check everything up to the first step and print it; no run is written."""
    setup = build_setup_on_all_ranks(recipe)
    with closing(setup.build_engine()) as engine:
        trainable = engine.shards.weight_fingerprints()
        sizes = {
            name: p.ds_numel if hasattr(p, "ds_numel") else p.numel() for name, p in engine.module.named_parameters()
        }
    if not comm.is_main():
        return
    num_trainable = sum(sizes[name] for name in trainable)
    print(recipe.to_yaml())
    print(f"model:    {sum(sizes.values()):,} parameters, of which {num_trainable:,} train ({recipe.method.name})")
    zero = f"ZeRO stage {engine.stage} ({recipe.find_deepspeed_json()})"
    print(f"ranks:    {comm.world_size()} on {engine.device.type}, {zero}")
    steps = [num_steps for _, num_steps in setup.planned_steps()]
    for number, task_data in enumerate(setup.tasks):
        task, epochs = task_data.task, task_data.sampler.num_steps // task_data.sampler.steps_per_epoch
        tokens = int(task_data.dataset.prompt_lengths.sum() + task_data.dataset.answer_lengths.sum())
        num_steps = f"{steps[number]} steps" if number < len(steps) else "with the first"
        print(
            f"task:     {task.name}: {len(task.train)} train, {len(task.dev)} dev, {len(task.test)} test samples; "
            f"{tokens:,} tokens an epoch, {epochs} epochs, {num_steps}; {task.metric}"
        )
    print(f"steps:    {sum(steps)} in all; nothing was trained", flush=True)


def evaluate_run(
    run_dir: str,
    overrides: Sequence[str],
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    checkpoint: str | None = None,
) -> None:
    """`dscl eval`: evaluate a checkpoint of a run on all its tasks (and lm-eval's), and print one line of JSON.

    `checkpoint`: its name, or "best"; the newest by default.
    """
    recipe = read_run_recipe(run_dir, overrides)
    # As in training, prompts leave free the tokens that the run's own recipe reserves for answers.
    setup = build_setup_on_all_ranks(recipe, read_run_recipe(run_dir).evaluate.max_new_tokens)
    reject_needless_oracle_evaluation(setup)
    with closing(setup.build_engine()) as engine:
        folder = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint).find_checkpoint(checkpoint)
        if folder is None:
            raise UserError(f"{run_dir}: no checkpoint there yet; train first")
        train_state = restore_checkpoint(folder, engine, setup)
        method, tokenizer = setup.method, setup.backbone.tokenizer
        lm_eval_scores = lm_eval.evaluate_with_lm_eval(
            lm_eval_tasks, lm_eval_limit, engine, tokenizer, recipe.evaluate.batch
        )
        results = {
            task_data.task.name: evaluate_task(task_data.eval_set, engine, method, tokenizer, recipe.evaluate)
            for task_data in setup.tasks
        }
        oracle_scores = {
            task_data.task.name: evaluate_task(
                task_data.eval_set, engine, method, tokenizer, recipe.evaluate, oracle_task_id=True
            ).score
            for task_data in setup.tasks
            if recipe.evaluate.oracle_task_id
        }
        heldout = [mean_token_loss(setup.heldout_texts, engine, method, tokenizer)] if setup.heldout_texts else []
    document: dict[str, Any] = {"checkpoint": folder.name, "tasks_trained": train_state.task}
    document["scores"] = {name: result.score for name, result in results.items()}
    if any(result.routing_accuracy is not None for result in results.values()):
        document["routed"] = {name: result.routing_accuracy for name, result in results.items()}
        document["rejected"] = {name: result.rejected_share for name, result in results.items()}
    if oracle_scores:
        document["given"] = oracle_scores
    if heldout:
        document["heldout"] = heldout[0]
    if lm_eval_scores:
        document["lm_eval"] = lm_eval_scores
    if comm.is_main():
        print(json.dumps(document), flush=True)
