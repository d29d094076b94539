"""Answering a batch of prompts: rank a label set by likelihood, or generate greedily; and texts of the model's own.

Every rank makes equally many passes: under ZeRO-3 a pass is a collective, and a rank that stayed away would leave the
others waiting. Alone, it is plain decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dscl import dist
from dscl.data.batches import PromptBatch

Drawn = tuple[torch.Tensor, int]  # a block of texts, and how many of its rows count
BLOCK = 32  # texts drawn side by side
LABELS_AT_ONCE = 4  # for each of them the prompts' keys and values are copied: at 7B half a megabyte a token


def label_likelihoods(module: Any, batch: PromptBatch, labels: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """log p(label | prompt), [prompts, labels]; each prompt passes through the model once for all labels.

    The labels' further tokens follow in groups, and in equally many of them on every rank.
    """
    first = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    starts = torch.tensor([label[0] for label in labels], device=batch.input_ids.device)
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


def generate(module: Any, batch: PromptBatch, max_new_tokens: int, eos: int, pad: int) -> list[list[int]]:
    """Greedy continuations of a batch of prompts with a KV cache; stops when every rank's rows have ended."""
    ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
    cache = None
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
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


def sample_texts(
    module: Any,
    texts: int,
    length: int,
    seed: int,
    device: torch.device,
    said: Callable[[int, int], None] = lambda *_: None,
) -> list[Drawn]:
    """This rank's share of texts that the model makes up (temperature 1), in blocks of token ids.

    Every block is drawn in the same way whichever rank draws it, so the texts do not depend on the number of ranks. All
    ranks get equally many blocks of equal size; with each comes how many of its rows, the first ones, are to count.
    """
    config = module.config
    begins = next(token for token in (config.bos_token_id, config.eos_token_id, 0) if token is not None)
    blocks = -(-texts // BLOCK)
    drawn: list[Drawn] = []
    numbers = range(dist.rank(), -(-blocks // dist.world()) * dist.world(), dist.world())
    for number in numbers:
        generator = torch.Generator().manual_seed(hash((seed, number)) % 2**63)
        ids = torch.full((BLOCK, 1), begins, device=device)
        cache, rows = None, [ids]
        for token in range(1, length):
            said(len(drawn) * length + token, len(numbers) * length)
            out = module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            # The largest of log p + Gumbel noise is a draw from p.
            noise = torch.rand(out.logits[:, -1].shape, generator=generator, dtype=torch.float64).log_().neg_().log_()
            ids = (out.logits[:, -1].double() - noise.to(device)).argmax(-1, keepdim=True)
            rows.append(ids)
        drawn.append((torch.cat(rows, 1), min(BLOCK, max(0, texts - number * BLOCK))))
    return drawn
