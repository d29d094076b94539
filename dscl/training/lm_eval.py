"""Evaluation of a run's model on tasks of EleutherAI's lm-evaluation-harness (lm-eval), if it is installed.

Every rank answers every request, in the same order: under ZeRO-3 a forward pass is a collective, and lm-eval does not
distribute requests over ranks that share one model. Prompts belong to no task of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dscl.data.batches import collate_prompts
from dscl.engine.engine import Engine
from dscl.model.generation import generate
from dscl.model.tokenizer import Tokenizer, pad_id
from dscl.utils.errors import UserError

MAX_ANSWER_TOKENS = 256  # for tasks that set no limit (max_gen_toks)


def evaluate_with_lm_eval(
    tasks: Sequence[str], limit: int | None, engine: Engine, tokenizer: Tokenizer, batch: int
) -> dict[str, dict[str, float]]:
    """lm-eval's metrics for each of these tasks: {task: {metric: value}}. `limit`: samples per task."""
    if not tasks:
        return {}
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(
            f"--lm-eval: given {','.join(tasks)}, but lm-eval cannot be imported ({error}); pip install lm-eval"
        ) from None
    model = LmEvalModel(engine, tokenizer, batch)
    bridge: Any = type("Bridge", (LM,), {name: getattr(model, name) for name in REQUEST_KINDS})()
    try:
        output = simple_evaluate(model=bridge, tasks=list(tasks), limit=limit, bootstrap_iters=0, verbosity="ERROR")
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise UserError(f"--lm-eval: {','.join(tasks)}: {' '.join(str(error).split())[:300]}") from None
    return {
        task: {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in output["results"].items()
    }


REQUEST_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class LmEvalModel:
    """Answers lm-eval's three kinds of requests, in methods with the names that `lm_eval.api.model.LM` demands."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, batch: int) -> None:
        self.engine, self.tokenizer, self.batch = engine, tokenizer, batch
        self.max_length = int(engine.module.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]

    @property
    def start_token(self) -> int:
        """The token that every text begins with: BOS, or EOS where the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p(continuation | context), and whether greedy decoding gives it."""
        return self._score_pairs([self._tokenize_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts, scored in windows of the model's maximum length."""
        totals = []
        for request in requests:
            ids = self.tokenizer(request.args[0], add_special_tokens=False, verbose=False)["input_ids"]
            window = self.max_length - 1
            pairs = [([self.start_token], ids[start : start + window]) for start in range(0, len(ids), window)]
            totals.append(sum(log_prob for log_prob, _ in self._score_pairs(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy continuations of each context, up to the first of the request's stop strings."""
        answers = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or []
            max_new_tokens = int(settings.get("max_gen_toks", MAX_ANSWER_TOKENS))
            ids = self._tokenize_text(context)[-(self.max_length - max_new_tokens) :]
            with self._inference_mode():
                prompts = collate_prompts([ids], pad_id(self.tokenizer)).to(self.engine.device)
                eos_id = self.tokenizer.eos_token_id
                (row,) = generate(self.engine.module, prompts, max_new_tokens, eos_id, pad_id(self.tokenizer))
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            stops = [text.index(stop) for stop in ([until] if isinstance(until, str) else until) if stop in text]
            answers.append(text[: min(stops, default=len(text))])
        return answers

    def _tokenize_text(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids or [self.start_token]

    def _tokenize_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context + continuation, split where the context's own tokens end."""
        context_ids = self._tokenize_text(context)
        all_ids = self._tokenize_text(context + continuation)
        if all_ids[: len(context_ids)] != context_ids:  # one token spans the boundary: tokenize both separately
            return context_ids, self.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return context_ids, all_ids[len(context_ids) :]

    def _score_pairs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """`_score_batch` over batches of similar lengths; the results stand in the order of `pairs`."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
        for start in range(0, len(order), self.batch):
            indices = order[start : start + self.batch]
            for index, result in zip(indices, self._score_batch([pairs[i] for i in indices]), strict=True):
                results[index] = result
        return results

    def _score_batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        rows = [[*context, *continuation][-self.max_length :] for context, continuation in pairs]
        batch = collate_prompts(rows, pad_id(self.tokenizer)).to(self.engine.device)
        logits_to_keep = max(1, *(len(continuation) for _, continuation in pairs)) + 1
        with self._inference_mode():
            logits = self.engine.module(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                logits_to_keep=logits_to_keep,
            ).logits.float()  # [rows, logits_to_keep, vocabulary]
        for row, (_, continuation) in zip(logits, pairs, strict=True):
            if not continuation:
                yield 0.0, True
                continue
            log_probs = row[-len(continuation) - 1 : -1].log_softmax(-1)  # [continuation, vocabulary]
            targets = torch.tensor(continuation, device=log_probs.device)
            is_greedy = bool((log_probs.argmax(-1) == targets).all())
            yield float(log_probs.gather(1, targets[:, None]).sum()), is_greedy

    def _inference_mode(self) -> Any:
        self.engine.module.eval()
        return torch.no_grad()
