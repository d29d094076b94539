"""LoRA adapters as PEFT stores them: a folder with adapter_config.json and adapter_model.safetensors.

Here an adapter is what it adds to linear layers, scale · B(A x), and nothing else. One that changes a model in any
other way is refused: served without that, it would silently be another adapter.
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

from dscl.config.parsing import nearest, shorten, show
from dscl.model.weights import NUMBERS, open_safetensors
from dscl.utils.errors import Failure, UserError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # what PEFT puts before a module's path
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>.+))?\.weight")
IN_A_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>\d+)\.(?P<inner>.+)")

# Options of PEFT that make more of an adapter than scale · B(A x); off is false, null or empty.
OFF = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Initialisations that also shift the weights below; PEFT shifts them again whenever it loads such an adapter.
SHIFTING = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """What one linear layer gets: scale · b(a x)."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True)
class Adapter:
    name: str
    base: str  # the model that it belongs to: a folder or a hub id, empty when nobody said
    layers: dict[str, Pair]  # by the module's path in the plain backbone


def file_name(task: str) -> str:
    """A task's name as a file's: as it stands where that is safe, and never the same for two tasks."""
    quoted = quote(task, safe=" ").replace(".", "%2E")  # so that no task is called .. or like another's .partial
    return quoted if len(quoted) <= 150 else f"{quoted[:100]}%{hashlib.sha256(task.encode()).hexdigest()}"


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write the folder, in place of one that is there; a process that is killed leaves no half of one by that name."""
    pairs = list(adapter.layers.values())
    rank, scale = pairs[0].a.shape[0], pairs[0].scale
    assert all((len(pair.a), pair.b.shape[1], pair.scale) == (rank, rank, scale) for pair in pairs)
    # Only what PEFT has known for long: its older versions, and some servers, fail on a key that is new to them.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        **_targets(adapter.layers),
    }
    tensors = {}
    for module, pair in adapter.layers.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.cpu().contiguous()
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    try:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial / CONFIG, json.dumps(config, indent=2).encode())
        _write(partial / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise Failure(f"{folder}: the adapter cannot be written ({error.strerror or error})") from None


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter in a folder that PEFT wrote; `shapes`: (out, in) of every linear layer of the backbone."""
    config = _config(folder)
    path = folder / WEIGHTS
    layers: dict[str, Pair] = {}
    with open_safetensors(path) as file:
        names = _names(path, file.keys())
        _check_modules(folder, config, names, shapes)
        for module in (module for module in shapes if module in names):  # in the backbone's order
            rank = _number(folder, config, "r", "rank_pattern", module)
            alpha = _number(folder, config, "lora_alpha", "alpha_pattern", module)
            if isinstance(rank, float) or rank < 1:
                raise UserError(
                    f"{folder / CONFIG}: the rank of {module} is {rank}; a whole number of at least 1 is needed"
                )
            out, into = shapes[module]
            a = _tensor(path, file, names[module]["A"], [rank, into])
            b = _tensor(path, file, names[module]["B"], [out, rank])
            layers[module] = Pair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return Adapter(folder.absolute().name, str(config.get("base_model_name_or_path") or ""), layers)


