"""EWC, A-GEM, LwF and O-LoRA on real ranks: every step's loss equals plain torch in one process, which implements the
method's equation; a killed run ends like an undisturbed one."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from dscl.data.batches import Batch, collate
from dscl.data.replay_buffer import ConcatenatedDataset, ReplayBuffer
from dscl.engine.zero_layouts import load_parameters
from dscl.methods import ewc
from dscl.methods.ewc import random_signs, signed_loss
from dscl.methods.lwf import distillation_loss
from dscl.model.adapters.lora_bank import initial_lora_values
from dscl.recipe.recipe import resolve_recipe
from dscl.training.setup import RunSetup, TaskData, build_setup
from tests.support.five_tasks import NAMES, recipe, tasks
from tests.support.runs import EPS, read_metrics, run, run_outcome, run_until, run_with_eps

__all__ = ["tasks"]  # the fixture
NUM_TASKS = 3
LEARNING_RATES = {"agem": 2e-2}  # large enough that the gradients of tasks conflict
GRAD_CLIP = 1.0
METHODS: dict[str, dict[str, Any]] = {
    "ewc": {"constraint": {"ewc_lambda": 300.0, "gamma": 0.5, "fisher_samples": 20}},
    "agem": {"constraint": {"memory_ratio": 0.03}},
    "lwf": {"loss": {"weight": 0.7, "top_tokens": 1000}},
    "olora": {"tune": {"rank": 4}, "constraint": {"orthogonality": 0.3}},
}


def baseline_recipe(folder: Path, name: str, method: str, stage: int = 0, every: int = NUM_TASKS) -> Any:
    evaluate = {"zero_shot": False, "tasks": "seen", "every": every}
    document = recipe(folder, name, stage, NAMES[:NUM_TASKS], evaluate=evaluate, checkpoint={"every": 6}, layers=2)
    document["train"] |= {
        "lr": LEARNING_RATES.get(method, 3e-3),
        "grad_clip": GRAD_CLIP,
        "micro_batch": 2,
        "global_batch": 8,
    }
    document["stream_defaults"] = {"dev_share": 0}
    return document | {"method": {"name": method, **METHODS[method]}}


# ---- plain torch in one process


def target_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and labels at all targets, in the order of the samples."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    is_target = batch.labels != -100
    return logits.flatten(0, 1)[batch.loss_positions[is_target]], batch.labels[is_target]


class Plain:
    """Trains a stream in one process with plain torch. Subclasses add the rule of a method."""

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.model: Any = setup.backbone.build()
        load_parameters(self.model, setup.backbone.weights.read)
        self.prepare_state()

    def prepare_state(self) -> None:
        pass

    def begin_task(self, task_data: TaskData) -> None:
        pass

    def extra_loss(self, batch: Batch) -> torch.Tensor | float:
        """The term that the method adds to a batch's summed loss."""
        return 0.0

    def modify_gradients(self, task_data: TaskData, number: int) -> None:
        """Change the gradients."""

    def end_task(self, task_data: TaskData) -> None:
        pass

    def batch(self, task_data: TaskData, samples: Any) -> Batch:
        return collate([[i] for i in samples], task_data.dataset, task_data.pad_id, False, task_data.bos_id)

    def summed_loss(self, batch: Batch) -> torch.Tensor:
        logits, labels = target_logits(self.model, batch)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def losses(self) -> list[float]:
        losses = []
        for task_data in self.setup.tasks:
            self.begin_task(task_data)
            optimizer = torch.optim.AdamW(self.trained_parameters(), lr=0.0, weight_decay=0.0, eps=EPS)
            for number in range(task_data.num_steps):
                plan = task_data.sampler.step_plan(number)
                optimizer.param_groups[0]["lr"] = task_data.learning_rate(number)
                self.before_step(task_data, number)
                optimizer.zero_grad()
                batch = self.batch(task_data, plan.sample_ids)
                loss = (self.summed_loss(batch) + self.extra_loss(batch)) / plan.num_targets
                loss.backward()
                nn.utils.clip_grad_norm_(self.trained_parameters(), GRAD_CLIP)
                self.modify_gradients(task_data, number)
                optimizer.step()
                losses.append(loss.item())
            self.end_task(task_data)
        return losses

    def before_step(self, task_data: TaskData, number: int) -> None:
        """Compute gradients of other samples before the step."""


