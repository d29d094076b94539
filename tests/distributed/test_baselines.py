"""EWC, A-GEM, LwF and O-LoRA on real ranks: every step's loss equals plain torch in one process that follows the
method's own equation; a run that died ends as one that did not."""

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
from tests.support.runs import EPS, read_metrics, run_outcome, run, run_until, run_with_eps

__all__ = ["tasks"]  # the fixture
COUNT = 3  # tasks
RATES = {"agem": 2e-2}  # at which what a task learns stands against the ones before it
CLIP = 1.0
METHODS: dict[str, dict[str, Any]] = {
    "ewc": {"constraint": {"ewc_lambda": 300.0, "gamma": 0.5, "fisher_samples": 20}},
    "agem": {"constraint": {"memory_ratio": 0.03}},
    "lwf": {"loss": {"weight": 0.7, "top_tokens": 1000}},
    "olora": {"tune": {"rank": 4}, "constraint": {"orthogonality": 0.3}},
}


def document(folder: Path, name: str, method: str, stage: int = 0, every: int = COUNT) -> Any:
    evaluate = {"zero_shot": False, "tasks": "seen", "every": every}
    made = recipe(folder, name, stage, NAMES[:COUNT], evaluate=evaluate, checkpoint={"every": 6}, layers=2)
    made["train"] |= {"lr": RATES.get(method, 3e-3), "grad_clip": CLIP, "micro_batch": 2, "global_batch": 8}
    made["stream_defaults"] = {"dev_share": 0}
    return made | {"method": {"name": method, **METHODS[method]}}


# ---- plain torch in one process


