"""Really trained sub-experts: all tasks or a single task are served as they were evaluated."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import dscl
from dscl.cli.app import main
from dscl.engine.zero_layouts import load_parameters
from dscl.serving import export, server
from dscl.serving.bundle import open_base_model, task_artifact_path
from dscl.training import evaluation
from tests.support.osft_runs import checkpoint_dirs, read_checkpoint_tensors, with_few_texts
from tests.support.runs import make_easy, recipe_of, run, write_tasks
from tests.support.serving import logits_of

TASKS = ("colour", "animal")
Answers = dict[tuple[int, ...], list[int]]  # of a prompt's tokens
SUB_EXPERTS = {"num_experts": 4, "rank": 4, "mask_density": 0.5, "alpha": 64.0}
ROUTER = {"layer": 1, "num_features": 128, "ood_fallback": False}
OSFT = {"name": "osft", "protected_ratio": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "routed": {"name": "moses", "tune": SUB_EXPERTS, "router": ROUTER},
    "given": {"name": "moses", "tune": {**SUB_EXPERTS, "gate": "uniform", "masks": "element"}, "router": "oracle"},
    "dense": {"name": "moses", "tune": SUB_EXPERTS, "router": ROUTER, "constraint": OSFT},
    "asr": {"name": "asr", "router": {"layer": 1, "num_features": 128}},
}


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tasks(folder)
    for task in TASKS:
        make_easy(folder, task)
    return folder


@pytest.fixture(scope="module")
def trained(ranks: Any, data: Path) -> Any:
    """`trained("routed")`: the folder of a run of that kind, trained once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            recipe = recipe_of(
                data, kind, 3 if kind == "dense" else 0, train__lr=1e-2, train__epochs=2, checkpoint={"every": 1000},
                method=KINDS[kind], evaluate={"mode": "generate", "max_new_tokens": 8, "zero_shot": False},
            )  # fmt: skip
            recipe["model"]["shape"]["initializer_range"] = 0.1
            (answers,) = ranks(1)(trained_here, recipe)
            (data / kind / "answers.json").write_text(json.dumps([*answers.items()]))
            made[kind] = data / kind
        return made[kind]

    return get


def plain_of(run_dir: Path) -> Any:
    """The bare base model."""
    base = open_base_model(export.describe_run(run_dir))
    module = base.build()
    load_parameters(module, base.weights.read)
    return module.eval()


def recording(module: Any, answers: Answers) -> Any:
    """Within, each prompt's answer that `module` generates is noted, by their tokens; the last one stays."""

    def generate(model: Any, batch: Any, *rest: Any) -> list[list[int]]:
        rows = original(model, batch, *rest)
        for ids, mask, row in zip(batch.input_ids, batch.attention_mask, rows, strict=True):
            answers[tuple(ids[mask.bool()].tolist())] = row
        return rows

    original = module.generate
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "generate", generate)
    return contextlib.closing(types.SimpleNamespace(close=patch.undo))


def trained_here(document: dict[str, Any]) -> Answers:
    """On a rank; returns the answers of the last evaluation."""
    answers: Answers = {}
    with recording(evaluation, answers):
        with_few_texts(run, document)
    return answers


@pytest.mark.parametrize("kind", ["routed", "given", "dense"])
def test_trained_run_answers_as_evaluated(trained: Any, data: Path, tmp_path: Path, kind: str) -> None:
    run_dir = trained(kind)
    evaluated = {tuple(ids): row for ids, row in json.loads((run_dir / "answers.json").read_text())}
    export.export_run(run_dir, tmp_path / "made")
    scores = json.loads((run_dir / "scores.json").read_text())
    for model in (dscl.load(tmp_path / "made"), server.open_model(export.describe_run(run_dir))):
        served: Answers = {}
        bare: Answers = {}
        for index, task in enumerate(TASKS):
            records = json.loads((data / task / "test.json").read_text())
            prompts = [f"{record['sentence']}\nAnswer:" for record in records]  # as the layout's template has it
            with recording(server, served):
                answers = model.generate(prompts, 8, task) if kind == "given" else model.generate(prompts, 8)
            if kind != "given":
                routed = [answer.task == task for answer in answers]
                assert sum(routed) / len(routed) == pytest.approx(scores["routing_accuracy"][-1][index])
            with recording(server, bare):
                model.generate(prompts, 8, None)
        assert served == evaluated
        assert sum(served[ids] == bare[ids] for ids in bare) < len(bare) / 4  # else nothing was seen


