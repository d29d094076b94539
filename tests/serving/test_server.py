"""Serving adapters: a mixed batch answers like PEFT with single adapters; damaged exports are rejected."""

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
from dscl.data.encode import encode_prompts, prepended_bos_id, tokenizer_fingerprint
from dscl.data.task import Sample
from dscl.maths.rls import compute_statistics
from dscl.model.backbone import ModelConfig, resolve_backbone
from dscl.model.tokenizer import load_tokenizer, pad_id, train_tokenizer
from dscl.serving import server
from dscl.serving.server import ServingModel
from dscl.utils.errors import ExternalFailure, UserError
from tests.support.serving import (
    ALL_LAYERS,
    MAX_NEW_TOKENS,
    MIXED,
    MIXED_TASKS,
    PROMPT_LIMIT,
    TASKS,
    UPPER_LAYERS,
    approx_answers,
    edit_description,
    flip_byte,
    generate_all,
    make_description,
    make_empty_model,
    make_prompts,
    make_router_spec,
    reference_answer,
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
    """Adapters by name: one for each task above the feature layer, of two ranks; and two on all layers."""
    folder = tmp_path_factory.mktemp("adapters")
    task_adapters = {
        task: write_peft(folder / task, base, i, rank=4 + 2 * (i == 1), **UPPER_LAYERS) for i, task in enumerate(TASKS)
    }
    whole = {"whole": write_peft(folder / "whole", base, 7, rank=8, **ALL_LAYERS)}
    return {**task_adapters, **whole, "thin": write_peft(folder / "thin", base, 8, rank=2, **ALL_LAYERS)}


@pytest.fixture(scope="module")
def exported(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_empty_model(base)
    for task in TASKS:
        model.add_task(task, adapters[task], make_prompts(task, 60))
    folder = tmp_path_factory.mktemp("export") / "all"
    model.save_export(folder)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, which a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.mark.parametrize("below", [None, "whole", "thin"])
def test_mixed_batch_matches_single_peft_adapters(
    base: Path, adapters: dict[str, Path], exported: Path, below: str | None
) -> None:
    model, folders = dscl.load(exported), dict(adapters)
    if (
        below is not None
    ):  # another rank and other layers: the bank grows, and the route has to be known before the first layer
        model.remove_task("rain")
        model.add_task("rain", adapters[below], make_prompts("rain", 60))
        folders["rain"] = adapters[below]
    answers = model.generate(MIXED, MAX_NEW_TOKENS, batch_size=6)
    assert [answer.task for answer in answers] == MIXED_TASKS
    expected = [reference_answer(base, folders[task], prompt) for task, prompt in zip(MIXED_TASKS, MIXED, strict=True)]
    assert [answer.text for answer in answers] == expected
    bare = [reference_answer(base, None, prompt) for prompt in MIXED]
    assert sum(a == b for a, b in zip(expected, bare, strict=True)) <= 3  # else the adapters would change nothing
    assert [answer.text for answer in model.generate(MIXED, MAX_NEW_TOKENS, task=None)] == bare
    hills = model.generate(MIXED, MAX_NEW_TOKENS, task="hills")
    assert [answer.text for answer in hills] == [reference_answer(base, folders["hills"], prompt) for prompt in MIXED]
    assert {(answer.task, answer.margin, answer.distance) for answer in hills} == {("hills", None, None)}


def test_mixed_batch_logits_equal_those_of_peft(base: Path, adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported)
    logits: list[torch.Tensor] = []
    model._module.register_forward_hook(lambda _m, _a, out: logits.append(out.logits[:, -1]))
    model.generate(MIXED[:3], 1)
    order = sorted(range(3), key=lambda i: len(load_tokenizer(base)(MIXED[i])["input_ids"][:PROMPT_LIMIT]))
    for row, place in enumerate(order):
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapters[MIXED_TASKS[place]]
        ).eval()
        bos, *ids = load_tokenizer(base)(MIXED[place])["input_ids"]
        with torch.no_grad():
            expected = peft(input_ids=torch.tensor([[bos, *ids[-(PROMPT_LIMIT - 1) :]]])).logits[0, -1]
        torch.testing.assert_close(logits[0][row], expected, rtol=1e-5, atol=1e-5)


def count_layer_passes(model: ServingModel) -> list[int]:
    """A list with the number of passes through each layer so far."""
    counts = [0] * 4

    def counting(number: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    for number, layer in enumerate(model._module.model.layers):
        layer.register_forward_pre_hook(counting(number))
    return counts


def test_routing_needs_no_extra_pass_unless_adapters_reach_below_the_feature_layer(
    adapters: dict[str, Path], exported: Path
) -> None:
    model = dscl.load(exported, slots=4)
    counts = count_layer_passes(model)
    model.generate(MIXED[:4], 1)
    assert counts == [1, 1, 1, 1]
    model.route(MIXED[:4])
    assert counts == [2, 1, 1, 1]  # the layers above the feature layer were not computed
    model.add_task("whole", adapters["whole"], make_prompts("birds", 9))
    assert counts == [3, 1, 1, 1]
    model.generate(MIXED[:4], 1)
    assert counts == [5, 2, 2, 2]


def test_answers_keep_the_prompt_order_and_report_routes(exported: Path) -> None:
    model = dscl.load(exported)
    answers, routes = model.generate(MIXED, MAX_NEW_TOKENS, batch_size=4), model.route(MIXED, batch_size=7)
    assert [route.task for route in routes] == MIXED_TASKS
    for answer, route in zip(answers, routes, strict=True):
        assert answer.task == route.task
        assert (answer.margin, answer.distance) == pytest.approx((route.margin, route.distance), rel=1e-3)
    alone = [model.generate([prompt], MAX_NEW_TOKENS)[0].text for prompt in MIXED]
    assert [answer.text for answer in answers] == alone
    assert model.generate([]) == []


def test_router_features_equal_those_of_training(base: Path, exported: Path) -> None:
    """The answer behind a prompt, other rows and other padding change nothing."""
    model, tokenizer = dscl.load(exported), load_tokenizer(base)
    samples = [Sample(prompt, "", (), "") for prompt in MIXED]
    pairs = [
        (ids, [9, 8, 7]) for ids in encode_prompts(samples, tokenizer, max_length=PROMPT_LIMIT + 5, answer_budget=5).ids
    ]
    spec = model._router.spec
    rows = []
    for packing in (False, True):
        bare = resolve_backbone(ModelConfig(str(base)), seed=0, dtype=torch.float32, cache=Path(), texts=lambda: ())
        module: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation=bare.config.attention)
        layout = [[i, i + 1, i + 2] for i in range(0, 15, 3)] if packing else [[i] for i in range(15)]
        batch = collate(layout, pairs, pad_id(tokenizer), packing, prepended_bos_id(tokenizer))
        with torch.no_grad():
            hidden = module(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
                use_cache=False, output_hidden_states=True,
            ).hidden_states[spec.layer]  # fmt: skip
        pooled = torch.stack([hidden[row, start:stop].mean(0) for row, start, stop in batch.prompt_spans])
        rows.append(spec.feature_map().quantize(pooled))
    served = torch.zeros_like(rows[0])
    for places, tensors in model._make_batches(MIXED, 4):
        served[places] = model._router.quantize(model._pool_hidden_states(tensors))
    for trained in rows:
        assert int((served != trained).sum()) <= 2  # of 960; a value may lie at the edge between two integers
    assert compute_statistics(served, spec.feature_map()).count == 15


def test_removed_task_leaves_no_trace(adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported, slots=4)
    before = generate_all(model)
    model.add_task("again", adapters["birds"], make_prompts("birds", 9, seed=2))
    assert model.tasks == [*TASKS, "again"]
    assert generate_all(model) != before
    model.remove_task("again")
    assert generate_all(model) == approx_answers(before)
    model.remove_task("birds")
    assert model.tasks == ["hills", "rain"]
    assert "birds" not in {route.task for route in model.route(MIXED)}


def test_out_of_distribution_prompt_goes_to_the_base_model(base: Path, exported: Path) -> None:
    model = dscl.load(exported)
    strange = [" ".join(str(number * step) for number in range(9)) for step in (7, 13, 77, 1234)]
    answers = model.generate(strange, MAX_NEW_TOKENS)
    assert [answer.task for answer in answers] == [None] * 4
    assert [answer.text for answer in answers] == [reference_answer(base, None, prompt) for prompt in strange]
    assert min(a.distance or 0.0 for a in answers) > max(a.distance or 0.0 for a in model.generate(MIXED, 1))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, a: m.add_task("new", a["birds"], ["some text"]), "the bank is full: it has 3 slots"),
        (lambda m, a: m.add_task("hills", a["birds"], ["some text"]), "task 'hills' is there already"),
        (lambda m, a: m.add_task(" ", a["birds"], ["some text"]), "the task's name: given ' '"),
        (lambda m, a: m.add_task("new", a["birds"], []), "task 'new': no prompts given"),
        (lambda m, a: m.add_task("new", a["birds"] / "none", ["some text"]), "no adapter_config.json there"),
        (
            lambda m, a: m.remove_task("hill"),
            "task 'hill' is not there \\(did you mean 'hills'\\?\\); tasks here: birds, h",
        ),
        (lambda m, a: m.generate(["x"], task="hill"), "task 'hill' is not there"),
        (lambda m, a: m.generate("a single text"), "a list of texts is needed"),
        (lambda m, a: m.generate(["x", " "]), "prompt 2 is empty"),
        (lambda m, a: m.route(["x", None]), "prompt 2 is of type NoneType; text is needed"),
        (lambda m, a: m.route(["\udcff"]), "prompt 1 is not valid UTF-8"),
        (lambda m, a: m.generate(["x"], max_new_tokens=0), "max_new_tokens: given 0"),
    ],
)
def test_invalid_calls_are_rejected_and_change_nothing(
    act: Callable[[ServingModel, dict[str, Path]], Any], message: str, adapters: dict[str, Path], exported: Path
) -> None:
    model = dscl.load(exported)
    before = generate_all(model)
    with pytest.raises(UserError, match=message) as error:
        act(model, adapters)
    assert "\n" not in str(error.value)
    assert generate_all(model) == approx_answers(before)