def answers(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels at every target, sample by sample."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits
    wanted = batch.labels != -100
    return logits.flatten(0, 1)[batch.loss_positions[wanted]], batch.labels[wanted]


class Plain:
    """One process that trains a stream by the book; a method's rule is in the four calls."""

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.model: Any = setup.backbone.build()
        load_parameters(self.model, setup.backbone.weights.read)
        self.prepare_state()

    def prepare_state(self) -> None:
        pass

    def begin(self, task_data: TaskData) -> None:
        pass

    def extra(self, batch: Batch) -> torch.Tensor | float:
        """What a batch's summed loss has added to it."""
        return 0.0

    def turn(self, task_data: TaskData, number: int) -> None:
        """Change the gradients."""

    def end(self, task_data: TaskData) -> None:
        pass

    def batch(self, task_data: TaskData, samples: Any) -> Batch:
        return collate([[i] for i in samples], task_data.dataset, task_data.pad_id, False, task_data.bos_id)

    def summed(self, batch: Batch) -> torch.Tensor:
        logits, labels = answers(self.model, batch)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def losses(self) -> list[float]:
        found = []
        for task_data in self.setup.tasks:
            self.begin(task_data)
            optimizer = torch.optim.AdamW(self.trained(), lr=0.0, weight_decay=0.0, eps=EPS)
            for number in range(task_data.num_steps):
                plan = task_data.sampler.step_plan(number)
                optimizer.param_groups[0]["lr"] = task_data.learning_rate(number)
                self.turn_before(task_data, number)
                optimizer.zero_grad()
                batch = self.batch(task_data, plan.sample_ids)
                loss = (self.summed(batch) + self.extra(batch)) / plan.num_targets
                loss.backward()
                nn.utils.clip_grad_norm_(self.trained(), CLIP)
                self.turn(task_data, number)
                optimizer.step()
                found.append(loss.item())
            self.end(task_data)
        return found

    def turn_before(self, task_data: TaskData, number: int) -> None:
        """Look at other gradients."""


class PlainEwc(Plain):
    """The penalty's gradient is added once the loss's own was clipped, and is not clipped itself."""

    fisher: list[torch.Tensor] | None = None
    group = 8

    def turn(self, task_data: TaskData, number: int) -> None:
        if self.fisher is None:
            return
        penalty = sum(
            (f * (p - a).square()).sum() for f, p, a in zip(self.fisher, self.trained(), self.anchor, strict=True)
        )
        added = torch.autograd.grad(300.0 / 2 * penalty, self.trained())
        for parameter, more in zip(self.trained(), added, strict=True):
            parameter.grad += more

    def end(self, task_data: TaskData) -> None:
        signs = random_signs(len(task_data.dataset), self.setup.recipe.seed, task_data.task.name)
        found = [torch.zeros_like(p) for p in self.trained()]
        groups = list(self.groups(task_data))
        count = sum(map(len, groups))
        for group in groups:
            self.model.zero_grad()
            for sample in group:
                (signs[sample] * self.summed(self.batch(task_data, [sample]))).backward()
            for total, parameter in zip(found, self.trained(), strict=True):
                total += parameter.grad.square() / count
        earlier = self.fisher or [torch.zeros_like(p) for p in found]
        self.fisher = [0.5 * before + now for before, now in zip(earlier, found, strict=True)]
        self.anchor = [p.detach().clone() for p in self.trained()]

    def groups(self, task_data: TaskData) -> Iterator[list[int]]:
        """Of the first twenty samples in the order in which they are learnt, eight at a time."""
        plans = [task_data.sampler.step_plan(number).sample_ids for number in range(task_data.sampler.steps_per_epoch)]
        first = [sample for plan in plans for sample in plan][:20]
        yield from (first[at : at + self.group] for at in range(0, len(first), self.group))


class PlainAgem(Plain):
    """Projects what was clipped."""

    run_dir: Path
    turned = 0

    def begin(self, task_data: TaskData) -> None:
        ended = self.setup.tasks[: self.setup.tasks.index(task_data)]
        names = [other.task.name for other in ended]
        kept = [ReplayBuffer.read(self.run_dir / "samples" / f"{name}.safetensors", name) for name in names]
        self.memory = ConcatenatedDataset(kept) if kept else None
        self.schedule = task_data.build_sampler(self.memory, task_data.epochs) if self.memory is not None else None

    def turn_before(self, task_data: TaskData, number: int) -> None:
        if self.schedule is None or self.memory is None:
            return
        self.model.zero_grad()
        samples = self.schedule.step_plan(number % self.schedule.num_steps).sample_ids
        self.summed(collate([[i] for i in samples], self.memory, task_data.pad_id, False, task_data.bos_id)).backward()
        self.reference = torch.cat([p.grad.flatten() for p in self.trained()])

    def turn(self, task_data: TaskData, number: int) -> None:
        if self.schedule is None:
            return
        gradient, r = torch.cat([p.grad.flatten() for p in self.trained()]), self.reference
        if gradient @ r < 0:
            gradient = gradient - (gradient @ r) / (r @ r) * r
            self.turned += 1
        sizes = [p.numel() for p in self.trained()]
        for parameter, part in zip(self.trained(), gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


class PlainLwf(Plain):
    """Keeps a whole second model."""

    before: Any = None

    def begin(self, task_data: TaskData) -> None:
        self.before = None if task_data is self.setup.tasks[0] else copy.deepcopy(self.model)

    def extra(self, batch: Batch) -> torch.Tensor | float:
        if self.before is None:
            return 0.0
        with torch.no_grad():
            then = (answers(self.before, batch)[0] / 2.0).log_softmax(-1)
        now = (answers(self.model, batch)[0] / 2.0).log_softmax(-1)
        return 0.7 * functional.kl_div(now, then, reduction="sum", log_target=True)


class PlainOlora(Plain):
    """Weights with all LoRAs added to them, made anew in every step."""

    def prepare_state(self) -> None:
        self.model.requires_grad_(False)
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        self.base = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.ended: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def begin(self, task_data: TaskData) -> None:
        self.now = {}
        for name, layer in self.layers.items():
            pair = []
            for side, shape in (("a", (4, layer.in_features)), ("b", (layer.out_features, 4))):
                tensor = f"{task_data.task.name}:{name}.lora_{side}"
                values = initial_lora_values(self.setup.recipe.seed, tensor, torch.Size(shape), 0, shape[0] * shape[1])
                pair.append(nn.Parameter(values.view(shape)))
            self.now[name] = pair[0], pair[1]

    def trained(self) -> list[nn.Parameter]:
        return [p for pair in self.now.values() for p in pair]

    def summed(self, batch: Batch) -> torch.Tensor:
        scale, weights = 16.0 / 4, {}
        for name, base in self.base.items():
            pairs = [*(pairs[name] for pairs in self.ended), self.now[name]]
            weights[f"{name}.weight"] = base + sum(scale * b @ a for a, b in pairs)
        original, self.model = self.model, lambda **given: torch.func.functional_call(original, weights, (), given)
        try:
            return super().summed(batch)
        finally:
            self.model = original

    def extra(self, batch: Batch) -> torch.Tensor | float:
        overlaps = [(pairs[name][0] @ self.now[name][0].T).abs().sum() for pairs in self.ended for name in self.base]
        return 0.3 * int((batch.labels != -100).sum()) * sum(overlaps, torch.zeros(()))

    def end(self, task_data: TaskData) -> None:
        self.ended.append({name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in self.now.items()})


PLAIN: dict[str, type[Plain]] = {"ewc": PlainEwc, "agem": PlainAgem, "lwf": PlainLwf, "olora": PlainOlora}


def plain_losses(made: dict[str, Any]) -> tuple[list[float], Plain]:
    plain = PLAIN[made["method"]["name"]](build_setup(resolve_recipe(made)))
    if isinstance(plain, PlainAgem):
        plain.run_dir = Path(made["run_dir"])
    return plain.losses(), plain


@pytest.fixture(scope="module")
def reference() -> Callable[[dict[str, Any]], tuple[list[float], Plain]]:
    """The losses of plain torch in fp32: one computation for each method, since they depend on no rank or stage."""
    found: dict[str, tuple[list[float], Plain]] = {}

    def get(made: dict[str, Any]) -> tuple[list[float], Plain]:
        method = made["method"]["name"]
        if method not in found:
            found[method] = plain_losses(document(Path(made["run_dir"]).parent, Path(made["run_dir"]).name, method))
        return found[method]

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
    made = document(tasks, f"{method}{stage}{world}", method, stage)
    ranks(world)(run_with_eps, made)
    losses, plain = reference(made)
    assert len(losses) == sum(steps for _, steps in plain.setup.planned_steps()) > 20
    assert [record["loss"] for record in read_metrics(tasks / f"{method}{stage}{world}")] == pytest.approx(losses, rel=1e-5)
    if isinstance(plain, PlainAgem):
        assert plain.turned > 2


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
    made = document(tasks, f"offload {method}{stage}", method, stage)
    ranks(2)(run_with_eps, made | {"deepspeed": str(path)})
    losses, _ = reference(made)
    assert [record["loss"] for record in read_metrics(Path(made["run_dir"]))] == pytest.approx(losses, rel=1e-5)


DEATHS = [("step", 9), ("take", 2), ("step", 4), ("save", 1), ("step", 2)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_died_ends_as_one_that_did_not(ranks: Any, tasks: Path, method: str, stage: int) -> None:
    ranks(2)(run, document(tasks, f"whole {method}{stage}", method, stage, every=1))
    ranks(2)(run_until, document(tasks, f"died {method}{stage}", method, stage, every=1), DEATHS)
    assert run_outcome(tasks / f"died {method}{stage}") == run_outcome(tasks / f"whole {method}{stage}")


def run_one_by_one(made: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ewc, "GROUP_SIZE", 1)
        run_with_eps(made)


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.exhaustive) for s in (0, 1, 2)), 3])
def test_information_is_the_mean_of_squared_gradients(ranks: Any, tasks: Path, stage: int) -> None:
    """With a sample a group it is exact; what is kept of it stands in the checkpoint, sharded as the masters are."""
    made = document(tasks, f"fisher{stage}", "ewc", stage)
    made["stream"] = made["stream"][:1]
    ranks(1)(run_one_by_one, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainEwc, "group", 1)
        _, plain = plain_losses(made)
    assert isinstance(plain, PlainEwc)
    assert plain.fisher is not None
    (newest,) = sorted((tasks / f"fisher{stage}" / "checkpoints").iterdir())[-1:]
    with safe_open(newest / "rank-00000.safetensors", framework="pt") as file:
        for (name, _), expected in zip(plain.model.named_parameters(), plain.fisher, strict=True):
            found = file.get_tensor(f"fisher|0|{name}").view_as(expected)
            assert float((found - expected).norm()) <= 2e-3 * float(expected.norm())  # after some steps of training


