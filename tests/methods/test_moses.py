"""MoSEs on one process without an engine: refused settings, growth of experts, capacity metrics, artifacts."""

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

from dscl.config.methods import MosesPreset
from dscl.config.parsing import parse_config
from dscl.data.batches import PromptBatch, collate, collate_prompts
from dscl.methods.base import RunInfo, TaskContext
from dscl.methods.moses import Moses
from dscl.methods.rls_router import RoutingResult
from dscl.utils.errors import UserError

TASKS = ("one", "two", "three", "four")
SHAPE = LlamaConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
    vocab_size=50, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
RLS = {"name": "rls", "num_features": 32}
UNSHARED = {"num_experts": 2, "rank": 2, "mask_density": 0.5, "reuse": False}  # of `tune`


def make_config(**parts: Any) -> MosesPreset:
    return parse_config(MosesPreset, {"name": "moses", "router": "oracle", **parts}, "method")


def make_tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE)


class SingleRankMoses:
    """A `Moses` method on a tiny model, called as the trainer would call it."""

    def __init__(self, tasks: Sequence[str] = TASKS, model: nn.Module | None = None, **parts: Any) -> None:
        self.model = make_tiny_model() if model is None else model
        run_info = RunInfo(0, tuple(tasks), "base", "model", "tokenizer", 64, "fp32")
        self.method = Moses(make_config(**parts), run_info)
        self.method.prepare(self.model)
        self.context = TaskContext(
            torch.device("cpu"),
            self.model,
            _unexpected_call,
            _unexpected_call,
            self._gather_full_weights,
            _unexpected_call,
            lambda t: t,
            *[_unexpected_call] * 6,
        )

    def _gather_full_weights(self, names: Any) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().float() for name in names}

    def begin_task(self, task: str) -> None:
        """Begin a task and set the initial values as the engine does."""
        initial_values = self.method.begin_task(self.method.run_info.task_names.index(task), task, self.context)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    values = initial_values(name, parameter.shape, 0, parameter.numel())
                    assert values is not None
                    parameter.copy_(values.view(parameter.shape))

    def train_task(self, task: str) -> Any:
        """Begin a task, change all trainable parameters, and end the task."""
        self.begin_task(task)
        draw = torch.Generator().manual_seed(len(self.method.experts.names))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        if self.method.task_router is not None:
            self.train_on_samples(task, [0, 1, 2])
        return self.method.end_task(self.method.run_info.task_names.index(task), task, self.context)

    def train_on_samples(self, task: str, samples: list[int], first_epoch: bool = True) -> None:
        """A loss over some of the task's samples. `first_epoch`: whether the batch is of the first epoch."""
        offset = 10 * self.method.run_info.task_names.index(task)
        pairs = [([1, 5 + offset, 7 + offset, 6 + offset + k], [3, 2]) for k in range(3)]
        self.method.loss(
            self.model.train(), collate([(sample,) for sample in samples], pairs, 0, False, 1, first_epoch)
        )


