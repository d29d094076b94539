"""Evaluation against brute force and against transformers' own generation, at every stage, with unequal shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dscl.data.task import Sample, Task, TaskConfig
from dscl.engine import fill
from dscl.evaluate import EvaluateConfig, Exam, generate, label_likelihoods, take
from tests.distributed.test_engine import VOCABULARY, backbone, make

CPU = torch.device("cpu")
EOS, PAD = 2, 0
LABELS = [[11, EOS], [11, 12, EOS], [13, 14, 15, EOS]]
RIGHT = pytest.approx(4 / 5, abs=1e-12)  # each exam is made so that one of its five answers is wrong
PROMPTS = [[1, 20, 21, 22], [1, 30], [1, 40, 41, 42, 43, 44, 45], [1, 50, 51], [1, 60, 20, 33, 34]]


class Words:
    """A tokenizer's outside for tokens that are their own words."""

    eos_token_id = EOS
    pad_token_id = PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in (PAD, EOS)))


def model() -> Any:
    built = backbone()
    made = built.build()
    fill(made, built.weights.read)
    return made.eval()


def alone(module: Any, prompt: list[int], label: list[int]) -> float:
    """log p(label | prompt) from one plain forward pass over the two together."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(label))


def test_likelihoods_equal_one_plain_pass_each() -> None:
    module = model()
    with torch.no_grad():
        got = label_likelihoods(module, PROMPTS, LABELS, PAD, CPU)
    expected = torch.tensor([[alone(module, prompt, label) for label in LABELS] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_many_labels_are_ranked_a_few_at_a_time() -> None:
    """So that memory does not grow with the label set; the values are those of all labels at once."""
    module, rows = model(), []
    labels = [[token, *([12] * (token % 3)), EOS] for token in range(20, 31)]
    module.register_forward_pre_hook(lambda _m, _a, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    with torch.no_grad():
        got = label_likelihoods(module, PROMPTS, labels, PAD, CPU)
    assert max(rows) <= 4 * len(PROMPTS)
    expected = torch.tensor([[alone(module, prompt, label) for label in labels] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_single_token_labels_need_no_second_pass() -> None:
    module = model()
    with torch.no_grad():
        got = label_likelihoods(module, PROMPTS, [[5], [6]], PAD, CPU)
    expected = torch.tensor([[alone(module, prompt, [label]) for label in (5, 6)] for prompt in PROMPTS])
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_greedy_generation_equals_transformers() -> None:
    module = model()
    with torch.no_grad():
        frequent = generate(module, PROMPTS, 12, VOCABULARY, PAD, CPU)[0][
            3
        ]  # a token that does come up: let it end rows
        got = generate(module, PROMPTS, 12, frequent, PAD, CPU)
        for prompt, row in zip(PROMPTS, got, strict=True):
            expected = module.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=12, eos_token_id=frequent, pad_token_id=PAD, use_cache=True,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert row == expected[: expected.index(frequent)] if frequent in expected else expected


def exam(ranked: bool) -> Exam:
    names = tuple(Words().decode(label, True) for label in LABELS)
    module = model()
    best = [max(range(3), key=lambda i, p=prompt: alone(module, p, LABELS[i])) for prompt in PROMPTS]
    answers = [names[best[0]], names[(best[1] + 1) % 3], *(names[b] for b in best[2:])]  # one of five is wrong
    samples = tuple(Sample("", answer, (answer,), "made") for answer in answers)
    if not ranked:
        with torch.no_grad():
            rows = generate(module, PROMPTS, 4, EOS, PAD, CPU)
        said = [Words().decode(row, True) for row in rows]
        assert all(said)
        samples = tuple(Sample("", s, (s if i != 2 else "no",), "made") for i, s in enumerate(said))
    task = Task(
        "toy", (), (), samples, names if ranked else None, "accuracy" if ranked else "rouge_l", TaskConfig("toy", "")
    )
    return Exam(task, PROMPTS, LABELS if ranked else None)


def score_at(stage: int, ranked: bool, batch: int, precision: str = "fp32") -> float:
    engine = make(stage, precision)
    score = take(exam(ranked), engine, Words(), EvaluateConfig(batch=batch, max_new_tokens=4))
    engine.close()
    return score


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_five_prompts_on_two_ranks_at_every_stage(ranks: Any, stage: int, ranked: bool) -> None:
    assert ranks(2)(score_at, stage, ranked, 2) == [RIGHT] * 2


def test_more_ranks_than_prompts_of_a_batch(ranks: Any) -> None:
    assert ranks(2)(score_at, 3, True, 64) == [RIGHT] * 2
