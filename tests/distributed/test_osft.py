"""OSFT on real ranks: the constraint holds on the weights at every stage and size, against dense projectors in fp64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from dscl.config.methods import OsftPreset
from dscl.config.parts import OsftConfig
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.engine.matrix_owners import assign_owners
from dscl.engine.zero_layouts import load_parameters
from dscl.maths.subspace import PROJECTIONS
from dscl.methods.base import RunInfo
from dscl.methods.osft import Osft
from dscl.model.activation_stats import ActivationStats
from dscl.model.generation import TEXTS_PER_BLOCK, sample_texts
from dscl.model.weights import RandomWeights
from dscl.recipe.recipe import resolve_recipe
from dscl.training import evaluation
from dscl.training.checkpoint import Checkpoints
from dscl.training.setup import build_setup
from dscl.training.state import TrainState
from dscl.training.task_context import build_task_context
from tests.support.moments import gradient_weighted_moments
from tests.support.osft_runs import (
    TARGETS,
    Shards,
    Tensors,
    checkpoint_dirs,
    constraint_error,
    group_by_matrix,
    is_target,
    max_constraint_error,
    protected_change_norm,
    read_checkpoint_tensors,
    with_few_texts,
)
from tests.support.runs import (
    read_metrics,
    recipe_of,
    run,
    run_error,
    run_killed_after,
    run_listening,
    run_outcome,
    run_until,
    run_until_killed,
    write_tasks,
)
from tests.support.toy_model import (
    OFFLOAD,
    assemble,
    count_targets,
    gathered,
    join_rows,
    master_shards,
    micro_batches,
    sample_rows,
    summed_loss,
    toy_backbone,
)

STEPS = 6
SHARE = 0.5
# AdamW's eps, in plain torch and in the engine. With the default of 1e-8 the first step of an entry is the sign of its
# gradient, and where the gradient is nearly zero, rounding decides the sign.
EPS = 1e-4
PLAIN = {
    "protect_base": ("weights",), "rank_allocation": "fixed", "protected_ratio": SHARE, "protect_task": (),
    "project_gradients": False, "other_params": "free",
}  # fmt: skip


def rate(step: int) -> float:
    """A learning rate at which the weights change by about their own norm."""
    return 2e-2 * (1 + step % 3) / 3


# ---- plain torch in one process, with dense projectors in fp64


@dataclass(frozen=True)
class DenseProjector:
    """Dense projectors on the protected directions of a weight, the strongest ones of its SVD."""

    start: torch.Tensor
    right: torch.Tensor  # V Vᵀ
    left: torch.Tensor  # U Uᵀ

    @classmethod
    def of(cls, weight: torch.Tensor) -> DenseProjector:
        exact = weight.double()
        left, _, right = torch.linalg.svd(exact)
        left, right = (basis[:, : int(SHARE * min(exact.shape))] for basis in (left, right.T))
        return cls(exact, right @ right.T, left @ left.T)

    def free(self, projection: str, change: torch.Tensor) -> torch.Tensor:
        """The allowed part of a change."""
        input_free = change - change @ self.right
        if projection == "input":
            return input_free
        return (
            change - self.left @ change @ self.right if projection == "paper" else input_free - self.left @ input_free
        )


@functools.cache
def reference(projection: str, gradients: bool = False) -> tuple[list[float], Tensors]:
    built = toy_backbone()
    model = built.build()
    load_parameters(model, built.weights.read)
    constrained = {p: DenseProjector.of(p.detach()) for name, p in model.named_parameters() if is_target(name)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, eps=EPS)
    losses = []
    for step in range(STEPS):
        batch = sample_rows(step)
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = summed_loss(model, join_rows(batch)) / count_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for weight, dense in constrained.items() if gradients else ():
            weight.grad = dense.free(projection, weight.grad.double()).float()
        optimizer.step()
        with torch.no_grad():
            for weight, dense in constrained.items():
                weight.copy_(dense.start + dense.free(projection, weight.double() - dense.start))
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- the same by the engine


class Silent:
    def show_activity(self, *_: Any) -> None:
        pass


def build_engine_and_begin(
    stage: int, zero: dict[str, Any], precision: str = "fp32", **keys: Any
) -> tuple[Engine, Osft]:
    """An engine with the method's constraint, at the beginning of the first of two tasks."""
    facts = RunInfo(0, ("first", "second"), base_model="", model="", tokenizer="", prompt_limit=0, precision=precision)
    method = Osft(OsftPreset(constraint=OsftConfig(**{**PLAIN, **keys})), facts)
    built = toy_backbone({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    engine = Engine(
        {"zero_optimization": {"stage": stage, **zero}},
        build=built.build,
        read=built.weights.read,
        prepare=method.prepare,
        constraint=method.constraint,
        precision=precision,
        weight_decay=0.1,
        grad_clip=1.0,
    )
    for group in engine.optimizer.param_groups:
        group["eps"] = EPS
    ranks = build_task_context(engine, None, Silent(), TrainState(), "")  # type: ignore[arg-type]
    engine.reset_optimizer(method.begin_task(0, "first", ranks))
    return engine, method


def train_steps(engine: Engine, accumulation: int, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        batches, count = micro_batches(step, accumulation)
        total = engine.step(summed_loss, batches, targets=count, lr=rate(step))
        losses.append((comm.all_reduce_sum(total) / count).item())
    return losses


@dataclass
class Result:
    """The result of one rank."""

    losses: list[float]
    start: Shards
    weights: Shards
    moments: Shards  # AdamW's first
    owned: Tensors


def train_with_constraint(
    stage: int, zero: dict[str, Any], projection: str, accumulation: int, hold: bool, gradients: bool
) -> Result:
    engine, method = build_engine_and_begin(stage, zero, projection=projection, project_gradients=gradients)
    if not hold:
        method.project_weight = lambda *_: None  # type: ignore[method-assign]
    start, losses = master_shards(engine), train_steps(engine, accumulation)
    moments: Shards = {}
    for shard in engine.shards.disjoint_shards():
        moments.setdefault(shard.name, []).append((shard.start, shard.moments["exp_avg"].clone()))
    result = Result(losses, start, master_shards(engine), moments, method.matrix_state_dict())
    engine.close()
    return result


def merge_owned(results: list[Result]) -> Tensors:
    """The owned tensors of all ranks; no tensor may have two owners."""
    names = [name for result in results for name in result.owned]
    assert len(set(names)) == len(names)
    return {name: tensor for result in results for name, tensor in result.owned.items()}


def protected_change_norms(projection: str, results: list[Result]) -> dict[str, tuple[float, float]]:
    """For each target the relative norms of the protected parts of its change and of AdamW's first moment."""
    owned = merge_owned(results)
    start, weights, moments = (assemble([getattr(r, of) for r in results]) for of in ("start", "weights", "moments"))
    norms = {}
    for name in filter(is_target, start):
        right, left = owned[f"{name}|right"], owned[f"{name}|left"]
        shape = len(left), len(right)
        change, moment = (weights[name].double() - start[name].double()).view(shape), moments[name].view(shape)
        assert change.norm() > 0.1 * start[name].norm()  # the weight has changed substantially
        norms[name] = (
            protected_change_norm(projection, change, right, left) / float(start[name].norm()),
            protected_change_norm(projection, moment, right, left) / float(moment.norm()),
        )
    assert len(norms) == 2 * len(TARGETS)
    return norms


def check_parity(results: list[Result], losses: list[float], weights: Tensors) -> None:
    for result in results:
        assert result.losses == pytest.approx(losses, rel=1e-5)
    merged = assemble([result.weights for result in results])
    assert sorted(merged) == sorted(weights)
    for name, values in merged.items():
        assert (values - weights[name].flatten()).norm() <= 1e-5 * weights[name].norm(), name
    joined, expected_joined = (
        torch.cat([tensors[name].flatten() for name in sorted(merged)]) for tensors in (merged, weights)
    )
    assert (joined - expected_joined).norm() <= 2e-6 * expected_joined.norm()


SMALL = {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}
EXHAUSTIVE = pytest.mark.exhaustive
SETTINGS = [
    (1, 0, {}, 1, "paper"), (1, 2, {}, 1, "two_sided"), (1, 3, SMALL, 4, "input"),
    (2, 0, {}, 4, "input"), (2, 1, OFFLOAD, 4, "two_sided"), (2, 2, OFFLOAD, 1, "input"),
    (2, 3, {**OFFLOAD, **SMALL}, 4, "paper"), (4, 1, {}, 4, "input"), (4, 3, SMALL, 1, "two_sided"),
    *(
        pytest.param(2, stage, {}, 4 - 3 * (stage % 2), projection, marks=EXHAUSTIVE)
        for stage in range(4)
        for projection in PROJECTIONS
        if (stage, projection) != (0, "input")
    ),
    *(
        pytest.param(*setting, marks=EXHAUSTIVE)
        for setting in ((1, 1, OFFLOAD, 4, "input"), (4, 0, {}, 1, "two_sided"), (4, 2, {}, 1, "paper"))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("world", "stage", "zero", "accumulation", "projection"), SETTINGS)
def test_steps_equal_plain_torch_with_dense_projectors(
    ranks: Any, world: int, stage: int, zero: dict[str, Any], accumulation: int, projection: str
) -> None:
    results = ranks(world)(train_with_constraint, stage, zero, projection, accumulation, True, False)
    check_parity(results, *reference(projection))
    for name, (of_weight, _) in protected_change_norms(projection, results).items():
        assert of_weight <= 1e-6, name


@pytest.mark.parametrize(
    ("stage", "zero", "projection"),
    [
        (0, {}, "input"),
        (1, {}, "paper"),
        (2, OFFLOAD, "two_sided"),
        (3, {**OFFLOAD, **SMALL}, "input"),
        pytest.param(1, OFFLOAD, "input", marks=EXHAUSTIVE),
        *(
            pytest.param(2, OFFLOAD, projection, marks=EXHAUSTIVE)
            for projection in PROJECTIONS
            if projection != "two_sided"
        ),
        pytest.param(3, SMALL, "two_sided", marks=EXHAUSTIVE),
    ],
)
def test_the_optimizer_keeps_nothing_of_projected_gradients(
    ranks: Any, stage: int, zero: dict[str, Any], projection: str
) -> None:
    results = ranks(2)(train_with_constraint, stage, zero, projection, 1, True, True)
    check_parity(results, *reference(projection, gradients=True))
    for name, (of_weight, of_moment) in protected_change_norms(projection, results).items():
        assert max(of_weight, of_moment) <= 1e-6, name


@pytest.mark.parametrize(
    ("stage", "zero", "projection"),
    [
        (0, {}, "paper"),
        (1, {}, "input"),
        (2, {}, "two_sided"),
        *(pytest.param(2, {}, projection, marks=EXHAUSTIVE) for projection in PROJECTIONS if projection != "two_sided"),
        pytest.param(3, SMALL, "input", marks=EXHAUSTIVE),
    ],
)
def test_without_the_projection_it_would_be_noticed(
    ranks: Any, stage: int, zero: dict[str, Any], projection: str
) -> None:
    """Projected gradients alone are no constraint: AdamW's scaling and weight decay leave the subspace."""
    projected = protected_change_norms(
        projection, ranks(2)(train_with_constraint, stage, zero, projection, 1, True, False)
    )
    assert min(of_moment for _, of_moment in projected.values()) > 1e-2
    for gradients in (False, True):
        unprojected = protected_change_norms(
            projection, ranks(2)(train_with_constraint, stage, zero, projection, 1, False, gradients)
        )
        for name in projected:
            assert unprojected[name][0] > 1e3 * projected[name][0], name


def train_in_bf16(stage: int, zero: dict[str, Any]) -> tuple[bool, Result]:
    """Whether the model's bf16 weights are the rounded masters on this rank, after two steps."""
    engine, method = build_engine_and_begin(stage, zero, "bf16", projection="input", project_gradients=True)
    start, losses = master_shards(engine), train_steps(engine, 1, 2)
    shards = master_shards(engine)
    full_weights, is_equal = assemble(comm.all_gather_objects(shards)), True
    for name, parameter in engine.module.named_parameters():
        with gathered(parameter):
            is_equal &= torch.equal(parameter.detach().flatten(), full_weights[name].bfloat16())
    result = Result(losses, start, shards, shards, method.matrix_state_dict())
    engine.close()
    return is_equal, result


def train_with_skipped_projection(stage: int, zero: dict[str, Any]) -> tuple[Shards, Shards, Shards, Tensors]:
    """Two steps without projection, then a step with projection that is skipped because its loss is NaN. Returns the
    weights at the start, before and after the last step, and the owned tensors."""
    engine, method = build_engine_and_begin(stage, zero, projection="two_sided")
    start = master_shards(engine)
    for step, hold in enumerate((False, False, True)):
        batches, count = micro_batches(step, 1)
        loss = (lambda m, t: summed_loss(m, t) * math.nan) if hold else summed_loss
        if hold:
            unprojected = {
                name: [(at, values.clone()) for at, values in of] for name, of in master_shards(engine).items()
            }
        engine.step(loss, batches, targets=count, lr=rate(step), skip_non_finite=True, project=hold)
    end, owned = master_shards(engine), method.matrix_state_dict()
    engine.close()
    return start, unprojected, end, owned


@pytest.mark.parametrize(("stage", "zero"), [pytest.param(0, {}, marks=EXHAUSTIVE), (1, {}), (3, SMALL)])
def test_a_step_that_is_left_out_still_brings_the_weights_back(ranks: Any, stage: int, zero: dict[str, Any]) -> None:
    results = ranks(2)(train_with_skipped_projection, stage, zero)
    before, unprojected, after = (assemble([result[place] for result in results]) for place in range(3))
    owned = {name: tensor for *_, rank_owned in results for name, tensor in rank_owned.items()}
    for name in filter(is_target, before):
        right, left = owned[f"{name}|right"], owned[f"{name}|left"]
        change = (after[name] - before[name]).view(len(left), len(right))
        assert change.norm() > 1e-2 * after[name].norm()
        assert protected_change_norm("two_sided", change, right, left) <= 1e-6 * float(after[name].norm())
        unprojected_change = (unprojected[name] - before[name]).view(len(left), len(right))
        assert protected_change_norm("two_sided", unprojected_change, right, left) > 1e-4 * float(after[name].norm())


@pytest.mark.parametrize(("stage", "zero"), [(0, {}), (1, {}), (2, OFFLOAD), (3, SMALL)])
def test_bf16_weights_are_the_rounded_masters(ranks: Any, stage: int, zero: dict[str, Any]) -> None:
    results = ranks(2)(train_in_bf16, stage, zero)
    assert all(is_equal for is_equal, _ in results)
    assert max(norm for norm, _ in protected_change_norms("input", [result for _, result in results]).values()) <= 1e-6


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=EXHAUSTIVE)])
def test_each_rank_keeps_its_own_bases_alone(ranks: Any, world: int) -> None:
    results = ranks(world)(train_with_constraint, 3, {}, "two_sided", 1, True, False)
    owned = merge_owned(results)
    shapes = {
        n.split("|")[0]: (len(owned[f"{n.split('|')[0]}|left"]), len(t)) for n, t in owned.items() if "|right" in n
    }
    assert len(shapes) == 2 * len(TARGETS)
    owners = assign_owners(
        {name: float(rows * columns * min(rows, columns)) for name, (rows, columns) in shapes.items()}, world
    )
    for rank, result in enumerate(results):
        assert {name.split("|")[0] for name in result.owned} == {name for name in shapes if owners[name] == rank}
    sizes = [sum(tensor.numel() for tensor in result.owned.values()) for result in results]
    assert max(sizes) <= 1.15 * sum(sizes) / world


# ---- whole runs of three tasks


BASIC = {
    "projection": "input", "protect_base": ["activations"], "rank_allocation": "fixed", "protected_ratio": 0.25,
    "protect_task": ["updates"], "energy_threshold": 0.5, "on_full": "fair_share", "project_gradients": True,
    "project_every": 1, "other_params": "frozen",
}  # fmt: skip
NAMES = {"colour": "colour", "animal": "animal", "again": "colour"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("osft")
    write_tasks(folder)
    return folder


def recipe(folder: Path, name: str, stage: int, keep: int = 2, evaluate: int = 3, **keys: Any) -> dict[str, Any]:
    """A recipe of three tasks (5, 4 and 5 steps), evaluated after the last one unless `evaluate` says otherwise."""
    document = recipe_of(folder, name, stage, train__epochs=1, train__lr=2e-2, train__weight_decay=0.1)
    document["method"] = {"name": "osft", "constraint": {**BASIC, **keys}}
    document["stream"] = [{"name": name, "path": str(folder / path)} for name, path in NAMES.items()]
    document["checkpoint"] = {"every": 3, "keep": keep}
    document["evaluate"] = {"zero_shot": False, "tasks": "seen", "every": evaluate}
    return document


@pytest.fixture(scope="module")
def completed_run(ranks: Any) -> Callable[[dict[str, Any]], Path]:
    """The folder of a run of this recipe on two ranks. Tests with the same recipe share it and may not write to it."""
    folders: dict[str, Path] = {}

    def get(document: dict[str, Any]) -> Path:
        key = json.dumps({name: value for name, value in document.items() if name != "run_dir"}, sort_keys=True)
        if key not in folders:
            ranks(2)(with_few_texts, run, document)
            folders[key] = Path(document["run_dir"])
        return folders[key]

    return get


CHOICES: list[dict[str, Any]] = [
    {"projection": "input"},
    {
        "projection": "two_sided",
        "protect_base": ["weights", "activations"],
        "rank_allocation": "energy",
        "protected_ratio": 0.3,
        "project_gradients": True,
    },
    {
        "projection": "paper",
        "protect_base": ["weights"],
        "rank_allocation": "importance",
        "protected_ratio": 0.4,
        "min_protected": 0.1,
        "protect_task": ["activations", "updates"],
    },
    {"projection": "input", "protect_base": ["sensitivity"], "protect_task": ["sensitivity"]},
]


@pytest.mark.parametrize(
    ("stage", "choice"),
    [(0, 0), (1, 2), (2, 1), (3, 3), *(pytest.param(*c, marks=EXHAUSTIVE) for c in ((2, 0), (2, 2), (2, 3), (3, 1)))],
)
def test_what_was_protected_once_stays_so(completed_run: Any, tasks: Path, stage: int, choice: int) -> None:
    projection = CHOICES[choice]["projection"]
    run_dir = completed_run(recipe(tasks, f"nested{stage}-{choice}", stage, keep=99, **CHOICES[choice]))
    learned = [read_checkpoint_tensors(path) for path in checkpoint_dirs(run_dir) if path.name.endswith("-learned")]
    assert len(learned) == 3
    final = learned[-1][0]
    grown = 0
    for (weights, owned), (_, later) in itertools.pairwise(learned):
        assert max_constraint_error(projection, weights, owned) <= 1e-6
        assert max_constraint_error(projection, final, owned) <= 1e-6
        for name, tensor in owned.items():
            assert torch.equal(later[name][tuple(map(slice, tensor.shape))], tensor), name
        grown += sum(later[name].shape != tensor.shape for name, tensor in owned.items() if name.endswith("|right"))
        assert any((final[name] - weights[name]).norm() > 0.1 * weights[name].norm() for name in weights)
    assert grown >= len(TARGETS)


def output_changes(document: dict[str, Any], weights: list[Tensors], owned: Tensors) -> tuple[float, float]:
    """The relative output changes of the target layers between the first and the last weights, on inputs of the first
    task: the largest for the protected parts of the inputs, and the smallest for the complete inputs."""
    setup = build_setup(resolve_recipe(document))
    model = setup.backbone.build()
    load_parameters(
        model, lambda name, shape, start, stop: weights[0].get(name, setup.backbone.weights.read(name, shape, 0, stop))
    )
    layer_inputs: Tensors = {}
    modules = dict(model.named_modules())
    for matrix in group_by_matrix(owned):
        hook = functools.partial(
            lambda name, _m, inputs: layer_inputs.__setitem__(name, inputs[0].flatten(0, 1)), matrix
        )
        modules[matrix.removesuffix(".weight")].register_forward_pre_hook(hook)
    protected, whole = 0.0, math.inf
    batch = setup.tasks[0].micro_batches(0)[0]
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask, batch.position_ids)
    for matrix, subspace in group_by_matrix(owned).items():
        inputs, right = layer_inputs[matrix].double(), subspace["right"].double()
        change = (weights[-1][matrix] - weights[0][matrix]).double().view(len(subspace["left"]), len(right))
        size = inputs.norm() * weights[0][matrix].norm()
        protected = max(protected, float((inputs @ right @ right.T @ change.T).norm() / size))
        whole = min(whole, float((inputs @ change.T).norm() / size))
    return protected, whole


def test_protected_inputs_get_the_same_answers_after_later_tasks(completed_run: Any, tasks: Path) -> None:
    document = recipe(tasks, "answers", 0, keep=99, **CHOICES[0])
    learned = [
        read_checkpoint_tensors(path)
        for path in checkpoint_dirs(completed_run(document))
        if path.name.endswith("-learned")
    ]
    protected, unprotected = output_changes(document, [weights for weights, _ in learned], learned[0][1])
    assert protected <= 1e-6
    assert unprotected > 1e-3


# ---- projections now and then


def run_and_record_errors(document: dict[str, Any]) -> list[tuple[str, float]]:
    """Run; the largest constraint error of this rank's matrices after each step and save, and before each
    evaluation."""
    errors: list[tuple[str, float]] = []
    engines: list[Engine] = []

    def record_error(where: str) -> None:
        engine, matrix_errors = engines[-1], [0.0]
        method = engine.constraint
        assert isinstance(method, Osft)
        by_matrix = group_by_matrix(method.matrix_state_dict())
        engine.apply_on_owners(
            lambda name, weight: matrix_errors.append(constraint_error("input", weight, by_matrix[name]))
        )
        errors.append((where, max(matrix_errors)))

    with pytest.MonkeyPatch.context() as patch:
        step, save, evaluate_task = Engine.step, Checkpoints.save, evaluation.evaluate_task

        def step_and_record(self: Engine, *a: Any, **k: Any) -> Any:
            engines.append(self)
            result = step(self, *a, **k)
            record_error("step")
            return result

        def save_and_record(self: Checkpoints, *a: Any) -> None:
            save(self, *a)
            if engines:
                record_error("save")

        def record_and_evaluate(*a: Any) -> Any:
            if engines:
                record_error("take")
            return evaluate_task(*a)

        patch.setattr(Engine, "step", step_and_record)
        patch.setattr(Checkpoints, "save", save_and_record)
        patch.setattr(evaluation, "evaluate_task", record_and_evaluate)
        run(document)
    return errors


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=EXHAUSTIVE), 3])
def test_between_projections_it_may_be_off_but_never_where_it_counts(ranks: Any, tasks: Path, stage: int) -> None:
    document = recipe(tasks, f"seldom{stage}", stage, keep=99, evaluate=1, project_every=4)
    results = ranks(2)(with_few_texts, run_and_record_errors, document)
    steps = torch.tensor([[error for where, error in errors if where == "step"] for errors in results]).amax(0).tolist()
    # Tasks of 5, 4 and 5 steps; checkpoints after steps 3, 6 and 12 of all, and after every task.
    assert len(steps) == 14
    for step, error in enumerate(steps, start=1):
        assert error <= 1e-6 if step in (3, 4, 5, 6, 9, 12, 13, 14) else error > 1e-4, step
    for errors in results:
        others = [(where, error) for where, error in errors if where != "step"]
        assert {where for where, _ in others} == {"save", "take"}
        assert max(error for _, error in others) <= 1e-6
    for path in checkpoint_dirs(Path(document["run_dir"])):
        assert max_constraint_error("input", *read_checkpoint_tensors(path)) <= 1e-6


