"""A router over tasks: tasks can be added and removed, the router is fitted when needed, and saved and loaded.

A router stores each task's statistics, which are sums (`dscl.maths.rls`), and never a fitted solution. So a router can
be assembled from tasks of different runs, and tasks can be removed again. A file holds the statistics of one or more
tasks and the `RouterSpec` of their features. Statistics of other features would route wrongly without any error, so
they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dscl.config.parsing import config_key, did_you_mean, parse_config, to_plain_data
from dscl.maths.keys import TaskKeys, UnitFeatures, build_task_keys, compute_key_statistics
from dscl.maths.rls import FeatureMap, FittedRouter, TaskStatistics, compute_statistics, fit_router, triangle_size
from dscl.utils.checksummed import read_checksummed, write_checksummed
from dscl.utils.errors import UserError

FILE_VERSION = 1
FILE_KIND = "dscl_router"
GRAM_DTYPES = (torch.int32, torch.int64, torch.float64)  # of a Gram matrix in a file


@dataclass(frozen=True)
class RouterSpec:
    """Everything that determines a router's features. Routers can be merged only if their specs are equal."""

    kind: str = config_key(choices=("exact", "paper", "key"), help="features")
    layer: int = config_key(at_least=0, help="feature layer")
    dim: int = config_key(at_least=1, help="hidden size")
    num_features: int = config_key(at_least=1, help="number of random features")
    seed: int = config_key(help="seed of the random features")
    model: str = config_key(help="model")
    tokenizer: str = config_key(help="tokenizer")
    prompt_limit: int = config_key(at_least=1, help="longest prompt in tokens")
    precision: str = config_key(help="precision")

    def describe_difference(self, other: RouterSpec) -> str:
        """A sentence about the first field that differs, or an empty string if the specs are equal."""
        for field in fields(self):
            own_value, other_value = getattr(self, field.name), getattr(other, field.name)
            if own_value != other_value:
                return (
                    f"the router was built with {field.metadata['help']} {_shorten_fingerprint(own_value)}, here it is "
                    f"{_shorten_fingerprint(other_value)}"
                )
        return ""

    def feature_map(self) -> FeatureMap:
        """Create the map from pooled hidden states to features."""
        if self.kind == "key":
            return UnitFeatures(self.dim)
        return FeatureMap(self.dim, self.num_features, self.seed, self.kind == "exact")


@dataclass(frozen=True)
class RoutingResult:
    """The routing decisions for a batch of prompts."""

    task: list[str | None]  # None: the base model answers
    margin: Tensor  # score of the chosen task minus the second best score; the right task's score is near 1
    distance: Tensor  # from the chosen task, relative to its own prompts' distance; 0 without OOD detection


