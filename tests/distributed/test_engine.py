"""The engine against plain torch in one process: every step's loss and the final weights, at every stage and size."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import itertools
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from dscl.distributed import comm
from dscl.engine import deepspeed_patches
from dscl.engine.engine import Engine
from dscl.engine.zero_layouts import load_parameters
from dscl.model.adapters.injection import LoraConfig, inject_lora
from tests.support.toy_model import (
    OFFLOAD,
    STEPS,
    Toy,
    assemble,
    count_targets,
    gathered,
    join_rows,
    learning_rate,
    make_engine,
    master_shards,
    micro_batches,
    sample_rows,
    summed_loss,
    toy_backbone,
    train_steps,
)


def reference() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, no DeepSpeed, the whole batch at once."""
    built = toy_backbone()
    model = built.build()
    load_parameters(model, built.weights.read)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        batch = sample_rows(step)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = sum((summed_loss(model, toy) for toy in batch), torch.zeros(())) / count_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def train_at(stage: int, accumulation: int, zero: dict[str, Any]) -> tuple[list[float], list[float], Any]:
    engine = make_engine(stage, **zero)
    losses, norms = train_steps(engine, accumulation)
    shards = master_shards(engine)
    engine.close()
    return losses, norms, shards


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    return reference()


SETTINGS = [
    (0, {}), (1, {}), (2, {}), (3, {}), (1, OFFLOAD), (2, OFFLOAD), (3, OFFLOAD),
    (3, {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}),
]  # fmt: skip


def grid_case(*case: Any, fast: bool) -> Any:
    """A case of a grid that runs in the fast suite, or only in the exhaustive one."""
    return pytest.param(*case, marks=() if fast else pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("stage", "zero", "world", "accumulation"),
    [  # all pairs of settings, ranks and accumulation
        grid_case(*setting, world, accumulation, fast=(number + world + accumulation) % 2 == 0)
        for number, setting in enumerate(SETTINGS)
        for world in (1, 2)
        for accumulation in (1, 4)
    ],
)
def test_steps_equal_plain_torch(
    ranks: Any, expected: Any, stage: int, zero: Any, world: int, accumulation: int
) -> None:
    losses, norms, weights = expected
    results = ranks(world)(train_at, stage, accumulation, zero)
    for rank_losses, rank_norms, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-4)
    for name, values in assemble([part for *_, part in results]).items():
        expected_values = weights[name].flatten()
        assert (values - expected_values).norm() <= 1e-4 * expected_values.norm(), name


def train_and_compute_gradients(stage: int, zero: dict[str, Any], precision: str) -> tuple[list[float], Any, Any]:
    """Compute a gradient without a step before every step; then one more, whose shards are returned with the losses and
    the masters."""
    engine = make_engine(stage, precision, clip=0.01, **zero)  # so low that every step is clipped
    losses, shards_seen = [], []
    for step in range(STEPS):
        batches, count = micro_batches(step + 1, 2)
        engine.compute_gradients(summed_loss, batches, count, lambda _: None)
        losses += train_steps(engine, 1, step, step + 1)[0]
    batches, count = micro_batches(0, 2)
    engine.compute_gradients(
        summed_loss,
        batches,
        count,
        lambda shards: shards_seen.extend((f.name, f.start, f.gradient.clone()) for f in shards),
    )
    trained = master_shards(engine)
    engine.close()
    gradients: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, start, gradient in shards_seen:
        gradients.setdefault(name, []).append((start, gradient))
    return losses, gradients, trained


