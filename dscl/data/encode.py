"""Tokenization: samples become token ids, truncated to `max_length` and cached on disk under a hash of their content.

Prompt and answer are tokenized separately, so that the loss covers exactly the answer's tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dscl.data.task import Sample
from dscl.utils.cache import build_folder_once
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
CACHE_VERSION = 2  # raise it when this file encodes samples differently: old cache entries are then ignored
CHUNK_SIZE = 1000  # samples tokenized at once
TOKENS_FILE, LENGTHS_FILE, TRUNCATED_FILE = "tokens.npy", "lengths.npy", "cut.npy"  # the files of a cache entry
TokenizedSample = tuple[list[int], list[int]]  # prompt ids, answer ids


class EncodedDataset:
    """A tokenized split, memory-mapped: `dataset[i]` is (prompt ids, answer ids).

    An answer's ids end with the end-of-sequence token. The loss is computed over answer ids only. The lengths are kept
    in memory. `num_truncated` counts the prompts that were truncated.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, num_truncated: int) -> None:
        self._tokens = tokens  # int32 [tokens]: each sample's prompt, then its answer
        self.prompt_lengths, self.answer_lengths = np.ascontiguousarray(lengths.T)  # lengths: int64 [samples, 2]
        self._ends = np.cumsum(lengths)  # [2 · samples]
        self.num_truncated = num_truncated

    @classmethod
    def read(cls, folder: Path) -> EncodedDataset:
        """Open a cache entry."""
        num_truncated = int(np.load(folder / TRUNCATED_FILE).sum())
        return cls(np.load(folder / TOKENS_FILE, mmap_mode="r"), np.load(folder / LENGTHS_FILE), num_truncated)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> TokenizedSample:
        start = int(self._ends[2 * index - 1]) if index else 0
        middle, stop = map(int, self._ends[2 * index : 2 * index + 2])
        return self._tokens[start:middle].tolist(), self._tokens[middle:stop].tolist()

    @property
    def num_tokens(self) -> int:
        return int(self.prompt_lengths.sum() + self.answer_lengths.sum())


@dataclass(frozen=True)
class EncodedPrompts:
    """The tokenized prompts of an evaluation, and how many of them were truncated."""

    ids: list[list[int]]
    num_truncated: int


def encode_dataset(
    samples: Sequence[Sample], tokenizer: Any, *, max_length: int, cache: Path, answer_budget: int = 1
) -> EncodedDataset:
    """Tokenize a split, or open it from the cache.

    A prompt is truncated to leave `answer_budget` tokens (see `answer_token_budget`), or more if its answer is longer;
    answers are never truncated. With the same `answer_budget`, `encode_prompts` truncates prompts in the same way, so
    that evaluation uses the prompts of training.
    """
    _check_answer_budget(max_length, answer_budget)
    if not samples:
        return EncodedDataset(np.zeros(0, np.int32), np.zeros((0, 2), np.int64), 0)

    def build(folder: Path) -> None:
        chunks = zip(*_chunk_arrays(_tokenize_samples(samples, tokenizer, max_length, answer_budget)), strict=True)
        for name, arrays in zip((TOKENS_FILE, LENGTHS_FILE, TRUNCATED_FILE), chunks, strict=True):
            np.save(folder / name, np.concatenate(arrays))

    folder = build_folder_once(cache, _cache_key(samples, tokenizer, max_length, answer_budget), build)
    return EncodedDataset.read(folder)


def encode_prompts(samples: Sequence[Sample], tokenizer: Any, *, max_length: int, answer_budget: int) -> EncodedPrompts:
    """Tokenize the prompts of samples, each truncated to `max_length - answer_budget` tokens."""
    _check_answer_budget(max_length, answer_budget)
    bos = prepended_bos_id(tokenizer)
    ids, num_truncated = [], 0
    for start in range(0, len(samples), CHUNK_SIZE):
        chunk = samples[start : start + CHUNK_SIZE]
        for sample, prompt in zip(chunk, _tokenize_prompts(chunk, tokenizer, bos), strict=True):
            _check_prompt(sample, prompt)
            ids.append(_truncate_prompt(prompt, max_length - answer_budget, bos))
            num_truncated += len(prompt) > max_length - answer_budget
    return EncodedPrompts(ids, num_truncated)


