"""Evaluation of a task's test split, with the samples distributed over the ranks at every ZeRO stage.

Under ZeRO-3 a forward pass is a collective. Every rank therefore makes the same number of passes; a rank whose samples
have run out passes a dummy row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from dscl.config.schema import EvaluateConfig
from dscl.data.batches import collate_prompts
from dscl.data.task import Sample, Task
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.maths import text
from dscl.methods.base import Method
from dscl.model.generation import generate, label_log_probs
from dscl.model.tokenizer import Tokenizer, pad_id

HELDOUT_BATCH = 4  # held-out texts in one forward pass; small, because every token's logits are kept


Metric = Callable[[str, Sample], float]


def _score_against_references(score: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda answer, sample: score(answer, sample.references)


METRICS: dict[str, Metric] = {
    "accuracy": _score_against_references(text.accuracy),
    "exact_match": _score_against_references(text.exact_match),
    "first_letter": _score_against_references(text.first_letter),
    "rouge_l": _score_against_references(text.rouge_l),
    "edit_similarity": _score_against_references(text.edit_similarity),
    "code_similarity": _score_against_references(text.code_similarity),
    # As in TRACE, SARI's source sentence is the whole prompt, including its instruction.
    "sari": lambda answer, sample: text.sari(answer, sample.references, source=sample.prompt),
}


@dataclass(frozen=True)
class EvalSet:
    """The tokenized samples of one task that its score is computed on: its test split or its dev split."""

    task: Task
    samples: Sequence[Sample]
    prompt_ids: Sequence[Sequence[int]]
    label_ids: (
        Sequence[Sequence[int]] | None
    )  # each label's tokens where labels are ranked; None where answers are generated
    bos_id: int | None = None  # the token prepended to every prompt, if the model uses one


class EvalResult(NamedTuple):
    """A task's score and, where the method infers the task of each prompt, how it routed this task's prompts."""

    score: float  # in 0…1
    routing_accuracy: float | None = None  # share of prompts routed to their own task
    rejected_share: float | None = None  # share of prompts routed to no task
    routing_shares: tuple[tuple[str | None, float], ...] | None = None  # (task or None, share of prompts routed to it)


def evaluate_task(
    eval_set: EvalSet,
    engine: Engine,
    method: Method,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    oracle_task_id: bool = False,
) -> EvalResult:
    """Score one task; every rank returns the same result. `on_progress(done, total)` is called after every batch.

    `oracle_task_id`: give the method the true task even if it can infer tasks. Other methods always get it.
    """
    samples, module = eval_set.samples, engine.module
    order = sorted(
        range(len(samples)), key=lambda i: (len(eval_set.prompt_ids[i]), i)
    )  # similar lengths, little padding
    own_indices = order[comm.rank() :: comm.world_size()]
    num_batches = -(-len(order) // (comm.world_size() * config.batch))
    metric, pad = METRICS[eval_set.task.metric], pad_id(tokenizer)
    total, routes = torch.zeros(2, dtype=torch.float64), None
    routed: Counter[str | None] = Counter()
    task_id = eval_set.task.name if oracle_task_id or not method.infers_task_id else None
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for number in range(num_batches):
            indices = own_indices[number * config.batch : (number + 1) * config.batch]
            prompts = [eval_set.prompt_ids[i] for i in indices or order[:1]]  # else a dummy row
            batch = collate_prompts(prompts, pad, eval_set.bos_id).to(engine.device)
            with method.inference_context(batch, task_id) as routes:
                if eval_set.label_ids is not None:
                    assert eval_set.task.labels is not None
                    best = label_log_probs(module, batch, eval_set.label_ids).argmax(dim=1).tolist()
                    answers = [eval_set.task.labels[i] for i in best]
                else:
                    tokens = generate(module, batch, config.max_new_tokens, tokenizer.eos_token_id, pad)
                    answers = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
                for index, answer in zip(indices, answers, strict=False):
                    total += torch.tensor([metric(answer, samples[index]), 1.0])
                routed.update((routes or ())[: len(indices)])
            on_progress(number + 1, num_batches)
    module.train(was_training)
    score, count = comm.all_reduce_sum(total.to(engine.device)).tolist()
    assert count == len(samples), f"{count} of {len(samples)} samples of {eval_set.task.name} were evaluated"
    if routes is None:
        return EvalResult(score / count)
    totals: Counter[str | None] = sum(comm.all_gather_objects(routed), Counter())
    shares = sorted(((name, times / count) for name, times in totals.items()), key=lambda pair: pair[0] or "")
    return EvalResult(score / count, totals[eval_set.task.name] / count, totals[None] / count, tuple(shares))


def mean_token_loss(
    texts: Sequence[Sequence[int]],
    engine: Engine,
    method: Method,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """The mean cross-entropy per token of tokenized texts; every rank returns the same value."""
    module, pad = engine.module, pad_id(tokenizer)
    own_texts = sorted(texts, key=len)[comm.rank() :: comm.world_size()]
    num_batches = -(-len(texts) // (comm.world_size() * HELDOUT_BATCH))
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for number in range(num_batches):
            batch_texts = own_texts[number * HELDOUT_BATCH : (number + 1) * HELDOUT_BATCH]
            batch = collate_prompts(batch_texts or texts[:1], pad).to(engine.device)
            with method.inference_context(batch):
                logits = module(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
                ).logits
            for row in range(len(batch_texts)):
                start = batch.prompt_spans[row][1]
                loss = functional.cross_entropy(
                    logits[row, start:-1].float(), batch.input_ids[row, start + 1 :], reduction="sum"
                )
                total += torch.stack([loss.double(), torch.tensor(len(batch_texts[row]) - 1.0, device=loss.device)])
            on_progress(number + 1, num_batches)
    module.train(was_training)
    loss, tokens = comm.all_reduce_sum(total).tolist()
    return float(loss / tokens)
