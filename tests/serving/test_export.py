"""Exports of runs and of imported adapters, and the output of the command line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dscl
from dscl.cli.app import main
from dscl.maths.rls import compute_statistics
from dscl.maths.text import accuracy
from dscl.methods.rls_router import save_task_statistics
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights, task_file_name, write_adapter
from dscl.monitoring.score_board import ScoreBoard
from dscl.recipe.recipe import resolve_recipe
from dscl.serving import export, server
from dscl.training import checkpoint
from dscl.training.state import Phase, TrainState
from dscl.utils.atomic_io import file_checksum
from dscl.utils.errors import ExternalFailure, UserError
from dscl.utils.json_files import write_checked_json
from tests.support.runs import make_easy, recipe_of, run, write_tasks
from tests.support.serving import (
    ALL_LAYERS,
    MAX_NEW_TOKENS,
    MIXED,
    MIXED_TASKS,
    TASKS,
    UPPER_LAYERS,
    approx_answers,
    generate_all,
    make_empty_model,
    make_prompts,
    make_router_spec,
    reference_answer,
    write_base,
    write_peft,
)

ENDED_TASKS = TASKS[:2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def make_recipe(run_dir: Path, base: Path, **router: Any) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": {"name": str(base)},
        "method": {"name": "asr", "router": {"layer": 1, "num_features": 128, **router}},
        "stream": [{"name": task, "path": "nowhere"} for task in TASKS],
        "train": {"precision": "fp32"},
    }


def write_checkpoint(run_dir: Path, task: int, trained: bool) -> None:
    """A checkpoint with the checksums of the artifacts. `trained`: whether the task's last step is done."""
    folder = run_dir / "checkpoints" / f"step-{10 * task + trained:08d}"
    folder.mkdir(parents=True)
    state = TrainState(Phase.EVALUATION if trained else Phase.TRAINING, task)
    scores = ScoreBoard("asr", tuple(TASKS), ("accuracy",) * len(TASKS))
    state_document = {"format": checkpoint.FORMAT, "train_state": state.to_json(), "scores": scores.to_json()}
    files = {"state.json": checkpoint.write_bytes(folder / "state.json", json.dumps(state_document).encode())}
    paths = [path for kind in ("adapters", "router") for path in (run_dir / kind).rglob("*") if path.is_file()]
    artifacts = {str(path.relative_to(run_dir)): file_checksum(path) for path in paths}
    write_checked_json(folder / "complete.json", {"files": files, "artifacts": artifacts})


def write_run(run_dir: Path, base: Path) -> Path:
    """Write the folder of a run within its third task: the adapters and router statistics of the ended tasks."""
    model, spec = make_empty_model(base), make_router_spec(base)
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(resolve_recipe(make_recipe(run_dir, base, ood_fallback=False)).to_yaml())
    (run_dir / "router").mkdir()
    torch.manual_seed(1)
    for task in ENDED_TASKS:
        layers = {
            name: LoraWeights(torch.randn(4, layer.in_features) / 8, torch.randn(layer.out_features, 4) / 4, 2.0)
            for name, layer in model._module.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(("q_proj", "up_proj")) and ".0." not in name
        }
        write_adapter(run_dir / "adapters" / task_file_name(task), LoraAdapter(task, str(base), layers))
        rows = [
            model._router.quantize(model._pool_hidden_states(tensors))
            for _, tensors in model._make_batches(make_prompts(task, 60), 16)
        ]
        save_task_statistics(
            run_dir / "router" / f"{task}.safetensors",
            spec,
            task,
            compute_statistics(torch.cat(rows), spec.feature_map()),
        )
    write_checkpoint(run_dir, 2, False)
    return run_dir


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "out", base)


@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run, which a test may damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "spoilt"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of a launcher, and no input on stdin."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115


def test_run_serves_only_ended_tasks(run_folder: Path, base: Path) -> None:
    model = server.open_model(export.describe_run(run_folder))
    assert model.tasks == list(ENDED_TASKS)
    assert (model._router.ridge, model._router.ood_fallback) == (None, False)
    mine = [(prompt, task) for prompt, task in zip(MIXED, MIXED_TASKS, strict=True) if task in ENDED_TASKS]
    answers = model.generate([prompt for prompt, _ in mine], MAX_NEW_TOKENS)
    assert [answer.task for answer in answers] == [task for _, task in mine]
    expected = [reference_answer(base, run_folder / "adapters" / task, prompt) for prompt, task in mine]
    assert [answer.text for answer in answers] == expected
    assert expected != [reference_answer(base, None, prompt) for prompt, _ in mine]


