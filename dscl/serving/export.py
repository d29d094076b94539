"""From a run, or from adapters made elsewhere, to an export: the folder that `dscl.load` reads."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dscl.config.methods import (
    AsrConfig,
    LoraConfig,
    LoraPerTaskConfig,
    MosesConfig,
    OloraConfig,
    OsftConfig,
    SequentialConfig,
)
from dscl.config.parsing import nearest, parse
from dscl.config.schema import ModelConfig
from dscl.data.encode import fingerprint
from dscl.data.prompts import read_prompts
from dscl.data.stream import load_stream
from dscl.methods.registry import find_method
from dscl.methods.rls_router import Router, Spec
from dscl.methods.task_router import feature_layer_of, width_of
from dscl.model.adapters.injection import matching
from dscl.model.adapters.peft_files import CONFIG, WEIGHTS, Adapter, Pair, file_name, write_adapter
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.serving_bank import Claimed
from dscl.model.adapters.task_masks import open_claims
from dscl.model.backbone import DTYPES, Backbone, locate, open_backbone
from dscl.model.model_folder import write_model
from dscl.recipe.recipe import Recipe, read_recipe
from dscl.serving.bundle import (
    ADAPTERS,
    DESCRIPTION,
    EXPERTS,
    ROUTER,
    TOKENIZER,
    TOKENIZER_FILES,
    TRAINED,
    Description,
    Training,
    copy,
    lasting,
    open_base,
    part_of,
    read_description,
    refuse_other,
    replacing,
    shapes_of,
    write,
)
from dscl.serving.server import open_model
from dscl.training.checkpoint import Checkpoints, Masters
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
TASKS = "dscl_tasks.json"  # in the export of a whole model: what it was trained on
SHORTEST = 8  # tokens of a prompt that can be asked for, as of a row in a recipe


def describe(run_dir: Path, which: str | None = None) -> Description:
    """What a run has learnt so far: the tasks that had ended at a checkpoint (by default the newest whole one)."""
    recipe = _recipe(run_dir)
    method = recipe.method
    if isinstance(method, LoraPerTaskConfig):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, in which nobody decides whose a prompt is; make an export of "
            f"its adapters ({run_dir / 'adapters'}) with dscl route-existing"
        )
    if isinstance(method, OloraConfig):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, whose adapters ({run_dir / 'adapters'}) all act together; load "
            "them with PEFT and add them up"
        )
    if not isinstance(method, AsrConfig | MosesConfig):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, whose tasks leave nothing beside the base model (as asr's and "
            "moses' do); dscl export makes a model or a LoRA of it that transformers and PEFT load"
        )
    if chats := [task.name for task in recipe.stream if task.chat]:
        raise UserError(
            f"{run_dir}: task {chats[0]!r} is a chat task (chat: true), which was not trained on plain prompts; use "
            "dscl eval, or train on prompts that a template makes"
        )
    checkpoint, names = _ended(recipe, which)
    kind = ADAPTERS if isinstance(method, AsrConfig) else EXPERTS
    tasks = {name: part_of(run_dir, kind, name) for name in names}
    if isinstance(method, MosesConfig) and method.task_inference == "given":
        router, first = None, open_claims(next(iter(tasks.values())))
        training = parse(Training, first.training, "what the tasks were trained with")
    else:
        router = _router(run_dir, names, method)
        training = Training.of(router.spec)
    base = recipe.model.name and lasting(recipe.model.name)
    model = ModelConfig(base, recipe.model.shape, str(_tokenizer_folder(recipe).absolute()))
    description = Description(model, recipe.seed, tasks, training, router, kind)
    if isinstance(method, MosesConfig) and method.weights is not None:
        # As they are now: with a further task in progress, what ended tasks have left stands beside weights that move.
        description = dataclasses.replace(description, trained=Masters(checkpoint, shapes_of(open_base(description))))
    return description


def export(run_dir: Path, folder: Path, which: str | None = None) -> None:
    """Write what a run has learnt as a folder that needs nothing of the run, and say what is in it."""
    recipe = _recipe(run_dir)
    if isinstance(recipe.method, SequentialConfig):
        return (
            export_lora(recipe, folder, which) if recipe.method.tune == "lora" else export_model(recipe, folder, which)
        )
    if isinstance(recipe.method, OsftConfig):
        return export_model(recipe, folder, which)
    refuse_other(folder)
    description = describe(run_dir, which)
    open_base(description)  # refused if the base model was changed after the training
    write(description, folder)
    _show(folder, description)


def export_model(recipe: Recipe, folder: Path, which: str | None) -> None:
    """All weights, as a folder that transformers reads."""
    if folder.exists() and not (folder / TASKS).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: something else is there; give a new or an empty folder, or that of a model's export"
        )
    checkpoint, names = _ended(recipe, which)
    backbone = _backbone(recipe)
    masters = Masters(checkpoint, shapes_of(backbone))
    with replacing(folder) as new:
        copy(_tokenizer_folder(recipe), new, TOKENIZER_FILES)
        files = write_model(new, backbone, masters)
        told = {
            "method": recipe.method.name,
            "tasks": names,
            "base": _named_base(recipe),
            "checkpoint": checkpoint.name,
        }
        (new / TASKS).write_text(json.dumps(told, indent=1, ensure_ascii=False), "utf-8")
    print(f"wrote {folder}: {', '.join(files)}, the tokenizer, {TASKS}")
    print(f"tasks: {', '.join(names)}")
    print("use:   from transformers import AutoModelForCausalLM")
    print(f"       AutoModelForCausalLM.from_pretrained({str(folder)!r})", flush=True)


def export_lora(recipe: Recipe, folder: Path, which: str | None) -> None:
    """The one LoRA that all tasks have trained, in PEFT's layout."""
    _refuse_other_than_adapter(folder)
    checkpoint, names = _ended(recipe, which)
    backbone, lora = _backbone(recipe), recipe.method.lora or LoraConfig()
    with torch.device("meta"):
        plain = dict(backbone.build().named_modules())
        paths = matching(plain[""], lora.targets)
    sides = {
        f"{path}.lora_{side}.default.weight": torch.Size(size)
        for path in paths
        for side, size in (("A", (lora.rank, plain[path].in_features)), ("B", (plain[path].out_features, lora.rank)))
    }
    masters = Masters(checkpoint, sides)
    layers = {}
    for path in paths:
        a, b = (masters.read(f"{path}.lora_{side}.default.weight").to(backbone.dtype) for side in "AB")
        layers[path] = Pair(a, b, lora.alpha / lora.rank)
    write_adapter(folder, Adapter("", _named_base(recipe), layers))
    print(f"wrote {folder}: {CONFIG}, {WEIGHTS}")
    print(f"tasks: {', '.join(names)}")
    print(f"base:  {_named_base(recipe)} (not copied)")
    print("use:   from peft import PeftModel")
    print(f"       PeftModel.from_pretrained(base, {str(folder)!r})", flush=True)


