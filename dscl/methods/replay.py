"""Sequential fine-tuning with replay: a few samples of every ended task are learnt again with each later one.

What trains: all weights, or one LoRA for all tasks. What is kept: samples, chosen by chance when their task ends, in
files of their own, so that a run that goes on needs nothing of the earlier tasks' data. They are shuffled among the
new task's samples, and each counts like one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dscl.config.methods import ReplayConfig
from dscl.data.replay_buffer import Kept
from dscl.methods.base import Ended, Facts, Ranks
from dscl.methods.sequential import Sequential
from dscl.model.adapters.peft_files import file_name
from dscl.utils.errors import UserError


class Replay(Sequential):
    Config = ReplayConfig
    config: ReplayConfig

    def __init__(self, config: ReplayConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        if config.most is not None and config.most < len(facts.tasks) - 1:
            raise UserError(
                f"method.most: given {config.most}; each of the {len(facts.tasks) - 1} tasks that end before the last "
                "keeps a sample at least, so give as many or more"
            )
        self._kept: list[Kept] = []  # of each ended task, in an order of chance

    def mixes(self, ended: Sequence[int]) -> list[int]:
        return [self._count(samples, len(ended)) for samples in ended]

    def mixed_in(self) -> list[Kept]:
        return self._kept

    def _count(self, samples: int, ended: int) -> int:
        """How many of a task's samples are learnt again when so many tasks have ended."""
        wanted = round((self.config.share or 0.0) * samples) if self.config.most is None else self.config.most // ended
        return min(samples, max(1, wanted))

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        samples = ranks.samples()
        chance = np.random.default_rng([self.facts.seed, index]).permutation(len(samples))
        chosen = chance[: self._count(len(samples), index + 1)]
        self._kept.append(Kept(name, tuple(samples[int(i)] for i in chosen)))
        self._cut()
        return Ended(numbers={"capacity_bytes": float(sum(kept.size for kept in self._kept))})

    def _cut(self) -> None:
        """Earlier tasks give way to a new one."""
        if self.config.most is not None and self._kept:
            most = max(1, self.config.most // len(self._kept))
            self._kept = [Kept(kept.task, kept.pairs[:most]) for kept in self._kept]

    def leave(self, folder: Path, name: str) -> list[Path]:
        path = _place(folder, name)
        next(kept for kept in self._kept if kept.task == name).write(path)
        return [path]

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        self._kept = [Kept.read(_place(folder, name), name) for name in names]
        self._cut()  # files stay as they were left: what a checkpoint needs is there whichever one it is


def _place(folder: Path, name: str) -> Path:
    return folder / "samples" / f"{file_name(name)}.safetensors"
