"""Comparisons: what runs with what, that budgets are equal, rates searched alike, and a failure takes nothing along."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.recipe.recipe import resolve
from dscl.reporting import compare
from dscl.reporting.compare import Crew, Run, choose, perform, read_comparison
from dscl.utils.errors import Failure, UserError
from tests.support.programs import Program
from tests.support.runs import recipe_of, write_tasks

COMPARE = {"rates": [1e-3, 1e-2], "rows": {"plain": {"name": "sequential"}, "one LoRA": {"tune": "lora"}}}


def written(folder: Path, compare: Mapping[str, Any] = COMPARE, **changes: Any) -> str:
    document = {**recipe_of(folder, "out", 1), "evaluate": {"tasks": "seen", "before": False}, **changes}
    del document["method"], document["train"]["lr"]
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({**document, "compare": dict(compare)}, sort_keys=False))
    return str(path)


def finish(run: Run, scores: float, bwt: float = -0.1, tokens: int = 100, complete: bool = True) -> None:
    """As if it had run."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(resolve(run.recipe).document()))
    tasks = ["colour", "animal"]
    summary = {"OP": scores, "BWT": bwt, "FWT": None, "forgetting": -bwt}
    matrix = [[scores - bwt, None], [scores, scores]]
    document = {"method": "x", "tasks": tasks, "metrics": ["accuracy"] * 2, "matrix": matrix, "before": None}
    (run.folder / "scores.json").write_text(json.dumps(document | {"summary": summary, "complete": complete}))
    records = [{"step": s, "task": tasks[s // 3], "loss": 1.0, "tokens": tokens, "seconds": 0.5} for s in range(6)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def pretending(monkeypatch: pytest.MonkeyPatch, op: Any) -> list[Run]:
    """Instead of running, runs end with the OP that `op(run)` says; None: they fail. Which ones were started."""
    started: list[Run] = []

    def start(self: Crew, run: Run) -> None:
        started.append(run)
        value = op(run)
        if value is None:
            told = {"row": run.row, "run": run.name, "status": 2, "said": "dscl: no", "log": "a.log"}
            self._comparison.failed.append(told)
        else:
            finish(run, *value) if isinstance(value, tuple) else finish(run, value)

    monkeypatch.setattr(Crew, "_start", start)
    return started


def test_runs_differ_in_method_rate_seed_and_split_alone(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison(written(tmp_path))
    runs = comparison.every()
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
        document = resolve(run.recipe).document()
        assert document["train"].pop("lr") == run.rate
        assert document.pop("seed") == run.seed
        assert document["evaluate"].pop("split") == run.split
        assert document.pop("run_dir") == str(run.folder)
        documents.append(document)
    assert documents[5].pop("method")["tune"] == "lora"
    assert documents[0].pop("method")["tune"] == "full"
    assert documents[0] == documents[5]


def test_the_search_does_without_what_only_the_table_needs(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "texts.txt").write_text("one text\nanother\n")
    evaluate = {"heldout": str(tmp_path / "texts.txt"), "given": True, "tasks": "all", "before": True}
    rows = {
        "asr": {"name": "asr"},
        "plain": {"name": "sequential"},
        "moses": {"name": "moses"},
        "told": {"name": "moses", "task_inference": "given"},
    }
    path = written(tmp_path, {"rates": [1e-3, 1e-2], "rows": rows, "search_limit": 5}, evaluate=evaluate)
    comparison = read_comparison(path)
    dev, test = comparison.search("asr")[0].recipe, comparison.finals("asr", 1e-3)[0].recipe
    expected = {"tasks": "new", "before": False, "split": "dev", "heldout": None}
    assert dev["evaluate"] == {**expected, "every": 2}
    assert test["evaluate"] == {**evaluate, "split": "test"}
    assert dev["stream_defaults"]["train_limit"] == 5
    assert "train_limit" not in test["stream_defaults"]
    assert comparison.finals("moses", 1e-3)[0].recipe["evaluate"]["given"]
    for row in ("plain", "told"):  # they find nothing out
        assert "given" not in comparison.finals(row, 1e-3)[0].recipe["evaluate"]


def test_methods_seeds_and_assignments_of_the_command(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison(
        written(tmp_path), ["train.epochs=5", "compare.rates=[0.1]"], ["osft", "plain"], [4, 7]
    )
    assert [(run.row, run.seed, run.rate) for run in comparison.every()] == [
        (row, seed, 0.1) for row in ("osft", "plain") for seed in (4, 7)
    ]
    assert all(resolve(run.recipe).train.epochs == 5 for run in comparison.every())
    searching = read_comparison(written(tmp_path), ["seed=9"], ["plain"], [4, 7])
    assert [run.seed for run in searching.every()] == [9, 9, 4, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"compare": {"rates": [1e-3]}},
            "compare.rows: none given; give rows there, or names of methods with --methods",
        ),
        ({"compare": {"rows": {"a": {"name": "osft"}}}}, "compare.rates: none given, and row 'a' has none of its own"),
        ({"compare": {"rates": [0.1], "rows": {"a": {"name": "ofst"}}}}, "row 'a': method.name: given 'ofst'"),
        ({"compare": {"rates": [0.1], "rows": {"a": {"rank": 3}}}}, "row 'a': method.rank: no such key"),
        ({"compare": {"rates": [-0.1], "rows": {"a": {}}}}, "row 'a': train.lr: given -0.1"),
        ({"compare": {"rates": [0.1, 0.1], "rows": {"a": {}}}}, "compare.rates: given [0.1, 0.1]; name each once"),
        (
            {"compare": {"rates": [0.1, 0.2], "rows": {"a": {}, "b": {"rates": [0.3]}}}},
            "compare.rows.b.rates: given 1 rates, and a has 2; every row tries equally many, so give as many",
        ),
        (
            {"compare": {"rates": [0.1], "rows": {"a b": {}, "a?b": {}}}},
            "compare.rows: 'a?b' and 'a b' would share the folder a-b; rename one",
        ),
        ({"compare": {"rates": [0.1], "rows": {"a": {}}, "speed": 1}}, "compare.speed: no such key"),
        ({"compare": {"rates": [0.1], "rows": {"a, b": {}}}}, "compare.rows: given 'a, b'; a name holds no comma"),
        ({"train": 5}, "train: given 5 (int); a mapping of keys is needed"),
        ({"stream_defaults": [1]}, "stream_defaults: given a list; a mapping of keys is needed"),
        ({"method": {"name": "osft"}}, "method: given a mapping in a comparison; write it as a row of compare.rows"),
        ({"train": {"lr": 0.1}}, "train.lr: given in a comparison, whose rows try those of compare.rates"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_tasks(tmp_path)
    path = Path(written(tmp_path))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UserError) as told:
        read_comparison(str(path))
    assert said in str(told.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_row_is_told_with_the_nearest(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    with pytest.raises(UserError, match=r"--methods: given 'plane'; allowed: sequential, .*did you mean 'plain'"):
        read_comparison(written(tmp_path), methods=["plane"])


@pytest.mark.parametrize(("keeps", "chosen"), [(None, 3.0), (0.05, 2.0), (0.02, 1.0), (0.001, 3.0)])
def test_the_rate_that_dev_favours(keeps: float | None, chosen: float) -> None:
    found = {1.0: {"OP": 0.4, "BWT": -0.01}, 2.0: {"OP": 0.5, "BWT": -0.04}, 3.0: {"OP": 0.6, "BWT": -0.3}}
    assert choose(found, keeps) == chosen


def test_each_row_runs_with_the_rate_that_its_own_search_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    best = {"plain": 1e-2, "one LoRA": 1e-3}
    started = pretending(monkeypatch, lambda run: 0.5 + 0.2 * (run.rate == best[run.row]) + 0.01 * run.seed)
    files = perform(read_comparison(written(tmp_path)), at_once=1)
    finals = [run for run in started if run.split == "test"]
    assert {(run.row, run.rate, run.seed) for run in finals} == {(r, best[r], s) for r in best for s in range(3)}
    assert len(started) == 10
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["rows"]["plain"]["rate"] == 1e-2
    assert document["rows"]["plain"]["rates"]["0.001"]["OP"] == 0.5
    assert document["deviations"] == []
    assert all(path.is_file() for path in files)
    perform(read_comparison(written(tmp_path)), at_once=1)
    assert len(started) == 10  # all was done


def test_what_fails_is_told_and_takes_nothing_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    bad = {("plain", 1e-2, "dev"), ("one LoRA", 1e-3, "test")}
    started = pretending(
        monkeypatch, lambda run: None if (run.row, run.rate, run.split) in bad and run.seed == 0 else 0.5
    )
    with pytest.raises(Failure, match=r"2 of the runs failed: .*plain: dev, rate 0.01 \(dscl: no; a.log\).*again"):
        perform(read_comparison(written(tmp_path)), at_once=1)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["rows"]["plain"]["runs"] == []  # with a trial less than the others it would not be on a par
    assert document["rows"]["plain"]["rate"] is None
    assert len(document["rows"]["one LoRA"]["runs"]) == 2
    assert [told["status"] for told in document["rows"]["one LoRA"]["failed"]] == [2]
    bad.clear()
    count = len(started)
    perform(read_comparison(written(tmp_path)), at_once=1)
    assert len(started) == count + 5


def test_what_is_complete_counts_however_its_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    comparison = read_comparison(written(tmp_path), methods=["plain"])
    run = comparison.every()[0]
    for complete in (False, True):

        class Aborted:
            def __init__(self, _words: list[str], **_: Any) -> None: ...

            def wait(self, complete: bool = complete) -> int:
                document = {"complete": complete, "summary": {"OP": 0.5}}
                (run.folder / "scores.json").write_text(json.dumps(document))
                return -6

        monkeypatch.setattr(compare.subprocess, "Popen", Aborted)
        _, scores = Crew(comparison, [{}], 1, 1).run(run)
        assert (scores is not None) == complete
    assert [told["status"] for told in comparison.failed] == [-6]


def test_unequal_budgets_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    rows = {"plain": {}, "again": {"name": "replay"}, "one LoRA": {"tune": "lora", "rates": [1.0, 2.0]}}
    pretending(monkeypatch, lambda run: (0.5, -0.1, 130 if run.row == "again" else 100))
    perform(read_comparison(written(tmp_path, {"rates": [1e-3, 1e-2], "rows": rows, "seeds": [0]})), at_once=1)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["deviations"] == [
        "again: 6 steps and 780 tokens of training, where others take 6 and 600",
        "one LoRA: tried rates of its own, 1, 2",
    ]
    assert "780 tokens" in (tmp_path / "out" / "report.md").read_text()


def test_what_is_there_must_be_of_these_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path)
    started = pretending(monkeypatch, lambda run: 0.5)
    perform(read_comparison(written(tmp_path)), at_once=1)
    count = len(started)
    for run in started:  # as `dscl train` leaves it
        (run.folder / "recipe.yaml").write_text(resolve(run.recipe).text(), "utf-8")
    perform(read_comparison(written(tmp_path)), at_once=1)
    for change, key in (("train.epochs=7", "train.epochs"), ("compare.search_limit=3", "stream.0.train_limit")):
        with pytest.raises(UserError, match=rf"run_dir: .*holds a run with another {key}"):
            perform(read_comparison(written(tmp_path), [change]), at_once=1)
    assert len(started) == count


def test_a_recipe_serves_as_a_stream(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    path = tmp_path / "recipe.yaml"
    document = {**recipe_of(tmp_path, "out", 1), "method": {"name": "asr"}}
    document["train"]["lr"] = 0.25
    path.write_text(yaml.safe_dump(document))
    comparison = read_comparison(str(path), [], ["osft", "ewc"], [3])
    assert [(run.row, run.rate, run.seed) for run in comparison.every()] == [("osft", 0.25, 3), ("ewc", 0.25, 3)]
    with pytest.raises(UserError, match=r"method: given .*name methods with --methods"):
        read_comparison(str(path))


def test_the_search_never_has_more_samples_than_the_runs(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    document = recipe_of(tmp_path, "out", 1)
    stream = [{**document["stream"][0], "train_limit": 4}, *document["stream"][1:]]
    compared = {"rates": [1e-3, 1e-2], "rows": {"plain": {}}, "search_limit": 6}
    path = written(tmp_path, compared, stream=stream, stream_defaults={"train_limit": 5})
    (dev, *_) = read_comparison(path).search("plain")
    assert [task.train_limit for task in resolve(dev.recipe).stream] == [4, 5]


@pytest.mark.parametrize("gpus", [0, 4])
def test_runs_share_the_machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(compare, "gpus", lambda: gpus)
    monkeypatch.setattr(compare, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = compare._places(None, 2)
    assert len(places) == (2 if gpus else 4)
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2" if gpus else "1"}
    if gpus:
        assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0,1", "2,3"]
        with pytest.raises(UserError, match="--at-once: given 3; 4 GPUs serve 2 runs of 2 ranks, so at most 2"):
            compare._places(3, 2)


def test_a_real_comparison_that_is_killed_goes_on(tmp_path: Path) -> None:
    """With SIGKILL: its runs end with it; given again, what is complete stands as it was."""
    write_tasks(tmp_path)
    rows = {"plain": {}, "one LoRA": {"tune": "lora", "lora": {"rank": 2}}}
    words = ["compare", written(tmp_path, {"rates": [1e-3], "rows": rows, "seeds": [0]}), "--at-once", "1"]
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
    while _alive(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(run)
    scores = second / "scores.json"  # the run was ended; it did not come to its end
    assert not scores.exists() or not json.loads(scores.read_text())["complete"]
    again = Program(words)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()} == before
    assert json.loads(scores.read_text())["complete"]
    assert "one LoRA" in out
    assert (tmp_path / "out" / "report.html").is_file()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
