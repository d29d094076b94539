"""Samples as token ids: prompt and answer apart, fitted into `max_length`, cached on disk by their content."""

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
from dscl.utils.cache import folder_made_once
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")
VERSION = 2  # of what this file makes of a sample; a change of it makes all caches new
CHUNK = 1000
TOKENS, LENGTHS, CUT = "tokens.npy", "lengths.npy", "cut.npy"  # the files of an encoded split
Pair = tuple[list[int], list[int]]


class Encoded:
    """An encoded split, memory-mapped: `split[i]` is (prompt ids, answer ids), lengths are at hand without reading.

    The answer's ids end with the end-of-sequence token; they are the targets, and nothing else is. `cut` counts the
    prompts that lost tokens.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, cut: int) -> None:
        self._tokens = tokens  # int32 [tokens]: each sample's prompt, then its answer
        self.prompt_lengths, self.answer_lengths = np.ascontiguousarray(lengths.T)  # lengths: int64 [samples, 2]
        self._ends = np.cumsum(lengths)  # [2 · samples]
        self.cut = cut

    @classmethod
    def read(cls, folder: Path) -> Encoded:
        cut = int(np.load(folder / CUT).sum())
        return cls(np.load(folder / TOKENS, mmap_mode="r"), np.load(folder / LENGTHS), cut)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> Pair:
        start = int(self._ends[2 * index - 1]) if index else 0
        middle, stop = map(int, self._ends[2 * index : 2 * index + 2])
        return self._tokens[start:middle].tolist(), self._tokens[middle:stop].tolist()

    @property
    def tokens(self) -> int:
        return int(self.prompt_lengths.sum() + self.answer_lengths.sum())


@dataclass(frozen=True)
class Prompts:
    """Prompts to evaluate with, and how many of them were cut."""

    ids: list[list[int]]
    cut: int


def encode(samples: Sequence[Sample], tokenizer: Any, *, max_length: int, cache: Path, room: int = 1) -> Encoded:
    """Encode a split, or find it in the cache.

    `room` is what a prompt leaves free for its answer (see `answer_room`); an answer that is longer takes more, and is
    itself never cut. With the same room, `encode_prompts` gives evaluation the very prompts of training.
    """
    _check_room(max_length, room)
    if not samples:
        return Encoded(np.zeros(0, np.int32), np.zeros((0, 2), np.int64), 0)

    def build(folder: Path) -> None:
        chunks = zip(*_arrays(_pairs(samples, tokenizer, max_length, room)), strict=True)
        for name, arrays in zip((TOKENS, LENGTHS, CUT), chunks, strict=True):
            np.save(folder / name, np.concatenate(arrays))

    folder = folder_made_once(cache, _digest(samples, tokenizer, max_length, room), build)
    return Encoded.read(folder)


def encode_prompts(samples: Sequence[Sample], tokenizer: Any, *, max_length: int, room: int) -> Prompts:
    """The prompts alone, each cut to what `max_length` leaves beside `room` tokens of answer."""
    _check_room(max_length, room)
    bos = bos_id(tokenizer)
    ids, cut = [], 0
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, prompt in zip(chunk, _prompt_ids(chunk, tokenizer, bos), strict=True):
            _check_prompt(sample, prompt)
            ids.append(_fit(prompt, max_length - room, bos))
            cut += len(prompt) > max_length - room
    return Prompts(ids, cut)


def encode_answers(answers: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Answers or labels as they stand behind a prompt, each with its end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token (eos_token); answers cannot be ended without one")
    if not answers:
        return []
    encoded = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def answer_room(labels: Sequence[str] | None, tokenizer: Any, max_new_tokens: int) -> int:
    """The tokens to keep free for an answer: the longest label where there is a label set, else `max_new_tokens`."""
    return max(map(len, encode_answers(labels, tokenizer))) if labels else max_new_tokens


def fingerprint(tokenizer: Any) -> str:
    """A hash of what decides a tokenizer's output; its path, or the padding it was last used with, do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, bos_id(tokenizer)]
    text = json.dumps([type(tokenizer).__name__, special, tokenizer.chat_template, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(samples: Sequence[Sample], tokenizer: Any, max_length: int, room: int) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, fingerprint(tokenizer), max_length, room]).encode())
    for sample in samples:
        messages = None if sample.messages is None else [dict(message) for message in sample.messages]
        digest.update(json.dumps([sample.prompt, sample.answer, messages]).encode())
    return digest.hexdigest()


