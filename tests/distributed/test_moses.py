"""MoSEs on real ranks: earlier tasks keep their answers bitwise, ranks may choose different experts, a kill loses
nothing."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from dscl.cli import app
from dscl.config.methods import MosesPreset
from dscl.config.parts import OracleRouterConfig, SubExpertsConfig
from dscl.data.batches import PromptBatch, collate_prompts
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.zero_layouts import load_parameters
from dscl.maths import gates, grouped
from dscl.methods import moses
from dscl.methods.base import RunInfo
from dscl.methods.moses import Moses
from dscl.methods.osft import Osft
from dscl.methods.task_router import TaskRouter
from dscl.model import generation
from dscl.model.adapters import sub_experts
from dscl.model.adapters.sub_expert_bank import SubExpertBank
from dscl.model.adapters.sub_experts import SubExpertLinear
from dscl.model.adapters.task_masks import read_task_masks
from dscl.model.backbone import ModelConfig
from dscl.recipe.recipe import resolve_recipe
from dscl.training import run as training_run
from dscl.training.checkpoint import Checkpoints
from dscl.training.setup import build_setup
from dscl.training.state import TrainState
from dscl.training.task_context import build_task_context
from tests.support.five_tasks import LABELS, words_of
from tests.support.osft_runs import constraint_error, group_by_matrix, read_checkpoint_tensors, with_few_texts
from tests.support.runs import (
    read_metrics,
    recipe_of,
    run,
    run_error,
    run_killed_after,
    run_outcome,
    run_until,
    run_until_killed,
)
from tests.support.toy_model import (
    OFFLOAD,
    VOCABULARY,
    Toy,
    assemble,
    count_targets,
    gathered,
    join_rows,
    master_shards,
    summed_loss,
    toy_backbone,
)

Tensors = dict[str, torch.Tensor]
Stretches = dict[str, list[tuple[int, torch.Tensor]]]
TASKS = ("first", "second", "third")
STEPS = 3
SMALL = {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}
# AdamW's eps in the comparison with plain torch. With the default of 1e-8 the first step of an entry is the sign of its
# gradient, and where the gradient is nearly zero, rounding decides the sign. With an eps of the gradients' own size the
# step is proportional to the gradient, so that a wrong scale of a gradient is noticed as well.
EPS = 1e-4
EMBEDDING_OFFSET = 1.0  # how far the embeddings of the tokens' two halves are apart, to either side


# ---- the engine, on rows of random tokens


def named_generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def initial_values(task: str, name: str, shape: torch.Size) -> torch.Tensor:
    """The initial values of a trainable tensor. B is not zero, so that every parameter has a gradient from the first
    step. The router sends the tokens of each half of the vocabulary to experts of their own."""
    values = torch.randn(shape, generator=named_generator(f"{task}:{name}")) * (0.5 if "score" in name else 0.1)
    if name.endswith("token_router"):
        values[::2, 0] += 1.0
        values[1::2, 0] -= 1.0
    return values


def base_values(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    values = toy_backbone().weights.read(name, shape, 0, math.prod(shape)).view(shape)
    if name == "model.embed_tokens.weight":
        values[:, 0] = EMBEDDING_OFFSET
        values[VOCABULARY // 2 :, 0] = -EMBEDDING_OFFSET
    return values.flatten()[start:stop]


def sample_half_rows(step: int) -> list[Toy]:
    """Rows with tokens of the first and of the second half of the vocabulary in turn. Every second step has one row
    fewer, and the first rank has more targets."""
    generator, samples = torch.Generator().manual_seed(step), []
    for index in range(8 - step % 2):
        ids = torch.randint(VOCABULARY // 2, (1, 10), generator=generator) + VOCABULARY // 2 * (index % 2)
        labels = ids.clone()
        labels[:, : 3 + 5 * (index % 2)] = -100
        samples.append(Toy(ids, labels))
    return samples


def rank_micro_batches(step: int, accumulation: int) -> tuple[list[Toy], int]:
    samples = sample_half_rows(step)
    local_samples = samples[comm.rank() :: comm.world_size()]
    size = -(-len(samples) // (comm.world_size() * accumulation))
    filler = torch.full((1, 10), VOCABULARY // 2 * comm.rank())  # a token of this rank's half
    parts = [
        local_samples[i * size : (i + 1) * size] or [Toy(filler, torch.full_like(filler, -100))]
        for i in range(accumulation)
    ]
    return [join_rows(part) for part in parts], count_targets(samples)


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


class Silent:
    def show_activity(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Kind:
    """Settings of the sub-experts in these tests."""

    masks: str = "rank1"
    top: int = 1
    targets: tuple[str, ...] = ("v_proj", "gate_proj", "up_proj")
    reuse: bool = True
    sort: bool = False  # tokens by expert, whatever the size
    again: bool = False  # activation checkpointing

    def config(self) -> SubExpertsConfig:
        return SubExpertsConfig(
            masks=self.masks, top_k=self.top, targets=self.targets, reuse=self.reuse,
            num_experts=4, max_experts=8, rank=4 if self.sort else 2, mask_density=0.6, alpha=3.0,
        )  # fmt: skip


def build_engine(kind: Kind, stage: int, zero: dict[str, Any], precision: str = "fp32") -> tuple[Engine, Moses]:
    config = MosesPreset(tune=kind.config(), router=OracleRouterConfig())
    method = Moses(config, RunInfo(0, TASKS, "", "", "", 0, precision))
    plain = toy_backbone({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    engine = Engine(
        {"zero_optimization": {"stage": stage, **zero}},
        build=replace(plain, config=ModelConfig(shape={}, activation_checkpointing=kind.again)).build,
        read=base_values,
        prepare=method.prepare,
        precision=precision,
        weight_decay=0.1,
        grad_clip=1.0,
    )
    return engine, method


def train_task(engine: Engine, method: Moses, index: int, accumulation: int = 1) -> list[float]:
    """All steps of a task, without its `end_task`."""
    name = TASKS[index]
    method.begin_task(index, name, build_task_context(engine, None, Silent(), TrainState(), ""))  # type: ignore[arg-type]
    engine.reset_optimizer(lambda own, shape, start, stop: initial_values(name, own, shape).flatten()[start:stop])
    losses = []
    for step in range(STEPS):
        batches, count = rank_micro_batches(10 * index + step, accumulation)
        total = engine.step(summed_loss, batches, targets=count, lr=rate(step))
        losses.append((comm.all_reduce_sum(total) / count).item())
    return losses


def end_task(engine: Engine, method: Moses, index: int) -> None:
    method.end_task(index, TASKS[index], build_task_context(engine, None, Silent(), TrainState(), ""))  # type: ignore[arg-type]


# ---- against a loop over experts in plain torch, in one process


class LoopedExperts(nn.Module):
    """The sub-expert layer as a plain loop over experts. Frozen values are inserted explicitly."""

    def __init__(self, plain: nn.Linear, config: SubExpertsConfig) -> None:
        super().__init__()
        self.plain, self.config = plain, config
        most, size = config.max_experts or 0, (config.max_experts or 0) * config.rank
        self.sub_a = nn.Parameter(torch.zeros(size, plain.in_features))
        self.sub_b = nn.Parameter(torch.zeros(plain.out_features, size))
        if config.masks == "rank1":
            self.score_rank1 = nn.Parameter(torch.zeros(size))
        else:
            self.score_a = nn.Parameter(torch.zeros_like(self.sub_a))
            self.score_b = nn.Parameter(torch.zeros_like(self.sub_b))
        self.token_router = nn.Parameter(torch.zeros(most, plain.in_features))
        self.fixed = [torch.zeros_like(p, dtype=torch.bool) for p in (self.sub_a, self.sub_b)]
        self.values = [torch.zeros_like(p) for p in (self.sub_a, self.sub_b)]
        self.num_used_experts = config.num_experts

    def mask(self, score: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        """The 0/1 mask of the entries with the largest scores; its gradient is that of the absolute scores."""
        first = score.numel() // (self.config.max_experts or 1) * self.config.num_experts
        count = math.floor(self.config.mask_density * first + 1e-9)
        order = torch.where(usable, score.detach().abs(), -torch.ones(())).flatten().argsort(descending=True)
        hard = torch.zeros(score.numel())
        hard[order[:count]] = 1.0
        return hard.view(score.shape) + (score.abs() - score.abs().detach()) * usable

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        used_rows = torch.arange(len(self.sub_a)) < self.num_used_experts * self.config.rank
        if self.config.masks == "rank1":
            usable = used_rows if self.config.reuse else used_rows & ~self.fixed[0][:, 0]
            return self.mask(self.score_rank1, usable)[:, None], torch.ones(())
        usable_a, usable_b = used_rows[:, None].expand(self.sub_a.shape), used_rows.expand(self.sub_b.shape)
        if not self.config.reuse:
            usable_a, usable_b = usable_a & ~self.fixed[0], usable_b & ~self.fixed[1]
        return self.mask(self.score_a, usable_a), self.mask(self.score_b, usable_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, (mask_a, mask_b), config = self.plain(x), self.masks(), self.config
        # The trained value behind a frozen entry is unused; weight decay may change it.
        a, b = (
            torch.where(fixed, value, free)
            for fixed, value, free in zip(self.fixed, self.values, (self.sub_a, self.sub_b), strict=True)
        )
        a, b = a * mask_a, b * mask_b
        share = functional.linear(x, self.token_router[: self.num_used_experts]).softmax(-1)
        chosen = share.topk(config.top_k or 0).indices
        for e in range(self.num_used_experts):
            columns = slice(e * config.rank, (e + 1) * config.rank)
            weight = share[..., e] * (chosen == e).any(-1) * config.num_experts * config.alpha / config.rank
            y = y + weight[..., None] * (x @ a[columns].T @ b[:, columns].T)
        return y

    @torch.no_grad()
    def freeze(self) -> None:
        """Freeze the entries that the mask selects and that no earlier task has frozen."""
        mask_a, mask_b = (mask.round().bool() for mask in self.masks())
        selected = [mask_a.expand(self.sub_a.shape), mask_b.expand(self.sub_b.shape)]
        if self.config.masks == "rank1":
            selected[1] = mask_a[:, 0].expand(self.sub_b.shape)
        for side, trained in enumerate((self.sub_a, self.sub_b)):
            new = selected[side] & ~self.fixed[side]
            self.values[side][new] = trained[new]
            self.fixed[side] |= selected[side]

    def grow(self) -> None:
        """Use so many experts that the mask finds enough entries that are not frozen."""
        fixed, scores = (self.fixed[0][:, 0],), ("score_rank1",)
        if self.config.masks == "element":
            fixed, scores = tuple(self.fixed), ("score_a", "score_b")
        for frozen, score in zip(fixed, scores, strict=True):
            entries_per_expert = getattr(self, score).numel() // (self.config.max_experts or 1)
            needed = math.floor(self.config.mask_density * entries_per_expert * self.config.num_experts + 1e-9) + int(
                frozen.sum()
            )
            self.num_used_experts = max(self.num_used_experts, math.ceil(needed / entries_per_expert))


@dataclass
class Result:
    losses: list[list[float]] = field(default_factory=list)
    trained: list[Any] = field(default_factory=list)  # at the end of each task
    frozen: list[Tensors] = field(default_factory=list)  # the frozen parameters, at the end of each task
    chosen_experts: dict[str, set[int]] = field(default_factory=dict)  # by layer, over all tokens
    num_used_experts: list[int] = field(default_factory=list)


@functools.cache
def reference(kind: Kind) -> Result:
    model = toy_backbone().build()
    load_parameters(model, base_values)
    model.requires_grad_(False)
    layers = {}
    for name, plain in list(model.named_modules()):
        if name.endswith(kind.targets):
            layers[name] = LoopedExperts(plain, kind.config())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layers[name])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = Result()
    for index, task in enumerate(TASKS):
        for layer in layers.values():
            layer.grow()
        num_used = max(layer.num_used_experts for layer in layers.values())
        for layer in layers.values():
            layer.num_used_experts = num_used
        for name, p in trained.items():
            p.data = initial_values(task, name, p.shape)
        optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.1, eps=EPS)
        result.losses.append([])
        for step in range(STEPS):
            batch = sample_half_rows(10 * index + step)
            optimizer.param_groups[0]["lr"] = rate(step)
            loss = summed_loss(model, join_rows(batch)) / count_targets(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            result.losses[-1].append(loss.item())
        for layer in layers.values():
            layer.freeze()
        result.trained.append({name: p.detach().clone() for name, p in trained.items()})
        frozen = {f"{name}.{side}": layer.values[s] for name, layer in layers.items() for s, side in enumerate("ab")}
        result.frozen.append({name: values.clone() for name, values in frozen.items()})
        result.num_used_experts.append(num_used)
    return result


def train_on_rank(kind: Kind, stage: int, zero: dict[str, Any], accumulation: int) -> Result:
    """Train all tasks with the engine, on this rank."""
    result = Result()
    select_experts, running_layer = gates.select_experts, [""]

    def record_choices(logits: torch.Tensor, top: int, *expert_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares, chosen = select_experts(logits, top, *expert_mask)
        result.chosen_experts.setdefault(running_layer[0], set()).update(chosen.flatten().tolist())
        return shares, chosen

    engine, method = build_engine(kind, stage, zero)
    for group in engine.optimizer.param_groups:
        group["eps"] = EPS
    for name, layer in method.experts.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: running_layer.__setitem__(0, name))
    with pytest.MonkeyPatch.context() as patch:
        for place in (gates, sub_experts):
            patch.setattr(place, "select_experts", record_choices)
        patch.setattr(grouped, "grouped_is_faster", lambda *_: kind.sort)
        for index in range(len(TASKS)):
            result.losses.append(train_task(engine, method, index, accumulation))
            end_task(engine, method, index)
            result.trained.append(master_shards(engine))
            layers = method.experts.layers.items()
            frozen = {f"{name}.{side}": getattr(layer, f"frozen_{side}") for name, layer in layers for side in "ab"}
            result.frozen.append({name: values.clone() for name, values in frozen.items()})
            result.num_used_experts.append(method.experts.num_used_experts)
    engine.close()
    return result


def check_parity(results: list[Result], expected: Result) -> None:
    for result in results:
        for ours, theirs in zip(result.losses, expected.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert result.num_used_experts == expected.num_used_experts
        for ours, theirs in zip(result.frozen, expected.frozen, strict=True):
            assert sorted(ours) == sorted(theirs)
            for name, values in theirs.items():
                assert torch.equal(ours[name] != 0, values != 0), name  # the same is frozen
                assert (ours[name] - values).norm() <= 1e-5 * values.norm(), name
    for index, weights in enumerate(expected.trained):
        merged = assemble([result.trained[index] for result in results])
        assert sorted(merged) == sorted(weights)
        for name, values in merged.items():
            assert (values - weights[name].flatten()).norm() <= 1e-5 * weights[name].norm(), name
        joined, expected_joined = (
            torch.cat([tensors[name].flatten() for name in sorted(merged)]) for tensors in (merged, weights)
        )
        assert (joined - expected_joined).norm() <= 1e-6 * expected_joined.norm()


ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ELEMENT = Kind(masks="element")


EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("world", "stage", "zero", "kind"),
    [
        (1, 0, {}, Kind(top=2, targets=ALL_TARGETS)),
        (1, 3, SMALL, Kind("element", 3, ALL_TARGETS)),
        (2, 1, {}, Kind(top=2, targets=ALL_TARGETS, reuse=False)),
        (2, 3, {**OFFLOAD, **SMALL}, Kind(top=2, sort=True)),
        (2, 2, {}, Kind("element", 4, ALL_TARGETS, reuse=False)),
    ],
)
def test_tasks_equal_a_loop_over_experts(ranks: Any, world: int, stage: int, zero: dict[str, Any], kind: Kind) -> None:
    """Three tasks, each with a fresh AdamW, the frozen parameters of earlier tasks, and added experts."""
    expected = reference(kind)
    check_parity(ranks(world)(train_on_rank, kind, stage, zero, 1), expected)
    assert expected.num_used_experts[-1] > expected.num_used_experts[0] == 4


@pytest.mark.parametrize(
    ("stage", "zero", "kind", "accumulation"),
    [
        (0, {}, Kind(), 4),
        (1, {}, ELEMENT, 1),
        (2, OFFLOAD, Kind(sort=True), 4),
        (3, SMALL, Kind("element", again=True), 1),
        *(
            pytest.param(stage, zero, kind, accumulation, marks=EXHAUSTIVE)
            for stage, zero, kind, accumulations in (
                (0, {}, Kind(), (1,)),
                (1, {}, ELEMENT, (4,)),
                (1, {}, Kind(), (1, 4)),
                (2, {}, Kind(), (1, 4)),
                (2, {}, ELEMENT, (1, 4)),
                (2, {}, Kind(sort=True), (1, 4)),
                (3, SMALL, Kind(), (1, 4)),
                (3, SMALL, Kind("element", again=True), (4,)),
            )
            for accumulation in accumulations
        ),
    ],
)
def test_ranks_that_choose_different_experts_learn_as_one(
    ranks: Any, stage: int, zero: dict[str, Any], kind: Kind, accumulation: int
) -> None:
    """No expert gets tokens of both ranks. With one module per expert, ranks would fill gradient buckets in different
    orders."""
    results = ranks(2)(train_on_rank, kind, stage, zero, accumulation)
    check_parity(results, reference(kind))
    assert len(results[0].chosen_experts) == 2 * 3
    for name, experts_here in results[0].chosen_experts.items():
        assert experts_here, name
        assert results[1].chosen_experts[name], name
        assert not experts_here & results[1].chosen_experts[name], name


# ---- nothing is forgotten


def prompt_batch() -> PromptBatch:
    generator = torch.Generator().manual_seed(7)
    return collate_prompts([torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (9, 4, 11, 7)], 0)


@torch.no_grad()
def batch_logits(engine: Engine, batch: PromptBatch) -> torch.Tensor:
    answer: torch.Tensor = engine.module(batch.input_ids, batch.attention_mask, batch.position_ids).logits
    return answer


def overwrite_and_store(self: SubExpertLinear, slot: int, masks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """`_store_masks`, if freezing a task's parameters overwrites those of earlier tasks."""
    for name in masks:
        getattr(self, f"frozen_mask_{name}").zero_()
    return STORE_MASKS(self, slot, masks)


