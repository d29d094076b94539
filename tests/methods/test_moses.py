"""MoSEs' choices, on one process and without an engine: what is refused, when experts grow, what a task comes to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dscl.config.parsing import parse
from dscl.data.batches import PromptBatch, collate, prompt_batch
from dscl.methods.base import Facts, Ranks
from dscl.methods.moses import Moses, MosesConfig
from dscl.methods.rls_router import Routes
from dscl.utils.errors import UserError

TASKS = ("one", "two", "three", "four")
SHAPE = LlamaConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
    vocab_size=50, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROUTED = {"task_inference": "rls", "width": 32}


def config_of(**settings: Any) -> MosesConfig:
    return parse(MosesConfig, {"name": "moses", "task_inference": "given", **settings}, "method")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE)


class Alone:
    """A method on its own model, with what the trainer would give it."""

    def __init__(self, tasks: Sequence[str] = TASKS, model: nn.Module | None = None, **settings: Any) -> None:
        self.model = tiny() if model is None else model
        facts = Facts(0, tuple(tasks), "base", "model", "tokenizer", 64, "fp32")
        self.method = Moses(config_of(**settings), facts)
        self.method.prepare(self.model)
        self.ranks = Ranks(
            torch.device("cpu"),
            self.model,
            _never,
            _never,
            self._whole,
            _never,
            lambda t: t,
            *[_never] * 6,
        )

    def _whole(self, names: Any) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().float() for name in names}

    def begin(self, task: str) -> None:
        """As the engine does it."""
        read = self.method.begin_task(self.method.facts.tasks.index(task), task, self.ranks)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    values = read(name, parameter.shape, 0, parameter.numel())
                    assert values is not None
                    parameter.copy_(values.view(parameter.shape))

    def learn(self, task: str) -> Any:
        """Begin, move whatever trains, end."""
        self.begin(task)
        draw = torch.Generator().manual_seed(len(self.method.experts.names))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        if self.method.deciding is not None:
            self.show(task, [0, 1, 2])
        return self.method.end_task(self.method.facts.tasks.index(task), task, self.ranks)

    def show(self, task: str, samples: list[int], first: bool = True) -> None:
        """A pass over some of the task's samples, seen for the first time or once more."""
        place = 10 * self.method.facts.tasks.index(task)
        pairs = [([1, 5 + place, 7 + place, 6 + place + k], [3, 2]) for k in range(3)]
        self.method.loss(self.model.train(), collate([(sample,) for sample in samples], pairs, 0, False, 1, first))


