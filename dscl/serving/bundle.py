"""What there is to serve, and the folder that carries it: an export.

    dscl.json            the base model, the tasks in their order, and what they were trained with
    adapters/ experts/   one of them: what each task has left, as the run wrote it
    router.safetensors   which task a prompt belongs to; not there where the caller has to say
    weights.safetensors  dense weights that were trained, to lay over the base model's; seldom there
    tokenizer/

The base model itself is not in it. An export stands there whole or not at all.
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

from dscl.config.parsing import key, parse, plain
from dscl.config.schema import ModelConfig
from dscl.data.encode import fingerprint
from dscl.data.records import read_json
from dscl.methods.rls_router import Router, Spec
from dscl.model.adapters.peft_files import CONFIG, WEIGHTS, file_name
from dscl.model.backbone import DTYPES, Backbone, open_backbone
from dscl.model.tokenizer import load_tokenizer
from dscl.model.weight_overlay import Trained, TrainedFile, check_trained, write_trained
from dscl.utils.errors import Failure, UserError

FORMAT = 1
DESCRIPTION, ROUTER, TRAINED, TOKENIZER = "dscl.json", "router.safetensors", "weights.safetensors", "tokenizer"
ADAPTERS, EXPERTS = "adapters", "experts"  # kinds of what a task leaves, and folders for it in runs and in exports
# What transformers reads a tokenizer from; the model's configuration can decide which kind of tokenizer it makes.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What the tasks were trained with, and are served with."""

    model: str = key(help="model")  # fingerprints
    tokenizer: str = key(help="tokenizer")
    prompt_limit: int = key(at_least=1, help="longest prompt in tokens")
    precision: str = key(help="precision")

    @classmethod
    def of(cls, facts: Any) -> Training:
        """Of a router's features, or of a run's facts."""
        return cls(**{field.name: getattr(facts, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Description:
    """What there is to serve."""

    model: ModelConfig  # the base, and the tokenizer's folder
    seed: int  # of a base that is built from a shape
    tasks: dict[str, Path]  # what each has left, in the order in which they ended: an adapter's folder or a file
    training: Training
    router: Router | None  # None: the caller has to say which task a prompt belongs to
    kind: str = ADAPTERS
    trained: Trained | None = None  # dense weights that are not the base's


def part_of(folder: Path, kind: str, task: str) -> Path:
    """Where a run or an export keeps what a task has left."""
    return folder / kind / (file_name(task) + (".safetensors" if kind == EXPERTS else ""))


def open_base(description: Description) -> Backbone:
    """The base model, not built yet; refused if it is not the one that the tasks were trained on."""
    model, there = description.model, description.training
    dtype = DTYPES.get(there.precision)
    if dtype is None:
        raise UserError(f"precision: given {there.precision!r}; allowed: {', '.join(DTYPES)}; export the run again")
    backbone = open_backbone(model, seed=description.seed, dtype=dtype, cache=Path(), texts=lambda: ())
    here = {"model": backbone.fingerprint(), "tokenizer": fingerprint(backbone.tokenizer)}
    for what, found in here.items():
        if getattr(there, what) != found:
            raise UserError(
                f"{model.name or 'the base model'}: the tasks were trained with {what} {getattr(there, what)[:12]}, "
                f"here it is {found[:12]}; give the base model and the tokenizer of the training"
            )
    if description.trained is not None:
        check_trained(description.trained, shapes_of(backbone), "the trained weights")
    return backbone


def shapes_of(backbone: Backbone) -> dict[str, torch.Size]:
    """Of the backbone's tensors, told without memory for them."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in backbone.build().named_parameters()}


def read_description(folder: Path, base: str | None = None) -> Description:
    """What an export holds; `base` in place of the base model that it names."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder}: no export there (it would hold {DESCRIPTION}); give one that dscl export wrote")
    document = read_json(path)
    try:
        version = document["format"]
        if version != FORMAT:
            raise UserError(f"{path}: an export of format {version}, this version reads {FORMAT}; export the run again")
        kind = document.get("kind", ADAPTERS)
        if kind not in (ADAPTERS, EXPERTS):
            raise UserError(f"{path}: kind is {kind!r}; allowed: {ADAPTERS}, {EXPERTS}; export the run again")
        features, trained = document.get("features"), document.get("trained")
        spec = None if features is None else parse(Spec, features, f"{path}: features")
        training = parse(Training, document["training"], f"{path}: training") if spec is None else Training.of(spec)
        model, seed = parse(ModelConfig, document["model"], f"{path}: model"), document["seed"]
        tasks = {task: part_of(folder, kind, task) for task in document["tasks"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the description of an export ({error!r}); copy it again") from None
    if base is not None:
        model = ModelConfig(name=lasting(base))
    elif model.name is not None and Path(model.name).is_absolute() and not Path(model.name).is_dir():
        raise UserError(
            f"{folder}: its base model was at {model.name}, and is not there; say where it lies now (base=..., --base)"
        )
    router = None if spec is None else Router.load(folder / ROUTER, spec)
    if router is not None and set(router.names) != set(tasks):
        raise UserError(
            f"{folder}: {DESCRIPTION} names the tasks {', '.join(tasks)}, {ROUTER} holds {', '.join(router.names)}; "
            "the two do not belong together, so copy both again"
        )
    model = dataclasses.replace(model, tokenizer=str(folder / TOKENIZER))
    weights = None if trained is None else TrainedFile(folder / TRAINED, trained)
    return Description(model, seed, tasks, training, router, kind, weights)


def write(description: Description, folder: Path) -> None:
    """Write an export, in place of an earlier one."""
    refuse_other(folder)
    if not description.tasks:
        raise UserError(f"{folder}: there is no task to write; add one first")
    model, training, router = description.model, description.training, description.router
    assert model.tokenizer is not None
    document: dict[str, Any] = {
        "format": FORMAT,
        "kind": description.kind,
        "model": {"name": model.name, "shape": model.shape},
        "seed": description.seed,
        "tasks": list(description.tasks),
        # Without a router the features are null, and what they would tell of the training stands alone.
        "features": None if router is None else plain(router.spec),
    }
    with replacing(folder) as new:
        for name, part in description.tasks.items():
            place = part_of(new, description.kind, name)
            if description.kind == ADAPTERS:
                copy(part, place, (CONFIG, WEIGHTS))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(part, place)
        copy(Path(model.tokenizer), new / TOKENIZER, TOKENIZER_FILES)
        if fingerprint(load_tokenizer(new / TOKENIZER)) != training.tokenizer:
            raise UserError(f"{model.tokenizer}: not the tokenizer that the tasks were trained with; restore it there")
        if router is None:
            document["training"] = plain(training)
        else:
            router.save(new / ROUTER)
        if description.trained is not None:
            document["trained"] = write_trained(new / TRAINED, description.trained, DTYPES[training.precision])
        (new / DESCRIPTION).write_text(json.dumps(document, indent=1, ensure_ascii=False), "utf-8")


def lasting(name: str) -> str:
    """A model's name that holds from any working directory: the full path of a folder, or a hub id as it stands."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def refuse_other(folder: Path) -> None:
    """An export takes the place of nothing but an export."""
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder}: something else is there; give a new or an empty folder, or that of an export")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place for a new folder that takes this one's when it is complete; one that a kill leaves has another name."""
    folder = folder.resolve()
    workshop = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield workshop / "new"
        if folder.exists():
            os.replace(folder, workshop / "old")
        os.replace(workshop / "new", folder)
    except OSError as error:
        raise Failure(f"{folder}: the export cannot be written ({error.strerror or error})") from None
    finally:
        if workshop is not None:
            shutil.rmtree(workshop, ignore_errors=True)


def copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """The files of a folder that match."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in patterns):
            shutil.copyfile(file, target / file.name)
