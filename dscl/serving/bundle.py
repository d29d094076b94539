"""The bundle: everything that serving needs beside the base model. An export is a folder that holds a bundle.

    dscl.json            the description: base model, tasks in training order, training settings
    adapters/ experts/   one of the two: each task's adapter or sub-experts, as the run wrote them
    router.safetensors   the task router; absent if the caller has to name each prompt's task
    weights.safetensors  trained dense weights, which replace those of the base model; usually absent
    tokenizer/

An export does not contain the base model. An export is written atomically: the folder is complete or does not exist.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dscl.config.parsing import config_key, parse_config, to_plain_data
from dscl.config.schema import ModelConfig
from dscl.data.encode import tokenizer_fingerprint
from dscl.data.records import read_json
from dscl.methods.rls_router import Router, RouterSpec
from dscl.model.adapters.peft_files import ADAPTER_WEIGHTS_FILE, CONFIG_FILE, task_file_name
from dscl.model.backbone import DTYPES, Backbone, resolve_backbone
from dscl.model.tokenizer import load_tokenizer
from dscl.model.weight_overlay import OverlayFile, WeightOverlay, check_overlay, write_overlay
from dscl.utils.errors import ExternalFailure, UserError

FORMAT_VERSION = 1
DESCRIPTION_FILE, ROUTER_FILE, TRAINED_WEIGHTS_FILE, TOKENIZER_FOLDER = (
    "dscl.json",
    "router.safetensors",
    "weights.safetensors",
    "tokenizer",
)
ADAPTERS, EXPERTS = "adapters", "experts"  # the kinds of task artifacts, and their folders in runs and exports
# The files from which transformers loads a tokenizer. config.json can decide the tokenizer's class.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingInfo:
    """The settings of training that serving has to repeat."""

    model: str = config_key(help="model")  # fingerprint of the base model
    tokenizer: str = config_key(help="tokenizer")  # fingerprint
    prompt_limit: int = config_key(at_least=1, help="longest prompt in tokens")
    precision: str = config_key(help="precision")

    @classmethod
    def from_attributes(cls, source: Any) -> TrainingInfo:
        """Copy the attributes of the same names from `source`, such as the router's feature specification."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class BundleDescription:
    """What a run or an export offers for serving, and where its files are."""

    model: ModelConfig  # the base model and the tokenizer's folder
    seed: int  # initialises a base model that is built from `model.shape`
    tasks: dict[str, Path]  # task name → its adapter folder or sub-expert file, in training order
    training: TrainingInfo
    router: Router | None  # None: the caller has to name each prompt's task
    kind: str = ADAPTERS  # ADAPTERS or EXPERTS
    trained_weights: WeightOverlay | None = None  # dense weights that replace those of the base model


def task_artifact_path(folder: Path, kind: str, task: str) -> Path:
    """The adapter folder or the sub-expert file of a task, in a run directory or an export."""
    return folder / kind / (task_file_name(task) + (".safetensors" if kind == EXPERTS else ""))


def open_base_model(description: BundleDescription) -> Backbone:
    """Open the base model without building it. Raise UserError unless it is the one that the tasks were trained on."""
    model, training = description.model, description.training
    dtype = DTYPES.get(training.precision)
    if dtype is None:
        raise UserError(f"precision: given {training.precision!r}; allowed: {', '.join(DTYPES)}; export the run again")
    backbone = resolve_backbone(model, seed=description.seed, dtype=dtype, cache=Path(), texts=lambda: ())
    fingerprints = {"model": backbone.fingerprint(), "tokenizer": tokenizer_fingerprint(backbone.tokenizer)}
    for part, actual in fingerprints.items():
        expected = getattr(training, part)
        if expected != actual:
            raise UserError(
                f"{model.name or 'the base model'}: the tasks were trained with {part} {expected[:12]}, "
                f"here it is {actual[:12]}; give the base model and the tokenizer of the training"
            )
    if description.trained_weights is not None:
        check_overlay(description.trained_weights, parameter_shapes(backbone), "the trained weights")
    return backbone