class PlainEwc(Plain):
    """Adds the penalty's gradient after the loss's gradient was clipped; the penalty is not clipped."""

    fisher: list[torch.Tensor] | None = None
    group = 8

    def modify_gradients(self, task_data: TaskData, number: int) -> None:
        if self.fisher is None:
            return
        penalty = sum(
            (f * (p - a).square()).sum()
            for f, p, a in zip(self.fisher, self.trained_parameters(), self.anchor, strict=True)
        )
        gradients = torch.autograd.grad(300.0 / 2 * penalty, self.trained_parameters())
        for parameter, gradient in zip(self.trained_parameters(), gradients, strict=True):
            parameter.grad += gradient

    def end_task(self, task_data: TaskData) -> None:
        signs = random_signs(len(task_data.dataset), self.setup.recipe.seed, task_data.task.name)
        squared_sums = [torch.zeros_like(p) for p in self.trained_parameters()]
        groups = list(self.groups(task_data))
        count = sum(map(len, groups))
        for group in groups:
            self.model.zero_grad()
            for sample in group:
                (signs[sample] * self.summed_loss(self.batch(task_data, [sample]))).backward()
            for total, parameter in zip(squared_sums, self.trained_parameters(), strict=True):
                total += parameter.grad.square() / count
        previous_fisher = self.fisher or [torch.zeros_like(p) for p in squared_sums]
        self.fisher = [
            0.5 * previous + squared_sum for previous, squared_sum in zip(previous_fisher, squared_sums, strict=True)
        ]
        self.anchor = [p.detach().clone() for p in self.trained_parameters()]

    def groups(self, task_data: TaskData) -> Iterator[list[int]]:
        """The first twenty samples in training order, in groups."""
        plans = [task_data.sampler.step_plan(number).sample_ids for number in range(task_data.sampler.steps_per_epoch)]
        first = [sample for plan in plans for sample in plan][:20]
        yield from (first[at : at + self.group] for at in range(0, len(first), self.group))