def export_task(run_dir: Path, folder: Path, task: str, which: str | None = None) -> None:
    """Write what one task of a run has left as a LoRA in PEFT's layout, and say whether that is all of it."""
    _refuse_other_than_adapter(folder)
    description = describe(run_dir, which)
    if task not in description.tasks:
        raise UserError(
            f"--task: no task {task!r} has ended in {run_dir}{nearest(task, description.tasks)}; tasks there: "
            f"{', '.join(description.tasks)}"
        )
    if description.trained is not None:
        raise UserError(
            f"--task: {run_dir} has trained the base model's own weights too (method.weights), so what task {task!r} "
            "has left is no adapter of the base model; export the run without --task"
        )
    backbone, sent = open_base(description), ""
    with replacing(folder) as new:
        if description.kind == ADAPTERS:
            copy(description.tasks[task], new, (CONFIG, WEIGHTS))
        else:
            learnt = Claimed(backbone.build(), Routing(len(description.tasks), rank=0), None, description.tasks)
            write_adapter(new, learnt.adapter(task, description.model.name or "model.shape"))
            sent = learnt.sent
    print(f"wrote {folder}: {CONFIG}, {WEIGHTS}")
    print(f"task:  {task}")
    print(f"base:  {_base(description)} (not copied)")
    if sent:
        print(f"exact: no, the task's token router {sent}, and a LoRA cannot;")
        print("       here all of them count for every token alike, so it answers otherwise than dscl generate")
    else:
        print("exact: yes, up to rounding")
    print("use:   from peft import PeftModel")
    print(f"       PeftModel.from_pretrained(base, {str(folder)!r})", flush=True)


