"""A small table of plans: a row for each size, with the values of the plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dscl.model.tokenizer import train_tokenizer
from tests.support.programs import forked_run
from tools import plan_sizes as sizes

TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_a_row_says_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer((str(number) for number in range(1000)), 300, tmp_path / "tokenizer")
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)
    monkeypatch.setattr(sizes, "LENGTH", 128)
    monkeypatch.setattr(sizes, "subprocess", SimpleNamespace(run=forked_run))
    sizes.main(["--tokenizer", str(tmp_path / "tokenizer"), "--sizes", "tiny", "--gpus", "2"])
    head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert (cells["method"], cells["GPUs"]) == ("`sequential`", "2")
    memory = [float(cells[part]) for part in sizes.PARTS]
    assert sum(memory[:-1]) == pytest.approx(memory[-1], abs=0.3)
    # 17.7M parameters in bf16: each rank sends its half of the gradients, and its half of the parameters once, as ZeRO
    # keeps so few parameters gathered until the backward pass has used them.
    assert cells["sent a step"].endswith(" GB")
    assert float(cells["sent a step"].split()[0]) == pytest.approx(17.7e6 * 2 / 1e9, rel=0.05)
    least, most = (float(word) for word in cells["step"].removesuffix(" s").split(" to "))
    slow, fast = (float(word.replace(",", "")) for word in cells["tokens/s a GPU"].split(" to "))
    assert least < most
    assert slow * most == pytest.approx(fast * least, rel=0.02)
