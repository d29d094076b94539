"""Serving: each row of a mixed batch answers as PEFT does alone; an export comes back whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dscl
from dscl.data.batches import collate
from dscl.data.encode import bos_id, encode_prompts, fingerprint
from dscl.data.task import Sample
from dscl.maths.rls import gather
from dscl.model.backbone import ModelConfig, open_backbone
from dscl.model.tokenizer import load_tokenizer, pad_id, train_tokenizer
from dscl.serving import server
from dscl.serving.server import Model
from dscl.utils.errors import Failure, UserError
from tests.support.serving import (
    ABOVE,
    LIMIT,
    MIXED,
    NEW,
    OWN,
    TASKS,
    WHOLE,
    alike,
    described,
    description_of,
    empty,
    everything,
    flip,
    prompts_of,
    reference,
    spec_of,
    write_base,
    write_peft,
)
from tests.support.small_models import PIECES, TEXT

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: one for each task above the feature layer, of two ranks; and two that begin below."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {task: write_peft(folder / task, base, i, rank=4 + 2 * (i == 1), **ABOVE) for i, task in enumerate(TASKS)}
    whole = {"whole": write_peft(folder / "whole", base, 7, rank=8, **WHOLE)}
    return {**made, **whole, "thin": write_peft(folder / "thin", base, 8, rank=2, **WHOLE)}


@pytest.fixture(scope="module")
def exported(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = empty(base)
    for task in TASKS:
        model.add(task, adapters[task], prompts_of(task, 60))
    folder = tmp_path_factory.mktemp("export") / "all"
    model.save(folder)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.mark.parametrize("below", [None, "whole", "thin"])
def test_a_mixed_batch_answers_as_peft_does_alone(
    base: Path, adapters: dict[str, Path], exported: Path, below: str | None
) -> None:
    model, folders = dscl.load(exported), dict(adapters)
    if (
        below is not None
    ):  # another rank and other layers: the bank grows, and the route has to be known before the first layer
        model.remove("rain")
        model.add("rain", adapters[below], prompts_of("rain", 60))
        folders["rain"] = adapters[below]
    answers = model.generate(MIXED, NEW, batch=6)
    assert [answer.task for answer in answers] == OWN
    expected = [reference(base, folders[task], prompt) for task, prompt in zip(OWN, MIXED, strict=True)]
    assert [answer.text for answer in answers] == expected
    bare = [reference(base, None, prompt) for prompt in MIXED]
    assert sum(a == b for a, b in zip(expected, bare, strict=True)) <= 3  # else nothing was seen
    assert [answer.text for answer in model.generate(MIXED, NEW, task=None)] == bare
    hills = model.generate(MIXED, NEW, task="hills")
    assert [answer.text for answer in hills] == [reference(base, folders["hills"], prompt) for prompt in MIXED]
    assert {(answer.task, answer.margin, answer.distance) for answer in hills} == {("hills", None, None)}


def test_logits_of_a_mixed_batch_equal_pefts(base: Path, adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported)
    seen: list[torch.Tensor] = []
    model._module.register_forward_hook(lambda _m, _a, out: seen.append(out.logits[:, -1]))
    model.generate(MIXED[:3], 1)
    order = sorted(range(3), key=lambda i: len(load_tokenizer(base)(MIXED[i])["input_ids"][:LIMIT]))
    for row, place in enumerate(order):
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[OWN[place]]).eval()
        bos, *ids = load_tokenizer(base)(MIXED[place])["input_ids"]
        with torch.no_grad():
            expected = peft(input_ids=torch.tensor([[bos, *ids[-(LIMIT - 1) :]]])).logits[0, -1]
        torch.testing.assert_close(seen[0][row], expected, rtol=1e-5, atol=1e-5)


def passes(model: Model) -> list[int]:
    """Counts the passes through each layer."""
    counts = [0] * 4

    def counting(number: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    for number, layer in enumerate(model._module.model.layers):
        layer.register_forward_pre_hook(counting(number))
    return counts


def test_one_pass_where_it_can_be(adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported, slots=4)
    counts = passes(model)
    model.generate(MIXED[:4], 1)
    assert counts == [1, 1, 1, 1]
    model.route(MIXED[:4])
    assert counts == [2, 1, 1, 1]  # what stands above the features was left alone
    model.add("whole", adapters["whole"], prompts_of("birds", 9))
    assert counts == [3, 1, 1, 1]
    model.generate(MIXED[:4], 1)
    assert counts == [5, 2, 2, 2]


def test_answers_stand_in_the_order_of_the_prompts_and_tell_their_route(exported: Path) -> None:
    model = dscl.load(exported)
    answers, routes = model.generate(MIXED, NEW, batch=4), model.route(MIXED, batch=7)
    assert [route.task for route in routes] == OWN
    for answer, route in zip(answers, routes, strict=True):
        assert answer.task == route.task
        assert (answer.margin, answer.distance) == pytest.approx((route.margin, route.distance), rel=1e-3)
    alone = [model.generate([prompt], NEW)[0].text for prompt in MIXED]
    assert [answer.text for answer in answers] == alone
    assert model.generate([]) == []


def test_features_are_those_of_training(base: Path, exported: Path) -> None:
    """The answer behind a prompt, other rows and other padding change nothing."""
    model, tokenizer = dscl.load(exported), load_tokenizer(base)
    samples = [Sample(prompt, "", (), "") for prompt in MIXED]
    pairs = [(ids, [9, 8, 7]) for ids in encode_prompts(samples, tokenizer, max_length=LIMIT + 5, room=5).ids]
    spec = model._router.spec
    rows = []
    for packing in (False, True):
        bare = open_backbone(ModelConfig(str(base)), seed=0, dtype=torch.float32, cache=Path(), texts=lambda: ())
        module: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation=bare.config.attention)
        layout = [[i, i + 1, i + 2] for i in range(0, 15, 3)] if packing else [[i] for i in range(15)]
        batch = collate(layout, pairs, pad_id(tokenizer), packing, bos_id(tokenizer))
        with torch.no_grad():
            hidden = module(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
                use_cache=False, output_hidden_states=True,
            ).hidden_states[spec.layer]  # fmt: skip
        pooled = torch.stack([hidden[row, start:stop].mean(0) for row, start, stop in batch.prompts])
        rows.append(spec.expansion().rows(pooled))
    served = torch.zeros_like(rows[0])
    for places, tensors in model._batches(MIXED, 4):
        served[places] = model._router.rows(model._pooled(tensors))
    for trained in rows:
        assert int((served != trained).sum()) <= 2  # of 960; a value may lie at the edge between two integers
    assert gather(served, spec.expansion()).count == 15


def test_a_task_added_and_removed_leaves_no_trace(adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported, slots=4)
    before = everything(model)
    model.add("again", adapters["birds"], prompts_of("birds", 9, seed=2))
    assert model.tasks == [*TASKS, "again"]
    assert everything(model) != before
    model.remove("again")
    assert everything(model) == alike(before)
    model.remove("birds")
    assert model.tasks == ["hills", "rain"]
    assert "birds" not in {route.task for route in model.route(MIXED)}


def test_a_prompt_of_no_task_goes_to_the_base_model(base: Path, exported: Path) -> None:
    model = dscl.load(exported)
    strange = [" ".join(str(number * step) for number in range(9)) for step in (7, 13, 77, 1234)]
    answers = model.generate(strange, NEW)
    assert [answer.task for answer in answers] == [None] * 4
    assert [answer.text for answer in answers] == [reference(base, None, prompt) for prompt in strange]
    assert min(a.distance or 0.0 for a in answers) > max(a.distance or 0.0 for a in model.generate(MIXED, 1))


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda m, a: m.add("new", a["birds"], ["some text"]), "the bank is full: it has 3 slots"),
        (lambda m, a: m.add("hills", a["birds"], ["some text"]), "task 'hills' is there already"),
        (lambda m, a: m.add(" ", a["birds"], ["some text"]), "the task's name: given ' '"),
        (lambda m, a: m.add("new", a["birds"], []), "task 'new': no prompts given"),
        (lambda m, a: m.add("new", a["birds"] / "none", ["some text"]), "no adapter_config.json there"),
        (lambda m, a: m.remove("hill"), "task 'hill' is not there \\(did you mean 'hills'\\?\\); tasks here: birds, h"),
        (lambda m, a: m.generate(["x"], task="hill"), "task 'hill' is not there"),
        (lambda m, a: m.generate("a single text"), "a list of texts is needed"),
        (lambda m, a: m.generate(["x", " "]), "prompt 2 is empty"),
        (lambda m, a: m.route(["x", None]), "prompt 2 is of type NoneType; text is needed"),
        (lambda m, a: m.route(["\udcff"]), "prompt 1 is not valid UTF-8"),
        (lambda m, a: m.generate(["x"], max_new_tokens=0), "max_new_tokens: given 0"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    act: Callable[[Model, dict[str, Path]], Any], told: str, adapters: dict[str, Path], exported: Path
) -> None:
    model = dscl.load(exported)
    before = everything(model)
    with pytest.raises(UserError, match=told) as refused:
        act(model, adapters)
    assert "\n" not in str(refused.value)
    assert everything(model) == alike(before)


def test_a_task_whose_prompts_fail_is_not_half_there(adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported, slots=4)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        model.add("new", adapters["whole"], ["some text", ""])
    assert model.tasks == [*TASKS]
    assert sorted(model._learnt._bank.names) == [*TASKS]
    model.add("new", adapters["whole"], ["some text", "and more"])
    with pytest.raises(UserError, match="slots: given 2; there are 3 tasks"):
        dscl.load(exported, slots=2)


def test_values_that_are_not_finite_are_refused(exported: Path) -> None:
    model = dscl.load(exported)
    with torch.no_grad():
        model._module.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="layer 1: the pooled hidden states hold values that are not finite"):
        model.route(MIXED[:2])


def test_without_any_task_the_base_model_is_left(base: Path, exported: Path) -> None:
    model = dscl.load(exported)
    for task in TASKS:
        model.remove(task)
    assert model.generate(MIXED[:1], NEW, task=None)[0].text == reference(base, None, MIXED[0])
    with pytest.raises(UserError, match="the router knows no task"):
        model.generate(MIXED[:1])
    with pytest.raises(UserError, match="there is no task to write"):
        model.save(exported.with_name("nothing"))
    assert not exported.with_name("nothing").exists()


def test_what_was_saved_answers_as_before(base: Path, adapters: dict[str, Path], export: Path, tmp_path: Path) -> None:
    model = dscl.load(export, slots=4)
    model.add("x/../y", adapters["whole"], prompts_of("birds", 9, seed=2))
    model.save(export)  # over the one that it came from
    other = tmp_path / "more" / "other"
    model.save(other)
    expected = everything(model)
    for folder in (export, other):
        again = dscl.load(folder)
        assert again.tasks == [*TASKS, "x/../y"]
        assert everything(again) == alike(expected)
    files = {path.relative_to(other).parts[0] for path in other.rglob("*") if path.is_file()}
    assert files == {"dscl.json", "adapters", "router.safetensors", "tokenizer"}
    assert not [path for path in other.parent.iterdir() if path != other]
    again.remove("x/../y")
    again.save(other)  # and one of fewer tasks in place of one of more
    assert dscl.load(other).tasks == [*TASKS]
    assert len(list((other / "adapters").iterdir())) == 3


def test_a_tokenizer_is_carried_over_as_it_is_read(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Here its files alone do not say which kind it is: the model's configuration beside them does."""
    source = tmp_path / "source"
    load_tokenizer(base).save_pretrained(source)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"})
    )
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = fingerprint(load_tokenizer(source))
    model = server.open_model(description_of(base, spec_of(base, tokenizer=tokenizer), source), slots=1)
    model.add("birds", adapters["birds"], prompts_of("birds", 9))
    model.save(tmp_path / "made")
    assert dscl.load(tmp_path / "made").tasks == ["birds"]
    (source / "config.json").unlink()
    with pytest.raises(UserError, match="source: not the tokenizer that the tasks were trained with"):
        model.save(tmp_path / "made")
    assert dscl.load(tmp_path / "made").tasks == ["birds"]


