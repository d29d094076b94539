"""The answers to lm-eval equal plain passes of the model; without lm-eval there is one clear line."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.training import lm_eval
from dscl.training.lm_eval import LmEvalModel, evaluate_with_lm_eval
from dscl.utils.errors import UserError

WORDS = ["the", "film", "was", "good", "bad", "dull", "a", "joy", "I", "loved", "it", ".", "!"]
SHAPE = LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
    vocab_size=20, bos_token_id=1, eos_token_id=2, max_position_embeddings=12,
)  # fmt: skip


class Words:
    """A tokenizer of single words; pieces are separated by single spaces."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    pad_token = eos_token = "x"

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [3 + WORDS.index(word) for word in text.split(" ") if word]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(WORDS[i - 3] for i in ids if 3 <= i < 3 + len(WORDS))


@pytest.fixture
def lm_eval_model() -> LmEvalModel:
    torch.manual_seed(4)
    model = LlamaForCausalLM(SHAPE)
    model.lm_head.weight.data *= 20.0
    engine: Any = SimpleNamespace(module=model, device=torch.device("cpu"))
    return LmEvalModel(engine, Words(), 2)


def make_request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def reference_log_prob(lm_eval_model: LmEvalModel, ids: list[int], count: int) -> tuple[float, bool]:
    """log p of the last tokens, and whether each is the likeliest."""
    module: Any = lm_eval_model.engine.module
    with torch.no_grad():
        log_probs = module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(ids) - count, len(ids))
    total = sum(float(log_probs[place - 1, ids[place]]) for place in places)
    return total, all(int(log_probs[place - 1].argmax()) == ids[place] for place in places)


def test_continuations_are_judged_by_their_own_tokens(lm_eval_model: LmEvalModel) -> None:
    pairs = [("the film was", " good"), ("the film", " was a joy"), ("I", " loved it ."), ("", "bad"), ("it", "")]
    results = lm_eval_model.loglikelihood([make_request(*pair) for pair in pairs])
    for (context, continuation), (value, exact) in zip(pairs, results, strict=True):
        ids, count = Words()(context + continuation)["input_ids"], len(continuation.split())
        expected, greedy = reference_log_prob(lm_eval_model, ids, count)
        assert value == pytest.approx(expected, abs=1e-4)
        assert exact == greedy
    best = lm_eval.LmEvalModel(lm_eval_model.engine, Words(), 4)
    (text,) = best.generate_until([make_request("the film was", {"until": [], "max_gen_toks": 1})])
    if text:
        assert best.loglikelihood([make_request("the film was", " " + text)])[0][1]


def test_long_texts_are_judged_stretch_by_stretch(lm_eval_model: LmEvalModel) -> None:
    text = " ".join(["the film was a joy ."] * 4)
    ids = Words()(text, add_special_tokens=False)["input_ids"]
    stretches = [ids[at : at + 11] for at in range(0, len(ids), 11)]
    assert len(stretches) == 3
    expected = sum(reference_log_prob(lm_eval_model, [1, *part], len(part))[0] for part in stretches)
    assert lm_eval_model.loglikelihood_rolling([make_request(text)]) == [pytest.approx(expected, abs=1e-3)]


def test_answers_end_where_the_task_says(lm_eval_model: LmEvalModel) -> None:
    (whole,) = lm_eval_model.generate_until([make_request("I loved", {"max_gen_toks": 6})])
    ids = Words()("I loved")["input_ids"]
    module: Any = lm_eval_model.engine.module
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    assert whole == Words().decode(ids[3:], skip_special_tokens=True)
    assert whole
    stop = whole.split(" ")[-1]
    (short,) = lm_eval_model.generate_until([make_request("I loved", {"until": [stop], "max_gen_toks": 6})])
    assert short == whole[: whole.index(stop)]


def test_without_lm_eval_there_is_one_line(monkeypatch: pytest.MonkeyPatch, lm_eval_model: LmEvalModel) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--lm-eval: given arc,piqa, but lm-eval cannot be imported .*pip install"):
        evaluate_with_lm_eval(["arc", "piqa"], None, lm_eval_model.engine, Words(), 4)
    assert evaluate_with_lm_eval([], None, lm_eval_model.engine, Words(), 4) == {}
