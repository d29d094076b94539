"""What a task's sub-experts leave: read back to the last bit in the order of the tasks, or refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dscl.model.adapters.routing import Routing
from dscl.model.adapters.sub_expert_bank import SubExpertBank, inject_sub_experts
from dscl.model.adapters.sub_experts import SubExpertShape
from dscl.model.adapters.task_masks import KIND, TaskMasks, read_matching_masks, read_task_masks, write_task_masks
from dscl.utils import checksummed
from dscl.utils.errors import ExternalFailure, UserError
from tests.support.sub_experts import IN, OUT, make_shape, randomize_parameters

NAMES = ("one", "two", "three")


def experts_of(
    shape: SubExpertShape, dtype: torch.dtype = torch.float32, layers: str = "pq", out: int = OUT
) -> SubExpertBank:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(IN, out, dtype=dtype) for name in layers})
    found = inject_sub_experts(model, shape, Routing(len(NAMES), 0), layers)
    for each in found.layers.values():
        each.make_trainable()
    return found


def learned(
    folder: Path, shape: SubExpertShape, dtype: torch.dtype = torch.float32
) -> tuple[SubExpertBank, list[TaskMasks]]:
    """Three tasks, each with a sub-expert more, and their files."""
    experts, every = experts_of(shape, dtype), []
    for task, name in enumerate(NAMES):
        experts.num_used_experts = shape.num_experts + task
        experts.set_allowed_masks(reuse=True)
        for number, layer in enumerate(experts.layers.values()):
            randomize_parameters(layer, 10 * task + number)
        trained = {
            f"{path}.{own}": getattr(layer, own).detach().float()
            for path, layer in experts.layers.items()
            for own in layer.trainable_names
        }
        every.append(TaskMasks(name, tuple(experts.names), shape, experts.freeze_task_params(name, trained)))
        write_task_masks(folder / f"{name}.safetensors", every[-1])
    return experts, every


def read_all(folder: Path, experts: SubExpertBank) -> list[TaskMasks]:
    every = []
    for name in NAMES:
        every.append(read_matching_masks(folder / f"{name}.safetensors", name, tuple(experts.names), experts))
        experts.load_task_params(name, every[-1].layers)
    return every


@pytest.mark.parametrize("rank1", [True, False])
@pytest.mark.parametrize("top", [2, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_restore_every_bit(tmp_path: Path, rank1: bool, top: int, dtype: torch.dtype) -> None:
    shape = make_shape(rank1, top_k=top, max_experts=6)
    experts, every = learned(tmp_path, shape, dtype)
    fresh = experts_of(shape, dtype)
    for ours, theirs in zip(every, read_all(tmp_path, fresh), strict=True):
        assert (ours.task, ours.previous_tasks, ours.shape, ours.byte_sizes()) == (
            theirs.task, theirs.previous_tasks, theirs.shape, theirs.byte_sizes(),
        )  # fmt: skip
    for name, layer in experts.layers.items():
        for kind in (
            "frozen_a",
            "frozen_b",
            "expert_mask",
            "routers",
            *(f"task_mask_{mask}" for mask in layer.mask_shapes),
        ):
            assert torch.equal(getattr(layer, kind), getattr(fresh.layers[name], kind)), kind
        assert layer.frozen_a.any()
        for slot in range(len(NAMES)):
            assert layer.expert_mask[slot].sum() == shape.num_experts + slot
    assert fresh.num_used_experts == experts.num_used_experts == 6


def test_equal_task_masks_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        learned(tmp_path / name, make_shape(max_experts=6))
    for name in NAMES:
        first, second = ((tmp_path / side / f"{name}.safetensors").read_bytes() for side in "ab")
        assert first == second


def test_byte_sizes_equal_the_stored_bytes(tmp_path: Path) -> None:
    """Each frozen value once, over all tasks; a bit for each rank-1 pair; the token router of the experts in use."""
    shape = make_shape(max_experts=6)
    experts, every = learned(tmp_path, shape)
    sizes = [task_masks.byte_sizes() for task_masks in every]
    assert sum(part["parameters"] for part in sizes) == 4 * sum(
        layer.num_frozen_params for layer in experts.layers.values()
    )
    columns = -(-shape.columns // 8)
    for part, count in zip(sizes, (4, 5, 6), strict=True):
        assert part["masks"] == len(experts.layers) * (columns + shape.max_experts)
        assert part["routers"] == len(experts.layers) * count * IN * 4


def test_task_without_new_parameters_has_a_file(tmp_path: Path) -> None:
    """A task whose mask selects only frozen parameters leaves no values."""
    shape = make_shape(mask_density=1.0, max_experts=4)
    experts, fresh = experts_of(shape), experts_of(shape)
    for name in NAMES[:2]:
        experts.set_allowed_masks(reuse=True)
        trained = {
            f"{path}.{own}": getattr(layer, own).detach().float()
            for path, layer in experts.layers.items()
            for own in layer.trainable_names
        }
        task_masks = TaskMasks(name, tuple(experts.names), shape, experts.freeze_task_params(name, trained))
        write_task_masks(tmp_path / name, task_masks)
        back = read_matching_masks(tmp_path / name, name, tuple(fresh.names), fresh)
        fresh.load_task_params(name, back.layers)
    assert back.layers["p"]["a"].numel() == back.layers["q"]["b"].numel() == 0
    assert back.byte_sizes()["parameters"] == 0


def refusal(path: Path, task: str, before: tuple[str, ...], experts: SubExpertBank) -> str:
    with pytest.raises(UserError) as caught:
        read_matching_masks(path, task, before, experts)
    told = str(caught.value)
    assert "\n" not in told
    assert str(path) in told
    assert ";" in told  # what to change
    assert not experts.names  # and nothing was taken
    return told


def test_file_of_another_task_order_is_refused(tmp_path: Path) -> None:
    shape = make_shape(max_experts=6)
    learned(tmp_path, shape)
    fresh = experts_of(shape)
    second = tmp_path / "two.safetensors"
    assert "of task 'two' after one, here 'two' after no other is needed" in refusal(second, "two", (), fresh)
    assert "of task 'two' after one, here 'one' after no other is needed" in refusal(second, "one", (), fresh)
    told = refusal(tmp_path / "three.safetensors", "three", ("two", "one"), fresh)
    assert "after one, two, here 'three' after two, one is needed" in told
    assert "no such file" in refusal(tmp_path / "four.safetensors", "four", NAMES, fresh)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_experts": 5}, "its sub-experts have max_experts 6, here it is 5"),
        ({"rank": 4}, "its sub-experts have rank 3, here it is 4"),
        ({"num_experts": 5}, "its sub-experts have num_experts 4, here it is 5"),
        ({"mask_density": 0.25}, "its sub-experts have mask_density 0.5, here it is 0.25"),
        ({"scale": 2.0}, "its sub-experts have scale 1.5, here it is 2.0"),
        ({"top_k": 0}, "its sub-experts have top_k 2, here it is 0"),
        ({"rank1": False}, "its sub-experts have rank1 True, here it is False"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    shape = make_shape(max_experts=6)
    learned(tmp_path, shape)
    assert told in refusal(tmp_path / "one.safetensors", "one", (), experts_of(replace(shape, **changes)))


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    shape = make_shape(max_experts=6)
    learned(tmp_path, shape)
    path = tmp_path / "one.safetensors"
    assert "q has sub-experts either there or here, not both" in refusal(path, "one", (), experts_of(shape, layers="p"))
    assert "r has sub-experts either there" in refusal(path, "one", (), experts_of(shape, layers="pqr"))
    assert "p: " in refusal(path, "one", (), experts_of(shape, out=OUT + 1))


def rewritten(path: Path, change: Any, sound: bool = True) -> None:
    """The file with another content; `sound`: and the checksum of that."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KIND])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(header, tensors)
    if sound:
        header.pop("checksum", None)
        header["checksum"] = checksummed._checksum(header, tensors)
    save_file(tensors, path, {KIND: json.dumps(header)})