class PlainAgem(Plain):
    """Projects the clipped gradient."""

    run_dir: Path
    num_projections = 0

    def begin_task(self, task_data: TaskData) -> None:
        earlier_tasks = self.setup.tasks[: self.setup.tasks.index(task_data)]
        names = [other.task.name for other in earlier_tasks]
        buffers = [ReplayBuffer.read(self.run_dir / "samples" / f"{name}.safetensors", name) for name in names]
        self.memory = ConcatenatedDataset(buffers) if buffers else None
        self.schedule = task_data.build_sampler(self.memory, task_data.epochs) if self.memory is not None else None

    def before_step(self, task_data: TaskData, number: int) -> None:
        if self.schedule is None or self.memory is None:
            return
        self.model.zero_grad()
        samples = self.schedule.step_plan(number % self.schedule.num_steps).sample_ids
        self.summed_loss(
            collate([[i] for i in samples], self.memory, task_data.pad_id, False, task_data.bos_id)
        ).backward()
        self.reference = torch.cat([p.grad.flatten() for p in self.trained_parameters()])

    def modify_gradients(self, task_data: TaskData, number: int) -> None:
        if self.schedule is None:
            return
        gradient, r = torch.cat([p.grad.flatten() for p in self.trained_parameters()]), self.reference
        if gradient @ r < 0:
            gradient = gradient - (gradient @ r) / (r @ r) * r
            self.num_projections += 1
        sizes = [p.numel() for p in self.trained_parameters()]
        for parameter, part in zip(self.trained_parameters(), gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


class PlainLwf(Plain):
    """Keeps a complete copy of the model before the task."""

    previous_model: Any = None

    def begin_task(self, task_data: TaskData) -> None:
        self.previous_model = None if task_data is self.setup.tasks[0] else copy.deepcopy(self.model)

    def extra_loss(self, batch: Batch) -> torch.Tensor | float:
        if self.previous_model is None:
            return 0.0
        with torch.no_grad():
            previous_log_probs = (target_logits(self.previous_model, batch)[0] / 2.0).log_softmax(-1)
        log_probs = (target_logits(self.model, batch)[0] / 2.0).log_softmax(-1)
        return 0.7 * functional.kl_div(log_probs, previous_log_probs, reduction="sum", log_target=True)


class PlainOlora(Plain):
    """Adds all LoRAs to the base weights in every step."""

    def prepare_state(self) -> None:
        self.model.requires_grad_(False)
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        self.base = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.ended: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def begin_task(self, task_data: TaskData) -> None:
        self.now = {}
        for name, layer in self.layers.items():
            pair = []
            for side, shape in (("a", (4, layer.in_features)), ("b", (layer.out_features, 4))):
                tensor = f"{task_data.task.name}:{name}.lora_{side}"
                values = initial_lora_values(self.setup.recipe.seed, tensor, torch.Size(shape), 0, shape[0] * shape[1])
                pair.append(nn.Parameter(values.view(shape)))
            self.now[name] = pair[0], pair[1]

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for pair in self.now.values() for p in pair]

    def summed_loss(self, batch: Batch) -> torch.Tensor:
        scale, weights = 16.0 / 4, {}
        for name, base in self.base.items():
            pairs = [*(pairs[name] for pairs in self.ended), self.now[name]]
            weights[f"{name}.weight"] = base + sum(scale * b @ a for a, b in pairs)
        original, self.model = self.model, lambda **kwargs: torch.func.functional_call(original, weights, (), kwargs)
        try:
            return super().summed_loss(batch)
        finally:
            self.model = original

    def extra_loss(self, batch: Batch) -> torch.Tensor | float:
        overlaps = [(pairs[name][0] @ self.now[name][0].T).abs().sum() for pairs in self.ended for name in self.base]
        return 0.3 * int((batch.labels != -100).sum()) * sum(overlaps, torch.zeros(()))

    def end_task(self, task_data: TaskData) -> None:
        self.ended.append({name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in self.now.items()})


PLAIN: dict[str, type[Plain]] = {"ewc": PlainEwc, "agem": PlainAgem, "lwf": PlainLwf, "olora": PlainOlora}


def plain_losses(document: dict[str, Any]) -> tuple[list[float], Plain]:
    plain = PLAIN[document["method"]["name"]](build_setup(resolve_recipe(document)))
    if isinstance(plain, PlainAgem):
        plain.run_dir = Path(document["run_dir"])
    return plain.losses(), plain


@pytest.fixture(scope="module")
def reference() -> Callable[[dict[str, Any]], tuple[list[float], Plain]]:
    """The losses of plain torch in fp32: one computation for each method, since they depend on no rank or stage."""
    losses_by_method: dict[str, tuple[list[float], Plain]] = {}

    def get(document: dict[str, Any]) -> tuple[list[float], Plain]:
        method = document["method"]["name"]
        if method not in losses_by_method:
            losses_by_method[method] = plain_losses(
                baseline_recipe(Path(document["run_dir"]).parent, Path(document["run_dir"]).name, method)
            )
        return losses_by_method[method]

    return get


STAGES_AND_RANKS = [(0, 1), (1, 2), (2, 2), (3, 2)]
FAST_STAGES = {"ewc": (0,), "agem": (0, 1), "lwf": (0, 2), "olora": (0, 3)}