def test_signs_of_chance_give_squared_gradients_on_average(tasks: Path) -> None:
    """Over all signs that three samples can have, exactly; packed or not."""
    setup = build_setup(resolve_recipe(document(tasks, "signs", "ewc")))
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

        every = [torch.tensor(signs) for signs in itertools.product((1.0, -1.0), repeat=3)]
        average = torch.stack([gradient(signs).square() for signs in every]).mean(0)
        alone = [(gradient(one) + gradient(-rest)) / 2 for one, rest in _ones()]
        expected = torch.stack([part.square() for part in alone]).sum(0)
        assert float((average - expected).abs().max()) <= 1e-6 * float(expected.max())


def _ones() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two vectors of signs whose gradients' mean is one sample's own: all plus, and all but that one minus."""
    for place in range(3):
        flipped = torch.ones(3)
        flipped[place] = -1.0
        yield torch.ones(3), flipped


def test_tokens_that_are_not_recorded_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    then, now = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    best = then.topk(3)
    p, q = then.exp(), now.exp()
    rows = torch.arange(5)[:, None]
    some, rest = p[rows, best.indices], 1 - p[rows, best.indices].sum(1)
    others = 1 - q[rows, best.indices].sum(1)
    expected = (some * (some / q[rows, best.indices]).log()).sum() + (rest * (rest / others).log()).sum()
    assert float(distillation_loss(best.values, now, best.indices)) == pytest.approx(float(expected), rel=1e-12)
    whole = functional.kl_div(now, then, reduction="sum", log_target=True)
    assert float(distillation_loss(then, now, torch.arange(9).expand(5, 9))) == pytest.approx(float(whole), rel=1e-12)
    assert float(distillation_loss(then[:, :3], then, torch.arange(3).expand(5, 3))) == pytest.approx(0.0, abs=1e-12)


def test_steps_one_group_after_the_other_are_refused_where_all_have_to_be_seen(
    ranks: Any, reference: Any, tasks: Path
) -> None:
    path = tasks / "groups.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 4000}}))
    made = document(tasks, "groups", "agem", 3) | {"deepspeed": str(path)}
    with pytest.raises(AssertionError, match=r"sub_group_size: given a size that steps \d+ groups .* set it to \d+ or"):
        ranks(2)(run, made)
    made = document(tasks, "groups, ewc", "ewc", 3)
    ranks(2)(run_with_eps, made | {"deepspeed": str(path)})
    losses, _ = reference(made)
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
    """What steers acts on the fp32 masters, from which every step makes the 16-bit weights anew."""
    made = document(tasks, f"bf16 {method}{stage}", method, stage)
    made["train"]["precision"] = "bf16"
    ranks(2)(run_with_eps, made)
    found = torch.tensor([record["loss"] for record in read_metrics(Path(made["run_dir"]))])
    expected = torch.tensor(reference(made)[0])
    assert float((found - expected).norm() / expected.norm()) < 0.1
