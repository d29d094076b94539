"""The list of breakages matches the code, and tools/mutants.py judges a project of a few lines correctly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutants

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "dscl/__init__.py": "",
    "dscl/sums.py": '"""Sums."""\n\n\ndef add(a, b):\n    return a + b\n\n\ndef less(a, b):\n    return a - b\n',
    "tests/test_sums.py": "from dscl.sums import add, less\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
    "def test_less():\n    assert less(2, 0) == 2\n",
    "tools/breakages.py": """
from collections import namedtuple
Breakage = namedtuple("Breakage", "file before after harm tests")
BREAKAGES = (
    Breakage("dscl/sums.py", "a + b", "a * b", "sums are products", ("tests/test_sums.py::test_add",)),
    Breakage("dscl/sums.py", "a - b", "a + b", "differences are sums", ("tests/test_sums.py::test_less",)),
)
TESTS_OF = {"dscl/": ("tests/test_sums.py",)}
HARMLESS = {}
""",
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\naddopts = "--import-mode=importlib"\n'
    'markers = ["exhaustive"]\n',
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def start(root: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tools" / "mutants.py"), "--root", str(root), "--preload", "", *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.returncode, process.stdout + process.stderr


def test_the_list_fits_the_code() -> None:
    assert mutants.find_problems(ROOT, mutants.load_breakages(ROOT), 100, 0) == []


def test_a_breakage_that_its_tests_miss_survives_and_nothing_is_tried_twice(project: Path) -> None:
    status, output = start(project)
    assert status == 1, output
    assert "1 of 2  caught" in output
    assert "2 of 2  SURVIVED" in output
    assert "1 of 2 caught, 1 survived, 0 not judged" in output
    assert "dscl/sums.py:9: differences are sums" in output.splitlines()[-1]
    records = (project / "out/mutants.jsonl").read_text().splitlines()
    assert [json.loads(line)["verdict"] for line in records] == ["caught", "caught", "caught", "SURVIVED"]
    assert json.loads(records[1])["reason"] == "tests/test_sums.py::test_add"
    with open(project / "out/mutants.jsonl", "a") as file:
        file.write('{"key": ')  # as a killed process leaves it
    second_status, output = start(project)
    assert second_status == 1
    assert output.count("(judged before)") == 2
    assert (project / "dscl/sums.py").read_text() == FILES["dscl/sums.py"]


def test_tests_that_fail_by_themselves_catch_nothing(project: Path) -> None:
    test = project / "tests/test_sums.py"
    test.write_text(test.read_text().replace("== 5", "== 6"))
    status, output = start(project, "--only", "products")
    assert status == 2, output
    assert "test_add does not pass without the breakage" in output


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("dscl/sums.py", "a + b", "b + a", "its words occur 0 times in the file instead of once"),
        ("dscl/sums.py", "a - b", "(a - b) or (a - b)", "its words occur 2 times in the file instead of once"),
        ("tests/test_sums.py", "test_less", "test_fewer", "there is no test tests/test_sums.py::test_less"),
        ("tools/breakages.py", '"a * b"', '"a +"', "changes nothing, or is no Python"),
        ("tools/breakages.py", '"a * b"', '"a + b"', "changes nothing, or is no Python"),
        ("tools/breakages.py", '("tests/test_sums.py::test_add",)', "()", "names no test that should notice it"),
        ("tools/breakages.py", "HARMLESS = {}", 'HARMLESS = {"0": "no reason"}', "HARMLESS: 0 is none of the 100"),
        ("tools/breakages.py", '"dscl/":', '"dscl/other":', "TESTS_OF: names no tests of dscl/sums.py"),
        ("dscl/__init__.py", "", "__version__ = 1\n", "dscl/__init__.py: no breakage is listed"),
    ],
)
def test_what_is_out_of_date_is_told(project: Path, file: str, before: str, after: str, message: str) -> None:
    path = project / file
    path.write_text(path.read_text().replace(before, after) if before else after)
    mutants._tests_in.cache_clear()
    problems = mutants.find_problems(project, mutants.load_breakages(project), 100, 0)
    assert any(message in problem for problem in problems), problems


def test_check_needs_no_test_run_and_ends_with_its_status(project: Path) -> None:
    assert start(project, "--check") == (0, "2 breakages, 0 problems\n")
    (project / "dscl/sums.py").write_text("")
    assert start(project, "--check")[0] == 1


SOURCE = '''
"""1 == 1 in a docstring is no place."""
if TYPE_CHECKING:
    kept = not there


class Thing:
    size: int = 3

    def grow(self, by: "int > 0" = 2) -> None:
        """Neither is this: a and b."""
        if by not in self.known and not (by < 0.5):
            raise ValueError(f"{by} is not known, give at most {1 + 1}")
        self.total = comm.all_reduce_sum(self.total)
        log.warning("more than %d", 4)
'''


def test_places_are_what_a_run_comes_by() -> None:
    source = SOURCE.encode()
    sites = {
        (kind, source[start:stop].decode(), after) for kind, start, stop, after in mutants.MutationSites(source).sites
    }
    assert sites == {
        ("moved", "3", "4"),
        ("moved", "2", "3"),
        ("moved", "0.5", "1.5"),
        ("turned", "not in", "in"),
        ("turned", "and", "or"),
        ("turned", "<", ">="),
        ("turned", "not (by < 0.5)", "(by < 0.5)"),
        ("dropped", "self.total = comm.all_reduce_sum(self.total)", "pass"),
        ("without the other ranks", "comm.all_reduce_sum(self.total)", "(self.total)"),
    }


def test_what_is_drawn_stays_until_its_line_changes(project: Path) -> None:
    path = project / "dscl/sums.py"
    path.write_text("def over(a):\n    if a > 1:\n        a = a and 2\n    return a == 3\n")
    table = {"dscl/": ("tests/test_sums.py",)}
    first = {mutant.name: mutant.harm for mutant in mutants.random_mutants(project, table, 1000, 0)}
    assert len(first) == 7
    path.write_text("# a comment above\n" + path.read_text().replace("a == 3", "a != 3"))
    second = {mutant.name: mutant.harm for mutant in mutants.random_mutants(project, table, 1000, 0)}
    changed = {name for name, harm in first.items() if "==" in harm or "3 →" in harm}
    assert set(first) - set(second) == changed
    assert len(changed) == 2
    assert not set(first) & {mutant.name for mutant in mutants.random_mutants(project, table, 1000, 1)}
