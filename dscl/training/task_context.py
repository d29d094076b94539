"""What a method may do while a task begins or ends, bound to the run's engine and to the task's data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dscl.data.batches import Batch
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.methods.base import MatrixFn, TaskContext
from dscl.monitoring.observer import Observer
from dscl.training.setup import TaskData
from dscl.training.state import TrainState
from dscl.utils.errors import UserError


def build_task_context(
    engine: Engine, task_data: TaskData, observer: Observer, train_state: TrainState, activity: str
) -> TaskContext:
    """The context of one task's beginning or end.

    Tokens that the method reads are counted in `train_state.extra_tokens`; its progress is shown under the name
    `activity`.
    """

    def iter_batches(num_samples: int) -> Iterator[Batch]:
        num_seen = 0
        for number in range(task_data.sampler.steps_per_epoch):
            if num_seen >= num_samples:
                return
            yield from (batch.to(engine.device) for batch in task_data.micro_batches(number))
            num_seen += len(task_data.sampler.step_plan(number).sample_ids)
            train_state.extra_tokens += task_data.sampler.step_plan(number).num_tokens

    def sample_groups(num_samples: int, size: int) -> list[list[Batch]]:
        train_state.extra_tokens += task_data.sampler.count_tokens(num_samples)
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
