"""The router that is kept: put together and taken apart, saved and loaded to the last bit, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dscl.maths.rls import Statistics, gather
from dscl.methods import rls_router as module
from dscl.methods.rls_router import Router, Spec, load_task, save_task
from dscl.utils import checksummed
from dscl.utils.errors import Failure, UserError

SPEC = Spec(
    kind="exact",
    layer=2,
    dim=16,
    width=48,
    seed=1,
    model="llama-abc",
    tokenizer="pieces-def",
    prompt_limit=100,
    precision="fp32",
)
PAPER = dataclasses.replace(SPEC, kind="paper")


def states(task: int, count: int = 40, dim: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(task)
    return 1 + 2 * torch.randn(dim, generator=draw) + torch.randn(count, dim, generator=draw)


def statistics(spec: Spec, task: int, count: int = 40) -> Statistics:
    expansion = spec.expansion()
    return gather(expansion.rows(states(task, count, spec.dim)), expansion)


def filled(spec: Spec = SPEC, names: str = "abc", **settings: Any) -> Router:
    router = Router(spec, **settings)
    for name in names:
        router.add(name, statistics(spec, ord(name)))
    return router


def told(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_prompts_go_to_their_task() -> None:
    router = filled()
    for name in "abc":
        routes = router.route(router.rows(states(ord(name))))
        assert sum(task == name for task in routes.task) >= 38
        assert routes.margin.shape == routes.distance.shape == (40,)
    far = router.route(router.rows(states(7))).task
    assert far.count(None) > 30
    assert None not in filled(reject=False).route(router.rows(states(7))).task


def test_a_removed_task_leaves_no_trace() -> None:
    router, never = filled(names="abcd"), filled(names="acd")
    assert "b" in router.route(router.rows(states(ord("b")))).task
    router.remove("b")
    assert router.names == never.names
    assert torch.equal(router.solution().weights, never.solution().weights)
    assert "b" not in router.route(router.rows(states(ord("b")))).task
    router.add("b", statistics(SPEC, ord("b")))
    assert torch.equal(router.solution().weights, filled(names="abcd").solution().weights)


def test_the_solution_is_kept_until_tasks_change() -> None:
    router = filled()
    first = router.solution()
    assert router.solution() is first
    router.add("z", statistics(SPEC, 99))
    assert router.solution().names == ("a", "b", "c", "z")


@pytest.mark.parametrize("spec", [SPEC, PAPER])
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path: Path, spec: Spec) -> None:
    router = filled(spec, ridge=0.5, reject=False)
    router.save(tmp_path / "r.safetensors")
    loaded = Router.load(tmp_path / "r.safetensors", spec)
    assert (loaded.spec, loaded.ridge, loaded.reject, loaded.names) == (spec, 0.5, False, router.names)
    for name in router.names:
        pairs = zip(router.statistics(name).tensors(), loaded.statistics(name).tensors(), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    rows = router.rows(states(5))
    expected, found = router.route(rows), loaded.route(rows)
    assert expected.task == found.task
    assert torch.equal(expected.margin, found.margin)
    assert router.solution().rejection is None
    assert router.solution().ridge == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_a_router_is_put_together_from_files_of_single_tasks(tmp_path: Path) -> None:
    expected = filled()
    for name in "cab":
        save_task(tmp_path / name, SPEC, name, expected.statistics(name))
    router = Router(SPEC)
    for name in "bca":
        router.add(name, load_task(tmp_path / name, SPEC))
    assert torch.equal(router.solution().weights, expected.solution().weights)
    save_task(tmp_path / "again", SPEC, "a", statistics(SPEC, ord("a")))  # not compact yet
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a").read_bytes()
    expected.save(tmp_path / "all")
    with pytest.raises(UserError, match=r"holds 3 tasks \(a, b, c\); a file of a single one"):
        load_task(tmp_path / "all", SPEC)


def test_whole_numbers_take_little_room(tmp_path: Path) -> None:
    save_task(tmp_path / "a", SPEC, "a", statistics(SPEC, 0))
    assert (tmp_path / "a").stat().st_size < 4 * 48 * 49 / 2 + 8 * 48 + 1500


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, width=4)
    path, damaged = tmp_path / "good", tmp_path / "bad"
    filled(spec, "a").save(path)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(UserError) as error:
            Router.load(damaged, spec)
        assert str(damaged) in told(error)
    for length in range(0, len(content), 7):
        damaged.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            Router.load(damaged, spec)
        assert "damaged" in told(error)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(UserError, match="no such file"):
        Router.load(path)
    for content in (b"", b"text", b"{}" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a router's file, or damaged"):
            Router.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a router's file"):
        Router.load(path)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 2)
    filled().save(tmp_path / "r")
    monkeypatch.setattr(module, "FORMAT", 1)
    with pytest.raises(UserError, match="a router's file of format 2, this version reads 1"):
        Router.load(tmp_path / "r")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Spec)])
def test_other_features_are_refused_by_name(tmp_path: Path, field: str) -> None:
    filled().save(tmp_path / "r")
    value = getattr(SPEC, field)
    other: Any = "paper" if field == "kind" else f"{value}x" if isinstance(value, str) else value + 1
    expected = dataclasses.replace(SPEC, **{field: other})
    with pytest.raises(UserError) as error:
        Router.load(tmp_path / "r", expected)
    assert f" {value}, here it is {other};" in told(error)
    assert Spec.__dataclass_fields__[field].metadata["help"] in told(error)
    with pytest.raises(UserError):
        load_task(tmp_path / "r", expected)
    assert not SPEC.difference(dataclasses.replace(SPEC))


def test_a_damaged_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    filled().save(path)
    content = path.read_bytes()

    def broken(tensors: Any, partial: Path, metadata: Any) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksummed, "save_file", broken)
    with pytest.raises(Failure, match=r"cannot be written.*No space left") as error:
        filled(names="ab").save(path)
    told(error)
    assert path.read_bytes() == content


def test_metadata_is_one_entry_of_json(tmp_path: Path) -> None:
    filled().save(tmp_path / "r")
    with safe_open(tmp_path / "r", framework="pt") as file:
        (entry,) = file.metadata().values()
    header = json.loads(entry)
    assert header["tasks"] == ["a", "b", "c"]
    assert header["spec"] == dataclasses.asdict(SPEC)


def test_mistakes_are_told_in_one_line() -> None:
    router = filled()
    with pytest.raises(UserError, match=r"task 'agnew' is not in the router; there: a, b, c") as error:
        router.remove("agnew")
    told(error)
    with pytest.raises(UserError, match="task 'a' is in the router already") as error:
        router.add("a", statistics(SPEC, 0))
    told(error)
    with pytest.raises(UserError, match="task 'd' has no samples") as error:
        router.add("d", statistics(SPEC, 0, count=0))
    told(error)
    with pytest.raises(UserError, match="knows no task") as error:
        Router(SPEC).route(torch.zeros(1, 16, dtype=torch.int8))
    told(error)
    for value in (math.nan, math.inf):
        bad = states(0)
        bad[3, 4] = value
        with pytest.raises(
            UserError, match="layer 2: the pooled hidden states hold values that are not finite"
        ) as error:
            router.rows(bad)
        told(error)
    good = statistics(PAPER, 0)
    with pytest.raises(UserError, match="task 'd': its statistics hold values that are not finite") as error:
        router.add("d", Statistics(good.gram * math.inf, good.total, good.count))
    told(error)
    with pytest.raises(UserError, match=r"not positive definite.*give a larger ridge") as error:
        filled(dataclasses.replace(SPEC, width=200), ridge=1e-30).solution()
    told(error)
    assert router.names == ["a", "b", "c"]