# ---- restarts


PLACES = {
    "begin": (Osft, "begin_task"),
    "end": (Osft, "end_task"),
    "visit": (Engine, "apply_on_owners"),
    "step": (Engine, "step"),
}


def killed_around(document: dict[str, Any], deaths: list[tuple[str, int]]) -> None:
    run_killed_after(document, deaths, PLACES)


ANYWHERE = run_until, [("step", 2), ("save", 3), ("take", 3), ("step", 4), ("shares", 1), ("gather", 2)]
AROUND_TASKS = killed_around, [("begin", 1), ("step", 1), ("end", 1), ("begin", 1), ("end", 1), ("step", 2)]
WITHIN = killed_around, [("visit", 1), ("visit", 2), ("visit", 3), ("visit", 1), ("visit", 2), ("visit", 2)]
WITHIN_FEW = killed_around, [("visit", 1), ("visit", 2), ("visit", 1), ("visit", 2), ("visit", 1)]
SHORT = {"on_full": "release_base", "protected_ratio": 0.75, "energy_threshold": 0.9}


@EXHAUSTIVE
@pytest.mark.parametrize(
    ("stage", "keys", "ways"),
    [
        (0, CHOICES[1], (ANYWHERE, AROUND_TASKS, WITHIN)),
        (2, {"project_every": 4, **SHORT}, (ANYWHERE, AROUND_TASKS, WITHIN)),
        (3, CHOICES[3], (AROUND_TASKS, WITHIN_FEW)),
    ],
)
def test_a_run_that_died_ends_as_one_that_did_not(
    ranks: Any, tasks: Path, stage: int, keys: dict[str, Any], ways: list[Any]
) -> None:
    ranks(2)(with_few_texts, run, recipe(tasks, f"whole{stage}", stage, evaluate=1, **keys))
    expected = run_outcome(tasks / f"whole{stage}")
    assert {"owned-00000.safetensors", "owned-00001.safetensors"} <= set(expected[-1])
    for number, (killed, deaths) in enumerate(ways):
        name = f"died{stage}-{number}"
        ranks(2)(with_few_texts, killed, recipe(tasks, name, stage, evaluate=1, **keys), deaths)
        assert run_outcome(tasks / name) == expected, deaths