STORE_MASKS = SubExpertLinear._store_masks


def train_and_compare_logits(
    kind: Kind, stage: int, precision: str, broken: str = ""
) -> tuple[list[tuple[int, int, float]], list[float], int]:
    """Train all tasks. Returns the changes of earlier tasks' logits after each task, the relative distance between the
    logits of each task before and after its `end_task`, and the final number of experts."""
    changes, gaps, first_logits = [], [], {}
    batch = prompt_batch()
    with pytest.MonkeyPatch.context() as patch:
        if broken == "frozen":
            patch.setattr(sub_experts, "merge_frozen_params", lambda _mask, _frozen, trained: trained)
        if broken == "freeze":
            patch.setattr(SubExpertLinear, "_store_masks", overwrite_and_store)
        engine, method = build_engine(kind, stage, SMALL if stage == 3 else {}, precision)
        for index in range(len(TASKS)):
            train_task(engine, method, index)
            engine.module.train()
            trained = batch_logits(engine, batch)
            end_task(engine, method, index)
            engine.module.eval()
            for earlier in TASKS[: index + 1]:
                with method.inference_context(batch, earlier):
                    answered = batch_logits(engine, batch)
                if earlier in first_logits:
                    changes.append((index, TASKS.index(earlier), float((answered - first_logits[earlier]).abs().max())))
                else:
                    gaps.append(float((answered - trained).float().norm() / trained.float().norm()))
                    first_logits[earlier] = answered
        difference = min(
            float((first_logits[a] - first_logits[b]).abs().max()) for a, b in itertools.combinations(TASKS, 2)
        )
        assert difference > 1e-2  # tasks answer differently
        count = method.experts.num_used_experts
        engine.close()
    return changes, gaps, count


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [
        (0, "bf16", Kind(top=2)),
        (1, "fp32", Kind("element", targets=ALL_TARGETS)),
        (2, "fp32", Kind(top=3, reuse=False)),
        (3, "bf16", Kind("element", 2)),
        *(
            pytest.param(*case, marks=EXHAUSTIVE)
            for case in (
                (0, "fp32", Kind(top=2, targets=ALL_TARGETS)),
                (2, "fp32", Kind(top=3, targets=ALL_TARGETS, reuse=False)),
                (3, "fp32", Kind(targets=ALL_TARGETS)),
                (3, "fp32", Kind("element", 2)),
                (1, "bf16", Kind("element")),
                (2, "bf16", Kind(top=2)),
                (3, "bf16", Kind(top=2)),
            )
        ),
    ],
)
def test_no_bit_of_an_earlier_task_moves(ranks: Any, stage: int, precision: str, kind: Kind) -> None:
    """With weight decay, clipping and added experts. After `end_task` a task answers as at the end of its training."""
    for changes, gaps, count in ranks(2)(train_and_compare_logits, kind, stage, precision):
        assert [(after, task) for after, task, _ in changes] == [(1, 0), (2, 0), (2, 1)]
        assert all(change == 0.0 for *_, change in changes)
        assert max(gaps) <= (1e-5 if precision == "fp32" else 2e-2)
        assert count > 4


