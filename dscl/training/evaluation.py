"""Evaluation: scores of the tasks' test splits, and the loss on held-out texts.

The samples are distributed over the ranks at every ZeRO stage.

Under ZeRO-3 a forward pass is a collective. Every rank therefore makes the same number of passes; a rank whose samples
have run out passes a dummy row.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from dscl.monitoring.score_board import EvalResult
from dscl.utils.errors import UserError

if TYPE_CHECKING:
    from dscl.training.setup import RunSetup

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


class Evaluator:
    """Evaluates the tasks of a run. `on_progress(name, done, total)` is called after every batch."""

    def __init__(
        self, setup: RunSetup, engine: Engine, on_progress: Callable[[str, int, int], None] = lambda *_: None
    ) -> None:
        self.setup, self.engine, self.on_progress = setup, engine, on_progress
        self.config = setup.recipe.evaluate

    def evaluate_tasks(self, after: int | None = None, oracle_task_id: bool = False) -> list[EvalResult | None]:
        """Evaluate the tasks that are due after training task `after` (None: all); None for the others."""
        return [
            self.evaluate(index, oracle_task_id) if after is None or should_evaluate(self.setup, index, after) else None
            for index in range(len(self.setup.tasks))
        ]

    def evaluate(self, index: int, oracle_task_id: bool = False) -> EvalResult:
        """Evaluate one task. `oracle_task_id`: give the method every prompt's true task."""
        eval_set = self.setup.tasks[index].eval_set
        on_progress = functools.partial(self.on_progress, eval_set.task.name)
        method, tokenizer = self.setup.method, self.setup.backbone.tokenizer
        return evaluate_task(eval_set, self.engine, method, tokenizer, self.config, on_progress, oracle_task_id)

    def heldout_loss(self) -> list[float]:
        """The loss on the held-out texts as a list of one; an empty list if the recipe names no such texts."""
        texts = self.setup.heldout_texts
        if not texts:
            return []
        on_progress = functools.partial(self.on_progress, "held-out texts")
        return [mean_token_loss(texts, self.engine, self.setup.method, self.setup.backbone.tokenizer, on_progress)]


def reject_needless_oracle(setup: RunSetup) -> None:
    """Refuse evaluate.oracle_task_id for a method that infers no task: its scores would not change."""
    if setup.recipe.evaluate.oracle_task_id and not setup.method.infers_task_id:
        how = "needs every prompt's task anyway" if setup.method.uses_task_id else "answers alike whatever the task"
        raise UserError(
            f"evaluate.oracle_task_id: given true, but this method ({setup.recipe.method.name}) {how}; remove it"
        )


def should_evaluate(setup: RunSetup, task: int, after: int) -> bool:
    """Whether task `task` is evaluated after training task `after` (evaluate.every, evaluate.tasks); both are indices.

    After the last task, all tasks are evaluated.
    """
    settings = setup.recipe.evaluate
    if after + 1 == len(setup.tasks):
        return True
    selected = {"all": True, "seen": task <= after, "new": task == after}
    return (after + 1) % settings.every == 0 and selected[settings.tasks]


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
