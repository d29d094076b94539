"""The batch sampler loses no sample; packed, padded and single samples give the same loss and gradient."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dscl.data.batches import IGNORE_INDEX, Batch, BatchSampler, SampleRow, collate, collate_prompts, first_fit

PAD = 0
MAX_LENGTH = 32


def lengths(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(1, 25, count), generator.integers(2, 8, count)


def make_sampler(count: int, **options: Any) -> BatchSampler:
    defaults = {"seed": 3, "epochs": 2, "global_batch": 7, "micro_batch": 2, "world_size": 1, "packing": False}
    return BatchSampler(*lengths(count), **{**defaults, "max_length": MAX_LENGTH, **options})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_every_sample_once_and_equally_many_micro_batches(
    packing: bool, world_size: int, micro_batch: int, count: int
) -> None:
    sampler = make_sampler(count, world_size=world_size, micro_batch=micro_batch, packing=packing)
    prompts, answers = lengths(count)
    for number in range(sampler.num_steps):
        ranks = [sampler.micro_batches(number, rank) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = [row for batches in ranks for batch in batches for row in batch]
        step = sampler.step_plan(number)
        assert Counter(sample for row in rows for sample in row) == Counter(step.sample_ids)
        assert max(step.sample_ids.count(sample) for sample in step.sample_ids) == 1
        assert all(len(batch) <= micro_batch for batches in ranks for batch in batches)
        assert all(sum(int(prompts[s] + answers[s]) for s in row) <= MAX_LENGTH for row in rows)
        assert all(row for row in rows)
        assert packing or all(len(row) == 1 for row in rows)
        assert step.num_targets == sum(int(answers[s]) for s in step.sample_ids)
        assert step.num_tokens == sum(int(answers[s] + prompts[s]) for s in step.sample_ids)


def test_each_epoch_goes_through_all_samples_in_an_order_of_its_own() -> None:
    sampler = make_sampler(20, epochs=3)
    assert (sampler.steps_per_epoch, sampler.num_steps) == (3, 9)
    epochs = [[sampler.step_plan(3 * e + s).sample_ids for s in range(3)] for e in range(3)]
    for epoch in epochs:
        assert [len(samples) for samples in epoch] == [7, 7, 6]
        assert sorted(sample for samples in epoch for sample in samples) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [sampler.step_plan(i).epoch for i in (0, 2, 8)] == [pytest.approx(1 / 3), 1.0, 3.0]


def test_a_step_depends_on_its_number_alone() -> None:
    forward = [make_sampler(20).step_plan(i) for i in range(6)]
    sampler = make_sampler(20, world_size=4, micro_batch=3, packing=True)
    assert [sampler.step_plan(i) for i in (5, 0, 3, 1, 4, 2)] == [forward[i] for i in (5, 0, 3, 1, 4, 2)]
    assert [make_sampler(20, seed=4).step_plan(i) for i in range(6)] != forward


def test_ranks_get_like_amounts_of_work() -> None:
    sampler = make_sampler(400, global_batch=80, world_size=4)
    prompts, answers = lengths(400)
    total = prompts + answers
    for number in range(sampler.num_steps):
        tokens_per_rank = [
            sum(int(total[s]) for batch in sampler.micro_batches(number, rank) for row in batch for s in row)
            for rank in range(4)
        ]
        assert max(tokens_per_rank) <= 1.2 * min(tokens_per_rank)


def test_first_fit() -> None:
    assert first_fit([10, 11, 12, 13, 14], [3, 9, 7, 1, 10], 10) == [[14], [11, 13], [12, 10]]
    assert first_fit([], [], 10) == []


# --- tensors


def make_samples(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)

    def ids(at_most: int) -> list[int]:
        return [rng.randrange(3, 60) for _ in range(rng.randint(1, at_most))]

    return [(ids(20), ids(6)) for _ in range(count)]


SAMPLES = make_samples(7)
PACKED_ROWS: list[SampleRow] = [[0, 3, 5], [1], [6, 2, 4]]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **shape)
    return LlamaForCausalLM(config).float()


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    output: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    return output.flatten(0, 1)[batch.loss_positions]


def loss_and_gradient(model: Any, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = logits_of(model, batch)
        loss = cross_entropy(logits.float(), batch.labels, ignore_index=IGNORE_INDEX, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def reference_loss_and_gradient(model: Any) -> tuple[float, torch.Tensor]:
    """The loss over answer tokens when each sample is computed by itself, without padding and collation."""
    model.zero_grad()
    total = 0.0
    for prompt, answer in SAMPLES:
        ids = torch.tensor([prompt + answer])
        log_probabilities = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        positions = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        loss = -sum(log_probabilities[0, position, token] for position, token in zip(positions, answer, strict=True))
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "batches",
    [
        [collate([[i] for i in range(7)], SAMPLES, PAD, packing=False)],
        [collate(rows, SAMPLES, PAD, packing=False) for rows in ([[0], [6]], [[3]], [[5], [1], [2], [4]])],
        [collate(PACKED_ROWS, SAMPLES, PAD, packing=True)],
        [collate([row], SAMPLES, PAD, packing=True) for row in PACKED_ROWS] + [collate([], SAMPLES, PAD, True)],
        [collate([[i] for i in range(7)], SAMPLES, PAD, packing=False), collate([], SAMPLES, PAD, False)],
    ],
    ids=["padded", "padded in parts", "packed", "packed with a filler", "padded with a filler"],
)
def test_one_loss_and_one_gradient_however_batched(model: Any, batches: list[Batch]) -> None:
    loss, gradient = loss_and_gradient(model, batches)
    expected_loss, expected_gradient = reference_loss_and_gradient(model)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert torch.isfinite(gradient).all()
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_packed_samples_do_not_see_each_other(model: Any) -> None:
    before = collate(PACKED_ROWS, SAMPLES, PAD, packing=True)
    changed_samples = list(SAMPLES)
    prompt, answer = SAMPLES[3]
    changed_samples[3] = ([3 + token % 57 for token in prompt], [3 + (token + 7) % 57 for token in answer])
    after = collate(PACKED_ROWS, changed_samples, PAD + 1, packing=True)
    all_positions = torch.arange(before.input_ids.numel())
    with torch.no_grad():
        logits_before, logits_after = (
            logits_of(model, replace(batch, loss_positions=all_positions)) for batch in (before, after)
        )
    difference = (logits_before - logits_after).abs().amax(-1).view_as(before.input_ids)
    start = sum(map(len, SAMPLES[0]))
    own_positions = torch.zeros_like(difference, dtype=torch.bool)
    own_positions[0, start : start + sum(map(len, SAMPLES[3]))] = True
    for i, row in enumerate(PACKED_ROWS):
        # The padding has another token in the second batch.
        own_positions[i, sum(len(SAMPLES[s][0]) + len(SAMPLES[s][1]) for s in row) :] = True
    assert difference[own_positions].max() > 0.1
    assert difference[~own_positions].max() == 0


@pytest.mark.parametrize("packing", [False, True])
def test_shape_and_contents(packing: bool) -> None:
    rows = PACKED_ROWS if packing else [[i] for i in range(7)]
    batch = collate(rows, SAMPLES, PAD, packing)
    width = batch.input_ids.shape[1]
    assert width % 8 == 0
    assert width - max(sum(len(SAMPLES[s][0]) + len(SAMPLES[s][1]) for s in row) for row in rows) < 8
    assert batch.sample_ids == [sample for row in rows for sample in row]
    assert batch.input_ids.flatten()[batch.loss_positions + 1].tolist() == batch.labels.tolist()
    assert batch.labels.tolist() == [token for sample in batch.sample_ids for token in SAMPLES[sample][1]]
    for i, row in enumerate(rows):
        ids = [token for sample in row for part in SAMPLES[sample] for token in part]
        expected = [*ids, *[PAD] * (width - len(ids))] if packing else [*[PAD] * (width - len(ids)), *ids]
        assert batch.input_ids[i].tolist() == expected
        starts = (batch.position_ids[i] == 0).sum().item()
        if packing:
            assert starts == len(row) + (len(ids) < width)
        else:
            assert batch.position_ids[i, -len(ids) :].tolist() == list(range(len(ids)))
    assert (batch.attention_mask is None) == packing
    if batch.attention_mask is not None:
        assert batch.attention_mask.sum(1).tolist() == [sum(map(len, SAMPLES[i])) for i in range(7)]


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_say_where_each_prompts_own_tokens_stand(packing: bool) -> None:
    rows = PACKED_ROWS if packing else [[i] for i in range(7)]
    for bos_id in (None, SAMPLES[0][0][0]):
        batch = collate(rows, SAMPLES, PAD, packing, bos_id, True)
        assert batch.first_epoch
        for sample, (row, start, stop) in zip(batch.sample_ids, batch.prompt_spans, strict=True):
            prompt = SAMPLES[sample][0]
            own_ids = prompt[1:] if len(prompt) > 1 and prompt[0] == bos_id else prompt
            assert batch.input_ids[row, start:stop].tolist() == own_ids
    prompts = [[5], [5, 6, 7], [6, 5]]
    prompt_batch = collate_prompts(prompts, PAD, 5)
    own_tokens = [prompt_batch.input_ids[row, start:stop].tolist() for row, start, stop in prompt_batch.prompt_spans]
    assert own_tokens == [[5], [6, 7], [6, 5]]


@pytest.mark.parametrize("packing", [False, True])
def test_filler(model: Any, packing: bool) -> None:
    batch = collate([], SAMPLES, PAD, packing)
    assert batch.sample_ids == []
    assert batch.labels.numel() >= 1
    assert (batch.labels == IGNORE_INDEX).all()
    assert torch.isfinite(logits_of(model, batch)).all()
    loss, gradient = loss_and_gradient(model, [batch])
    assert loss == 0
    assert (gradient == 0).all()


def test_prompt_batch_gives_the_logits_of_each_prompt_alone(model: Any) -> None:
    prompts = [prompt for prompt, _ in SAMPLES]
    batch = collate_prompts(prompts, PAD)
    assert batch.input_ids.shape[1] == max(map(len, prompts))
    for i, prompt in enumerate(prompts):
        assert batch.position_ids[i, -len(prompt) :].tolist() == list(range(len(prompt)))
    with torch.no_grad():
        batch_logits = model(batch.input_ids, batch.attention_mask, batch.position_ids).logits[:, -1]
        for i, prompt in enumerate(prompts):
            single_logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(batch_logits[i], single_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_to_moves_every_tensor(packing: bool) -> None:
    moved = collate([[0], [1]], SAMPLES, PAD, packing).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == (4 if packing else 5)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert collate_prompts([[1, 2], [3]], PAD).to("meta").input_ids.device.type == "meta"
