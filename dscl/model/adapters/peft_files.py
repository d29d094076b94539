"""Read and write LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

Here an adapter only adds scale · B(A x) to linear layers. An adapter that changes a model in any other way is refused,
because serving it without that change would silently give other answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save

from dscl.config.parsing import describe_value, did_you_mean, shorten_to_line
from dscl.model.weights import FLOAT_DTYPES, open_safetensors
from dscl.utils.errors import ExternalFailure, UserError

CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PEFT_PREFIX = "base_model.model."  # PEFT's prefix of module paths
TENSOR_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>.+))?\.weight")
LAYER_PATH = re.compile(r"(?P<stack>.*?)\.(?P<index>\d+)\.(?P<inner>.+)")

# PEFT options with which an adapter is more than scale · B(A x); they must be false, null or empty.
UNSUPPORTED_OPTIONS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Initialisations that also change the base weights; PEFT changes them again whenever it loads such an adapter.
WEIGHT_SHIFTING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA of one linear layer, which adds scale · b(a x)."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """The LoRA of all layers."""

    name: str
    base_model: str  # a folder or a hub id; empty if unknown
    layers: dict[str, LoraWeights]  # by the module's path in the plain backbone


def task_file_name(task: str) -> str:
    """A file name for a task: the task's name with unsafe characters quoted; different tasks get different names."""
    quoted = quote(task, safe=" ").replace(".", "%2E")  # no file may be named .. or end in .partial
    return quoted if len(quoted) <= 150 else f"{quoted[:100]}%{hashlib.sha256(task.encode()).hexdigest()}"


