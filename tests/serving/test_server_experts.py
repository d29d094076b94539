"""Serving sub-experts: each row of a mixed batch answers as its task does alone in the model that claimed them."""

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
from dscl.data.batches import prompt_batch
from dscl.data.encode import bos_id, encode_prompts
from dscl.data.task import Sample
from dscl.maths.rls import gather
from dscl.methods.rls_router import Router
from dscl.model.adapters.peft_files import write_adapter
from dscl.model.adapters.routing import Routing, empty_like, targets_above
from dscl.model.adapters.serving_bank import Claimed
from dscl.model.adapters.sub_experts import Experts, Shape, add_experts
from dscl.model.adapters.task_masks import Claims, write_claims
from dscl.model.backbone import ModelConfig, open_backbone
from dscl.model.generation import generate
from dscl.model.tokenizer import load_tokenizer, pad_id
from dscl.serving import bundle, server
from dscl.serving.bundle import EXPERTS, Description, Training, part_of
from dscl.utils.errors import UserError
from tests.support.serving import (
    LAYER,
    LIMIT,
    MIXED,
    NEW,
    OWN,
    TASKS,
    alike,
    described,
    empty,
    everything,
    flip,
    logits_of,
    prompts_of,
    reference,
    spec_of,
    write_base,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bare(base: Path) -> list[str]:
    return [reference(base, None, prompt) for prompt in MIXED]


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def shape_of(atoms: bool = True, top: int = 2, **changes: Any) -> Shape:
    # Of a grown model: of five experts that there is room for four are open, three were at first.
    given = {"experts": 3, "most": 5, "rank": 4, "share": 0.5, "scale": 3.0}
    return Shape(**{**given, "atoms": atoms, "top": top, **changes})


def fill(experts: Experts, seed: int, preference: float) -> dict[str, torch.Tensor]:
    """What a task might have trained, strong enough to change what is answered."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for path, layer in experts.layers.items():
        for own in layer.trained:
            size = preference if own == "token_router" else 0.4 if own == "sub_b" else 0.2
            found[f"{path}.{own}"] = torch.randn(getattr(layer, own).shape, generator=draw) * size
    return found


class Made:
    """The model in whose training the tasks claimed their sub-experts, and the files that they left."""

    def __init__(
        self, base: Path, folder: Path, shape: Shape, tasks: Sequence[str] = TASKS, layer: int = LAYER,
        preference: float = 1.0,
    ) -> None:  # fmt: skip
        self.base = base
        self.module: Any = plain(base).requires_grad_(False)
        self.routing = Routing(capacity=len(tasks) + 1, rank=0)  # a further task is still to come
        targets = targets_above(self.module, layer, ("q_proj", "v_proj", "o_proj"))
        self.experts = add_experts(self.module, shape, self.routing, targets)
        self.files = {task: part_of(folder, EXPERTS, task) for task in tasks}
        for each in self.experts.layers.values():
            each.make_trainable()
        for number, (task, file) in enumerate(self.files.items()):
            self.experts.count = min(shape.most - 1, shape.experts + number)
            self.experts.prepare(reuse=number == 1)
            before = tuple(self.experts.names)
            kept = self.experts.claim(task, fill(self.experts, number, preference))
            write_claims(file, Claims(task, before, shape, kept))
        self.module.eval()

    @torch.no_grad()
    def answer(self, prompt: str, task: str | None) -> str:
        """One prompt alone, its task given."""
        tokenizer = load_tokenizer(self.base)
        ids = encode_prompts([Sample(prompt, "", (), "")], tokenizer, max_length=LIMIT + 1, room=1).ids
        batch = prompt_batch(ids, pad_id(tokenizer), bos_id(tokenizer))
        with self.routing.using([self.experts.slot(task)], empty_like(self.module)):
            rows = generate(self.module, batch, NEW, tokenizer.eos_token_id, pad_id(tokenizer))
        return str(tokenizer.decode(rows[0], skip_special_tokens=True).strip())

    def describe(self, routed: bool = True, **changes: Any) -> Description:
        spec, router = spec_of(self.base, **changes), None
        if routed:
            router, bare = Router(spec), empty(self.base)
            for task in self.files:
                rows = [bare._router.rows(bare._pooled(t)) for _, t in bare._batches(prompts_of(task, 60), 16)]
                router.add(task, gather(torch.cat(rows), spec.expansion()))
        model = ModelConfig(str(self.base), tokenizer=str(self.base))
        return Description(model, 0, self.files, Training.of(spec), router, EXPERTS)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(base, tmp_path_factory.mktemp("made"), shape_of())


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "all"
    bundle.write(made.describe(), folder)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.mark.parametrize(("atoms", "top"), [(True, 2), (False, 2), (True, 0)])
def test_a_mixed_batch_answers_as_each_task_alone(
    base: Path, bare: list[str], tmp_path: Path, atoms: bool, top: int
) -> None:
    made = Made(base, tmp_path, shape_of(atoms, top))
    model = server.open_model(made.describe())
    answers = model.generate(MIXED, NEW, batch=6)
    assert [answer.task for answer in answers] == OWN
    expected = [made.answer(prompt, task) for prompt, task in zip(MIXED, OWN, strict=True)]
    assert [answer.text for answer in answers] == expected
    assert [answer.text for answer in model.generate(MIXED, NEW, task=None)] == bare
    assert sum(a == b for a, b in zip(expected, bare, strict=True)) <= 3  # else nothing was seen
    hills = model.generate(MIXED, NEW, task="hills")
    assert [answer.text for answer in hills] == [made.answer(prompt, "hills") for prompt in MIXED]
    assert [route.task for route in model.route(MIXED)] == OWN


def test_logits_of_a_mixed_batch_equal_those_of_single_tasks(exported: Path) -> None:
    model = dscl.load(exported)
    seen: list[torch.Tensor] = []
    model._module.register_forward_hook(lambda _m, _a, out: seen.append(out.logits[:, -1]))
    model.generate(MIXED[:6], 1)
    order = [place for places, _ in model._batches(MIXED[:6], 6) for place in places]
    for row, place in enumerate(order):
        alone = logits_of(model, [MIXED[place]], task=OWN[place])
        assert (seen[0][row] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


def test_what_was_saved_answers_as_before(made: Made, exported: Path, tmp_path: Path) -> None:
    model = dscl.load(exported)
    assert model.tasks == [*TASKS]
    model.save(tmp_path / "again")
    assert everything(dscl.load(tmp_path / "again")) == alike(everything(server.open_model(made.describe())))
    files = sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*"))
    assert [name for name in files if not name.startswith("tokenizer")] == [
        "dscl.json", "experts", *(f"experts/{task}.safetensors" for task in TASKS), "router.safetensors",
    ]  # fmt: skip
    for task in TASKS:
        assert part_of(tmp_path / "again", EXPERTS, task).read_bytes() == made.files[task].read_bytes()


def test_where_the_task_was_given_it_has_to_be_given(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    bundle.write(made.describe(routed=False), folder)
    document = json.loads((folder / "dscl.json").read_text())
    assert document["features"] is None
    assert document["training"]["prompt_limit"] == LIMIT
    assert not (folder / "router.safetensors").exists()
    model = dscl.load(folder)
    for task in TASKS:
        answers = model.generate(MIXED[:4], NEW, task=task)
        assert [answer.text for answer in answers] == [made.answer(prompt, task) for prompt in MIXED[:4]]
        assert {(answer.task, answer.margin, answer.distance) for answer in answers} == {(task, None, None)}
    told_each = list(itertools.islice(itertools.cycle([*TASKS, None]), len(MIXED)))
    answers = model.generate(MIXED, NEW, task=told_each, batch=4)
    assert [answer.task for answer in answers] == told_each
    for answer, prompt, task in zip(answers, MIXED, told_each, strict=True):
        assert answer.text == model.generate([prompt], NEW, task=task)[0].text
    with pytest.raises(UserError, match=r"task: given 1 for 2 prompts; give one each, or one for all"):
        model.generate(MIXED[:2], NEW, task=["hills"])
    for act in (model.route, model.generate):
        with pytest.raises(UserError, match=r"trained with the task given, .*; tasks here: birds, hills, rain") as told:
            act(MIXED[:2])
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"task 'hill' is not there .*hills"):
        model.generate(MIXED[:2], task="hill")
    model.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "dscl.json").read_text()) == document


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda m: m.add("new", "folder", ["some text"]), "no task can be added: what tasks claim .* is shared"),
        (lambda m: m.remove("hills"), "no task can be removed: what tasks claim .* is shared"),
    ],
)
def test_tasks_cannot_come_and_go(act: Callable[[Any], Any], told: str, exported: Path) -> None:
    model = dscl.load(exported)
    before = everything(model)
    with pytest.raises(UserError, match=told) as refused:
        act(model)
    assert "\n" not in str(refused.value)
    assert everything(model) == alike(before)
    with pytest.raises(UserError, match="slots: given 5, but no task can be added: what tasks claim"):
        dscl.load(exported, slots=5)


def swapped(export: Path) -> None:
    one, other = (part_of(export, EXPERTS, task) for task in TASKS[1:])
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def of_other_shape(export: Path) -> None:
    base = Path(json.loads((export / "dscl.json").read_text())["model"]["name"])
    other = Made(base, export / "other", shape_of(rank=3), TASKS[:2])
    shutil.copyfile(other.files["hills"], part_of(export, EXPERTS, "hills"))


def of_other_layers(export: Path) -> None:
    base = Path(json.loads((export / "dscl.json").read_text())["model"]["name"])
    other = Made(base, export / "other", shape_of(), TASKS[:2], layer=2)
    shutil.copyfile(other.files["hills"], part_of(export, EXPERTS, "hills"))


HILLS = "experts/hills.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda e: (e / HILLS).unlink(), "hills.safetensors: no such file; what sub-experts leave"),
        (lambda e: (e / HILLS).write_bytes((e / HILLS).read_bytes()[:-9]), "not what sub-experts leave, or damaged"),
        (lambda e: flip(e / HILLS, 0.9), "damaged, its content does not match its checksum"),
        (swapped, "of task 'rain' after birds, hills, here 'hills' after birds is needed"),
        (
            lambda e: described(e, lambda d: d["tasks"].reverse()),
            "of task 'rain' after birds, hills, here 'rain' after",
        ),
        (of_other_shape, "its sub-experts have rank 3, here it is 4"),
        (of_other_layers, "model.layers.1.self_attn.o_proj has sub-experts either there or here"),
        (
            lambda e: described(e, lambda d: d.update(kind="adapters")),
            "hills: no adapter_config.json there|birds: no a",
        ),
        (lambda e: described(e, lambda d: d.update(kind="others")), "kind is 'others'; allowed: adapters, experts"),
        (lambda e: described(e, lambda d: d.update(features=None)), "training: given nothing|KeyError\\('training'"),
        (lambda e: (e / "router.safetensors").unlink(), "router.safetensors: no such file"),
    ],
)
def test_what_does_not_belong_together_is_refused(spoil: Callable[[Path], Any], told: str, export: Path) -> None:
    spoil(export)
    with pytest.raises(UserError, match=told) as refused:
        dscl.load(export)
    assert "\n" not in str(refused.value)


def test_sub_experts_of_another_model_are_refused(made: Made, tmp_path: Path) -> None:
    backbone = open_backbone(
        ModelConfig(shape={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320},
                    tokenizer=str(made.base)),
        seed=0, dtype=torch.float32, cache=tmp_path, texts=lambda: (),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"birds\.safetensors: holds sub-experts of model\.layers\.2\..*no such linear"):
        Claimed(backbone.build(), Routing(3, 0), None, made.files)


class Moved:
    """Some of the base's weights, trained: shifted by what depends on their names."""

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


def test_trained_weights_lie_over_the_bases(base: Path, made: Made, tmp_path: Path) -> None:
    moved = Moved(base)
    known = Made(base, tmp_path, shape_of())
    known.module.load_state_dict({name: moved.read(name) for name in moved.shapes}, strict=False)
    given = bundle.dataclasses.replace(made.describe(), trained=moved)
    expected = [known.answer(prompt, task) for prompt, task in zip(MIXED, OWN, strict=True)]
    bundle.write(given, tmp_path / "made")
    for model in (server.open_model(given), dscl.load(tmp_path / "made")):
        answers = model.generate(MIXED, NEW)
        assert [answer.task for answer in answers] == OWN  # features stand below, where nothing moved
        assert [answer.text for answer in answers] == expected
    unmoved = server.open_model(made.describe()).generate(MIXED, NEW)
    assert [answer.text for answer in unmoved] != expected
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "dscl.json", "experts", "router.safetensors", "tokenizer", "weights.safetensors",
    ]  # fmt: skip
    model.save(tmp_path / "again")
    weights = (tmp_path / "made" / "weights.safetensors").read_bytes()
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == weights
    flip(tmp_path / "made" / "weights.safetensors", 0.5)
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged, or of another export"):
        dscl.load(tmp_path / "made")


