"""LwF: distillation from the model before a task, on the task's own samples (Li and Hoiem, 2016).

What trains: all weights, or one LoRA for all tasks. What is kept during a task: the old model's probabilities at every
target token of the task's samples. They are recorded once before the task's first step, so no second model is needed.
The loss of every target token gets an additional term

    λ Σ p log(p / q)      p, q: old and new probabilities, softmax(logits / T)

over the old model's top tokens; all other tokens count together as one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import LwfPreset
from dscl.data.batches import Batch
from dscl.methods.base import RunInfo, TaskContext
from dscl.methods.sequential import Sequential
from dscl.model.lm_head import answer_logits


class Lwf(Sequential):
    """Learning without forgetting."""

    Config = LwfPreset
    config: LwfPreset

    def __init__(self, config: LwfPreset, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        # "log_probs": log p, and "tokens": token ids, both [target tokens, k]. "starts": index of each sample's first
        # target token.
        self._recorded: dict[str, torch.Tensor] = {}

    def begin_task(self, index: int, name: str, context: TaskContext) -> None:
        self._recorded = {}
        if index == 0:
            return
        samples = context.task_samples()
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(samples.answer_lengths)]))
        num_recorded = min(self.config.loss.top_tokens, int(context.model.get_output_embeddings().out_features))  # type: ignore[operator]
        shape = int(starts[-1]), num_recorded
        old_log_probs = torch.zeros(shape, device=context.device)
        tokens = torch.zeros(shape, dtype=torch.int32, device=context.device)
        for batch, logits in self._iter_answer_logits(context, len(samples)):
            top_tokens = (logits / self.config.loss.temperature).log_softmax(-1).topk(num_recorded)
            rows = _target_rows(batch, starts).to(context.device)
            old_log_probs[rows], tokens[rows] = top_tokens.values, top_tokens.indices.int()
        self._recorded = {
            "log_probs": context.all_reduce_sum(old_log_probs),
            "tokens": context.all_reduce_sum(tokens),
            "starts": starts,
        }

    @staticmethod
    def _iter_answer_logits(context: TaskContext, samples: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield batches of the task's samples, with the model's logits at their targets [target tokens, vocabulary]."""
        batches = list(context.iter_batches(samples))
        training = context.model.training
        context.model.eval()
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                yield batch, answer_logits(context.model, batch)[batch.labels != -100]
                context.report_progress("recording", done, len(batches))
        context.model.train(training)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits = answer_logits(model, batch)
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum")
        if not self._recorded:
            return loss
        rows = _target_rows(batch, self._recorded["starts"]).to(logits.device)
        old_log_probs, tokens = (self._recorded[key].to(logits.device)[rows] for key in ("log_probs", "tokens"))
        new_log_probs = (logits[batch.labels != -100] / self.config.loss.temperature).log_softmax(-1)
        return loss + self.config.loss.weight * distillation_loss(old_log_probs, new_log_probs, tokens.long())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._recorded

    def load_state_dict(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self._recorded = state


def _target_rows(batch: Batch, starts: torch.Tensor) -> torch.Tensor:
    """The rows, in the recorded tensors, of a batch's targets in batch order."""
    ranges = [torch.arange(int(starts[i]), int(starts[i + 1])) for i in batch.sample_ids]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])


def distillation_loss(old_log_probs: torch.Tensor, new_log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Σ p log(p / q) over `tokens`, with all other tokens of the vocabulary counted together as one.

    `old_log_probs`: log p [rows, k] of these tokens. `new_log_probs`: log q [rows, vocabulary].
    """
    selected = new_log_probs.gather(-1, tokens)
    total = (old_log_probs.exp() * (old_log_probs - selected)).sum()
    if old_log_probs.shape[-1] < new_log_probs.shape[-1]:
        old_rest, new_rest = (_log_prob_of_rest(log_probs) for log_probs in (old_log_probs, selected))
        total = total + (old_rest.exp() * (old_rest - new_rest)).sum()
    return total


def _log_prob_of_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """The log-probability [rows] of all tokens other than those whose log-probabilities [rows, k] are given."""
    rest = -torch.expm1(log_probs.logsumexp(-1))
    return rest.clamp_min(torch.finfo(rest.dtype).eps).log()