def route_existing(
    folder: Path,
    base: str,
    tasks: Mapping[str, tuple[Path, Path]],
    *,
    feature_layer: int | None = None,
    width: int | None = None,
    max_length: int = 512,
    precision: str = "bf16",
) -> None:
    """An export of PEFT adapters made elsewhere. A task is a name, an adapter's folder and a file with some prompts,
    which pass through the base model as far as the feature layer; nothing is trained."""
    refuse_other(folder)
    if not tasks:
        raise UserError("--task: none given; at least one NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed")
    if max_length < SHORTEST:
        raise UserError(f"--max-length: given {max_length}; at least {SHORTEST} tokens are needed")
    config = parse(AsrConfig, {"feature_layer": feature_layer, "width": width})
    prompts = {name: read_prompts(file) for name, (_, file) in tasks.items()}
    place = str(locate(base, "--base").absolute())
    backbone = open_backbone(ModelConfig(place), seed=0, dtype=DTYPES[precision], cache=Path(), texts=lambda: ())
    spec = Spec(
        kind="exact",
        layer=feature_layer_of(config.feature_layer, backbone.architecture.num_hidden_layers),
        dim=backbone.architecture.hidden_size,
        width=width_of(config.width, backbone.architecture.hidden_size),
        seed=0,
        model=backbone.fingerprint(),
        tokenizer=fingerprint(backbone.tokenizer),
        prompt_limit=max_length,
        precision=precision,
    )
    model = ModelConfig(lasting(base), tokenizer=place)
    made = open_model(Description(model, 0, {}, Training.of(spec), Router(spec)), slots=len(tasks))
    for name, (adapter, _) in tasks.items():
        made.add(name, adapter, prompts[name])
    made.save(folder)
    _show(folder, read_description(folder))


def _ended(recipe: Recipe, which: str | None) -> tuple[Path, list[str]]:
    """A whole checkpoint, and the names of the tasks that had ended."""
    found, count = Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint).find(which), 0
    if found is not None:
        position = json.loads((found / "state.json").read_text("utf-8"))["position"]
        together = find_method(recipe.method.name).together
        count = len(recipe.stream) if together and position["learned"] else position["task"] + position["learned"]
        if position["step"] and not position["learned"] and not together:
            begun = f"{found.name}: within task {recipe.stream[position['task']].name!r}"
            log.warning("%s, whose steps so far count; --checkpoint names another one", begun)
    if found is None or not count:
        raise UserError(f"{recipe.run_dir}: no task has ended there yet; train first, or let the training go on")
    return found, [task.name for task in recipe.stream[:count]]


def _router(run_dir: Path, names: Sequence[str], method: AsrConfig | MosesConfig) -> Router:
    """Of the parts that the tasks have left."""
    router = None
    for name in names:
        part = Router.load(run_dir / "router" / f"{file_name(name)}.safetensors", router.spec if router else None)
        router = router or Router(part.spec, method.ridge, method.reject is not False)
        router.add(name, part.statistics(name))
    assert router is not None
    return router


def _recipe(run_dir: Path) -> Recipe:
    stored = run_dir / "recipe.yaml"
    if not stored.is_file():
        raise UserError(
            f"{run_dir}: no run there (it would hold recipe.yaml) and no export ({DESCRIPTION}); "
            "give the run_dir of a training run, or a folder that dscl export wrote"
        )
    return read_recipe(str(stored), [f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}"])


def _tokenizer_folder(recipe: Recipe) -> Path:
    """Where the run's tokenizer lies: beside the model, or where the recipe says, or in the cache."""
    if recipe.model.tokenizer is not None:
        return locate(recipe.model.tokenizer, "model.tokenizer")
    if recipe.model.name is not None:
        return locate(recipe.model.name, "model.name")
    return Path(_backbone(recipe).tokenizer.name_or_path)


def _backbone(recipe: Recipe) -> Backbone:
    def texts() -> Iterator[str]:
        for task in load_stream(recipe.stream, recipe.data, recipe.seed):
            for sample in task.train:
                yield f"{sample.prompt} {sample.answer}"

    dtype = DTYPES[recipe.train.precision]
    return open_backbone(recipe.model, seed=recipe.seed, dtype=dtype, cache=recipe.data.cache, texts=texts)


def _named_base(recipe: Recipe) -> str:
    return lasting(recipe.model.name) if recipe.model.name else f"drawn from seed {recipe.seed}"


def _refuse_other_than_adapter(folder: Path) -> None:
    """One task's LoRA takes the place of nothing but such a one."""
    if folder.exists() and (folder.is_file() or not {file.name for file in folder.iterdir()} <= {CONFIG, WEIGHTS}):
        raise UserError(f"{folder}: something else is there; give a new or an empty folder, or that of a LoRA alone")


def _base(description: Description) -> str:
    return description.model.name or f"drawn from seed {description.seed}"


def _show(folder: Path, description: Description) -> None:
    parts = [DESCRIPTION, f"{description.kind}/", f"{TOKENIZER}/"]
    parts += [ROUTER] * (description.router is not None) + [TRAINED] * (description.trained is not None)
    print(f"wrote {folder}: {', '.join(parts)}")
    print(f"tasks: {', '.join(description.tasks)}")
    print(f"base:  {_base(description)} (not copied)")
    task = ""
    if description.router is None:
        print("route: none; the tasks were given in training, so they have to be given in use")
        task = f", task={next(iter(description.tasks))!r}"
    print("use:   import dscl")
    print(f"       dscl.load({str(folder)!r}).generate(['a prompt']{task})", flush=True)
