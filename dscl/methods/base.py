"""What a method is: it decides what trains, computes a loss, and may keep something from task to task.

A method never calls backward, step, a collective or DeepSpeed, and it never logs. The trainer calls, in this order:
`prepare`, `constraint` and `steering` once; then for every task `begin_task`, `loss` for every micro-batch, `end_task`,
`leave`; and `answering` around whatever is evaluated. A run that is killed and started again calls the first three,
`load_state` and `load_owned` with what `state`, `rows` and `owned` gave when the checkpoint was written, `recall` with
the tasks that had ended, and goes on in the middle: `begin_task` is not called a second time for a task that had begun.
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
from dscl.data.replay_buffer import Kept, Samples
from dscl.engine.gradient_hooks import Held, Shown, Steering
from dscl.engine.matrix_owners import Constraint
from dscl.model.lm_head import answer_loss

# name, shape, start, stop → those elements; None: they stay as they are
Reader = Callable[[str, torch.Size, int, int], torch.Tensor | None]


@dataclass(frozen=True)
class Facts:
    """What a method may know of its job."""

    seed: int
    tasks: tuple[str, ...]  # in order
    base: str  # how the backbone is named
    model: str  # fingerprints: of the backbone's configuration and weights,
    tokenizer: str  # and of what decides the tokenizer's output
    prompt_limit: int  # tokens; longer prompts lose their beginning
    precision: str


Look = Callable[[str, torch.Tensor], None]  # is shown a matrix by its name
Loss = Callable[[nn.Module, Batch], torch.Tensor]  # the sum over a batch's target tokens


class Matrix(NamedTuple):
    """A square of shares in 0…1, a row and a column for each of some tasks."""

    title: str
    tasks: tuple[str, ...]
    values: list[list[float]]


class Ended(NamedTuple):
    """What an ended task has come to: for the user, for the record of its last step, and as a picture."""

    told: str = ""
    numbers: Mapping[str, float] = {}
    picture: Matrix | None = None


@dataclass(frozen=True)
class Ranks:
    """What a method may ask of all ranks when a task begins or ends; each has to ask the same, in the same order."""

    device: torch.device
    module: nn.Module  # to ask for texts; equally often on every rank
    probe: Callable[[Callable[[nn.Module], torch.Tensor], bool], None]  # `Engine.probe`, likewise
    batches: Callable[[int], Iterator[Batch]]  # about as many of the task's samples, in equally many batches a rank
    whole: Callable[
        [Iterable[str] | None], dict[str, torch.Tensor]
    ]  # trained tensors (all, or these), complete, in fp32
    visit: Callable[[Look, Sequence[str]], None]  # these constrained matrices, complete, in fp32, each to its owner
    sum_: Callable[[torch.Tensor], torch.Tensor]  # added up over all ranks, in place
    said: Callable[[str, int, int], None]  # shows how far long work is: what, done, of how many
    refuse: Callable[[str], None]  # stops all ranks with what one of them (or none: empty) has to complain of
    samples: Callable[[], Samples]  # the task's own, without those that were mixed in
    stretches: Callable[[], Iterable[Held]]  # of the trained tensors, as this rank holds them
    groups: Callable[[int, int], list[list[Batch]]]  # so many of its samples, in groups of a size: this rank's share
    sense: Callable[[Loss, Sequence[Batch], Shown], None]  # the gradient of a sum of losses over all ranks' batches


class Method(ABC):
    Config: ClassVar[type]  # what the recipe's `method:` is parsed into, see dscl/config/methods.py
    by_task = False  # whether a prompt is answered by what its task has left
    decides = False  # whether the method finds out which task that is; else it has to be told
    together = False  # whether all tasks' samples are learnt at once

    def __init__(self, config: Any, facts: Facts) -> None:
        self.config = config
        self.facts = facts

    @classmethod
    def decides_with(cls, config: Any) -> bool:
        """What `decides` is with these settings."""
        return cls.decides

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Decide what trains (`requires_grad`), adding modules where needed. Called before the engine is built."""

    def constraint(self) -> Constraint | None:
        """What must hold for trained matrices after every step. Asked once, after `prepare`."""
        return None

    def steering(self) -> Steering | None:
        """Who changes gradients before every step. Asked once, after `prepare`."""
        return None

    def rehearse(self) -> dict[str, float]:
        """For a plan, which counts it: keep, of whatever values, what is kept once the first task has begun. Returns
        the bytes of what comes later, by what it is."""
        return {}

    def ending(self) -> float:
        """For a plan: the bytes that the device needs once more when a task has ended, and then no longer."""
        return 0.0

    def begin_task(self, index: int, name: str, ranks: Ranks) -> Reader | None:
        """A task starts, with a fresh optimizer. What is returned gives the values that the trainable tensors start
        from; None leaves them as the previous task did."""
        return None

    def mixes(self, ended: Sequence[int]) -> list[int]:
        """How many samples of each ended task, which had so many, are learnt again with the next one."""
        return []

    def mixed_in(self) -> Sequence[Kept]:
        """Those samples. Asked for before a task's first step, and after a restart."""
        return ()

    def reviews(self) -> Sequence[Kept]:
        """Samples of which every step first shows the gradient (of a batch as large as its own) to `reviewed`."""
        return ()

    def reviewed(self, stretches: Sequence[Held]) -> None:
        """Is shown that gradient."""
        raise AssertionError(f"{type(self).__name__} asks for a review of samples and does not look at it")

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) over the batch's target tokens; the engine divides by the global count."""
        return answer_loss(model, batch)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        """The task's last step is done; the task has not been evaluated yet."""
        return Ended()

    def leave(self, folder: Path, name: str) -> list[Path]:
        """On the main rank: write what an ended task leaves for ever into the run's folder, and say which files."""
        return []

    def recall(self, folder: Path, names: Sequence[str]) -> None:  # noqa: B027 - optional
        """Take back what these ended tasks left in the run's folder."""

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        """Around all passes that answer a batch of prompts, of the given task where it is told. A method that decides
        which task a prompt belongs to gives a list that holds the decisions (None: no task's) after the first pass."""
        return nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """What must survive a restart besides the trainable tensors; the same on every rank."""
        return {}

    def rows(self) -> dict[str, torch.Tensor]:
        """What this rank has gathered in the present task, a row each; after a restart any rank may get any row."""
        return {}

    def owned(self) -> dict[str, torch.Tensor]:
        """What this rank keeps of the matrices that are its own, as `matrix|what`."""
        return {}

    def load_owned(self, read: Callable[[str], dict[str, torch.Tensor]]) -> None:  # noqa: B027 - optional
        """Take back what was kept of the matrices that are this rank's now; `read(matrix)` gives it, by what it is."""

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        given = sorted({**state, **rows})
        assert not given, f"{type(self).__name__} keeps no state, yet the checkpoint holds {given}"
