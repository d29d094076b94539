"""`dscl compare`: planned runs, equal budgets, the search for learning rates, and failed runs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.recipe.recipe import resolve_recipe
from dscl.reporting import run_pool
from dscl.reporting.compare import choose_learning_rate, read_comparison_plan, run_comparison
from dscl.reporting.run_pool import PlannedRun, RunPool, machine_shares
from dscl.utils.errors import ExternalFailure, UserError
from tests.support.programs import Program
from tests.support.runs import recipe_of, write_tasks
from tests.support.score_boards import make_score_board

COMPARE = {"learning_rates": [1e-3, 1e-2], "rows": {"plain": {"name": "sequential"}, "one LoRA": {"tune": "lora"}}}


def write_comparison_recipe(folder: Path, compare: Mapping[str, Any] = COMPARE, **changes: Any) -> str:
    document = {**recipe_of(folder, "out", 1), "evaluate": {"tasks": "seen", "zero_shot": False}, **changes}
    del document["method"], document["train"]["lr"]
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({**document, "compare": dict(compare)}, sort_keys=False))
    return str(path)


def write_finished_run(
    run: PlannedRun, scores: float, bwt: float = -0.1, tokens: int = 100, complete: bool = True
) -> None:
    """Write the files of a run that has ended."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(resolve_recipe(run.recipe).to_dict()))
    tasks = ["colour", "animal"]
    summary = {"OP": scores, "BWT": bwt, "FWT": None, "forgetting": -bwt}
    matrix = [[scores - bwt, None], [scores, scores]][: 2 if complete else 1]
    document = {"method": "x", "tasks": tasks, "metrics": ["accuracy"] * 2, "matrix": matrix, "zero_shot": None}
    (run.folder / "scores.json").write_text(json.dumps(document | {"summary": summary, "complete": complete}))
    records = [{"step": s, "task": tasks[s // 3], "loss": 1.0, "tokens": tokens, "seconds": 0.5} for s in range(6)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def simulate_training(monkeypatch: pytest.MonkeyPatch, op: Any) -> list[PlannedRun]:
    """Replace training: each run ends with the OP `op(run)`, or fails if that is None. Return the started runs."""
    started: list[PlannedRun] = []

    def start(self: RunPool, run: PlannedRun) -> None:
        started.append(run)
        value = op(run)
        if value is None:
            failure = {"row": run.row, "run": run.name, "status": 2, "message": "dscl: no", "log": "a.log"}
            self.failures.append(failure)
        else:
            write_finished_run(run, *value) if isinstance(value, tuple) else write_finished_run(run, value)

    monkeypatch.setattr(RunPool, "_train_run", start)
    return started


def test_runs_differ_only_in_method_learning_rate_seed_and_split(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison_plan(write_comparison_recipe(tmp_path))
    runs = comparison.all_runs()
    assert [run.name for run in runs[:5]] == [
        "plain: dev, rate 0.001",
        "plain: dev, rate 0.01",
        "plain: seed 0, rate 0.001",
        "plain: seed 1, rate 0.001",
        "plain: seed 2, rate 0.001",
    ]
    assert len(runs) == 10
    assert len({run.folder for run in runs}) == 10
    documents = []
    for run in runs:
        document = resolve_recipe(run.recipe).to_dict()
        assert document["train"].pop("lr") == run.learning_rate
        assert document.pop("seed") == run.seed
        assert document["evaluate"].pop("split") == run.split
        assert document.pop("run_dir") == str(run.folder)
        documents.append(document)
    assert documents[5].pop("method")["tune"]["name"] == "lora"
    assert documents[0].pop("method")["tune"]["name"] == "full"
    assert documents[0] == documents[5]


def test_search_runs_evaluate_only_what_the_choice_of_a_rate_needs(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    evaluate = {"heldout": str(tmp_path / "texts.txt"), "oracle_task_id": True, "tasks": "all", "zero_shot": True}
    rows = {
        "asr": {"name": "asr"},
        "plain": {"name": "sequential"},
        "moses": {"name": "moses"},
        "oracle": {"name": "moses", "router": "oracle"},
    }
    path = write_comparison_recipe(
        tmp_path, {"learning_rates": [1e-3, 1e-2], "rows": rows, "search_limit": 5}, evaluate=evaluate
    )
    comparison = read_comparison_plan(path)
    dev, test = comparison.search_runs("asr")[0].recipe, comparison.final_runs("asr", 1e-3)[0].recipe
    expected = {"tasks": "new", "zero_shot": False, "split": "dev", "heldout": None}
    assert dev["evaluate"] == {**expected, "every": 2}
    assert test["evaluate"] == {**evaluate, "split": "test"}
    assert dev["stream_defaults"]["train_limit"] == 5
    assert "train_limit" not in test["stream_defaults"]
    assert comparison.final_runs("moses", 1e-3)[0].recipe["evaluate"]["oracle_task_id"]
    for row in ("plain", "oracle"):  # they do not infer the task
        assert "oracle_task_id" not in comparison.final_runs(row, 1e-3)[0].recipe["evaluate"]


def test_command_line_chooses_methods_seeds_and_overrides(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison_plan(
        write_comparison_recipe(tmp_path), ["train.epochs=5", "compare.learning_rates=[0.1]"], ["osft", "plain"], [4, 7]
    )
    assert [(run.row, run.seed, run.learning_rate) for run in comparison.all_runs()] == [
        (row, seed, 0.1) for row in ("osft", "plain") for seed in (4, 7)
    ]
    assert all(resolve_recipe(run.recipe).train.epochs == 5 for run in comparison.all_runs())
    searching = read_comparison_plan(write_comparison_recipe(tmp_path), ["seed=9"], ["plain"], [4, 7])
    assert [run.seed for run in searching.all_runs()] == [9, 9, 4, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"compare": {"learning_rates": [1e-3]}},
            "compare.rows: none given; give rows there, or names of methods with --methods",
        ),
        (
            {"compare": {"rows": {"a": {"name": "osft"}}}},
            "compare.learning_rates: none given, and row 'a' has none of its own",
        ),
        ({"compare": {"learning_rates": [0.1], "rows": {"a": {"name": "ofst"}}}}, "row 'a': method.name: given 'ofst'"),
        ({"compare": {"learning_rates": [0.1], "rows": {"a": {"rank": 3}}}}, "row 'a': method.rank: no such key"),
        ({"compare": {"learning_rates": [-0.1], "rows": {"a": {}}}}, "row 'a': train.lr: given -0.1"),
        (
            {"compare": {"learning_rates": [0.1, 0.1], "rows": {"a": {}}}},
            "compare.learning_rates: given [0.1, 0.1]; name each once",
        ),
        (
            {"compare": {"learning_rates": [0.1, 0.2], "rows": {"a": {}, "b": {"learning_rates": [0.3]}}}},
            "compare.rows.b.learning_rates: given 1, and a has 2; every row tries equally many, so give as many",
        ),
        (
            {"compare": {"learning_rates": [0.1], "rows": {"a b": {}, "a?b": {}}}},
            "compare.rows: 'a?b' and 'a b' would share the folder a-b; rename one",
        ),
        ({"compare": {"learning_rates": [0.1], "rows": {"a": {}}, "speed": 1}}, "compare.speed: no such key"),
        (
            {"compare": {"learning_rates": [0.1], "rows": {"a, b": {}}}},
            "compare.rows: given 'a, b'; a name holds no comma",
        ),
        ({"train": 5}, "train: given 5 (int); a mapping of keys is needed"),
        ({"stream_defaults": [1]}, "stream_defaults: given a list; a mapping of keys is needed"),
        ({"method": {"name": "osft"}}, "method: given a mapping in a comparison; write it as a row of compare.rows"),
        ({"train": {"lr": 0.1}}, "train.lr: given in a comparison, whose rows try those of compare.learning_rates"),
    ],
)
def test_errors_are_reported_before_any_run_starts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_tasks(tmp_path)
    path = Path(write_comparison_recipe(tmp_path))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        read_comparison_plan(str(path))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unknown_method_name_suggests_the_nearest_row(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    with pytest.raises(UserError, match=r"--methods: given 'plane'; allowed: sequential, .*did you mean 'plain'"):
        read_comparison_plan(write_comparison_recipe(tmp_path), methods=["plane"])


@pytest.mark.parametrize(("max_forgetting", "chosen"), [(None, 3.0), (0.05, 2.0), (0.02, 1.0), (0.001, 3.0)])
def test_choose_learning_rate_by_op_and_max_forgetting(max_forgetting: float | None, chosen: float) -> None:
    trials = {1.0: {"OP": 0.4, "BWT": -0.01}, 2.0: {"OP": 0.5, "BWT": -0.04}, 3.0: {"OP": 0.6, "BWT": -0.3}}
    assert choose_learning_rate(trials, max_forgetting) == chosen


def test_final_runs_use_the_best_rate_of_their_own_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    best = {"plain": 1e-2, "one LoRA": 1e-3}
    started = simulate_training(
        monkeypatch, lambda run: 0.5 + 0.2 * (run.learning_rate == best[run.row]) + 0.01 * run.seed
    )
    files = run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    finals = [run for run in started if run.split == "test"]
    assert {(run.row, run.learning_rate, run.seed) for run in finals} == {
        (r, best[r], s) for r in best for s in range(3)
    }
    assert len(started) == 10
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["rows"]["plain"]["learning_rate"] == 1e-2
    assert document["rows"]["plain"]["trials"]["0.001"]["OP"] == 0.5
    assert document["deviations"] == []
    assert all(path.is_file() for path in files)
    run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    assert len(started) == 10  # all runs were complete


def test_failed_runs_are_reported_and_do_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    bad = {("plain", 1e-2, "dev"), ("one LoRA", 1e-3, "test")}
    started = simulate_training(
        monkeypatch, lambda run: None if (run.row, run.learning_rate, run.split) in bad and run.seed == 0 else 0.5
    )
    with pytest.raises(
        ExternalFailure, match=r"2 of the runs failed: .*plain: dev, rate 0.01 \(dscl: no; a.log\).*again"
    ):
        run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["rows"]["plain"]["runs"] == []  # a row with fewer trials than the others would not be comparable
    assert document["rows"]["plain"]["learning_rate"] is None
    assert len(document["rows"]["one LoRA"]["runs"]) == 2
    assert [failure["status"] for failure in document["rows"]["one LoRA"]["failed"]] == [2]
    bad.clear()
    count = len(started)
    run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    assert len(started) == count + 5


def test_complete_run_counts_even_if_its_process_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison_plan(write_comparison_recipe(tmp_path), methods=["plain"])
    run = comparison.all_runs()[0]
    for complete in (False, True):

        class Aborted:
            def __init__(self, _words: list[str], **_: Any) -> None: ...

            def wait(self, complete: bool = complete) -> int:
                scores = make_score_board([[0.5, None], [0.5, 0.5]][: 2 if complete else 1])
                (run.folder / "scores.json").write_text(json.dumps(scores.to_json()))
                return -6

        monkeypatch.setattr(run_pool.subprocess, "Popen", Aborted)
        pool = RunPool([{}], 1, 1)
        _, scores = pool.complete_run(run)
        assert (scores is not None) == complete
        assert [failure["status"] for failure in pool.failures] == ([] if complete else [-6])


def test_unequal_budgets_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    rows = {"plain": {}, "again": {"name": "replay"}, "one LoRA": {"tune": "lora", "learning_rates": [1.0, 2.0]}}
    simulate_training(monkeypatch, lambda run: (0.5, -0.1, 130 if run.row == "again" else 100))
    run_comparison(
        read_comparison_plan(
            write_comparison_recipe(tmp_path, {"learning_rates": [1e-3, 1e-2], "rows": rows, "seeds": [0]})
        ),
        max_parallel=1,
    )
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["deviations"] == [
        "again: 6 steps and 780 tokens of training, where others take 6 and 600",
        "one LoRA: tried rates of its own, 1, 2",
    ]
    assert "780 tokens" in (tmp_path / "out" / "report.md").read_text()


def test_existing_runs_with_other_settings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    started = simulate_training(monkeypatch, lambda run: 0.5)
    run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    count = len(started)
    for run in started:  # as `dscl train` leaves it
        (run.folder / "recipe.yaml").write_text(resolve_recipe(run.recipe).to_yaml(), "utf-8")
    run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path)), max_parallel=1)
    for change, key in (("train.epochs=7", "train.epochs"), ("compare.search_limit=3", "stream.0.train_limit")):
        with pytest.raises(UserError, match=rf"run_dir: .*holds a run with another {key}"):
            run_comparison(read_comparison_plan(write_comparison_recipe(tmp_path), [change]), max_parallel=1)
    assert len(started) == count


def test_recipe_of_a_single_run_can_be_compared(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    path = tmp_path / "recipe.yaml"
    document = {**recipe_of(tmp_path, "out", 1), "method": {"name": "asr"}}
    document["train"]["lr"] = 0.25
    path.write_text(yaml.safe_dump(document))
    comparison = read_comparison_plan(str(path), [], ["osft", "ewc"], [3])
    assert [(run.row, run.learning_rate, run.seed) for run in comparison.all_runs()] == [
        ("osft", 0.25, 3),
        ("ewc", 0.25, 3),
    ]
    with pytest.raises(UserError, match=r"method: given .*name methods with --methods"):
        read_comparison_plan(str(path))


def test_search_runs_never_train_on_more_samples_than_final_runs(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    document = recipe_of(tmp_path, "out", 1)
    stream = [{**document["stream"][0], "train_limit": 4}, *document["stream"][1:]]
    compared = {"learning_rates": [1e-3, 1e-2], "rows": {"plain": {}}, "search_limit": 6}
    path = write_comparison_recipe(tmp_path, compared, stream=stream, stream_defaults={"train_limit": 5})
    (dev, *_) = read_comparison_plan(path).search_runs("plain")
    assert [task.train_limit for task in resolve_recipe(dev.recipe).stream] == [4, 5]


@pytest.mark.parametrize("gpus", [0, 4])
def test_parallel_runs_divide_cores_and_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(run_pool, "count_gpus", lambda: gpus)
    monkeypatch.setattr(run_pool, "count_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = machine_shares(None, 2)
    assert len(places) == (2 if gpus else 4)
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2" if gpus else "1"}
    if gpus:
        assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0,1", "2,3"]
        with pytest.raises(UserError, match="--max-parallel: given 3; 4 GPUs serve 2 runs of 2 ranks, so at most 2"):
            machine_shares(3, 2)


def test_killed_comparison_resumes(tmp_path: Path) -> None:
    """SIGKILL ends the comparison and its runs. Started again, it keeps complete runs as they are."""
    write_tasks(tmp_path)
    rows = {"plain": {}, "one LoRA": {"tune": {"name": "lora", "rank": 2}}}
    words = [
        "compare",
        write_comparison_recipe(tmp_path, {"learning_rates": [1e-3], "rows": rows, "seeds": [0]}),
        "--max-parallel",
        "1",
    ]
    program = Program(words)
    program.until(lambda: program.output()[0].startswith("1 of 2 runs: plain: seed 0, rate 0.001: OP 0."))
    first = tmp_path / "out" / "runs" / "plain" / "seed-0-0.001"
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    second = tmp_path / "out" / "runs" / "one-LoRA" / "seed-0-0.001"
    program.until((second / "recipe.yaml").exists)
    run = program.run()
    program.kill()
    assert program.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while _is_alive(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_alive(run)
    scores = second / "scores.json"  # the run was killed before its end
    assert not scores.exists() or not json.loads(scores.read_text())["complete"]
    again = Program(words)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()} == before
    assert json.loads(scores.read_text())["complete"]
    assert "one LoRA" in out
    assert (tmp_path / "out" / "report.html").is_file()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