def test_only_an_export_is_written_over(exported: Path, tmp_path: Path) -> None:
    model = dscl.load(exported)
    (tmp_path / "mine").mkdir()
    model.save(tmp_path / "mine")  # empty
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(UserError, match="something else is there"):
            model.save(tmp_path / name)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_an_export_that_cannot_be_written_leaves_the_earlier_one(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dscl.load(export)
    expected = everything(model)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(Failure, match="the export cannot be written \\(No space left on device\\)"):
        model.save(export)
    monkeypatch.undo()
    assert [path.name for path in export.parent.iterdir()] == [export.name]
    assert everything(dscl.load(export)) == alike(expected)


def test_the_base_model_may_lie_elsewhere(
    base: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = everything(dscl.load(export))
    moved = shutil.copytree(base, tmp_path / "moved")
    described(export, lambda d: d["model"].update(name=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"its base model was at .*gone, and is not there; say where it lies now"):
        dscl.load(export)
    assert moved.parent == export.parent == tmp_path
    monkeypatch.chdir(tmp_path)
    model = dscl.load(export.name, base="moved")
    monkeypatch.chdir("/")
    assert everything(model) == alike(expected)
    model.save(tmp_path / "other")
    assert everything(dscl.load(tmp_path / "other")) == alike(expected)  # it remembers the place


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def retrained(export: Path) -> None:
    """The same tokenizer but for one merge."""
    shutil.rmtree(export / "tokenizer")
    train_tokenizer(TEXT[:100], PIECES, export / "tokenizer")


ADAPTER = "adapters/hills/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda e: (e / "dscl.json").unlink(), "no export there \\(it would hold dscl.json\\)"),
        (lambda e: (e / "dscl.json").write_text("{"), "broken JSON"),
        (lambda e: (e / "dscl.json").write_text("[]"), "not the description of an export"),
        (lambda e: described(e, lambda d: d.pop("tasks")), "not the description of an export \\(KeyError"),
        (lambda e: described(e, lambda d: d.update(format=9)), "an export of format 9, this version reads 1"),
        (lambda e: described(e, lambda d: d["features"].update(layer="1")), "features.layer: given '1'"),
        (lambda e: described(e, lambda d: d["tasks"].pop()), "names the tasks birds, hills, .* holds birds, hills, ra"),
        (lambda e: (e / "router.safetensors").unlink(), "router.safetensors: no such file"),
        (lambda e: cut(e / "router.safetensors"), "not a router's file, or damaged"),
        (lambda e: flip(e / "router.safetensors", 0.8), "does not match its checksum"),
        (lambda e: shutil.rmtree(e / "adapters" / "hills"), "no adapter_config.json there"),
        (lambda e: (e / ADAPTER).unlink(), "no adapter_model.safetensors there"),
        (lambda e: cut(e / ADAPTER), "not a readable safetensors file"),
        (lambda e: shutil.rmtree(e / "tokenizer"), "model.tokenizer: given .*; there is no such folder"),
        (lambda e: described(e, lambda d: d["features"].update(layer=2)), "built with feature layer 1, here it is 2"),
        (
            lambda e: described(e, lambda d: d["features"].update(prompt_limit=9)),
            "prompt in tokens 20, here it is 9",
        ),
        (lambda e: described(e, lambda d: d["features"].update(precision="bf16")), "precision fp32, here it is bf16"),
        (lambda e: described(e, lambda d: d["features"].update(seed=4)), "seed of the expansion 3, here it is 4"),
        (retrained, "the tasks were trained with tokenizer .*, here it is"),
    ],
)
def test_what_does_not_belong_together_is_refused(spoil: Callable[[Path], Any], told: str, export: Path) -> None:
    dscl.load(export)
    spoil(export)
    with pytest.raises(UserError, match=told) as refused:
        dscl.load(export)
    assert "\n" not in str(refused.value)


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_configuration(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 1e-5}))


@pytest.mark.parametrize("spoil", [other_weights, other_configuration])
def test_another_base_model_is_refused(
    spoil: Callable[[Path], None], base: Path, exported: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    dscl.load(exported, base=str(changed))
    spoil(changed)
    with pytest.raises(UserError, match=r"changed: the tasks were trained with model [0-9a-f]{12}, here it is "):
        dscl.load(exported, base=str(changed))


def test_nothing_of_deepspeed_is_needed(exported: Path) -> None:
    code = f"""
import sys
sys.modules["deepspeed"] = None  # an import of it would fail
import dscl
assert "torch" not in sys.modules, "import dscl is to be light"
model = dscl.load({str(exported)!r})
assert dscl.load is sys.modules["dscl.serving.server"].load
print([answer.task for answer in model.generate({MIXED[:3]!r}, 2)])
heavy = ("dscl.engine.engine", "dscl.methods.registry", "dscl.recipe.recipe", "dscl.training.evaluation")
assert not set(heavy) & set(sys.modules)
try:
    dscl.loads
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [repr([*TASKS]), "module 'dscl' has no attribute 'loads'"]