@pytest.mark.parametrize(
    ("stage", "world", "method"),
    [
        pytest.param(*place, method, marks=[] if place[0] in FAST_STAGES[method] else [pytest.mark.exhaustive])
        for place in STAGES_AND_RANKS
        for method in METHODS
    ],
)
def test_every_step_equals_plain_torch(
    ranks: Any, reference: Any, tasks: Path, method: str, stage: int, world: int
) -> None:
    document = baseline_recipe(tasks, f"{method}{stage}{world}", method, stage)
    ranks(world)(run_with_eps, document)
    losses, plain = reference(document)
    assert len(losses) == sum(steps for _, steps in plain.setup.planned_steps()) > 20
    assert [record["loss"] for record in read_metrics(tasks / f"{method}{stage}{world}")] == pytest.approx(
        losses, rel=1e-5
    )
    if isinstance(plain, PlainAgem):
        assert plain.num_projections > 2


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        (2, "ewc"),
        (3, "agem"),
        *(pytest.param(*place, marks=pytest.mark.exhaustive) for place in ((2, "agem"), (3, "ewc"))),
    ],
)
def test_offload_changes_nothing(ranks: Any, reference: Any, tasks: Path, method: str, stage: int) -> None:
    (tasks / "offload").mkdir(exist_ok=True)
    path = tasks / "offload" / f"zero{stage}.json"
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    document = baseline_recipe(tasks, f"offload {method}{stage}", method, stage)
    ranks(2)(run_with_eps, document | {"deepspeed": str(path)})
    losses, _ = reference(document)
    assert [record["loss"] for record in read_metrics(Path(document["run_dir"]))] == pytest.approx(losses, rel=1e-5)


DEATHS = [("step", 9), ("take", 2), ("step", 4), ("save", 1), ("step", 2)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_died_ends_as_one_that_did_not(ranks: Any, tasks: Path, method: str, stage: int) -> None:
    ranks(2)(run, baseline_recipe(tasks, f"whole {method}{stage}", method, stage, every=1))
    ranks(2)(run_until, baseline_recipe(tasks, f"died {method}{stage}", method, stage, every=1), DEATHS)
    assert run_outcome(tasks / f"died {method}{stage}") == run_outcome(tasks / f"whole {method}{stage}")


def run_one_by_one(document: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ewc, "GROUP_SIZE", 1)
        run_with_eps(document)


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.exhaustive) for s in (0, 1, 2)), 3])
def test_information_is_the_mean_of_squared_gradients(ranks: Any, tasks: Path, stage: int) -> None:
    """Exact with one sample per group. The checkpoint stores the Fisher information in the shards of the masters."""
    document = baseline_recipe(tasks, f"fisher{stage}", "ewc", stage)
    document["stream"] = document["stream"][:1]
    ranks(1)(run_one_by_one, document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainEwc, "group", 1)
        _, plain = plain_losses(document)
    assert isinstance(plain, PlainEwc)
    assert plain.fisher is not None
    (newest,) = sorted((tasks / f"fisher{stage}" / "checkpoints").iterdir())[-1:]
    with safe_open(newest / "rank-00000.safetensors", framework="pt") as file:
        for (name, _), expected in zip(plain.model.named_parameters(), plain.fisher, strict=True):
            fisher = file.get_tensor(f"fisher|0|{name}").view_as(expected)
            assert float((fisher - expected).norm()) <= 2e-3 * float(expected.norm())  # after some steps of training


