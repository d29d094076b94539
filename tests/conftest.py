"""What all tests share: `--all`, real data, pools of real ranks, undisturbed runs, and the limits of a test run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import Pool

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TIMES = "DSCL_TESTS_TIMES"  # a file that gets a line for each test
_RUNNING: dict[str, tuple[float, str]] = {}
DEADLINE = "DSCL_TESTS_DEADLINE"  # a time stamp (seconds since the epoch) after which no further test starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the exhaustive cases too (marked `exhaustive`)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "exhaustive: a case of a full grid, a long campaign or a real wait; runs by --all"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the exhaustive cases, unless tests are selected by their ids."""
    if config.getoption("--all") or any("::" in word for word in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the seconds of a test's setup, call and teardown, and write them to the file of TIMES, if there is one."""
    if os.environ.get(TIMES) is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    seconds, outcome = _RUNNING.pop(report.nodeid, (0.0, "passed"))
    outcome = report.outcome if report.outcome != "passed" and outcome != "failed" else outcome
    _RUNNING[report.nodeid] = seconds + report.duration, outcome
    if report.when == "teardown":
        seconds, outcome = _RUNNING.pop(report.nodeid)
        with Path(os.environ[TIMES]).open("a") as file:
            file.write(json.dumps({"test": report.nodeid, "seconds": round(seconds, 2), "outcome": outcome}) + "\n")


def pytest_runtest_logfinish(nodeid: str) -> None:
    deadline = os.environ.get(DEADLINE)
    if deadline and time.time() > float(deadline):
        pytest.exit(f"the tests take too long: the limit was reached at {nodeid}", returncode=1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real task data and a small pretrained model, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the real task data is not there (looked in {SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(2)(function, *arguments)`: run a function on two ranks. Pools are started once and kept."""
    pools: dict[int, Pool] = {}

    def get(world: int) -> Pool:
        if world not in pools or not pools[world].alive:
            pools[world] = Pool(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def undisturbed_run(ranks: Any) -> Callable[..., Path]:
    """`undisturbed_run(recipe, ranks)`: the directory of a complete run of this recipe.

    Tests with the same recipe share one run, in the `run_dir` of the first of them. No test may write into it. `run` is
    the function that runs the recipe.
    """
    from tests.support import runs  # imports torch and DeepSpeed, which not every test needs

    folders: dict[str, Path] = {}

    def get(document: dict[str, Any], world: int = 2, run: Callable[[dict[str, Any]], None] = runs.run) -> Path:
        rest = {name: value for name, value in document.items() if name != "run_dir"}
        key = json.dumps([rest, world, run.__qualname__], sort_keys=True)
        if key not in folders:
            ranks(world)(run, document)
            folders[key] = Path(document["run_dir"])
        return folders[key]

    return get