def _alpha(scale: float, rank: int) -> float:
    """The alpha whose quotient by the rank is the scale; a whole number where it can be, as some servers ask."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _targets(modules: Iterable[str]) -> dict[str, Any]:
    """Exactly these modules in PEFT's words: endings and layer numbers, as servers like it, or else every full name."""
    places = [IN_A_LAYER.fullmatch(module) for module in modules]
    inner = {place["inner"] for place in places if place}
    endings = {name.rsplit(".", 1)[-1] for name in inner}
    stacks = {place["stack"] for place in places if place}
    indices = {int(place["index"]) for place in places if place}
    if None in places or len(stacks) > 1 or len(endings) < len(inner) or len(places) < len(indices) * len(inner):
        return {"target_modules": sorted(modules)}
    return {
        "target_modules": sorted(endings),
        "layers_to_transform": sorted(indices),
        "layers_pattern": stacks.pop().rsplit(".", 1)[-1],
    }


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA whose weights are there as safetensors."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} there; give a folder that PEFT's save_pretrained wrote")
    if not (folder / WEIGHTS).is_file():
        pickled = f" {PICKLED} is pickled, which can run code and is never read:" if (folder / PICKLED).exists() else ""
        raise UserError(
            f"{folder}: no {WEIGHTS} there;{pickled} load the adapter with PEFT where you trust it, and write it with "
            "save_pretrained"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); copy or download it again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{path}: peft_type is {show(kind)}; allowed: LORA; adapters of other kinds cannot be routed")
    for option in OFF:
        if config.get(option):
            raise UserError(
                f"{path}: {option} is {show(config[option])}; allowed: off, for only what plain LoRA adds can be "
                f"routed; train the adapter again without {option}"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {show(config['bias'])}; allowed: 'none', for the model's biases are shared by all tasks; "
            "train the adapter again with bias='none'"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(SHIFTING):
        raise UserError(
            f"{path}: init_lora_weights is {show(start)}, so the adapter belongs to shifted weights of the model; save "
            "it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    return config


def _names(path: Path, tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors' names by module and side (A or B); nothing but complete pairs of one adapter."""
    names: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in sorted(tensors):
        match = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise UserError(
                f"{path}: holds {shorten(name)}; allowed: lora_A.weight and lora_B.weight of linear layers; all else "
                "is shared by all tasks, so train the adapter again without embeddings, biases and whole layers"
            )
        names.setdefault(match["module"], {})[match["side"]] = name
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        listed = ", ".join(sorted(adapter or "one without a name" for adapter in adapters))
        raise UserError(
            f"{path}: holds {len(adapters)} adapters ({listed}); one in a folder is allowed; save each alone"
        )
    for module, sides in names.items():
        if len(sides) < 2:
            raise UserError(f"{path}: for {module} only lora_{min(sides)} is there; A and B are needed; save it again")
    return names


def _check_modules(
    folder: Path, config: Mapping[str, Any], found: Iterable[str], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """The weights must be for linear layers of the backbone: exactly those that the configuration targets."""
    path, modules = folder / WEIGHTS, set(found)
    if not modules:
        raise UserError(
            f"{path}: holds no tensors; save the adapter again (at ZeRO 3 its weights must be gathered first)"
        )
    for module in sorted(modules - set(shapes)):
        base = shorten(str(config.get("base_model_name_or_path") or "which it does not name"))
        raise UserError(
            f"{path}: holds weights for {module}, and the model has no such linear layer{nearest(module, shapes)}; use "
            f"the model that the adapter was trained on ({base})"
        )
    rules: dict[str, Any] = {key: config.get(key) for key in TARGETING}
    if rules["target_modules"] in (None, "all-linear"):  # PEFT then goes by the kind of model
        return
    from peft import LoraConfig as PeftLoraConfig  # slow to import
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        peft = PeftLoraConfig(**rules)
        targets = {module for module in shapes if check_target_module_exists(peft, module)}
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"{folder / CONFIG}: {', '.join(TARGETING)} make no sense ({shorten(str(error))})") from None
    for module in sorted(modules ^ targets):  # PEFT would pass over the one, and start the other afresh
        what = "holds weights for {}, which {} does not target" if module in modules else "lacks {}, which {} targets"
        raise UserError(
            f"{path}: {what.format(module, CONFIG)}; the two files do not belong together, so copy both again"
        )


def _number(folder: Path, config: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """A module's rank or alpha: from the first pattern that its path ends with, else the one for all, as in PEFT."""
    value = config.get(key)
    try:
        for pattern, own in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = own
                break
    except (AttributeError, re.error) as error:
        raise UserError(f"{folder / CONFIG}: {patterns} makes no sense ({error}); copy the file again") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise UserError(f"{folder / CONFIG}: for {module}, {key} (or {patterns}) is {show(value)}; a number is needed")
    return value


def _tensor(path: Path, file: Any, name: str, shape: list[int]) -> torch.Tensor:
    part = file.get_slice(name)
    if part.get_dtype() not in NUMBERS:
        raise UserError(
            f"{path}: {name} is of type {part.get_dtype()}; allowed: {', '.join(NUMBERS)}; save the adapter unquantised"
        )
    if part.get_shape() != shape:
        raise UserError(
            f"{path}: {name} has shape {part.get_shape()}, the model's layer and the rank in {CONFIG} ask for {shape}; "
            "use the model that the adapter was trained on, and the files as they were saved together"
        )
    tensor: torch.Tensor = file.get_tensor(name).clone()  # else the file's own memory, and it may be written again
    if not tensor.isfinite().all():
        raise UserError(
            f"{path}: {name} holds values that are not finite; use a checkpoint of before the training broke"
        )
    return tensor
