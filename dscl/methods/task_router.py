"""Who decides at inference: a router that learns each task from the prompts it was trained on, on the way.

A piece for methods. A training pass comes by the feature layer anyway; what it shows there of a task's prompts, each
once, becomes the task's sums when the task ends, and the router is asked for every prompt that is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dscl.data.batches import Batch, PromptBatch
from dscl.maths.rls import packed
from dscl.methods.base import Facts, Ranks
from dscl.methods.rls_router import Router, Spec, load_task, save_task
from dscl.model.adapters.peft_files import file_name
from dscl.model.adapters.routing import Routing
from dscl.model.lm_head import answer_loss
from dscl.utils import timers
from dscl.utils.errors import UserError

SOLVING = 7  # matrices of features by features in fp64, at the peak of it (measured by tools/bench_router.py)


class Deciding:
    """The router, and what was gathered of the present task for it."""

    def __init__(self, router: Router, routing: Routing) -> None:
        self.router, self.routing = router, routing
        self._samples: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._finite: list[torch.Tensor] = []

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss, and on the way what the router needs of samples that are seen for the first time."""
        if not batch.first or not batch.samples:
            return answer_loss(model, batch)
        with self.routing.pooling(batch.prompts) as pooled:
            loss = answer_loss(model, batch)
        # The answer stands behind its prompt, which therefore does not see it: these are the features of serving.
        self._samples += batch.samples
        with timers.part("router"):
            states = pooled()
            self._finite.append(states.isfinite().all(1))  # not looked at now, which would make a GPU wait
            self._rows.append(self.router.expansion.rows(states.nan_to_num()))
        return loss

    def learn(self, name: str, ranks: Ranks) -> str:
        """The task has ended: it joins the router."""
        samples, rows = self._gathered()
        assert len(set(samples)) == len(samples), "a sample was counted twice"
        statistics = self.router.gather(rows)
        for tensor in statistics.tensors():
            ranks.sum_(tensor)
        self.router.add(name, statistics)
        self._samples, self._rows, self._finite = [], [], []
        return f"{int(statistics.count)} prompts join {self.router.told()}"

    def kept(self) -> float:
        """The bytes of all tasks' sums."""
        sums = (self.router.statistics(name).tensors() for name in self.router.names)
        return float(sum(tensor.numel() * tensor.element_size() for each in sums for tensor in each))

    def later(self) -> dict[str, float]:
        """Bytes that come when a task ends."""
        width = self.router.spec.width
        if self.router.spec.kind == "key":
            return {"keys, a task": 8.0 * width}
        return {
            "router's sums, a task (host)": 4.0 * packed(width) + 8.0 * width,
            "router, while it is solved": self.solving(),
        }

    def solving(self) -> float:
        """Bytes of the device, at the peak of it."""
        return 0.0 if self.router.spec.kind == "key" else SOLVING * 8.0 * self.router.spec.width**2

    def leave(self, folder: Path, name: str) -> Path:
        path = _place(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_task(path, self.router.spec, name, self.router.statistics(name))
        return path

    def recall(self, folder: Path, name: str) -> None:
        self.router.add(name, load_task(_place(folder, name), self.router.spec))

    @contextmanager
    def answering(self, batch: PromptBatch, slot: Callable[[str | None], int | None]) -> Iterator[list[str | None]]:
        """Around all passes that answer these prompts; the list holds the decisions after the first pass."""
        decided: list[str | None] = []

        def decide(pooled: torch.Tensor) -> Sequence[int | None]:
            if self.router.names:
                decided.extend(self.router.route(self.router.rows(pooled)).task)
            else:
                decided.extend([None] * len(pooled))
            return [slot(name) for name in decided]

        with self.routing.answering(batch.prompts, decide):
            yield decided

    def rows(self) -> dict[str, torch.Tensor]:
        samples, rows = self._gathered()
        return {"samples": torch.tensor(samples, dtype=torch.int64), "features": rows.cpu()}

    def load_rows(self, rows: dict[str, torch.Tensor]) -> None:
        self._samples, self._rows = rows["samples"].tolist(), [rows["features"]]
        self._finite = [torch.ones(len(self._samples), dtype=torch.bool)]

    def _gathered(self) -> tuple[list[int], torch.Tensor]:
        """The task's prompts so far. One whose state is not finite does not count; its step has been told of."""
        device = self.router.device  # also where there are none: the ranks' sums meet on one kind of device
        if not self._rows:
            return [], self.router.rows(torch.zeros(0, self.router.spec.dim, device=device))
        finite = torch.cat([mask.to(device) for mask in self._finite])
        rows = torch.cat([part.to(device) for part in self._rows])
        return [sample for sample, ok in zip(self._samples, finite.tolist(), strict=True) if ok], rows[finite]


def spec_of(kind: str, layer: int, width: int, dim: int, facts: Facts) -> Spec:
    """The features of a run's router."""
    return Spec(
        kind=kind,
        layer=layer,
        dim=dim,
        width=dim if kind == "key" else width,
        seed=facts.seed,
        model=facts.model,
        tokenizer=facts.tokenizer,
        prompt_limit=facts.prompt_limit,
        precision=facts.precision,
    )


def feature_layer_of(given: int | None, layers: int) -> int:
    """Where features are taken, in a model of so many layers: by default an eighth of the way, from 2."""
    layer = min(max(2, layers // 8), layers - 1) if given is None else given
    if not 1 <= layer < layers:
        raise UserError(
            f"feature_layer: given {layer}; the model has {layers} layers, of which at least the first stays frozen "
            f"and the last is adapted, so 1 to {layers - 1} is allowed"
        )
    return layer


def width_of(given: int | None, hidden: int) -> int:
    """How many features a prompt is expanded to: by default twice the hidden size, from 2048."""
    return given or max(2048, 2 * hidden)


def _place(folder: Path, name: str) -> Path:
    return folder / "router" / f"{file_name(name)}.safetensors"
