"""What all tests share: the folder with real data, and pools of real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import Pool

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real task data and a small pretrained model, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the real task data is not there (looked in {SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(2)(function, *arguments)`: run a function on two ranks. Pools are started once and kept."""
    pools: dict[int, Pool] = {}

    def get(world: int) -> Pool:
        if world not in pools or not pools[world].alive:
            pools[world] = Pool(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()
