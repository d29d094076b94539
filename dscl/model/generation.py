"""Inference for a batch of prompts (label log-probabilities, greedy generation), and sampling of texts.

Every rank runs the same number of forward passes, because under ZeRO-3 a forward pass is a collective operation. With
a single process this is plain decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicLayer

from dscl.data.batches import PromptBatch
from dscl.distributed import comm

TextBlock = tuple[torch.Tensor, int]  # token ids [rows, length], and how many of the first rows count
TEXTS_PER_BLOCK = 32  # texts sampled in one batch
MAX_TREE_TOKENS = 32  # label tokens processed at once for each prompt; each needs its own logits
Prefix = tuple[int, ...]  # the first tokens of a label


def label_log_probs(module: Any, batch: PromptBatch, labels: Sequence[Sequence[int]]) -> torch.Tensor:
    """log p(label | prompt), [prompts, labels]. Each prompt passes through the model once for all labels.

    Then the labels are processed as a prefix tree behind each prompt: a token attends to the prompt and to the earlier
    tokens of its own label, so a prefix that labels share is computed once. A large tree is processed in parts; their
    number is the same on every rank.
    """
    prompt_output = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    device, cache = batch.input_ids.device, prompt_output.past_key_values
    first_tokens = torch.tensor([label[0] for label in labels], device=device)
    scores = prompt_output.logits[:, -1].float().log_softmax(-1)[:, first_tokens]
    label_parts = _split_labels(labels, MAX_TREE_TOKENS if _supports_tree_mask(module, cache) else 0)
    for part_number, (prefixes, label_ids) in enumerate(label_parts):
        part_cache = cache if part_number + 1 == len(label_parts) else copy.deepcopy(cache)  # a pass changes the cache
        log_probs = _prefix_log_probs(module, batch, part_cache, prefixes)
        for index in label_ids:
            label = tuple(labels[index])
            prefix_ids = torch.tensor([prefixes.index(label[:k]) for k in range(1, len(label))], device=device)
            scores[:, index] += log_probs[:, prefix_ids, torch.tensor(label[1:], device=device)].sum(1)
    return scores


def _supports_tree_mask(module: Any, cache: Any) -> bool:
    """Whether the model's attention accepts an arbitrary mask: an sdpa or eager kernel, without sliding windows."""
    return module.config._attn_implementation in ("sdpa", "eager") and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def _split_labels(labels: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[list[Prefix], list[int]]]:
    """Split the labels into parts with at most `max_tokens` tree nodes, or with one label each.

    A part holds the prefixes that are its tree nodes, each after the prefix that it continues, and the indices of its
    labels. The whole label is no node, because nothing follows its last token.
    """
    label_parts: list[tuple[list[Prefix], list[int]]] = []
    multi_token = [i for i, label in enumerate(labels) if len(label) > 1]
    for index in sorted(multi_token, key=lambda i: tuple(labels[i])):  # sorted, so that neighbours share prefixes
        prefixes = [tuple(labels[index][:k]) for k in range(1, len(labels[index]))]
        new_prefixes = [p for p in prefixes if not label_parts or p not in label_parts[-1][0]]
        if label_parts and len(label_parts[-1][0]) + len(new_prefixes) <= max_tokens:
            label_parts[-1][0].extend(new_prefixes)
            label_parts[-1][1].append(index)
        else:
            label_parts.append((prefixes, [index]))
    return label_parts


def _prefix_log_probs(module: Any, batch: PromptBatch, cache: Any, prefixes: Sequence[Prefix]) -> torch.Tensor:
    """log p of the next token after each label prefix, [prompts, prefixes, vocabulary]."""
    device, rows = batch.input_ids.device, len(batch.input_ids)
    ids = torch.tensor([prefix[-1] for prefix in prefixes], device=device).expand(rows, -1)
    depths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    tree_mask = torch.tensor(
        [[prefix[: len(other)] == other for other in prefixes] for prefix in prefixes], device=device
    )
    mask = torch.cat([batch.attention_mask, torch.ones_like(ids)], 1)
    if len(prefixes[-1]) < len(prefixes):  # otherwise the tree is a single chain, for which the causal mask is right
        prompt = batch.attention_mask.bool()[:, None].expand(-1, len(prefixes), -1)
        mask = torch.cat([prompt, tree_mask.expand(rows, -1, -1)], 2)[:, None]
        if module.config._attn_implementation == "eager":  # eager attention adds the mask to the scores
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
    """Greedy continuations of the prompts, without the end-of-sequence token. Stops when all ranks' rows have ended."""
    ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
    cache = None
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    step_tokens = []
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
        next_ids = out.logits[:, -1].argmax(-1).masked_fill(finished, pad)
        finished = finished | (next_ids == eos)
        step_tokens.append(next_ids.masked_fill(finished, eos))
        if not comm.any_rank_true(not bool(finished.all())):
            break
        ids, positions = next_ids[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    rows = torch.stack(step_tokens, 1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def sample_texts(
    module: Any,
    num_texts: int,
    length: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[TextBlock]:
    """This rank's share of `num_texts` texts sampled from the model at temperature 1, in blocks.

    A block's random numbers depend on its index only, so the texts do not depend on the number of ranks. All ranks
    sample the same number of blocks of the same size; rows beyond `num_texts` do not count (see `TextBlock`).
    """
    config = module.config
    start_token = next(token for token in (config.bos_token_id, config.eos_token_id, 0) if token is not None)
    num_blocks = -(-num_texts // TEXTS_PER_BLOCK)
    text_blocks: list[TextBlock] = []
    block_numbers = range(comm.rank(), -(-num_blocks // comm.world_size()) * comm.world_size(), comm.world_size())
    for block_number in block_numbers:
        generator = torch.Generator().manual_seed(hash((seed, block_number)) % 2**63)
        ids = torch.full((TEXTS_PER_BLOCK, 1), start_token, device=device)
        cache, rows = None, [ids]
        for token in range(1, length):
            on_progress(len(text_blocks) * length + token, len(block_numbers) * length)
            out = module(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            # Gumbel-max: the argmax of log p + Gumbel noise is a sample from p.
            noise = torch.rand(out.logits[:, -1].shape, generator=generator, dtype=torch.float64).log_().neg_().log_()
            ids = (out.logits[:, -1].double() - noise.to(device)).argmax(-1, keepdim=True)
            rows.append(ids)
        text_blocks.append(
            (torch.cat(rows, 1), min(TEXTS_PER_BLOCK, max(0, num_texts - block_number * TEXTS_PER_BLOCK)))
        )
    return text_blocks