@pytest.mark.parametrize(
    ("stage", "zero", "precision"),
    [  # every stage, offload, small buckets, and both precisions where masters are the weights and where they are not
        *(grid_case(*setting, "fp32", fast=number in (1, 3, 5, 7)) for number, setting in enumerate(SETTINGS)),
        (0, {}, "bf16"), grid_case(2, {}, "bf16", fast=False), grid_case(3, {}, "bf16", fast=False),
    ],
)  # fmt: skip
def test_a_gradient_is_shown_whole_and_changes_nothing(ranks: Any, stage: int, zero: Any, precision: str) -> None:
    """The gradient equals that of plain torch at the engine's weights, unclipped. Training continues as without it."""
    results = ranks(2)(train_and_compute_gradients, stage, zero, precision)
    expected = ranks(2)(train_plainly, stage, zero, precision)
    for (losses, _, _), (plain_losses, _) in zip(results, expected, strict=True):
        assert losses == plain_losses
    trained = assemble([part for *_, part in results])
    for name, values in assemble([part for _, part in expected]).items():
        assert torch.equal(trained[name], values)
    gradients = assemble([part for _, part, _ in results[: 1 if stage == 0 else 2]])
    model = toy_backbone().build()
    for name, parameter in model.named_parameters():
        parameter.data = trained[name].view(parameter.shape)
    batch = sample_rows(0)
    (sum((summed_loss(model, toy) for toy in batch), torch.zeros(())) / count_targets(batch)).backward()
    expected_joined = torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None])
    joined = torch.cat([gradients[name] for name, _ in model.named_parameters()])
    assert float(expected_joined.norm()) > 0.1
    assert float((joined - expected_joined).norm()) <= (1e-4 if precision == "fp32" else 0.05) * float(
        expected_joined.norm()
    )


def train_plainly(stage: int, zero: dict[str, Any], precision: str) -> tuple[list[float], Any]:
    engine = make_engine(stage, precision, clip=0.01, **zero)
    losses = train_steps(engine)[0]
    result = master_shards(engine)
    engine.close()
    return losses, result


def train_lora(stage: int) -> tuple[list[float], Any]:
    built = toy_backbone()
    engine = Engine(
        {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}},
        build=built.build, read=built.weights.read, prepare=lambda m: inject_lora(m, LORA, 3),
        precision="fp32", weight_decay=0.1,
    )  # fmt: skip
    losses = train_steps(engine, 2)[0]
    result = master_shards(engine)
    engine.close()
    return losses, result


LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def expected_of_lora() -> tuple[list[float], dict[str, torch.Tensor]]:
    """peft's LoRA in plain torch, from the same initial values."""
    built = toy_backbone()
    model = built.build()
    load_parameters(model, built.weights.read)
    initial_values = {n: p.detach().clone() for n, p in inject_lora(copy.deepcopy(model), LORA, 3).named_parameters()}
    peft_config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(LORA.targets))
    model = peft.inject_adapter_in_model(peft_config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values[name])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        batch = sample_rows(step)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = sum((summed_loss(model, toy) for toy in batch), torch.zeros(())) / count_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_equals_plain_torch_and_peft(ranks: Any, expected_of_lora: Any, stage: int) -> None:
    losses, weights = expected_of_lora
    results = ranks(2)(train_lora, stage)
    for rank_losses, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
    merged = assemble([part for _, part in results])
    assert sorted(merged) == sorted(weights)
    for name, values in merged.items():
        assert (values - weights[name].flatten()).norm() <= 1e-4 * weights[name].norm(), name


def train_with_means_of_means(stage: int) -> list[float]:
    """The usual mistake: every rank averages over its own tokens, and the averages are averaged."""
    engine = make_engine(stage)
    losses = []
    for step in range(STEPS):
        batches, count = micro_batches(step, 1)
        wrong = count / (max(1, count_targets(batches)) * comm.world_size())
        total = (
            engine.step(lambda m, t, w=wrong: summed_loss(m, t) * w, batches, targets=count, lr=learning_rate(step))
            / wrong
        )
        losses.append((comm.all_reduce_sum(total) / count).item())
    engine.close()
    return losses


def test_the_usual_mean_of_means_is_caught(ranks: Any, expected: Any) -> None:
    losses = ranks(2)(train_with_means_of_means, 1)[0]
    assert losses[0] == pytest.approx(expected[0][0], rel=1e-5)  # before any step it is the same
    assert max(abs(a - b) / b for a, b in zip(losses, expected[0], strict=True)) > 1e-4  # ten times what parity allows


