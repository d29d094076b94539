"""The router as a thing to keep: tasks added and removed, solved when needed, saved and loaded whole or not at all.

What is kept is each task's sums (`dscl.maths.rls`), never a solution, so that a router can be put together from tasks
that were learnt in different runs, and taken apart again. A file holds one task or several, and the `Spec` of their
features: sums of other features would route without an error, and wrongly, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dscl.config.parsing import key, nearest, parse, plain
from dscl.maths.keys import Keys, Units, gather_keys, keys_of
from dscl.maths.rls import Expansion, Solution, Statistics, gather, packed, solve
from dscl.utils.checksummed import read_stamped, write_stamped
from dscl.utils.errors import UserError

FORMAT = 1
KIND = "dscl_router"
GRAMS = (torch.int32, torch.int64, torch.float64)  # of a Gram matrix in a file


@dataclass(frozen=True)
class Spec:
    """Which features these are. Two routers fit together if all of it is the same."""

    kind: str = key(choices=("exact", "paper", "key"), help="features")
    layer: int = key(at_least=0, help="feature layer")
    dim: int = key(at_least=1, help="hidden size")
    width: int = key(at_least=1, help="width of the expansion")
    seed: int = key(help="seed of the expansion")
    model: str = key(help="model")
    tokenizer: str = key(help="tokenizer")
    prompt_limit: int = key(at_least=1, help="longest prompt in tokens")
    precision: str = key(help="precision")

    def difference(self, other: Spec) -> str:
        """What differs first, in words: of this one, then of the other one; empty if nothing does."""
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                return f"the router was built with {field.metadata['help']} {_brief(mine)}, here it is {_brief(its)}"
        return ""

    def expansion(self) -> Expansion:
        if self.kind == "key":
            return Units(self.dim)
        return Expansion(self.dim, self.width, self.seed, self.kind == "exact")


@dataclass(frozen=True)
class Routes:
    """Where prompts go."""

    task: list[str | None]  # None: to the base model
    margin: Tensor  # the lead over the second best task, in scores, which are near 1 for the right task
    distance: Tensor  # from the task, in units of its own prompts' distance; 0 if nothing is rejected


class Router:
    def __init__(
        self, spec: Spec, ridge: float | None = None, reject: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        """`ridge` and `reject` are `solve`'s; solving and routing are done on `device`."""
        self.spec, self.ridge, self.reject, self.device = spec, ridge, reject, device
        self.expansion = spec.expansion()
        self._tasks: dict[str, Statistics] = {}
        self._solution: Solution | Keys | None = None

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def gather(self, rows: Tensor) -> Statistics:
        """What is kept of a task's prompts (see `rows`), or of any share of them."""
        if isinstance(self.expansion, Units):
            return gather_keys(rows, self.expansion)
        return gather(rows, self.expansion)

    def add(self, name: str, statistics: Statistics) -> None:
        if name in self._tasks:
            raise UserError(f"task {name!r} is in the router already; remove it first, or name the new one otherwise")
        assert statistics.width == self.spec.width
        if int(statistics.count) < 1:
            raise UserError(f"task {name!r} has no samples; a router needs some prompts of every task")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in statistics.tensors()):
            raise UserError(f"task {name!r}: its statistics hold values that are not finite; gather them again")
        self._tasks[name] = statistics.compact().to("cpu")
        self._solution = None

    def remove(self, name: str) -> None:
        """What is left is what would be there had the task never been added."""
        self.statistics(name)
        del self._tasks[name]
        self._solution = None

    def statistics(self, name: str) -> Statistics:
        if name not in self._tasks:
            there = ", ".join(self._tasks) or "none"
            raise UserError(f"task {name!r} is not in the router{nearest(name, self._tasks)}; there: {there}")
        return self._tasks[name]

    def rows(self, pooled: Tensor) -> Tensor:
        """What `route` and `gather` take, of pooled hidden states."""
        if not torch.isfinite(pooled).all():
            raise UserError(
                f"layer {self.spec.layer}: the pooled hidden states hold values that are not finite; check the model's "
                "weights and the precision"
            )
        return self.expansion.rows(pooled)

    def solution(self) -> Solution | Keys:
        """Solved when it is first needed after a change."""
        if not self._tasks:
            raise UserError("the router knows no task; add one before it is asked")
        if self._solution is None:
            tasks = {name: statistics.to(self.device) for name, statistics in self._tasks.items()}
            if self.spec.kind == "key":
                self._solution = keys_of(tasks)
                return self._solution
            faithful = self.spec.kind == "paper"
            try:
                self._solution = solve(tasks, self.ridge, faithful=faithful, reject=self.reject and not faithful)
            except ValueError as error:
                raise UserError(str(error)) from None
        return self._solution

    def route(self, rows: Tensor) -> Routes:
        """The task of each row (see `rows`)."""
        solution = self.solution()
        index, margin, distance = solution.route(self.expansion.features(rows.to(self.device)))
        return Routes([solution.names[i] if i >= 0 else None for i in index.tolist()], margin, distance)

    def told(self) -> str:
        """How many tasks there are now, and how well they can be told apart."""
        try:
            solution = self.solution()
        except UserError as error:  # what the tasks learnt is kept all the same; another ridge may serve
            return f"the router, which cannot be solved: {error}"
        how = "keys"
        if isinstance(solution, Solution):
            how = f"ridge {solution.ridge:g}, condition {solution.condition:.1e}"
        return f"the router, which knows {len(self.names)} tasks ({how})"

    def save(self, path: Path) -> None:
        """One file for all tasks."""
        _write(path, self.spec, {"ridge": self.ridge, "reject": self.reject}, self._tasks)

    @classmethod
    def load(cls, path: Path, expected: Spec | None = None, device: torch.device | str = "cpu") -> Router:
        """What `save` wrote; a file that is damaged, or of other features than expected, is refused."""
        spec, settings, tasks = _read(path, expected)
        router = cls(spec, settings["ridge"], settings["reject"], device)
        for name, statistics in tasks.items():
            router.add(name, statistics)
        return router