def test_signs_of_chance_give_squared_gradients_on_average(tasks: Path) -> None:
    """The mean over all sign vectors of three samples is exact, packed or not."""
    setup = build_setup(resolve_recipe(baseline_recipe(tasks, "signs", "ewc")))
    model = setup.backbone.build()
    load_parameters(model, setup.backbone.weights.read)
    model.double()
    task_data, samples = setup.tasks[0], [3, 5, 8]
    lengths = torch.tensor([task_data.dataset.answer_lengths[i] for i in samples])
    for rows in ([[3], [5], [8]], [[5, 3], [8]]):
        packed = len(rows) == 2
        order = torch.tensor([samples.index(i) for row in rows for i in row])
        batch = collate(rows, task_data.dataset, task_data.pad_id, packed, task_data.bos_id)
        assert batch.sample_ids == [samples[i] for i in order]

        def gradient(signs: torch.Tensor, batch: Batch = batch, order: torch.Tensor = order) -> torch.Tensor:
            loss = signed_loss(model, batch, signs[order].repeat_interleave(lengths[order]))
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

        all_signs = [torch.tensor(signs) for signs in itertools.product((1.0, -1.0), repeat=3)]
        average = torch.stack([gradient(signs).square() for signs in all_signs]).mean(0)
        sample_gradients = [(gradient(all_plus) + gradient(-one_minus)) / 2 for all_plus, one_minus in sign_pairs()]
        expected = torch.stack([sample_gradient.square() for sample_gradient in sample_gradients]).sum(0)
        assert float((average - expected).abs().max()) <= 1e-6 * float(expected.max())


def sign_pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each sample two sign vectors, all plus and only this sample minus. Half the difference of their gradients is
    the sample's own gradient."""
    for place in range(3):
        flipped = torch.ones(3)
        flipped[place] = -1.0
        yield torch.ones(3), flipped


def test_tokens_that_are_not_recorded_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    previous_log_probs, log_probs = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    best = previous_log_probs.topk(3)
    p, q = previous_log_probs.exp(), log_probs.exp()
    rows = torch.arange(5)[:, None]
    recorded, unrecorded = p[rows, best.indices], 1 - p[rows, best.indices].sum(1)
    unrecorded_now = 1 - q[rows, best.indices].sum(1)
    expected = (recorded * (recorded / q[rows, best.indices]).log()).sum() + (
        unrecorded * (unrecorded / unrecorded_now).log()
    ).sum()
    assert float(distillation_loss(best.values, log_probs, best.indices)) == pytest.approx(float(expected), rel=1e-12)
    whole = functional.kl_div(log_probs, previous_log_probs, reduction="sum", log_target=True)
    assert float(distillation_loss(previous_log_probs, log_probs, torch.arange(9).expand(5, 9))) == pytest.approx(
        float(whole), rel=1e-12
    )
    assert float(
        distillation_loss(previous_log_probs[:, :3], previous_log_probs, torch.arange(3).expand(5, 3))
    ) == pytest.approx(0.0, abs=1e-12)


def test_steps_one_group_after_the_other_are_refused_where_all_have_to_be_seen(
    ranks: Any, reference: Any, tasks: Path
) -> None:
    path = tasks / "groups.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 4000}}))
    document = baseline_recipe(tasks, "groups", "agem", 3) | {"deepspeed": str(path)}
    with pytest.raises(AssertionError, match=r"sub_group_size: given a size that steps \d+ groups .* set it to \d+ or"):
        ranks(2)(run, document)
    document = baseline_recipe(tasks, "groups, ewc", "ewc", 3)
    ranks(2)(run_with_eps, document | {"deepspeed": str(path)})
    losses, _ = reference(document)
    assert [record["loss"] for record in read_metrics(tasks / "groups, ewc")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        pytest.param(
            method, stage, marks=[] if (method, stage) in (("ewc", 1), ("agem", 3)) else [pytest.mark.exhaustive]
        )
        for method in METHODS
        for stage in (1, 3)
    ],
)
def test_bf16_follows_fp32(ranks: Any, reference: Any, tasks: Path, method: str, stage: int) -> None:
    """The methods act on the fp32 masters, from which every step writes the 16-bit weights."""
    document = baseline_recipe(tasks, f"bf16 {method}{stage}", method, stage)
    document["train"]["precision"] = "bf16"
    ranks(2)(run_with_eps, document)
    losses = torch.tensor([record["loss"] for record in read_metrics(Path(document["run_dir"]))])
    expected = torch.tensor(reference(document)[0])
    assert float((losses - expected).norm() / expected.norm()) < 0.1