@pytest.mark.parametrize("masks", ["rank1", "element"])
def test_without_freezing_it_would_be_noticed(ranks: Any, masks: str) -> None:
    kind = Kind(masks, 2)
    for changes, _, _ in ranks(2)(train_and_compare_logits, kind, 2, "fp32", "freeze"):
        assert max(change for *_, change in changes) > 1e-3
    for changes, gaps, _ in ranks(2)(train_and_compare_logits, kind, 2, "fp32", "frozen"):
        assert gaps[0] <= 1e-5  # nothing was frozen yet
        assert min(gaps[1:]) > 1e-3
        assert all(change == 0.0 for *_, change in changes)  # inference uses the stored parameters


# ---- whole runs of three tasks, each with words of its own


SIZES = {"colour": 33, "animal": 20, "weather": 26}
TUNE = {"num_experts": 2, "rank": 2, "mask_density": 0.75}
ROUTER = {"layer": 1, "num_features": 64, "ood_fallback": False}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moses")
    for task, size in SIZES.items():
        generator, words = random.Random(task), words_of(task)
        (folder / task).mkdir()
        (folder / task / "labels.json").write_text(json.dumps(LABELS))
        for split, count in (("train", size), ("test", 9)):
            texts = [generator.choices(words, k=generator.randint(3, 9)) for _ in range(count)]
            records = [{"label": LABELS[words.index(t[0]) % 3], "sentence": " ".join(t)} for t in texts]
            (folder / task / f"{split}.json").write_text(json.dumps(records))
    return folder


