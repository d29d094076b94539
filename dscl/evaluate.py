"""Evaluation: rank a label set by likelihood, or generate greedily; shared out over the ranks at every ZeRO stage.

Every rank makes the same number of forward passes, with a stand-in row where its share has run out: under ZeRO-3 a
pass is a collective, and a rank that stayed away would leave the others waiting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dscl import dist
from dscl.config import key
from dscl.data.batches import PromptBatch, prompt_batch
from dscl.data.task import Task
from dscl.engine import Engine
from dscl.maths import text
from dscl.model.tokenizer import Tokenizer, pad_id

LABELS_AT_ONCE = 4  # for each of them the prompts' keys and values are copied: at 7B half a megabyte a token


@dataclass(frozen=True)
class EvaluateConfig:
    mode: str = key(
        "rank", choices=("rank", "generate"), help="rank the labels (tasks without labels generate), or generate"
    )
    batch: int = key(16, at_least=1, help="prompts that a rank evaluates at once")
    max_new_tokens: int = key(32, at_least=1, help="longest generated answer")
    tasks: str = key("all", choices=("all", "seen"), help="after each task, evaluate all tasks or those trained so far")
    before: bool = key(True, help="also evaluate before any training; FWT needs it, and tasks: all")


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": text.accuracy,
    "exact_match": text.exact_match,
    "rouge_l": text.rouge_l,
}


@dataclass(frozen=True)
class Exam:
    """One task's test split, ready to be put to a model."""

    task: Task
    prompts: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]] | None  # the label set's tokens where it is ranked, else None


def take(
    exam: Exam,
    engine: Engine,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    said: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """The task's score in 0…1, the same on every rank. `said(done, of)` hears the progress."""
    samples, module = exam.task.test, engine.module
    order = sorted(range(len(samples)), key=lambda i: (len(exam.prompts[i]), i))  # alike lengths, little padding
    mine = order[dist.rank() :: dist.world()]
    rounds = -(-len(order) // (dist.world() * config.batch))
    total = torch.zeros(2, dtype=torch.float64)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for number in range(rounds):
            chosen = mine[number * config.batch : (number + 1) * config.batch]
            prompts = [exam.prompts[i] for i in chosen or order[:1]]
            answers = _answers(exam, module, prompts, tokenizer, config, engine.device)
            for index, answer in zip(chosen, answers, strict=False):
                total += torch.tensor([METRICS[exam.task.metric](answer, samples[index].references), 1.0])
            said(number + 1, rounds)
    module.train(was_training)
    score, count = dist.sum_(total.to(engine.device)).tolist()
    assert count == len(samples), f"{count} of {len(samples)} samples of {exam.task.name} were evaluated"
    return float(score / count)


def _answers(
    exam: Exam,
    module: nn.Module,
    prompts: list[Sequence[int]],
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    device: torch.device,
) -> list[str]:
    if exam.labels is not None:
        assert exam.task.labels is not None
        best = label_likelihoods(module, prompts, exam.labels, pad_id(tokenizer), device).argmax(dim=1).tolist()
        return [exam.task.labels[i] for i in best]
    tokens = generate(module, prompts, config.max_new_tokens, tokenizer.eos_token_id, pad_id(tokenizer), device)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]


def label_likelihoods(
    module: Any, prompts: list[Sequence[int]], labels: Sequence[Sequence[int]], pad: int, device: torch.device
) -> torch.Tensor:
    """log p(label | prompt), [prompts, labels]; each prompt passes through the model once for all labels.

    The labels' further tokens follow in groups, and in equally many of them on every rank.
    """
    batch = prompt_batch(prompts, pad).to(device)
    first = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    starts = torch.tensor([label[0] for label in labels], device=device)
    scores = first.logits[:, -1].float().log_softmax(-1)[:, starts]
    for at in range(0, len(labels), LABELS_AT_ONCE):
        group = labels[at : at + LABELS_AT_ONCE]
        if max(map(len, group)) > 1:
            cache = copy.deepcopy(first.past_key_values)  # a pass writes into it
            scores[:, at : at + len(group)] += _gains(module, batch, cache, group, pad)
    return scores


def _gains(module: Any, batch: PromptBatch, cache: Any, labels: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """What the tokens after the first add to log p(label | prompt), [prompts, labels]."""
    device, prompts, longest = batch.input_ids.device, len(batch.input_ids), max(map(len, labels))
    tokens = torch.full((len(labels), longest), pad)
    for row, label in enumerate(labels):
        tokens[row, : len(label)] = torch.tensor(label)
    tokens = tokens.to(device)
    lengths = torch.tensor([len(label) for label in labels], device=device)
    cache.batch_repeat_interleave(len(labels))
    given = tokens[:, :-1].repeat(prompts, 1)
    mask = batch.attention_mask.repeat_interleave(len(labels), 0)
    starts = batch.position_ids[:, -1:].repeat_interleave(len(labels), 0) + 1
    logits = module(
        input_ids=given,
        attention_mask=torch.cat([mask, torch.ones_like(given)], 1),
        position_ids=starts + torch.arange(longest - 1, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits.float()
    following = tokens[:, 1:].repeat(prompts, 1)
    gained = logits.log_softmax(-1).gather(2, following[..., None])[..., 0]
    counted = torch.arange(1, longest, device=device) < lengths.repeat(prompts)[:, None]
    return gained.masked_fill(~counted, 0.0).sum(1).view(prompts, len(labels))


def generate(
    module: Any, prompts: list[Sequence[int]], max_new_tokens: int, eos: int, pad: int, device: torch.device
) -> list[list[int]]:
    """Greedy continuations of a batch of prompts with a KV cache; stops when every rank's rows have ended."""
    batch = prompt_batch(prompts, pad).to(device)
    ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
    cache = None
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    produced = []
    for _ in range(max_new_tokens):
        out = module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(-1).masked_fill(ended, pad)
        ended = ended | (chosen == eos)
        produced.append(chosen.masked_fill(ended, eos))
        if not dist.any_rank(not bool(ended.all())):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    rows = torch.stack(produced, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]
