"""Write exports: from a training run, or from PEFT adapters that other programs trained.

An export is the folder that `dscl.load` reads. Some methods are exported as a plain model or as a LoRA instead.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dscl.config.methods import (
    AsrPreset,
    LoraPerTaskPreset,
    MosesPreset,
    OloraPreset,
    OsftPreset,
    SequentialPreset,
)
from dscl.config.parsing import did_you_mean, parse_config
from dscl.config.parts import LoraConfig, OracleRouterConfig, RlsRouterConfig
from dscl.config.schema import ModelConfig
from dscl.data.encode import tokenizer_fingerprint
from dscl.data.prompts import read_prompts
from dscl.data.stream import load_stream
from dscl.methods.registry import find_method
from dscl.methods.rls_router import Router, RouterSpec
from dscl.methods.task_router import resolve_feature_layer, resolve_num_features
from dscl.model.adapters.injection import match_target_layers
from dscl.model.adapters.peft_files import (
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    LoraAdapter,
    LoraWeights,
    task_file_name,
    write_adapter,
)
from dscl.model.adapters.routing import Routing
from dscl.model.adapters.serving_bank import SubExpertServingBank
from dscl.model.adapters.task_masks import read_task_masks
from dscl.model.backbone import DTYPES, Backbone, resolve_backbone, resolve_model_folder
from dscl.model.model_folder import write_model
from dscl.recipe.recipe import Recipe, read_recipe
from dscl.serving.bundle import (
    ADAPTERS,
    DESCRIPTION_FILE,
    EXPERTS,
    ROUTER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    TRAINED_WEIGHTS_FILE,
    BundleDescription,
    TrainingInfo,
    absolute_model_name,
    check_export_target,
    copy_matching_files,
    open_base_model,
    parameter_shapes,
    read_bundle_description,
    replace_folder_atomically,
    task_artifact_path,
    write_export,
)
from dscl.serving.server import open_model
from dscl.training.checkpoint import Checkpoints, read_progress
from dscl.training.checkpoint_files import MasterWeights
from dscl.training.state import Phase
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
TASKS_FILE = "dscl_tasks.json"  # in the export of a whole model: the method and the tasks of its training
MIN_PROMPT_LENGTH = 8  # tokens; the lowest allowed `max_length`, as in a recipe


def describe_run(run_dir: Path, checkpoint_name: str | None = None) -> BundleDescription:
    """Describe what a run has trained so far: the tasks that had ended at a checkpoint.

    The default checkpoint is the newest complete one.
    """
    recipe = _read_run_recipe(run_dir)
    method = recipe.method
    if isinstance(method, OloraPreset):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, whose adapters ({run_dir / 'adapters'}) are used as a sum; "
            "load them with PEFT and add them up"
        )
    if isinstance(method, LoraPerTaskPreset):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, which has no router to find a prompt's task; make an export of "
            f"its adapters ({run_dir / 'adapters'}) with dscl import-adapters"
        )
    if not isinstance(method, AsrPreset | MosesPreset):
        raise UserError(
            f"{run_dir}: a run of method {method.name}, whose tasks have no adapters or sub-experts of their own (as "
            "with asr and moses); dscl export writes it as a model or a LoRA that transformers and PEFT load"
        )
    if chat_tasks := [task.name for task in recipe.stream if task.chat]:
        raise UserError(
            f"{run_dir}: task {chat_tasks[0]!r} is a chat task (chat: true), which was not trained on plain prompts; "
            "use dscl eval, or train on prompts that a template makes"
        )
    checkpoint, names = _find_trained_tasks(recipe, checkpoint_name)
    kind = ADAPTERS if isinstance(method, AsrPreset) else EXPERTS
    tasks = {name: task_artifact_path(run_dir, kind, name) for name in names}
    if isinstance(method, MosesPreset) and method.router.name == "oracle":
        router, first = None, read_task_masks(next(iter(tasks.values())))
        training = parse_config(TrainingInfo, first.training, "what the tasks were trained with")
    else:
        router = _merge_task_routers(run_dir, names, method)
        training = TrainingInfo.from_attributes(router.spec)
    base = recipe.model.name and absolute_model_name(recipe.model.name)
    model = ModelConfig(base, recipe.model.shape, str(_locate_tokenizer(recipe).absolute()))
    description = BundleDescription(model, recipe.seed, tasks, training, router, kind)
    if isinstance(method, MosesPreset) and method.constraint is not None:
        # The dense weights of the checkpoint. If a further task is in progress, its steps have changed them already.
        description = dataclasses.replace(
            description, trained_weights=MasterWeights(checkpoint, parameter_shapes(open_base_model(description)))
        )
    return description


def export_run(run_dir: Path, folder: Path, checkpoint_name: str | None = None) -> None:
    """Write a run's result as a folder that does not need the run directory, and print what the folder contains."""
    recipe = _read_run_recipe(run_dir)
    if isinstance(recipe.method, SequentialPreset):
        return (
            export_shared_lora(recipe, folder, checkpoint_name)
            if isinstance(recipe.method.tune, LoraConfig)
            else export_model(recipe, folder, checkpoint_name)
        )
    if isinstance(recipe.method, OsftPreset):
        return export_model(recipe, folder, checkpoint_name)
    check_export_target(folder)
    description = describe_run(run_dir, checkpoint_name)
    open_base_model(description)  # raises UserError if the base model has changed since the training
    write_export(description, folder)
    _print_export_summary(folder, description)


