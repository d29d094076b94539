"""OSFT on one process without an engine: which directions are protected, and how free ones are divided."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.config.methods import OsftPreset
from dscl.config.parsing import parse_config
from dscl.data.batches import Batch, collate
from dscl.maths.subspace import ProtectedSubspace
from dscl.methods import osft
from dscl.methods.base import RunInfo, TaskContext
from dscl.methods.osft import Osft
from dscl.utils.errors import UserError

TASKS = ("one", "two", "three", "four")
SHAPE = LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
    vocab_size=50, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TARGETS = 7 * SHAPE.num_hidden_layers


@pytest.fixture(autouse=True)
def sample_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and shorter sampled texts; still many more tokens than a matrix has columns."""
    monkeypatch.setattr(osft, "NUM_TEXTS", 40)
    monkeypatch.setattr(osft, "TEXT_LENGTH", 16)


def make_config(**constraint: Any) -> OsftPreset:
    return parse_config(OsftPreset, {"name": "osft", "constraint": constraint}, "method")


def make_tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE)


def make_batch() -> Batch:
    pairs = [([1, 5, 9, 7], [3, 2]), ([1, 8, 30], [4, 2]), ([1, 6, 6, 41, 13], [3, 2])]
    return collate([(0,), (1,), (2,)], pairs, 0, False, 1, True)


def _unexpected_call(*_: Any) -> Any:
    raise AssertionError("not asked for here")


