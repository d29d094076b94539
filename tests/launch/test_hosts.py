"""The launch scripts on two and three simulated hosts: they train, stop, and restart after the death of a rank."""

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
from tests.support.runs import recipe_of, reference_recipe, run, run_outcome, write_tasks


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
        hosts = Hosts(3)
    except Unavailable as why:
        pytest.skip(str(why))
    yield hosts
    hosts.close()


def launch_on_hosts(
    hosts: Hosts, script: str, count: int, document: dict[str, Any], folder: Path, *options: str, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start the launch script on each of the first hosts, as an administrator would."""
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


def wait_and_check_statuses(processes: list[subprocess.Popen[str]], statuses: list[int]) -> list[str]:
    """Wait for all processes and check their exit statuses; the output of each."""
    deadline = time.monotonic() + 240
    outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    assert [process.returncode for process in processes] == statuses, "\n----\n".join(outputs)
    return outputs


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("count", [2, 3])
def test_hosts_train_together(hosts: Hosts, tasks: Path, script: str, count: int) -> None:
    name = f"{script}{count}"
    outputs = wait_and_check_statuses(
        launch_on_hosts(hosts, script, count, recipe_of(tasks, name, 3), tasks), [0] * count
    )
    assert "OP" in outputs[0]
    assert json.loads((tasks / name / "scores.json").read_text())["complete"]
    state = next((tasks / name / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["world_size"] == count


@pytest.mark.parametrize(
    ("script", "next_start"),
    [
        ("deepspeed.sh", "ranks"),
        pytest.param("deepspeed.sh", "script", marks=pytest.mark.exhaustive),
        pytest.param("torchrun.sh", "script", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_on_one_host_stops_all_of_them(
    hosts: Hosts, ranks: Any, undisturbed_run: Any, tasks: Path, script: str, next_start: str
) -> None:
    """The signal goes to the script, as from a scheduler. All hosts end with status 75 in time, and the next start
    resumes."""
    changes: dict[str, Any] = {"train__epochs": 4, "checkpoint__every": 1000}
    expected = undisturbed_run(*reference_recipe(tasks, 2, **changes))
    document = recipe_of(tasks, f"{script} {next_start} told", 2, **changes)
    processes = launch_on_hosts(hosts, script, 2, document, tasks, "--no-doctor")
    wait_for_steps(Path(document["run_dir"]), 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    outputs = wait_and_check_statuses(processes, [75, 75])
    assert time.monotonic() - start < 60
    assert any("with everything saved" in text or "everything was saved" in text for text in outputs)
    if next_start == "script":
        wait_and_check_statuses(launch_on_hosts(hosts, script, 2, document, tasks), [0, 0])
    else:
        ranks(2)(run, document)
    assert run_outcome(Path(document["run_dir"])) == run_outcome(expected)


@first("torchrun.sh", "deepspeed.sh")
def test_a_dead_rank_is_named_and_all_start_again(hosts: Hosts, undisturbed_run: Any, tasks: Path, script: str) -> None:
    """After SIGKILL to a rank, the other host names it, and all ranks restart from the newest checkpoint."""
    changes: dict[str, Any] = {"train__epochs": 2, "checkpoint__every": 3}
    expected = undisturbed_run(*reference_recipe(tasks, 3, **changes))
    document = recipe_of(tasks, f"{script} dead", 3, **changes)
    processes = launch_on_hosts(hosts, script, 2, document, tasks, "--no-doctor", MAX_RESTARTS="1")
    wait_for_steps(Path(document["run_dir"]), 8, processes)
    (rank,) = find_ranks(processes[1].pid)
    os.kill(rank, signal.SIGKILL)
    outputs = wait_and_check_statuses(processes, [0, 0])
    assert "dscl: rank 1 on " in outputs[0]
    assert "is dead (its process ended without a word)" in outputs[0]
    assert "resumed from step-" in outputs[0]
    assert "OP" in outputs[0]
    assert run_outcome(Path(document["run_dir"])) == run_outcome(expected)
    state = next((Path(document["run_dir"]) / "checkpoints").iterdir()) / "state.json"
    assert json.loads(state.read_text())["world_size"] == 2


@pytest.mark.exhaustive
def test_a_host_that_is_cut_off_counts_as_dead(hosts: Hosts, tasks: Path) -> None:
    """No connection breaks, but no message arrives. After the timeout both sides exit."""
    document = recipe_of(tasks, "cut", 1, train__epochs=60, checkpoint__every=5)
    processes = launch_on_hosts(hosts, "torchrun.sh", 2, document, tasks, MAX_RESTARTS="0", DSCL_DEAD_AFTER="5")
    wait_for_steps(Path(document["run_dir"]), 6, processes)
    hosts.set_link(1, up=False)
    try:
        start = time.monotonic()
        output = processes[0].communicate(timeout=120)[0]
        assert time.monotonic() - start < 60
        assert processes[0].returncode == 1, output
        assert "dscl: rank 1 on " in output
        assert "is silent for more than 5 s (see DSCL_DEAD_AFTER)" in output
        while find_ranks(processes[1].pid):  # torchrun itself goes on trying to reach the other host
            assert time.monotonic() - start < 60
            time.sleep(0.2)
    finally:
        hosts.set_link(1, up=True)


@first("torchrun.sh", "deepspeed.sh")
def test_a_wrong_recipe_is_told_and_not_tried_again(hosts: Hosts, tasks: Path, script: str) -> None:
    document = recipe_of(tasks, f"{script} wrong", 2, train__lr=-1.0)
    outputs = wait_and_check_statuses(launch_on_hosts(hosts, script, 2, document, tasks), [2, 2])
    for text in outputs:
        assert text.count("dscl: train.lr: given -1.0") == 1, text


def wait_for_steps(run: Path, count: int, processes: list[subprocess.Popen[str]]) -> None:
    lines = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not lines.exists() or len(lines.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def find_ranks(pid: int) -> list[int]:
    """The process ids of the ranks among the descendants of a process."""
    ranks, pids = [], [pid]
    while pids:
        candidate = pids.pop()
        try:
            if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{candidate}/environ").read_bytes():
                ranks.append(candidate)
            else:
                pids += [
                    int(c)
                    for t in Path(f"/proc/{candidate}/task").iterdir()
                    for c in (t / "children").read_text().split()
                ]
        except OSError:
            continue
    return ranks
