"""Ranks that are unlike each other are named with their hosts, before anything is trained; what is odd is told."""

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
    ("values", "said"),
    [
        ([("a", "1"), ("b", "1")], ""),
        ([("a", "1"), ("b", "2"), ("c", "1")], "1 on a, c; 2 on b"),
        ([("a", "1"), ("a", "1"), ("b", "2")], "1 on a; 2 on b"),
    ],
)
def test_who_has_what(values: list[tuple[str, str]], said: str) -> None:
    assert describe_differences(values) == said


def test_a_place_with_far_less_than_the_others_is_odd() -> None:
    values = [("a", 10.0), ("b", 9.0), ("c", 4.4), ("d", 11.0)]
    result = find_outliers("speed", values, "{:.1f}".format, 3)
    assert not result.passed
    assert result.message == "c 4.4, where the median is 9.5"
    assert find_outliers("speed", values[:2] + values[3:], "{:.1f}".format, 3).message == "9.0 and more, median 10.0"
    two = find_outliers("speed", [("a", 10.0), ("b", 1.0)], "{:.1f}".format, 3)  # neither is the odd one
    assert (two.passed, two.message) == (True, "a 10.0, b 1.0")


@pytest.mark.parametrize(
    ("hosts", "slow", "odd"),
    [
        ("abc", 0, {"links between hosts": "c → a 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aaaabbbb", 2, {"links within hosts": "a → a 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aabbcc", 4, {"links between hosts": "b → c 0.52 GB/s, where the median is 5.24 GB/s"}),
        ("aabb", 2, {}),  # two ways between two hosts
    ],
)
def test_a_slow_link_is_named(monkeypatch: pytest.MonkeyPatch, hosts: str, slow: int, odd: dict[str, str]) -> None:
    """Each rank takes 0.8 ms to get 4 MiB from the one before it, and one of them ten times as long."""
    count = len(hosts)
    passed = [8e-3 if rank == slow else 8e-4 for rank in range(count)]
    taken = iter(([1e-3] * count, [1e-3] * count, passed))  # all-reduce, all-to-all, the ring
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(cluster_checks, "best_seconds", lambda work: next(taken))
    monkeypatch.setattr(preflight, "gather_by_host", lambda mine: list(zip(hosts, mine or [None] * count, strict=True)))
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
    """Of the machine 8 GiB are free; the job, within a group of 3 GiB, has used 1.5, of which files can be dropped."""
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
    """What `dscl plan` foresees for the recipe of these tests on two ranks, as the doctor asks for it."""
    document = relative(tasks, "planned")
    (tasks / "planned.yaml").write_text(yaml.safe_dump(document))
    settings = f"deepspeed={Path(document['deepspeed']).absolute()}"
    words = ["plan", "planned.yaml", settings, "--recipe-only", "--json", "--gpus-per-node", "2"]
    out, err = Program(words, cwd=tasks).communicate(timeout=100)
    assert out, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def looked(
    document: dict[str, Any],
    places: list[str],
    trouble: str,
    fully: bool,
    strict: bool = True,
    plan: dict[str, Any] | None = None,
) -> tuple[list[str], str]:
    """What a rank, standing in a place of its own, is shown and told at the end. `plan` is not made anew."""
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
        if trouble == "paths":  # which may well be of its own
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
    shown: list[str] = []
    told = ""
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
        if trouble == "own locks" and comm.rank() == 1:  # which others do not see
            fcntl.flock = lambda file, mode: None
        if trouble == "no locks":
            fcntl.flock = without_locks
        setup = training_run.build_setup(resolve_recipe(document))
        if fully:
            preflight.run_checks(setup, shown.append, strict)
        else:
            preflight.require_consistent_ranks(setup)
    except UserError as error:
        told = str(error)
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
    return shown, told


def without_locks(file: Any, mode: int) -> None:
    if ".doctor-" in str(getattr(file, "name", "")):  # other files lie on other file systems
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def relative(folder: Path, run: str) -> dict[str, Any]:
    """A recipe that names everything from the place where a rank stands."""
    document = recipe_of(folder, run, 2)
    document["run_dir"] = f"runs/{run}"
    document["stream"] = [{**task, "path": task["name"]} for task in document["stream"]]
    return document


def test_like_ranks_agree_and_are_fit(ranks: Any, tasks: Path) -> None:
    results = ranks(2)(looked, relative(tasks, "fit"), [str(tasks)] * 2, "", True)
    for shown, told in results:
        assert told == ""
        assert all(line.startswith("ok ") for line in shown), shown
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
    assert not (tasks / "runs" / "fit").exists()  # it leaves nothing behind


@pytest.mark.parametrize(
    ("trouble", "said"),
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
def test_a_rank_with_another_recipe_or_program_is_refused(ranks: Any, tasks: Path, trouble: str, said: str) -> None:
    results = ranks(2)(looked, relative(tasks, "odd"), [str(tasks)] * 2, trouble, False)
    assert results[0][1] == results[1][1]
    assert results[0][1].startswith(said)
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
    for _, told in ranks(2)(looked, relative(tasks, "data"), places, "", False):
        assert told.startswith("data of animal: ")
        assert "on node0; " in told
        assert told.endswith("on node1; copy the same files everywhere")


def test_wrong_clocks_and_folders_that_are_not_shared_are_named(
    ranks: Any, tasks: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(tasks, tmp_path / "apart")
    places = [str(tasks), str(tmp_path / "apart")]
    (shown, told), _ = ranks(2)(looked, relative(tasks, "apart"), places, "clock", True, True, plan)
    bad = [line for line in shown if line.startswith("BAD")]
    assert len(bad) == 2
    assert bad[0].startswith("BAD  clocks: node0 is 30.")
    assert "node1 is 30." in bad[0]
    assert "node1 does not see what node0 wrote; it has to be a file system that all share" in bad[1]
    assert told == "not fit for a run: clocks, run_dir (see above); mend that, or leave these hosts out"


@pytest.mark.parametrize(("trouble", "where"), [("own locks", "node1"), ("no locks", "node0")])
def test_locks_that_do_not_reach_other_hosts_are_told(
    ranks: Any, tasks: Path, plan: dict[str, Any], trouble: str, where: str
) -> None:
    """A doctor calls it unfit; a run that is the only one there goes on."""
    for strict in (True, False):
        (shown, told), _ = ranks(2)(looked, relative(tasks, "loose"), [str(tasks)] * 2, trouble, True, strict, plan)
        (bad,) = (line for line in shown if line.startswith("BAD"))
        assert bad.startswith("BAD  locks: one in runs/loose does not keep ")
        assert f"{where} out, so a second job there would not be refused; " in bad
        assert told == ("not fit for a run: locks (see above); mend that, or leave these hosts out" if strict else "")


def test_too_little_room_for_what_is_foreseen_is_told(ranks: Any, tasks: Path, plan: dict[str, Any]) -> None:
    """A doctor calls it unfit; a run that may yet find room is only told, and not again once it has saved."""
    document = relative(tasks, "full")
    for strict in (True, False):
        (shown, told), _ = ranks(2)(looked, document, [str(tasks)] * 2, "full", True, strict, plan)
        bad = [line for line in shown if line.startswith("BAD")]
        assert bad[0].startswith("BAD  memory of hosts: node1 has 1.0 MiB free and needs ")
        assert bad[1].startswith("BAD  disk for checkpoints: run_dir has 0.0 MiB free and needs ")
        assert len(bad) == 2
        assert told.startswith("not fit for a run: memory of hosts, disk for checkpoints" if strict else "")
        assert bool(told) == strict
    (tasks / "runs" / "full" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (shown, told), _ = ranks(2)(looked, document, [str(tasks)] * 2, "full", True, False, plan)
    assert told == ""
    assert not any(line.startswith("BAD") for line in shown)


def test_ranks_look_at_the_same_though_one_alone_sees_a_checkpoint(
    ranks: Any, tasks: Path, plan: dict[str, Any], tmp_path: Path
) -> None:
    """As where run_dir is not shared. A rank that looked at more than the others would wait for them."""
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
        for task in ("colour", "animal"):
            (place / task).symlink_to(tasks / task)
    (places[0] / "runs" / "seen" / "checkpoints" / "step-00000003").mkdir(parents=True)
    results = ranks(2)(looked, relative(tasks, "seen"), list(map(str, places)), "", True, False, plan)
    assert not any("memory of hosts" in line for shown, _ in results for line in shown)


def summed_by_the_network_test() -> set[int]:
    """How many values each all-reduce adds up."""
    original, sizes = comm.all_reduce_sum, set()

    def adding(tensor: Any) -> Any:
        sizes.add(tensor.numel())
        return original(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "all_reduce_sum", adding)
        cluster_checks.check_network(None)  # type: ignore[arg-type]
    return sizes


def test_the_network_is_measured_by_collectives(ranks: Any) -> None:
    assert ranks(2)(summed_by_the_network_test) == [{cluster_checks.NETWORK_TEST_NUMEL // 16}] * 2


def test_training_refuses_what_does_not_agree(ranks: Any, tasks: Path) -> None:
    """Also where the recipe alone differs, and no data by it."""
    results = ranks(2)(trained, recipe_of(tasks, "refused", 2))
    assert all(told.startswith("recipe: ") and "has another train.lr" in told for told in results)
    assert not (tasks / "refused").exists()


def thorough(document: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """What a run that looks first is told by the doctor."""
    original, cluster_checks.run_dscl_plan = cluster_checks.run_dscl_plan, lambda setup: (plan, "")
    try:
        return run_listening(document, check_cluster=True)
    finally:
        cluster_checks.run_dscl_plan = original


def test_a_run_that_looks_first_is_shown_what_was_found(ranks: Any, tasks: Path, plan: dict[str, Any]) -> None:
    """As the launch scripts ask for it; and it trains then."""
    stream = [{"name": "colour", "path": str(tasks / "colour"), "train_limit": 8, "test_limit": 1}]
    for lines in ranks(2)(thorough, recipe_of(tasks, "thorough", 2, stream=stream, train__epochs=1), plan):
        found = [line for line in lines if line.startswith("ok ")]
        assert any(line.startswith("ok   memory of hosts: ") for line in found)
        assert any(line.startswith("ok   run_dir: ") for line in found)
    assert json.loads((tasks / "thorough" / "scores.json").read_text())["complete"]


def trained(document: dict[str, Any]) -> str:
    try:
        training_run.train(resolve_recipe({**document, "train": {**document["train"], "lr": 1e-3 * (1 + comm.rank())}}))
    except UserError as error:
        return str(error)
    return ""