def recipe(
    folder: Path, name: str, stage: int = 0, tensorboard: bool = False, tune: Any = None, **parts: Any
) -> dict[str, Any]:
    """A recipe of three tasks (4, 3 and 3 steps), evaluated at the end. `tune` adds keys to TUNE; `parts` adds
    parts."""
    document = recipe_of(folder, name, stage, train__epochs=1, train__lr=2e-2, train__weight_decay=0.1)
    document["method"] = {"name": "moses", "tune": {**TUNE, **(tune or {})}, "router": ROUTER, **parts}
    document["stream"] = [{"name": task, "path": str(folder / task)} for task in SIZES]
    document["evaluate"] = {"zero_shot": False, "tasks": "seen", "batch": 9, "every": len(SIZES)}
    document["observe"]["tensorboard"] = tensorboard
    return document


ORACLE = {"router": "oracle"}
KEY = {"router": {"name": "key", "layer": 1}}
DENSE = {
    "constraint": {
        "name": "osft", "protect_base": ["weights"], "protected_ratio": 0.25, "protect_task": ["updates"],
        "energy_threshold": 0.5,
    }
}  # fmt: skip


def artifact_checksums(run_dir: Path) -> dict[str, str]:
    """The checksums of the artifacts of ended tasks, by path."""
    files = sorted(p for kind in ("experts", "router") for p in run_dir.glob(f"{kind}/*"))
    assert files
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_scores(run_dir: Path) -> Any:
    return json.loads((run_dir / "scores.json").read_text())