class Router:
    """Holds the statistics of tasks, and assigns prompts to tasks."""

    def __init__(
        self,
        spec: RouterSpec,
        ridge: float | None = None,
        ood_fallback: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """`ridge`: see `fit_router`. `ood_fallback`: prompts far from every task go to the base model. `device`: where
        the router is fitted and applied."""
        self.spec, self.ridge, self.ood_fallback, self.device = spec, ridge, ood_fallback, device
        self.feature_map = spec.feature_map()
        self._tasks: dict[str, TaskStatistics] = {}
        self._fitted_router: FittedRouter | TaskKeys | None = None

    @property
    def names(self) -> list[str]:
        """The tasks in the router."""
        return list(self._tasks)

    def compute_statistics(self, quantized: Tensor) -> TaskStatistics:
        """The statistics of a task's prompts or of any part of them. `quantized`: see `quantize`."""
        if isinstance(self.feature_map, UnitFeatures):
            return compute_key_statistics(quantized, self.feature_map)
        return compute_statistics(quantized, self.feature_map)

    def add(self, name: str, statistics: TaskStatistics) -> None:
        """Add a task. The router is fitted again when it is next needed."""
        if name in self._tasks:
            raise UserError(f"task {name!r} is in the router already; remove it first, or name the new one otherwise")
        assert statistics.num_features == self.spec.num_features
        if int(statistics.count) < 1:
            raise UserError(f"task {name!r} has no samples; a router needs some prompts of every task")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in statistics.tensors()):
            raise UserError(f"task {name!r}: its statistics hold values that are not finite; gather them again")
        self._tasks[name] = statistics.compact().to("cpu")
        self._fitted_router = None

    def remove(self, name: str) -> None:
        """Remove a task. The router is then the same as if the task had never been added."""
        self.get_statistics(name)
        del self._tasks[name]
        self._fitted_router = None

    def get_statistics(self, name: str) -> TaskStatistics:
        """A task's statistics."""
        if name not in self._tasks:
            known = ", ".join(self._tasks) or "none"
            raise UserError(f"task {name!r} is not in the router{did_you_mean(name, self._tasks)}; there: {known}")
        return self._tasks[name]

    def quantize(self, pooled: Tensor) -> Tensor:
        """Convert pooled hidden states [prompts, dim] into the form that `route` and `compute_statistics` take."""
        if not torch.isfinite(pooled).all():
            raise UserError(
                f"layer {self.spec.layer}: the pooled hidden states hold values that are not finite; check the model's "
                "weights and the precision"
            )
        return self.feature_map.quantize(pooled)

    def get_fitted_router(self) -> FittedRouter | TaskKeys:
        """The fitted router. It is fitted when it is first needed after tasks were added or removed."""
        if not self._tasks:
            raise UserError("the router knows no task; add one first")
        if self._fitted_router is None:
            tasks = {name: statistics.to(self.device) for name, statistics in self._tasks.items()}
            if self.spec.kind == "key":
                self._fitted_router = build_task_keys(tasks)
                return self._fitted_router
            is_paper = self.spec.kind == "paper"
            try:
                self._fitted_router = fit_router(
                    tasks, self.ridge, paper_form=is_paper, detect_ood=self.ood_fallback and not is_paper
                )
            except ValueError as error:
                raise UserError(str(error)) from None
        return self._fitted_router

    def route(self, quantized: Tensor) -> RoutingResult:
        """Assign each prompt to a task. `quantized`: see `quantize`."""
        fitted_router = self.get_fitted_router()
        index, margin, distance = fitted_router.route(self.feature_map.compute_features(quantized.to(self.device)))
        return RoutingResult([fitted_router.names[i] if i >= 0 else None for i in index.tolist()], margin, distance)

    def describe(self) -> str:
        """A phrase with the number of tasks and, for a ridge regression, its ridge and condition number."""
        try:
            fitted_router = self.get_fitted_router()
        except UserError as error:  # the statistics are kept anyway; another ridge may work
            return f"the router, which cannot be solved: {error}"
        details = "keys"
        if isinstance(fitted_router, FittedRouter):
            details = f"ridge {fitted_router.ridge:g}, condition {fitted_router.condition:.1e}"
        return f"the router, which knows {len(self.names)} tasks ({details})"

    def save(self, path: Path) -> None:
        """Write the statistics of all tasks into one file."""
        _write_router_file(path, self.spec, {"ridge": self.ridge, "ood_fallback": self.ood_fallback}, self._tasks)

    @classmethod
    def load(cls, path: Path, expected: RouterSpec | None = None, device: torch.device | str = "cpu") -> Router:
        """Load what `save` wrote. A damaged file, or one of other features than `expected`, is refused."""
        spec, settings, tasks = _read_router_file(path, expected)
        router = cls(spec, settings["ridge"], settings["ood_fallback"], device)
        for name, statistics in tasks.items():
            router.add(name, statistics)
        return router


def save_task_statistics(path: Path, spec: RouterSpec, name: str, statistics: TaskStatistics) -> None:
    """Write one task's statistics. Equal statistics give files that are equal byte for byte."""
    _write_router_file(path, spec, {"ridge": None, "ood_fallback": True}, {name: statistics})


def load_task_statistics(path: Path, expected: RouterSpec) -> TaskStatistics:
    """Load what `save_task_statistics` wrote."""
    tasks = _read_router_file(path, expected)[2]
    if len(tasks) != 1:
        raise UserError(f"{path}: holds {len(tasks)} tasks ({', '.join(tasks)}); a file of a single one is needed")
    return next(iter(tasks.values()))


def _write_router_file(
    path: Path, spec: RouterSpec, settings: dict[str, Any], tasks: Mapping[str, TaskStatistics]
) -> None:
    """Write a header and the statistics of these tasks. `settings`: of the router, see `Router.load`."""
    tensors = {}
    for i, statistics in enumerate(tasks.values()):
        for part, tensor in zip(("gram", "feature_sum", "count"), statistics.compact().tensors(), strict=True):
            tensors[f"{i}.{part}"] = tensor.cpu().contiguous()
    header = {"spec": to_plain_data(spec), "settings": settings, "tasks": list(tasks)}
    write_checksummed(path, FILE_KIND, FILE_VERSION, header, tensors)


def _read_router_file(
    path: Path, expected: RouterSpec | None
) -> tuple[RouterSpec, dict[str, Any], dict[str, TaskStatistics]]:
    """Read the spec, the settings and each task's statistics, after checking the file."""
    header, tensors = read_checksummed(path, FILE_KIND, FILE_VERSION, "a router's file")
    spec = parse_config(RouterSpec, header["spec"], str(path))
    difference = spec.describe_difference(expected) if expected is not None else ""
    if difference:
        raise UserError(f"{path}: {difference}; use what it was built with, or make the router anew")
    tasks = {}
    for i, name in enumerate(header["tasks"]):
        gram, feature_sum, count = (tensors[f"{i}.{part}"] for part in ("gram", "feature_sum", "count"))
        assert gram.dtype in GRAM_DTYPES
        assert gram.shape == (0 if spec.kind == "key" else triangle_size(spec.num_features),)
        tasks[name] = TaskStatistics(gram, feature_sum, count)
    return spec, header["settings"], tasks


def _shorten_fingerprint(value: object) -> str:
    """The first characters of a fingerprint, which suffice to tell fingerprints apart."""
    return str(value)[:12]
