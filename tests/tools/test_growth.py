"""A small table of how costs grow: the counts equal the formulas."""

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
    for name, formula, size, measured, predicted, ratio in rows:
        assert float(measured) > 0, (name, formula, size, predicted)
        if not name.startswith("router"):  # router rows are timed
            assert float(ratio) == pytest.approx(1.0, abs=0.08), (name, size, measured, predicted)
