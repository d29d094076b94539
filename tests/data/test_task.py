"""How fields become a sample: templates, label sets, refused fields."""

from __future__ import annotations

import pytest

from dscl.config.parsing import parse_config
from dscl.data.task import BadRecord, DataConfig, SampleBuilder, TaskConfig
from dscl.utils.errors import UserError

LABELS = ("good", "bad")


def make_builder(data_labels: tuple[str, ...] | None = LABELS, **settings: object) -> SampleBuilder:
    config = parse_config(TaskConfig, {"name": "t", "path": "p", **settings})
    return SampleBuilder(config, ("sentence", "prompt"), data_labels, default_template="{sentence}\nAnswer:")


def test_default_and_own_template() -> None:
    fields = {"sentence": "so {labels} it is", "prompt": "x"}
    assert make_builder().build_from_fields(fields, ("good",), "s").prompt == "so {labels} it is\nAnswer:"
    own = make_builder(template="{{{sentence}}} one of {labels}?")
    assert own.build_from_fields(fields, ("good",), "s").prompt == "{so {labels} it is} one of good, bad?"


def test_labels_of_the_recipe_replace_those_of_the_data() -> None:
    assert make_builder(labels=["bad", "good", "so-so"]).labels == ("bad", "good", "so-so")


def test_chat_wraps_prompt_and_answer() -> None:
    sample = make_builder(chat=True).build_from_fields({"sentence": "hi", "prompt": "hi"}, ("bad",), "s")
    assert sample.messages is not None
    assert list(sample.messages) == [
        {"role": "user", "content": "hi\nAnswer:"},
        {"role": "assistant", "content": "bad"},
    ]


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"template": "{sentense}"}, LABELS, "did you mean 'sentence'"),
        ({"template": "{sentence"}, LABELS, "the template is not valid"),
        ({"template": "{sentence:>9}"}, LABELS, "a format after a field's name"),
        ({"template": "{labels} {sentence}"}, None, "there is no label set"),
        ({"metric": "accuracy"}, None, "metric accuracy needs a label set"),
        ({"labels": []}, None, "a list of non-empty texts is needed"),
        ({}, ("a", " "), "a list of non-empty texts is needed"),
        ({}, ("a", 1), "a list of non-empty texts is needed"),
        ({}, ("a", "b", "a"), "label 3 of the label set stands there twice"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], labels: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_builder(labels, **settings)


@pytest.mark.parametrize(
    ("sentence", "answer", "message"),
    [
        ("ok", "god", "the answer is not in the label set"),
        ("ok", "  ", "the answer is empty"),
        ("ok", 3, "the answer is of type int; text is needed"),
        (["ok"], "good", "sentence is of type list"),
        ("broken \udcff byte", "good", "sentence is not valid UTF-8"),
        ("ok", "\ud800", "the answer is not valid UTF-8"),
    ],
)
def test_bad_fields(sentence: object, answer: object, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        make_builder().build_from_fields({"sentence": sentence, "prompt": ""}, (answer,), "s")  # type: ignore[dict-item,arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "cl_bench"}, "did you mean 'cl_benchmark'"),
        ({"train_limit": 0}, "at least 1"),
        ({"dev_share": 0.6}, "at most 0.5"),
        ({"lr": 0.0}, "above 0"),
    ],
)
def test_values_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(TaskConfig, {"name": "t", "path": "p", **settings})


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSCL_CACHE", "elsewhere")
    assert str(DataConfig().cache) == "elsewhere"
    assert str(DataConfig(cache_dir="here").cache) == "here"
    monkeypatch.delenv("DSCL_CACHE")
    assert DataConfig().cache.is_absolute()
