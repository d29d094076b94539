"""Evaluation: the score of an exam is the same on every rank, at every stage, with unequal shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dscl.config.methods import SequentialPreset
from dscl.data.batches import collate_prompts
from dscl.data.task import Sample, Task, TaskConfig
from dscl.distributed import comm
from dscl.methods.base import RunInfo
from dscl.methods.sequential import Sequential
from dscl.model.generation import generate
from dscl.training.evaluation import EvalSet, EvaluateConfig, evaluate_task, mean_token_loss, should_evaluate
from tests.support.decoding import EOS, LABELS, PAD, PROMPTS, reference_log_prob
from tests.support.toy_model import VOCABULARY, make_engine, toy_model

RIGHT = pytest.approx(4 / 5, abs=1e-12)  # each exam is made so that one of its five answers is wrong
METHOD = Sequential(SequentialPreset(), RunInfo(0, (), "", "", "", 0, ""))


@pytest.mark.parametrize(
    ("tasks", "every", "expected"),
    [
        ("all", 1, ["abc", "abc", "abc"]),
        ("seen", 1, ["a", "ab", "abc"]),
        ("new", 1, ["a", "b", "abc"]),
        ("seen", 2, ["", "ab", "abc"]),
        ("new", 2, ["", "b", "abc"]),
    ],
)
def test_which_tasks_are_evaluated_after_each(tasks: str, every: int, expected: list[str]) -> None:
    settings = SimpleNamespace(evaluate=EvaluateConfig(tasks=tasks, every=every))
    setup: Any = SimpleNamespace(recipe=settings, tasks="abc")
    found = [
        "".join(name for task, name in enumerate("abc") if should_evaluate(setup, task, after)) for after in range(3)
    ]
    assert found == expected


class Words:
    """A tokenizer's outside for tokens that are their own words."""

    eos_token_id = EOS
    pad_token_id = PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in (PAD, EOS)))


def eval_set(ranked: bool) -> EvalSet:
    names = tuple(Words().decode(label, True) for label in LABELS)
    module = toy_model()
    best = [max(range(3), key=lambda i, p=prompt: reference_log_prob(module, p, LABELS[i])) for prompt in PROMPTS]
    answers = [names[best[0]], names[(best[1] + 1) % 3], *(names[b] for b in best[2:])]  # one of five is wrong
    samples = tuple(Sample("", answer, (answer,), "made") for answer in answers)
    if not ranked:
        with torch.no_grad():
            rows = generate(module, collate_prompts(PROMPTS, PAD), 4, EOS, PAD)
        said = [Words().decode(row, True) for row in rows]
        assert all(said)
        samples = tuple(Sample("", s, (s if i != 2 else "no",), "made") for i, s in enumerate(said))
    task = Task(
        "toy", (), (), samples, names if ranked else None, "accuracy" if ranked else "rouge_l", TaskConfig("toy", "")
    )
    return EvalSet(task, samples, PROMPTS, LABELS if ranked else None)


def score_at(stage: int, ranked: bool, batch: int, precision: str = "fp32") -> float:
    engine = make_engine(stage, precision)
    result = evaluate_task(eval_set(ranked), engine, METHOD, Words(), EvaluateConfig(batch=batch, max_new_tokens=4))
    engine.close()
    assert result.routing_accuracy is None
    return result.score


@pytest.mark.parametrize(
    ("stage", "ranked"),
    [
        pytest.param(stage, ranked, marks=() if stage in (0, 3) or stage % 2 == ranked else pytest.mark.exhaustive)
        for stage in (0, 1, 2, 3)
        for ranked in (True, False)
    ],
)
def test_five_prompts_on_two_ranks_at_every_stage(ranks: Any, stage: int, ranked: bool) -> None:
    assert ranks(2)(score_at, stage, ranked, 2) == [RIGHT] * 2


def test_more_ranks_than_prompts_of_a_batch(ranks: Any) -> None:
    assert ranks(2)(score_at, 3, True, 64) == [RIGHT] * 2


def passes_of_generation() -> tuple[int, list[int]]:
    """The first rank's prompt ends at once, the other's does not: passes through the model, and the answer."""
    module = toy_model()
    with torch.no_grad():
        (first,), (second,) = (
            generate(module, collate_prompts([prompt], PAD), 4, VOCABULARY, PAD) for prompt in PROMPTS[:2]
        )
        assert first[0] not in second[:3]
        count = [0]
        module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        (answer,) = generate(module, collate_prompts([PROMPTS[comm.rank()]], PAD), 4, first[0], PAD)
    return count[0], answer


def test_ranks_generate_as_long_as_any_of_them_has_to(ranks: Any) -> None:
    """Under ZeRO-3 every pass needs all of them."""
    (passes, first), (others, second) = ranks(2)(passes_of_generation)
    assert passes == others >= 3
    assert first == []
    assert len(second) >= 3


TEXTS = [[1, 5, 9, 3], [1, 2], [1, 7, 7, 7, 7, 4, 2], [1, 8, 3], [1, 6, 2, 9, 9, 9]]


def loss_at(stage: int) -> tuple[float, list[tuple[int, int]]]:
    """The loss, and the progress that was reported."""
    engine, progress = make_engine(stage), []
    loss = mean_token_loss(TEXTS, engine, METHOD, Words(), lambda *done: progress.append(done))
    engine.close()
    return loss, progress


@pytest.mark.parametrize("stage", [0, 3])
def test_the_loss_on_texts_is_the_mean_over_their_tokens(ranks: Any, stage: int) -> None:
    expected = -sum(reference_log_prob(toy_model(), [text[0]], text[1:]) for text in TEXTS) / sum(
        len(text) - 1 for text in TEXTS
    )
    for loss, progress in ranks(2)(loss_at, stage):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert progress == [(1, 1)]  # of one batch a rank
