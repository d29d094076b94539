"""The results of a run: what training records, a checkpoint saves, and scores.json, TensorBoard and reports show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dscl.maths.scores import summarize

OptionalScores = list[float | None]
RoutingShares = tuple[tuple[str | None, float], ...]  # (task or None, share of prompts routed to it)


class EvalResult(NamedTuple):
    """A task's score and, where the method infers the task of each prompt, how it routed this task's prompts."""

    score: float  # in 0…1
    routing_accuracy: float | None = None  # share of prompts routed to their own task
    rejected_share: float | None = None  # share of prompts routed to no task
    routing_shares: RoutingShares | None = None


ResultRow = list[EvalResult | None]  # a result for each task of the stream; None where it was not evaluated


@dataclass
class ScoreBoard:
    """All results of a run so far. Row i holds the results of all tasks after training on task i."""

    method: str
    tasks: tuple[str, ...]  # names, in stream order
    metrics: tuple[str, ...]  # one for each task
    zero_shot: OptionalScores | None = None  # scores before training
    rows: list[ResultRow] = field(default_factory=list)
    oracle_rows: list[ResultRow] = field(default_factory=list)  # the same with the true task of every prompt
    heldout_losses: list[float] = field(default_factory=list)  # before training, then after each task

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.zero_shot or self.heldout_losses)

    @property
    def is_complete(self) -> bool:
        return len(self.rows) == len(self.tasks)

    @property
    def matrix(self) -> list[OptionalScores]:
        """The score matrix, [tasks trained, tasks]."""
        return _column(self.rows, "score")

    @property
    def summary(self) -> dict[str, float | None]:
        """OP, BWT, FWT and forgetting."""
        return summarize(self.matrix, self.zero_shot)

    @property
    def oracle_summary(self) -> dict[str, float | None]:
        return summarize(_column(self.oracle_rows, "score"))

    @property
    def final_routing_accuracy(self) -> OptionalScores:
        """The share of each task's prompts that its own task answered, after the last training; [] without a router."""
        row = _column(self.rows[-1:], "routing_accuracy")
        return row[0] if row and any(share is not None for share in row[0]) else []

    @property
    def confusion(self) -> dict[str, Any] | None:
        """The routing of the last evaluation: which share of each task's prompts was answered by which task."""
        row = next((row for row in reversed(self.rows) if any(row)), [])
        shares_by_task = {
            task: dict(result.routing_shares)
            for task, result in zip(self.tasks, row, strict=False)
            if result and result.routing_shares
        }
        if not shares_by_task:
            return None
        answered_by = [*self.tasks, None]
        shares = [[by_name.get(name, 0.0) for name in answered_by] for by_name in shares_by_task.values()]
        return {"tasks": list(shares_by_task), "answered_by": answered_by, "shares": shares}

    def to_json(self) -> dict[str, Any]:
        """The content of scores.json."""
        self._check()
        document: dict[str, Any] = {
            "method": self.method,
            "tasks": list(self.tasks),
            "metrics": list(self.metrics),
            "matrix": self.matrix,
            "zero_shot": self.zero_shot,
            "summary": self.summary,
            "complete": self.is_complete,
        }
        routing_accuracy = _column(self.rows, "routing_accuracy")
        if any(share is not None for share in itertools.chain(*routing_accuracy)):
            rejected_share = _column(self.rows, "rejected_share")
            document |= {"routing_accuracy": routing_accuracy, "rejected_share": rejected_share}
            document["confusion"] = self.confusion
        if self.oracle_rows:
            oracle_matrix = _column(self.oracle_rows, "score")
            document["oracle_task_id"] = {"matrix": oracle_matrix, "summary": self.oracle_summary}
        if self.heldout_losses:
            document["heldout"] = self.heldout_losses
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ScoreBoard:
        """The inverse of `to_json`. Of the routing, only the last evaluation's shares are in the document."""
        board = cls(
            method=document["method"],
            tasks=tuple(document["tasks"]),
            metrics=tuple(document["metrics"]),
            zero_shot=document["zero_shot"],
            rows=_rows(document["matrix"], document.get("routing_accuracy"), document.get("rejected_share")),
            oracle_rows=_rows(document.get("oracle_task_id", {}).get("matrix", ())),
            heldout_losses=list(document.get("heldout", ())),
        )
        if confusion := document.get("confusion"):
            row = next(row for row in reversed(board.rows) if any(row))
            for task, shares in zip(confusion["tasks"], confusion["shares"], strict=True):
                index = board.tasks.index(task)
                result = row[index]
                if result is None:
                    raise ValueError(f"confusion: {task!r} was not evaluated")
                pairs = [pair for pair in zip(confusion["answered_by"], shares, strict=True) if pair[1]]
                row[index] = result._replace(routing_shares=tuple(sorted(pairs, key=lambda pair: pair[0] or "")))
        return board

    def _check(self) -> None:
        """Raise ValueError for rows that do not fit the tasks, and for scores outside of 0…1."""
        num_tasks = len(self.tasks)
        if len(self.metrics) != num_tasks:
            raise ValueError(f"{len(self.metrics)} metrics for {num_tasks} tasks; there must be one each")
        if len(self.rows) > num_tasks:
            raise ValueError(
                f"the score matrix has {len(self.rows)} rows for {num_tasks} tasks; at most one each is allowed"
            )
        named_rows = [(f"matrix[{i}]", row) for i, row in enumerate(self.matrix)]
        if self.zero_shot is not None:
            named_rows.append(("zero_shot", self.zero_shot))
        for name, row in named_rows:
            if len(row) != num_tasks:
                raise ValueError(f"{name} has {len(row)} scores for {num_tasks} tasks; there must be one each")
            for j, score in enumerate(row):
                if score is not None and not 0.0 <= score <= 1.0:
                    raise ValueError(f"{name}[{j}], the score of {self.tasks[j]!r}, is {score}; it must lie in 0…1")


def _column(rows: Iterable[ResultRow], name: str) -> list[OptionalScores]:
    """One field of every result, row by row; None where a task was not evaluated."""
    return [[None if result is None else getattr(result, name) for result in row] for row in rows]


def _rows(
    matrix: Sequence[OptionalScores],
    routing_accuracy: Sequence[OptionalScores] | None = None,
    rejected_share: Sequence[OptionalScores] | None = None,
) -> list[ResultRow]:
    unknown: list[OptionalScores] = [[None] * len(row) for row in matrix]
    return [
        [
            None if score is None else EvalResult(score, accuracy, rejected)
            for score, accuracy, rejected in zip(*columns, strict=True)
        ]
        for columns in zip(matrix, routing_accuracy or unknown, rejected_share or unknown, strict=True)
    ]
