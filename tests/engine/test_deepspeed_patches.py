"""The internals of DeepSpeed that dscl patches or reads exist in the installed version."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

import dscl.engine
from dscl.engine import deepspeed_patches, zero_layouts
from dscl.utils import timers
from dscl.utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

# Where the patches reach into DeepSpeed and torch: module, name in it.
PATCHED = (
    ("deepspeed.runtime.zero.utils", "ZERO_SUPPORTED_OPTIMIZERS"),
    ("deepspeed.comm", "init_distributed"),
    ("deepspeed.comm.comm", "cdb"),
    (deepspeed_patches.MUON_MODULE, "MuonWithAuxAdam"),
    *(("deepspeed.comm.torch", f"TorchBackend.{name}") for name in deepspeed_patches.COLLECTIVE_SIGNATURES),
    ("deepspeed.runtime.zero.partitioned_param_coordinator", "PartitionedParameterCoordinator.fetch_sub_module"),
    ("deepspeed.runtime.zero.partitioned_param_coordinator", "assert_ints_same_as_other_ranks"),
    ("deepspeed.ops.op_builder.cpu", "ShareMemCommBuilder"),
    ("torch.utils.cpp_extension", "_get_build_directory"),
    ("deepspeed.runtime.config", "DeepSpeedConfigError"),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
    ("deepspeed.runtime.zero.partition_parameters", "DeepSpeedTensorOverride.device"),
)
# The attributes that dscl/engine/zero_layouts.py reads: module, class, its attributes.
STAGE_1_AND_2 = ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
STAGE_3 = ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")
BF16 = ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
UNFUSED = ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
OPTIMIZERS = {
    UNFUSED: ("fp16_groups", "fp32_groups", "clip_grad", "loss_scale_config"),
    BF16: ("bf16_groups", "bf16_groups_flat", "clip_grad", "update_lp_params"),
    STAGE_1_AND_2: (
        "round_robin_bit16_groups", "round_robin_bit16_offsets", "bit16_groups_flat", "clip_grad", "loss_scaler",
        "update_lp_params",
    ),
    STAGE_3: (
        "fp32_partitioned_groups_flat", "grad_position", "get_param_id", "persistent_parameters", "clip_grad",
        "loss_scaler", "_get_fp32_opt_state_partition",
    ),
}  # fmt: skip
# Attributes of parameters, and the module that sets them.
PARAMETERS = (
    ("deepspeed.utils.mixed_precision_linkage", "_hp_mapping"),
    *(
        ("deepspeed.utils.tensor_fragment", name)
        for name in ("hp_fragment", "hp_fragment_address", "lp_fragment_address", "param_group_index")
    ),
    *(
        ("deepspeed.runtime.zero.partition_parameters", name)
        for name in ("ds_tensor", "ds_numel", "ds_shape", "partition", "all_gather")
    ),
)
INSTEAD = "find what took its place, change the patch that relies on it, and renew CHECKED_VERSION"


def explain_missing_name(module: str, name: str) -> str | None:
    """An error message if the module has no such name; else None."""
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        return f"the installed DeepSpeed has no {module}.{name} ({error}); {INSTEAD}"
    return None


def explain_missing_attribute(module: str, scope: str | None, name: str) -> str | None:
    """An error message if the source of the module or class mentions no such attribute; else None."""
    source: Any = importlib.import_module(module)
    if scope is not None:
        source = getattr(source, scope)
    owner = "self" if scope is not None else r"\w+"
    definition = rf"\b{owner}\.{name}\b|\bdef {name}\b|^\s+{name}\s*:"
    if re.search(definition, inspect.getsource(source), re.MULTILINE) is None:
        return f"{module} of the installed DeepSpeed no longer has the attribute {name}; {INSTEAD}"
    return None


@pytest.mark.parametrize(("module", "name"), PATCHED)
def test_a_patched_name_is_there(module: str, name: str) -> None:
    assert explain_missing_name(module, name) is None


@pytest.mark.parametrize(
    ("module", "scope", "name"),
    [
        *((*optimizer, name) for optimizer, names in OPTIMIZERS.items() for name in names),
        *((module, None, name) for module, name in PARAMETERS),
    ],
)
def test_an_attribute_that_is_read_is_there(module: str, scope: str | None, name: str) -> None:
    assert explain_missing_attribute(module, scope, name) is None


def test_a_missing_name_is_told() -> None:
    message = explain_missing_name("deepspeed.runtime.zero.utils", "NO_SUCH_LIST")
    assert message is not None
    assert "has no deepspeed.runtime.zero.utils.NO_SUCH_LIST" in message
    message = explain_missing_attribute(*STAGE_3, "no_such_group")
    assert message is not None
    assert "no longer has the attribute no_such_group" in message


def read_attributes() -> Iterator[str]:
    """The attributes of DeepSpeed's optimizer objects that the layouts read."""
    for node in ast.walk(ast.parse(inspect.getsource(zero_layouts))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self._zero_optimizer", "optimizer"):
            yield node.attr


def test_the_list_of_attributes_is_complete() -> None:
    assert set(read_attributes()) == {name for names in OPTIMIZERS.values() for name in names}


def test_the_pinned_version_is_the_one_that_was_checked() -> None:
    pinned = re.search(r"^deepspeed==(\S+)$", (REPOSITORY / "launch/constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == deepspeed_patches.CHECKED_VERSION, "check every patch against the new version, then renew it"


@pytest.mark.parametrize(
    "patch", [f for f in vars(deepspeed_patches).values() if getattr(f, "__module__", "") == deepspeed_patches.__name__]
)
def test_every_patch_says_why_and_for_which_version(patch: Callable[..., Any]) -> None:
    text = inspect.getdoc(patch) or ""
    assert "\nReason: " in text
    assert "\nRelies on: " in text
    assert re.search(rf"Checked: {re.escape(deepspeed_patches.CHECKED_VERSION)}\b", text), text


def test_deepspeed_is_changed_in_one_file() -> None:
    """Other files use DeepSpeed's public interface; only the layouts read its optimizers."""
    imported = {}
    for path in sorted(Path(dscl.engine.__path__[0]).glob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        names = [f"{n.module}.{a.name}" for n in nodes for a in n.names if (n.module or "").startswith("deepspeed.")]
        if names and path.stem != "deepspeed_patches":
            imported[path.stem] = names
    assert imported == {
        "zero_layouts": [
            "deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
            "deepspeed.runtime.zero.partition_parameters.DeepSpeedTensorOverride",
        ]
    }


def test_an_optimizer_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Subclass(torch.optim.AdamW):
        pass

    listed = list(ZERO_SUPPORTED_OPTIMIZERS)
    monkeypatch.setattr(deepspeed_patches, "ZERO_SUPPORTED_OPTIMIZERS", listed)
    for _ in range(2):
        deepspeed_patches.allow_zero_with(Subclass)
    assert listed == [*ZERO_SUPPORTED_OPTIMIZERS, Subclass]


@pytest.mark.parametrize("complaint", [NotImplementedError, DeepSpeedConfigError])
def test_a_complaint_of_deepspeed_becomes_one_line(complaint: type[Exception]) -> None:
    with (
        pytest.raises(UserError, match=r"^deepspeed: these settings are refused: no mix of a and b$"),
        deepspeed_patches.deepspeed_errors_as_user_errors(),
    ):
        raise complaint("no mix\n  of a and b")


def test_asserts_between_ranks_are_back_afterwards() -> None:
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    check = coordinator.assert_ints_same_as_other_ranks
    with deepspeed_patches.without_cross_rank_asserts():
        assert coordinator.assert_ints_same_as_other_ranks([1]) is None  # alone, with no process group
    assert coordinator.assert_ints_same_as_other_ranks is check


def test_waiting_for_gathered_weights_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's method has a decorator of its own, which must not be mistaken for the patch."""
    owner = deepspeed_patches.PartitionedParameterCoordinator

    @functools.wraps(owner.fetch_sub_module)
    def fetch(self: Any, submodule: Any, forward: bool) -> str:
        return f"{submodule} {forward}"

    assert hasattr(fetch, "__wrapped__")
    monkeypatch.setattr(owner, "fetch_sub_module", fetch)
    for _ in range(2):  # a process may initialize more than once
        deepspeed_patches.time_weight_gathering()
    timers.collect_timings()
    with timers.timed_part("forward"):
        assert owner.fetch_sub_module(None, "layer", forward=True) == "layer True"
    assert len([span for span in timers._recorder.spans if span[1] == "all_gather"]) == 1
    assert timers.collect_timings().wait_seconds["all_gather"] > 0