def short_mask(_header: Any, tensors: Any) -> None:
    tensors["p|mask_rank1"] = tensors["p|mask_rank1"][:-1].clone()


def without_a_router(_header: Any, tensors: Any) -> None:
    del tensors["q|router"]


def fewer_values(_header: Any, tensors: Any) -> None:
    tensors["p|a"] = tensors["p|a"][:-1].clone()


def no_values(_header: Any, tensors: Any) -> None:
    del tensors["p|b"]


def not_finite(_header: Any, tensors: Any) -> None:
    tensors["p|b"][3] = float("nan")


def router_not_finite(_header: Any, tensors: Any) -> None:
    tensors["q|router"][0, 1] = float("inf")


def another_format(header: Any, _tensors: Any) -> None:
    header["format"] = 99


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (short_mask, "p: mask_rank1 holds 2, the layer needs 3"),
        (without_a_router, "q: router holds nothing, the layer needs 96"),
        (fewer_values, "p: 143 values of a, the mask needs 144"),
        (no_values, "p: no values of b, the mask needs 96"),
        (not_finite, "p: values of b that are not finite"),
        (router_not_finite, "q: values of its token router that are not finite"),
        (another_format, "of format 99, this version reads 1"),
    ],
)
def test_file_with_tensors_that_do_not_fit_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    shape = make_shape(max_experts=6)
    learned(tmp_path, shape)
    path = tmp_path / "one.safetensors"
    rewritten(path, change)
    assert told in refusal(path, "one", (), experts_of(shape))