@pytest.mark.parametrize(("stage", "masks"), [(3, "rank1"), (0, "element")])
def test_told_the_task_every_score_stays(ranks: Any, tasks: Path, stage: int, masks: str) -> None:
    document = recipe(tasks, f"given{stage}", stage, tune={"masks": masks})
    document["evaluate"] |= {"oracle_task_id": True, "every": 1}
    ranks(2)(run, document)
    oracle_scores = read_scores(tasks / f"given{stage}")["oracle_task_id"]
    for task in range(len(SIZES)):
        assert len({row[task] for row in oracle_scores["matrix"][task:]}) == 1
    assert oracle_scores["summary"]["BWT"] == 0.0
    assert oracle_scores["summary"]["forgetting"] == 0.0
    repeated = json.loads(ranks(2)(eval_output, tasks / f"given{stage}", ["evaluate.oracle_task_id=true"])[0])
    assert list(repeated["oracle_task_id"].values()) == oracle_scores["matrix"][-1]


def eval_output(run_dir: Path, words: list[str]) -> str:
    output = StringIO()
    with redirect_stdout(output):
        training_run.evaluate_run(str(run_dir), words)
    return output.getvalue()


# ---- rows of several tasks in one batch


def compare_mixed_batch(document: dict[str, Any], inferred: bool) -> tuple[float, float, int, Any]:
    """After a run is restored: compare a batch with rows of all tasks with one batch per task."""
    run(document)
    recipe = resolve_recipe(document)
    setup = build_setup(recipe)
    engine = setup.build_engine()
    newest = Checkpoints(recipe.run_folder / "checkpoints", recipe.checkpoint).find_newest()
    assert newest is not None
    training_run.restore_checkpoint(newest, engine, setup)
    method, module, pad = setup.method, engine.module.eval(), setup.tasks[0].pad_id
    assert isinstance(method, Moses)
    names = [task_data.task.name for task_data in setup.tasks]
    prompts = [task_data.eval_set.prompt_ids[i] for i in range(3) for task_data in setup.tasks]

    def inference(batch: PromptBatch, task_names: list[str]) -> Any:
        slots = [method.experts.get_slot(name) for name in task_names]
        return method.inference_context(batch) if inferred else method.routing.use_slots(slots, method.template)

    def answer_rows(rows: list[int]) -> tuple[torch.Tensor, Any, Any]:
        batch = collate_prompts([prompts[r] for r in rows], pad, setup.tasks[0].bos_id)
        task_names = [names[r % len(names)] for r in rows]
        with inference(batch, task_names) as routes:
            answer = module(batch.input_ids, batch.attention_mask, batch.position_ids).logits[:, -1]
        with inference(batch, task_names):
            return answer, routes, generation.generate(module, batch, 4, -1, pad)

    with torch.no_grad():
        answers, routes, tokens = answer_rows(list(range(9)))
        batch = collate_prompts(prompts, pad, setup.tasks[0].bos_id)
        base_answers = module(batch.input_ids, batch.attention_mask, batch.position_ids).logits[:, -1]
        error, different = 0.0, 0
        for task in range(3):
            rows = list(range(task, 9, 3))
            alone, own_routes, own_tokens = answer_rows(rows)
            error = max(error, float((alone - answers[rows]).abs().max()))
            different += own_tokens != [tokens[r] for r in rows]
            different += inferred and own_routes != [routes[r] for r in rows]
        effect = min(float((base_answers - answers)[row].abs().max()) for row in range(9))
    engine.close()
    return error, effect, different, routes