def _never(*_: Any) -> Any:
    raise AssertionError("not asked for here")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"top_k": 9}, "method.top_k: given 9; there are 8 sub-experts, so at most that many"),
        ({"top_k": 3, "experts": 2}, "method.top_k: given 3; there are 2 sub-experts"),
        ({"top_k": 0}, "method.top_k: given 0"),
        ({"gate": "uniform", "top_k": 2}, "method.top_k: given 2 with gate: uniform, which asks all sub-experts"),
        ({"gate": "hard"}, "method.gate: given 'hard'"),
        ({"share": 0.0}, "method.share: given 0.0"),
        ({"share": 1.5}, "method.share: given 1.5"),
        ({"share": -0.5}, "method.share: given -0.5"),
        ({"experts": 0}, "method.experts: given 0"),
        ({"rank": 0}, "method.rank: given 0"),
        ({"masks": "atoms"}, "method.masks: given 'atoms'"),
        ({"most": 4}, "method.most: given 4; at least method.experts=8 are needed"),
        ({"when_full": "wait"}, "method.when_full: given 'wait'"),
        ({"reuse": False, "when_full": "reuse"}, "method.when_full: given reuse with reuse: false"),
        ({"dropout": 1.0}, "method.dropout: given 1.0"),
        ({"alpha": 0.0}, "method.alpha: given 0.0"),
        ({"task_inference": "oracle"}, "method.task_inference: given 'oracle'"),
        ({"feature_layer": 2}, "method.feature_layer: given 2 with task_inference: given, which has no use for it"),
        ({"task_inference": "given", "width": 64}, "method.width: given 64 with task_inference: given"),
        ({"task_inference": "key", "width": 64}, "method.width: given 64 with task_inference: key"),
        ({"task_inference": "key", "ridge": 0.1}, "method.ridge: given 0.1 with task_inference: key"),
        ({"task_inference": "key", "reject": False}, "method.reject: given False with task_inference: key"),
        ({"weights": {"name": "moses"}}, "method.weights.name: given 'moses'; allowed: osft"),
        ({"weights": {"name": "sequential"}}, "method.weights.name: given 'sequential'; allowed: osft"),
        ({"weights": {"name": "osft", "share": 2.0}}, "method.weights.share: given 2.0"),
        (
            {"weights": {"name": "osft", "rest": "free"}, "task_inference": "rls"},
            "method.weights.rest: given free with task_inference: rls",
        ),
        (
            {"weights": {"name": "osft", "rest": "protected"}, "task_inference": "key"},
            "method.weights.rest: given protected with task_inference: key",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        config_of(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": ["query"]}, "method.targets: given 'query'"),
        ({"targets": ["q_proj", "lm_head"]}, "method.targets: given 'lm_head', which stands in no layer"),
        ({**ROUTED, "targets": ["model.layers.0.self_attn.q_proj"]}, "method.targets: given 'model.layers.0"),
        ({**ROUTED, "feature_layer": 3}, "feature_layer: given 3; the model has 3 layers"),
        ({**ROUTED, "feature_layer": 0}, "method.feature_layer: given 0"),
        ({"weights": {"name": "osft", "targets": ["query"]}}, "given 'query', which no layer matches"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        Alone(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inference", [ROUTED, {"task_inference": "key"}, {}])
def test_a_model_of_another_kind_is_refused(inference: dict[str, Any]) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    with pytest.raises(UserError, match=r"moses needs a model whose layers stand in model.layers .*GPT2LMHeadModel"):
        Alone(model=model, **inference)


@pytest.mark.parametrize(
    "targets", [["model.layers.0.mlp.up_proj"], ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]]
)
def test_dense_weights_that_may_not_train_are_refused(targets: list[str]) -> None:
    """What decides needs the layers below the features as they are."""
    with pytest.raises(UserError, match=r"method\.weights\.targets: given .*model\.layers\.0\.mlp\.up_proj"):
        Alone(**ROUTED, feature_layer=1, weights={"name": "osft", "targets": targets})


def test_only_what_it_says_trains() -> None:
    """From the feature layer on, and beside the targets alone; what is added adds nothing yet."""
    plain, alone = tiny().eval(), Alone(**ROUTED, feature_layer=2)
    trained = {name for name, p in alone.model.named_parameters() if p.requires_grad}
    own = ("sub_a", "sub_b", "score_atoms", "token_router")
    assert trained == {
        f"model.layers.2.self_attn.{target}_proj.{each}" for target in "qkvo" for each in own
    }  # fmt: skip
    alone.begin("one")
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = plain(ids).logits
    assert torch.equal(alone.model.eval()(ids).logits, expected)
    torch.testing.assert_close(alone.model.train()(ids).logits, expected)
    everywhere = Alone(targets=["v_proj", "down_proj"], masks="element", gate="uniform")
    trained = {name for name, p in everywhere.model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{layer}.{target}.{each}"
        for layer in range(3)
        for target in ("self_attn.v_proj", "mlp.down_proj")
        for each in ("sub_a", "sub_b", "score_a", "score_b")
    }


def test_with_dense_weights_those_train_too_but_nothing_that_features_need() -> None:
    alone = Alone(**ROUTED, feature_layer=1, weights={"name": "osft", "basis": ["weights"]})
    trained = {name for name, p in alone.model.named_parameters() if p.requires_grad}
    dense = {name for name in trained if name.endswith(".weight")}
    assert len(dense) == 2 * 7
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in trained)
    constraint = alone.method.constraint()
    assert constraint is not None
    assert set(constraint.costs()) == dense


# ---- room


@pytest.mark.parametrize("masks", ["atom", "element"])
@pytest.mark.parametrize(
    ("experts", "rank", "share"), [(1, 1, 1.0), (2, 2, 0.5), (3, 1, 0.5), (3, 3, 0.5), (4, 2, 0.3), (1, 3, 0.2)]
)
def test_by_default_there_is_room_for_the_whole_stream(masks: str, experts: int, rank: int, share: float) -> None:
    """Also where no task may use what another has claimed."""
    for tasks in (1, 2, 4):
        alone = Alone(
            TASKS[:tasks], masks=masks, experts=experts, rank=rank, share=share, reuse=False, targets=["v_proj"]
        )
        for task in TASKS[:tasks]:
            alone.learn(task)
        for layer in alone.method.experts.layers.values():
            assert layer.claimed == tasks * sum(
                count * {"atoms": 16 + layer.out_features}.get(name, 1) for name, count in layer.counts.items()
            )


@pytest.mark.parametrize("masks", ["atom", "element"])
def test_experts_grow_no_more_than_needed(masks: str) -> None:
    """Half of two sub-experts a task, none of it shared: two tasks fill both, each further one brings its own."""
    alone = Alone(masks=masks, experts=2, rank=2, share=0.5, reuse=False, when_full="grow")
    counts, told = [], []
    for task in TASKS:
        alone.begin(task)
        counts.append(alone.method.experts.count)
        ended = alone.learn(task)
        assert ended.numbers["experts_open"] == counts[-1]
        told.append(ended.told.partition("; ")[2])
    assert counts == [2, 2, 3, 4]
    grown = "there was no room, so it got 1 more of them: {} of 4 are open"
    assert told == ["", "", grown.format(3), grown.format(4)]
    assert alone.method.experts.used() == 2.0
    seats = next(iter(alone.method.experts.layers.values())).seats
    assert seats.sum(1).tolist() == counts


def test_a_full_house_is_refused_before_the_task_begins() -> None:
    alone = Alone(experts=2, rank=2, share=0.5, reuse=False, when_full="stop")
    alone.learn("one")
    alone.learn("two")
    before = {name: t.clone() for name, t in alone.model.named_buffers()}
    with pytest.raises(UserError, match=r"task three opens 2 more") as caught:
        alone.begin("three")
    told = str(caught.value)
    assert "\n" not in told
    assert "method.when_full=grow" in told
    assert "when_full=reuse" not in told  # which reuse: false would refuse
    assert all(torch.equal(before[name], tensor) for name, tensor in alone.model.named_buffers())
    assert alone.method.experts.names == ["one", "two"]


def test_growth_ends_where_the_room_does() -> None:
    alone = Alone(experts=2, most=3, rank=2, share=0.5, reuse=False, when_full="grow")
    for task in TASKS[:3]:
        alone.learn(task)
    with pytest.raises(UserError, match=r"task four opens 2 more .*larger method\.most"):
        alone.begin("four")


def test_with_reuse_a_full_house_goes_on() -> None:
    alone = Alone(experts=2, rank=2, share=0.75, when_full="reuse")
    kept, told = [], []
    for task in TASKS:
        told.append(alone.learn(task).told.partition("; ")[2])
        kept.append(alone.method.experts.used())
    assert alone.method.experts.count == 2
    assert kept == sorted(kept)
    assert kept[0] == 0.75
    assert kept[-1] == 1.0
    assert told[:2] == ["", "there was no room, so at least 2 atoms of a layer are others' too"]


# ---- what a task comes to


@pytest.mark.parametrize(("masks", "inference"), [("atom", {}), ("element", {}), ("atom", ROUTED)])
def test_the_numbers_are_those_of_the_files(tmp_path: Path, masks: str, inference: dict[str, Any]) -> None:
    alone = Alone(TASKS[:3], masks=masks, experts=2, rank=3, share=0.5, **inference)
    layers = alone.method.experts.layers.values()
    seen, deciding, routers = [], 0, 0
    for number, task in enumerate(TASKS[:3], 1):
        ended = alone.learn(task)
        seen.append(ended.numbers)
        numbers = ended.numbers
        values = sum(4 * layer.claimed for layer in layers)
        bits = {"atom": lambda m: m.shape.columns, "element": None}[masks]
        masks_each = sum(
            m.shape.most
            + (
                -(-bits(m) // 8)
                if bits
                else -(-m.shape.columns * m.in_features // 8) + -(-m.shape.columns * m.out_features // 8)
            )
            for m in layers
        )
        routers += sum(4 * alone.method.experts.count * m.in_features for m in layers)
        assert numbers["parameters_bytes"] == values
        assert numbers["masks_bytes"] == number * masks_each
        assert numbers["routers_bytes"] == routers
        assert numbers["capacity_bytes"] == values + number * masks_each + routers
        whole = sum(6 * (m.in_features + m.out_features) for m in layers)
        assert numbers["capacity_share"] == values / 4 / whole
        assert numbers["lora_per_task_bytes"] == number * sum(3 * 4 * (m.in_features + m.out_features) for m in layers)
        assert ("deciding_bytes" in numbers) == bool(inference)
        files = alone.method.leave(tmp_path, task)
        assert files[0] == tmp_path / "experts" / f"{task}.safetensors"
        deciding += sum(tensor.nbytes for tensor in load_file(files[1]).values()) if inference else 0
        assert numbers.get("deciding_bytes", 0) == deciding
        assert ended.picture is not None
        assert ended.picture.tasks == TASKS[:number]
        assert all(ended.picture.values[i][i] == 1.0 for i in range(number))
        assert "claimed" in ended.told
    assert seen[2]["capacity_bytes"] > seen[1]["capacity_bytes"] > seen[0]["capacity_bytes"]


@pytest.mark.parametrize("masks", ["atom", "element"])
@pytest.mark.parametrize("inference", [ROUTED, {"task_inference": "key"}])
def test_another_process_takes_back_what_was_left(tmp_path: Path, masks: str, inference: dict[str, Any]) -> None:
    """And answers alike to the bit; the experts that are open are those of the checkpoint, not of the last file."""
    settings = {"masks": masks, "experts": 2, "rank": 2, "share": 0.75, "feature_layer": 1, **inference}
    alone, other = Alone(TASKS, **settings), Alone(TASKS, **settings)
    for task in TASKS[:3]:
        alone.learn(task)
        alone.method.leave(tmp_path, task)
    alone.begin("four")  # a checkpoint within the fourth task
    alone.show("four", [2, 0])
    assert alone.method.experts.count > 3
    other.method.load_state(alone.method.state(), {n: t.clone() for n, t in alone.method.rows().items()})
    other.method.recall(tmp_path, TASKS[:3])
    for (name, ours), (_, theirs) in zip(alone.model.named_buffers(), other.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert other.method._numbers() == alone.method._numbers()
    batch = prompts([20, 6, 33, 14])
    for task in (None, *TASKS[:3]):
        first, second = (answered(each, batch, task) for each in (alone, other))
        assert torch.equal(first[0], second[0])
        assert first[1] == second[1]
    for each in (alone, other):
        each.show("four", [1])
        each.show("four", [1, 2], first=False)  # another epoch
        each.method.end_task(3, "four", each.ranks)
    files = [each.method.leave(tmp_path / f"{number}", "four")[1] for number, each in enumerate((alone, other))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_file(files[0])["0.count"].item() == 3


def prompts(tokens: Sequence[int]) -> PromptBatch:
    return prompt_batch([[1, token, token + 2] for token in tokens], 0, 1)


@torch.no_grad()
def answered(alone: Alone, batch: PromptBatch, task: str | None) -> tuple[torch.Tensor, Any]:
    with alone.method.answering(batch, task) as decided:
        logits = alone.model.eval()(batch.input_ids, batch.attention_mask, batch.position_ids).logits
        return logits, decided


def test_before_anything_is_learned_the_bare_model_answers() -> None:
    for settings in ({}, ROUTED, {"task_inference": "key"}):
        alone, batch = Alone(**settings), prompts([20, 6, 33])
        bare = tiny().eval()
        with torch.no_grad():
            expected = bare(batch.input_ids, batch.attention_mask, batch.position_ids).logits
        assert torch.equal(answered(alone, batch, None)[0], expected)
        assert torch.equal(answered(alone, batch, "two")[0], expected)  # not learned yet
        alone.learn("one")
        assert not torch.equal(answered(alone, batch, "one")[0], expected)
        assert torch.equal(answered(alone, batch, "two")[0], expected)


def test_what_goes_to_no_task_gets_the_bare_model() -> None:
    """Beside rows that go to one."""
    alone, batch = Alone(**ROUTED), prompts([20, 6, 33])
    alone.learn("one")
    alone.learn("two")
    assert alone.method.deciding is not None
    router = alone.method.deciding.router
    with torch.no_grad():
        bare = alone.model.eval()(batch.input_ids, batch.attention_mask, batch.position_ids).logits
    told = answered(alone, batch, "one")[0]
    router.route = lambda rows: Routes(["one", None, "two"], rows[:, 0], rows[:, 0])  # type: ignore[method-assign]
    logits, decided = answered(alone, batch, None)
    assert decided == ["one", None, "two"]
    torch.testing.assert_close(logits[1], bare[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[0], told[0], rtol=0, atol=1e-6)
    assert (told[1] - bare[1]).abs().max() > 1e-4
    assert (logits[2] - bare[2]).abs().max() > 1e-4


@pytest.mark.parametrize("inference", [ROUTED, {"task_inference": "key"}])
def test_all_ranks_samples_count(inference: dict[str, Any]) -> None:
    """As of two ranks that have shown the same."""
    alone = Alone(**inference)
    alone.ranks = dataclasses.replace(alone.ranks, sum_=lambda tensor: tensor.mul_(2))
    alone.learn("one")
    assert alone.method.deciding is not None
    assert int(alone.method.deciding.router.statistics("one").count) == 6
