"""The launch scripts on two and three hosts with addresses of their own: they train, stop and outlive a death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import REPOSITORY, Hosts, Unavailable
from tests.support.runs import run_outcome, recipe_of, run, reference_recipe, write_tasks


def first(*scripts: str) -> pytest.MarkDecorator:
    """A test that runs with the first of these scripts; with the others it is exhaustive."""
    rest = [pytest.param(script, marks=pytest.mark.exhaustive) for script in scripts[1:]]
    return pytest.mark.parametrize("script", [scripts[0], *rest])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts(3)
    except Unavailable as why:
        pytest.skip(str(why))
    yield made
    made.close()


def launched(
    hosts: Hosts, script: str, count: int, document: dict[str, Any], folder: Path, *options: str, **environment: str
) -> list[subprocess.Popen[str]]:
    """The script on each of the first hosts, as an administrator would give it there."""
    path = folder / f"{Path(document['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(document))
    hostfile = folder / f"hostfile{count}"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses[:count]))
    return [
        hosts.start(
            number,
            [str(REPOSITORY / "launch" / script), str(path), *options],
            NNODES=str(count),
            NODE_RANK=str(number),
            MASTER_ADDR=hosts.addresses[0],
            LOCAL_ADDR=hosts.addresses[number],
            HOSTFILE=str(hostfile),
            **environment,
        )
        for number in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]], statuses: list[int]) -> list[str]:
    """What each said; all ended as they should."""
    deadline = time.monotonic() + 240
    said = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    assert [process.returncode for process in processes] == statuses, "\n----\n".join(said)
    return said


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_together(hosts: Hosts, tasks: Path, script: str, count: int) -> None:
    name = f"{script}{count}"
    said = ended(launched(hosts, script, count, recipe_of(tasks, name, 3), tasks), [0] * count)
    assert "OP" in said[0]
    assert json.loads((tasks / name / "scores.json").read_text())["complete"]
    state = next((tasks / name / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["world"] == count


@pytest.mark.parametrize(
    ("script", "next_start"),
    [
        ("deepspeed.sh", "ranks"),
        pytest.param("deepspeed.sh", "script", marks=pytest.mark.exhaustive),
        pytest.param("torchrun.sh", "script", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_on_one_host_stops_all_of_them(
    hosts: Hosts, ranks: Any, undisturbed: Any, tasks: Path, script: str, next_start: str
) -> None:
    """To its script, as a scheduler does it. All end with status 75, nobody waits, and the next start goes on."""
    changes: dict[str, Any] = {"train__epochs": 4, "checkpoint__every": 1000}
    calm = undisturbed(*reference_recipe(tasks, 2, **changes))
    told = recipe_of(tasks, f"{script} {next_start} told", 2, **changes)
    processes = launched(hosts, script, 2, told, tasks, "--no-doctor")
    wait_for_steps(Path(told["run_dir"]), 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    said = ended(processes, [75, 75])
    assert time.monotonic() - start < 60
    assert any("with everything saved" in text or "everything was saved" in text for text in said)
    if next_start == "script":
        ended(launched(hosts, script, 2, told, tasks), [0, 0])
    else:
        ranks(2)(run, told)
    assert run_outcome(Path(told["run_dir"])) == run_outcome(calm)


@first("torchrun.sh", "deepspeed.sh")
def test_a_dead_rank_is_named_and_all_start_again(hosts: Hosts, undisturbed: Any, tasks: Path, script: str) -> None:
    """SIGKILL to a rank: those on the other host say which, all are started again, from the newest checkpoint."""
    changes: dict[str, Any] = {"train__epochs": 2, "checkpoint__every": 3}
    alive = undisturbed(*reference_recipe(tasks, 3, **changes))
    dead = recipe_of(tasks, f"{script} dead", 3, **changes)
    processes = launched(hosts, script, 2, dead, tasks, "--no-doctor", MAX_RESTARTS="1")
    wait_for_steps(Path(dead["run_dir"]), 8, processes)
    (rank,) = ranks_below(processes[1].pid)
    os.kill(rank, signal.SIGKILL)
    said = ended(processes, [0, 0])
    assert "dscl: rank 1 on " in said[0]
    assert "is dead (its process ended without a word)" in said[0]
    assert "resumed from step-" in said[0]
    assert "OP" in said[0]
    assert run_outcome(Path(dead["run_dir"])) == run_outcome(alive)
    state = next((Path(dead["run_dir"]) / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["world"] == 2


@pytest.mark.exhaustive
def test_a_host_that_is_cut_off_counts_as_dead(hosts: Hosts, tasks: Path) -> None:
    """No connection breaks, nothing comes any more: after the time given both sides leave."""
    document = recipe_of(tasks, "cut", 1, train__epochs=60, checkpoint__every=5)
    processes = launched(hosts, "torchrun.sh", 2, document, tasks, MAX_RESTARTS="0", DSCL_DEAD_AFTER="5")
    wait_for_steps(Path(document["run_dir"]), 6, processes)
    hosts.cut(1)
    try:
        start = time.monotonic()
        said = processes[0].communicate(timeout=120)[0]
        assert time.monotonic() - start < 60
        assert processes[0].returncode == 1, said
        assert "dscl: rank 1 on " in said
        assert "is silent for more than 5 s (see DSCL_DEAD_AFTER)" in said
        while ranks_below(processes[1].pid):  # torchrun itself goes on trying to reach the other host
            assert time.monotonic() - start < 60
            time.sleep(0.2)
    finally:
        hosts.cut(1, up=True)


@first("torchrun.sh", "deepspeed.sh")
def test_a_wrong_recipe_is_told_and_not_tried_again(hosts: Hosts, tasks: Path, script: str) -> None:
    document = recipe_of(tasks, f"{script} wrong", 2, train__lr=-1.0)
    said = ended(launched(hosts, script, 2, document, tasks), [2, 2])
    for text in said:
        assert text.count("dscl: train.lr: given -1.0") == 1, text


def wait_for_steps(run: Path, count: int, processes: list[subprocess.Popen[str]]) -> None:
    lines = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not lines.exists() or len(lines.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_below(pid: int) -> list[int]:
    """The processes that train, of all that descend from this one."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        try:
            if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{one}/environ").read_bytes():
                found.append(one)
            else:
                todo += [
                    int(c) for t in Path(f"/proc/{one}/task").iterdir() for c in (t / "children").read_text().split()
                ]
        except OSError:
            continue
    return found