def learnt_of(made: Made) -> Claimed:
    return Claimed(plain(made.base), Routing(3, 0), None, made.files)


@torch.no_grad()
@pytest.mark.parametrize(("atoms", "top"), [(True, 0), (False, 0), (True, 5)])
@pytest.mark.parametrize("task", ["birds", "rain"])
def test_a_task_as_a_lora_is_exact_where_the_gate_is_uniform(
    base: Path, tmp_path: Path, atoms: bool, top: int, task: str
) -> None:
    """Also where other tasks claimed around it, and where a layer opens fewer than another; and with a token router
    that prefers nothing, whatever the number of sub-experts when the task was learnt."""
    made = Made(base, tmp_path, shape_of(atoms, top), preference=0.0)
    learnt = learnt_of(made)
    assert bool(learnt.sent) == bool(top)
    adapter = learnt.adapter(task, str(base))
    write_adapter(tmp_path / "lora", adapter)
    peft = PeftModel.from_pretrained(plain(base), tmp_path / "lora").eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with made.routing.using([made.experts.slot(task)] * 2, empty_like(made.module)):
        expected = made.module(input_ids=ids).logits
    assert (expected - plain(base)(input_ids=ids).logits).abs().max() > 0.1
    torch.testing.assert_close(peft(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    if atoms:  # no more columns than a mask opens; for the last task, which reuses nothing, some layers have fewer left
        assert {len(pair.a) for pair in adapter.layers.values()} == {6}
        used = {int((pair.a != 0).any(1).sum()) for pair in adapter.layers.values()}
        assert used == {6} if task == "birds" else min(used) < 6
