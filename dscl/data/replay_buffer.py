"""Replay buffers: tokenized samples of finished tasks, and the concatenation of several data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dscl.data.encode import TokenizedSample
from dscl.utils.checksummed import read_checksummed, write_checksummed
from dscl.utils.errors import UserError

FILE_KIND, FILE_VERSION = "dscl_samples", 1


class TokenizedDataset(Protocol):
    """Tokenized samples by index, with their lengths: an `EncodedDataset`, a `ReplayBuffer` or a concatenation."""

    @property
    def prompt_lengths(self) -> np.ndarray: ...
    @property
    def answer_lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TokenizedSample: ...


@dataclass(frozen=True)
class ReplayBuffer:
    """Samples of one finished task, kept in memory and written to a file for restarts."""

    task: str
    samples: tuple[TokenizedSample, ...]

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt, _ in self.samples], np.int64)

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        return np.array([len(answer) for _, answer in self.samples], np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TokenizedSample:
        return self.samples[index]

    @property
    def num_bytes(self) -> int:
        """The size of the samples in a file, in bytes."""
        return int(4 * (self.prompt_lengths.sum() + self.answer_lengths.sum()) + 8 * len(self))

    def write(self, path: Path) -> None:
        """Write the samples to a checksummed safetensors file."""
        tokens = [token for prompt, answer in self.samples for token in (*prompt, *answer)]
        lengths = np.stack([self.prompt_lengths, self.answer_lengths], 1).astype(np.int32)
        tensors = {"tokens": torch.tensor(tokens, dtype=torch.int32), "lengths": torch.from_numpy(lengths)}
        write_checksummed(path, FILE_KIND, FILE_VERSION, {"task": self.task}, tensors)

    @classmethod
    def read(cls, path: Path, task: str) -> ReplayBuffer:
        """Read the samples of a task from a file, after checking that they are of this task."""
        header, tensors = read_checksummed(path, FILE_KIND, FILE_VERSION, "the samples that a task left")
        if header["task"] != task:
            raise UserError(f"{path}: samples of task {header['task']!r}, here {task!r} is needed; copy it again")
        tokens, ends = tensors["tokens"].tolist(), [0, *accumulate(tensors["lengths"].flatten().tolist())]
        sequences = [tokens[start:stop] for start, stop in pairwise(ends)]  # prompts and answers in turn
        return cls(task, tuple(zip(sequences[::2], sequences[1::2], strict=True)))


class ConcatenatedDataset:
    """Several data sets as one: the samples of the first, then those of the second, and so on."""

    def __init__(self, datasets: Sequence[TokenizedDataset]) -> None:
        self.datasets = datasets
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self.prompt_lengths = np.concatenate([dataset.prompt_lengths for dataset in datasets])
        self.answer_lengths = np.concatenate([dataset.answer_lengths for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> TokenizedSample:
        number, offset = self.locate(index)
        return self.datasets[number][offset]

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the data set, index within it) of a sample."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - self._ends[number] + len(self.datasets[number]))