def write_adapter(folder: Path, adapter: LoraAdapter) -> None:
    """Write the folder, or replace it. If the process is killed, the folder is never half-written under its name."""
    loras = list(adapter.layers.values())
    rank, scale = loras[0].a.shape[0], loras[0].scale
    assert all((len(lora.a), lora.b.shape[1], lora.scale) == (rank, rank, scale) for lora in loras)
    # Only long-standing keys: older versions of PEFT and some servers fail on keys they do not know.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _lora_alpha(scale, rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        **_target_config(adapter.layers),
    }
    tensors = {}
    for module, lora in adapter.layers.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = lora.a.cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = lora.b.cpu().contiguous()
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_file(partial / CONFIG_FILE, json.dumps(config, indent=2).encode())
        _write_file(partial / ADAPTER_WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExternalFailure(f"{folder}: the adapter cannot be written ({error.strerror or error})") from None


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraAdapter:
    """Read an adapter that PEFT wrote. `shapes`: (out, in) of every linear layer of the backbone."""
    config = _read_config(folder)
    path = folder / ADAPTER_WEIGHTS_FILE
    layers: dict[str, LoraWeights] = {}
    with open_safetensors(path) as file:
        names = _group_tensor_names(path, file.keys())
        _check_modules(folder, config, names, shapes)
        for module in (module for module in shapes if module in names):  # in the backbone's order
            rank = _module_setting(folder, config, "r", "rank_pattern", module)
            alpha = _module_setting(folder, config, "lora_alpha", "alpha_pattern", module)
            if isinstance(rank, float) or rank < 1:
                raise UserError(
                    f"{folder / CONFIG_FILE}: the rank of {module} is {rank}; a whole number of at least 1 is needed"
                )
            out_features, in_features = shapes[module]
            a = _read_tensor(path, file, names[module]["A"], [rank, in_features])
            b = _read_tensor(path, file, names[module]["B"], [out_features, rank])
            layers[module] = LoraWeights(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return LoraAdapter(folder.absolute().name, str(config.get("base_model_name_or_path") or ""), layers)


def _lora_alpha(scale: float, rank: int) -> float:
    """The alpha with alpha / rank = scale; an int where possible, because some servers require it."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _target_config(modules: Iterable[str]) -> dict[str, Any]:
    """PEFT settings that target exactly these modules.

    These are name endings and layer indices if possible, as servers expect, and otherwise all full names.
    """
    matches = [LAYER_PATH.fullmatch(module) for module in modules]
    suffixes = {match["inner"] for match in matches if match}
    endings = {name.rsplit(".", 1)[-1] for name in suffixes}
    layer_lists = {match["stack"] for match in matches if match}
    layer_indices = {int(match["index"]) for match in matches if match}
    if (
        None in matches
        or len(layer_lists) > 1
        or len(endings) < len(suffixes)
        or len(matches) < len(layer_indices) * len(suffixes)
    ):
        return {"target_modules": sorted(modules)}
    return {
        "target_modules": sorted(endings),
        "layers_to_transform": sorted(layer_indices),
        "layers_pattern": layer_lists.pop().rsplit(".", 1)[-1],
    }


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json; refuses an adapter that is no plain LoRA or has no safetensors weights."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE} there; give a folder that PEFT's save_pretrained wrote")
    if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        pickled = (
            f" {PICKLE_FILE} is pickled, which can run code and is never read:"
            if (folder / PICKLE_FILE).exists()
            else ""
        )
        raise UserError(
            f"{folder}: no {ADAPTER_WEIGHTS_FILE} there;{pickled} load the adapter with PEFT where you trust it, and "
            "write it with save_pretrained"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); copy or download it again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        peft_type = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(
            f"{path}: peft_type is {describe_value(peft_type)}; allowed: LORA; adapters of other kinds cannot be routed"
        )
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise UserError(
                f"{path}: {option} is {describe_value(config[option])}; allowed: off, for only what plain LoRA adds "
                f"can be routed; train the adapter again without {option}"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {describe_value(config['bias'])}; allowed: 'none', for the model's biases are shared by "
            "all tasks; train the adapter again with bias='none'"
        )
    init_method = config.get("init_lora_weights")
    if isinstance(init_method, str) and init_method.lower().startswith(WEIGHT_SHIFTING_INITS):
        raise UserError(
            f"{path}: init_lora_weights is {describe_value(init_method)}, so the adapter belongs to shifted weights of "
            "the model; save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    return config


def _group_tensor_names(path: Path, tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensor names by module and side ("A" or "B"); refuses anything but complete pairs of one adapter."""
    names: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in sorted(tensors):
        match = TENSOR_NAME.fullmatch(name.removeprefix(PEFT_PREFIX))
        if match is None:
            raise UserError(
                f"{path}: holds {shorten_to_line(name)}; allowed: lora_A.weight and lora_B.weight of linear layers; "
                "all else is shared by all tasks, so train the adapter again without embeddings, biases and whole "
                "layers"
            )
        names.setdefault(match["module"], {})[match["side"]] = name
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        adapter_names = ", ".join(sorted(adapter or "one without a name" for adapter in adapters))
        raise UserError(
            f"{path}: holds {len(adapters)} adapters ({adapter_names}); one in a folder is allowed; save each alone"
        )
    for module, sides in names.items():
        if len(sides) < 2:
            raise UserError(f"{path}: for {module} only lora_{min(sides)} is there; A and B are needed; save it again")
    return names


def _check_modules(
    folder: Path, config: Mapping[str, Any], tensor_modules: Iterable[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse weights that are not for exactly the linear layers of the backbone that the configuration targets."""
    path, modules = folder / ADAPTER_WEIGHTS_FILE, set(tensor_modules)
    if not modules:
        raise UserError(
            f"{path}: holds no tensors; save the adapter again (at ZeRO 3 its weights must be gathered first)"
        )
    for module in sorted(modules - set(shapes)):
        base = shorten_to_line(str(config.get("base_model_name_or_path") or "which it does not name"))
        raise UserError(
            f"{path}: holds weights for {module}, and the model has no such linear "
            f"layer{did_you_mean(module, shapes)}; use the model that the adapter was trained on ({base})"
        )
    target_settings: dict[str, Any] = {key: config.get(key) for key in TARGET_KEYS}
    if target_settings["target_modules"] in (None, "all-linear"):  # PEFT then chooses the targets by model type
        return
    from peft import LoraConfig as PeftLoraConfig  # slow to import
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        peft = PeftLoraConfig(**target_settings)
        targets = {module for module in shapes if check_target_module_exists(peft, module)}
    except (TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{folder / CONFIG_FILE}: {', '.join(TARGET_KEYS)} make no sense ({shorten_to_line(str(error))})"
        ) from None
    for module in sorted(modules ^ targets):  # PEFT would ignore such weights, or initialise missing ones
        problem = (
            "holds weights for {}, which {} does not target" if module in modules else "lacks {}, which {} targets"
        )
        raise UserError(
            f"{path}: {problem.format(module, CONFIG_FILE)}; the two files do not belong together, so copy both again"
        )


def _module_setting(folder: Path, config: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """A module's rank or alpha, as PEFT resolves it: from the first matching pattern, or else the common value."""
    value = config.get(key)
    try:
        for pattern, override in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = override
                break
    except (AttributeError, re.error) as error:
        raise UserError(f"{folder / CONFIG_FILE}: {patterns} makes no sense ({error}); copy the file again") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise UserError(
            f"{folder / CONFIG_FILE}: for {module}, {key} (or {patterns}) is {describe_value(value)}; a number is "
            "needed"
        )
    return value


def _read_tensor(path: Path, file: Any, name: str, shape: list[int]) -> torch.Tensor:
    tensor_slice = file.get_slice(name)
    if tensor_slice.get_dtype() not in FLOAT_DTYPES:
        raise UserError(
            f"{path}: {name} is of type {tensor_slice.get_dtype()}; allowed: {', '.join(FLOAT_DTYPES)}; save the "
            "adapter unquantised"
        )
    if tensor_slice.get_shape() != shape:
        raise UserError(
            f"{path}: {name} has shape {tensor_slice.get_shape()}, the model's layer and the rank in {CONFIG_FILE} ask "
            f"for {shape}; use the model that the adapter was trained on, and the files as they were saved together"
        )
    tensor: torch.Tensor = file.get_tensor(
        name
    ).clone()  # not the file's memory map, because the file may be overwritten
    if not tensor.isfinite().all():
        raise UserError(
            f"{path}: {name} holds values that are not finite; use a checkpoint of before the training broke"
        )
    return tensor
