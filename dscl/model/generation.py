"""Answering a batch of prompts: rank a label set by likelihood, or generate greedily; and texts of the model's own.

Every rank makes equally many passes: under ZeRO-3 a pass is a collective, and a rank that stayed away would leave the
others waiting. Alone, it is plain decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicLayer

from dscl.data.batches import PromptBatch
from dscl.distributed import comm

Drawn = tuple[torch.Tensor, int]  # a block of texts, and how many of its rows count
BLOCK = 32  # texts drawn side by side
TOKENS_AT_ONCE = 32  # of labels, beside each prompt; each of them needs its logits
Prefix = tuple[int, ...]  # the beginning of a label


def label_likelihoods(module: Any, batch: PromptBatch, labels: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """log p(label | prompt), [prompts, labels]; each prompt passes through the model once for all labels.

    What the labels are made of follows as one tree beside each prompt, in which a token sees the prompt and its own
    label's beginning; so what labels share is computed once. Large trees come in parts, equally many on every rank.
    """
    first = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    device, cache = batch.input_ids.device, first.past_key_values
    starts = torch.tensor([label[0] for label in labels], device=device)
    scores = first.logits[:, -1].float().log_softmax(-1)[:, starts]
    parts = _parts(labels, TOKENS_AT_ONCE if _branches(module, cache) else 0)
    for number, (prefixes, chosen) in enumerate(parts):
        kept = cache if number + 1 == len(parts) else copy.deepcopy(cache)  # a pass writes into it
        said = _after(module, batch, kept, prefixes)
        for index in chosen:
            label = tuple(labels[index])
            at = torch.tensor([prefixes.index(label[:k]) for k in range(1, len(label))], device=device)
            scores[:, index] += said[:, at, torch.tensor(label[1:], device=device)].sum(1)
    return scores


def _branches(module: Any, cache: Any) -> bool:
    """Whether this model's attention takes a mask that is no sequence's: without windows, and from such a kernel."""
    return module.config._attn_implementation in ("sdpa", "eager") and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def _parts(labels: Sequence[Sequence[int]], most: int) -> list[tuple[list[Prefix], list[int]]]:
    """The labels in parts of at most so many tokens, or of one label each: the beginnings that a part is made of, each
    after the one that it continues, and whose they are. The last token of a label has nothing to say."""
    parts: list[tuple[list[Prefix], list[int]]] = []
    longer = [i for i, label in enumerate(labels) if len(label) > 1]
    for index in sorted(longer, key=lambda i: tuple(labels[i])):  # so that neighbours share the most
        prefixes = [tuple(labels[index][:k]) for k in range(1, len(labels[index]))]
        further = [p for p in prefixes if not parts or p not in parts[-1][0]]
        if parts and len(parts[-1][0]) + len(further) <= most:
            parts[-1][0].extend(further)
            parts[-1][1].append(index)
        else:
            parts.append((prefixes, [index]))
    return parts


def _after(module: Any, batch: PromptBatch, cache: Any, prefixes: Sequence[Prefix]) -> torch.Tensor:
    """log p of every token after each of these beginnings of labels, [prompts, beginnings, tokens]."""
    device, rows = batch.input_ids.device, len(batch.input_ids)
    ids = torch.tensor([prefix[-1] for prefix in prefixes], device=device).expand(rows, -1)
    depths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    sees = torch.tensor([[mine[: len(other)] == other for other in prefixes] for mine in prefixes], device=device)
    mask = torch.cat([batch.attention_mask, torch.ones_like(ids)], 1)
    if len(prefixes[-1]) < len(prefixes):  # else each continues the one before, and the model makes the mask
        prompt = batch.attention_mask.bool()[:, None].expand(-1, len(prefixes), -1)
        mask = torch.cat([prompt, sees.expand(rows, -1, -1)], 2)[:, None]
        if module.config._attn_implementation == "eager":  # adds it
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min).to(cache.layers[0].keys.dtype)
    logits = module(
        input_ids=ids,
        attention_mask=mask,
        position_ids=batch.position_ids[:, -1:] + depths,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits.float().log_softmax(-1)


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
        if not comm.any_rank(not bool(ended.all())):
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
    numbers = range(comm.rank(), -(-blocks // comm.world()) * comm.world(), comm.world())
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
