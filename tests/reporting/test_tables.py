"""The numbers of a report, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dscl.reporting.averages import Figure, figure, mean_rows, smooth
from dscl.reporting.published import FIFTEEN, FOUR, TRACE, published
from dscl.reporting.report import read
from dscl.reporting.tables import Table, notes, published_table, results, size
from tests.reporting.made import run


def tables_of(*folders: Path) -> list[Table]:
    (group,) = read(folders).groups
    return results(group)


def test_means_and_deviations() -> None:
    found = figure([0.5, 0.6, 1.0])
    assert found is not None
    assert found.mean == pytest.approx(0.7)
    assert found.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert figure([0.5]) == Figure(0.5, None)
    assert figure([0.5, None]) is None
    assert figure([]) is None
    assert mean_rows([[(0.0, None), (0.5, 1.0)], [(1.0, None), (0.0, None)]]) == [(0.5, None), (0.25, None)]


def test_a_curve_keeps_its_mean_and_its_length() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [(1.5, 2.0), (3.5, 6.0)]
    assert smooth([1.0, 2.0], 10) == [(1.0, 1.0), (2.0, 2.0)]
    assert smooth([], 10) == []
    values = [float(i) for i in range(1007)]
    assert len(smooth(values, 100)) == 100


def test_a_row_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    first = run(
        tmp_path / "a",
        scores=((0.8, 0.1), (0.6, 0.9)),
        before=(0.0, 0.05),
        heldout=[3.0, 3.5, 4.0],
        numbers={"capacity_bytes": 1024.0, "peak_memory_bytes": 3 * 2**30, "trainable_parameters": 2e6},
    )
    second = run(
        tmp_path / "b",
        "seed=7",
        scores=((0.8, 0.2), (0.8, 0.9)),
        before=(0.0, 0.05),
        heldout=[3.0, 3.5, 4.2],
        steps=4,
        numbers={"capacity_bytes": 3072.0, "peak_memory_bytes": 1 * 2**30, "trainable_parameters": 2e6},
    )
    scores, costs = tables_of(first, second)
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


def test_what_was_not_measured_is_a_dash_and_bwt_is_not_clipped(tmp_path: Path) -> None:
    folders = [run(tmp_path / str(i), f"seed={i}", scores=((0.2, None), (0.6, 0.9))) for i in range(2)]
    scores, _ = tables_of(*folders)
    assert scores.rows == (("sequential", "2 (0, 1)", "0.750 ± 0.000", "0.400 ± 0.000", "-", "-0.400 ± 0.000"),)
    (folders[0] / "metrics.jsonl").unlink()
    assert [table.head[1] for table in tables_of(*folders)] == ["seeds"]


def test_what_is_wrong_is_not_averaged_but_told(tmp_path: Path) -> None:
    good = run(tmp_path / "good")
    bad = run(tmp_path / "bad", "seed=1")
    (bad / "scores.json").write_text((bad / "scores.json").read_text().replace("0.9", "NaN"))
    half = run(tmp_path / "half", "seed=2", scores=((0.8, None),))
    report = read([tmp_path])
    (group,) = report.groups
    ((label, seeds, op, *_),) = results(group)[0].rows
    assert (label, seeds, op) == ("sequential", "1 (0)", "0.750")
    assert notes(group) == [
        f"{bad}, sequential, seed 1: the score of two after two is nan; not averaged",
        f"{half}, sequential, seed 2: unfinished: 1 of 2 tasks scored, 2 steps done, the last of one; not averaged",
    ]
    (good / "recipe.yaml").write_text("")
    report = read([tmp_path])
    assert [of.folder for of in report.unread] == [good]
    assert results(report.groups[0])[0].rows[0][1:3] == ("none finished", "-")


def test_sizes() -> None:
    assert [size(of) for of in (0, 1023, 1024, 3.5 * 2**20, 2.0**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.5 MiB",
        "1.0 GiB",
    ]


def test_published_figures_stand_by_their_benchmark_alone() -> None:
    assert len(published(TRACE)) == 2
    assert len(published([name.lower().replace("-", "_") for name in reversed(TRACE)])) == 2
    assert len(published(FOUR)) == 1
    assert [
        table.figures[0][1] for table in published(["BoolQA" if name == "boolq" else name for name in FIFTEEN])
    ] == [7.4]
    assert published_table(published(TRACE)[0]).rows[0] == ("SeqFT", "0.4763", "-0.1145")  # 47.63 and -11.45 percent
    assert published(TRACE[:7]) == []
    assert published([*TRACE, "more"]) == []