def save_task(path: Path, spec: Spec, name: str, statistics: Statistics) -> None:
    """One task's statistics alone; the same bytes for the same statistics."""
    _write(path, spec, {"ridge": None, "reject": True}, {name: statistics})


def load_task(path: Path, expected: Spec) -> Statistics:
    """What `save_task` wrote."""
    tasks = _read(path, expected)[2]
    if len(tasks) != 1:
        raise UserError(f"{path}: holds {len(tasks)} tasks ({', '.join(tasks)}); a file of a single one is needed")
    return next(iter(tasks.values()))


def _write(path: Path, spec: Spec, settings: dict[str, Any], tasks: Mapping[str, Statistics]) -> None:
    tensors = {}
    for i, statistics in enumerate(tasks.values()):
        for part, tensor in zip(("gram", "total", "count"), statistics.compact().tensors(), strict=True):
            tensors[f"{i}.{part}"] = tensor.cpu().contiguous()
    header = {"spec": plain(spec), "settings": settings, "tasks": list(tasks)}
    write_stamped(path, KIND, FORMAT, header, tensors)


def _read(path: Path, expected: Spec | None) -> tuple[Spec, dict[str, Any], dict[str, Statistics]]:
    """Everything in the file, checked before any of it is used."""
    header, tensors = read_stamped(path, KIND, FORMAT, "a router's file")
    spec = parse(Spec, header["spec"], str(path))
    difference = spec.difference(expected) if expected is not None else ""
    if difference:
        raise UserError(f"{path}: {difference}; use what it was built with, or make the router anew")
    tasks = {}
    for i, name in enumerate(header["tasks"]):
        gram, total, count = (tensors[f"{i}.{part}"] for part in ("gram", "total", "count"))
        assert gram.dtype in GRAMS and gram.shape == (0 if spec.kind == "key" else packed(spec.width),)  # noqa: PT018
        tasks[name] = Statistics(gram, total, count)
    return spec, header["settings"], tasks


def _brief(value: object) -> str:
    """A fingerprint is told apart by its beginning."""
    return str(value)[:12]
