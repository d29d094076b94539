"""Tasks and samples, and the conversion of a record's fields into a sample."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dscl.config.parsing import did_you_mean
from dscl.config.schema import METRICS, DataConfig, TaskConfig
from dscl.utils.errors import UserError

__all__ = ["METRICS", "BadRecord", "DataConfig", "Sample", "SampleBuilder", "Task", "TaskConfig", "check_text"]


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    A chat sample also keeps its `messages`: the last one is the answer, and the tokenizer's chat template turns the
    earlier ones into the prompt.
    """

    prompt: str
    answer: str  # the training target: the first of the references
    references: tuple[str, ...]  # all correct answers
    source: str  # the file and the record, for error messages
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class Task:
    """One task of the stream: its samples by split, its label set and its metric."""

    name: str
    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]
    labels: tuple[str, ...] | None
    metric: str
    settings: TaskConfig


class BadRecord(ValueError):
    """A record is invalid. The caller, which knows the file and the record's number, adds them to the message.

    The message is logged, so it may contain keys and types but not the record's content.
    """


class SampleBuilder:
    """Builds samples from the fields of records with the task's template; checks answers against its label set."""

    def __init__(
        self,
        config: TaskConfig,
        field_names: Sequence[str],
        labels: tuple[str, ...] | None,
        default_template: str = "{prompt}",
    ) -> None:
        self._error_prefix = f"task {config.name!r}"
        self._label_hint = f" ({', '.join(map(repr, config.labels[:20]))})" if config.labels else ""
        self.labels = labels if config.labels is None else config.labels
        self.template = default_template if config.template is None else config.template
        self._has_template = config.template is not None
        self._uses_chat = config.chat
        self.template_fields = self._parse_template([*field_names, "labels"])
        if self.labels is not None:
            self._check_labels(self.labels)
        elif "labels" in self.template_fields:
            raise UserError(
                f"{self._error_prefix}: the template uses {{labels}} but there is no label set; give labels: [...]"
            )
        elif config.metric == "accuracy":
            raise UserError(
                f"{self._error_prefix}: metric accuracy needs a label set and the data names none; "
                "give labels: [...] or metric: exact_match"
            )

    def build_from_fields(self, fields: Mapping[str, str], references: tuple[str, ...], source: str) -> Sample:
        """Build a sample from fields; `fields` must contain all fields of the template."""
        for name in self.template_fields - {"labels"}:
            check_text(fields[name], name)
        self._check_answers(references)
        prompt = self.template.format(**{**fields, "labels": ", ".join(self.labels or ())})
        messages = None
        if self._uses_chat:
            messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": references[0]})
        return Sample(prompt, references[0], references, source, messages)

    def build_from_messages(self, messages: Sequence[Mapping[str, str]], source: str) -> Sample:
        """Build a sample from the messages of a conversation, the last of which is the answer."""
        if self._has_template:
            raise UserError(f"{source}: a template cannot be applied to chat messages; leave `template` out")
        answer = messages[-1]["content"]
        for message in messages[:-1]:
            check_text(message["content"], "a message")
        self._check_answers((answer,))
        prompt = "\n".join(message["content"] for message in messages[:-1])
        return Sample(prompt, answer, (answer,), source, tuple(messages))

    def _check_answers(self, references: tuple[str, ...]) -> None:
        for answer in references:
            check_text(answer, "the answer")
            if not answer.strip():
                raise BadRecord("the answer is empty")
            if self.labels is not None and answer not in self.labels:
                raise BadRecord(f"the answer is not in the label set{self._label_hint}")

    def _check_labels(self, labels: tuple[str, ...]) -> None:
        if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
            raise UserError(
                f"{self._error_prefix}: the label set is empty or not of texts; a list of non-empty texts is needed"
            )
        for number, label in enumerate(labels, start=1):
            if label in labels[: number - 1]:
                raise UserError(
                    f"{self._error_prefix}: label {number} of the label set stands there twice; give each once"
                )

    def _parse_template(self, field_names: Sequence[str]) -> set[str]:
        """The names of the fields that the template uses."""
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(
                f"{self._error_prefix}: the template is not valid ({error}); write a literal brace as {{{{ or }}}}"
            ) from None
        template_fields = {name for _, name, _, _ in parts if name is not None}
        for name in sorted(template_fields):
            if name not in field_names:
                raise UserError(
                    f"{self._error_prefix}: the template uses {{{name}}}{did_you_mean(name, field_names)}; "
                    f"the fields here are {', '.join(field_names)}"
                )
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise UserError(
                f"{self._error_prefix}: the template has a format after a field's name; write {{name}} alone"
            )
        return template_fields


def check_text(value: object, name: str) -> None:
    """Raise BadRecord if the value is not a string or not valid UTF-8 (malformed bytes of a file become surrogates)."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} is of type {type(value).__name__}; text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{name} is not valid UTF-8") from None
