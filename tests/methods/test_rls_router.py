"""The router: tasks are added and removed, files are bit-exact, and bad files are refused with one line."""

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

from dscl.maths.rls import TaskStatistics, compute_statistics
from dscl.methods import rls_router as module
from dscl.methods.rls_router import Router, RouterSpec, load_task_statistics, save_task_statistics
from dscl.utils import checksummed
from dscl.utils.errors import ExternalFailure, UserError

SPEC = RouterSpec(
    kind="exact",
    layer=2,
    dim=16,
    num_features=48,
    seed=1,
    model="llama-abc",
    tokenizer="pieces-def",
    prompt_limit=100,
    precision="fp32",
)
PAPER = dataclasses.replace(SPEC, kind="paper")


def make_states(task: int, count: int = 40, dim: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(task)
    return 1 + 2 * torch.randn(dim, generator=draw) + torch.randn(count, dim, generator=draw)


def make_statistics(spec: RouterSpec, task: int, count: int = 40) -> TaskStatistics:
    expansion = spec.feature_map()
    return compute_statistics(expansion.quantize(make_states(task, count, spec.dim)), expansion)


def make_router(spec: RouterSpec = SPEC, names: str = "abc", **settings: Any) -> Router:
    router = Router(spec, **settings)
    for name in names:
        router.add(name, make_statistics(spec, ord(name)))
    return router


def error_message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_prompts_are_routed_to_their_task() -> None:
    router = make_router()
    for name in "abc":
        routes = router.route(router.quantize(make_states(ord(name))))
        assert sum(task == name for task in routes.task) >= 38
        assert routes.margin.shape == routes.distance.shape == (40,)
    tasks_of_unknown = router.route(router.quantize(make_states(7))).task
    assert tasks_of_unknown.count(None) > 30
    assert None not in make_router(ood_fallback=False).route(router.quantize(make_states(7))).task


def test_a_removed_task_leaves_no_trace() -> None:
    router, without_b = make_router(names="abcd"), make_router(names="acd")
    assert "b" in router.route(router.quantize(make_states(ord("b")))).task
    router.remove("b")
    assert router.names == without_b.names
    assert torch.equal(router.get_fitted_router().weights, without_b.get_fitted_router().weights)
    assert "b" not in router.route(router.quantize(make_states(ord("b")))).task
    router.add("b", make_statistics(SPEC, ord("b")))
    assert torch.equal(router.get_fitted_router().weights, make_router(names="abcd").get_fitted_router().weights)


def test_the_fit_is_cached_until_tasks_change() -> None:
    router = make_router()
    first = router.get_fitted_router()
    assert router.get_fitted_router() is first
    router.add("z", make_statistics(SPEC, 99))
    assert router.get_fitted_router().names == ("a", "b", "c", "z")


@pytest.mark.parametrize("spec", [SPEC, PAPER])
def test_save_and_load_are_bit_exact(tmp_path: Path, spec: RouterSpec) -> None:
    router = make_router(spec, ridge=0.5, ood_fallback=False)
    router.save(tmp_path / "r.safetensors")
    loaded = Router.load(tmp_path / "r.safetensors", spec)
    assert (loaded.spec, loaded.ridge, loaded.ood_fallback, loaded.names) == (spec, 0.5, False, router.names)
    for name in router.names:
        pairs = zip(router.get_statistics(name).tensors(), loaded.get_statistics(name).tensors(), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    rows = router.quantize(make_states(5))
    routes, loaded_routes = router.route(rows), loaded.route(rows)
    assert routes.task == loaded_routes.task
    assert torch.equal(routes.margin, loaded_routes.margin)
    assert router.get_fitted_router().ood_detector is None
    assert router.get_fitted_router().ridge == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_a_router_is_assembled_from_task_files(tmp_path: Path) -> None:
    expected = make_router()
    for name in "cab":
        save_task_statistics(tmp_path / name, SPEC, name, expected.get_statistics(name))
    router = Router(SPEC)
    for name in "bca":
        router.add(name, load_task_statistics(tmp_path / name, SPEC))
    assert torch.equal(router.get_fitted_router().weights, expected.get_fitted_router().weights)
    save_task_statistics(tmp_path / "again", SPEC, "a", make_statistics(SPEC, ord("a")))  # not compact yet
    assert (tmp_path / "again").read_bytes() == (tmp_path / "a").read_bytes()
    expected.save(tmp_path / "all")
    with pytest.raises(UserError, match=r"holds 3 tasks \(a, b, c\); a file of a single one"):
        load_task_statistics(tmp_path / "all", SPEC)


def test_integer_statistics_make_small_files(tmp_path: Path) -> None:
    save_task_statistics(tmp_path / "a", SPEC, "a", make_statistics(SPEC, 0))
    assert (tmp_path / "a").stat().st_size < 4 * 48 * 49 / 2 + 8 * 48 + 1500


def test_corrupted_and_truncated_files_are_detected(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, num_features=4)
    path, damaged = tmp_path / "good", tmp_path / "bad"
    make_router(spec, "a").save(path)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(UserError) as error:
            Router.load(damaged, spec)
        assert str(damaged) in error_message(error)
    for length in range(0, len(content), 7):
        damaged.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            Router.load(damaged, spec)
        assert "damaged" in error_message(error)


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
    monkeypatch.setattr(module, "FILE_VERSION", 2)
    make_router().save(tmp_path / "r")
    monkeypatch.setattr(module, "FILE_VERSION", 1)
    with pytest.raises(UserError, match="a router's file of format 2, this version reads 1"):
        Router.load(tmp_path / "r")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RouterSpec)])