def test_export_answers_like_its_run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made" / "here"
    assert main(["export", str(run_folder), str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"wrote {folder}: " in output
    assert "tasks: birds, hills\n" in output
    expected = generate_all(server.open_model(export.describe_run(run_folder)))
    example = output.partition("use:")[2].split("\n")
    namespace: dict[str, Any] = {}
    exec("\n".join(line.strip().replace("dscl.load", "made = dscl.load") for line in example), namespace)
    assert namespace["made"]
    shutil.move(run_folder / "adapters", run_folder / "hidden")  # the export needs no file of the run
    try:
        assert generate_all(dscl.load(folder)) == approx_answers(expected)
    finally:
        shutil.move(run_folder / "hidden", run_folder / "adapters")
    assert main(["export", str(run_folder), str(folder)]) == 0  # again, over the earlier export
    assert main(["export", str(run_folder), str(run_folder)]) == 2
    assert "something else is there" in capsys.readouterr().err


def test_task_counts_as_trained_from_its_last_step(run_copy: Path) -> None:
    write_checkpoint(run_copy, 1, True)  # the second task's last step is done, its evaluation not
    shutil.rmtree(next((run_copy / "checkpoints").glob("*20")))
    assert list(export.describe_run(run_copy).tasks) == list(ENDED_TASKS)
    shutil.rmtree(next((run_copy / "checkpoints").glob("*11")))
    write_checkpoint(run_copy, 1, False)
    assert list(export.describe_run(run_copy).tasks) == ["birds"]


def refusal(run_dir: Path) -> str:
    with pytest.raises(UserError) as error:
        server.open_model(export.describe_run(run_dir))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_run_without_servable_tasks_is_rejected(run_copy: Path, base: Path) -> None:
    assert "no run there (it would hold recipe.yaml) and no export (dscl.json)" in refusal(run_copy / "none")
    router = run_copy / "router" / "hills.safetensors"
    content = router.read_bytes()
    router.write_bytes(content[:-10])
    with pytest.raises(ExternalFailure, match=r"no checkpoint there is whole \(router/hills\.safetensors has"):
        export.describe_run(run_copy)
    router.write_bytes(content)
    other = json.dumps(make_recipe(run_copy, base)).replace('"num_features": 128', '"num_features": 64')
    (run_copy / "recipe.yaml").write_text(other)
    assert list(export.describe_run(run_copy).tasks) == list(ENDED_TASKS)  # the files name their features
    (run_copy / "recipe.yaml").write_text(json.dumps({**make_recipe(run_copy, base), "method": {"name": "sequential"}}))
    assert "a run of method sequential, whose tasks have no adapters or sub-experts of their own" in refusal(run_copy)
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "recipe.yaml").write_text(json.dumps(make_recipe(run_copy, base)))
    assert "no task has ended there yet; train first" in refusal(run_copy)
    (run_copy / checkpoint.SAVED_FILE).touch()
    assert "has saved checkpoints, and none is there any more" in refusal(run_copy)


def test_mixed_files_of_different_runs_are_rejected(run_copy: Path, base: Path) -> None:
    spec = make_router_spec(base, layer=2)
    rows = torch.ones(4, 64, dtype=torch.int8)
    save_task_statistics(
        run_copy / "router" / "hills.safetensors", spec, "hills", compute_statistics(rows, spec.feature_map())
    )
    write_checkpoint(run_copy, 3, False)
    assert "the router was built with feature layer 2, here it is 1" in refusal(run_copy)


def test_base_model_changed_after_training_is_rejected(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    run_dir = write_run(tmp_path / "out", base)
    export.export_run(run_dir, tmp_path / "before")
    write_base(base, seed=6)
    with pytest.raises(UserError, match="the tasks were trained with model"):
        export.export_run(run_dir, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_model_names_do_not_depend_on_the_working_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    run_dir = write_run(tmp_path / "out", Path(base.name))
    export.export_run(run_dir, tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    assert dscl.load("made").tasks == list(ENDED_TASKS)


@pytest.fixture(scope="module")
def other_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """PEFT adapters of two ranks and on different layers, and prompts of each task in all kinds of files."""
    folder = tmp_path_factory.mktemp("elsewhere")
    adapters = {}
    for number, (task, ending) in enumerate(zip(TASKS, (".txt", ".json", ".jsonl"), strict=True)):
        options = ALL_LAYERS if number == 1 else UPPER_LAYERS
        adapter = write_peft(folder / task, base, number, rank=4 + 4 * number, **options)
        prompts = make_prompts(task, 60)
        contents = {
            ".txt": "\n".join(prompts),
            ".json": json.dumps(prompts),
            ".jsonl": "\n".join(json.dumps({"prompt": prompt, "answer": "x"}) for prompt in prompts),
        }
        file = folder / f"{task}{ending}"
        file.write_text(contents[ending])
        adapters[task] = (adapter, file)
    return adapters


def import_command(folder: Path, base: Path, tasks: dict[str, tuple[Path, Path]]) -> list[str]:
    named = [word for name, paths in tasks.items() for word in ("--task", f"{name}={paths[0]}={paths[1]}")]
    return ["import-adapters", str(folder), "--base", str(base), *named]


SETTINGS = ["--max-length", "20", "--precision", "fp32", "--feature-layer", "1", "--num-features=128"]


def test_imported_adapters_are_routed_without_training(
    base: Path, other_adapters: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*import_command(tmp_path / "made", base, other_adapters), *SETTINGS]) == 0
    assert "tasks: birds, hills, rain\n" in capsys.readouterr().out
    model = dscl.load(tmp_path / "made")
    spec = model._router.spec
    assert (spec.layer, spec.num_features, spec.prompt_limit, spec.precision) == (1, 128, 20, "fp32")
    answers = model.generate(MIXED, MAX_NEW_TOKENS)
    assert [answer.task for answer in answers] == MIXED_TASKS
    expected = [
        reference_answer(base, other_adapters[task][0], prompt) for task, prompt in zip(MIXED_TASKS, MIXED, strict=True)
    ]
    assert [answer.text for answer in answers] == expected


def test_import_uses_the_method_defaults(
    base: Path, other_adapters: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    export.import_adapters(tmp_path / "made", str(base), other_adapters)
    spec = dscl.load(tmp_path / "made")._router.spec
    assert (spec.kind, spec.layer, spec.num_features, spec.prompt_limit, spec.precision) == (
        "exact",
        2,
        2048,
        512,
        "bf16",
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--feature-layer", "4"], "the router's layer: given 4; the model has 4 layers, of which at least"),
        (["--feature-layer", "0"], "router.layer: given 0; it must be at least 1"),
        (["--feature-layer", "x"], "argument --feature-layer: invalid int value: 'x'"),
        (["--num-features", "4"], "router.num_features: given 4; it must be at least 8"),
        (["--max-length", "7"], "--max-length: given 7; at least 8 tokens are needed"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--task", "new"], "--task: given 'new'; NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed"),
        (["--task", "new==x.txt"], "--task: given 'new==x.txt'; NAME=ADAPTER_FOLDER=PROMPTS_FILE is needed"),
        (["--task", "rain=a=b.txt"], "--task: 'rain' is given twice"),
        (["--task", "new=none=none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--base", "./none"], "--base: given './none'; there is no such folder"),
        (["word"], "word: not understood; allowed: options, see dscl import-adapters --help"),
        (["a=1"], "a=1: not understood; allowed: options, see dscl import-adapters --help"),
    ],
)
def test_invalid_import_arguments_are_rejected(
    more: list[str], message: str, base: Path, other_adapters: dict[str, tuple[Path, Path]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*import_command(tmp_path / "made", base, other_adapters), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_adapters_of_another_base_model_are_rejected(
    base: Path, other_adapters: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "base").mkdir()
    from transformers import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(LlamaConfig(**{**config, "num_hidden_layers": 2})).save_pretrained(
        tmp_path / "base"
    )
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "base" / name)
    assert main(import_command(tmp_path / "made", tmp_path / "base", other_adapters)) == 2
    assert "and the model has no such linear layer" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_generate_prints_task_margin_and_answer(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = server.open_model(export.describe_run(run_folder))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in MIXED))
    expected = model.generate(MIXED, 5)
    assert (
        main(["generate", str(run_folder), "--file", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "5"]) == 0
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["prompt"], r["task"], r["margin"], r["distance"], r["answer"]) for r in records] == [
        (prompt, a.task, a.margin, a.distance, a.text) for prompt, a in zip(MIXED, expected, strict=True)
    ]
    export.export_run(run_folder, tmp_path / "made")
    capsys.readouterr()
    command = ["generate", str(tmp_path / "made"), "--max-new-tokens", "5", "--prompt", MIXED[0], "--prompt", MIXED[1]]
    assert main(command) == 0
    first = expected[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[birds, margin {first.margin:.2f}] {first.text}"
    assert lines[1].startswith("[hills, margin ")
    assert main([*command, "--task", "hills"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"[hills] {model.generate(MIXED[:1], 5, 'hills')[0].text}"


@pytest.mark.parametrize("dash", [[], ["--file", "-"]])
def test_generate_reads_prompts_from_stdin(
    dash: list[str], run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(MIXED[:2]).encode())))
    assert main(["generate", str(run_folder), *dash]) == 0
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["[birds", "[hills"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "no prompt given; give --prompt TEXT, --file FILE, or lines on the standard input"),
        (["--prompt", " "], "prompt 1 is empty; give some text"),
        (["--file", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--prompt", "x", "--file", "y.txt"], "argument --file: not allowed with argument --prompt"),
        (
            ["--prompt", "x", "--task", "bird"],
            "task 'bird' is not there (did you mean 'birds'?)",
        ),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens: given 0"),
        (["--prompt", "x", "--base", "y"], "--base: only for an export"),
        (
            ["--prompt", "x", "evaluate.batch=1"],
            "evaluate.batch=1: not understood; allowed: options, see dscl gen",
        ),
    ],
)
def test_invalid_generate_arguments_are_rejected(
    more: list[str], message: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run_folder), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("named", "world"), [(False, 2), (True, 1), pytest.param(True, 2, marks=pytest.mark.exhaustive)]
)
def test_trained_run_is_served_as_evaluated(ranks: Any, base: Path, tmp_path: Path, named: bool, world: int) -> None:
    """With a base and a tokenizer of its own, or with a base from a folder; on two ranks each holds a half."""
    write_tasks(tmp_path)
    for task in ("colour", "animal"):
        make_easy(tmp_path, task)
    recipe = recipe_of(
        tmp_path, "out", 3 if world == 2 else 0, train__lr=3e-2, train__epochs=4, checkpoint={"every": 1000},
        method={"name": "asr", "tune": {"rank": 8}, "router": {"layer": 1, "num_features": 128}},
        evaluate={"mode": "generate", "max_new_tokens": 8, "zero_shot": False},
    )  # fmt: skip
    if named:
        recipe["model"] = {"name": str(base)}
    else:
        recipe["model"]["shape"]["initializer_range"] = 0.1
    ranks(world)(run, recipe)
    export_dir = tmp_path / "made"
    export.export_run(tmp_path / "out", export_dir)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    for model in (dscl.load(export_dir), server.open_model(export.describe_run(tmp_path / "out"))):
        for index, task in enumerate(scores["tasks"]):
            records = json.loads((tmp_path / task / "test.json").read_text())
            prompts = [f"{record['sentence']}\nAnswer:" for record in records]  # as the layout's template has it
            answers = model.generate(prompts, 8)
            scores_of_answers = [accuracy(a.text, [r["label"]]) for a, r in zip(answers, records, strict=True)]
            assert sum(scores_of_answers) / len(scores_of_answers) == pytest.approx(scores["matrix"][-1][index])
            correctly_routed = [answer.task == task for answer in answers]
            assert sum(correctly_routed) / len(correctly_routed) == pytest.approx(scores["routing_accuracy"][-1][index])
    assert min(scores["matrix"][-1]) > 0.5  # else equal scores would say nothing
    assert json.loads((export_dir / "dscl.json").read_text())["model"]["name"] == (str(base) if named else None)
