"""Exports of a whole model or of one LoRA: transformers and PEFT answer like the run."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dscl.cli.app import main
from dscl.model import model_folder as model_folder
from dscl.model.weights import INDEX_FILE
from dscl.recipe.recipe import resolve_recipe
from dscl.serving import export
from dscl.training import run as training_run
from dscl.training.checkpoint import Checkpoints
from dscl.training.checkpoint_files import MasterWeights
from dscl.utils.errors import UserError
from tests.support.memory import PeakMemory
from tests.support.osft_runs import with_few_texts
from tests.support.pool import Pool
from tests.support.runs import recipe_of, run, write_tasks

IDS = [[1, 5, 9, 200, 13, 27], [1, 7, 7, 30, 2, 11]]
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "osft": {"constraint": {"protected_ratio": 0.3}},
    "ewc": {"constraint": {"fisher_samples": 16}},
    "one lora": {"name": "sequential", "tune": {"name": "lora", "rank": 4, "alpha": 12.0, "targets": ["q_proj"]}},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tasks(folder)
    return folder


def trained(ranks: Any, tasks: Path, method: str, precision: str = "fp32") -> dict[str, Any]:
    document = recipe_of(
        tasks, f"{method} {precision}", 2, method={"name": method, **METHODS[method]}, evaluate={"zero_shot": False}
    )
    document["stream_defaults"] = {"test_limit": 2}
    document["train"]["precision"] = precision
    if not Path(document["run_dir"]).exists():
        ranks(2)(with_few_texts, run, document)
    return document


def logits(document: dict[str, Any]) -> torch.Tensor:
    """Of the model as the run has it at its newest checkpoint."""
    setup = training_run.build_setup(resolve_recipe(document))
    with closing(setup.build_engine()) as engine, torch.no_grad():
        newest = Checkpoints(setup.recipe.run_folder / "checkpoints", setup.recipe.checkpoint).find_newest()
        assert newest is not None
        training_run.restore_checkpoint(newest, engine, setup)
        found: torch.Tensor = engine.module.eval()(input_ids=torch.tensor(IDS)).logits.float()
    return found


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("method", "precision"), [("sequential", "fp32"), ("sequential", "bf16"), ("osft", "fp32"), ("ewc", "fp32")]
)
def test_exported_model_in_transformers_matches_the_run(
    ranks: Any, tasks: Path, tmp_path: Path, method: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = trained(ranks, tasks, method, precision)
    assert main(["export", document["run_dir"], str(tmp_path / "model")]) == 0
    assert "tasks: colour, animal\n" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        found = model(input_ids=torch.tensor(IDS)).logits.float()
    assert torch.equal(found, ranks(1)(logits, document)[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("red cat").input_ids
    training_info = json.loads((tmp_path / "model" / export.TASKS_FILE).read_text())
    assert (training_info["method"], training_info["tasks"]) == (method, ["colour", "animal"])
    again = {**document, "model": {"name": str(tmp_path / "model")}, "run_dir": str(tmp_path / "again")}
    resolved = training_run.build_setup(resolve_recipe(again))  # it is a base model for a further stream
    assert resolved.backbone.hf_config.vocab_size == 300


def test_exported_lora_in_peft_matches_the_run(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    document = trained(ranks, tasks, "one lora")
    assert main(["export", document["run_dir"], str(tmp_path / "lora")]) == 0
    setup = training_run.build_setup(resolve_recipe(document))
    base = setup.backbone.build()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(setup.backbone.weights.read(name, parameter.shape, 0, parameter.numel()).view_as(parameter))
        plain = base.eval()(input_ids=torch.tensor(IDS)).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()(input_ids=torch.tensor(IDS)).logits
    (expected,) = ranks(1)(logits, document)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_large_model_is_sharded(ranks: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = trained(ranks, tasks, "sequential")
    monkeypatch.setattr(model_folder.write_model, "__defaults__", (40_000,))
    assert main(["export", document["run_dir"], str(tmp_path / "pieces")]) == 0
    index = json.loads((tmp_path / "pieces" / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pieces").eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(IDS)).logits
    assert torch.equal(found, ranks(1)(logits, document)[0])


@pytest.mark.parametrize("method", ["sequential", "one lora"])
def test_an_export_overwrites_only_an_export_of_its_kind(ranks: Any, tasks: Path, tmp_path: Path, method: str) -> None:
    document = trained(ranks, tasks, method)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something else is there"):
        export.export_run(Path(document["run_dir"]), tmp_path)
    export.export_run(Path(document["run_dir"]), tmp_path / "model")
    export.export_run(Path(document["run_dir"]), tmp_path / "model")  # its own kind it replaces


def peak_of_export(run_dir: str, folder: Path) -> int:
    """Bytes that an export takes beyond what the process had before."""
    with PeakMemory() as peak:
        export.export_run(Path(run_dir), folder)
    return peak.growth


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")
def test_model_export_holds_one_tensor_in_memory(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    """A model of 80 MB in 60 tensors, none above 4 MB, whose masters lie in a checkpoint of 240 MB."""
    document = recipe_of(tasks, "large", 2)
    document["model"]["shape"] |= {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1600}
    document["train"] |= {"epochs": 1, "global_batch": 8}
    document["stream"] = [{**document["stream"][0], "train_limit": 8, "test_limit": 1}]
    document["checkpoint"] = {"every": 100, "keep": 1}
    document["evaluate"] = {"zero_shot": False}
    ranks(2)(run, document)
    size = sum(p.numel() * 4 for p in training_run.build_setup(resolve_recipe(document)).backbone.build().parameters())
    assert size > 70e6
    with closing(Pool(1)) as fresh:  # in which no earlier test has left memory
        (peak,) = fresh(peak_of_export, document["run_dir"], tmp_path / "model")
    assert peak < size / 3
    shutil.rmtree(document["run_dir"])


def test_masters_cover_the_whole_model(ranks: Any, tasks: Path) -> None:
    """Nothing of a fully trained model is taken from the base by mistake."""
    document = trained(ranks, tasks, "sequential")
    setup = training_run.build_setup(resolve_recipe(document))
    newest = Checkpoints(setup.recipe.run_folder / "checkpoints", setup.recipe.checkpoint).find_newest()
    assert newest is not None
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in setup.backbone.build().named_parameters()}
    assert set(MasterWeights(newest, shapes).shapes) == set(shapes)
