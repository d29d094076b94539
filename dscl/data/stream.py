"""Loads the stream of tasks: reads each task, makes missing splits, shuffles by the seed and applies limits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.formats import read_splits
from dscl.data.task import Sample, Task
from dscl.utils.errors import UserError

MAX_DEV_SIZE = 500
TEST_RATIO = 0.1
NO_DEV_HINT = ", or do without one by dev_share: 0"


def load_stream(tasks: Sequence[TaskConfig], data: DataConfig, seed: int) -> list[Task]:
    """Read all tasks, in order, before training begins, so that errors in later tasks are reported at once."""
    if not tasks:
        raise UserError("stream: empty; give at least one task")
    for name, count in Counter(config.name for config in tasks).items():
        if not name.strip():
            raise UserError("stream: a task's name is empty; give each task a name")
        if count > 1:
            raise UserError(f"stream: {count} tasks are named {name!r}; give each task a name of its own")
    return [read_task(config, data, seed) for config in tasks]


def read_task(config: TaskConfig, data: DataConfig, seed: int) -> Task:
    """Read one task and divide it into splits.

    The splits depend only on the data and the seed. A limit is applied afterwards: a smaller limit keeps a subset of
    what a larger one keeps, and no limit moves a sample to another split.
    """
    splits = read_splits(config, data)
    _check_not_empty(config, "train", splits.train)
    train, dev, test = splits.train, splits.dev, splits.test
    num_samples = len(train)
    if test is None:
        # The test split is the same for all seeds: settings chosen with one seed are never tested on training samples.
        train, test = _carve_split(train, max(1, round(num_samples * TEST_RATIO)), random.Random("carve test"))
    if dev is not None:
        _check_not_empty(config, "dev", dev)
        dev = _exclude_prompts(dev, test) or None
    if dev is None:
        size = min(MAX_DEV_SIZE, max(1, round(num_samples * config.dev_share))) if config.dev_share else 0
        train, dev = _carve_split(train, size, random.Random(f"{seed} carve dev"))
    _check_not_empty(config, "train", train)
    _check_not_empty(config, "test", test)
    if config.dev_share:
        _check_not_empty(config, "dev", dev)
    builder = splits.builder
    return Task(
        name=config.name,
        train=_shuffle_and_limit(train, config.train_limit, f"{seed} train"),
        dev=_shuffle_and_limit(dev, config.dev_limit, f"{seed} dev"),
        test=_shuffle_and_limit(test, config.test_limit, f"{seed} test"),
        labels=builder.labels,
        metric=config.metric or ("rouge_l" if builder.labels is None else "accuracy"),
        settings=config,
    )


def _exclude_prompts(samples: list[Sample], others: list[Sample]) -> list[Sample]:
    """The samples whose prompts do not occur in `others`.

    Published dev splits are often copies or parts of the test split; settings must not be chosen on test data.
    """
    prompts = {sample.prompt for sample in others}
    return [sample for sample in samples if sample.prompt not in prompts]


def _carve_split(samples: list[Sample], size: int, rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """Split off about `size` random samples; return (the others, those split off).

    Samples with the same prompt stay together, so that no prompt is in both splits. Therefore fewer samples may be
    split off, or more if there would otherwise be none.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    prompts = list(groups)
    rng.shuffle(prompts)
    carved_prompts: set[str] = set()
    remaining = min(size, len(samples) - 1)
    for prompt in prompts:
        if len(groups[prompt]) <= remaining:
            carved_prompts.add(prompt)
            remaining -= len(groups[prompt])
    if not carved_prompts and size and len(groups) > 1:
        carved_prompts.add(min(prompts, key=lambda prompt: len(groups[prompt])))
    rest = [sample for sample in samples if sample.prompt not in carved_prompts]
    return rest, [sample for sample in samples if sample.prompt in carved_prompts]


def _shuffle_and_limit(samples: list[Sample], limit: int | None, seed: str) -> tuple[Sample, ...]:
    order = list(samples)
    random.Random(seed).shuffle(order)
    return tuple(order[:limit])


def _check_not_empty(config: TaskConfig, split: str, samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError(
            f"task {config.name!r}: the {split} split of {config.path} is empty "
            "(where records were skipped or a split was carved out, by that; equal prompts stay in one split); "
            f"add samples{NO_DEV_HINT if split == 'dev' else ''}"
        )