def export_model(recipe: Recipe, folder: Path, checkpoint_name: str | None) -> None:
    """Write all weights as a model folder that transformers loads."""
    if folder.exists() and not (folder / TASKS_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: something else is there; give a new or an empty folder, or that of a model's export"
        )
    checkpoint, names = _find_trained_tasks(recipe, checkpoint_name)
    backbone = _open_run_backbone(recipe)
    masters = MasterWeights(checkpoint, parameter_shapes(backbone))
    with replace_folder_atomically(folder) as new_folder:
        copy_matching_files(_locate_tokenizer(recipe), new_folder, TOKENIZER_FILES)
        files = write_model(new_folder, backbone, masters)
        document = {
            "method": recipe.method.name,
            "tasks": names,
            "base": _base_model_label(recipe.model, recipe.seed),
            "checkpoint": checkpoint.name,
        }
        (new_folder / TASKS_FILE).write_text(json.dumps(document, indent=1, ensure_ascii=False), "utf-8")
    print(f"wrote {folder}: {', '.join(files)}, the tokenizer, {TASKS_FILE}")
    print(f"tasks: {', '.join(names)}")
    print("use:   from transformers import AutoModelForCausalLM")
    print(f"       AutoModelForCausalLM.from_pretrained({str(folder)!r})", flush=True)


def export_shared_lora(recipe: Recipe, folder: Path, checkpoint_name: str | None) -> None:
    """Write the one LoRA that all tasks have trained, as a PEFT adapter folder."""
    _check_adapter_target(folder)
    checkpoint, names = _find_trained_tasks(recipe, checkpoint_name)
    backbone, lora = _open_run_backbone(recipe), recipe.method.tune
    with torch.device("meta"):
        modules = dict(backbone.build().named_modules())
        paths = match_target_layers(modules[""], lora.targets)
    shapes = {
        f"{path}.lora_{side}.default.weight": torch.Size(size)
        for path in paths
        for side, size in (
            ("A", (lora.rank, modules[path].in_features)),
            ("B", (modules[path].out_features, lora.rank)),
        )
    }
    masters = MasterWeights(checkpoint, shapes)
    layers = {}
    for path in paths:
        a, b = (masters.read(f"{path}.lora_{side}.default.weight").to(backbone.dtype) for side in "AB")
        layers[path] = LoraWeights(a, b, lora.alpha / lora.rank)
    write_adapter(folder, LoraAdapter("", _base_model_label(recipe.model, recipe.seed), layers))
    print(f"wrote {folder}: {CONFIG_FILE}, {ADAPTER_WEIGHTS_FILE}")
    print(f"tasks: {', '.join(names)}")
    print(f"base:  {_base_model_label(recipe.model, recipe.seed)} (not copied)")
    print("use:   from peft import PeftModel")
    print(f"       PeftModel.from_pretrained(base, {str(folder)!r})", flush=True)


