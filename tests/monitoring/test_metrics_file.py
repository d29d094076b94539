"""A run that was killed and resumed leaves the same metrics file as an undisturbed run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dscl.monitoring.metrics_file import MetricsFile
from dscl.utils.errors import ExternalFailure


def record(step: int) -> dict:
    return {"step": step, "task": "agñews", "loss": 1.0 / step, "lr": 1e-4, "tokens": 64 * step}


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("killed_after", "resumed_from"), [(7, 7), (7, 4), (7, 0), (12, 10)])
@pytest.mark.parametrize("torn", [0, 1, 20])
def test_a_resumed_run_writes_the_same_bytes(tmp_path: Path, killed_after: int, resumed_from: int, torn: int) -> None:
    undisturbed = MetricsFile(tmp_path / "whole.jsonl")
    undisturbed.write(record(s) for s in range(1, 13))
    undisturbed.close()

    killed = MetricsFile(tmp_path / "killed.jsonl")
    for step in range(1, killed_after + 1):
        killed.write([record(step)])
    with open(killed.path, "ab") as file:
        file.write(json.dumps(record(killed_after + 1)).encode()[:torn])

    resumed = MetricsFile(killed.path)
    resumed.truncate_after(resumed_from)
    assert steps_of(killed.path) == list(range(1, resumed_from + 1))
    resumed.write(record(s) for s in range(resumed_from + 1, 13))
    resumed.close()
    assert resumed.path.read_bytes() == undisturbed.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_a_last_line_without_its_end_is_dropped_even_if_it_reads_well(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write([record(1), record(2)])
    file.path.write_bytes(file.path.read_bytes()[:-1])
    file.truncate_after(5)
    assert steps_of(file.path) == [1]


def test_what_comes_after_the_last_record_joins_it(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.add_to_last_record({"seconds": 1.0})
    assert not file.path.exists(), "there is no record yet"
    file.write([record(1), record(2)])
    file.add_to_last_record({"seconds": 1.0})
    file.truncate_after(5)
    file.add_to_last_record({"seconds": 2.0, "others": 0.5})
    file.write([record(3)])
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert records == [record(1), {**record(2), "seconds": 3.0, "others": 0.5}, record(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_records_are_readable_by_others_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "deep" / "m.jsonl")
    file.truncate_after(0)
    file.write([record(1)])
    file.write([record(2), record(3)])
    assert steps_of(file.path) == [1, 2, 3]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write([{"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5}])
    assert json.loads(file.path.read_text()) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for content in ('{"step": 1}\nnotes\n{"step": 2}\n', '{"step": 1}\n{"loss": 2}\n', "[1]\n"):
        path.write_text(content)
        with pytest.raises(ExternalFailure, match=r"m\.jsonl, line \d: not a record"):
            MetricsFile(path).truncate_after(1)
        assert path.read_text() == content


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExternalFailure, match="cannot be written"):
        MetricsFile(tmp_path / "file" / "m.jsonl").write([record(1)])
    if Path("/dev/full").exists():
        with pytest.raises(ExternalFailure, match="No space left"):
            MetricsFile(Path("/dev/full")).write([record(1)])
