"""The checks before training: ranks that differ are named with their hosts, and outliers are reported."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dscl.distributed import comm
from dscl.recipe.recipe import resolve_recipe
from dscl.training import cluster_checks, preflight
from dscl.training import run as training_run
from dscl.training.cluster_checks import compare_with_needed, find_outliers
from dscl.training.preflight import describe_differences
from dscl.utils import hardware
from dscl.utils.errors import UserError
from tests.support.programs import Program
from tests.support.runs import recipe_of, run_listening, write_tasks


@pytest.mark.parametrize(
    ("values", "description"),
    [
        ([("a", "1"), ("b", "1")], ""),
        ([("a", "1"), ("b", "2"), ("c", "1")], "1 on a, c; 2 on b"),
        ([("a", "1"), ("a", "1"), ("b", "2")], "1 on a; 2 on b"),
    ],
)
def test_who_has_what(values: list[tuple[str, str]], description: str) -> None:
    assert describe_differences(values) == description


def test_a_place_with_far_less_than_the_others_is_odd() -> None:
    values = [("a", 10.0), ("b", 9.0), ("c", 4.4), ("d", 11.0)]
    result = find_outliers("speed", values, "{:.1f}".format, 3)
    assert not result.passed
    assert result.message == "c 4.4, where the median is 9.5"
    assert find_outliers("speed", values[:2] + values[3:], "{:.1f}".format, 3).message == "9.0 and more, median 10.0"
    two = find_outliers("speed", [("a", 10.0), ("b", 1.0)], "{:.1f}".format, 3)  # neither one is the outlier
    assert (two.passed, two.message) == (True, "a 10.0, b 1.0")


@pytest.mark.parametrize(
    ("hosts", "slow", "odd"),
    [
        ("abc", 0, {"links between hosts": "c → a 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aaaabbbb", 2, {"links within hosts": "a → a 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aabbcc", 4, {"links between hosts": "b → c 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aabb", 2, {}),  # only two links between two hosts
    ],
)
def test_a_slow_link_is_named(monkeypatch: pytest.MonkeyPatch, hosts: str, slow: int, odd: dict[str, str]) -> None:
    """Each rank takes 0.8 ms to get 4 MiB from the one before it, and one of them ten times as long."""
    count = len(hosts)
    ring_seconds = [8e-3 if rank == slow else 8e-4 for rank in range(count)]
    durations = iter(([1e-3] * count, [1e-3] * count, ring_seconds))  # all-reduce, all-to-all, the ring
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(cluster_checks, "best_seconds", lambda work: next(durations))
    monkeypatch.setattr(
        cluster_checks, "gather_by_host", lambda mine: list(zip(hosts, mine or [None] * count, strict=True))
    )
    results = cluster_checks.check_network(None)  # type: ignore[arg-type]
    assert {result.subject: result.message for result in results if not result.passed} == odd
    if hosts == "aabb":
        between = next(result for result in results if result.subject == "links between hosts")
        assert between.message == "b → a 5.24 GB/s, a → b 0.52 GB/s"


def test_a_place_with_less_than_is_foreseen_is_named() -> None:
    gib = float(1 << 30)
    free = [("a", 9 * gib), ("b", 3 * gib)]
    fine = compare_with_needed("memory", free, {"a": 3 * gib, "b": 3 * gib})
    assert (fine.passed, fine.message) == (True, "3.0 GiB foreseen, 3.0 GiB free")
    short = compare_with_needed("memory", free, {"a": 9 * gib, "b": 4 * gib})
    assert not short.passed
    assert short.message == "b has 3.0 GiB free and needs 4.0 GiB; dscl plan says what would fit"


def test_free_memory_is_what_the_job_may_have(tmp_path: Path) -> None:
    """The machine has 8 GiB free. The job has used 1.5 of the 3 GiB of its group, 0.5 of them for droppable files."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 8388608 kB\n")
    assert hardware.free_host_memory(tmp_path) == 8 * 2**30
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/slurm/job/step\n")
    assert hardware.free_host_memory(tmp_path) == 8 * 2**30
    job_folder = tmp_path / "sys" / "fs" / "cgroup" / "slurm" / "job"
    (job_folder / "step").mkdir(parents=True)
    (job_folder / "step" / "memory.max").write_text("max\n")
    (job_folder / "memory.max").write_text(f"{3 * 2**30}\n")
    (job_folder / "memory.current").write_text(f"{3 * 2**29}\n")
    (job_folder / "memory.stat").write_text(f"anon {2**30}\ninactive_file {2**29}\n")
    assert hardware.free_host_memory(tmp_path) == 2 * 2**30


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def plan(tasks: Path) -> dict[str, Any]:
    """The output of `dscl plan` for the recipe of these tests on two ranks, with the arguments of the doctor."""
    document = relative_recipe(tasks, "planned")
    (tasks / "planned.yaml").write_text(yaml.safe_dump(document))
    settings = f"deepspeed={Path(document['deepspeed']).absolute()}"
    words = ["plan", "planned.yaml", settings, "--recipe-only", "--json", "--gpus-per-node", "2"]
    out, err = Program(words, cwd=tasks).communicate(timeout=100)
    assert out, err
    plan_document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return plan_document


