"""The place of a run in its stream: phases, names of checkpoints, and the JSON form."""

from __future__ import annotations

import json

from dscl.training.state import Phase, TrainState


def test_names_of_checkpoints_sort_in_the_order_of_training() -> None:
    state, names = TrainState(Phase.ZERO_SHOT), []
    state.phase = Phase.TRAINING
    names.append(state.checkpoint_name())
    for _ in range(2):
        for step in range(1, 4):
            state.task_step, state.total_steps = step, state.total_steps + 1
            names.append(state.checkpoint_name())
        state.phase = Phase.EVALUATION
        names.append(state.checkpoint_name())
        state.start_next_task()
        names.append(state.checkpoint_name())
    assert names == sorted(set(names))


def test_a_trained_task_counts_before_it_is_evaluated() -> None:
    state = TrainState(task=1, task_step=3)
    assert state.num_trained_tasks == 1
    state.phase = Phase.EVALUATION
    assert state.num_trained_tasks == 2
    state.start_next_task()
    assert (state.num_trained_tasks, state.task_step, state.phase) == (2, 0, Phase.TRAINING)


def test_a_state_survives_json() -> None:
    state = TrainState(Phase.EVALUATION, 1, 2, 3, 4, 5)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
