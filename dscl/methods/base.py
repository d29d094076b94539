"""The interface of a continual-learning method.

A method chooses the trainable parameters, computes a loss, and may keep state from task to task. It never calls
backward, the optimizer's step, a collective or DeepSpeed, and it never logs.

The trainer calls `prepare`, `constraint` and `gradient_hook` once. For every task it calls `begin_task`, then `loss`
for every micro-batch, then `end_task` and `save_task_artifacts`. Every evaluation runs inside `inference_context`.

A resumed run calls `prepare`, `constraint` and `gradient_hook` again. Then `load_state_dict` and `load_matrix_state`
receive what `state_dict`, `row_state_dict` and `matrix_state_dict` returned when the checkpoint was written, and
`load_task_artifacts` loads the tasks that had ended. `begin_task` is not called again for a task that had begun.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from dscl.data.batches import Batch, PromptBatch
from dscl.data.replay_buffer import ReplayBuffer, TokenizedDataset
from dscl.engine.gradient_hooks import GradientCallback, GradientHook, LocalShard
from dscl.engine.matrix_owners import Constraint
from dscl.model.lm_head import answer_loss

# (name, full shape, start, stop) → new values of these elements of a tensor; None leaves the tensor unchanged
TensorReader = Callable[[str, torch.Size, int, int], torch.Tensor | None]


@dataclass(frozen=True)
class RunInfo:
    """What a method may know about the run."""

    seed: int
    task_names: tuple[str, ...]  # in stream order
    base_model: str  # hub id or folder of the backbone
    model: str  # fingerprint of the backbone's configuration and weights
    tokenizer: str  # fingerprint of everything that affects the tokenizer's output
    prompt_limit: int  # tokens; longer prompts are truncated on the left
    precision: str


MatrixFn = Callable[[str, torch.Tensor], None]  # (parameter name, whole matrix)
LossFn = Callable[[nn.Module, Batch], torch.Tensor]  # the sum of losses over a batch's target tokens


class TaskMatrix(NamedTuple):
    """Values in 0…1 for every pair of tasks, to be shown as a heat map."""

    title: str
    tasks: tuple[str, ...]
    values: list[list[float]]


class TaskSummary(NamedTuple):
    """What `end_task` reports."""

    message: str = ""  # for the user
    metrics: Mapping[str, float] = {}  # added to the record of the task's last step
    task_matrix: TaskMatrix | None = None  # shown as an image


@dataclass(frozen=True)
class TaskContext:
    """What a method may use while a task begins or ends. The callables are collective: all ranks make the same calls,
    in the same order."""

    device: torch.device
    # A forward pass is collective under ZeRO-3, so all ranks make equally many.
    model: nn.Module
    # (loss, backward): `Engine.probe_activations`
    probe_activations: Callable[[Callable[[nn.Module], torch.Tensor], bool], None]
    # (number of samples) → batches of about as many of the task's samples; every rank gets equally many batches
    iter_batches: Callable[[int], Iterator[Batch]]
    # (names, or None for all) → whole trained tensors in fp32, on every rank
    gather_full_weights: Callable[[Iterable[str] | None], dict[str, torch.Tensor]]
    # (function, names): calls the function for each of these constrained matrices, whole and in fp32, on its owner
    apply_on_owners: Callable[[MatrixFn, Sequence[str]], None]
    # sums a tensor over all ranks, in place
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]
    # (activity, number done, total)
    report_progress: Callable[[str, int, int], None]
    # (message; empty if this rank has no error): stops all ranks if any of them has a message
    raise_on_all_ranks: Callable[[str], None]
    # the task's own training samples, without replayed ones
    task_samples: Callable[[], TokenizedDataset]
    # this rank's shards of the trained tensors
    local_shards: Callable[[], Iterable[LocalShard]]
    # (number of samples, group size) → groups of the task's samples; each group is this rank's part of it, in batches
    sample_groups: Callable[[int, int], list[list[Batch]]]
    # (loss, batches, callback): the callback receives the gradient of the summed losses of all ranks' batches
    compute_gradients: Callable[[LossFn, Sequence[Batch], GradientCallback], None]


class Method(ABC):
    """One continual-learning method. A subclass overrides only the hooks it needs."""

    Config: ClassVar[type]  # the recipe's `method:` section is parsed into it; see dscl/config/methods.py
    uses_task_id = False  # whether inference uses parameters of the prompt's task
    infers_task_id = False  # whether the method finds the prompt's task itself; otherwise the caller passes it
    joint = False  # whether all tasks are trained on at once

    def __init__(self, config: Any, run_info: RunInfo) -> None:
        self.config = config
        self.run_info = run_info

    @classmethod
    def infers_task_id_with(cls, config: Any) -> bool:
        """The value of `infers_task_id` under this configuration."""
        return cls.infers_task_id

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Choose the trainable parameters (`requires_grad`), adding modules where needed. Called before the engine is
        built."""

    def constraint(self) -> Constraint | None:
        """A constraint that the engine enforces on trained matrices after optimizer steps. Called once, after
        `prepare`."""
        return None

    def gradient_hook(self) -> GradientHook | None:
        """A hook that changes gradients before every optimizer step. Called once, after `prepare`."""
        return None

    def estimate_memory(self) -> dict[str, float]:
        """Called only by `dscl plan`, which counts the allocated tensors.

        Allocates, with arbitrary values, what the method holds once the first task has begun. Returns the bytes that
        later tasks add, by a description.
        """
        return {}

    def task_end_bytes(self) -> float:
        """Called only by `dscl plan`: bytes of device memory that are needed temporarily while a task ends."""
        return 0.0

    def begin_task(self, index: int, name: str, context: TaskContext) -> TensorReader | None:
        """Start a task with a fresh optimizer. The returned reader gives the initial values of the trainable tensors;
        None keeps the values at the end of the previous task."""
        return None

    def replay_counts(self, task_sizes: Sequence[int]) -> list[int]:
        """How many samples of each ended task are mixed into the next task. `task_sizes`: the training samples of
        each ended task."""
        return []

    def replay_samples(self) -> Sequence[ReplayBuffer]:
        """The samples to mix into the next task. Called before a task's first step and after a restart."""
        return ()

    def reference_samples(self) -> Sequence[ReplayBuffer]:
        """Samples for reference gradients: before every step, `on_reference_gradients` receives the gradient of a
        batch of them, which is as large as the step's own batch."""
        return ()

    def on_reference_gradients(self, shards: Sequence[LocalShard]) -> None:
        """Receive the gradient of a batch of `reference_samples`."""
        raise AssertionError(f"{type(self).__name__} has reference samples, but no on_reference_gradients")

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) of losses over the batch's target tokens. The engine divides it by the number of
        target tokens in the global batch."""
        return answer_loss(model, batch)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        """Called after the task's last step and before its evaluation."""
        return TaskSummary()

    def save_task_artifacts(self, folder: Path, name: str) -> list[Path]:
        """Write what an ended task keeps for good into the run's folder, and return the files. Called on the main rank
        only."""
        return []

    def load_task_artifacts(self, folder: Path, names: Sequence[str]) -> None:  # noqa: B027 - optional
        """Load what `save_task_artifacts` wrote for these ended tasks."""

    def inference_context(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        """A context for all forward passes that answer a batch of prompts. `task`: the prompts' task, if known.

        A method that infers tasks yields a list. After the first forward pass, the list holds each prompt's task, or
        None for a prompt of no known task.
        """
        return nullcontext()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint besides the trainable tensors; the same on every rank."""
        return {}

    def row_state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors with a row for every sample that this rank has seen in the current task. After a restart, the rows
        are redistributed over the ranks."""
        return {}

    def matrix_state_dict(self) -> dict[str, torch.Tensor]:
        """State of the matrices that this rank owns, with keys `matrix name|kind`."""
        return {}

    def load_matrix_state(  # noqa: B027 - optional
        self, read_matrix_state: Callable[[str], dict[str, torch.Tensor]]
    ) -> None:
        """Load the state of the matrices that this rank owns now. `read_matrix_state(matrix name)` returns tensors by
        kind."""

    def load_state_dict(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned, and this rank's part of what all ranks' `row_state_dict` returned."""
        unexpected = sorted({**state, **rows})
        assert not unexpected, f"{type(self).__name__} has no state, but the checkpoint holds {unexpected}"
