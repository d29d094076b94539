"""Reads and checks a DeepSpeed JSON: which keys are allowed, and which are set in the recipe instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dscl.config.parsing import did_you_mean
from dscl.utils.errors import UserError

# DeepSpeed keys that a JSON may not set, and the recipe keys that set them.
OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "steps_per_print": "observe.every",
    "tensorboard": "observe",
}
# DeepSpeed keys that a JSON may set.
OWNED_BY_JSON = (
    "zero_optimization",
    "data_types",
    "bf16",
    "fp16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "aio",
)


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; UserError for an unknown key, a key that the recipe sets, or an unsupported value."""
    try:
        settings = json.loads(path.read_text("utf-8"), object_pairs_hook=_refuse_duplicate_keys)
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed: {path} is not a readable JSON file ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed: {path} holds no JSON object")
    for name in settings:
        if name not in (*OWNED_BY_JSON, *OWNED_BY_RECIPE):
            allowed = ", ".join(OWNED_BY_JSON)
            raise UserError(
                f"deepspeed: {path}: no such key {name!r}{did_you_mean(name, OWNED_BY_JSON)}; allowed: {allowed}"
            )
    for name in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(settings.get(name, {}), dict):
            raise UserError(f"deepspeed: {path}: {name}: given {json.dumps(settings[name])}; an object is needed")
    for dotted, owner in OWNED_BY_RECIPE.items():
        outer, _, inner = dotted.partition(".")
        if outer in settings and (not inner or inner in settings[outer]):
            raise UserError(
                f"deepspeed: {path} sets {dotted}, which belongs to the recipe; remove it and set {owner} there"
            )
    profiler = settings.get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file"):
        raise UserError(
            f"deepspeed: {path}: flops_profiler.output_file: given {json.dumps(profiler['output_file'])}; a run writes "
            "into run_dir alone; leave it out, and the profile goes to the standard output"
        )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: {path}: zero_optimization.stage: given {json.dumps(stage)}; allowed: 0, 1, 2, 3")
    for name in ("offload_param", "offload_optimizer"):
        device = zero[name].get("device") if isinstance(zero.get(name), dict) else zero.get(name, "none")
        if device not in ("cpu", "none"):
            raise UserError(
                f'deepspeed: {path}: {name}: given {device!r}; allowed: {{"device": "cpu"}}, or leave it out'
            )
        if name in zero and not isinstance(zero[name], dict):
            raise UserError(f'deepspeed: {path}: {name}: given {zero[name]!r}; write {{"device": "{device}"}}')
        min_stage = {"offload_param": 3, "offload_optimizer": 1}[name]
        if device == "cpu" and stage < min_stage:
            raise UserError(
                f"deepspeed: {path}: {name} does nothing at stage {stage}; allowed from stage {min_stage} on"
            )
    # Not supported: hpZ keeps a second copy of the weights, and an offload ratio below 1 has two Adam optimizers.
    for dotted in ("zero_hpz_partition_size", "offload_optimizer.ratio"):
        outer, _, inner = dotted.partition(".")
        value = zero.get(outer, {}).get(inner, 1) if inner else zero.get(outer, 1)
        if value != 1:
            raise UserError(
                f"deepspeed: {path}: zero_optimization.{dotted}: given {json.dumps(value)}; allowed: 1, or leave it out"
            )
    return settings


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Called by `json.loads` for every object."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} is given twice")
    return dict(pairs)


def refuse_optimizer_bypass(zero: dict[str, Any]) -> None:
    """Refuse ZeRO settings that update the weights without the optimizer's `step`, after which OSFT projects them."""
    for dotted in ("zenflow", "offload_optimizer.super_offload"):
        outer, _, inner = dotted.partition(".")
        if zero.get(outer, {}).get(inner) if inner else zero.get(outer):
            raise UserError(
                f"deepspeed: zero_optimization.{dotted} bypasses the optimizer's step, after which this method "
                "projects the weights; remove it, or choose a method without a constraint"
            )