def _pairs(samples: Sequence[Sample], tokenizer: Any, max_length: int, room: int) -> Iterator[tuple[Pair, bool]]:
    """((prompt ids, answer ids), whether the prompt was cut) for each sample."""
    bos = bos_id(tokenizer)
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        prompts = _prompt_ids(chunk, tokenizer, bos)
        answers = encode_answers([sample.answer for sample in chunk], tokenizer)
        for sample, prompt, answer in zip(chunk, prompts, answers, strict=True):
            _check_prompt(sample, prompt)
            if len(answer) > max_length - 1:
                raise UserError(
                    f"{sample.source}: the answer takes {len(answer)} tokens and max_length is {max_length}; "
                    f"give train.max_length={len(answer) + 1} or more, or shorten the answer"
                )
            limit = max_length - max(room, len(answer))
            yield (_fit(prompt, limit, bos), answer), len(prompt) > limit


def _prompt_ids(samples: Sequence[Sample], tokenizer: Any, bos: int | None) -> list[list[int]]:
    texts = [sample.prompt if sample.messages is None else _chat_prompt(sample, tokenizer) for sample in samples]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A chat template writes the first token itself, where it wants one.
    start = [] if bos is None else [bos]
    return [ids if sample.messages is not None else start + ids for sample, ids in zip(samples, encoded, strict=True)]


def _chat_prompt(sample: Sample, tokenizer: Any) -> str:
    assert sample.messages is not None
    if tokenizer.chat_template is None:
        raise UserError(
            f"{sample.source}: a chat sample, and the tokenizer has no chat template; "
            "use the tokenizer of a chat model, or prompt and answer without chat"
        )
    messages = [dict(message) for message in sample.messages[:-1]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise errors of their own, for example about the order of roles
        raise UserError(f"{sample.source}: the tokenizer's chat template refuses the messages ({error})") from None


def _fit(prompt: list[int], limit: int, bos: int | None) -> list[int]:
    """The prompt in at most `limit` tokens: its beginning goes, since question and answer cue stand at the end."""
    if len(prompt) <= limit:
        return prompt
    if prompt[0] == bos and limit > 1:
        return [prompt[0], *prompt[len(prompt) - limit + 1 :]]
    return prompt[len(prompt) - limit :]


def bos_id(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before a text, if it does (to have a bos token is not to use it)."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def _check_prompt(sample: Sample, prompt: list[int]) -> None:
    if not prompt:
        raise UserError(
            f"{sample.source}: the prompt is empty and the tokenizer puts no token before a text, "
            "so nothing is there to predict from; give the task a template or correct the record"
        )


def _check_room(max_length: int, room: int) -> None:
    if room >= max_length:
        raise UserError(
            f"max_length {max_length} leaves no room for a prompt beside an answer of {room} tokens "
            "(the longest label, or evaluate.max_new_tokens); raise train.max_length"
        )


def _arrays(pairs: Iterator[tuple[Pair, bool]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, lengths, cut) of one chunk after the other: Python integers would take many times the memory."""
    while chunk := list(islice(pairs, CHUNK)):
        tokens = [token for (prompt, answer), _ in chunk for token in (*prompt, *answer)]
        lengths = [(len(prompt), len(answer)) for (prompt, answer), _ in chunk]
        yield np.array(tokens, np.int32), np.array(lengths, np.int64), np.array([cut for _, cut in chunk])