def with_lower_rate(document: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a lower learning rate, so that rounding differences between numbers of ranks grow more slowly."""
    document["train"]["lr"] = 5e-3
    return document


@pytest.mark.parametrize(
    ("before", "after", "stage"),
    [(1, 2, 2), *(pytest.param(*sizes, marks=EXHAUSTIVE) for sizes in ((2, 1, 1), (2, 4, 3), (4, 1, 0)))],
)
def test_another_number_of_ranks_deals_the_owners_anew(
    ranks: Any, tasks: Path, before: int, after: int, stage: int
) -> None:
    if not (tasks / "size-whole").exists():
        ranks(1)(with_few_texts, run, with_lower_rate(recipe(tasks, "size-whole", 0)))
    document = with_lower_rate(recipe(tasks, f"size{before}{after}", stage))
    ranks(before)(with_few_texts, run_until_killed, document, 8)  # in the second task, after a checkpoint within it
    ranks(after)(with_few_texts, run, document)
    run_dir = Path(document["run_dir"])
    whole, changed = read_metrics(tasks / "size-whole"), read_metrics(run_dir)
    assert [r["step"] for r in changed] == [r["step"] for r in whole]
    assert [r["loss"] for r in changed] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    newest = checkpoint_dirs(run_dir)[-1]
    assert len(list(newest.glob("owned-*"))) == after
    assert max_constraint_error("input", *read_checkpoint_tensors(newest)) <= 1e-6


def test_damage_to_what_an_owner_kept_is_noticed(ranks: Any, completed_run: Any, tasks: Path) -> None:
    sound = completed_run(recipe(tasks, "sound", 0, keep=99, **CHOICES[0]))
    damaged = recipe(tasks, "damaged", 0, keep=99, **CHOICES[0])
    ranks(2)(with_few_texts, run_until_killed, damaged, 8)
    older, newer = checkpoint_dirs(tasks / "damaged")[-2:]
    path = newer / "owned-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    lines = ranks(2)(with_few_texts, run_listening, damaged)[0]
    assert any(f"{newer.name} is damaged (owned-00001.safetensors does not match its checksum)" in x for x in lines)
    assert any(f"resumed from {older.name}" in line for line in lines)
    assert run_outcome(tasks / "damaged") == run_outcome(sound)


# ---- at the edges


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"targets": ["q_proj", "gate"]},
            "method.constraint.targets: given 'gate', which no layer matches; layers here: ",
        ),
        ({"protected_ratio": 1.5}, "method.constraint.protected_ratio: given 1.5"),
        ({"protected_ratio": -0.1}, "method.constraint.protected_ratio: given -0.1"),
        ({"energy_threshold": 2}, "method.constraint.energy_threshold: given 2"),
        ({"project_every": 0}, "method.constraint.project_every: given 0"),
        ({"projection": "output"}, "method.constraint.projection: given 'output'"),
    ],
)
def test_settings_that_cannot_be_are_refused(ranks: Any, tasks: Path, keys: dict[str, Any], expected: str) -> None:
    for kind, message in ranks(2)(with_few_texts, run_error, recipe(tasks, "refused", 1, **keys)):
        assert kind == "UserError"
        assert expected in message
        assert "\n" not in message


def run_with_infinite_weight(document: dict[str, Any], matrix: str) -> tuple[str, str]:
    """Run; one element of a weight is infinite from the start."""
    original = RandomWeights.read

    def read(self: RandomWeights, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        values = original(self, name, shape, start, stop)
        if name == matrix and start == 0:
            values[0] = math.inf
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomWeights, "read", read)
        return run_error(document)


def run_with_nan_weight(document: dict[str, Any], matrix: str, at: int) -> tuple[str, str]:
    """Run; one element of a weight is NaN after the `at`-th step."""
    original, calls = Engine.step, [0]

    def step(self: Engine, *a: Any, **k: Any) -> Any:
        result = original(self, *a, **k)
        calls[0] += 1
        for fragment in self.shards.local_shards() if calls[0] == at else ():
            if fragment.name == matrix and fragment.start == 0:
                fragment.master[0] = math.nan
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        return run_error(document)


@pytest.mark.parametrize(
    ("stage", "basis"),
    [
        (0, "weights"),
        (3, "activations"),
        *(pytest.param(*place, marks=EXHAUSTIVE) for place in ((0, "activations"), (3, "weights"))),
    ],
)
def test_a_weight_that_is_not_finite_is_told_in_one_line(ranks: Any, tasks: Path, stage: int, basis: str) -> None:
    matrix = "model.layers.1.mlp.up_proj.weight"
    document = recipe(tasks, f"spoilt{stage}{basis}", stage, protect_base=[basis])
    for results in (
        ranks(2)(with_few_texts, run_with_infinite_weight, document, matrix),
        ranks(2)(
            with_few_texts,
            run_with_nan_weight,
            recipe(tasks, f"exploded{stage}{basis}", stage, protect_base=[basis]),
            matrix,
            5,
        ),
    ):
        assert results[0] == results[1]
        kind, message = results[0]
        assert kind == "UserError"
        assert "not finite" in message
        assert "\n" not in message


# ---- texts of the model's own


def sample_on_rank(stage: int, texts: int, length: int) -> list[torch.Tensor]:
    engine, _ = build_engine_and_begin(stage, {})
    engine.module.eval()
    with torch.no_grad():
        blocks = sample_texts(engine.module, texts, length, 3, engine.device)
    engine.close()
    # Also blocks of which only some or none of the texts count are complete.
    assert all(ids.shape == (TEXTS_PER_BLOCK, length) for ids, _ in blocks)
    return [ids[:counting] for ids, counting in blocks]


@pytest.mark.parametrize(
    "places",
    [
        ((1, 0), (2, 0), (2, 3), (4, 3)),
        pytest.param(((1, 0), (1, 3), (2, 0), (2, 3), (4, 0), (4, 3)), marks=EXHAUSTIVE),
    ],
)
def test_the_models_texts_do_not_depend_on_ranks_or_stages(ranks: Any, places: Any) -> None:
    texts = 3 * TEXTS_PER_BLOCK + 5
    expected: torch.Tensor | None = None
    for world, stage in places:
        blocks = ranks(world)(sample_on_rank, stage, texts, 9)
        assert len({len(of_rank) for of_rank in blocks}) == 1  # equally many passes
        texts_of_ranks = torch.cat([of_rank[number] for number in range(len(blocks[0])) for of_rank in blocks])
        assert texts_of_ranks.shape == (texts, 9)
        expected = texts_of_ranks if expected is None else expected
        assert torch.equal(texts_of_ranks, expected), (world, stage)
    assert len(set(map(tuple, expected.tolist()))) == texts


def test_the_models_texts_follow_its_distribution() -> None:
    """Pearson's statistic of the second and third tokens against the model's own probabilities."""
    built = toy_backbone()
    shape = LlamaConfig(**{**built.hf_config.to_dict(), "vocab_size": 7, "bos_token_id": 3})
    model: Any = dataclasses.replace(built, hf_config=shape).build()
    load_parameters(model, RandomWeights(5, 0.08).read)
    model.eval()
    progress: list[tuple[int, int]] = []
    with torch.no_grad():
        blocks = sample_texts(model, 4000, 3, 0, torch.device("cpu"), lambda *done: progress.append(done))
        ids = torch.cat([ids[:counting] for ids, counting in blocks])
        expected = model(torch.tensor([[3, token] for token in range(7)])).logits.double().softmax(-1)
    assert ids.shape == (4000, 3)
    assert progress == [(3 * block + token, 3 * len(blocks)) for block in range(len(blocks)) for token in (1, 2)]
    assert (ids[:, 0] == 3).all()
    observed = torch.zeros(7, 7, dtype=torch.float64).index_put((ids[:, 1], ids[:, 2]), torch.ones(1).double(), True)
    second = 4000 * expected[0, 0]
    third = observed.sum(1, keepdim=True) * expected[:, 1]
    assert second.max() > 2 * second.min()  # not a uniform distribution
    assert float(((observed.sum(1) - second) ** 2 / second).sum()) < 34  # 6 degrees of freedom: one in 100 000
    assert float(((observed - third) ** 2 / third).sum()) < 95  # 42 degrees


# ---- a look through the model


def probe_and_train(stage: int, zero: dict[str, Any], accumulation: int) -> tuple[list[float], Tensors]:
    """Collect gradient-weighted moments over the rows of all ranks, then train; the losses of the steps, and the
    moments."""
    engine, method = build_engine_and_begin(stage, zero, projection="input")
    moments = ActivationStats(gradient_weighted=True)
    engine.module.train()
    with moments.collect_stats(engine.module, [name.removesuffix(".weight") for name in method.matrix_costs()]):
        for toy in sample_rows(0)[comm.rank() :: comm.world_size()]:
            engine.probe_activations(functools.partial(summed_loss, toy=toy), True)
    assert engine.module.training
    losses = train_steps(engine, accumulation)
    engine.close()
    return losses, {layer: comm.all_reduce_sum(moments.sums[layer]) for layer in sorted(moments.sums)}


@pytest.mark.parametrize(
    ("world", "stage", "zero"),
    [
        (2, 0, {}),
        (2, 2, OFFLOAD),
        (2, 3, SMALL),
        *(pytest.param(*place, marks=EXHAUSTIVE) for place in ((1, 3, {}), (2, 1, {}), (4, 3, {}))),
    ],
)
def test_a_probe_feels_the_loss_and_leaves_nothing_behind(
    ranks: Any, world: int, stage: int, zero: dict[str, Any]
) -> None:
    expected = gradient_weighted_moments(sample_rows(0))
    for losses, sums in ranks(world)(probe_and_train, stage, zero, 4 // world):
        assert losses == pytest.approx(reference("input")[0], rel=1e-5)
        assert sorted(sums) == sorted(expected)
        for layer, of_layer in expected.items():
            assert (sums[layer] - of_layer).norm() <= 1e-5 * of_layer.norm(), layer
