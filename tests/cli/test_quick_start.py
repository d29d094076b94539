"""Start-up: which errors the command line reports before heavy imports, and what training never imports.

tools/bench_start.py measures the time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.config.methods import METHOD_PRESETS
from dscl.config.schema import METRICS, PRECISIONS
from tools import bench_start

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = str(REPOSITORY / "launch" / "recipes" / "quickstart.yaml")
COMPARISON = str(REPOSITORY / "launch" / "comparisons" / "methods.yaml")
HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "tensorboard", "numpy", "pandas", "pyarrow")
# Training imports these only if a recipe needs them: `datasets` and its dependencies for tasks that only `datasets`
# reads, PEFT for one LoRA of all tasks. Nothing needs torch's compiler and its graph library.
UNUSED = ("datasets", "pandas", "pyarrow", "peft", "torch._inductor.compile_fx", "networkx")

# Runs commands in one process and prints for each the status, the lines on stderr, and the packages imported so far.
COMMANDS = """
import contextlib, io, json, sys
from dscl.cli import app as cli
cli.spawn_ranks = lambda count, words: 99  # no rank may be started for a recipe that is wrong
answers = []
for words in json.loads(sys.argv[1]):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(words)
        except SystemExit as error:  # argparse ends so after help
            status = error.code
    answers.append((status, stderr.getvalue().splitlines(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]))
print(json.dumps(answers))
"""  # noqa: E501
# Trains to the end of the first step and prints which packages are imported by then, and the state of the process.
FIRST_STEP = """
import atexit, gc, json, os, sys
from dscl.cli import app as cli

def step_and_report(self, *args, **kwargs):
    step(self, *args, **kwargs)
    loaded = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
    print(json.dumps({"loaded": loaded, "gc": gc.isenabled(), "frozen": gc.get_freeze_count(),
                      "compiler": os.environ.get("TORCHDYNAMO_DISABLE")}), flush=True)
    os._exit(0)

with cli.disable_gc_for_imports():
    from dscl.training import run
    from dscl.engine.engine import Engine
