"""What a task is: its settings in the recipe, its samples, and how the fields of a record become a sample."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dscl.config.parsing import nearest
from dscl.config.schema import METRICS, DataConfig, TaskConfig
from dscl.utils.errors import UserError

__all__ = ["METRICS", "BadRecord", "DataConfig", "Sample", "SampleMaker", "Task", "TaskConfig", "check_text"]


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    `references` are all the right answers and `answer` is the first of them. A chat record keeps its `messages`, of
    which the last is the answer; the earlier ones become the prompt through the tokenizer's chat template. `source`
    says in which file and record the sample stands, for error messages.
    """

    prompt: str
    answer: str
    references: tuple[str, ...]
    source: str
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class Task:
    """One task of the stream, read and split."""

    name: str
    train: tuple[Sample, ...]
    dev: tuple[Sample, ...]
    test: tuple[Sample, ...]
    labels: tuple[str, ...] | None
    metric: str
    settings: TaskConfig


class BadRecord(ValueError):
    """One record is not valid. The message says what is wrong; who reads the file knows where.

    It lands in logs, so it tells keys and types, and nothing of what the record holds.
    """


class SampleMaker:
    """Makes samples from the fields of records, by the task's template and under its label set."""

    def __init__(
        self, config: TaskConfig, fields: Sequence[str], labels: tuple[str, ...] | None, default: str = "{prompt}"
    ) -> None:
        self.where = f"task {config.name!r}"
        self._listed = f" ({', '.join(map(repr, config.labels[:20]))})" if config.labels else ""  # by the recipe
        self.labels = labels if config.labels is None else config.labels
        self.template = default if config.template is None else config.template
        self._given = config.template is not None
        self._chat = config.chat
        self.used = self._fields_of_template([*fields, "labels"])
        if self.labels is not None:
            self._check_labels(self.labels)
        elif "labels" in self.used:
            raise UserError(f"{self.where}: the template uses {{labels}} but there is no label set; give labels: [...]")
        elif config.metric == "accuracy":
            raise UserError(
                f"{self.where}: metric accuracy needs a label set and the data names none; "
                "give labels: [...] or metric: exact_match"
            )

    def sample(self, fields: Mapping[str, str], references: tuple[str, ...], source: str) -> Sample:
        """A plain sample; `fields` holds at least what the template uses."""
        for name in self.used - {"labels"}:
            check_text(fields[name], name)
        self._check_answers(references)
        prompt = self.template.format(**{**fields, "labels": ", ".join(self.labels or ())})
        messages = None
        if self._chat:
            messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": references[0]})
        return Sample(prompt, references[0], references, source, messages)

    def chat(self, messages: Sequence[Mapping[str, str]], source: str) -> Sample:
        """A sample from the messages of a conversation, the last of which is the answer."""
        if self._given:
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
                raise BadRecord(f"the answer is not in the label set{self._listed}")

    def _check_labels(self, labels: tuple[str, ...]) -> None:
        if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
            raise UserError(
                f"{self.where}: the label set is empty or not of texts; a list of non-empty texts is needed"
            )
        for number, label in enumerate(labels, start=1):
            if label in labels[: number - 1]:
                raise UserError(f"{self.where}: label {number} of the label set stands there twice; give each once")

    def _fields_of_template(self, fields: Sequence[str]) -> set[str]:
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(
                f"{self.where}: the template is not valid ({error}); write a literal brace as {{{{ or }}}}"
            ) from None
        used = {name for _, name, _, _ in parts if name is not None}
        for name in sorted(used):
            if name not in fields:
                raise UserError(
                    f"{self.where}: the template uses {{{name}}}{nearest(name, fields)}; "
                    f"the fields here are {', '.join(fields)}"
                )
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise UserError(f"{self.where}: the template has a format after a field's name; write {{name}} alone")
        return used


def check_text(value: object, name: str) -> None:
    """Refuse what is not text, or is text that cannot be written as UTF-8 (a file's broken bytes end up as such)."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} is of type {type(value).__name__}; text is needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{name} is not valid UTF-8") from None
