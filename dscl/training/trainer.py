"""The training loop: stream → task → step → evaluation → record, resumable from any checkpoint."""

from __future__ import annotations

import json
import time
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dscl.data.batches import Batch, StepPlan
from dscl.distributed import comm
from dscl.distributed.preemption import StopHandler
from dscl.engine.engine import Engine
from dscl.monitoring.loss_monitor import LossMonitor
from dscl.monitoring.observer import Observer
from dscl.monitoring.profiler import Tracer
from dscl.monitoring.score_board import ScoreBoard
from dscl.training.checkpoint import Checkpoints
from dscl.training.evaluation import Evaluator
from dscl.training.setup import RunSetup, TaskData
from dscl.training.state import Phase, TrainState
from dscl.training.task_context import build_task_context
from dscl.utils import timers
from dscl.utils.atomic_io import write_text_atomically
from dscl.utils.errors import RERUN_HINT, ExternalFailure, RunStopped


class StepData(NamedTuple):
    """What one optimizer step consumes on this rank."""

    plan: StepPlan
    batches: list[Batch]
    reference_plan: StepPlan | None  # of the samples for the reference gradient (A-GEM)
    reference_batches: list[Batch]


@dataclass
class Trainer:
    """Trains and evaluates a run's stream, from `state` to its end."""

    setup: RunSetup
    engine: Engine
    state: TrainState
    scores: ScoreBoard
    checkpoints: Checkpoints
    observer: Observer
    tracer: Tracer
    stop: StopHandler | None

    def __post_init__(self) -> None:
        self.recipe, self.method = self.setup.recipe, self.setup.method
        self.evaluator = Evaluator(self.setup, self.engine, self._on_evaluated_batch)

    def run(self) -> None:
        """Train what is left of the stream. A checkpoint follows every change of phase."""
        self.observer.log_recipe(self.recipe.to_yaml())
        if not self.scores.is_empty:  # a killed run may have saved these scores without writing them
            self.observer.log_scores(self.write_scores())
        if self.state.phase is Phase.ZERO_SHOT:
            self.evaluate_zero_shot()
        while self.state.task < len(self.setup.tasks):
            if self.state.phase is Phase.TRAINING:
                self.train_task(self.setup.training_data(self.state.task))
                self.state.phase = Phase.EVALUATION
                self.save_checkpoint()
            self.evaluate_stream()

    # ---- training

    def train_task(self, task_data: TaskData) -> None:
        """Train one task from step `state.task_step` to its end. Raises `RunStopped` if a stop was requested."""
        name = task_data.task.name
        if self.state.task_step == 0:
            context = build_task_context(self.engine, task_data, self.observer, self.state, f"beginning {name}")
            self.engine.reset_optimizer(self.method.begin_task(self.state.task, name, context))
        reference = self.setup.reference_data(task_data)
        monitor = self._start_monitor(task_data)
        stop_requested = False
        for number in range(self.state.task_step, task_data.num_steps):
            is_last = number + 1 == task_data.num_steps
            save_due = (self.state.total_steps + 1) % self.recipe.checkpoint.every == 0 and not is_last
            project = is_last or save_due or (number + 1) % self.engine.project_every == 0
            self.train_step(task_data, reference, monitor, number, project)
            stop_requested = stop_requested or self._stop_requested()
            # Stop only after a step whose weights are projected anyway: an extra projection would change the results.
            stop_now = stop_requested and project and not is_last
            if save_due or stop_now:
                monitor.flush()
            with monitor.outside_step():
                if save_due or stop_now:
                    self.save_checkpoint()
                else:
                    self.checkpoints.finish_pending_if_written()
            if stop_now:
                raise RunStopped(f"stopped after step {self.state.total_steps}, with everything saved; {RERUN_HINT}")
        self.end_task(task_data, monitor)

    def train_step(
        self, task_data: TaskData, reference: TaskData | None, monitor: LossMonitor, number: int, project: bool
    ) -> None:
        """Make the task's optimizer step `number`. `project`: enforce the method's constraint after it."""
        state, is_last = self.state, number + 1 == task_data.num_steps
        # Every step has its own seed: random numbers (dropout) do not depend on restarts, evaluations or earlier tasks.
        seeds = (self.recipe.seed, zlib.crc32(task_data.task.name.encode()), number, comm.rank())
        torch.manual_seed(hash(seeds))
        state.task_step, state.total_steps = number + 1, state.total_steps + 1
        self.tracer.begin_step(state.total_steps)
        with timers.timed_part("data"):
            data = load_step(task_data, reference, number)
        state.total_tokens += data.plan.num_tokens
        if data.reference_plan is not None:
            targets, callback = data.reference_plan.num_targets, self.method.on_reference_gradients
            self.engine.compute_gradients(self.method.loss, data.reference_batches, targets, callback)
            state.extra_tokens += data.reference_plan.num_tokens
        lr = task_data.learning_rate(number)
        loss = self.engine.step(
            self.method.loss,
            data.batches,
            targets=data.plan.num_targets,
            lr=lr,
            skip_non_finite=self.recipe.train.non_finite == "skip",
            project=project,
        )
        padded_tokens = sum(batch.input_ids.numel() for batch in (*data.batches, *data.reference_batches))
        monitor.record_step(number, state.total_steps, data.plan, lr, loss, is_last, padded_tokens, data.reference_plan)
        with monitor.outside_step():
            if message := self.tracer.end_step(state.total_steps, is_last):
                self.observer.print_message(message)

    def end_task(self, task_data: TaskData, monitor: LossMonitor) -> None:
        """Let the method end the task; record what it reports, and write the task's artifacts."""
        name = task_data.task.name
        context = build_task_context(self.engine, task_data, self.observer, self.state, f"ending {name}")
        summary = self.method.end_task(self.state.task, name, context)
        extra_tokens = {"extra_tokens": float(self.state.extra_tokens)} if self.state.extra_tokens else {}
        monitor.end_task({**summary.metrics, **extra_tokens})
        self.state.extra_tokens = 0
        self.observer.log_task_summary(name, summary, self.state.total_steps)
        self.checkpoints.write_task_artifacts(lambda: self.method.save_task_artifacts(self.recipe.run_folder, name))

    def _start_monitor(self, task_data: TaskData) -> LossMonitor:
        monitor = LossMonitor(
            self.engine,
            task_data.task.name,
            self.recipe.observe.every,
            self.recipe.train.non_finite == "skip",
            task_data.sample_sources,
            self.observer.log_steps,
            self.observer.print_message,
            self.recipe.observe.peak_tflops and 1e12 * self.recipe.observe.peak_tflops,
            self.state.total_tokens,
        )
        monitor.start_task()
        return monitor

    # ---- evaluation

    def evaluate_zero_shot(self) -> None:
        """Evaluate the model before any training, as far as the recipe asks for it."""
        started = time.perf_counter()
        if self.recipe.evaluate.zero_shot:
            self.scores.zero_shot = [result and result.score for result in self.evaluator.evaluate_tasks()]
        self.scores.heldout_losses += self.evaluator.heldout_loss()
        self.state.phase = Phase.TRAINING
        seconds = time.perf_counter() - started
        self.save_checkpoint()
        self.observer.log_scores(self.write_scores(), seconds)

    def evaluate_stream(self) -> None:
        """Evaluate the tasks that are due after the current one, and move on to the next."""
        started, num_trained = time.perf_counter(), 1
        if self.method.joint:  # all tasks were trained as one, so there are scores after the last one only
            num_trained = len(self.setup.tasks)
            self.scores.rows += [[None] * num_trained] * (num_trained - 1)
        after = self.state.task + num_trained - 1
        self.scores.rows.append(self.evaluator.evaluate_tasks(after))
        if self.recipe.evaluate.oracle_task_id:
            self.scores.oracle_rows.append(self.evaluator.evaluate_tasks(after, oracle_task_id=True))
        self.scores.heldout_losses += self.evaluator.heldout_loss()
        seconds = time.perf_counter() - started
        self.state.start_next_task(num_trained)
        self.save_checkpoint()
        self.checkpoints.finish_pending()  # before scores.json may say that the run is complete
        self.observer.log_scores(self.write_scores(), seconds)

    def _on_evaluated_batch(self, name: str, done: int, total: int) -> None:
        """Show the progress of an evaluation. A stop needs no checkpoint: one was saved before the evaluation."""
        self.observer.show_evaluation(name, done, total)
        if self._stop_requested():
            raise RunStopped(f"stopped in an evaluation, before which everything was saved; {RERUN_HINT}")

    # ---- records

    def write_scores(self) -> ScoreBoard:
        """Write `scores.json` (main rank) and return its content (all ranks)."""
        document = self.scores.to_json()
        if comm.is_main():
            path = self.recipe.run_folder / "scores.json"
            try:
                write_text_atomically(path, json.dumps(document, indent=1))
            except OSError as error:
                raise ExternalFailure(
                    f"{path}: cannot be written ({error.strerror}); make room and run again to go on"
                ) from None
        return self.scores

    def save_checkpoint(self) -> None:
        self.checkpoints.save(self.state, self.scores, self.engine, self.method)

    def _stop_requested(self) -> bool:
        return self.stop is not None and self.stop.stop_requested()


def load_step(task_data: TaskData, reference: TaskData | None, number: int) -> StepData:
    """The batches of a step and, if the method needs a reference gradient, those of its stored samples."""
    plan, batches = task_data.sampler.step_plan(number), task_data.micro_batches(number)
    if reference is None:
        return StepData(plan, batches, None, [])
    reference_number = number % reference.num_steps
    reference_plan = reference.sampler.step_plan(reference_number)
    return StepData(plan, batches, reference_plan, reference.micro_batches(reference_number))