def _unexpected_call(*_: Any) -> Any:
    raise AssertionError("not asked for here")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"tune": {"top_k": 9}}, "method.tune.top_k: given 9; there are 8 sub-experts, so at most that many"),
        ({"tune": {"top_k": 3, "num_experts": 2}}, "method.tune.top_k: given 3; there are 2 sub-experts"),
        ({"tune": {"top_k": 0}}, "method.tune.top_k: given 0"),
        (
            {"tune": {"gate": "uniform", "top_k": 2}},
            "method.tune.top_k: given 2 with gate: uniform, which uses all sub-experts",
        ),
        ({"tune": {"gate": "hard"}}, "method.tune.gate: given 'hard'"),
        ({"tune": {"mask_density": 0.0}}, "method.tune.mask_density: given 0.0"),
        ({"tune": {"mask_density": 1.5}}, "method.tune.mask_density: given 1.5"),
        ({"tune": {"mask_density": -0.5}}, "method.tune.mask_density: given -0.5"),
        ({"tune": {"num_experts": 0}}, "method.tune.num_experts: given 0"),
        ({"tune": {"rank": 0}}, "method.tune.rank: given 0"),
        ({"tune": {"masks": "block"}}, "method.tune.masks: given 'block'"),
        (
            {"tune": {"max_experts": 4}},
            "method.tune.max_experts: given 4; at least method.tune.num_experts=8 are needed",
        ),
        ({"tune": {"on_full": "wait"}}, "method.tune.on_full: given 'wait'"),
        ({"tune": {"reuse": False, "on_full": "reuse"}}, "method.tune.on_full: given reuse with reuse: false"),
        ({"tune": {"dropout": 1.0}}, "method.tune.dropout: given 1.0"),
        ({"tune": {"alpha": 0.0}}, "method.tune.alpha: given 0.0"),
        ({"router": "given"}, "method.router.name: given 'given' (str); allowed: rls, key, oracle"),
        ({"router": {"name": "oracle", "layer": 2}}, "method.router.layer: a key of rls and key"),
        ({"router": {"name": "oracle", "num_features": 64}}, "method.router.num_features: a key of rls"),
        ({"router": {"name": "key", "num_features": 64}}, "method.router.num_features: a key of rls"),
        ({"router": {"name": "key", "ridge": 0.1}}, "method.router.ridge: a key of rls"),
        ({"router": {"name": "key", "ood_fallback": False}}, "method.router.ood_fallback: a key of rls"),
        ({"constraint": {"name": "moses"}}, "method.constraint.name: given 'moses' (str); allowed: osft"),
        ({"constraint": {"name": "sequential"}}, "method.constraint.name: given 'sequential' (str); allowed: osft"),
        ({"constraint": {"protected_ratio": 2.0}}, "method.constraint.protected_ratio: given 2.0"),
        (
            {"constraint": {"name": "osft", "other_params": "free"}, "router": "rls"},
            "method.constraint.other_params: given free with router: rls",
        ),
        (
            {"constraint": {"name": "osft", "other_params": "protected"}, "router": "key"},
            "method.constraint.other_params: given protected with router: key",
        ),
    ],
)
def test_settings_that_contradict_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make_config(**parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"tune": {"targets": ["query"]}}, "method.tune.targets: given 'query'"),
        (
            {"tune": {"targets": ["q_proj", "lm_head"]}},
            "method.tune.targets: given 'lm_head', which stands in no layer",
        ),
        (
            {"tune": {"targets": ["model.layers.0.self_attn.q_proj"]}, "router": RLS},
            "method.tune.targets: given 'model.layers.0",
        ),
        ({"router": {**RLS, "layer": 3}}, "the router's layer: given 3; the model has 3 layers"),
        ({"router": {**RLS, "layer": 0}}, "method.router.layer: given 0"),
        (
            {"constraint": {"name": "osft", "targets": ["query"]}},
            "method.constraint.targets: given 'query', which no layer matches",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        SingleRankMoses(**parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("router", [RLS, "key", "oracle"])
def test_a_model_of_another_kind_is_refused(router: Any) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    with pytest.raises(UserError, match=r"moses needs a model whose layers stand in model.layers .*GPT2LMHeadModel"):
        SingleRankMoses(model=model, router=router)


@pytest.mark.parametrize(
    "targets", [["model.layers.0.mlp.up_proj"], ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]]
)
def test_dense_weights_that_may_not_train_are_refused(targets: list[str]) -> None:
    """The router needs frozen layers below the feature layer."""
    with pytest.raises(UserError, match=r"method\.constraint\.targets: given .*model\.layers\.0\.mlp\.up_proj"):
        SingleRankMoses(router={**RLS, "layer": 1}, constraint={"name": "osft", "targets": targets})


def test_only_sub_experts_and_gates_train() -> None:
    """Only at the targets and from the feature layer on; new sub-experts do not change the output yet."""
    plain, run = make_tiny_model().eval(), SingleRankMoses(router={**RLS, "layer": 2})
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    own = ("sub_a", "sub_b", "score_rank1", "token_router")
    assert trained == {
        f"model.layers.2.self_attn.{target}_proj.{each}" for target in "qkvo" for each in own
    }  # fmt: skip
    run.begin_task("one")
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = plain(ids).logits
    assert torch.equal(run.model.eval()(ids).logits, expected)
    torch.testing.assert_close(run.model.train()(ids).logits, expected)
    everywhere = SingleRankMoses(tune={"targets": ["v_proj", "down_proj"], "masks": "element", "gate": "uniform"})
    trained = {name for name, p in everywhere.model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{layer}.{target}.{each}"
        for layer in range(3)
        for target in ("self_attn.v_proj", "mlp.down_proj")
        for each in ("sub_a", "sub_b", "score_a", "score_b")
    }


def test_dense_weights_train_only_from_the_feature_layer_on() -> None:
    run = SingleRankMoses(router={**RLS, "layer": 1}, constraint={"name": "osft", "protect_base": ["weights"]})
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    dense = {name for name in trained if name.endswith(".weight")}
    assert len(dense) == 2 * 7
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in trained)
    constraint = run.method.constraint()
    assert constraint is not None
    assert set(constraint.matrix_costs()) == dense


