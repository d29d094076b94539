"""The batch sampler, which assigns samples to optimizer steps, and the collate functions, which build the tensors.

`BatchSampler` needs only the samples' lengths and the seed. Every rank computes the same plan without communication,
and any step can be computed directly from its number, so resuming a run costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

IGNORE_INDEX = -100
PAD_MULTIPLE = 8  # rows are padded to a multiple of this many tokens, for the kernels
SampleRow = list[int]  # ids of the samples that share one row of `input_ids`
PromptSpan = tuple[int, int, int]  # (row, first token, end): the tokens of one prompt in a batch


class SampleLookup(Protocol):
    """Maps a sample id to its (prompt ids, answer ids)."""

    def __getitem__(self, index: int, /) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class StepPlan:
    """The samples of one optimizer step, over all ranks, and their token counts."""

    sample_ids: tuple[int, ...]
    num_targets: int  # answer tokens, over which the loss is computed
    num_tokens: int  # prompt and answer tokens
    attention_pairs: int  # (query, key) pairs of causal attention: n (n + 1) / 2 for a sample of n tokens
    epoch: float  # epochs completed at the end of this step


class BatchSampler:
    """Assigns the samples of one task to optimizer steps, ranks and micro-batches.

    No step mixes two epochs, so the last step of an epoch may be smaller.
    """

    def __init__(
        self,
        prompt_lengths: np.ndarray,
        answer_lengths: np.ndarray,
        *,
        seed: int,
        epochs: int,
        global_batch: int,
        micro_batch: int,
        world_size: int,
        max_length: int,
        packing: bool,
    ) -> None:
        assert len(prompt_lengths) == len(answer_lengths) > 0
        assert min(epochs, global_batch, micro_batch, world_size) >= 1
        self._lengths = prompt_lengths + answer_lengths
        self._answer_lengths = answer_lengths
        assert int(self._lengths.max()) <= max_length
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._world_size = world_size
        self._max_length = max_length
        self._packing = packing
        self.steps_per_epoch = -(-len(self._lengths) // global_batch)
        self.num_steps = epochs * self.steps_per_epoch
        self._cached_permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def step_plan(self, step: int) -> StepPlan:
        """The plan of one optimizer step, counted from 0. Steps can be asked for in any order."""
        assert 0 <= step < self.num_steps
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self._global_batch
        ids = self._epoch_permutation(epoch)[start : start + self._global_batch]
        # Longest first: samples are dealt to the ranks in turn, so that all ranks get similar lengths, and the rows of
        # a micro-batch have similar lengths too.
        ids = ids[np.argsort(-self._lengths[ids], kind="stable")]
        lengths = self._lengths[ids].astype(np.int64)
        return StepPlan(
            sample_ids=tuple(map(int, ids)),
            num_targets=int(self._answer_lengths[ids].sum()),
            num_tokens=int(lengths.sum()),
            attention_pairs=int((lengths * (lengths + 1) // 2).sum()),
            epoch=(step + 1) / self.steps_per_epoch,
        )

    def micro_batches(self, step: int, rank: int) -> list[list[SampleRow]]:
        """The micro-batches of one rank for one step; each micro-batch is a list of rows of sample ids.

        Every micro-batch runs collective operations, so all ranks must have equally many. A rank with fewer samples
        gets empty micro-batches at the end.
        """
        assert 0 <= rank < self._world_size
        return self._distribute_samples(self.step_plan(step).sample_ids, rank)

    def grouped_micro_batches(self, num_samples: int, group_size: int, rank: int) -> list[list[list[SampleRow]]]:
        """The first `num_samples` samples of the first epoch in groups of `group_size`.

        Each group is returned as the micro-batches of one rank. The groups do not depend on the number of ranks.
        """
        samples = self._first_epoch_samples(num_samples)
        groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
        return [self._distribute_samples(group, rank) for group in groups]

    def sample_length(self, sample: int) -> int:
        """The prompt and answer tokens of one sample."""
        return int(self._lengths[sample])

    def count_tokens(self, num_samples: int) -> int:
        """The tokens of the first `num_samples` samples of the first epoch."""
        return int(self._lengths[self._first_epoch_samples(num_samples)].sum())

    def _first_epoch_samples(self, num_samples: int) -> list[int]:
        steps = range(min(self.steps_per_epoch, -(-num_samples // self._global_batch)))
        return [sample for step in steps for sample in self.step_plan(step).sample_ids][:num_samples]

    def _distribute_samples(self, samples: Sequence[int], rank: int) -> list[list[SampleRow]]:
        """Deal samples to the ranks in turn; return the micro-batches of this rank."""
        rows_per_rank = [self._pack_rows(samples[r :: self._world_size]) for r in range(self._world_size)]
        num_micro_batches = max(-(-len(rows) // self._micro_batch) for rows in rows_per_rank)
        size = self._micro_batch
        return [rows_per_rank[rank][i * size : (i + 1) * size] for i in range(num_micro_batches)]

    def _epoch_permutation(self, epoch: int) -> np.ndarray:
        if self._cached_permutation[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._cached_permutation = (epoch, generator.permutation(len(self._lengths)))
        return self._cached_permutation[1]

    def _pack_rows(self, samples: Sequence[int]) -> list[SampleRow]:
        """Rows of one sample each, or with packing as many samples to a row as fit into `max_length`."""
        if not self._packing:
            return [[sample] for sample in samples]
        return first_fit(samples, [int(self._lengths[sample]) for sample in samples], self._max_length)


def first_fit(samples: Sequence[int], lengths: Sequence[int], capacity: int) -> list[SampleRow]:
    """First-fit decreasing packing: each sample, longest first, goes into the first row with enough free tokens."""
    rows: list[SampleRow] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(free_tokens) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            free_tokens.append(capacity)
            row = len(rows) - 1
        rows[row].append(samples[index])
        free_tokens[row] -= lengths[index]
    return rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Its summed loss is

        logits = model(input_ids=..., attention_mask=..., position_ids=..., use_cache=False).logits
        cross_entropy(logits.flatten(0, 1)[loss_positions].float(), labels, ignore_index=-100, reduction="sum")

    `use_cache=False` is required: with a cache, transformers lets the samples of a packed row attend to each other.
    """

    input_ids: torch.Tensor  # [rows, length]
    attention_mask: torch.Tensor | None  # [rows, length]; None for packed rows
    position_ids: torch.Tensor  # [rows, length]
    loss_positions: torch.Tensor  # [targets], indices into the flattened rows: the token before each target
    labels: torch.Tensor  # [targets], sample by sample; a batch without a target has one position, labelled -100
    sample_ids: list[int]
    prompt_spans: list[PromptSpan]  # one per sample, without the BOS token
    first_epoch: bool = False  # whether the samples are seen for the first time

    def to(self, device: torch.device | str) -> Batch:
        mask = self.attention_mask
        return replace(
            self,
            input_ids=_move_to_device(self.input_ids, device),
            attention_mask=None if mask is None else _move_to_device(mask, device),
            position_ids=_move_to_device(self.position_ids, device),
            loss_positions=_move_to_device(self.loss_positions, device),
            labels=_move_to_device(self.labels, device),
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to generate answers for, padded on the left."""

    input_ids: torch.Tensor  # [rows, length]
    attention_mask: torch.Tensor  # [rows, length]
    position_ids: torch.Tensor  # [rows, length]
    prompt_spans: list[PromptSpan]  # as in `Batch`

    def to(self, device: torch.device | str) -> PromptBatch:
        return replace(
            self,
            input_ids=_move_to_device(self.input_ids, device),
            attention_mask=_move_to_device(self.attention_mask, device),
            position_ids=_move_to_device(self.position_ids, device),
        )


def _move_to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to the device. Copies to a GPU start from pinned memory and do not block the host."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(
    rows: Sequence[SampleRow],
    dataset: SampleLookup,
    pad_id: int,
    packing: bool,
    bos_id: int | None = None,
    first_epoch: bool = False,
) -> Batch:
    """Build the tensors of one micro-batch. An empty micro-batch becomes one padding token without a target.

    Without packing, rows are padded on the left. With packing, a row holds its samples one after another and is padded
    on the right. Position ids restart at 0 in each sample and in the padding; without an attention mask, transformers
    takes these restarts as the sample boundaries of attention.
    """
    if not rows:
        return _build_batch([[pad_id]], [[0]], [[IGNORE_INDEX]], pad_id, packing, [], [])
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    targets: list[list[int]] = []
    prompt_spans: list[PromptSpan] = []
    for row_index, row in enumerate(rows):
        row_ids: list[int] = []
        row_positions: list[int] = []
        row_targets: list[int] = []
        for sample in row:
            prompt, answer = dataset[sample]
            start = len(row_ids)
            prompt_spans.append((row_index, start + _bos_length(prompt, bos_id), start + len(prompt)))
            row_ids += [*prompt, *answer]
            row_positions += range(len(prompt) + len(answer))
            row_targets += [IGNORE_INDEX] * (len(prompt) - 1) + [*answer, IGNORE_INDEX]  # shifted: the next token
        ids.append(row_ids)
        positions.append(row_positions)
        targets.append(row_targets)
    sample_ids = [sample for row in rows for sample in row]
    batch = _build_batch(ids, positions, targets, pad_id, packing, sample_ids, prompt_spans)
    return replace(batch, first_epoch=first_epoch)


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int, bos_id: int | None = None) -> PromptBatch:
    """Build a batch of prompts, padded on the left to the length of the longest."""
    width = max(map(len, prompts))
    return PromptBatch(
        input_ids=_pad_rows(prompts, width, pad_id, left=True),
        attention_mask=_pad_rows([[1] * len(prompt) for prompt in prompts], width, 0, left=True),
        position_ids=_pad_rows([range(len(prompt)) for prompt in prompts], width, 0, left=True),
        prompt_spans=[(row, width - len(p) + _bos_length(p, bos_id), width) for row, p in enumerate(prompts)],
    )


def _bos_length(prompt: Sequence[int], bos_id: int | None) -> int:
    """1 if the prompt begins with the BOS token and has other tokens, else 0."""
    return int(len(prompt) > 1 and prompt[0] == bos_id)


def _build_batch(
    ids: list[list[int]],
    positions: list[list[int]],
    targets: list[list[int]],
    pad_id: int,
    packing: bool,
    sample_ids: list[int],
    prompt_spans: list[PromptSpan],
) -> Batch:
    width = -(-max(map(len, ids)) // PAD_MULTIPLE) * PAD_MULTIPLE
    if packing:
        positions = [row + list(range(width - len(row))) for row in positions]
    else:  # rows are padded on the left, which moves the prompts to the right
        paddings = [width - len(row) for row in ids]
        prompt_spans = [(row, paddings[row] + start, paddings[row] + end) for row, start, end in prompt_spans]
    labels = _pad_rows(targets, width, IGNORE_INDEX, left=not packing).flatten()
    loss_positions = (labels != IGNORE_INDEX).nonzero().flatten()
    if len(loss_positions) == 0:
        loss_positions = torch.tensor([width - 1])
    return Batch(
        input_ids=_pad_rows(ids, width, pad_id, left=not packing),
        attention_mask=None if packing else _pad_rows([[1] * len(row) for row in ids], width, 0, left=True),
        position_ids=_pad_rows(positions, width, 0, left=not packing),
        loss_positions=loss_positions,
        labels=labels[loss_positions],
        sample_ids=sample_ids,
        prompt_spans=prompt_spans,
    )


def _pad_rows(rows: Sequence[Sequence[int]], width: int, value: int, left: bool) -> torch.Tensor:
    """[rows, width], each row filled up with `value` on the left or on the right."""
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        padded[i, start : start + len(row)] = torch.tensor(list(row), dtype=torch.int64)
    return padded
