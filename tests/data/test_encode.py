"""Token ids of samples: targets, truncation, the prompts of an evaluation, and the cache."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dscl.data import encode as encode_module
from dscl.data.encode import answer_token_budget, encode_answers, encode_dataset, encode_prompts, tokenizer_fingerprint
from dscl.data.task import Sample
from dscl.utils.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def sample(prompt: str, answer: str, number: int = 1) -> Sample:
    return Sample(prompt, answer, (answer,), f"file.json, record {number}")


SAMPLES = [
    sample("the cat sat on a mat\nAnswer:", "in town"),
    sample("Grüße, 漢字 \U0001f600?", "ñandú \U0001f600"),
    sample("the dogs ran over green hills and birds sang of rain or snow " * 5, "rain"),
    sample("", "snow"),
]


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    return with_template


@pytest.fixture
def tokenizer_without_bos(tokenizer_folder: Path, tmp_path: Path) -> Any:
    """The same tokenizer, which has a bos token and does not prepend it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    return AutoTokenizer.from_pretrained(str(folder))


def test_prompt_and_answer_are_tokenised_apart(tokenizer: Any, tmp_path: Path) -> None:
    split = encode_dataset(SAMPLES, tokenizer, max_length=512, cache=tmp_path)
    assert len(split) == len(SAMPLES)
    for i, original in enumerate(SAMPLES):
        prompt, answer = split[i]
        assert prompt == tokenizer(original.prompt)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id
        assert answer == [*tokenizer(original.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(answer[:-1]) == original.answer
        assert (split.prompt_lengths[i], split.answer_lengths[i]) == (len(prompt), len(answer))
    assert split.num_truncated == 0
    assert split.num_tokens == sum(len(split[i][0]) + len(split[i][1]) for i in range(len(split)))


def test_bos_only_where_the_tokenizer_puts_it(tokenizer_without_bos: Any, tmp_path: Path) -> None:
    split = encode_dataset(SAMPLES[:3], tokenizer_without_bos, max_length=512, cache=tmp_path)
    assert split[0][0] == tokenizer_without_bos(SAMPLES[0].prompt)["input_ids"]
    assert split[0][0][0] != tokenizer_without_bos.bos_token_id
    for function in (encode_prompts, lambda *a, **k: encode_dataset(*a, **k, cache=tmp_path)):
        with pytest.raises(UserError, match=r"record 1: the prompt is empty"):
            function(SAMPLES[3:], tokenizer_without_bos, max_length=512, answer_budget=1)


@pytest.mark.parametrize("max_length", [8, 9, 20, 33, 60, 500])
def test_truncation_keeps_bos_end_and_answer(tokenizer: Any, tmp_path: Path, max_length: int) -> None:
    samples = [SAMPLES[0], SAMPLES[2], sample("town " * 40, "the cat sat", 3)]
    whole = encode_dataset(samples, tokenizer, max_length=512, cache=tmp_path)
    split = encode_dataset(samples, tokenizer, max_length=max_length, cache=tmp_path)
    num_cut = 0
    for i in range(len(samples)):
        (prompt, answer), (full_prompt, full_answer) = split[i], whole[i]
        assert answer == full_answer
        if len(full_prompt) + len(full_answer) <= max_length:
            assert prompt == full_prompt
            continue
        num_cut += 1
        assert len(prompt) + len(answer) == max_length
        assert prompt[0] == tokenizer.bos_token_id
        if len(prompt) > 1:
            assert prompt[1:] == full_prompt[-(len(prompt) - 1) :]
    assert split.num_truncated == num_cut
    assert (num_cut > 0) == (max_length < 100)


def test_an_answer_that_does_not_fit_is_named(tokenizer: Any, tmp_path: Path) -> None:
    samples = [SAMPLES[0], sample("q", "the cat sat on a mat and sang of rain", 17)]
    length = len(encode_answers([samples[1].answer], tokenizer)[0])
    encode_dataset(samples, tokenizer, max_length=length + 1, cache=tmp_path)
    with pytest.raises(UserError, match=rf"file\.json, record 17: .*train\.max_length={length + 1} or more"):
        encode_dataset(samples, tokenizer, max_length=length, cache=tmp_path)


def test_evaluation_sees_the_prompts_of_training(tokenizer: Any, tmp_path: Path) -> None:
    labels = ("rain", "green hills over every town", "snow")
    samples = [sample("the cat sat on a mat " * i, labels[i % 3]) for i in range(1, 20)]
    budget = answer_token_budget(labels, tokenizer, max_new_tokens=99)
    assert budget == max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels) + 1
    assert answer_token_budget(None, tokenizer, max_new_tokens=99) == 99
    split = encode_dataset(samples, tokenizer, max_length=48, answer_budget=budget, cache=tmp_path)
    prompts = encode_prompts(samples, tokenizer, max_length=48, answer_budget=budget)
    assert prompts.ids == [split[i][0] for i in range(len(samples))]
    assert 0 < prompts.num_truncated == split.num_truncated < len(samples)
    assert max(map(len, prompts.ids)) == 48 - budget
    with pytest.raises(UserError, match="max_length 8 leaves no room for a prompt beside an answer of 8 tokens"):
        encode_prompts(samples, tokenizer, max_length=8, answer_budget=8)


def test_chat_goes_through_the_template(chat_tokenizer: Any, tokenizer: Any, tmp_path: Path) -> None:
    messages = (
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "sat on"},
        {"role": "assistant", "content": "a mat"},
    )
    chat = Sample("unused", "a mat", ("a mat",), "chat.jsonl, line 3", messages)
    prompt, answer = encode_dataset([chat, SAMPLES[0]], chat_tokenizer, max_length=200, cache=tmp_path)[0]
    text = "<s>[system] the cat\n[user] sat on\n[assistant]"
    assert prompt == chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt.count(chat_tokenizer.bos_token_id) == 1
    assert answer == encode_answers(["a mat"], tokenizer)[0]
    with pytest.raises(UserError, match=r"chat\.jsonl, line 3: .*no chat template"):
        encode_dataset([chat], tokenizer, max_length=200, cache=tmp_path)
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"chat\.jsonl, line 3: .*roles must alternate"):
        encode_dataset([chat], chat_tokenizer, max_length=200, cache=tmp_path)


