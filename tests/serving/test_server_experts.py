"""Serving sub-experts: a mixed batch answers like each task alone in the model that trained the sub-experts."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dscl
from dscl.data.batches import collate_prompts
from dscl.data.encode import encode_prompts, prepended_bos_id
from dscl.data.task import Sample
from dscl.maths.rls import compute_statistics
from dscl.methods.rls_router import Router
from dscl.model.adapters.peft_files import write_adapter
from dscl.model.adapters.routing import Routing, make_template_tensor, match_targets_from_layer
from dscl.model.adapters.serving_bank import SubExpertServingBank
from dscl.model.adapters.sub_expert_bank import SubExpertBank, inject_sub_experts
from dscl.model.adapters.sub_experts import SubExpertShape
from dscl.model.adapters.task_masks import TaskMasks, write_task_masks
from dscl.model.backbone import ModelConfig, resolve_backbone
from dscl.model.generation import generate
from dscl.model.tokenizer import load_tokenizer, pad_id
from dscl.serving import bundle, server
from dscl.serving.bundle import EXPERTS, BundleDescription, TrainingInfo, task_artifact_path
from dscl.utils.errors import UserError
from tests.support.serving import (
    LAYER,
    MAX_NEW_TOKENS,
    MIXED,
    MIXED_TASKS,
    PROMPT_LIMIT,
    TASKS,
    approx_answers,
    edit_description,
    flip_byte,
    generate_all,
    logits_of,
    make_empty_model,
    make_prompts,
    make_router_spec,
    reference_answer,
    write_base,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bare(base: Path) -> list[str]:
    return [reference_answer(base, None, prompt) for prompt in MIXED]


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def shape_of(rank1: bool = True, top: int = 2, **changes: Any) -> SubExpertShape:
    # A model that has grown from three experts to four, of at most five.
    values = {"num_experts": 3, "max_experts": 5, "rank": 4, "mask_density": 0.5, "scale": 3.0}
    return SubExpertShape(**{**values, "rank1": rank1, "top_k": top, **changes})


def random_task_params(experts: SubExpertBank, seed: int, preference: float) -> dict[str, torch.Tensor]:
    """Random trained parameters of a task, strong enough to change the answers."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in experts.layers.items():
        for own in layer.trainable_names:
            size = preference if own == "token_router" else 0.4 if own == "sub_b" else 0.2
            tensors[f"{path}.{own}"] = torch.randn(getattr(layer, own).shape, generator=draw) * size
    return tensors


class TrainedTasks:
    """A model in which each task froze its sub-experts, and the files of the tasks."""

    def __init__(
        self, base: Path, folder: Path, shape: SubExpertShape, tasks: Sequence[str] = TASKS, layer: int = LAYER,
        preference: float = 1.0,
    ) -> None:  # fmt: skip
        self.base = base
        self.module: Any = plain(base).requires_grad_(False)
        self.routing = Routing(num_slots=len(tasks) + 1, rank=0)  # with room for a further task
        targets = match_targets_from_layer(self.module, layer, ("q_proj", "v_proj", "o_proj"))
        self.experts = inject_sub_experts(self.module, shape, self.routing, targets)
        self.files = {task: task_artifact_path(folder, EXPERTS, task) for task in tasks}
        for each in self.experts.layers.values():
            each.make_trainable()
        for number, (task, file) in enumerate(self.files.items()):
            self.experts.num_used_experts = min(shape.max_experts - 1, shape.num_experts + number)
            self.experts.set_allowed_masks(reuse=number == 1)
            previous_tasks = tuple(self.experts.names)
            frozen_params = self.experts.freeze_task_params(task, random_task_params(self.experts, number, preference))
            write_task_masks(file, TaskMasks(task, previous_tasks, shape, frozen_params))
        self.module.eval()

    @torch.no_grad()
    def answer(self, prompt: str, task: str | None) -> str:
        """The answer to a single prompt with a known task."""
        tokenizer = load_tokenizer(self.base)
        ids = encode_prompts([Sample(prompt, "", (), "")], tokenizer, max_length=PROMPT_LIMIT + 1, answer_budget=1).ids
        batch = collate_prompts(ids, pad_id(tokenizer), prepended_bos_id(tokenizer))
        with self.routing.use_slots([self.experts.get_slot(task)], make_template_tensor(self.module)):
            rows = generate(self.module, batch, MAX_NEW_TOKENS, tokenizer.eos_token_id, pad_id(tokenizer))
        return str(tokenizer.decode(rows[0], skip_special_tokens=True).strip())

    def bundle_description(self, routed: bool = True, **changes: Any) -> BundleDescription:
        spec, router = make_router_spec(self.base, **changes), None
        if routed:
            router, bare = Router(spec), make_empty_model(self.base)
            for task in self.files:
                rows = [
                    bare._router.quantize(bare._pool_hidden_states(t))
                    for _, t in bare._make_batches(make_prompts(task, 60), 16)
                ]
                router.add(task, compute_statistics(torch.cat(rows), spec.feature_map()))
        model = ModelConfig(str(self.base), tokenizer=str(self.base))
        return BundleDescription(model, 0, self.files, TrainingInfo.from_attributes(spec), router, EXPERTS)


