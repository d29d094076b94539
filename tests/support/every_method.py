"""One small recipe for every method, to be trained at any ZeRO stage on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.five_tasks import NAMES, recipe

SMALL: dict[str, dict[str, Any]] = {
    "agem": {"share": 0.3},
    "asr": {"width": 128, "feature_layer": 1, "lora": {"rank": 4}},
    "ewc": {"strength": 100.0, "samples": 16},
    "lora_per_task": {"lora": {"rank": 4}},
    "moses": {"experts": 4, "top_k": 2, "rank": 2, "width": 128},
    "olora": {"lora": {"rank": 4}},
    "replay": {"most": 4},
}


def document(folder: Path, method: str, name: str, settings: str = "zero0") -> Any:
    """Two tasks of one epoch; `settings`: a file of ds_configs."""
    made = recipe(folder, f"{method} {name}", 0, NAMES[:2], evaluate={"before": False, "tasks": "seen"})
    made["train"] |= {"lr": 3e-3, "epochs": 1}
    made["stream_defaults"] = {"dev_share": 0}
    return made | {"method": {"name": method, **SMALL.get(method, {})}, "deepspeed": f"ds_configs/{settings}.json"}