def test_failed_add_task_leaves_no_adapter(adapters: dict[str, Path], exported: Path) -> None:
    model = dscl.load(exported, slots=4)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        model.add_task("new", adapters["whole"], ["some text", ""])
    assert model.tasks == [*TASKS]
    assert sorted(model._task_modules._bank.names) == [*TASKS]
    model.add_task("new", adapters["whole"], ["some text", "and more"])
    with pytest.raises(UserError, match="slots: given 2; there are 3 tasks"):
        dscl.load(exported, slots=2)


def test_non_finite_hidden_states_are_rejected(exported: Path) -> None:
    model = dscl.load(exported)
    with torch.no_grad():
        model._module.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="layer 1: the pooled hidden states hold values that are not finite"):
        model.route(MIXED[:2])


def test_model_without_tasks_cannot_route_but_generates(base: Path, exported: Path) -> None:
    model = dscl.load(exported)
    for task in TASKS:
        model.remove_task(task)
    assert model.generate(MIXED[:1], MAX_NEW_TOKENS, task=None)[0].text == reference_answer(base, None, MIXED[0])
    with pytest.raises(UserError, match="the router knows no task"):
        model.generate(MIXED[:1])
    with pytest.raises(UserError, match="there is no task to write"):
        model.save_export(exported.with_name("nothing"))
    assert not exported.with_name("nothing").exists()


