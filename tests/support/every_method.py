"""A small recipe for each method, for runs at any ZeRO stage on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.five_tasks import NAMES, recipe

SMALL: dict[str, dict[str, Any]] = {
    "agem": {"constraint": {"memory_ratio": 0.3}},
    "asr": {"tune": {"rank": 4}, "router": {"layer": 1, "num_features": 128}},
    "ewc": {"constraint": {"ewc_lambda": 100.0, "fisher_samples": 16}},
    "lora_per_task": {"tune": {"rank": 4}},
    "moses": {"tune": {"num_experts": 4, "top_k": 2, "rank": 2}, "router": {"num_features": 128}},
    "olora": {"tune": {"rank": 4}},
    "replay": {"replay": {"size": 4}},
}


def recipe_of_method(folder: Path, method: str, name: str, settings: str = "zero0") -> Any:
    """A recipe of two tasks with one epoch each. `settings` names a file of ds_configs."""
    document = recipe(folder, f"{method} {name}", 0, NAMES[:2], evaluate={"zero_shot": False, "tasks": "seen"})
    document["train"] |= {"lr": 3e-3, "epochs": 1}
    document["stream_defaults"] = {"dev_share": 0}
    return document | {"method": {"name": method, **SMALL.get(method, {})}, "deepspeed": f"ds_configs/{settings}.json"}