def run_rank_checks(
    document: dict[str, Any],
    places: list[str],
    trouble: str,
    all_checks: bool,
    strict: bool = True,
    plan: dict[str, Any] | None = None,
) -> tuple[list[str], str]:
    """The lines and the error of the checks on a rank with its own working directory in `places`. `trouble`: what is
    wrong. `plan` replaces the plan of the recipe."""
    before = os.getcwd(), time.time, socket.gethostname
    os.chdir(places[comm.rank()])
    socket.gethostname = lambda: f"node{comm.rank()}"
    if comm.rank() == 1:
        if trouble == "clock":
            time.time = lambda: before[1]() + 60.0
        if trouble == "recipe":
            document = {**document, "train": {**document["train"], "lr": 0.5}}
        if trouble == "zero":
            document = {**document, "deepspeed": "ds_configs/zero3.json"}
        if trouble == "saving":
            document = {**document, "checkpoint": {"every": 7}}
        if trouble == "stream":
            document = {**document, "stream": document["stream"][:1]}
        if trouble == "paths":  # these keys may differ between ranks
            document = {
                **document,
                "data": {"cache_dir": "elsewhere"},
                "observe": {**document["observe"], "live": "on"},
            }
    room = cluster_checks.free_host_memory, cluster_checks.free_disk, cluster_checks.run_dscl_plan
    if plan is not None:
        cluster_checks.run_dscl_plan = lambda setup: (plan, "")
    if trouble == "full":
        cluster_checks.free_host_memory = lambda: 1e6 if comm.rank() else 1e12
        cluster_checks.free_disk = lambda folder: 1e4
    lines: list[str] = []
    error_message = ""
    sources, sight, cuda, flock = (
        preflight._checksum_sources,
        cluster_checks.VISIBILITY_TIMEOUT,
        torch.version.cuda,
        fcntl.flock,
    )
    cluster_checks.VISIBILITY_TIMEOUT = 1.0
    try:
        if trouble == "program" and comm.rank() == 1:
            preflight._checksum_sources = lambda: "changed"
        if trouble == "CUDA" and comm.rank() == 1:
            torch.version.cuda = "9.9"
        if trouble == "own locks" and comm.rank() == 1:  # other hosts do not see these locks
            fcntl.flock = lambda file, mode: None
        if trouble == "no locks":
            fcntl.flock = fail_to_lock
        setup = training_run.build_setup(resolve_recipe(document))
        if all_checks:
            preflight.run_checks(setup, lines.append, strict)
        else:
            preflight.require_consistent_ranks(setup)
    except UserError as error:
        error_message = str(error)
    finally:
        os.chdir(before[0])
        time.time, socket.gethostname = before[1:]
        preflight._checksum_sources, cluster_checks.VISIBILITY_TIMEOUT, torch.version.cuda, fcntl.flock = (
            sources,
            sight,
            cuda,
            flock,
        )
        cluster_checks.free_host_memory, cluster_checks.free_disk, cluster_checks.run_dscl_plan = room
    return lines, error_message


def fail_to_lock(file: Any, mode: int) -> None:
    if ".doctor-" in str(getattr(file, "name", "")):  # other files lie on other file systems
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def relative_recipe(folder: Path, run: str) -> dict[str, Any]:
    """A recipe with paths relative to the working directory of a rank."""
    document = recipe_of(folder, run, 2)
    document["run_dir"] = f"runs/{run}"
    document["stream"] = [{**task, "path": task["name"]} for task in document["stream"]]
    return document


