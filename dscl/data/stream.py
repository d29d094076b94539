"""The stream of tasks: each one read, given its dev split, shuffled by the seed and limited."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.formats import read_splits
from dscl.data.task import Sample, Task
from dscl.utils.errors import UserError

DEV_AT_MOST = 500
TEST_SHARE = 0.1
NO_DEV = ", or do without one by dev_share: 0"


def load_stream(tasks: Sequence[TaskConfig], data: DataConfig, seed: int) -> list[Task]:
    """Read all tasks, in order; whatever is wrong with any of them is told now, not hours later."""
    if not tasks:
        raise UserError("stream: empty; give at least one task")
    for name, count in Counter(config.name for config in tasks).items():
        if not name.strip():
            raise UserError("stream: a task's name is empty; give each task a name")
        if count > 1:
            raise UserError(f"stream: {count} tasks are named {name!r}; give each task a name of its own")
    return [read_task(config, data, seed) for config in tasks]


def read_task(config: TaskConfig, data: DataConfig, seed: int) -> Task:
    """One task. What is in which split depends on the data and the seed alone; a smaller limit takes a part of what a
    larger one takes, and no limit moves a sample from one split to another."""
    splits = read_splits(config, data)
    _refuse_empty(config, "train", splits.train)
    train, dev, test = splits.train, splits.dev, splits.test
    whole = len(train)
    if test is None:
        # The same for all seeds, so that what is chosen with one of them is tried on samples that it has not seen.
        train, test = _carve(train, max(1, round(whole * TEST_SHARE)), random.Random("carve test"))
    if dev is not None:
        _refuse_empty(config, "dev", dev)
        dev = _without(dev, test) or None
    if dev is None:
        size = min(DEV_AT_MOST, max(1, round(whole * config.dev_share))) if config.dev_share else 0
        train, dev = _carve(train, size, random.Random(f"{seed} carve dev"))
    _refuse_empty(config, "train", train)
    _refuse_empty(config, "test", test)
    if config.dev_share:
        _refuse_empty(config, "dev", dev)
    maker = splits.maker
    return Task(
        name=config.name,
        train=_shuffled(train, config.train_limit, f"{seed} train"),
        dev=_shuffled(dev, config.dev_limit, f"{seed} dev"),
        test=_shuffled(test, config.test_limit, f"{seed} test"),
        labels=maker.labels,
        metric=config.metric or ("rouge_l" if maker.labels is None else "accuracy"),
        settings=config,
    )


def _without(samples: list[Sample], others: list[Sample]) -> list[Sample]:
    """Published dev splits are often copies of the test split, or parts of it: choosing by them is choosing by test."""
    prompts = {sample.prompt for sample in others}
    return [sample for sample in samples if sample.prompt not in prompts]


def _carve(samples: list[Sample], size: int, rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """(rest, carved): `size` samples taken out at random. Samples with the same prompt stay together, so that no prompt
    stands on both sides; that may make it fewer, and more only where otherwise there would be none."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    prompts = list(groups)
    rng.shuffle(prompts)
    carved: set[str] = set()
    room = min(size, len(samples) - 1)
    for prompt in prompts:
        if len(groups[prompt]) <= room:
            carved.add(prompt)
            room -= len(groups[prompt])
    if not carved and size and len(groups) > 1:
        carved.add(min(prompts, key=lambda prompt: len(groups[prompt])))
    rest = [sample for sample in samples if sample.prompt not in carved]
    return rest, [sample for sample in samples if sample.prompt in carved]


def _shuffled(samples: list[Sample], limit: int | None, seed: str) -> tuple[Sample, ...]:
    order = list(samples)
    random.Random(seed).shuffle(order)
    return tuple(order[:limit])


def _refuse_empty(config: TaskConfig, split: str, samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError(
            f"task {config.name!r}: the {split} split of {config.path} is empty "
            "(where records were skipped or a split was carved out, by that; equal prompts stay in one split); "
            f"add samples{NO_DEV if split == 'dev' else ''}"
        )