class SingleRankOsft:
    """An `Osft` method on a tiny model, called as the trainer would call it."""

    def __init__(self, tasks: Sequence[str] = TASKS, **constraint: Any) -> None:
        self.model = make_tiny_model()
        self.method = Osft(make_config(**constraint), RunInfo(0, tuple(tasks), "", "", "", 0, ""))
        self.method.prepare(self.model)
        self.weights = dict(self.model.named_parameters())
        self.names = list(self.method.matrix_costs())
        self.method.set_owned(self.names, torch.device("cpu"))
        self.message = ""
        self.context = TaskContext(
            torch.device("cpu"),
            self.model,
            self._probe_activations,
            self._iter_batches,
            dict,
            self._apply_on_owners,
            lambda t: t,
            print,
            self._raise_on_all_ranks,
            *[_unexpected_call] * 4,
        )

    def train_task(self, task: str) -> None:
        """Begin a task, change every weight and project it, and end the task."""
        index = self.method.run_info.task_names.index(task)
        self.method.begin_task(index, task, self.context)
        generator = torch.Generator().manual_seed(index)
        for name in self.names:
            weight = self.weights[name].data
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
            self.method.project_weight(name, weight)
        self.message = self.method.end_task(index, task, self.context).message

    def get_subspaces(self) -> dict[str, ProtectedSubspace]:
        tensors_by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self.method.matrix_state_dict().items():
            name, kind = key.rsplit("|", 1)
            if kind not in ("start", "base"):
                tensors_by_name.setdefault(name, {})[kind] = tensor.clone()
        return {
            name: ProtectedSubspace.from_state_dict(str(self.method.settings.projection), parts)
            for name, parts in tensors_by_name.items()
        }

    def _apply_on_owners(self, matrix_fn: Callable[[str, torch.Tensor], None], names: Sequence[str]) -> None:
        for name in names:
            matrix_fn(name, self.weights[name].data.clone())

    def _iter_batches(self, samples: int) -> Iterator[Batch]:
        yield make_batch()

    def _probe_activations(self, loss: Callable[[Any], torch.Tensor], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            value = loss(self.model)
        if backward:
            value.backward()

    @staticmethod
    def _raise_on_all_ranks(problem: str) -> None:
        if problem:
            raise UserError(problem)


@pytest.mark.parametrize("projection", ["input", "two_sided", "paper"])
@pytest.mark.parametrize("protect_task", [["sensitivity"], ["activations"], ["updates"], None])
def test_protected_directions_stay_protected_in_later_tasks(projection: str, protect_task: list[str] | None) -> None:
    run = SingleRankOsft(projection=projection, protect_task=protect_task, energy_threshold=0.9, protected_ratio=0.25)
    snapshots: list[tuple[dict[str, ProtectedSubspace], dict[str, torch.Tensor]]] = []
    for task in TASKS:
        run.train_task(task)
        snapshots.append((run.get_subspaces(), {name: run.weights[name].data.clone() for name in run.names}))
    num_grown = 0
    for earlier, (subspaces, weights) in enumerate(snapshots):
        for later, end in snapshots[earlier:]:
            for name, space in subspaces.items():
                new = later[name]
                num_known = space.right.shape[1]
                assert torch.equal(new.right[:, :num_known], space.right)
                assert torch.equal(new.left[:, : space.left.shape[1]], space.left)
                assert space.protected_norm(end[name] - weights[name]) <= 1e-6 * float(end[name].norm())
                num_grown += new.right.shape[1] > num_known
    assert num_grown > TARGETS  # and it does grow


@pytest.mark.parametrize("other_params", ["frozen", "free", "protected"])
def test_what_trains_besides_the_targets(other_params: str) -> None:
    run = SingleRankOsft(other_params=other_params, targets=["q_proj"], protected_ratio=0.25)
    matrices = {name for name, weight in run.weights.items() if weight.ndim == 2}
    targets = {name for name in matrices if "q_proj" in name}
    training = {name for name, weight in run.weights.items() if weight.requires_grad}
    assert len(targets) == SHAPE.num_hidden_layers
    assert training == {"frozen": targets, "free": set(run.weights), "protected": matrices}[other_params]
    assert set(run.names) == (matrices if other_params == "protected" else targets)  # those under the constraint


@pytest.mark.parametrize(("projection", "protected_ratio"), [("input", 0.25), ("two_sided", 0.0)])
def test_a_task_protects_the_strongest_directions_of_its_change(projection: str, protected_ratio: float) -> None:
    """The reference: the singular vectors of the task's change of each weight."""
    run = SingleRankOsft(
        projection=projection, energy_threshold=0.6, protect_task=["updates"], protected_ratio=protected_ratio
    )
    before = {name: run.weights[name].data.clone() for name in run.names}
    run.train_task("one")
    for name, space in run.get_subspaces().items():
        change = (run.weights[name].data - before[name]).double()
        decomposed = torch.linalg.svd(change)
        protected = space.right[:, int(protected_ratio * min(change.shape)) :].double()
        strongest = decomposed.Vh[: protected.shape[1]].T
        assert protected.shape[1] >= 1
        assert torch.allclose(protected @ protected.T, strongest @ strongest.T, atol=1e-4)
        if projection == "two_sided":
            left, strongest = space.left.double(), decomposed.U[:, : space.left.shape[1]]
            assert left.shape[1] >= 1
            assert torch.allclose(left @ left.T, strongest @ strongest.T, atol=1e-4)


def test_a_task_gets_at_most_its_part_of_the_free_directions() -> None:
    run = SingleRankOsft(energy_threshold=1.0, protect_task=["updates"], protected_ratio=0.5)
    free_counts = []
    for task in TASKS:
        if not free_counts:
            run.method.begin_task(0, task, run.context)
        free_counts.append({name: len(s.right) - s.right.shape[1] for name, s in run.get_subspaces().items()})
        run.train_task(task)
    for name, first in free_counts[0].items():
        counts = [count_of[name] for count_of in free_counts]
        assert all(
            before - after == before * 3 // (9 - 2 * index)
            for index, (before, after) in enumerate(itertools.pairwise(counts))
        )
        assert counts[-1] >= 0.15 * first > 0


def test_weakest_base_directions_are_released_and_tasks_keep_theirs() -> None:
    run = SingleRankOsft(energy_threshold=1.0, protect_task=["updates"], protected_ratio=0.5, on_full="release_base")
    run.train_task("one")
    before = run.get_subspaces()
    run.train_task("two")
    after = run.get_subspaces()
    for name, space in before.items():
        base = int(0.5 * min(run.weights[name].shape))
        num_free = len(space.right) - base
        assert len(space.right) == space.right.shape[1]  # the first task took all
        num_released = num_free // 4
        remaining = torch.cat([space.right[:, : base - num_released], space.right[:, base:]], 1)
        assert torch.equal(after[name].right[:, : remaining.shape[1]], remaining)
        assert after[name].right.shape[1] - remaining.shape[1] == num_released  # the second task protects these in turn


def test_error_names_the_task_without_free_directions() -> None:
    run = SingleRankOsft(energy_threshold=1.0, protect_task=["updates"], protected_ratio=0.5, on_full="stop")
    run.train_task("one")
    with pytest.raises(
        UserError, match=r"task two finds no free direction in 14 of 14.*method.constraint.on_full=release_base"
    ):
        run.train_task("two")
    with pytest.raises(UserError, match="task one finds no free direction in"):
        SingleRankOsft(protected_ratio=1.0, protect_base=["weights"], targets=["q_proj"]).train_task("one")


def test_the_last_task_protects_nothing() -> None:
    run = SingleRankOsft(tasks=("only",), protected_ratio=0.5)
    run.train_task("only")
    assert run.message == ""
    assert all(space.right.shape[1] == int(0.5 * min(run.weights[n].shape)) for n, space in run.get_subspaces().items())


@pytest.mark.parametrize("protect_base", [["weights"], ["activations"], ["weights", "activations"], ["sensitivity"]])
def test_base_directions_are_the_strongest_of_their_source(protect_base: list[str]) -> None:
    """The reference: moments that plain hooks collect on the same sampled texts."""
    run = SingleRankOsft(protect_base=protect_base, protected_ratio=0.5, protect_task=[])
    run.method.begin_task(0, "one", run.context)
    name = "model.layers.1.mlp.gate_proj"
    ids = torch.cat(
        [block[:count] for block, count in run.method._sample_general_texts(run.context)] or [torch.zeros(0, 2).long()]
    )
    layer_inputs: list[torch.Tensor] = []
    output_gradients: list[torch.Tensor] = []

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        layer_inputs.append(inputs[0].detach().flatten(0, 1).double())
        output.register_hook(lambda gradient: output_gradients.append(gradient.flatten(0, 1).double()))

    weight = run.weights[f"{name}.weight"].data.double()
    moment = weight.T @ weight / weight.square().sum()
    if protect_base != ["weights"]:
        handle = run.model.get_submodule(name).register_forward_hook(hook)
        logits = run.model(input_ids=ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        handle.remove()
        rows = layer_inputs[0] * (
            output_gradients[0].norm(dim=1, keepdim=True) if protect_base == ["sensitivity"] else 1.0
        )
        text_moment = rows.T @ rows
        moment = text_moment if len(protect_base) == 1 else moment + text_moment / text_moment.trace()
    strongest = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :8]
    overlap = torch.linalg.svdvals(strongest.T @ run.get_subspaces()[f"{name}.weight"].right.double())
    assert overlap.min() > 1 - 1e-6


def test_importance_sets_the_protected_ratio_of_each_layer() -> None:
    run = SingleRankOsft(
        projection="paper",
        protect_base=["weights"],
        rank_allocation="importance",
        protected_ratio=0.8,
        min_protected=0.1,
        protect_task=[],
    )
    run.method.begin_task(0, "one", run.context)
    counts = {name: space.right.shape[1] / min(run.weights[name].shape) for name, space in run.get_subspaces().items()}
    for layer in range(2):
        of_layer = {round(value, 1) for name, value in counts.items() if f"layers.{layer}." in name}
        assert max(of_layer) - min(of_layer) <= 0.15  # one share, rounded down in matrices of 8 and 16
    assert 0.1 < sum(counts.values()) / len(counts) <= 0.8


@pytest.mark.parametrize(
    ("constraint", "complaint"),
    [
        ({"min_protected": 0.2}, "method.constraint.min_protected: given 0.2 with rank_allocation: fixed"),
        (
            {"rank_allocation": "importance", "protected_ratio": 0.3, "min_protected": 0.4},
            "method.constraint.min_protected: given 0.4, more than protected_ratio=0.3",
        ),
        (
            {"protect_task": [], "energy_threshold": 0.5},
            "method.constraint.energy_threshold: given 0.5 with protect_task: []",
        ),
        (
            {"protect_base": ["updates"]},
            "method.constraint.protect_base: given ['updates']; allowed: one or several of weights",
        ),
        ({"protect_base": []}, "method.constraint.protect_base: given []; allowed"),
        ({"protect_task": ["updates", "updates"]}, "method.constraint.protect_task: given ['updates', 'updates']"),
        (
            {"protect_task": ["weights"]},
            "method.constraint.protect_task: given ['weights']; allowed: one or several of activations",
        ),
        (
            {"paper_preset": True, "projection": "input"},
            "method.constraint.projection: given input together with paper_preset",
        ),
        ({"protected_ratio": 1.5}, "method.constraint.protected_ratio"),
        ({"projection": "outputs"}, "method.constraint.projection"),
    ],
)
def test_settings_that_contradict_are_refused(constraint: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        make_config(**constraint)


def test_unmatched_targets_and_non_finite_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.constraint.targets: given 'query'.*layers here: .*q_proj"):
        SingleRankOsft(targets=["query"])
    run = SingleRankOsft(protect_base=["weights"])
    run.weights["model.layers.1.mlp.up_proj.weight"].data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"method osft: model.layers.1.mlp.up_proj.weight: .*not finite"):
        run.train_task("one")


def test_paper_preset_is_the_papers_setting() -> None:
    config = make_config(paper_preset=True).constraint
    names = ("projection", "protect_base", "rank_allocation", "min_protected", "protected_ratio")
    values = json.dumps([getattr(config, name) for name in names])
    assert values == '["paper", ["weights"], "importance", 0.1, 0.8]'
    assert config.protect_task == ()
    assert config.project_gradients