step, Engine.step = Engine.step, step_and_report
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def run_commands(commands: list[list[str]]) -> list[tuple[int, list[str], list[str]]]:
    """For each command: its exit status, its lines on stderr, and the heavy packages that are imported by then."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands), json.dumps(HEAVY)],
        cwd=REPOSITORY, env={**environment, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    answers: list[tuple[int, list[str], list[str]]] = [tuple(answer) for answer in json.loads(process.stdout)]
    return answers


def test_help_and_wrong_arguments_import_nothing_heavy() -> None:
    help_commands = [["--help"], *([verb, "--help"] for verb in ("train", "plan", "eval", "compare", "export"))]
    wrong_commands = [
        [],
        ["nonsense"],
        ["trian", RECIPE],
        ["train"],
        ["train", RECIPE, "--fast"],
        ["train", "no-such.yaml"],
    ]
    answers = run_commands([*help_commands, *wrong_commands])
    for words, (status, lines, heavy) in zip([*help_commands, *wrong_commands], answers, strict=True):
        assert not heavy, words
        assert (status, len(lines)) == ((2, 1) if words in wrong_commands else (0, 0)), (words, lines)


WRONG = {
    "train.lrr=1": "train.lrr: no such key (did you mean 'lr'?); allowed here: lr, schedule, warmup",
    "trian=1": "trian: no such key (did you mean 'train'?); allowed here: run_dir, seed, deepspeed, method, stream",
    "train.lr=fast": "train.lr: given 'fast' (str); a number is needed",
    "train.lr=0": "train.lr: given 0.0; it must be above 0.0",
    "train.precision=fp8": "train.precision: given 'fp8'; allowed: fp32, bf16, fp16",
    "train.zero_optimization=1": "train.zero_optimization: ZeRO, offload and communication belong to the DeepSpeed",
    "model.nmae=x": "model.nmae: no such key (did you mean 'name'?)",
    "data.bad_records=hide": "data.bad_records: given 'hide'; allowed: stop, skip",
    "stream.0.formt=trace": "stream.0.formt: no such key (did you mean 'format'?)",
    "stream.0.metric=f1": "stream.0.metric: given 'f1'; allowed: accuracy,",
    "stream_defaults.epochs=0": "stream_defaults.epochs: given 0; it must be at least 1",
    "evaluate.mode=guess": "evaluate.mode: given 'guess'; allowed: rank, generate",
    "checkpoint.best=loss": "checkpoint.best: given 'loss'; allowed: OP, BWT, heldout",
    "observe.profile.steps=[3]": "observe.profile.steps: given [3]; the first and the last step of a trace are needed",
    "method.name=asrr": "method.name: given 'asrr'; allowed: sequential, joint, replay,",
    "method.ruter=3": "method.ruter: no such key (did you mean 'router'?); allowed here: name, paper_preset,",
    "method.router.num_feature=3": "method.router.num_feature: no such key (did you mean 'num_features'?)",
    "method.router.num_features=3": "method.router.num_features: given 3; it must be at least 8",
    "method.tune.rank=0": "method.tune.rank: given 0; it must be at least 1",
    "method={name: asr, paper_preset: true, router: {num_features: 64}}": (
        "method.router.num_features: given 64 together with paper_preset: true"
    ),
    "method={name: osft, constraint: {protect_base: [noise]}}": (
        "method.constraint.protect_base: given ['noise']; allowed: one or several of weights,"
    ),
    "method={name: osft, constraint: {projection: both}}": (
        "method.constraint.projection: given 'both'; allowed: input, two_sided, paper"
    ),
    "method={name: moses, constraint: {protected_ratoi: 1}}": "method.constraint.protected_ratoi: no such key",
    "method={name: moses, router: {name: key, ridge: 1}}": "method.router.ridge: a key of rls, but method.router.name",
    "method={name: sequential, tune: lroa}": "method.tune.name: given 'lroa' (str); allowed: full, lora (did you mean",
    **{f"method={{name: {name}, none: 1}}": "method.none: no such key; allowed here: name" for name in METHOD_PRESETS},
}


def test_a_wrong_recipe_is_refused_before_heavy_imports() -> None:
    """One line and status 2, before ranks are started, for a wrong key, value, method or method key."""
    commands = [["train", RECIPE, word] for word in WRONG]
    for words, (status, lines, heavy), expected_message in zip(
        commands, run_commands(commands), WRONG.values(), strict=True
    ):
        assert not heavy, words
        assert (status, len(lines)) == (2, 1), (words, lines)
        assert lines[0].startswith(f"dscl: {expected_message}"), words


def test_all_verbs_refuse_a_wrong_recipe_before_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(Path(RECIPE).read_text("utf-8"))
    commands = [
        ["train", RECIPE, "--nproc", "2", "train.lrr=1"],
        ["train", RECIPE, "--dry-run", "train.lrr=1"],
        ["doctor", RECIPE, "train.lrr=1"],
        ["plan", RECIPE, "--gpu", "H100", "--gpu-memory", "80GiB", "train.lrr=1"],
        ["compare", COMPARISON, f"folder={tmp_path}", "train.lrr=1"],
        ["compare", COMPARISON, f"folder={tmp_path}", "compare.learning_rate=[1]"],
        ["eval", str(tmp_path), "evaluate.bathc=1"],
        ["eval", str(tmp_path), "train.lr=1"],
        ["eval", str(tmp_path / "none")],
    ]
    for words, (status, lines, heavy) in zip(commands, run_commands(commands), strict=True):
        assert not heavy, words
        assert (status, len(lines)) == (2, 1), (words, lines)
        assert any(phrase in lines[0] for phrase in ("no such key", "only evaluate.* can", "no run there")), lines


def test_training_imports_only_what_it_uses(tmp_path: Path) -> None:
    """Up to the end of the first step. By then garbage collection is on, and the compiler's variable is restored."""
    for task in ("a", "b"):
        folder = tmp_path / task
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(["yes", "no"]))
        for split in ("train", "test"):
            samples = [{"sentence": f"{task} {split} {i} of some", "label": ["yes", "no"][i % 2]} for i in range(40)]
            (folder / f"{split}.json").write_text(json.dumps(samples))
    recipe = {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "shape": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300},
        },
        "method": {"name": "asr", "router": {"layer": 1}},
        "stream": [{"name": task, "path": str(tmp_path / task), "test_limit": 4} for task in ("a", "b")],
        "data": {"cache_dir": str(tmp_path / "cache")},
        "train": {"precision": "fp32", "max_length": 64},
        "deepspeed": "ds_configs/zero3.json",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    process = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, json.dumps(["torch", "tensorboard", *UNUSED]), str(path)],
        cwd=REPOSITORY, env={**environment, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    assert report["loaded"] == ["torch", "tensorboard"]
    assert report["gc"]
    assert report["frozen"] > 100_000
    assert report["compiler"] is None


def test_config_classes_agree_with_the_methods() -> None:
    from dscl.methods.registry import METHODS
    from dscl.model.backbone import DTYPES
    from dscl.training import evaluation

    assert list(METHODS) == list(METHOD_PRESETS)
    for name, config in METHOD_PRESETS.items():
        assert METHODS[name].Config is config
        assert (dataclasses.fields(config)[0].name, config().name) == ("name", name)
    assert tuple(DTYPES) == PRECISIONS
    assert tuple(evaluation.METRICS) == METRICS


def test_the_table_of_bench_start() -> None:
    """The medians, and their ratios to the first line."""
    times_of = {"import": [2.0, 4.0, 3.0], "help": [0.1, 0.3, 0.15], "first step": [6.0, 5.0, 9.0]}
    targets = {"import": None, "help": 0.5, "first step": 6.0}
    assert bench_start.format_table(times_of, targets, as_json=False)[2:] == [
        "| import | 3.00 | 1.00 |  | 2.00 to 4.00 s |",
        "| help | 0.15 | 0.05 | 0.5 s | 0.10 to 0.30 s |",
        "| first step | 6.00 | 2.00 | 6 s | 5.00 to 9.00 s |",
    ]
    rows = [json.loads(line) for line in bench_start.format_table(times_of, targets, as_json=True)]
    assert rows[2] == {
        "name": "first step", "value": "6.00 s", "target": "6 s",
        "note": "2.00 of importing the libraries; 5.00 to 9.00 s",
    }  # fmt: skip


def test_bench_start_stops_at_an_unexpected_status() -> None:
    assert bench_start.time_command([sys.executable, "-c", "pass"], 0) > 0.0
    with pytest.raises(SystemExit, match="status 0"):
        bench_start.time_command([sys.executable, "-c", "import sys; print('a', file=sys.stderr)"], 2)
    two_lines = "import sys; print('a\\nb', file=sys.stderr); sys.exit(2)"
    with pytest.raises(SystemExit, match="status 2"):
        bench_start.time_command([sys.executable, "-c", two_lines], 2)
