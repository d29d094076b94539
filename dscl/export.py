"""From a run, or from adapters made elsewhere, to an export: the folder that `dscl.load` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dscl import serve
from dscl.checkpoint import Checkpoints
from dscl.config import parse
from dscl.data.encode import fingerprint
from dscl.data.stream import load_stream
from dscl.errors import UserError
from dscl.methods.asr import AsrConfig
from dscl.methods.deciding import feature_layer_of, width_of
from dscl.model.adapters import file_name
from dscl.model.backbone import DTYPES, ModelConfig, locate, open_backbone
from dscl.recipe import Recipe, read_recipe
from dscl.router import Router, Spec
from dscl.serve import Description

SHORTEST = 8  # tokens of a prompt that can be asked for, as of a row in a recipe


def describe(run_dir: Path) -> Description:
    """What a run has learnt so far: the tasks that had ended at its newest whole checkpoint."""
    stored = run_dir / "recipe.yaml"
    if not stored.is_file():
        raise UserError(
            f"{run_dir}: no run there (it would hold recipe.yaml) and no export ({serve.DESCRIPTION}); "
            "give the run_dir of a training run, or a folder that dscl export wrote"
        )
    recipe = read_recipe(str(stored), [f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}"])
    if not isinstance(recipe.method, AsrConfig):
        raise UserError(
            f"{run_dir}: a run of method {recipe.method.name}; dscl generate and dscl export work for methods that "
            "keep adapters (asr)"
        )
    if chats := [task.name for task in recipe.stream if task.chat]:
        raise UserError(
            f"{run_dir}: task {chats[0]!r} is a chat task (chat: true), which was not trained on plain prompts; use "
            "dscl eval, or train on prompts that a template makes"
        )
    tasks = {name: run_dir / "adapters" / file_name(name) for name in _ended(recipe)}
    router = None
    for name in tasks:
        part = Router.load(run_dir / "router" / f"{file_name(name)}.safetensors", router.spec if router else None)
        router = router or Router(part.spec, recipe.method.ridge, bool(recipe.method.reject))
        router.add(name, part.statistics(name))
    assert router is not None
    base = recipe.model.name and serve.lasting(recipe.model.name)
    model = ModelConfig(base, recipe.model.shape, str(_tokenizer_folder(recipe).absolute()))
    return Description(model, recipe.seed, tasks, router)


def export(run_dir: Path, folder: Path) -> None:
    """Write a run's tasks as a folder that needs nothing of the run, and say what is in it."""
    serve.refuse_other(folder)
    description = describe(run_dir)
    serve.open_base(description)  # refused if the base model was changed after the training
    serve.write(description, folder)
    _show(folder, description)


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
    serve.refuse_other(folder)
    if not tasks:
        raise UserError("--task: none given; at least one NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed")
    if max_length < SHORTEST:
        raise UserError(f"--max-length: given {max_length}; at least {SHORTEST} tokens are needed")
    config = parse(AsrConfig, {"feature_layer": feature_layer, "width": width})
    prompts = {name: serve.read_prompts(file) for name, (_, file) in tasks.items()}
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
    model = ModelConfig(serve.lasting(base), tokenizer=place)
    made = serve.open_model(Description(model, 0, {}, Router(spec)), slots=len(tasks))
    for name, (adapter, _) in tasks.items():
        made.add(name, adapter, prompts[name])
    made.save(folder)
    _show(folder, serve.read_description(folder))


def _ended(recipe: Recipe) -> list[str]:
    """The names of the tasks that had ended."""
    newest, count = Checkpoints(recipe.folder / "checkpoints", recipe.checkpoint.keep).newest(), 0
    if newest is not None:
        position = json.loads((newest / "state.json").read_text("utf-8"))["position"]
        count = position["task"] + position["learned"]
    if not count:
        raise UserError(f"{recipe.run_dir}: no task has ended there yet; train first, or let the training go on")
    return [task.name for task in recipe.stream[:count]]


def _tokenizer_folder(recipe: Recipe) -> Path:
    """Where the run's tokenizer lies: beside the model, or where the recipe says, or in the cache."""
    if recipe.model.tokenizer is not None:
        return locate(recipe.model.tokenizer, "model.tokenizer")
    if recipe.model.name is not None:
        return locate(recipe.model.name, "model.name")
    tasks = load_stream(recipe.stream, recipe.data, recipe.seed)

    def texts() -> Iterator[str]:
        for task in tasks:
            for sample in task.train:
                yield f"{sample.prompt} {sample.answer}"

    dtype = DTYPES[recipe.train.precision]
    backbone = open_backbone(recipe.model, seed=recipe.seed, dtype=dtype, cache=recipe.data.cache, texts=texts)
    return Path(backbone.tokenizer.name_or_path)


def _show(folder: Path, description: Description) -> None:
    base = description.model.name or f"drawn from seed {description.seed}"
    print(f"wrote {folder}: {serve.DESCRIPTION}, {serve.ADAPTERS}/, {serve.ROUTER}, {serve.TOKENIZER}/")
    print(f"tasks: {', '.join(description.tasks)}")
    print(f"base:  {base} (not copied)")
    print("use:   import dscl")
    print(f"       dscl.load({str(folder)!r}).generate(['a prompt'])", flush=True)
