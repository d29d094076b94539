"""OSFT's choices, on one process and without an engine: what is protected, from where, and how room is shared out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.config.parsing import parse
from dscl.data.batches import Batch, collate
from dscl.maths.subspace import Subspace
from dscl.methods import osft
from dscl.methods.base import Facts, Ranks
from dscl.methods.osft import Osft, OsftConfig
from dscl.utils.errors import UserError

TASKS = ("one", "two", "three", "four")
SHAPE = LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
    vocab_size=50, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TARGETS = 7 * SHAPE.num_hidden_layers


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model's own, and short; of tokens still many more than a matrix has columns."""
    monkeypatch.setattr(osft, "TEXTS", 40)
    monkeypatch.setattr(osft, "LENGTH", 16)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE)


def one_batch() -> Batch:
    pairs = [([1, 5, 9, 7], [3, 2]), ([1, 8, 30], [4, 2]), ([1, 6, 6, 41, 13], [3, 2])]
    return collate([(0,), (1,), (2,)], pairs, 0, False, 1, True)


def _never(*_: Any) -> Any:
    raise AssertionError("not asked for here")


class Alone:
    """A method on its own model, with what the trainer would give it."""

    def __init__(self, tasks: Sequence[str] = TASKS, **settings: Any) -> None:
        self.model = tiny()
        self.method = Osft(parse(OsftConfig, {"name": "osft", **settings}), Facts(0, tuple(tasks), "", "", "", 0, ""))
        self.method.prepare(self.model)
        self.weights = dict(self.model.named_parameters())
        self.names = list(self.method.costs())
        self.method.own(self.names, torch.device("cpu"))
        self.told = ""
        self.ranks = Ranks(
            torch.device("cpu"),
            self.model,
            self._probe,
            self._batches,
            dict,
            self._visit,
            lambda t: t,
            print,
            self._refuse,
            *[_never] * 4,
        )

    def learn(self, task: str) -> None:
        """Begin, move every weight within its constraint, end."""
        index = self.method.facts.tasks.index(task)
        self.method.begin_task(index, task, self.ranks)
        generator = torch.Generator().manual_seed(index)
        for name in self.names:
            weight = self.weights[name].data
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
            self.method.hold(name, weight)
        self.told = self.method.end_task(index, task, self.ranks).told

    def spaces(self) -> dict[str, Subspace]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self.method.owned().items():
            name, what = key.rsplit("|", 1)
            if what not in ("start", "base"):
                found.setdefault(name, {})[what] = tensor.clone()
        return {name: Subspace.of(str(self.method.config.reading), parts) for name, parts in found.items()}

    def _visit(self, look: Callable[[str, torch.Tensor], None], names: Sequence[str]) -> None:
        for name in names:
            look(name, self.weights[name].data.clone())

    def _batches(self, samples: int) -> Iterator[Batch]:
        yield one_batch()

    def _probe(self, loss: Callable[[Any], torch.Tensor], back: bool) -> None:
        with torch.set_grad_enabled(back):
            value = loss(self.model)
        if back:
            value.backward()

    @staticmethod
    def _refuse(problem: str) -> None:
        if problem:
            raise UserError(problem)


@pytest.mark.parametrize("reading", ["input", "two_sided", "paper"])
@pytest.mark.parametrize("claim", [["sensitivity"], ["activations"], ["updates"], None])
def test_what_is_protected_stays_so_for_all_later_tasks(reading: str, claim: list[str] | None) -> None:
    alone = Alone(reading=reading, claim=claim, claim_energy=0.9, share=0.25)
    seen: list[tuple[dict[str, Subspace], dict[str, torch.Tensor]]] = []
    for task in TASKS:
        alone.learn(task)
        seen.append((alone.spaces(), {name: alone.weights[name].data.clone() for name in alone.names}))
    grown = 0
    for earlier, (spaces, weights) in enumerate(seen):
        for later, end in seen[earlier:]:
            for name, space in spaces.items():
                new = later[name]
                known = space.right.shape[1]
                assert torch.equal(new.right[:, :known], space.right)
                assert torch.equal(new.left[:, : space.left.shape[1]], space.left)
                assert space.leak(end[name] - weights[name]) <= 1e-6 * float(end[name].norm())
                grown += new.right.shape[1] > known
    assert grown > TARGETS  # and it does grow


