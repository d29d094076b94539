"""Readers of the text-file layouts: TRACE, CL_Benchmark, SuperNI and JSONL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.records import collect_samples, number_records, read_json, read_lines, require_fields
from dscl.data.task import BadRecord, Sample, SampleBuilder
from dscl.utils.errors import UserError

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "eval", "validation"), "test": ("test",)}
# The `datasets` builder for each file suffix, and the files that mark a folder written by `save_to_disk`.
DATASETS_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
}
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TaskSplits:
    """The samples of a task by split.

    If `dev` is None, it is split off from `train`. If `test` is None, `train` holds all samples and is divided.
    """

    train: list[Sample]
    dev: list[Sample] | None
    test: list[Sample] | None
    builder: SampleBuilder


def read_trace(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """TRACE: train.json, eval.json and test.json, lists of {"prompt", "answer"}."""
    builder = SampleBuilder(config, ("prompt",), None)

    def build_sample(record: Any, location: str) -> Sample:
        fields = require_fields(record, ("prompt", "answer"))
        return builder.build_from_fields({"prompt": fields["prompt"]}, (fields["answer"],), location)

    return _read_split_files(
        find_split_files(config.path, ".json"), builder, lambda file: _read_json_list(file, build_sample, data)
    )


def read_cl_benchmark(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """O-LoRA's CL_Benchmark: lists of {"label", "sentence"}, and labels.json with the label set."""
    builder = SampleBuilder(
        config, ("sentence", "prompt"), _read_labels(config), default_template="{sentence}\nAnswer:"
    )

    def build_sample(record: Any, location: str) -> Sample:
        fields = require_fields(record, ("sentence", "label"))
        return builder.build_from_fields(
            {"sentence": fields["sentence"], "prompt": fields["sentence"]}, (fields["label"],), location
        )

    return _read_split_files(
        find_split_files(config.path, ".json"), builder, lambda file: _read_json_list(file, build_sample, data)
    )


def read_superni(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """SuperNI: objects with "Definition" and "Instances": one file, a folder of files, or one file per split."""
    builder = SampleBuilder(
        config, ("definition", "input", "prompt"), None, default_template="{definition}\n\nInput: {input}\nOutput:"
    )

    def read(file: Path) -> list[Sample]:
        definition, instances = _read_superni_file(file)

        def build_sample(record: Any, location: str) -> Sample:
            fields = require_fields(record, ("input", "output"))
            output = [fields["output"]] if isinstance(fields["output"], str) else fields["output"]
            if not isinstance(output, list) or not output:
                raise BadRecord(f"the output is empty or of type {type(output).__name__}; a list of texts is needed")
            text = fields["input"]
            return builder.build_from_fields(
                {"definition": definition, "input": text, "prompt": text}, tuple(output), location
            )

        return collect_samples(file, number_records(file, instances, "instance"), build_sample, data.bad_records)

    path = Path(config.path)
    if path.is_dir() and (path / "train.json").is_file():
        return _read_split_files(find_split_files(config.path, ".json"), builder, read)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no .json file; a SuperNI folder holds one or more")
    return TaskSplits([sample for file in files for sample in read(file)], None, None, builder)


def read_jsonl(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """JSONL: one {"prompt", "completion" or "answer"} or {"messages"} per line.

    The path is a folder with a file per split, or one file to divide into splits.
    """
    names = column_names(config)
    builder = SampleBuilder(config, ("prompt",), None)

    def build_sample(record: Any, location: str) -> Sample:
        if isinstance(record, dict) and "messages" in record and not names:
            return builder.build_from_messages(check_messages(record["messages"]), location)
        prompt = names.get("prompt", "prompt")
        uses_answer_key = isinstance(record, dict) and "completion" not in record and "answer" in record
        answer = names.get("answer", "answer" if uses_answer_key else "completion")
        fields = require_fields(record, (prompt, answer))
        return builder.build_from_fields({"prompt": fields[prompt]}, (fields[answer],), location)

    def read(file: Path) -> list[Sample]:
        return collect_samples(file, read_lines(file), build_sample, data.bad_records)

    path = Path(config.path)
    if path.is_file():
        return TaskSplits(read(path), None, None, builder)
    return _read_split_files(find_split_files(config.path, ".jsonl"), builder, read)


def column_names(config: TaskConfig) -> Mapping[str, str]:
    """The recipe's `columns`: which column holds the prompt and which the answer."""
    for name in config.columns or {}:
        if name not in ("prompt", "answer"):
            raise UserError(f"task {config.name!r}: columns.{name}: no such key; allowed here: prompt, answer")
    return config.columns or {}


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Check the messages of a conversation, whose last one must be the assistant's; return their roles and contents."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRecord("messages is not a list of two or more messages")
    for number, message in enumerate(messages, start=1):
        fields = require_fields(message, ("role", "content"))
        if fields["role"] not in ROLES:
            raise BadRecord(f"message {number} has a role that is not known; allowed: {', '.join(ROLES)}")
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"the last message is the {messages[-1]['role']}'s; the assistant's is needed")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def find_split_files(folder: str, suffix: str) -> dict[str, Path]:
    """The file of each split in a folder; a train and a test file are required."""
    files = {}
    for split, stems in SPLIT_NAMES.items():
        matches = [path for path in (Path(folder) / (stem + suffix) for stem in stems) if path.is_file()]
        if len(matches) > 1:
            file_names = " and ".join(path.name for path in matches)
            raise UserError(f"{folder}: {file_names} would both be the {split} split; keep one of them")
        if not matches and split != "dev":
            raise UserError(f"{folder}: there is no {split} split; expected a file {stems[0]}{suffix}")
        if matches:
            files[split] = matches[0]
    return files


def _read_split_files(
    files: dict[str, Path], builder: SampleBuilder, read: Callable[[Path], list[Sample]]
) -> TaskSplits:
    dev = read(files["dev"]) if "dev" in files else None
    return TaskSplits(read(files["train"]), dev, read(files["test"]), builder)


def _read_json_list(file: Path, build_sample: Callable[[Any, str], Sample], data: DataConfig) -> list[Sample]:
    records = read_json(file)
    if not isinstance(records, list):
        raise UserError(f"{file}: holds a {type(records).__name__}; a list of records is needed")
    return collect_samples(file, number_records(file, records), build_sample, data.bad_records)


def _read_labels(config: TaskConfig) -> tuple[str, ...] | None:
    file = Path(config.path) / "labels.json"
    if config.labels is not None:
        return None
    if not file.is_file():
        raise UserError(f"{config.path}: there is no labels.json; add it, or give the task labels: [...]")
    labels = read_json(file)
    if not isinstance(labels, list):
        raise UserError(f"{file}: holds a {type(labels).__name__}; a list of labels is needed")
    return tuple(labels)


def _read_superni_file(file: Path) -> tuple[str, list[Any]]:
    content = read_json(file)
    if not isinstance(content, dict) or "Definition" not in content or "Instances" not in content:
        raise UserError(f'{file}: not a SuperNI task; an object with "Definition" and "Instances" is needed')
    definition, instances = content["Definition"], content["Instances"]
    lines = [definition] if isinstance(definition, str) else definition
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(f"{file}: Definition is of type {type(definition).__name__}; text or a list of texts is needed")
    if not isinstance(instances, list):
        raise UserError(f"{file}: Instances is a {type(instances).__name__}; a list is needed")
    return "\n".join(lines), instances
