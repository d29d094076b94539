"""Evaluation: a task's test split put to the model, shared out over the ranks at every ZeRO stage.

Every rank makes the same number of forward passes, with a stand-in row where its share has run out: under ZeRO-3 a
pass is a collective, and a rank that stayed away would leave the others waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from dscl.config.schema import EvaluateConfig
from dscl.data.batches import prompt_batch
from dscl.data.task import Sample, Task
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.maths import text
from dscl.methods.base import Method
from dscl.model.generation import generate, label_likelihoods
from dscl.model.tokenizer import Tokenizer, pad_id

TEXTS_AT_ONCE = 4  # of held-out texts, each of whose tokens needs its logits


Metric = Callable[[str, Sample], float]


def _by_references(score: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda answer, sample: score(answer, sample.references)


METRICS: dict[str, Metric] = {
    "accuracy": _by_references(text.accuracy),
    "exact_match": _by_references(text.exact_match),
    "first_letter": _by_references(text.first_letter),
    "rouge_l": _by_references(text.rouge_l),
    "edit_similarity": _by_references(text.edit_similarity),
    "code_similarity": _by_references(text.code_similarity),
    # What is simplified is the whole prompt, the instruction in it included: so TRACE has it.
    "sari": lambda answer, sample: text.sari(answer, sample.references, source=sample.prompt),
}


@dataclass(frozen=True)
class Exam:
    """One task's test split (or another), ready to be put to a model."""

    task: Task
    samples: Sequence[Sample]
    prompts: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]] | None  # the label set's tokens where it is ranked, else None
    bos: int | None = None  # the token that stands before every prompt, if one does


class Mark(NamedTuple):
    """A task's score in 0…1 and, where the method decides which task a prompt belongs to, the shares of prompts that
    went to their own task and to none; and those that went to each."""

    score: float
    routed: float | None = None
    rejected: float | None = None
    went: tuple[tuple[str | None, float], ...] | None = None


def take(
    exam: Exam,
    engine: Engine,
    method: Method,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    said: Callable[[int, int], None] = lambda *_: None,
    given: bool = False,
) -> Mark:
    """The task's mark, the same on every rank. `said(done, of)` hears the progress. `given`: the method is told which
    task it is, as one that does not find out always is."""
    samples, module = exam.samples, engine.module
    order = sorted(range(len(samples)), key=lambda i: (len(exam.prompts[i]), i))  # alike lengths, little padding
    mine = order[comm.rank() :: comm.world()]
    rounds = -(-len(order) // (comm.world() * config.batch))
    metric, pad = METRICS[exam.task.metric], pad_id(tokenizer)
    total, routes = torch.zeros(2, dtype=torch.float64), None
    answered: Counter[str | None] = Counter()
    told = exam.task.name if given or not method.decides else None
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for number in range(rounds):
            chosen = mine[number * config.batch : (number + 1) * config.batch]
            batch = prompt_batch([exam.prompts[i] for i in chosen or order[:1]], pad, exam.bos).to(engine.device)
            with method.answering(batch, told) as routes:
                if exam.labels is not None:
                    assert exam.task.labels is not None
                    best = label_likelihoods(module, batch, exam.labels, pad).argmax(dim=1).tolist()
                    answers = [exam.task.labels[i] for i in best]
                else:
                    tokens = generate(module, batch, config.max_new_tokens, tokenizer.eos_token_id, pad)
                    answers = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
                for index, answer in zip(chosen, answers, strict=False):
                    total += torch.tensor([metric(answer, samples[index]), 1.0])
                answered.update((routes or ())[: len(chosen)])
            said(number + 1, rounds)
    module.train(was_training)
    score, count = comm.sum_(total.to(engine.device)).tolist()
    assert count == len(samples), f"{count} of {len(samples)} samples of {exam.task.name} were evaluated"
    if routes is None:
        return Mark(score / count)
    whole: Counter[str | None] = sum(comm.gather(answered), Counter())
    went = tuple(sorted(((name, times / count) for name, times in whole.items()), key=lambda pair: pair[0] or ""))
    return Mark(score / count, whole[exam.task.name] / count, whole[None] / count, went)


def loss_on(
    texts: Sequence[Sequence[int]],
    engine: Engine,
    method: Method,
    tokenizer: Tokenizer,
    said: Callable[[int, int], None] = lambda *_: None,
) -> float:
    """The mean loss per token of running texts, the same on every rank."""
    module, pad = engine.module, pad_id(tokenizer)
    mine = sorted(texts, key=len)[comm.rank() :: comm.world()]
    rounds = -(-len(texts) // (comm.world() * TEXTS_AT_ONCE))
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for number in range(rounds):
            chosen = mine[number * TEXTS_AT_ONCE : (number + 1) * TEXTS_AT_ONCE]
            batch = prompt_batch(chosen or texts[:1], pad).to(engine.device)
            with method.answering(batch):
                logits = module(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
                ).logits
            for row in range(len(chosen)):
                start = batch.prompts[row][1]
                loss = functional.cross_entropy(
                    logits[row, start:-1].float(), batch.input_ids[row, start + 1 :], reduction="sum"
                )
                total += torch.stack([loss.double(), torch.tensor(len(chosen[row]) - 1.0, device=loss.device)])
            said(number + 1, rounds)
    module.train(was_training)
    loss, tokens = comm.sum_(total).tolist()
    return float(loss / tokens)