def test_any_damaged_byte_is_detected(tmp_path: Path) -> None:
    shape = make_shape(max_experts=6)
    learned(tmp_path, shape)
    path, fresh = tmp_path / "one.safetensors", experts_of(shape)
    whole = path.read_bytes()
    for place in (3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "damaged" in refusal(path, "one", (), fresh)
    path.write_bytes(whole[:-7])
    assert "damaged" in refusal(path, "one", (), fresh)
    path.write_bytes(b"")
    assert "damaged" in refusal(path, "one", (), fresh)
    save_file({"x": torch.zeros(2)}, path)
    assert "not a task's sub-experts" in refusal(path, "one", (), fresh)
    path.write_bytes(whole)
    rewritten(path, lambda _header, tensors: tensors["p|a"].mul_(2), sound=False)
    assert "does not match its checksum" in refusal(path, "one", (), fresh)
    path.write_bytes(whole)
    rewritten(path, lambda header, _tensors: header.update(task="two"), sound=False)
    assert "does not match its checksum" in refusal(path, "two", (), fresh)


def test_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make_shape(max_experts=6)
    _, every = learned(tmp_path, shape)
    path = tmp_path / "one.safetensors"
    whole = path.read_bytes()

    def apart(tensors: Any, place: Path, header: Any) -> None:
        assert place.name.endswith(".partial")  # a process that is killed leaves no half of one by its name
        save_file(tensors, place, header)

    def full(tensors: Any, place: Path, header: Any) -> None:
        save_file(tensors, place, header)
        place.write_bytes(place.read_bytes()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksummed, "save_file", apart)
    write_task_masks(tmp_path / "new.safetensors", every[1])
    assert read_task_masks(tmp_path / "new.safetensors").task == "two"
    monkeypatch.setattr(checksummed, "save_file", full)
    with pytest.raises(
        ExternalFailure, match=r"one.safetensors: cannot be written .*No space left.*; make room"
    ) as caught:
        write_task_masks(path, every[1])
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == whole
    assert read_task_masks(path).task == "one"