def reset_equals_fresh_engine(stage: int, precision: str) -> bool:
    """Train, write the first weights back, reset: the losses must be those of an engine just built."""
    engine = make_engine(stage, precision)
    start = {(f.name, f.start): f.master.clone() for f in engine.shards.local_shards()}
    zeros = {name: torch.zeros_like(value) for name, value in start.items()}
    first = train_steps(engine)[0]
    steps = engine.shards.step_count()
    engine.shards.restore_shards(lambda name, kind, at, _stop: (start if kind == "master" else zeros)[(name, at)], 0)
    engine.shards.reset_moments()
    again = train_steps(engine)[0]
    engine.close()
    return first == again and steps == STEPS


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        grid_case(stage, precision, fast=precision == ("bf16", "fp32", "bf16", "fp32")[stage])
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ],
)
def test_reset_equals_a_fresh_engine_bitwise(ranks: Any, stage: int, precision: str) -> None:
    assert ranks(2)(reset_equals_fresh_engine, stage, precision) == [True, True]


def old_moments_change_losses(stage: int) -> bool:
    engine = make_engine(stage)
    start = {(f.name, f.start): f.master.clone() for f in engine.shards.local_shards()}
    moments = {(f.name, f.start, kind): m for f in engine.shards.local_shards() for kind, m in f.moments.items()}
    first = train_steps(engine)[0]
    stored = {key: value.clone() for key, value in moments.items()}
    engine.shards.restore_shards(
        lambda name, kind, at, _stop: start[(name, at)] if kind == "master" else stored[(name, at, kind)],
        engine.shards.step_count(),
    )
    again = train_steps(engine)[0]
    engine.close()
    return first[0] == again[0] and first != again


def test_without_reset_the_old_moments_show(ranks: Any) -> None:
    assert ranks(2)(old_moments_change_losses, 2) == [True, True]


def largest_rounding(stage: int) -> float:
    """bf16: the model's weights are the rounded masters, on every rank."""
    engine = make_engine(stage, "bf16")
    train_steps(engine)
    parts = comm.all_gather_objects({(f.name, f.start): f.master.clone() for f in engine.shards.disjoint_shards()})
    worst = 0.0
    for name, parameter in engine.module.named_parameters():
        with gathered(parameter):
            flat = parameter.detach().flatten().clone()
        for (owner, start), master in itertools.chain.from_iterable(part.items() for part in parts):
            if owner == name:
                assert torch.equal(flat[start : start + len(master)], master.bfloat16())
                worst = max(worst, float((master - master.bfloat16()).abs().max()))
    engine.close()
    return worst


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_weights_are_the_rounded_masters(ranks: Any, stage: int) -> None:
    assert min(ranks(2)(largest_rounding, stage)) > 0.0  # masters do hold more than bf16


def write_then_step(stage: int) -> tuple[float, float, float]:
    """Write a bf16 weight between tasks, then make a step with lr=0. Returns the largest distances from the written
    values: right after writing, after the step, and before writing."""
    engine = make_engine(stage, "bf16")
    train_steps(engine, last=2)
    name = "model.layers.1.mlp.up_proj.weight"
    written = torch.randn(80 * 48, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    parameter: Any = dict(engine.module.named_parameters())[name]
    with gathered(parameter):
        before = parameter.detach().flatten().float().clone()
    engine.reset_optimizer(lambda tensor, _, start, stop: written[start:stop] if tensor == name else None)
    with gathered(parameter):
        at_once = parameter.detach().flatten().float().clone()
    batches, count = micro_batches(2, 1)
    engine.step(summed_loss, batches, targets=count, lr=0.0)
    with gathered(parameter):
        after = parameter.detach().flatten().float().clone()
    engine.close()
    return tuple(float((weights - written).abs().max()) for weights in (at_once, after, before))  # type: ignore[return-value]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_written_between_tasks_is_not_undone_by_the_next_step(ranks: Any, stage: int) -> None:
    for at_once, left, moved in ranks(2)(write_then_step, stage):
        assert at_once == left == 0.0
        assert moved > 1.0


def test_what_a_collective_sends_is_the_argument_that_deepspeed_has_there() -> None:
    """Checked in the source of DeepSpeed, because its methods are wrapped."""
    source = ast.parse(inspect.getsource(importlib.import_module("deepspeed.comm.torch")))
    backend = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "TorchBackend")
    methods = {node.name: node for node in backend.body if isinstance(node, ast.FunctionDef)}
    for name, (_, place, argument) in deepspeed_patches.COLLECTIVE_SIGNATURES.items():
        assert [each.arg for each in methods[name].args.args][1 + place] == argument, name


