"""Samples that stay: some of an ended task's, encoded, in a file of their own; and samples of several tasks as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dscl.data.encode import Pair
from dscl.utils.checksummed import read_stamped, write_stamped
from dscl.utils.errors import UserError

KIND, FORMAT = "dscl_samples", 1


class Samples(Protocol):
    """An encoded split, or anything that gives the same of its samples."""

    @property
    def prompt_lengths(self) -> np.ndarray: ...
    @property
    def answer_lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Pair: ...


@dataclass(frozen=True)
class Kept:
    """Samples of one task, held in memory."""

    task: str
    pairs: tuple[Pair, ...]

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt, _ in self.pairs], np.int64)

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        return np.array([len(answer) for _, answer in self.pairs], np.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    @property
    def size(self) -> int:
        """In bytes, as they are written."""
        return int(4 * (self.prompt_lengths.sum() + self.answer_lengths.sum()) + 8 * len(self))

    def write(self, path: Path) -> None:
        tokens = [token for prompt, answer in self.pairs for token in (*prompt, *answer)]
        lengths = np.stack([self.prompt_lengths, self.answer_lengths], 1).astype(np.int32)
        tensors = {"tokens": torch.tensor(tokens, dtype=torch.int32), "lengths": torch.from_numpy(lengths)}
        write_stamped(path, KIND, FORMAT, {"task": self.task}, tensors)

    @classmethod
    def read(cls, path: Path, task: str) -> Kept:
        header, tensors = read_stamped(path, KIND, FORMAT, "the samples that a task left")
        if header["task"] != task:
            raise UserError(f"{path}: samples of task {header['task']!r}, here {task!r} is needed; copy it again")
        tokens, ends = tensors["tokens"].tolist(), [0, *accumulate(tensors["lengths"].flatten().tolist())]
        parts = [tokens[start:stop] for start, stop in pairwise(ends)]
        return cls(task, tuple(zip(parts[::2], parts[1::2], strict=True)))


class Joined:
    """The samples of several splits, one after the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.prompt_lengths = np.concatenate([part.prompt_lengths for part in parts])
        self.answer_lengths = np.concatenate([part.answer_lengths for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        part, place = self.place(index)
        return self.parts[part][place]

    def place(self, index: int) -> tuple[int, int]:
        """Which split a sample is of, and its place there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, int(index - self._ends[part] + len(self.parts[part]))
