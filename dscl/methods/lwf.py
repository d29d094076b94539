"""LwF: on a new task's samples the model shall go on saying what it said before it learnt them (Li and Hoiem, 2016).

What trains: all weights, or one LoRA for all tasks. What is kept within a task: what the model as the task found it
says at every target of the task's samples, recorded once before the first step; no second model is needed. Beside the
loss of its task, every target then costs

    λ Σ p log(p / q)      p, q: then and now, softmax of the logits over T

over the tokens that were likeliest then, with all others as one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import LwfConfig
from dscl.data.batches import Batch
from dscl.methods.base import Facts, Ranks
from dscl.methods.sequential import Sequential
from dscl.model.lm_head import answer_logits


class Lwf(Sequential):
    Config = LwfConfig
    config: LwfConfig

    def __init__(self, config: LwfConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._said: dict[str, torch.Tensor] = {}  # log p and tokens, [targets, k]; starts: each sample's first target

    def begin_task(self, index: int, name: str, ranks: Ranks) -> None:
        self._said = {}
        if index == 0:
            return
        samples = ranks.samples()
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(samples.answer_lengths)]))
        recorded = min(self.config.tokens, int(ranks.module.get_output_embeddings().out_features))  # type: ignore[operator]
        shape = int(starts[-1]), recorded
        said = torch.zeros(shape, device=ranks.device)
        tokens = torch.zeros(shape, dtype=torch.int32, device=ranks.device)
        for batch, logits in self._answers(ranks, len(samples)):
            likeliest = (logits / self.config.temperature).log_softmax(-1).topk(recorded)
            rows = _rows(batch, starts).to(ranks.device)
            said[rows], tokens[rows] = likeliest.values, likeliest.indices.int()
        self._said = {"said": ranks.sum_(said), "tokens": ranks.sum_(tokens), "starts": starts}

    @staticmethod
    def _answers(ranks: Ranks, samples: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The model's logits at every target, [targets, vocabulary], batch by batch."""
        batches = list(ranks.batches(samples))
        training = ranks.module.training
        ranks.module.eval()
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                yield batch, answer_logits(ranks.module, batch)[batch.labels != -100]
                ranks.said("recording", done, len(batches))
        ranks.module.train(training)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits = answer_logits(model, batch)
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="sum")
        if not self._said:
            return loss
        rows = _rows(batch, self._said["starts"]).to(logits.device)
        said, tokens = (self._said[what].to(logits.device)[rows] for what in ("said", "tokens"))
        now = (logits[batch.labels != -100] / self.config.temperature).log_softmax(-1)
        return loss + self.config.strength * apart(said, now, tokens.long())

    def state(self) -> dict[str, torch.Tensor]:
        return self._said

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self._said = state


def _rows(batch: Batch, starts: torch.Tensor) -> torch.Tensor:
    """Which of all targets those of a batch are, in their order there."""
    own = [torch.arange(int(starts[i]), int(starts[i + 1])) for i in batch.samples]
    return torch.cat([torch.empty(0, dtype=torch.int64), *own])


def apart(said: torch.Tensor, now: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Σ p log(p / q), where log p is given for some tokens of each row and log q for all; the others count as one."""
    found = now.gather(-1, tokens)
    total = (said.exp() * (said - found)).sum()
    if said.shape[-1] < now.shape[-1]:
        then, rest = (_others(part) for part in (said, found))
        total = total + (then.exp() * (then - rest)).sum()
    return total


def _others(some: torch.Tensor) -> torch.Tensor:
    """The logarithm of what these leave to all others, [rows]."""
    left = -torch.expm1(some.logsumexp(-1))
    return left.clamp_min(torch.finfo(left.dtype).eps).log()
