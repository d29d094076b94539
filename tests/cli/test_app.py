"""The command line: help, errors of one line, exit statuses, and a dry run of everything."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dscl.cli import app
from dscl.cli.app import main
from dscl.cli.generate import apply_template
from dscl.cli.lazy_imports import choose_accelerator
from dscl.distributed import comm
from dscl.distributed.launcher import FORWARDED_SIGNALS
from dscl.utils.errors import UserError
from tests.support.programs import Program, forked_run

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}


NO_RUN = "dscl: no-such: no run there (it would hold recipe.yaml) and no export (dscl.json); "


@pytest.fixture(autouse=True)
def no_ranks() -> Iterator[None]:
    """Remove the variables of a launcher, and restore the environment and the signal handlers after the test."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in FORWARDED_SIGNALS}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DSCL_SPAWNED_BY", "DSCL_REPORT_TO"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe and two tasks in the layout of CL_Benchmark."""
    for task, labels in (("color", ["red", "blue"]), ("sound", ["loud", "soft"])):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps(labels))
        for split, count in (("train", 24), ("dev", 4), ("test", 6)):
            records = [
                {"label": labels[i % 2], "sentence": f"the {task} of {split} thing number {i} is {labels[i % 2]}"}
                for i in range(count)
            ]
            (folder / f"{split}.json").write_text(json.dumps(records))
    recipe = {
        "run_dir": str(tmp_path / "out"),
        "model": {"shape": SHAPE},
        "stream": [{"name": task, "path": str(tmp_path / "data" / task)} for task in ("color", "sound")],
        "train": {"global_batch": 4, "micro_batch": 2, "max_length": 128, "epochs": 2},
        "data": {"cache_dir": str(tmp_path / "cache")},
        "deepspeed": "ds_configs/zero1.json",
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    return tmp_path


def run_dscl(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dscl", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def read_refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that is refused."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dscl: ")
    assert err.count("\n") == 1
    return err.removeprefix("dscl: ").rstrip("\n")


@pytest.mark.parametrize("words", [[], *([verb] for verb in app.VERBS)])
def test_help_shows_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert f"example:\n  dscl {' '.join(words)}" in help_text
    assert all(verb in help_text for verb in app.VERBS) or words


def test_help_is_fast_and_imports_no_torch() -> None:
    start = time.monotonic()
    process = run_dscl("--help", PYTHONPROFILEIMPORTTIME="1")
    assert time.monotonic() - start < 1.5
    assert process.returncode == 0
    assert process.stdout.startswith("usage: dscl ")
    assert "dscl.cli.app" in process.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in process.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy"} & imported


@pytest.mark.parametrize(
    ("words", "expected_message"),
    [
        ([], "no verb given; allowed: train, plan, doctor, eval, generate, export, compare, report, import-adapters"),
        (["trian"], "trian: no such verb (did you mean 'train'?); allowed: train, plan, doctor, eval, generate,"),
        (["--fast"], "the following arguments are required: VERB; see dscl --help"),
        (["train"], "the following arguments are required: RECIPE.yaml; see dscl train --help"),
        (["train", "--nproc"], "argument --nproc: expected one argument; see dscl train --help"),
        (
            ["train", "r.yaml", "--np", "2"],
            "--np: not understood; allowed: key=value and options, see dscl train --help",
        ),
        (["train", "r.yaml", "--dry"], "--dry: not understood; allowed: key=value and options, see dscl train --help"),
        (
            ["eval", "out", "--dry-run"],
            "--dry-run: not understood; allowed: key=value and options, see dscl eval --help",
        ),
        (["train", "r.yaml", "--dry-run", "more"], "more: not understood; allowed: key=value and options, see"),
        (["generate"], "the following arguments are required: RUN_DIR|EXPORT; see dscl generate --help"),
        (["generate", "out", "--nproc", "2"], "--nproc: not understood; allowed: options, see dscl generate --help"),
        (["generate", "out", "train.lr=1"], "train.lr=1: not understood; allowed: options, see dscl generate --help"),
        (["plan", "no.yaml"], "no.yaml: no such recipe; give the path of a YAML file"),
        (["plan", "r.yaml", "--efficiency", "1.5"], "--efficiency: given 1.5; a share above 0, up to 1 is needed"),
        (["plan", "r.yaml", "--nodes", "0"], "--nodes: given 0; more than 0 is needed"),
        (["plan", "r.yaml", "--gpu", "H100", "--tflops", "3"], "--tflops: given beside --gpu, which says what the"),
        (["plan", "r.yaml", "--gpu-memory", "80"], "--gpu-memory: given '80'; a size like 80GiB or 400GB is needed"),
        (["compare", "no.yaml"], "no.yaml: no such recipe; give the path of a YAML file"),
        (["compare", "r.yaml", "--seeds", "x"], "--seeds: given 'x'; allowed: how many, or seeds like 3,4,5"),
        (["compare", "r.yaml", "--seeds", "0"], "--seeds: given '0'; allowed: how many, or seeds like 3,4,5"),
        (["compare", "r.yaml", "--max-parallel", "0"], "--max-parallel: given 0; at least 1 is needed"),
        (["report", "--out", "x"], "the following arguments are required: RUN; see dscl report --help"),
        (["report", "no-such", "--out", "x"], "no-such"),
        (["generate", "out", "--max-new-tokens", "x"], "argument --max-new-tokens: invalid int value: 'x'; see dscl"),
        (["export", "out"], "the following arguments are required: DIR; see dscl export --help"),
        (["export", "out", "made", "more"], "more: not understood; allowed: options, see dscl export --help"),
        (["import-adapters", "made"], "the following arguments are required: --base, --task; see dscl import-adapters"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(
    words: list[str], expected_message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected_message in read_refusal(capsys, *words)


@pytest.mark.parametrize(("words", "value"), [(["--nproc", "0"], "0"), (["--nproc=x"], "x")])
def test_a_wrong_number_of_ranks_is_refused(
    project: Path, words: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = read_refusal(capsys, "train", str(project / "r.yaml"), *words)
    assert message == f"--nproc: given '{value}'; allowed: a whole number of at least 1, or auto"


def test_nproc_under_another_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "a launcher has already started the ranks" in read_refusal(capsys, "train", "r.yaml", "--nproc", "2")


@pytest.mark.parametrize("words", [["generate", "out"], ["export", "out", "made"], ["plan", "r.yaml"]])
def test_single_process_verbs_are_refused_under_a_launcher(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"{words[0]}: runs in one process; start it without a launcher" in read_refusal(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "no-such", "--prompt", "x"],
        pytest.param(["export", "no-such", "made"], marks=pytest.mark.exhaustive),
    ],
)
def test_generate_without_a_run_is_refused(words: list[str]) -> None:
    process = run_dscl(*words, DS_ACCELERATOR="cuda")  # dscl sets it to cpu, so DeepSpeed prints no warning
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(NO_RUN)
    assert process.stderr.count("\n") == 1


def test_export_without_a_run_is_refused() -> None:
    program = Program(["export", "no-such", "made"])
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (2, "")
    assert err.startswith(NO_RUN)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["train", "r.yaml", "seed=1", "train.lr=2", "--nproc", "2"],
        ["train", "r.yaml", "--nproc", "2", "seed=1", "train.lr=2"],
        ["train", "r.yaml", "seed=1", "--nproc=2", "train.lr=2"],
        ["train", "--nproc", "2", "r.yaml", "seed=1", "train.lr=2"],
        ["train", "--nproc", "2", "--", "r.yaml", "seed=1", "train.lr=2"],
    ],
)
def test_overrides_may_stand_before_and_after_options(
    words: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    options = app._parse_arguments(words)
    assert (options.recipe, options.nproc, options.dry_run) == ("r.yaml", "2", False)
    assert options.assignments == ["seed=1", "train.lr=2"]
    spawned: list[Any] = []

    def spawn(*arguments: Any) -> int:
        spawned.append(arguments)
        return 75

    monkeypatch.setattr(app, "spawn_ranks", spawn)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(words) == 75
    assert spawned == [(2, words)]


def test_a_spawned_rank_ignores_nproc(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    recipes: list[Any] = []
    monkeypatch.setenv("DSCL_SPAWNED_BY", str(os.getppid()))
    monkeypatch.setattr(app, "die_with_parent", lambda: None)  # else the test process would die with its parent
    monkeypatch.setattr(app, "spawn_ranks", lambda *_: pytest.fail("spawned again"))

    def run(options: Any, *_: Any) -> None:
        recipes.append(options.recipe)

    monkeypatch.setitem(app.VERBS, "train", replace(app.TRAIN, run=run))
    assert main(["train", "r.yaml", "--nproc", "2"]) == 0
    assert recipes == ["r.yaml"]


@pytest.mark.parametrize(
    ("words", "function"),
    [
        (["train", "r.yaml", "--dry-run"], "dscl.training.dry_run.dry_run"),
        (["doctor", "r.yaml"], "dscl.training.run.diagnose_cluster"),
        (["export", "out", "made"], "dscl.serving.export.export_run"),
        (["export", "out", "made", "--task", "color"], "dscl.serving.export.export_task_adapter"),
    ],
)
def test_a_command_line_becomes_one_call(
    project: Path, words: list[str], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.chdir(project)
    monkeypatch.setattr(function, lambda *arguments: calls.append(arguments))
    assert main(words) == 0
    assert len(calls) == 1


@pytest.mark.parametrize("words", [[], ["--doctor"]])
def test_train_runs_the_checks_only_with_doctor(
    project: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    thorough_flags: list[bool] = []
    monkeypatch.setattr("dscl.training.run.train", lambda recipe, stop, thorough: thorough_flags.append(thorough))
    assert main(["train", str(project / "r.yaml"), *words]) == 0
    assert thorough_flags == [bool(words)]


def test_the_installed_command_is_the_same_program_as_the_module() -> None:
    (module, function) = re.findall(r'"dscl=([\w.]+):(\w+)"', (REPOSITORY / "setup.py").read_text("utf-8"))[0]
    assert getattr(importlib.import_module(module), function) is app.run_and_exit
    assert "run_and_exit()" in (REPOSITORY / "dscl" / "__main__.py").read_text("utf-8")


@pytest.mark.parametrize(("kind", "expected"), [("cpu", "cpu"), ("cuda", None)])
def test_the_accelerator_is_the_cpu_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected: str | None
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "")  # restored afterwards
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(comm, "device", lambda: SimpleNamespace(type=kind))
    choose_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == expected


def test_a_rank_reports_its_error_before_it_leaves_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def session() -> Iterator[None]:
        yield
        events.append("left")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(comm, "process_group", session)
    monkeypatch.setattr(app, "report_exit", lambda status, text, **_: events.append(text))
    assert main(["train", "no-such.yaml"]) == 2
    assert events == ["dscl: no-such.yaml: no such recipe; give the path of a YAML file", "left"]


@pytest.mark.parametrize(
    ("wrong", "expected_message"),
    [
        ("train.lr=-1", "dscl: train.lr: given -1.0; it must be above 0.0\n"),
        ("stream.1.path=nowhere", "dscl: task 'sound': nowhere: no such file or folder; "),  # the ranks find this error
    ],
)
def test_two_ranks_report_the_same_error_once(project: Path, wrong: str, expected_message: str) -> None:
    process = Program(["train", str(project / "r.yaml"), "--nproc", "2", wrong, "--dry-run"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(expected_message)
    assert err.count("\n") == 1
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("count", "forked"), [(1, True), (2, True), pytest.param(2, False, marks=pytest.mark.exhaustive)]
)
def test_dry_run_checks_everything_and_writes_no_run(project: Path, count: int, forked: bool) -> None:
    words = ["train", str(project / "r.yaml"), "--dry-run", f"--nproc={count}"]
    words.append(f"deepspeed=ds_configs/zero{2 * count - 1}.json")
    process = forked_run([sys.executable, "-m", "dscl", *words]) if forked else run_dscl(*words)
    assert process.returncode == 0, process.stderr
    assert not (project / "out").exists()
    hidden, pieces, wide = 32, 300, 128  # the intermediate size's default: 8/3 of the hidden size, in steps of 64
    parameters = pieces * hidden + 4 * hidden * hidden + 3 * hidden * wide + 3 * hidden
    assert f"{parameters:,} parameters, of which {parameters:,} train (sequential)" in process.stdout
    assert f"ranks:    {count} on cpu, ZeRO stage {2 * count - 1}" in process.stdout
    for task in ("color", "sound"):
        line = next(line for line in process.stdout.splitlines() if line.startswith(f"task:     {task}: "))
        assert "24 train, 4 dev, 6 test samples; " in line
        assert line.endswith(" tokens an epoch, 2 epochs, 12 steps; accuracy")
    assert "steps:    24 in all; nothing was trained" in process.stdout
    assert "precision: bf16" in process.stdout  # the resolved recipe, defaults included


def test_the_argument_of_deepspeeds_launcher_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--local_rank=0", "train", "--help"])
    assert caught.value.code == 0
    assert "RECIPE.yaml" in capsys.readouterr().out


def test_the_template_is_applied_to_every_prompt() -> None:
    assert apply_template(["a", "b"], None) == ["a", "b"]
    assert apply_template(["a {x}", "b"], r"{prompt}\nAnswer:") == ["a {x}\nAnswer:", "b\nAnswer:"]
    with pytest.raises(UserError, match=r"--template: given 'Answer:'; it must hold \{prompt\}"):
        apply_template(["a"], "Answer:")


def test_dry_run_of_a_comparison_lists_its_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs come in the order of the file, with overrides after options; nothing is written."""
    recipe = json.loads((project / "r.yaml").read_text())
    recipe["compare"] = {"learning_rates": [1e-3, 1e-2], "rows": {"b": {"name": "replay"}, "a": {"tune": "lora"}}}
    (project / "c.yaml").write_text(json.dumps(recipe))
    words = ["compare", str(project / "c.yaml"), "--dry-run"]
    assert main([*words, "--seeds", "4,6", "compare.learning_rates=[0.5]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["b: seed 4, rate 0.5", "b: seed 6, rate 0.5", "a: seed 4, rate 0.5", "a: seed 6, rate 0.5"]
    assert main([*words, "--seeds", "1", "--methods", "osft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["osft: dev, rate 0.001", "osft: dev, rate 0.01", "osft: seed 0, rate 0.001"]
    assert not (project / "out").exists()