@pytest.mark.parametrize("rest", ["frozen", "free", "protected"])
def test_what_trains_besides_the_targets(rest: str) -> None:
    alone = Alone(rest=rest, targets=["q_proj"], share=0.25)
    matrices = {name for name, weight in alone.weights.items() if weight.ndim == 2}
    targets = {name for name in matrices if "q_proj" in name}
    training = {name for name, weight in alone.weights.items() if weight.requires_grad}
    assert len(targets) == SHAPE.num_hidden_layers
    assert training == {"frozen": targets, "free": set(alone.weights), "protected": matrices}[rest]
    assert set(alone.names) == (matrices if rest == "protected" else targets)  # those under the constraint


@pytest.mark.parametrize(("reading", "share"), [("input", 0.25), ("two_sided", 0.0)])
def test_a_task_protects_the_strongest_directions_of_its_change(reading: str, share: float) -> None:
    """Against the singular vectors of what the task added to each weight."""
    alone = Alone(reading=reading, claim_energy=0.6, claim=["updates"], share=share)
    before = {name: alone.weights[name].data.clone() for name in alone.names}
    alone.learn("one")
    for name, space in alone.spaces().items():
        change = (alone.weights[name].data - before[name]).double()
        decomposed = torch.linalg.svd(change)
        claimed = space.right[:, int(share * min(change.shape)) :].double()
        strongest = decomposed.Vh[: claimed.shape[1]].T
        assert claimed.shape[1] >= 1
        assert torch.allclose(claimed @ claimed.T, strongest @ strongest.T, atol=1e-4)
        if reading == "two_sided":
            left, strongest = space.left.double(), decomposed.U[:, : space.left.shape[1]]
            assert left.shape[1] >= 1
            assert torch.allclose(left @ left.T, strongest @ strongest.T, atol=1e-4)


def test_a_part_of_the_room_is_the_most_that_a_task_gets() -> None:
    alone = Alone(claim_energy=1.0, claim=["updates"], share=0.5)
    free = []
    for task in TASKS:
        if not free:
            alone.method.begin_task(0, task, alone.ranks)
        free.append({name: len(s.right) - s.right.shape[1] for name, s in alone.spaces().items()})
        alone.learn(task)
    for name, first in free[0].items():
        rooms = [rest[name] for rest in free]
        assert all(
            before - after == before * 3 // (9 - 2 * index)
            for index, (before, after) in enumerate(itertools.pairwise(rooms))
        )
        assert rooms[-1] >= 0.15 * first > 0


def test_the_base_gives_back_its_weakest_and_tasks_keep_theirs() -> None:
    alone = Alone(claim_energy=1.0, claim=["updates"], share=0.5, when_short="give_back")
    alone.learn("one")
    before = alone.spaces()
    alone.learn("two")
    after = alone.spaces()
    for name, space in before.items():
        base = int(0.5 * min(alone.weights[name].shape))
        room = len(space.right) - base
        assert len(space.right) == space.right.shape[1]  # the first task took all
        given = room // 4
        kept = torch.cat([space.right[:, : base - given], space.right[:, base:]], 1)
        assert torch.equal(after[name].right[:, : kept.shape[1]], kept)
        assert after[name].right.shape[1] - kept.shape[1] == given  # which the second task claimed in turn


def test_without_room_the_task_is_named() -> None:
    alone = Alone(claim_energy=1.0, claim=["updates"], share=0.5, when_short="stop")
    alone.learn("one")
    with pytest.raises(UserError, match=r"task two finds no free direction in 14 of 14.*method.when_short=give_back"):
        alone.learn("two")
    with pytest.raises(UserError, match="task one finds no free direction in"):
        Alone(share=1.0, basis=["weights"], targets=["q_proj"]).learn("one")


def test_the_last_task_claims_nothing() -> None:
    alone = Alone(tasks=("only",), share=0.5)
    alone.learn("only")
    assert alone.told == ""
    assert all(space.right.shape[1] == int(0.5 * min(alone.weights[n].shape)) for n, space in alone.spaces().items())