def test_like_ranks_agree_and_are_fit(ranks: Any, tasks: Path) -> None:
    results = ranks(2)(run_rank_checks, relative_recipe(tasks, "fit"), [str(tasks)] * 2, "", True)
    for lines, error_message in results:
        assert error_message == ""
        assert all(line.startswith("ok ") for line in lines), lines
    text = "\n".join(results[0][0])
    for subject in (
        "programs",
        "recipe",
        "data and model",
        "clocks",
        "run_dir",
        "free memory",
        "network",
        "matrix products",
        "memory of hosts",
        "disk for checkpoints",
    ):
        assert f"ok   {subject}: " in text
    assert not (tasks / "runs" / "fit").exists()  # the checks leave no files


@pytest.mark.parametrize(
    ("trouble", "expected_message"),
    [
        ("recipe", "recipe: node1 has another train.lr (there: 0.003, given: 0.5)"),
        ("zero", "recipe: node1 has another zero_optimization.stage (there: 2, given: 3)"),
        ("saving", "recipe: node1 has another checkpoint.every (there: 3, given: 7)"),
        ("stream", "recipe: node1 has another stream (there: 2 entries, given: 1 entries); "),
        ("paths", ""),
        ("program", "dscl: 0."),
        ("CUDA", "CUDA: "),
    ],
)
def test_a_rank_with_another_recipe_or_program_is_refused(
    ranks: Any, tasks: Path, trouble: str, expected_message: str
) -> None:
    results = ranks(2)(run_rank_checks, relative_recipe(tasks, "odd"), [str(tasks)] * 2, trouble, False)
    assert results[0][1] == results[1][1]
    assert results[0][1].startswith(expected_message)
    if trouble == "program":
        assert "changed on node1; install the same everywhere" in results[0][1]
    if trouble == "CUDA":
        assert "9.9 on node1; install the same everywhere" in results[0][1]


def test_a_rank_that_reads_other_data_is_refused(ranks: Any, tasks: Path, tmp_path: Path) -> None:
    """One record of one task differs, in the answer."""
    shutil.copytree(tasks, tmp_path / "other")
    path = tmp_path / "other" / "animal" / "train.json"
    records = json.loads(path.read_text())
    records[0]["label"] = "no" if records[0]["label"] != "no" else "yes"
    path.write_text(json.dumps(records))
    places = [str(tasks), str(tmp_path / "other")]
    for _, error_message in ranks(2)(run_rank_checks, relative_recipe(tasks, "data"), places, "", False):
        assert error_message.startswith("data of animal: ")
        assert "on node0; " in error_message
        assert error_message.endswith("on node1; copy the same files everywhere")