def test_other_features_are_refused_by_name(tmp_path: Path, field: str) -> None:
    make_router().save(tmp_path / "r")
    value = getattr(SPEC, field)
    other: Any = "paper" if field == "kind" else f"{value}x" if isinstance(value, str) else value + 1
    expected = dataclasses.replace(SPEC, **{field: other})
    with pytest.raises(UserError) as error:
        Router.load(tmp_path / "r", expected)
    assert f" {value}, here it is {other};" in error_message(error)
    assert RouterSpec.__dataclass_fields__[field].metadata["help"] in error_message(error)
    with pytest.raises(UserError):
        load_task_statistics(tmp_path / "r", expected)
    assert not SPEC.describe_difference(dataclasses.replace(SPEC))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r"
    make_router().save(path)
    content = path.read_bytes()

    def broken(tensors: Any, partial: Path, metadata: Any) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksummed, "save_file", broken)
    with pytest.raises(ExternalFailure, match=r"cannot be written.*No space left") as error:
        make_router(names="ab").save(path)
    error_message(error)
    assert path.read_bytes() == content


def test_metadata_is_one_entry_of_json(tmp_path: Path) -> None:
    make_router().save(tmp_path / "r")
    with safe_open(tmp_path / "r", framework="pt") as file:
        (entry,) = file.metadata().values()
    header = json.loads(entry)
    assert header["tasks"] == ["a", "b", "c"]
    assert header["spec"] == dataclasses.asdict(SPEC)


def test_user_errors_are_one_line() -> None:
    router = make_router()
    with pytest.raises(UserError, match=r"task 'agnew' is not in the router; there: a, b, c") as error:
        router.remove("agnew")
    error_message(error)
    with pytest.raises(UserError, match="task 'a' is in the router already") as error:
        router.add("a", make_statistics(SPEC, 0))
    error_message(error)
    with pytest.raises(UserError, match="task 'd' has no samples") as error:
        router.add("d", make_statistics(SPEC, 0, count=0))
    error_message(error)
    with pytest.raises(UserError, match="knows no task") as error:
        Router(SPEC).route(torch.zeros(1, 16, dtype=torch.int8))
    error_message(error)
    for value in (math.nan, math.inf):
        bad = make_states(0)
        bad[3, 4] = value
        with pytest.raises(
            UserError, match="layer 2: the pooled hidden states hold values that are not finite"
        ) as error:
            router.quantize(bad)
        error_message(error)
    good = make_statistics(PAPER, 0)
    with pytest.raises(UserError, match="task 'd': its statistics hold values that are not finite") as error:
        router.add("d", TaskStatistics(good.gram * math.inf, good.feature_sum, good.count))
    error_message(error)
    with pytest.raises(UserError, match=r"not positive definite.*give a larger ridge") as error:
        make_router(dataclasses.replace(SPEC, num_features=200), ridge=1e-30).get_fitted_router()
    error_message(error)
    assert router.names == ["a", "b", "c"]