@pytest.fixture(scope="module")
def trained_tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedTasks:
    return TrainedTasks(base, tmp_path_factory.mktemp("made"), shape_of())


@pytest.fixture(scope="module")
def exported(trained_tasks: TrainedTasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "all"
    bundle.write_export(trained_tasks.bundle_description(), folder)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, which a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.mark.parametrize(("rank1", "top"), [(True, 2), (False, 2), (True, 0)])
def test_mixed_batch_matches_single_tasks(base: Path, bare: list[str], tmp_path: Path, rank1: bool, top: int) -> None:
    trained_tasks = TrainedTasks(base, tmp_path, shape_of(rank1, top))
    model = server.open_model(trained_tasks.bundle_description())
    answers = model.generate(MIXED, MAX_NEW_TOKENS, batch_size=6)
    assert [answer.task for answer in answers] == MIXED_TASKS
    expected = [trained_tasks.answer(prompt, task) for prompt, task in zip(MIXED, MIXED_TASKS, strict=True)]
    assert [answer.text for answer in answers] == expected
    assert [answer.text for answer in model.generate(MIXED, MAX_NEW_TOKENS, task=None)] == bare
    assert sum(a == b for a, b in zip(expected, bare, strict=True)) <= 3  # else the sub-experts would change nothing
    hills = model.generate(MIXED, MAX_NEW_TOKENS, task="hills")
    assert [answer.text for answer in hills] == [trained_tasks.answer(prompt, "hills") for prompt in MIXED]
    assert [route.task for route in model.route(MIXED)] == MIXED_TASKS


def test_mixed_batch_logits_equal_those_of_single_tasks(exported: Path) -> None:
    model = dscl.load(exported)
    logits: list[torch.Tensor] = []
    model._module.register_forward_hook(lambda _m, _a, out: logits.append(out.logits[:, -1]))
    model.generate(MIXED[:6], 1)
    order = [place for places, _ in model._make_batches(MIXED[:6], 6) for place in places]
    for row, place in enumerate(order):
        single_logits = logits_of(model, [MIXED[place]], task=MIXED_TASKS[place])
        assert (logits[0][row] - single_logits[0]).abs().max() <= 1e-5 * single_logits.abs().max()


def test_saved_export_answers_as_before(trained_tasks: TrainedTasks, exported: Path, tmp_path: Path) -> None:
    model = dscl.load(exported)
    assert model.tasks == [*TASKS]
    model.save_export(tmp_path / "again")
    assert generate_all(dscl.load(tmp_path / "again")) == approx_answers(
        generate_all(server.open_model(trained_tasks.bundle_description()))
    )
    files = sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*"))
    assert [name for name in files if not name.startswith("tokenizer")] == [
        "dscl.json", "experts", *(f"experts/{task}.safetensors" for task in TASKS), "router.safetensors",
    ]  # fmt: skip
    for task in TASKS:
        assert (
            task_artifact_path(tmp_path / "again", EXPERTS, task).read_bytes() == trained_tasks.files[task].read_bytes()
        )


def test_export_without_router_requires_the_task(trained_tasks: TrainedTasks, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    bundle.write_export(trained_tasks.bundle_description(routed=False), folder)
    document = json.loads((folder / "dscl.json").read_text())
    assert document["features"] is None
    assert document["training"]["prompt_limit"] == PROMPT_LIMIT
    assert not (folder / "router.safetensors").exists()
    model = dscl.load(folder)
    for task in TASKS:
        answers = model.generate(MIXED[:4], MAX_NEW_TOKENS, task=task)
        assert [answer.text for answer in answers] == [trained_tasks.answer(prompt, task) for prompt in MIXED[:4]]
        assert {(answer.task, answer.margin, answer.distance) for answer in answers} == {(task, None, None)}
    task_ids = list(itertools.islice(itertools.cycle([*TASKS, None]), len(MIXED)))
    answers = model.generate(MIXED, MAX_NEW_TOKENS, task=task_ids, batch_size=4)
    assert [answer.task for answer in answers] == task_ids
    for answer, prompt, task in zip(answers, MIXED, task_ids, strict=True):
        assert answer.text == model.generate([prompt], MAX_NEW_TOKENS, task=task)[0].text
    with pytest.raises(UserError, match=r"task: given 1 for 2 prompts; give one each, or one for all"):
        model.generate(MIXED[:2], MAX_NEW_TOKENS, task=["hills"])
    for act in (model.route, model.generate):
        with pytest.raises(
            UserError, match=r"no task router \(its run has router: oracle\); .*; tasks here: birds, hills, rain"
        ) as error:
            act(MIXED[:2])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"task 'hill' is not there .*hills"):
        model.generate(MIXED[:2], task="hill")
    model.save_export(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "dscl.json").read_text()) == document


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.add_task("new", "folder", ["some text"]), "no task can be added: tasks share .* parameters"),
        (lambda m: m.remove_task("hills"), "no task can be removed: tasks share .* parameters"),
    ],
)
def test_sub_expert_tasks_cannot_be_added_or_removed(act: Callable[[Any], Any], message: str, exported: Path) -> None:
    model = dscl.load(exported)
    before = generate_all(model)
    with pytest.raises(UserError, match=message) as error:
        act(model)
    assert "\n" not in str(error.value)
    assert generate_all(model) == approx_answers(before)
    with pytest.raises(UserError, match="slots: given 5, but no task can be added: tasks share"):
        dscl.load(exported, slots=5)