@pytest.mark.parametrize("basis", [["weights"], ["activations"], ["weights", "activations"], ["sensitivity"]])
def test_a_basis_holds_the_strongest_directions_of_its_source(basis: list[str]) -> None:
    """Against moments gathered here by plain hooks, on the very texts that the method made up."""
    alone = Alone(basis=basis, share=0.5, claim=[])
    alone.method.begin_task(0, "one", alone.ranks)
    name = "model.layers.1.mlp.gate_proj"
    ids = torch.cat([block[:count] for block, count in alone.method._texts(alone.ranks)] or [torch.zeros(0, 2).long()])
    given: list[torch.Tensor] = []
    felt: list[torch.Tensor] = []

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        given.append(inputs[0].detach().flatten(0, 1).double())
        output.register_hook(lambda gradient: felt.append(gradient.flatten(0, 1).double()))

    weight = alone.weights[f"{name}.weight"].data.double()
    moment = weight.T @ weight / weight.square().sum()
    if basis != ["weights"]:
        handle = alone.model.get_submodule(name).register_forward_hook(hook)
        logits = alone.model(input_ids=ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        handle.remove()
        rows = given[0] * (felt[0].norm(dim=1, keepdim=True) if basis == ["sensitivity"] else 1.0)
        seen = rows.T @ rows
        moment = seen if len(basis) == 1 else moment + seen / seen.trace()
    strongest = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :8]
    overlap = torch.linalg.svdvals(strongest.T @ alone.spaces()[f"{name}.weight"].right.double())
    assert overlap.min() > 1 - 1e-6


def test_importance_gives_each_layer_its_share() -> None:
    alone = Alone(reading="paper", basis=["weights"], allocate="importance", share=0.8, least=0.1, claim=[])
    alone.method.begin_task(0, "one", alone.ranks)
    counts = {name: space.right.shape[1] / min(alone.weights[name].shape) for name, space in alone.spaces().items()}
    for layer in range(2):
        of_layer = {round(value, 1) for name, value in counts.items() if f"layers.{layer}." in name}
        assert max(of_layer) - min(of_layer) <= 0.15  # one share, rounded down in matrices of 8 and 16
    assert 0.1 < sum(counts.values()) / len(counts) <= 0.8


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"least": 0.2}, "method.least: given 0.2 with allocate: fixed"),
        ({"allocate": "importance", "share": 0.3, "least": 0.4}, "method.least: given 0.4, more than share=0.3"),
        ({"claim": [], "claim_energy": 0.5}, "method.claim_energy: given 0.5 with claim: []"),
        ({"basis": ["updates"]}, "method.basis: given ['updates']; allowed: one or several of weights"),
        ({"basis": []}, "method.basis: given []; allowed"),
        ({"claim": ["updates", "updates"]}, "method.claim: given ['updates', 'updates']"),
        ({"claim": ["weights"]}, "method.claim: given ['weights']; allowed: one or several of activations"),
        ({"faithful": True, "reading": "input"}, "method.reading: given input together with faithful"),
        ({"share": 1.5}, "share"),
        ({"reading": "outputs"}, "reading"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        parse(OsftConfig, {"name": "osft", **settings})


def test_targets_that_match_nothing_and_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(UserError, match=r"method.targets: given 'query'.*layers here: .*q_proj"):
        Alone(targets=["query"])
    alone = Alone(basis=["weights"])
    alone.weights["model.layers.1.mlp.up_proj.weight"].data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"method osft: model.layers.1.mlp.up_proj.weight: .*not finite"):
        alone.learn("one")


def test_faithful_is_the_papers_setting() -> None:
    config = parse(OsftConfig, {"name": "osft", "faithful": True})
    shown = json.dumps({name: getattr(config, name) for name in ("reading", "basis", "allocate", "least", "share")})
    assert shown == '{"reading": "paper", "basis": ["weights"], "allocate": "importance", "least": 0.1, "share": 0.8}'
    assert config.claim == ()
    assert config.gradients