# ---- capacity


@pytest.mark.parametrize("masks", ["rank1", "element"])
@pytest.mark.parametrize(
    ("num_experts", "rank", "mask_density"),
    [(1, 1, 1.0), (2, 2, 0.5), (3, 1, 0.5), (3, 3, 0.5), (4, 2, 0.3), (1, 3, 0.2)],
)
def test_default_max_experts_suffices_for_the_stream(
    masks: str, num_experts: int, rank: int, mask_density: float
) -> None:
    """Also if no task may use parameters of another."""
    for tasks in (1, 2, 4):
        sizes = {"num_experts": num_experts, "rank": rank, "mask_density": mask_density}
        tune = {**sizes, "masks": masks, "reuse": False, "targets": ["v_proj"]}
        run = SingleRankMoses(TASKS[:tasks], tune=tune)
        for task in TASKS[:tasks]:
            run.train_task(task)
        for layer in run.method.experts.layers.values():
            assert layer.num_frozen_params == tasks * sum(
                count * {"rank1": 16 + layer.out_features}.get(name, 1) for name, count in layer.mask_counts.items()
            )


@pytest.mark.parametrize("masks", ["rank1", "element"])
def test_experts_grow_only_when_needed(masks: str) -> None:
    """Each task needs half of two sub-experts, unshared: two tasks fill both, and each later task adds one."""
    run = SingleRankMoses(tune={**UNSHARED, "masks": masks, "on_full": "grow"})
    counts, messages = [], []
    for task in TASKS:
        run.begin_task(task)
        counts.append(run.method.experts.num_used_experts)
        summary = run.train_task(task)
        assert summary.metrics["num_experts"] == counts[-1]
        messages.append(summary.message.partition("; ")[2])
    assert counts == [2, 2, 3, 4]
    grown = "too few parameters were free, so the sub-experts grew from {} to {} of at most 4"
    assert messages == ["", "", grown.format(2, 3), grown.format(3, 4)]
    assert run.method.experts.frozen_share() == 2.0
    expert_mask = next(iter(run.method.experts.layers.values())).expert_mask
    assert expert_mask.sum(1).tolist() == counts


def test_a_task_is_refused_when_too_few_parameters_are_free() -> None:
    run = SingleRankMoses(tune={**UNSHARED, "on_full": "stop"})
    run.train_task("one")
    run.train_task("two")
    before = {name: t.clone() for name, t in run.model.named_buffers()}
    with pytest.raises(UserError, match=r"task three needs 2 more") as caught:
        run.begin_task("three")
    message = str(caught.value)
    assert "\n" not in message
    assert "method.tune.on_full=grow" in message
    assert "on_full=reuse" not in message  # reuse: false refuses that value
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.named_buffers())
    assert run.method.experts.names == ["one", "two"]


