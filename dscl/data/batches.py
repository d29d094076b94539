"""Which samples make which step, and how a micro-batch of them becomes tensors.

Everything in `Schedule` is arithmetic on lengths and the seed: every rank computes the same plan and asks nobody, and a
position in the stream is a step number, so that resuming costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

IGNORE = -100
MULTIPLE = 8  # of tokens in a row, for the kernels
Row = list[int]
Span = tuple[int, int, int]  # row, first token, end


class Pairs(Protocol):
    """What `collate` needs of an encoded split."""

    def __getitem__(self, index: int, /) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Step:
    """One optimizer step: the ids of its samples over all ranks, and their tokens."""

    samples: tuple[int, ...]
    targets: int  # target tokens
    tokens: int  # all tokens
    pairs: int  # of a token with itself or one before it in its sample
    epoch: float  # how many epochs are done when this step is


class Schedule:
    """The plan of one task's training. An epoch never shares a step with the next, so its last step may be smaller."""

    def __init__(
        self,
        prompt_lengths: np.ndarray,
        answer_lengths: np.ndarray,
        *,
        seed: int,
        epochs: int,
        global_batch: int,
        micro_batch: int,
        world: int,
        max_length: int,
        packing: bool,
    ) -> None:
        assert len(prompt_lengths) == len(answer_lengths) > 0
        assert min(epochs, global_batch, micro_batch, world) >= 1
        self._lengths = prompt_lengths + answer_lengths
        self._targets = answer_lengths
        assert int(self._lengths.max()) <= max_length
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._world = world
        self._max_length = max_length
        self._packing = packing
        self.steps_per_epoch = -(-len(self._lengths) // global_batch)
        self.steps = epochs * self.steps_per_epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def step(self, number: int) -> Step:
        """Step `number`, counted from 0, in any order and without going through those before it."""
        assert 0 <= number < self.steps
        epoch, place = divmod(number, self.steps_per_epoch)
        ids = self._permutation(epoch)[place * self._global_batch : (place + 1) * self._global_batch]
        # Longest first: dealt out in turn, every rank gets like lengths, and rows of like length meet in a micro-batch.
        ids = ids[np.argsort(-self._lengths[ids], kind="stable")]
        lengths = self._lengths[ids].astype(np.int64)
        return Step(
            samples=tuple(map(int, ids)),
            targets=int(self._targets[ids].sum()),
            tokens=int(lengths.sum()),
            pairs=int((lengths * (lengths + 1) // 2).sum()),
            epoch=(number + 1) / self.steps_per_epoch,
        )

    def micro_batches(self, number: int, rank: int) -> list[list[Row]]:
        """The micro-batches of one rank: lists of rows, which are lists of sample ids.

        Every rank gets equally many, since each costs collective operations; one that has fewer gets empty ones.
        """
        assert 0 <= rank < self._world
        return self._shared_out(self.step(number).samples, rank)

    def groups(self, samples: int, size: int, rank: int) -> list[list[list[Row]]]:
        """The first epoch's first samples in groups of `size`, the same ones whatever the ranks; each group as the
        micro-batches of one rank."""
        chosen = self._first(samples)
        return [self._shared_out(chosen[i : i + size], rank) for i in range(0, len(chosen), size)]

    def length(self, sample: int) -> int:
        """Tokens of a sample."""
        return int(self._lengths[sample])

    def tokens(self, samples: int) -> int:
        """Of those samples."""
        return int(self._lengths[self._first(samples)].sum())

    def _first(self, samples: int) -> list[int]:
        steps = range(min(self.steps_per_epoch, -(-samples // self._global_batch)))
        return [sample for number in steps for sample in self.step(number).samples][:samples]

    def _shared_out(self, samples: Sequence[int], rank: int) -> list[list[Row]]:
        shares = [self._rows(samples[r :: self._world]) for r in range(self._world)]
        count = max(-(-len(rows) // self._micro_batch) for rows in shares)
        size = self._micro_batch
        return [shares[rank][i * size : (i + 1) * size] for i in range(count)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, generator.permutation(len(self._lengths)))
        return self._order[1]

    def _rows(self, samples: Sequence[int]) -> list[Row]:
        if not self._packing:
            return [[sample] for sample in samples]
        return first_fit(samples, [int(self._lengths[sample]) for sample in samples], self._max_length)


def first_fit(samples: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Row]:
    """Rows of at most `capacity` tokens: each sample, longest first, goes into the first row that has room for it."""
    rows: list[Row] = []
    room: list[int] = []
    for place in sorted(range(len(samples)), key=lambda i: -lengths[i]):
        fits = next((r for r, free in enumerate(room) if free >= lengths[place]), None)
        if fits is None:
            rows.append([])
            room.append(capacity)
            fits = len(rows) - 1
        rows[fits].append(samples[place])
        room[fits] -= lengths[place]
    return rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Its summed loss is

        logits = model(input_ids=..., attention_mask=..., position_ids=..., use_cache=False).logits
        cross_entropy(logits.flatten(0, 1)[places].float(), labels, ignore_index=-100, reduction="sum")

    `use_cache=False` is needed for more than memory: with a cache, transformers lets the samples of a packed row see
    each other. `places` are the tokens, counted row after row, whose next one is a target, and `labels` are these
    targets, sample by sample; where there is none, one place stands with -100. `prompts` says where each sample's
    prompt stands, without the token that every prompt begins with; `first` is true where the task's samples are seen
    for the first time.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor
    samples: list[int]
    prompts: list[Span]
    first: bool = False

    def to(self, device: torch.device | str) -> Batch:
        mask = self.attention_mask
        return replace(
            self,
            input_ids=_moved(self.input_ids, device),
            attention_mask=None if mask is None else _moved(mask, device),
            position_ids=_moved(self.position_ids, device),
            places=_moved(self.places, device),
            labels=_moved(self.labels, device),
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to answer, padded on the left; `prompts` as in `Batch`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    prompts: list[Span]

    def to(self, device: torch.device | str) -> PromptBatch:
        return replace(
            self,
            input_ids=_moved(self.input_ids, device),
            attention_mask=_moved(self.attention_mask, device),
            position_ids=_moved(self.position_ids, device),
        )


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On the device; a GPU fetches it by itself, from pinned memory, and nobody waits."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(
    rows: Sequence[Row], encoded: Pairs, pad_id: int, packing: bool, bos_id: int | None = None, first: bool = False
) -> Batch:
    """The tensors of one micro-batch; without rows, a filler: one token, no target.

    Not packed, rows are padded on the left. Packed, a row holds its samples one after the other; positions start at 0
    in each of them, which without an attention mask is what keeps attention inside a sample; the padding at the end
    counts as one more such sample.
    """
    if not rows:
        return _tensors([[pad_id]], [[0]], [[IGNORE]], pad_id, packing, [], [])
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    targets: list[list[int]] = []
    prompts: list[Span] = []
    for number, row in enumerate(rows):
        row_ids: list[int] = []
        row_positions: list[int] = []
        row_targets: list[int] = []
        for sample in row:
            prompt, answer = encoded[sample]
            start = len(row_ids)
            prompts.append((number, start + _begins(prompt, bos_id), start + len(prompt)))
            row_ids += [*prompt, *answer]
            row_positions += range(len(prompt) + len(answer))
            row_targets += [IGNORE] * (len(prompt) - 1) + [*answer, IGNORE]  # at each token, the one after it
        ids.append(row_ids)
        positions.append(row_positions)
        targets.append(row_targets)
    samples = [sample for row in rows for sample in row]
    return replace(_tensors(ids, positions, targets, pad_id, packing, samples, prompts), first=first)


def prompt_batch(prompts: Sequence[Sequence[int]], pad_id: int, bos_id: int | None = None) -> PromptBatch:
    """A batch of prompts to answer: padded on the left only as far as the longest needs."""
    width = max(map(len, prompts))
    return PromptBatch(
        input_ids=_padded(prompts, width, pad_id, left=True),
        attention_mask=_padded([[1] * len(prompt) for prompt in prompts], width, 0, left=True),
        position_ids=_padded([range(len(prompt)) for prompt in prompts], width, 0, left=True),
        prompts=[(row, width - len(p) + _begins(p, bos_id), width) for row, p in enumerate(prompts)],
    )


def _begins(prompt: Sequence[int], bos_id: int | None) -> int:
    """Where a prompt's own tokens begin: after the one that stands before every text, unless that is all there is."""
    return int(len(prompt) > 1 and prompt[0] == bos_id)


def _tensors(
    ids: list[list[int]],
    positions: list[list[int]],
    targets: list[list[int]],
    pad_id: int,
    packing: bool,
    samples: list[int],
    prompts: list[Span],
) -> Batch:
    width = -(-max(map(len, ids)) // MULTIPLE) * MULTIPLE
    if packing:
        positions = [row + list(range(width - len(row))) for row in positions]
    else:  # the padding comes before what a row holds
        prompts = [(row, width - len(ids[row]) + a, width - len(ids[row]) + b) for row, a, b in prompts]
    labels = _padded(targets, width, IGNORE, left=not packing).flatten()
    places = (labels != IGNORE).nonzero().flatten()
    if len(places) == 0:
        places = torch.tensor([width - 1])
    return Batch(
        input_ids=_padded(ids, width, pad_id, left=not packing),
        attention_mask=None if packing else _padded([[1] * len(row) for row in ids], width, 0, left=True),
        position_ids=_padded(positions, width, 0, left=not packing),
        places=places,
        labels=labels[places],
        samples=samples,
        prompts=prompts,
    )


def _padded(rows: Sequence[Sequence[int]], width: int, value: int, left: bool) -> torch.Tensor:
    result = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        result[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.int64)
    return result