@pytest.mark.parametrize(
    ("stage", "masks", "inference"),
    [(0, "element", KEY), (1, "rank1", {}), (2, "element", ORACLE), pytest.param(3, "rank1", KEY, marks=EXHAUSTIVE)],
)
def test_a_batch_of_all_tasks_equals_a_batch_of_each(
    ranks: Any, tasks: Path, stage: int, masks: str, inference: dict[str, Any]
) -> None:
    document = recipe(tasks, f"mixed{stage}", stage, tune={"masks": masks}, **inference)
    for error, effect, different, routes in ranks(2)(compare_mixed_batch, document, inference is not ORACLE):
        assert error <= 1e-5
        assert effect > 1e-3  # the sub-experts of every row do something
        assert different == 0
        if inference is not ORACLE:
            num_correct = sum(route == task for route, task in zip(routes, list(SIZES) * 3, strict=True))
            assert num_correct >= 7, routes


# ---- a kill anywhere


PLACES: dict[str, Any] = {
    "begin": (Moses, "begin_task"),
    "step": (Engine, "step"),
    "freeze": (SubExpertBank, "freeze_task_params"),  # the frozen parameters are only in memory
    "end": (Moses, "end_task"),
    "ended": (training_run.Observer, "log_task_summary"),  # the task's last record stands in metrics.jsonl
    "write": (moses, "write_task_masks"),  # only the task's masks are written
    "left": (Checkpoints, "write_task_artifacts"),  # all artifacts are written, but no checkpoint lists them
    "save": (Checkpoints, "save"),
}


def killed_around(document: dict[str, Any], deaths: list[tuple[str, int]]) -> None:
    run_killed_after(document, deaths, PLACES)


AROUND = [("begin", 1), ("step", 2), ("freeze", 1), ("end", 1), ("left", 1), ("save", 1), ("begin", 1), ("left", 1)]
BETWEEN = [("ended", 1), ("write", 1), ("freeze", 1), ("write", 1), ("save", 1), ("write", 1)]
ANYWHERE = [("step", 2), ("take", 1), ("shares", 2), ("save", 2), ("gather", 2)]


@EXHAUSTIVE
@pytest.mark.parametrize(
    ("world", "stage", "method", "killed", "deaths"),
    [
        (2, 0, {"tune": {"masks": "element", "top_k": 1}}, killed_around, AROUND),
        (2, 3, KEY, killed_around, AROUND),
        (1, 2, {"tune": {"masks": "element"}, **ORACLE}, killed_around, BETWEEN),
        (2, 1, {"tune": {"dropout": 0.2, "gate": "uniform"}}, run_until, ANYWHERE),
    ],
)
def test_a_run_that_died_ends_as_one_that_did_not(
    ranks: Any, tasks: Path, world: int, stage: int, method: dict[str, Any], killed: Callable[..., None], deaths: Any
) -> None:
    """The metrics, scores, checkpoint and artifacts are the same, so nothing is frozen twice. Experts are added on the
    way."""
    whole, died = (recipe(tasks, f"{kind}{world}{stage}", stage, True, **method) for kind in ("whole", "died"))
    for document in (whole, died):
        document["evaluate"] |= {"oracle_task_id": method.get("router") != "oracle", "every": 1}
        if not document["evaluate"]["oracle_task_id"]:
            del document["evaluate"]["oracle_task_id"]
    ranks(world)(run, whole)
    ranks(world)(killed, died, deaths)
    first, second = Path(whole["run_dir"]), Path(died["run_dir"])
    assert run_outcome(second) == run_outcome(first)
    assert artifact_checksums(second) == artifact_checksums(first)
    num_experts = [int(next(iter(read_masks(first, task).layers.values()))["expert_mask"].sum()) for task in SIZES]
    assert num_experts[-1] > num_experts[0] == 2
    check_records(second)
    assert tensorboard_events(second) == tensorboard_events(first)


def read_masks(run_dir: Path, task: str) -> Any:
    return read_task_masks(run_dir / "experts" / f"{task}.safetensors")


CAPACITY_METRICS = {
    "capacity_bytes", "capacity_share", "lora_per_task_bytes", "parameters_bytes", "masks_bytes", "routers_bytes",
    "num_experts",
}  # fmt: skip


def check_records(run_dir: Path) -> None:
    """Each step has one record. Only the record of a task's last step has the capacity metrics."""
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 11))
    with_capacity = [record for record in records if set(record) & CAPACITY_METRICS]
    assert [(record["step"], record["task"]) for record in with_capacity] == [
        (4, "colour"),
        (7, "animal"),
        (10, "weather"),
    ]
    for record in records:
        assert set(record) >= {"step", "task", "loss", "lr", "grad_norm", "tokens"}
    raw = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all("tokens_per_s" in record for record in raw)
    sizes: Counter[str] = Counter()
    for record in with_capacity:
        assert set(record) >= CAPACITY_METRICS
        sizes.update(read_masks(run_dir, record["task"]).byte_sizes())
        assert {kind: record[f"{kind}_bytes"] for kind in sizes} == dict(sizes)
        recipe_yaml = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        keys = record["router_bytes"] if recipe_yaml["method"]["router"]["name"] == "key" else 0
        assert record["capacity_bytes"] == sum(sizes.values()) + keys


