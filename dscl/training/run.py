"""`dscl train` and `dscl eval`: open the run directory, build the engine, resume, then train or evaluate."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from dscl.distributed import comm
from dscl.distributed.preemption import StopHandler
from dscl.engine.engine import Engine
from dscl.monitoring.observer import Observer, score_table
from dscl.monitoring.profiler import Tracer
from dscl.monitoring.score_board import EvalResult, ScoreBoard
from dscl.recipe.recipe import Recipe, read_run_recipe
from dscl.training import lm_eval, preflight
from dscl.training.checkpoint import Checkpoints, load_checkpoint, reject_other_base_model
from dscl.training.evaluation import Evaluator, reject_needless_oracle
from dscl.training.run_dir import lock_run_dir, reject_other_recipe
from dscl.training.setup import RunSetup, build_setup
from dscl.training.state import Phase, TrainState
from dscl.training.trainer import Trainer
from dscl.utils.errors import UserError
from dscl.utils.json_files import parse_json_object

log = logging.getLogger("dscl")


def train(recipe: Recipe, stop: StopHandler | None = None, check_cluster: bool = False) -> None:
    """`dscl train`: train the recipe's stream, or resume it, and print the scores. Called on every rank.

    `check_cluster`: run the checks of `dscl doctor` first.
    """
    reject_other_recipe(recipe)
    if report_if_complete(recipe):
        return
    setup = build_setup_on_all_ranks(recipe)
    if check_cluster:
        preflight.run_checks(setup, log.info, strict=False)
    else:
        preflight.require_consistent_ranks(setup)
    with lock_run_dir(recipe):
        run(setup, stop)
    report_if_complete(recipe)


def run(setup: RunSetup, stop: StopHandler | None) -> None:
    """Build the engine, resume from the newest checkpoint and train what is left of the stream."""
    recipe = setup.recipe
    checkpoints = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint)
    newest = checkpoints.find_newest()
    if newest is not None:
        reject_other_base_model(newest, setup.run_info)
    tracer = Tracer(recipe.run_folder, recipe.observe.profile)
    with tracer:
        engine = setup.build_engine()
    with closing(engine), tracer:  # the tracer exits first: after an out-of-memory error it dumps the memory
        state, scores = start_new_run(setup) if newest is None else resume(newest, engine, setup)
        if stop is not None:
            stop.enable_graceful_stop(recipe.checkpoint.grace)
        planned_steps = setup.planned_steps()
        observer = Observer(recipe.run_folder, recipe.observe, comm.is_main(), planned_steps, state.total_steps)
        with observer, checkpoints.finish_pending_on_exit():
            checkpoints.on_saved = observer.log_save_time
            if message := tracer.explain_untraced(state.total_steps, sum(steps for _, steps in planned_steps)):
                observer.print_message(message)
            Trainer(setup, engine, state, scores, checkpoints, observer, tracer, stop).run()


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
    folder = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint).find_checkpoint(checkpoint)
    if folder is None:
        raise UserError(f"{run_dir}: no checkpoint there yet; train first")
    reject_other_base_model(folder, setup.run_info)
    with closing(setup.build_engine()) as engine:
        state, _ = restore_checkpoint(folder, engine, setup)
        lm_eval_scores = lm_eval.evaluate_with_lm_eval(
            lm_eval_tasks, lm_eval_limit, engine, setup.backbone.tokenizer, recipe.evaluate.batch
        )
        evaluator = Evaluator(setup, engine)
        results = evaluator.evaluate_tasks()
        oracle_results = evaluator.evaluate_tasks(oracle_task_id=True) if recipe.evaluate.oracle_task_id else []
        heldout = evaluator.heldout_loss()
    names = [task_data.task.name for task_data in setup.tasks]
    document: dict[str, Any] = {"checkpoint": folder.name, "tasks_trained": state.task}
    document["scores"] = _by_task(names, results, "score")
    if any(result is not None and result.routing_accuracy is not None for result in results):
        document |= {name: _by_task(names, results, name) for name in ("routing_accuracy", "rejected_share")}
    if oracle_results:
        document["oracle_task_id"] = _by_task(names, oracle_results, "score")
    if heldout:
        document["heldout"] = heldout[0]
    if lm_eval_scores:
        document["lm_eval"] = lm_eval_scores
    if comm.is_main():
        print(json.dumps(document), flush=True)


def diagnose_cluster(recipe: Recipe) -> None:
    """`dscl doctor`: check whether the cluster can run this recipe; nothing is trained."""
    setup = build_setup_on_all_ranks(recipe)
    preflight.run_checks(setup, lambda line: print(line, flush=True) if comm.is_main() else None)


def build_setup_on_all_ranks(recipe: Recipe, max_answer_tokens: int | None = None) -> RunSetup:
    """`build_setup`, then wait for all ranks without a timeout: preparing the data may take one of them hours."""
    setup = build_setup(recipe, max_answer_tokens)
    comm.wait_for_all_ranks()
    reject_needless_oracle(setup)
    return setup


def start_new_run(setup: RunSetup) -> tuple[TrainState, ScoreBoard]:
    needs_zero_shot = setup.recipe.evaluate.zero_shot or setup.heldout_texts
    tasks = [task_data.task for task_data in setup.tasks]
    names, metrics = tuple(task.name for task in tasks), tuple(task.metric for task in tasks)
    scores = ScoreBoard(setup.recipe.method.name, names, metrics)
    return TrainState(Phase.ZERO_SHOT if needs_zero_shot else Phase.TRAINING), scores


def resume(folder: Path, engine: Engine, setup: RunSetup) -> tuple[TrainState, ScoreBoard]:
    state, scores = restore_checkpoint(folder, engine, setup)
    num_tasks = len(setup.tasks)
    log.info("resumed from %s: task %d of %d", folder.name, min(state.task + 1, num_tasks), num_tasks)
    return state, scores


def restore_checkpoint(folder: Path, engine: Engine, setup: RunSetup) -> tuple[TrainState, ScoreBoard]:
    """Load a checkpoint, and the artifacts of the tasks trained by then, into the engine and the method."""
    state, scores = load_checkpoint(folder, engine, setup.method)
    trained = [task_data.task.name for task_data in setup.tasks[: state.num_trained_tasks]]
    setup.method.load_task_artifacts(setup.recipe.run_folder, trained)
    return state, scores


def report_if_complete(recipe: Recipe) -> bool:
    """Whether the run in this directory is complete; if so, its scores and the paths of its files are printed."""
    try:
        document = parse_json_object((recipe.run_folder / "scores.json").read_bytes())
        scores = ScoreBoard.from_json(document)
        is_complete = document["complete"] is True and scores.to_json()["complete"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # written again from the checkpoint
        return False
    if not is_complete:
        return False
    if comm.is_main():
        print(f"\n{score_table(scores)}\n")
        print(f"complete: {recipe.run_dir} (scores.json, metrics.jsonl, checkpoints/)")
        print(f"look:     {sys.executable} -m tensorboard.main --logdir {recipe.run_folder / 'tensorboard'}")
        print("again:    remove that folder, or give another run_dir", flush=True)
    return True


def _by_task(names: Sequence[str], results: Sequence[EvalResult | None], field: str) -> dict[str, Any]:
    return {name: getattr(result, field) for name, result in zip(names, results, strict=True)}
