"""General ability by lm-eval, if it is installed: its tasks, put to the model of a run as it stands.

Every rank answers every request, in the same order: under ZeRO-3 a pass is a collective, and lm-eval tells the model
nothing of how requests would be shared out. Prompts belong to no task of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dscl.data.batches import prompt_batch
from dscl.engine.engine import Engine
from dscl.model.generation import generate
from dscl.model.tokenizer import Tokenizer, pad_id
from dscl.utils.errors import UserError

LONGEST_ANSWER = 256  # tokens, where a task sets no limit of its own


def ask(
    tasks: Sequence[str], limit: int | None, engine: Engine, tokenizer: Tokenizer, batch: int
) -> dict[str, dict[str, float]]:
    """The numbers that lm-eval gives for each of these tasks."""
    if not tasks:
        return {}
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(
            f"--lm-eval: given {','.join(tasks)}, but lm-eval cannot be imported ({error}); pip install lm-eval"
        ) from None
    answering = Answering(engine, tokenizer, batch)
    bridge: Any = type("Bridge", (LM,), {name: getattr(answering, name) for name in ANSWERS})()
    try:
        found = simple_evaluate(model=bridge, tasks=list(tasks), limit=limit, bootstrap_iters=0, verbosity="ERROR")
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise UserError(f"--lm-eval: {','.join(tasks)}: {' '.join(str(error).split())[:300]}") from None
    return {
        task: {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
        for task, numbers in found["results"].items()
    }


ANSWERS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Answering:
    """lm-eval's three kinds of requests."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, batch: int) -> None:
        self.engine, self.tokenizer, self.batch = engine, tokenizer, batch
        self.longest = int(engine.module.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]

    @property
    def first(self) -> int:
        """The token that a text begins with."""
        begins = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begins is None else begins)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether it is what the model would say."""
        return self._judged([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts, in stretches as long as the model reads."""
        totals = []
        for request in requests:
            ids = self.tokenizer(request.args[0], add_special_tokens=False, verbose=False)["input_ids"]
            room = self.longest - 1
            parts = [([self.first], ids[at : at + room]) for at in range(0, len(ids), room)]
            totals.append(sum(value for value, _ in self._judged(parts)))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        answers = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or []
            most = int(settings.get("max_gen_toks", LONGEST_ANSWER))
            ids = self._begun(context)[-(self.longest - most) :]
            with self._watching():
                prompts = prompt_batch([ids], pad_id(self.tokenizer)).to(self.engine.device)
                end = self.tokenizer.eos_token_id
                (row,) = generate(self.engine.module, prompts, most, end, pad_id(self.tokenizer))
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            stops = [text.index(stop) for stop in ([until] if isinstance(until, str) else until) if stop in text]
            answers.append(text[: min(stops, default=len(text))])
        return answers

    def _begun(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids or [self.first]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context's own tokens end."""
        before = self._begun(context)
        whole = self._begun(context + continuation)
        if whole[: len(before)] != before:  # the seam fell into a token: the continuation is read by itself
            return before, self.tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return before, whole[len(before) :]

    def _judged(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
        for at in range(0, len(order), self.batch):
            chosen = order[at : at + self.batch]
            for place, told in zip(chosen, self._judge([pairs[i] for i in chosen]), strict=True):
                found[place] = told
        return found

    def _judge(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        rows = [[*before, *after][-self.longest :] for before, after in pairs]
        batch = prompt_batch(rows, pad_id(self.tokenizer)).to(self.engine.device)
        keep = max(1, *(len(after) for _, after in pairs)) + 1
        with self._watching():
            logits = self.engine.module(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                logits_to_keep=keep,
            ).logits.float()
        for row, (_, after) in zip(logits, pairs, strict=True):
            if not after:
                yield 0.0, True
                continue
            said = row[-len(after) - 1 : -1].log_softmax(-1)
            wanted = torch.tensor(after, device=said.device)
            exact = bool((said.argmax(-1) == wanted).all())
            yield float(said.gather(1, wanted[:, None]).sum()), exact

    def _watching(self) -> Any:
        self.engine.module.eval()
        return torch.no_grad()