def encode_answers(answers: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize answers or labels without a BOS token; append the end-of-sequence token to each."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token (eos_token); answers cannot be ended without one")
    if not answers:
        return []
    encoded = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def answer_token_budget(labels: Sequence[str] | None, tokenizer: Any, max_new_tokens: int) -> int:
    """The tokens to reserve for an answer: those of the longest label if there are labels, else `max_new_tokens`."""
    return max(map(len, encode_answers(labels, tokenizer))) if labels else max_new_tokens


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that affects a tokenizer's output, without its path and its current padding settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, prepended_bos_id(tokenizer)]
    text = json.dumps([type(tokenizer).__name__, special, tokenizer.chat_template, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_key(samples: Sequence[Sample], tokenizer: Any, max_length: int, answer_budget: int) -> str:
    digest = hashlib.sha256(
        json.dumps([CACHE_VERSION, tokenizer_fingerprint(tokenizer), max_length, answer_budget]).encode()
    )
    for sample in samples:
        messages = None if sample.messages is None else [dict(message) for message in sample.messages]
        digest.update(json.dumps([sample.prompt, sample.answer, messages]).encode())
    return digest.hexdigest()


def _tokenize_samples(
    samples: Sequence[Sample], tokenizer: Any, max_length: int, answer_budget: int
) -> Iterator[tuple[TokenizedSample, bool]]:
    """Yield ((prompt ids, answer ids), whether the prompt was truncated) for each sample."""
    bos = prepended_bos_id(tokenizer)
    for start in range(0, len(samples), CHUNK_SIZE):
        chunk = samples[start : start + CHUNK_SIZE]
        prompts = _tokenize_prompts(chunk, tokenizer, bos)
        answers = encode_answers([sample.answer for sample in chunk], tokenizer)
        for sample, prompt, answer in zip(chunk, prompts, answers, strict=True):
            _check_prompt(sample, prompt)
            if len(answer) > max_length - 1:
                raise UserError(
                    f"{sample.source}: the answer takes {len(answer)} tokens and max_length is {max_length}; "
                    f"give train.max_length={len(answer) + 1} or more, or shorten the answer"
                )
            max_tokens = max_length - max(answer_budget, len(answer))
            yield (_truncate_prompt(prompt, max_tokens, bos), answer), len(prompt) > max_tokens


def _tokenize_prompts(samples: Sequence[Sample], tokenizer: Any, bos: int | None) -> list[list[int]]:
    texts = [
        sample.prompt if sample.messages is None else _apply_chat_template(sample, tokenizer) for sample in samples
    ]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A chat template writes the BOS token itself if the model uses one.
    prefix = [] if bos is None else [bos]
    return [ids if sample.messages is not None else prefix + ids for sample, ids in zip(samples, encoded, strict=True)]


def _apply_chat_template(sample: Sample, tokenizer: Any) -> str:
    assert sample.messages is not None
    if tokenizer.chat_template is None:
        raise UserError(
            f"{sample.source}: a chat sample, and the tokenizer has no chat template; "
            "use the tokenizer of a chat model, or prompt and answer without chat"
        )
    messages = [dict(message) for message in sample.messages[:-1]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # chat templates raise various errors, for example about the order of roles
        raise UserError(f"{sample.source}: the tokenizer's chat template refuses the messages ({error})") from None


def _truncate_prompt(prompt: list[int], max_tokens: int, bos: int | None) -> list[int]:
    """Keep the last tokens of a prompt, where the question stands, and its BOS token: `max_tokens` tokens in all."""
    if len(prompt) <= max_tokens:
        return prompt
    if prompt[0] == bos and max_tokens > 1:
        return [prompt[0], *prompt[len(prompt) - max_tokens + 1 :]]
    return prompt[len(prompt) - max_tokens :]


def prepended_bos_id(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer puts it before a text, else None (some tokenizers define a BOS and never add it)."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def _check_prompt(sample: Sample, prompt: list[int]) -> None:
    if not prompt:
        raise UserError(
            f"{sample.source}: the prompt is empty and the tokenizer puts no token before a text, "
            "so nothing is there to predict from; give the task a template or correct the record"
        )


def _check_answer_budget(max_length: int, answer_budget: int) -> None:
    if answer_budget >= max_length:
        raise UserError(
            f"max_length {max_length} leaves no room for a prompt beside an answer of {answer_budget} tokens "
            "(the longest label, or evaluate.max_new_tokens); raise train.max_length"
        )


def _chunk_arrays(
    samples: Iterator[tuple[TokenizedSample, bool]],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (tokens, lengths, truncated) arrays chunk by chunk; Python integers would take many times the memory."""
    while chunk := list(islice(samples, CHUNK_SIZE)):
        tokens = [token for (prompt, answer), _ in chunk for token in (*prompt, *answer)]
        lengths = [(len(prompt), len(answer)) for (prompt, answer), _ in chunk]
        truncated_flags = np.array([truncated for _, truncated in chunk])
        yield np.array(tokens, np.int32), np.array(lengths, np.int64), truncated_flags