def tensorboard_events(run_dir: Path) -> tuple[dict[int, float], list[int]]:
    """TensorBoard's curve of the capacity, and the steps of the pictures of mask overlaps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    limits = {"scalars": 0, "images": 0, "tensors": 0}
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance=limits).Reload()
    curve = {event.step: event.value for event in events.Scalars("task/capacity_bytes")}
    assert sorted(curve) == [4, 7, 10]
    for record in read_metrics(run_dir):
        if "capacity_bytes" in record:
            assert curve[record["step"]] == record["capacity_bytes"]
    (picture,) = [tag for tag in events.Tags()["images"] if tag.startswith("task/mask")]
    return curve, sorted({event.step for event in events.Images(picture)})


@pytest.mark.parametrize(
    ("before", "after", "masks"), [pytest.param(2, 1, "rank1", marks=EXHAUSTIVE), (1, 2, "element")]
)
def test_another_number_of_ranks_goes_on(ranks: Any, tasks: Path, before: int, after: int, masks: str) -> None:
    whole, moved = (recipe(tasks, f"{kind}{before}{after}", 1, tune={"masks": masks}) for kind in ("size", "moved"))
    for document in (whole, moved):
        document["train"]["lr"] = 5e-3
        document["checkpoint"]["every"] = 2
    ranks(before)(run, whole)
    ranks(before)(run_until_killed, moved, 7)  # the second task's last step, after a checkpoint within it
    ranks(after)(run, moved)
    first, second = Path(whole["run_dir"]), Path(moved["run_dir"])
    expected, changed = read_metrics(first), read_metrics(second)
    assert [record["step"] for record in changed] == [record["step"] for record in expected]
    assert [record["loss"] for record in changed] == pytest.approx([record["loss"] for record in expected], rel=1e-4)
    assert [record.get("capacity_bytes") for record in changed] == [record.get("capacity_bytes") for record in expected]
    check_records(second)
    for task in SIZES:
        for layer, layer_masks in read_masks(first, task).layers.items():
            other = read_masks(second, task).layers[layer]
            for name, tensor in layer_masks.items():
                assert torch.equal(tensor, other[name]) if "mask" in name else tensor.shape == other[name].shape


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_a_damaged_task_is_learnt_again_where_a_checkpoint_of_before_is_there(ranks: Any, tasks: Path) -> None:
    intact, damaged = (recipe(tasks, name) for name in ("intact", "damaged"))
    ranks(2)(run, intact)
    damaged["checkpoint"]["keep"] = 99
    ranks(2)(run, damaged)
    damage(tasks / "damaged" / "experts" / "animal.safetensors")
    (tasks / "damaged" / "scores.json").unlink()
    ranks(2)(run, damaged)
    assert artifact_checksums(tasks / "damaged") == artifact_checksums(tasks / "intact")
    (tasks / "intact" / "experts" / "weather.safetensors").unlink()
    (tasks / "intact" / "scores.json").unlink()
    damage(tasks / "intact" / "experts" / "colour.safetensors")
    for kind, message in ranks(2)(run_error, intact):
        assert kind == "ExternalFailure"
        assert "experts/" in message
        assert "restore that file, or remove the run's folder" in message
        assert "\n" not in message


# ---- a stream for which there is too little room


def exit_status_and_message(document: dict[str, Any]) -> tuple[int, str]:
    """The exit status of the program, and its error message."""
    error_lines: list[str] = []

    def train() -> int:
        run(document)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "report_exit", lambda _status, text: error_lines.append(text))
        code = app.run_with_error_report(train)
    return code, "".join(error_lines)


@pytest.mark.parametrize(("masks", "world"), [("rank1", 2), ("element", 1)])
def test_a_task_without_room_is_refused_and_another_policy_goes_on(
    ranks: Any, tasks: Path, masks: str, world: int
) -> None:
    name = f"full-{masks}"
    document = recipe(tasks, name, tune={"masks": masks, "on_full": "stop"})
    for code, message in ranks(world)(exit_status_and_message, document):
        assert code == 2
        assert "task animal needs" in message
        assert "method.tune.on_full=reuse" in message
        assert "\n" not in message
    assert sorted(p.stem for p in (tasks / name / "experts").iterdir()) == ["colour"]
    assert [record["task"] for record in read_metrics(tasks / name)] == ["colour"] * 4
    for policy in ("reuse", "grow"):
        run_dir = Path(shutil.copytree(tasks / name, tasks / f"{name}-{policy}"))
        document_with_policy = recipe(tasks, run_dir.name, tune={"masks": masks, "on_full": policy})
        ranks(world)(run, document_with_policy)
        ranks(world)(run, recipe(tasks, f"{run_dir.name}-whole", tune={"masks": masks, "on_full": policy}))
        assert run_outcome(run_dir) == run_outcome(tasks / f"{run_dir.name}-whole")
        assert artifact_checksums(run_dir) == artifact_checksums(tasks / f"{run_dir.name}-whole")
    used = [record["capacity_share"] for record in read_metrics(tasks / f"{name}-reuse") if "capacity_share" in record]
    assert used == sorted(used)
    assert used[-1] <= 1.0


def test_fewer_max_experts_than_the_stream_needs_is_told(ranks: Any, tasks: Path) -> None:
    for code, message in ranks(1)(exit_status_and_message, recipe(tasks, "most", tune={"max_experts": 2})):
        assert code == 2
        assert "task animal needs" in message
        assert "a larger method.tune.max_experts" in message


# ---- with the dense weights, under OSFT's constraint


def train_dense_and_compare(document: dict[str, Any]) -> tuple[list[str], int, int]:
    """Run with dense weights under OSFT. Returns for this rank the names of changed dense weights, and how many router
    features of the training prompts differ from the trained model's, of how many. Checks on the way that a task starts
    from the current dense weights, and that `end_task` sees the model with the task's own sub-experts."""
    setup = build_setup(resolve_recipe(document))
    recorded: list[tuple[str, dict[int, torch.Tensor], TaskRouter]] = []
    results: list[Any] = []
    add_task, close, reset_optimizer, end_dense = (
        TaskRouter.add_task,
        Engine.close,
        Engine.reset_optimizer,
        Osft.end_task,
    )

    def reset_and_compare(self: Engine, read: Any) -> None:
        before = {f.name: f.master.clone() for f in self.shards.local_shards() if is_dense_weight(f.name)}
        reset_optimizer(self, read)
        assert all(torch.equal(f.master, before[f.name]) for f in self.shards.local_shards() if is_dense_weight(f.name))

    def check_and_end_task(self: Osft, *a: Any) -> Any:
        rows = recorded[-1][2].routing.assignment
        assert rows is not None
        assert rows.slots == (len(recorded) - 1,)
        return end_dense(self, *a)

    def record_and_add_task(self: TaskRouter, name: str, of: Any) -> str:
        rows = self.row_state_dict()
        recorded.append((name, dict(zip(rows["samples"].tolist(), rows["features"].clone(), strict=True)), self))
        return add_task(self, name, of)

    def compare_and_close(self: Engine) -> None:
        changed, differing, total = [], 0, 0
        for name, parameter in self.module.eval().named_parameters():
            with gathered(parameter):
                values = parameter.detach().flatten()
                if name.endswith((".weight", ".bias")):
                    base_values = setup.backbone.weights.read(name, parameter.shape, 0, len(values))
                    changed += [] if torch.equal(values, base_values) else [name]
        for name, rows, task_router in recorded:
            (task_data,) = (task_data for task_data in setup.tasks if task_data.task.name == name)
            samples = sorted(rows)
            for at in range(max(comm.all_gather_objects(len(samples)))):  # every rank asks equally often
                sample = samples[at % len(samples)]
                batch = collate_prompts([task_data.dataset[sample][0]], task_data.pad_id, task_data.bos_id)
                with torch.no_grad(), task_router.routing.capture_features(batch.prompt_spans) as pooled:
                    self.module(batch.input_ids, batch.attention_mask, batch.position_ids)
                serving_features = task_router.router.quantize(pooled())[0]
                differing, total = (
                    differing + int((serving_features != rows[sample]).sum()),
                    total + serving_features.numel(),
                )
        results.append((changed, differing, total))
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskRouter, "add_task", record_and_add_task)
        patch.setattr(Engine, "close", compare_and_close)
        patch.setattr(Engine, "reset_optimizer", reset_and_compare)
        patch.setattr(Osft, "end_task", check_and_end_task)
        run(document)
    (result,) = results
    assert len(recorded) == len(SIZES)
    return result  # type: ignore[no-any-return]