def test_growth_stops_at_max_experts() -> None:
    run = SingleRankMoses(tune={**UNSHARED, "max_experts": 3, "on_full": "grow"})
    for task in TASKS[:3]:
        run.train_task(task)
    with pytest.raises(UserError, match=r"task four needs 2 more .*larger method\.tune\.max_experts"):
        run.begin_task("four")


def test_reuse_continues_without_free_parameters() -> None:
    run = SingleRankMoses(tune={"num_experts": 2, "rank": 2, "mask_density": 0.75, "on_full": "reuse"})
    shares, messages = [], []
    for task in TASKS:
        messages.append(run.train_task(task).message.partition("; ")[2])
        shares.append(run.method.experts.frozen_share())
    assert run.method.experts.num_used_experts == 2
    assert shares == sorted(shares)
    assert shares[0] == 0.75
    assert shares[-1] == 1.0
    assert messages[:2] == [
        "",
        "too few were free, so at least 2 rank-1 pairs of a layer are shared with earlier tasks",
    ]


# ---- capacity metrics and artifacts


@pytest.mark.parametrize(("masks", "router"), [("rank1", "oracle"), ("element", "oracle"), ("rank1", RLS)])
def test_capacity_metrics_match_the_files(tmp_path: Path, masks: str, router: Any) -> None:
    tune = {"masks": masks, "num_experts": 2, "rank": 3, "mask_density": 0.5}
    run = SingleRankMoses(TASKS[:3], tune=tune, router=router)
    layers = run.method.experts.layers.values()
    all_metrics, router_bytes, gate_bytes = [], 0, 0
    for number, task in enumerate(TASKS[:3], 1):
        summary = run.train_task(task)
        all_metrics.append(summary.metrics)
        metrics = summary.metrics
        value_bytes = sum(4 * layer.num_frozen_params for layer in layers)
        bits = {"rank1": lambda m: m.shape.columns, "element": None}[masks]
        masks_each = sum(
            m.shape.max_experts
            + (
                -(-bits(m) // 8)
                if bits
                else -(-m.shape.columns * m.in_features // 8) + -(-m.shape.columns * m.out_features // 8)
            )
            for m in layers
        )
        gate_bytes += sum(4 * run.method.experts.num_used_experts * m.in_features for m in layers)
        assert metrics["parameters_bytes"] == value_bytes
        assert metrics["masks_bytes"] == number * masks_each
        assert metrics["routers_bytes"] == gate_bytes
        assert metrics["capacity_bytes"] == value_bytes + number * masks_each + gate_bytes
        size_of_all = sum(6 * (m.in_features + m.out_features) for m in layers)
        assert metrics["capacity_share"] == value_bytes / 4 / size_of_all
        assert metrics["lora_per_task_bytes"] == number * sum(3 * 4 * (m.in_features + m.out_features) for m in layers)
        assert ("router_bytes" in metrics) == (router != "oracle")
        files = run.method.save_task_artifacts(tmp_path, task)
        assert files[0] == tmp_path / "experts" / f"{task}.safetensors"
        router_bytes += sum(tensor.nbytes for tensor in load_file(files[1]).values()) if router != "oracle" else 0
        assert metrics.get("router_bytes", 0) == router_bytes
        assert summary.task_matrix is not None
        assert summary.task_matrix.tasks == TASKS[:number]
        assert all(summary.task_matrix.values[i][i] == 1.0 for i in range(number))
        assert "frozen" in summary.message
    assert all_metrics[2]["capacity_bytes"] > all_metrics[1]["capacity_bytes"] > all_metrics[0]["capacity_bytes"]


@pytest.mark.parametrize("masks", ["rank1", "element"])
@pytest.mark.parametrize("router", [RLS, {"name": "key"}])
def test_artifacts_are_loaded_into_another_process(tmp_path: Path, masks: str, router: dict[str, Any]) -> None:
    """Outputs are bit-identical. The number of open experts comes from the checkpoint, not from the last file."""
    tune = {"masks": masks, "num_experts": 2, "rank": 2, "mask_density": 0.75}
    run, other = (SingleRankMoses(TASKS, tune=tune, router={**router, "layer": 1}) for _ in range(2))
    for task in TASKS[:3]:
        run.train_task(task)
        run.method.save_task_artifacts(tmp_path, task)
    run.begin_task("four")  # a checkpoint within the fourth task
    run.train_on_samples("four", [2, 0])
    assert run.method.experts.num_used_experts > 3
    other.method.load_state_dict(
        run.method.state_dict(), {n: t.clone() for n, t in run.method.row_state_dict().items()}
    )
    other.method.load_task_artifacts(tmp_path, TASKS[:3])
    for (name, ours), (_, theirs) in zip(run.model.named_buffers(), other.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert other.method._capacity_metrics() == run.method._capacity_metrics()
    batch = make_prompt_batch([20, 6, 33, 14])
    for task in (None, *TASKS[:3]):
        first, second = (run_inference(each, batch, task) for each in (run, other))
        assert torch.equal(first[0], second[0])
        assert first[1] == second[1]
    for each in (run, other):
        each.train_on_samples("four", [1])
        each.train_on_samples("four", [1, 2], first_epoch=False)
        each.method.end_task(3, "four", each.context)
    files = [
        each.method.save_task_artifacts(tmp_path / f"{number}", "four")[1] for number, each in enumerate((run, other))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_file(files[0])["0.count"].item() == 3


def make_prompt_batch(tokens: Sequence[int]) -> PromptBatch:
    return collate_prompts([[1, token, token + 2] for token in tokens], 0, 1)


@torch.no_grad()
def run_inference(run: SingleRankMoses, batch: PromptBatch, task: str | None) -> tuple[torch.Tensor, Any]:
    with run.method.inference_context(batch, task) as routed_tasks:
        logits = run.model.eval()(batch.input_ids, batch.attention_mask, batch.position_ids).logits
        return logits, routed_tasks


def test_base_model_answers_before_the_first_task() -> None:
    for router in ("oracle", RLS, "key"):
        run, batch = SingleRankMoses(router=router), make_prompt_batch([20, 6, 33])
        base_model = make_tiny_model().eval()
        with torch.no_grad():
            expected = base_model(batch.input_ids, batch.attention_mask, batch.position_ids).logits
        assert torch.equal(run_inference(run, batch, None)[0], expected)
        assert torch.equal(run_inference(run, batch, "two")[0], expected)  # not learned yet
        run.train_task("one")
        assert not torch.equal(run_inference(run, batch, "one")[0], expected)
        assert torch.equal(run_inference(run, batch, "two")[0], expected)


def test_prompts_of_no_task_use_the_base_model() -> None:
    """In a batch with other rows that are routed to a task."""
    run, batch = SingleRankMoses(router=RLS), make_prompt_batch([20, 6, 33])
    run.train_task("one")
    run.train_task("two")
    assert run.method.task_router is not None
    router = run.method.task_router.router
    with torch.no_grad():
        base_logits = run.model.eval()(batch.input_ids, batch.attention_mask, batch.position_ids).logits
    logits_of_one = run_inference(run, batch, "one")[0]
    router.route = lambda rows: RoutingResult(["one", None, "two"], rows[:, 0], rows[:, 0])  # type: ignore[method-assign]
    logits, routed_tasks = run_inference(run, batch, None)
    assert routed_tasks == ["one", None, "two"]
    torch.testing.assert_close(logits[1], base_logits[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[0], logits_of_one[0], rtol=0, atol=1e-6)
    assert (logits_of_one[1] - base_logits[1]).abs().max() > 1e-4
    assert (logits[2] - base_logits[2]).abs().max() > 1e-4


@pytest.mark.parametrize("router", [RLS, "key"])
def test_statistics_sum_over_all_ranks(router: Any) -> None:
    """An all-reduce over two ranks with the same samples doubles the count."""
    run = SingleRankMoses(router=router)
    run.context = dataclasses.replace(run.context, all_reduce_sum=lambda tensor: tensor.mul_(2))
    run.train_task("one")
    assert run.method.task_router is not None
    assert int(run.method.task_router.router.get_statistics("one").count) == 6