def full_weights_and_shards(stage: int) -> tuple[dict[str, torch.Tensor], Any]:
    engine = make_engine(stage)
    train_steps(engine, last=2)
    result = engine.shards.gather_full_weights(), master_shards(engine)
    engine.close()
    return result


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_tensors_are_put_together_of_all_ranks_parts(ranks: Any, stage: int) -> None:
    results = ranks(2)(full_weights_and_shards, stage)
    expected = assemble([parts for _, parts in results])
    for tensors, _ in results:
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name].flatten(), values) for name, values in expected.items())


def infinite_loss(model: Any, toy: Toy) -> torch.Tensor:
    """An infinite loss with the gradient of the finite one."""
    return summed_loss(model, toy) + float("inf")


def endless_slope(model: Any, toy: Toy) -> torch.Tensor:
    """A finite loss with an infinite gradient: that of a square root at zero."""
    loss = summed_loss(model, toy)
    return loss + (loss * 0.0).sqrt()


def skip_step(stage: int, precision: str, wrong: Any) -> tuple[bool, bool, bool]:
    """Make a step that is not finite on one rank only. Returns whether masters and moments stayed, whether later steps
    changed the masters, and whether their losses were numbers."""
    engine = make_engine(stage, precision)
    train_steps(engine, last=2)
    before = {(f.name, f.start): (f.master.clone(), f.moments["exp_avg"].clone()) for f in engine.shards.local_shards()}
    batches, count = micro_batches(2, 1)
    loss = wrong if comm.rank() == 1 else summed_loss
    engine.step(loss, batches, targets=count, lr=1e-2, skip_non_finite=True)
    unchanged = all(
        torch.equal(f.master, before[(f.name, f.start)][0])
        and torch.equal(f.moments["exp_avg"], before[(f.name, f.start)][1])
        for f in engine.shards.local_shards()
    )
    losses = train_steps(engine, first=2)[0]
    moved = any(not torch.equal(f.master, before[(f.name, f.start)][0]) for f in engine.shards.local_shards())
    engine.close()
    return unchanged, moved, all(value == value for value in losses)


@pytest.mark.parametrize(
    ("stage", "precision", "wrong"),
    [  # all pairs
        grid_case(stage, precision, wrong, fast=(stage + bits + slope) % 2 == 0)
        for stage in (0, 1, 2, 3)
        for bits, precision in enumerate(("fp32", "bf16"))
        for slope, wrong in enumerate((infinite_loss, endless_slope))
    ],
)
def test_a_step_can_be_skipped(ranks: Any, stage: int, precision: str, wrong: Any) -> None:
    assert ranks(2)(skip_step, stage, precision, wrong) == [(True, True, True)] * 2