def is_dense_weight(name: str) -> bool:
    return name.startswith("model.layers.1.") and name.endswith("_proj.weight")


@pytest.mark.parametrize("stage", [pytest.param(2, marks=EXHAUSTIVE), 3])
def test_with_dense_weights_the_constraint_holds_and_features_stay(ranks: Any, tasks: Path, stage: int) -> None:
    document = recipe(tasks, f"dense{stage}", stage, **DENSE)
    document["checkpoint"]["keep"] = 99
    for changed, differing, total in ranks(2)(with_few_texts, train_dense_and_compare, document):
        assert len(changed) == 7
        assert all(map(is_dense_weight, changed))
        assert total > 10 * 32
        assert differing <= 1e-3 * total  # prompts alone and in batches may differ in a last bit
    folders = sorted((tasks / f"dense{stage}" / "checkpoints").glob("*-learned"))
    learned = [read_checkpoint_tensors(folder) for folder in folders]
    assert len(learned) == len(SIZES)
    final = learned[-1][0]
    for weights, owned in learned:
        by_matrix = group_by_matrix(owned)
        assert sorted(by_matrix) == sorted(filter(is_dense_weight, weights))
        assert len(by_matrix) == 7
        for name, subspace in by_matrix.items():
            assert constraint_error("input", weights[name], subspace) <= 1e-6
            assert constraint_error("input", final[name], subspace) <= 1e-6  # also after the tasks to come
    (first, owned), (_, later) = learned[:2]
    assert all(
        (final[name] - first[name]).norm() > 1e-2 * first[name].norm() for name in filter(is_dense_weight, first)
    )
    assert any(later[name].shape != tensor.shape for name, tensor in owned.items())  # tasks protect what they use


@pytest.mark.parametrize(
    ("stage", "method"),
    [(0, {"tune": {"masks": "element", "top_k": 1}, **KEY}), (3, {"tune": {"gate": "uniform", "dropout": 0.2}})],
)
def test_with_dense_weights_a_run_that_died_ends_as_one_that_did_not(
    ranks: Any, tasks: Path, stage: int, method: dict[str, Any]
) -> None:
    whole, died = (recipe(tasks, f"dense-{kind}{stage}", stage, True, **method, **DENSE) for kind in ("whole", "died"))
    ranks(2)(with_few_texts, run, whole)
    deaths = [("begin", 1), ("freeze", 1), ("end", 1), ("left", 2), ("step", 1)]
    ranks(2)(with_few_texts, killed_around, died, deaths)
    first, second = Path(whole["run_dir"]), Path(died["run_dir"])
    assert run_outcome(second) == run_outcome(first)
    assert {"owned-00000.safetensors", "owned-00001.safetensors"} <= set(run_outcome(first)[-1])
    assert artifact_checksums(second) == artifact_checksums(first)
    check_records(second)
    assert tensorboard_events(second) == tensorboard_events(first)


def test_dense_weights_go_with_a_task_that_is_given(ranks: Any, tasks: Path) -> None:
    """With the task id known, all layers may train. The answers of a task may change later."""
    document = recipe(tasks, "dense-given", 1, tune={"masks": "element"}, **ORACLE, **DENSE)
    ranks(2)(with_few_texts, run, document)
    assert read_scores(tasks / "dense-given")["complete"]
    by_matrix = group_by_matrix(read_checkpoint_tensors(max((tasks / "dense-given" / "checkpoints").iterdir()))[1])
    assert len(by_matrix) == 2 * 7