def test_encoded_once_and_found_again(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_dataset(SAMPLES, tokenizer, max_length=64, cache=tmp_path)
    monkeypatch.setattr(encode_module, "_tokenize_samples", lambda *_: pytest.fail("encoded again"))
    again = encode_dataset(copy.deepcopy(SAMPLES), tokenizer, max_length=64, cache=tmp_path)
    assert [again[i] for i in range(4)] == [first[i] for i in range(4)]
    assert again.num_truncated == first.num_truncated == 1
    assert np.array_equal(again.prompt_lengths, first.prompt_lengths)
    assert len(list(tmp_path.glob("*.lock"))) == 1


def test_whatever_decides_the_ids_decides_the_cache(tokenizer: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    variants: list[tuple[list[Sample], Any, dict[str, int]]] = [
        (SAMPLES, tokenizer, {"max_length": 64}),
        (SAMPLES, tokenizer, {"max_length": 65}),
        (SAMPLES, tokenizer, {"max_length": 64, "answer_budget": 9}),
        (SAMPLES, chat_tokenizer, {"max_length": 64}),
        (SAMPLES[::-1], tokenizer, {"max_length": 64}),
        ([*SAMPLES[:3], sample("", "snows")], tokenizer, {"max_length": 64}),
        ([*SAMPLES[:3], sample("s", "now")], tokenizer, {"max_length": 64}),
    ]
    for samples, variant_tokenizer, options in variants:
        encode_dataset(samples, variant_tokenizer, cache=tmp_path, **options)
    assert len(list(tmp_path.glob("*.lock"))) == len(variants)


def test_fingerprint_is_of_the_content(tokenizer_folder: Path, tokenizer: Any, tokenizer_without_bos: Any) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    other.pad_token = other.eos_token
    before = tokenizer_fingerprint(other)
    other(["a", "the cat sat"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(other) == before == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer_without_bos) != before
    other.eos_token = other.unk_token
    assert tokenizer_fingerprint(other) != before


def test_more_samples_than_a_chunk(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_dataset(SAMPLES, tokenizer, max_length=64, cache=tmp_path / "a")
    monkeypatch.setattr(encode_module, "CHUNK_SIZE", 3)
    chunked = encode_dataset(SAMPLES, tokenizer, max_length=64, cache=tmp_path / "b")
    assert [chunked[i] for i in range(4)] == [whole[i] for i in range(4)]
    assert encode_prompts(SAMPLES, tokenizer, max_length=64, answer_budget=4).num_truncated == 1


def test_no_samples(tokenizer: Any, tmp_path: Path) -> None:
    split = encode_dataset([], tokenizer, max_length=64, cache=tmp_path)
    assert (len(split), split.num_truncated, split.num_tokens) == (0, 0, 0)