def test_saved_export_answers_as_before(base: Path, adapters: dict[str, Path], export: Path, tmp_path: Path) -> None:
    model = dscl.load(export, slots=4)
    model.add_task("x/../y", adapters["whole"], make_prompts("birds", 9, seed=2))
    model.save_export(export)  # over the export that the model was loaded from
    other = tmp_path / "more" / "other"
    model.save_export(other)
    expected = generate_all(model)
    for folder in (export, other):
        again = dscl.load(folder)
        assert again.tasks == [*TASKS, "x/../y"]
        assert generate_all(again) == approx_answers(expected)
    files = {path.relative_to(other).parts[0] for path in other.rglob("*") if path.is_file()}
    assert files == {"dscl.json", "adapters", "router.safetensors", "tokenizer"}
    assert not [path for path in other.parent.iterdir() if path != other]
    again.remove_task("x/../y")
    again.save_export(other)  # over an export with more tasks
    assert dscl.load(other).tasks == [*TASKS]
    assert len(list((other / "adapters").iterdir())) == 3


def test_export_keeps_the_tokenizer(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The kind of this tokenizer follows only from the model configuration beside its files."""
    source = tmp_path / "source"
    load_tokenizer(base).save_pretrained(source)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"})
    )
    (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = tokenizer_fingerprint(load_tokenizer(source))
    model = server.open_model(make_description(base, make_router_spec(base, tokenizer=tokenizer), source), slots=1)
    model.add_task("birds", adapters["birds"], make_prompts("birds", 9))
    model.save_export(tmp_path / "made")
    assert dscl.load(tmp_path / "made").tasks == ["birds"]
    (source / "config.json").unlink()
    with pytest.raises(UserError, match="source: not the tokenizer that the tasks were trained with"):
        model.save_export(tmp_path / "made")
    assert dscl.load(tmp_path / "made").tasks == ["birds"]


def test_save_overwrites_only_an_export(exported: Path, tmp_path: Path) -> None:
    model = dscl.load(exported)
    (tmp_path / "mine").mkdir()
    model.save_export(tmp_path / "mine")  # empty
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(UserError, match="something else is there"):
            model.save_export(tmp_path / name)
    assert (tmp_path / "notes" / "a.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_failed_save_keeps_the_earlier_export(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dscl.load(export)
    expected = generate_all(model)

    def fail_on_full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail_on_full_disk)
    with pytest.raises(ExternalFailure, match="the export cannot be written \\(No space left on device\\)"):
        model.save_export(export)
    monkeypatch.undo()
    assert [path.name for path in export.parent.iterdir()] == [export.name]
    assert generate_all(dscl.load(export)) == approx_answers(expected)


def test_base_model_can_be_moved(base: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate_all(dscl.load(export))
    moved = shutil.copytree(base, tmp_path / "moved")
    edit_description(export, lambda d: d["model"].update(name=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"its base model was at .*gone, and is not there; say where it lies now"):
        dscl.load(export)
    assert moved.parent == export.parent == tmp_path
    monkeypatch.chdir(tmp_path)
    model = dscl.load(export.name, base="moved")
    monkeypatch.chdir("/")
    assert generate_all(model) == approx_answers(expected)
    model.save_export(tmp_path / "other")
    assert generate_all(dscl.load(tmp_path / "other")) == approx_answers(expected)  # the export names the new place


def truncate_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def retrained(export: Path) -> None:
    """The same tokenizer but for one merge."""
    shutil.rmtree(export / "tokenizer")
    train_tokenizer(TEXT[:100], PIECES, export / "tokenizer")


ADAPTER = "adapters/hills/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: (e / "dscl.json").unlink(), "no export there \\(it would hold dscl.json\\)"),
        (lambda e: (e / "dscl.json").write_text("{"), "broken JSON"),
        (lambda e: (e / "dscl.json").write_text("[]"), "not the description of an export"),
        (lambda e: edit_description(e, lambda d: d.pop("tasks")), "not the description of an export \\(KeyError"),
        (lambda e: edit_description(e, lambda d: d.update(format=9)), "an export of format 9, this version reads 1"),
        (lambda e: edit_description(e, lambda d: d["features"].update(layer="1")), "features.layer: given '1'"),
        (
            lambda e: edit_description(e, lambda d: d["tasks"].pop()),
            "names the tasks birds, hills, .* holds birds, hills, ra",
        ),
        (lambda e: (e / "router.safetensors").unlink(), "router.safetensors: no such file"),
        (lambda e: truncate_file(e / "router.safetensors"), "not a router's file, or damaged"),
        (lambda e: flip_byte(e / "router.safetensors", 0.8), "does not match its checksum"),
        (lambda e: shutil.rmtree(e / "adapters" / "hills"), "no adapter_config.json there"),
        (lambda e: (e / ADAPTER).unlink(), "no adapter_model.safetensors there"),
        (lambda e: truncate_file(e / ADAPTER), "not a readable safetensors file"),
        (lambda e: shutil.rmtree(e / "tokenizer"), "model.tokenizer: given .*; there is no such folder"),
        (
            lambda e: edit_description(e, lambda d: d["features"].update(layer=2)),
            "built with feature layer 1, here it is 2",
        ),
        (
            lambda e: edit_description(e, lambda d: d["features"].update(prompt_limit=9)),
            "prompt in tokens 20, here it is 9",
        ),
        (
            lambda e: edit_description(e, lambda d: d["features"].update(precision="bf16")),
            "precision fp32, here it is bf16",
        ),
        (
            lambda e: edit_description(e, lambda d: d["features"].update(seed=4)),
            "seed of the random features 3, here it is 4",
        ),
        (retrained, "the tasks were trained with tokenizer .*, here it is"),
    ],
)
def test_inconsistent_export_files_are_rejected(spoil: Callable[[Path], Any], message: str, export: Path) -> None:
    dscl.load(export)
    spoil(export)
    with pytest.raises(UserError, match=message) as error:
        dscl.load(export)
    assert "\n" not in str(error.value)


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_configuration(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 1e-5}))


@pytest.mark.parametrize("spoil", [other_weights, other_configuration])
def test_other_base_model_is_rejected(
    spoil: Callable[[Path], None], base: Path, exported: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    dscl.load(exported, base=str(changed))
    spoil(changed)
    with pytest.raises(UserError, match=r"changed: the tasks were trained with model [0-9a-f]{12}, here it is "):
        dscl.load(exported, base=str(changed))


def test_serving_imports_no_deepspeed(exported: Path) -> None:
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
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [repr([*TASKS]), "module 'dscl' has no attribute 'loads'"]
