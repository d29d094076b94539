"""The table of how costs grow, in small: the counted costs agree with the formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.programs import forked_run
from tools import growth


@pytest.mark.parametrize("ranks", ["4", pytest.param("2 4", marks=pytest.mark.exhaustive)])
def test_what_is_counted_grows_as_the_formulas_say(
    ranks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "subprocess", SimpleNamespace(run=forked_run))
    sizes = f"--ranks {ranks} --widths 64 128 --prompts 64 --hidden 512 --layers 2"
    growth.main(sizes.split(" "))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0].split(":")[0] for row in rows} >= {"weights, bytes", "OSFT", "ASR", "router", "operations of a step"}
    for label, formula, sizes_of_row, measured, predicted, ratio in rows:
        assert float(measured) > 0, (label, formula, sizes_of_row, predicted)
        if not label.startswith("router"):  # the router is timed
            assert float(ratio) == pytest.approx(1.0, abs=0.08), (label, sizes_of_row, measured, predicted)