def export_task_adapter(run_dir: Path, folder: Path, task: str, checkpoint_name: str | None = None) -> None:
    """Write one task's adapter or sub-experts as a PEFT LoRA, and print whether the LoRA is exactly equivalent."""
    _check_adapter_target(folder)
    description = describe_run(run_dir, checkpoint_name)
    if task not in description.tasks:
        raise UserError(
            f"--task: no task {task!r} has ended in {run_dir}{did_you_mean(task, description.tasks)}; tasks there: "
            f"{', '.join(description.tasks)}"
        )
    if description.trained_weights is not None:
        raise UserError(
            f"--task: {run_dir} has trained the base model's own weights too (method.constraint), so task {task!r} "
            "is no LoRA of the base model; export the run without --task"
        )
    backbone, token_routing = open_base_model(description), ""
    with replace_folder_atomically(folder) as new_folder:
        if description.kind == ADAPTERS:
            copy_matching_files(description.tasks[task], new_folder, (CONFIG_FILE, ADAPTER_WEIGHTS_FILE))
        else:
            bank = SubExpertServingBank(
                backbone.build(), Routing(len(description.tasks), rank=0), None, description.tasks
            )
            write_adapter(new_folder, bank.to_lora_adapter(task, description.model.name or "model.shape"))
            token_routing = bank.token_routing
    print(f"wrote {folder}: {CONFIG_FILE}, {ADAPTER_WEIGHTS_FILE}")
    print(f"task:  {task}")
    print(f"base:  {_base_model_label(description.model, description.seed)} (not copied)")
    if token_routing:
        print(f"exact: no, the task's token router {token_routing}, and a LoRA cannot;")
        print(
            "       the LoRA uses all of them for every token alike, so its answers differ from those of dscl generate"
        )
    else:
        print("exact: yes, up to rounding")
    print("use:   from peft import PeftModel")
    print(f"       PeftModel.from_pretrained(base, {str(folder)!r})", flush=True)


def import_adapters(
    folder: Path,
    base: str,
    tasks: Mapping[str, tuple[Path, Path]],
    *,
    feature_layer: int | None = None,
    num_features: int | None = None,
    max_length: int = 512,
    precision: str = "bf16",
) -> None:
    """Write an export of PEFT adapters that other programs trained.

    `tasks` maps a task's name to its adapter folder and to a file with example prompts. The prompts pass through the
    base model up to the feature layer, which gives the task router its features. Nothing is trained.
    """
    check_export_target(folder)
    if not tasks:
        raise UserError("--task: none given; at least one NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed")
    if max_length < MIN_PROMPT_LENGTH:
        raise UserError(f"--max-length: given {max_length}; at least {MIN_PROMPT_LENGTH} tokens are needed")
    config = parse_config(RlsRouterConfig, {"layer": feature_layer, "num_features": num_features}, "router")
    prompts = {name: read_prompts(file) for name, (_, file) in tasks.items()}
    base_folder = str(resolve_model_folder(base, "--base").absolute())
    backbone = resolve_backbone(
        ModelConfig(base_folder), seed=0, dtype=DTYPES[precision], cache=Path(), texts=lambda: ()
    )
    spec = RouterSpec(
        kind="exact",
        layer=resolve_feature_layer(config.layer, backbone.hf_config.num_hidden_layers),
        dim=backbone.hf_config.hidden_size,
        num_features=resolve_num_features(config.num_features, backbone.hf_config.hidden_size),
        seed=0,
        model=backbone.fingerprint(),
        tokenizer=tokenizer_fingerprint(backbone.tokenizer),
        prompt_limit=max_length,
        precision=precision,
    )
    model = ModelConfig(absolute_model_name(base), tokenizer=base_folder)
    serving_model = open_model(
        BundleDescription(model, 0, {}, TrainingInfo.from_attributes(spec), Router(spec)), slots=len(tasks)
    )
    for name, (adapter, _) in tasks.items():
        serving_model.add_task(name, adapter, prompts[name])
    serving_model.save_export(folder)
    _print_export_summary(folder, read_bundle_description(folder))