def test_wrong_clocks_and_folders_that_are_not_shared_are_named(
    ranks: Any, tasks: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(tasks, tmp_path / "apart")
    places = [str(tasks), str(tmp_path / "apart")]
    (lines, error_message), _ = ranks(2)(
        run_rank_checks, relative_recipe(tasks, "apart"), places, "clock", True, True, plan
    )
    bad = [line for line in lines if line.startswith("BAD")]
    assert len(bad) == 2
    assert bad[0].startswith("BAD  clocks: node0 is 30.")
    assert "node1 is 30." in bad[0]
    assert "node1 does not see what node0 wrote; it has to be a file system that all share" in bad[1]
    assert error_message == "not fit for a run: clocks, run_dir (see above); mend that, or leave these hosts out"


@pytest.mark.parametrize(("trouble", "where"), [("own locks", "node1"), ("no locks", "node0")])
def test_locks_that_do_not_reach_other_hosts_are_told(
    ranks: Any, tasks: Path, plan: dict[str, Any], trouble: str, where: str
) -> None:
    """The doctor calls it unfit; a run, which may be the only one, continues."""
    for strict in (True, False):
        (lines, error_message), _ = ranks(2)(
            run_rank_checks, relative_recipe(tasks, "loose"), [str(tasks)] * 2, trouble, True, strict, plan
        )
        (bad,) = (line for line in lines if line.startswith("BAD"))
        assert bad.startswith("BAD  locks: one in runs/loose does not keep ")
        assert f"{where} out, so a second job there would not be refused; " in bad
        assert error_message == (
            "not fit for a run: locks (see above); mend that, or leave these hosts out" if strict else ""
        )


def test_too_little_room_for_what_is_foreseen_is_told(ranks: Any, tasks: Path, plan: dict[str, Any]) -> None:
    """The doctor calls it unfit; a run only gets a message, and none once it has saved a checkpoint."""
    document = relative_recipe(tasks, "full")
    for strict in (True, False):
        (lines, error_message), _ = ranks(2)(run_rank_checks, document, [str(tasks)] * 2, "full", True, strict, plan)
        bad = [line for line in lines if line.startswith("BAD")]
        assert bad[0].startswith("BAD  memory of hosts: node1 has 1.0 MiB free and needs ")
        assert bad[1].startswith("BAD  disk for checkpoints: run_dir has 0.0 MiB free and needs ")
        assert len(bad) == 2
        assert error_message.startswith("not fit for a run: memory of hosts, disk for checkpoints" if strict else "")
        assert bool(error_message) == strict
    (tasks / "runs" / "full" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (lines, error_message), _ = ranks(2)(run_rank_checks, document, [str(tasks)] * 2, "full", True, False, plan)
    assert error_message == ""
    assert not any(line.startswith("BAD") for line in lines)


def test_ranks_look_at_the_same_though_one_alone_sees_a_checkpoint(
    ranks: Any, tasks: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    """As where run_dir is not shared. A rank with more checks than the others would wait for them."""
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
        for task in ("colour", "animal"):
            (place / task).symlink_to(tasks / task)
    (places[0] / "runs" / "seen" / "checkpoints" / "step-00000003").mkdir(parents=True)
    results = ranks(2)(run_rank_checks, relative_recipe(tasks, "seen"), list(map(str, places)), "", True, False, plan)
    assert not any("memory of hosts" in line for lines, _ in results for line in lines)


def sizes_of_all_reduces() -> set[int]:
    """The numbers of values that the all-reduces of the network check add up."""
    original, sizes = comm.all_reduce_sum, set()

    def adding(tensor: Any) -> Any:
        sizes.add(tensor.numel())
        return original(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "all_reduce_sum", adding)
        cluster_checks.check_network(None)  # type: ignore[arg-type]
    return sizes


def test_the_network_is_measured_by_collectives(ranks: Any) -> None:
    assert ranks(2)(sizes_of_all_reduces) == [{cluster_checks.NETWORK_TEST_NUMEL // 16}] * 2


def test_training_refuses_what_does_not_agree(ranks: Any, tasks: Path) -> None:
    """Also where only the recipe differs, and the data do not."""
    results = ranks(2)(train_with_own_lr, recipe_of(tasks, "refused", 2))
    assert all(message.startswith("recipe: ") and "has another train.lr" in message for message in results)
    assert not (tasks / "refused").exists()


def train_after_checks(document: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """The lines of a run that runs the checks of the doctor first."""
    original, cluster_checks.run_dscl_plan = cluster_checks.run_dscl_plan, lambda setup: (plan, "")
    try:
        return run_listening(document, check_cluster=True)
    finally:
        cluster_checks.run_dscl_plan = original


def test_a_run_that_looks_first_is_shown_what_was_found(ranks: Any, tasks: Path, plan: dict[str, Any]) -> None:
    """As the launch scripts start it; afterwards the run trains."""
    stream = [{"name": "colour", "path": str(tasks / "colour"), "train_limit": 8, "test_limit": 1}]
    for lines in ranks(2)(train_after_checks, recipe_of(tasks, "thorough", 2, stream=stream, train__epochs=1), plan):
        passed_checks = [line for line in lines if line.startswith("ok ")]
        assert any(line.startswith("ok   memory of hosts: ") for line in passed_checks)
        assert any(line.startswith("ok   run_dir: ") for line in passed_checks)
    assert json.loads((tasks / "thorough" / "scores.json").read_text())["complete"]


def train_with_own_lr(document: dict[str, Any]) -> str:
    try:
        training_run.train(resolve_recipe({**document, "train": {**document["train"], "lr": 1e-3 * (1 + comm.rank())}}))
    except UserError as error:
        return str(error)
    return ""