def swapped(export: Path) -> None:
    one, other = (task_artifact_path(export, EXPERTS, task) for task in TASKS[1:])
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def of_other_shape(export: Path) -> None:
    base = Path(json.loads((export / "dscl.json").read_text())["model"]["name"])
    other = TrainedTasks(base, export / "other", shape_of(rank=3), TASKS[:2])
    shutil.copyfile(other.files["hills"], task_artifact_path(export, EXPERTS, "hills"))


def of_other_layers(export: Path) -> None:
    base = Path(json.loads((export / "dscl.json").read_text())["model"]["name"])
    other = TrainedTasks(base, export / "other", shape_of(), TASKS[:2], layer=2)
    shutil.copyfile(other.files["hills"], task_artifact_path(export, EXPERTS, "hills"))


HILLS = "experts/hills.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: (e / HILLS).unlink(), "hills.safetensors: no such file; a task's sub-experts file is needed"),
        (lambda e: (e / HILLS).write_bytes((e / HILLS).read_bytes()[:-9]), "not a task's sub-experts file, or damaged"),
        (lambda e: flip_byte(e / HILLS, 0.9), "damaged, its content does not match its checksum"),
        (swapped, "of task 'rain' after birds, hills, here 'hills' after birds is needed"),
        (
            lambda e: edit_description(e, lambda d: d["tasks"].reverse()),
            "of task 'rain' after birds, hills, here 'rain' after",
        ),
        (of_other_shape, "its sub-experts have rank 3, here it is 4"),
        (of_other_layers, "model.layers.1.self_attn.o_proj has sub-experts either there or here"),
        (
            lambda e: edit_description(e, lambda d: d.update(kind="adapters")),
            "hills: no adapter_config.json there|birds: no a",
        ),
        (
            lambda e: edit_description(e, lambda d: d.update(kind="others")),
            "kind is 'others'; allowed: adapters, experts",
        ),
        (
            lambda e: edit_description(e, lambda d: d.update(features=None)),
            "training: given nothing|KeyError\\('training'",
        ),
        (lambda e: (e / "router.safetensors").unlink(), "router.safetensors: no such file"),
    ],
)
def test_inconsistent_export_files_are_rejected(spoil: Callable[[Path], Any], message: str, export: Path) -> None:
    spoil(export)
    with pytest.raises(UserError, match=message) as error:
        dscl.load(export)
    assert "\n" not in str(error.value)