def test_export_holds_only_trained_dense_weights(trained: Any, tmp_path: Path) -> None:
    run_dir = trained("dense")
    export.export_run(run_dir, tmp_path / "made")
    written = load_file(tmp_path / "made" / "weights.safetensors")
    names = [*(f"self_attn.{each}" for each in "qkvo"), "mlp.gate", "mlp.up", "mlp.down"]
    assert set(written) == {f"model.layers.1.{name}_proj.weight" for name in names}
    held = checkpoint_dirs(run_dir)[-1]
    masters = read_checkpoint_tensors(held)[0]
    base = open_base_model(export.describe_run(run_dir))
    for name, values in written.items():
        assert torch.equal(values.flatten(), masters[name])
        assert not torch.equal(values.flatten(), base.weights.read(name, values.shape, 0, values.numel()))


def test_single_task_export_answers_alike_in_peft(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with a uniform gate, or an adapter."""
    for kind in ("given", "asr"):
        run_dir, folder = trained(kind), tmp_path / kind
        capsys.readouterr()
        assert main(["export", str(run_dir), str(folder), "--task", "animal"]) == 0
        assert "\nexact: yes" in capsys.readouterr().out
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        model = server.open_model(export.describe_run(run_dir))
        bare: Any = plain_of(run_dir)
        prompts = ["animal red cat animal\nAnswer:", "blue\nAnswer:"]
        expected = logits_of(model, prompts, task="animal")
        assert (logits_of(model, prompts, task=None) - expected).abs().max() > 0.1
        peft = PeftModel.from_pretrained(bare, folder).eval()
        for prompt, logits in zip(prompts, expected, strict=True):
            ((_, tensors),) = model._make_batches([prompt], 1)
            with torch.no_grad():
                found = peft(input_ids=tensors.input_ids, attention_mask=tensors.attention_mask).logits[0, -1]
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert main(["export", str(run_dir), str(folder), "--task", "colour"]) == 0  # in place of the other task's
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        run_dir / "adapters" / "colour" / "adapter_model.safetensors"
    ).read_bytes()


def test_single_task_export_with_token_router_is_reported_inexact(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained("routed")
    capsys.readouterr()
    assert main(["export", str(run_dir), str(tmp_path / "lora"), "--task", "colour"]) == 0
    assert "exact: no, the task's token router sends every token to 2 sub-experts" in capsys.readouterr().out
    model = server.open_model(export.describe_run(run_dir))
    expected = logits_of(model, ["colour red\nAnswer:"], task="colour")
    ((_, tensors),) = model._make_batches(["colour red\nAnswer:"], 1)
    peft = PeftModel.from_pretrained(plain_of(run_dir), tmp_path / "lora").eval()
    with torch.no_grad():
        found = peft(input_ids=tensors.input_ids, attention_mask=tensors.attention_mask).logits[0, -1]
    assert (found - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (
            "routed",
            "colours",
            "--task: no task 'colours' has ended in .* (did you mean 'colour'?); tasks there: colour, a",
        ),
        ("dense", "colour", "has trained the base model's own weights too (method.constraint)"),
    ],
)
def test_invalid_single_task_exports_are_rejected(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, task: str, message: str
) -> None:
    run_dir = trained(kind)
    capsys.readouterr()
    assert main(["export", str(run_dir), str(tmp_path / "lora"), "--task", task]) == 2
    err = capsys.readouterr().err
    for part in message.split(".*"):
        assert part in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["export", str(run_dir), str(tmp_path / "mine"), "--task", "colour"]) == 2
    assert "something else is there" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_generate_requires_the_task_without_a_router(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = trained("given")
    capsys.readouterr()
    assert main(["export", str(run_dir), str(tmp_path / "made")]) == 0
    shown = capsys.readouterr().out
    assert "route: none; the run has router: oracle" in shown
    assert ".generate(['a prompt'], task='colour')" in shown
    for place in (run_dir, tmp_path / "made"):
        asked = ["generate", str(place), "--prompt", "red\nAnswer:"]
        assert main([*asked, "--task", "animal"]) == 0
        assert capsys.readouterr().out.startswith("[animal] ")
        assert main(asked) == 2
        err = capsys.readouterr().err
        assert "no task router (its run has router: oracle)" in err
        assert "tasks here: colour, animal" in err
        assert err.count("\n") == 1


def test_damaged_run_files_are_reported(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt = shutil.copytree(trained("routed"), tmp_path / "spoilt")
    task_artifact_path(spoilt, "experts", "colour").unlink()
    capsys.readouterr()
    assert main(["generate", str(spoilt), "--prompt", "red"]) == 1
    err = capsys.readouterr().err
    assert "experts/colour.safetensors is missing" in err