def parameter_shapes(backbone: Backbone) -> dict[str, torch.Size]:
    """The shape of every parameter by name, found on the meta device, which allocates no memory."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in backbone.build().named_parameters()}


def read_bundle_description(folder: Path, base: str | None = None) -> BundleDescription:
    """Read an export's description and router. `base` replaces the base model that the export names."""
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: no export there (it would hold {DESCRIPTION_FILE}); give one that dscl export wrote"
        )
    document = read_json(path)
    try:
        version = document["format"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: an export of format {version}, this version reads {FORMAT_VERSION}; export the run again"
            )
        kind = document.get("kind", ADAPTERS)
        if kind not in (ADAPTERS, EXPERTS):
            raise UserError(f"{path}: kind is {kind!r}; allowed: {ADAPTERS}, {EXPERTS}; export the run again")
        features, weights_checksum = document.get("features"), document.get("trained")
        spec = None if features is None else parse_config(RouterSpec, features, f"{path}: features")
        training = (
            parse_config(TrainingInfo, document["training"], f"{path}: training")
            if spec is None
            else TrainingInfo.from_attributes(spec)
        )
        model, seed = parse_config(ModelConfig, document["model"], f"{path}: model"), document["seed"]
        tasks = {task: task_artifact_path(folder, kind, task) for task in document["tasks"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the description of an export ({error!r}); copy it again") from None
    if base is not None:
        model = ModelConfig(name=absolute_model_name(base))
    elif model.name is not None and Path(model.name).is_absolute() and not Path(model.name).is_dir():
        raise UserError(
            f"{folder}: its base model was at {model.name}, and is not there; say where it lies now (base=..., --base)"
        )
    router = None if spec is None else Router.load(folder / ROUTER_FILE, spec)
    if router is not None and set(router.names) != set(tasks):
        raise UserError(
            f"{folder}: {DESCRIPTION_FILE} names the tasks {', '.join(tasks)}, "
            f"{ROUTER_FILE} holds {', '.join(router.names)}; the two do not belong together, so copy both again"
        )
    model = dataclasses.replace(model, tokenizer=str(folder / TOKENIZER_FOLDER))
    trained_weights = None if weights_checksum is None else OverlayFile(folder / TRAINED_WEIGHTS_FILE, weights_checksum)
    return BundleDescription(model, seed, tasks, training, router, kind, trained_weights)


def write_export(description: BundleDescription, folder: Path) -> None:
    """Write the bundle as an export folder. An earlier export in this folder is replaced."""
    check_export_target(folder)
    if not description.tasks:
        raise UserError(f"{folder}: there is no task to write; add one first")
    model, training, router = description.model, description.training, description.router
    assert model.tokenizer is not None
    document: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "kind": description.kind,
        "model": {"name": model.name, "shape": model.shape},
        "seed": description.seed,
        "tasks": list(description.tasks),
        # The router's feature specification includes the training info; without a router "training" is written.
        "features": None if router is None else to_plain_data(router.spec),
    }
    with replace_folder_atomically(folder) as new_folder:
        for name, source in description.tasks.items():
            target = task_artifact_path(new_folder, description.kind, name)
            if description.kind == ADAPTERS:
                copy_matching_files(source, target, (CONFIG_FILE, ADAPTER_WEIGHTS_FILE))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        copy_matching_files(Path(model.tokenizer), new_folder / TOKENIZER_FOLDER, TOKENIZER_FILES)
        if tokenizer_fingerprint(load_tokenizer(new_folder / TOKENIZER_FOLDER)) != training.tokenizer:
            raise UserError(f"{model.tokenizer}: not the tokenizer that the tasks were trained with; restore it there")
        if router is None:
            document["training"] = to_plain_data(training)
        else:
            router.save(new_folder / ROUTER_FILE)
        if description.trained_weights is not None:
            document["trained"] = write_overlay(
                new_folder / TRAINED_WEIGHTS_FILE, description.trained_weights, DTYPES[training.precision]
            )
        (new_folder / DESCRIPTION_FILE).write_text(json.dumps(document, indent=1, ensure_ascii=False), "utf-8")


def absolute_model_name(name: str) -> str:
    """The absolute path of a model folder; a hub id is returned unchanged."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def check_export_target(folder: Path) -> None:
    """Raise UserError if the folder holds anything that is not an export, which writing would destroy."""
    if folder.exists() and not (folder / DESCRIPTION_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder}: something else is there; give a new or an empty folder, or that of an export")


@contextmanager
def replace_folder_atomically(folder: Path) -> Iterator[Path]:
    """Yield the path at which to write the new folder; on success it replaces `folder`.

    A killed process leaves a partial folder under a temporary name only.
    """
    folder = folder.resolve()
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging / "new"
        if folder.exists():
            os.replace(folder, staging / "old")
        os.replace(staging / "new", folder)
    except OSError as error:
        raise ExternalFailure(f"{folder}: the export cannot be written ({error.strerror or error})") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def copy_matching_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of `source` whose names match a pattern into the new folder `target`."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in patterns):
            shutil.copyfile(file, target / file.name)
