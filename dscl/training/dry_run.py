"""`dscl train --dry-run`: build and check everything up to the first step, and print what would be trained."""

from __future__ import annotations

from contextlib import closing

from dscl.distributed import comm
from dscl.engine.full_shape import full_shape
from dscl.recipe.recipe import Recipe
from dscl.training.run import build_setup_on_all_ranks


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe, the model, the ranks and the tasks. No run is written."""
    setup = build_setup_on_all_ranks(recipe)
    with closing(setup.build_engine()) as engine:
        trainable = engine.shards.weight_fingerprints()
        sizes = {name: full_shape(parameter).numel() for name, parameter in engine.module.named_parameters()}
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