def fingerprints(stage: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    engine = make_engine(stage)
    first, again = engine.shards.weight_fingerprints(), engine.shards.weight_fingerprints()
    assert first == again
    with torch.no_grad():
        for fragment in engine.shards.local_shards():
            if fragment.name.endswith("layers.1.mlp.up_proj.weight") and fragment.start == 0:
                fragment.master[0] += 1e-7
    touched = engine.shards.weight_fingerprints()
    train_steps(engine, last=1)
    moved = engine.shards.weight_fingerprints()
    engine.close()
    return first, touched, moved


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fingerprints_show_which_tensor_moved(ranks: Any, stage: int) -> None:
    results = ranks(2)(fingerprints, stage)
    assert results[0] == results[1]
    first, touched, moved = results[0]
    changed = [name for name in first if first[name] != touched[name]]
    assert [name.split(".", 1)[1] for name in changed] == ["layers.1.mlp.up_proj.weight"]
    assert all(moved[name] != first[name] for name in first)


def test_weights_do_not_depend_on_how_they_are_read() -> None:
    built = toy_backbone()
    model = built.build()
    load_parameters(model, built.weights.read)
    other = copy.deepcopy(model)

    def in_halves(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        middle = (start + stop) // 2
        return torch.cat(
            [built.weights.read(name, shape, start, middle), built.weights.read(name, shape, middle, stop)]
        )

    load_parameters(other, in_halves)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_killed_build_does_not_block_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for ever while the lock file exists, even if the process that created it is dead."""
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "lock").touch()
    lock_seen = []

    class Builder:
        def create_op_builder(self, name: str) -> Builder:
            return self

        def load(self) -> None:
            lock_seen.append((folder / "lock").exists())

    monkeypatch.setattr(deepspeed_patches, "_get_build_directory", lambda name, verbose: str(folder))
    monkeypatch.setattr(deepspeed_patches, "get_accelerator", Builder)
    deepspeed_patches.build_shm_extension()
    assert lock_seen == [False]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[003-006,9]", "gpu003"),
        ("a7,b[1-2]", "a7"),
        ("n[1-2]-ib", "n1-ib"),
        ("n[07,9]-ib.example.org,m1", "n07-ib.example.org"),
        ("rack[2-3]node[00-15],rack9node1", "rack2node00"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_ranks_that_srun_started_are_joined(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")  # so that it is restored
        monkeypatch.delenv(name)
    slurm = {"STEP_NUM_TASKS": "16", "STEP_NODELIST": nodes, "PROCID": "9", "LOCALID": "1", "JOB_ID": "1234567"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    comm._join_slurm()
    assert (comm.rank(), comm.world_size(), comm.local_rank()) == (9, 16, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "24567")


def record_squared_gradients(module: nn.Module, squared_gradients: list[float]) -> torch.utils.hooks.RemovableHandle:
    """Append the squared gradient norms of a projection's output to a list."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: squared_gradients.append(float(gradient.square().sum())))

    return module.get_submodule("model.layers.0.mlp.gate_proj").register_forward_hook(hook)


def probed_between_steps(stage: int, probing: bool) -> tuple[list[float], list[float]]:
    engine = make_engine(stage, stage3_param_persistence_threshold=100)
    losses: list[float] = []
    squared_gradients: list[float] = []
    for step in range(3):
        losses += train_steps(engine, 2, step, step + 1)[0]
        if probing:
            handle = record_squared_gradients(engine.module, squared_gradients)
            for back in (True, False):
                engine.probe_activations(lambda model: summed_loss(model, join_rows(sample_rows(7))), back)
            handle.remove()
    assert all(p.requires_grad for p in engine.module.parameters())
    assert engine.module.training
    engine.close()
    return losses, squared_gradients


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_probe_is_felt_by_hooks_and_by_nothing_else(ranks: Any, expected: Any, stage: int) -> None:
    plain, probed = (ranks(2)(probed_between_steps, stage, probing) for probing in (False, True))
    assert [losses for losses, _ in probed] == [losses for losses, _ in plain]
    model, expected_gradients = toy_backbone().build(), []
    load_parameters(model, toy_backbone().weights.read)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(0), weight_decay=0.1)
    (sum(summed_loss(model, toy) for toy in sample_rows(0)) / count_targets(sample_rows(0))).backward()  # type: ignore[union-attr]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    record_squared_gradients(model, expected_gradients)
    summed_loss(model, join_rows(sample_rows(7))).backward()
    for _, squared_gradients in probed:
        assert len(squared_gradients) == 3  # one for each step: without `back` there is no gradient
        assert squared_gradients[0] == pytest.approx(expected_gradients[0], rel=1e-4)
