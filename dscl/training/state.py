"""Where a run is in its stream of tasks: all that a restart needs besides its scores and the saved tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Phase(str, Enum):
    """What a run does next."""

    ZERO_SHOT = "zero_shot"  # evaluate the model before any training
    TRAINING = "training"  # train the current task
    EVALUATION = "evaluation"  # evaluate after the current task, whose training has ended


@dataclass
class TrainState:
    """A cursor into the stream."""

    phase: Phase = Phase.TRAINING
    task: int = 0  # index of the current task; the number of tasks once all are done
    task_step: int = 0  # optimizer steps done in the current task
    total_steps: int = 0  # optimizer steps done in the whole run
    total_tokens: int = 0  # tokens trained on in the whole run
    extra_tokens: int = 0  # tokens of the current task that passed the model outside of its training steps

    @property
    def num_trained_tasks(self) -> int:
        """Tasks whose training has ended."""
        return self.task + (self.phase is Phase.EVALUATION)

    def start_next_task(self, num_tasks: int = 1) -> None:
        """Move on behind the current task, or behind the `num_tasks` tasks that were trained as one."""
        self.phase, self.task, self.task_step = Phase.TRAINING, self.task + num_tasks, 0

    def checkpoint_name(self) -> str:
        """The name of this state's checkpoint folder; names sort in the order of training."""
        is_scored = self.phase is Phase.TRAINING and self.task_step == 0 and self.total_steps
        suffix = "-learned" if self.phase is Phase.EVALUATION else "-scored" if is_scored else ""
        return f"step-{self.total_steps:08d}{suffix}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TrainState:
        return cls(**{**document, "phase": Phase(document["phase"])})