def _find_trained_tasks(recipe: Recipe, checkpoint_name: str | None) -> tuple[Path, list[str]]:
    """A complete checkpoint, and the names of the tasks whose training had ended at it.

    A task counts from its last training step on, even while it is still being evaluated.
    """
    checkpoint, count = (
        Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint).find_checkpoint(checkpoint_name),
        0,
    )
    if checkpoint is not None:
        state, _ = read_progress(checkpoint)
        joint = find_method(recipe.method.name).joint
        count = len(recipe.stream) if joint and state.num_trained_tasks else state.num_trained_tasks
        if state.phase is Phase.TRAINING and state.task_step and not joint:
            partial_task = f"{checkpoint.name}: within task {recipe.stream[state.task].name!r}"
            log.warning("%s, whose steps so far are included; --checkpoint selects another checkpoint", partial_task)
    if checkpoint is None or not count:
        raise UserError(f"{recipe.run_dir}: no task has ended there yet; train first, or let the training go on")
    return checkpoint, [task.name for task in recipe.stream[:count]]


def _merge_task_routers(run_dir: Path, names: Sequence[str], method: AsrPreset | MosesPreset) -> Router:
    """Build the run's router from the statistics that each task saved."""
    router, config = None, method.router
    assert not isinstance(config, OracleRouterConfig)
    analytic = config if isinstance(config, RlsRouterConfig) else RlsRouterConfig()
    for name in names:
        part = Router.load(run_dir / "router" / f"{task_file_name(name)}.safetensors", router.spec if router else None)
        router = router or Router(part.spec, analytic.ridge, analytic.ood_fallback is not False)
        router.add(name, part.get_statistics(name))
    assert router is not None
    return router


def _read_run_recipe(run_dir: Path) -> Recipe:
    recipe_path = run_dir / "recipe.yaml"
    if not recipe_path.is_file():
        raise UserError(
            f"{run_dir}: no run there (it would hold recipe.yaml) and no export ({DESCRIPTION_FILE}); "
            "give the run_dir of a training run, or a folder that dscl export wrote"
        )
    return read_recipe(str(recipe_path), [f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}"])


def _locate_tokenizer(recipe: Recipe) -> Path:
    """The folder of the run's tokenizer: as the recipe names it, else the model's, else in the cache."""
    if recipe.model.tokenizer is not None:
        return resolve_model_folder(recipe.model.tokenizer, "model.tokenizer")
    if recipe.model.name is not None:
        return resolve_model_folder(recipe.model.name, "model.name")
    return Path(_open_run_backbone(recipe).tokenizer.name_or_path)


def _open_run_backbone(recipe: Recipe) -> Backbone:
    def texts() -> Iterator[str]:
        for task in load_stream(recipe.stream, recipe.data, recipe.seed):
            for sample in task.train:
                yield f"{sample.prompt} {sample.answer}"

    dtype = DTYPES[recipe.train.precision]
    return resolve_backbone(recipe.model, seed=recipe.seed, dtype=dtype, cache=recipe.data.cache, texts=texts)


def _base_model_label(model: ModelConfig, seed: int) -> str:
    return absolute_model_name(model.name) if model.name else f"drawn from seed {seed}"


def _check_adapter_target(folder: Path) -> None:
    """Raise UserError if the folder holds anything but a PEFT adapter, which writing would destroy."""
    if folder.exists() and (
        folder.is_file() or not {file.name for file in folder.iterdir()} <= {CONFIG_FILE, ADAPTER_WEIGHTS_FILE}
    ):
        raise UserError(
            f"{folder}: something else is there; give a new or an empty folder, or one that holds only a LoRA"
        )


def _print_export_summary(folder: Path, description: BundleDescription) -> None:
    parts = [DESCRIPTION_FILE, f"{description.kind}/", f"{TOKENIZER_FOLDER}/"]
    parts += [ROUTER_FILE] * (description.router is not None) + [TRAINED_WEIGHTS_FILE] * (
        description.trained_weights is not None
    )
    print(f"wrote {folder}: {', '.join(parts)}")
    print(f"tasks: {', '.join(description.tasks)}")
    print(f"base:  {_base_model_label(description.model, description.seed)} (not copied)")
    task = ""
    if description.router is None:
        print("route: none; the run has router: oracle, so the caller names each prompt's task")
        task = f", task={next(iter(description.tasks))!r}"
    print("use:   import dscl")
    print(f"       dscl.load({str(folder)!r}).generate(['a prompt']{task})", flush=True)