def test_sub_experts_of_another_model_are_rejected(trained_tasks: TrainedTasks, tmp_path: Path) -> None:
    backbone = resolve_backbone(
        ModelConfig(shape={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320},
                    tokenizer=str(trained_tasks.base)),
        seed=0, dtype=torch.float32, cache=tmp_path, texts=lambda: (),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"birds\.safetensors: holds sub-experts of model\.layers\.2\..*no such linear"):
        SubExpertServingBank(backbone.build(), Routing(3, 0), None, trained_tasks.files)


class ShiftedWeights:
    """Some weights of the base model, shifted by random values that depend on their names."""

    def __init__(self, base: Path) -> None:
        module = plain(base)
        self._values = {
            name: parameter + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            for name, parameter in module.state_dict().items()
            if name.endswith(("q_proj.weight", "down_proj.weight")) and ".0." not in name
        }
        self.shapes = {name: values.shape for name, values in self._values.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._values[name]


def test_trained_weights_replace_those_of_the_base_model(
    base: Path, trained_tasks: TrainedTasks, tmp_path: Path
) -> None:
    overlay = ShiftedWeights(base)
    reference = TrainedTasks(base, tmp_path, shape_of())
    reference.module.load_state_dict({name: overlay.read(name) for name in overlay.shapes}, strict=False)
    description = bundle.dataclasses.replace(trained_tasks.bundle_description(), trained_weights=overlay)
    expected = [reference.answer(prompt, task) for prompt, task in zip(MIXED, MIXED_TASKS, strict=True)]
    bundle.write_export(description, tmp_path / "made")
    for model in (server.open_model(description), dscl.load(tmp_path / "made")):
        answers = model.generate(MIXED, MAX_NEW_TOKENS)
        assert [answer.task for answer in answers] == MIXED_TASKS  # the shifted weights lie above the feature layer
        assert [answer.text for answer in answers] == expected
    base_answers = server.open_model(trained_tasks.bundle_description()).generate(MIXED, MAX_NEW_TOKENS)
    assert [answer.text for answer in base_answers] != expected
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "dscl.json", "experts", "router.safetensors", "tokenizer", "weights.safetensors",
    ]  # fmt: skip
    model.save_export(tmp_path / "again")
    weights = (tmp_path / "made" / "weights.safetensors").read_bytes()
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == weights
    flip_byte(tmp_path / "made" / "weights.safetensors", 0.5)
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged, or of another export"):
        dscl.load(tmp_path / "made")


def make_serving_bank(trained_tasks: TrainedTasks) -> SubExpertServingBank:
    return SubExpertServingBank(plain(trained_tasks.base), Routing(3, 0), None, trained_tasks.files)


@torch.no_grad()
@pytest.mark.parametrize(("rank1", "top"), [(True, 0), (False, 0), (True, 5)])
@pytest.mark.parametrize("task", ["birds", "rain"])
def test_task_as_lora_is_exact_with_uniform_gates(base: Path, tmp_path: Path, rank1: bool, top: int, task: str) -> None:
    """Also where other tasks froze parameters, where a mask selects fewer columns of a layer, and with a token router
    without preferences, for any number of sub-experts at the task's training."""
    trained_tasks = TrainedTasks(base, tmp_path, shape_of(rank1, top), preference=0.0)
    bank = make_serving_bank(trained_tasks)
    assert bool(bank.token_routing) == bool(top)
    adapter = bank.to_lora_adapter(task, str(base))
    write_adapter(tmp_path / "lora", adapter)
    peft = PeftModel.from_pretrained(plain(base), tmp_path / "lora").eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with trained_tasks.routing.use_slots(
        [trained_tasks.experts.get_slot(task)] * 2, make_template_tensor(trained_tasks.module)
    ):
        expected = trained_tasks.module(input_ids=ids).logits
    assert (expected - plain(base)(input_ids=ids).logits).abs().max() > 0.1
    torch.testing.assert_close(peft(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    if rank1:  # no more columns than a mask selects; for the last task, which reuses nothing, some layers have fewer
        assert {len(pair.a) for pair in adapter.layers.values()} == {6}
        used = {int((pair.a != 0).any(1).sum()) for pair in adapter.layers.values()}
        assert used == {6} if task == "birds" else min(used) < 6
