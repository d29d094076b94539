"""The numbers in a report's tables, compared with values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dscl.reporting.averages import MeanStd, mean_and_std, mean_matrix, smooth_curve
from dscl.reporting.published import FIFTEEN, FOUR, TRACE, find_published_tables
from dscl.reporting.report import collect_report
from dscl.reporting.tables import Table, format_bytes, format_published_table, result_tables, table_notes
from tests.reporting.example_runs import write_run


def build_tables(*folders: Path) -> list[Table]:
    (group,) = collect_report(folders).groups
    return result_tables(group)


def test_means_and_deviations() -> None:
    mean_std = mean_and_std([0.5, 0.6, 1.0])
    assert mean_std is not None
    assert mean_std.mean == pytest.approx(0.7)
    assert mean_std.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert mean_and_std([0.5]) == MeanStd(0.5, None)
    assert mean_and_std([0.5, None]) is None
    assert mean_and_std([]) is None
    assert mean_matrix([[(0.0, None), (0.5, 1.0)], [(1.0, None), (0.0, None)]]) == [(0.5, None), (0.25, None)]


def test_smoothed_curve_keeps_mean_and_range() -> None:
    assert smooth_curve([1.0, 3.0, 5.0, 7.0], 2) == [(1.5, 2.0), (3.5, 6.0)]
    assert smooth_curve([1.0, 2.0], 10) == [(1.0, 1.0), (2.0, 2.0)]
    assert smooth_curve([], 10) == []
    values = [float(i) for i in range(1007)]
    assert len(smooth_curve(values, 100)) == 100


def test_row_shows_the_mean_over_seeds(tmp_path: Path) -> None:
    first = write_run(
        tmp_path / "a",
        scores=((0.8, 0.1), (0.6, 0.9)),
        zero_shot=(0.0, 0.05),
        heldout=[3.0, 3.5, 4.0],
        numbers={"capacity_bytes": 1024.0, "peak_memory_bytes": 3 * 2**30, "trainable_parameters": 2e6},
    )
    second = write_run(
        tmp_path / "b",
        "seed=7",
        scores=((0.8, 0.2), (0.8, 0.9)),
        zero_shot=(0.0, 0.05),
        heldout=[3.0, 3.5, 4.2],
        steps=4,
        numbers={"capacity_bytes": 3072.0, "peak_memory_bytes": 1 * 2**30, "trainable_parameters": 2e6},
    )
    scores, costs = build_tables(first, second)
    # OP 0.75 and 0.85, BWT -0.2 and 0.0, FWT 0.05 and 0.15; of two values the deviation is their distance / √2
    assert dict(zip(scores.head, scores.rows[0], strict=True)) == {
        "method": "sequential",
        "seeds": "2 (0, 7)",
        "OP": "0.800 ± 0.071",
        "BWT": "-0.100 ± 0.141",
        "FWT": "0.100 ± 0.071",
        "forgetting": "0.100 ± 0.141",
        "held-out loss": "3.000 → 4.100 ± 0.141",
    }
    assert dict(zip(costs.head, costs.rows[0], strict=True)) == {
        "method": "sequential",
        "tokens": "60",
        "training": "6s",
        "peak memory": "2.0 GiB",
        "trainable": "2.0M",
        "stored": "2.0 KiB",
    }


def test_missing_values_are_dashes_and_bwt_is_not_clipped(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(i), f"seed={i}", scores=((0.2, None), (0.6, 0.9))) for i in range(2)]
    scores, _ = build_tables(*folders)
    assert scores.rows == (("sequential", "2 (0, 1)", "0.750 ± 0.000", "0.400 ± 0.000", "-", "-0.400 ± 0.000"),)
    (folders[0] / "metrics.jsonl").unlink()
    assert [table.head[1] for table in build_tables(*folders)] == ["seeds"]


def test_damaged_and_unfinished_runs_are_excluded_with_a_note(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", "seed=1")
    (bad / "scores.json").write_text((bad / "scores.json").read_text().replace("0.9", "NaN"))
    half = write_run(tmp_path / "half", "seed=2", scores=((0.8, None),))
    report = collect_report([tmp_path])
    (group,) = report.groups
    ((label, seeds, op, *_),) = result_tables(group)[0].rows
    assert (label, seeds, op) == ("sequential", "1 (0)", "0.750")
    assert table_notes(group) == [
        f"{bad}, sequential, seed 1: the score of two after two is nan; not averaged",
        f"{half}, sequential, seed 2: unfinished: 1 of 2 tasks scored, 2 steps done, the last of one; not averaged",
    ]
    (good / "recipe.yaml").write_text("")
    report = collect_report([tmp_path])
    assert [run.folder for run in report.unread] == [good]
    assert result_tables(report.groups[0])[0].rows[0][1:3] == ("none finished", "-")


def test_format_bytes() -> None:
    assert [format_bytes(count) for count in (0, 1023, 1024, 3.5 * 2**20, 2.0**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.5 MiB",
        "1.0 GiB",
    ]


def test_published_results_need_exactly_their_benchmark() -> None:
    assert len(find_published_tables(TRACE)) == 2
    assert len(find_published_tables([name.lower().replace("-", "_") for name in reversed(TRACE)])) == 2
    assert len(find_published_tables(FOUR)) == 1
    assert [
        table.results[0][1]
        for table in find_published_tables(["BoolQA" if name == "boolq" else name for name in FIFTEEN])
    ] == [7.4]
    assert format_published_table(find_published_tables(TRACE)[0]).rows[0] == (
        "SeqFT",
        "0.4763",
        "-0.1145",
    )  # 47.63 and -11.45 percent
    assert find_published_tables(TRACE[:7]) == []
    assert find_published_tables([*TRACE, "more"]) == []
