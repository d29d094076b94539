"""One reader for each layout of text files: TRACE, CL_Benchmark, SuperNI and JSONL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.records import collect, fields_of, numbered, read_json, read_lines
from dscl.data.task import BadRecord, Sample, SampleMaker
from dscl.utils.errors import UserError

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "eval", "validation"), "test": ("test",)}
# Of tables that `datasets` reads: the builder for each kind of file, and what marks a folder that it has saved.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
SAVED = ("dataset_dict.json", "state.json")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Splits:
    """What a layout holds. No `dev`: it is carved from train. No `test`: `train` is everything, to be divided."""

    train: list[Sample]
    dev: list[Sample] | None
    test: list[Sample] | None
    maker: SampleMaker


def trace(config: TaskConfig, data: DataConfig) -> Splits:
    """TRACE: train.json, eval.json and test.json, lists of {"prompt", "answer"}."""
    maker = SampleMaker(config, ("prompt",), None)

    def convert(record: Any, where: str) -> Sample:
        found = fields_of(record, ("prompt", "answer"))
        return maker.sample({"prompt": found["prompt"]}, (found["answer"],), where)

    return _from_files(split_files(config.path, ".json"), maker, lambda file: _list(file, convert, data))


def cl_benchmark(config: TaskConfig, data: DataConfig) -> Splits:
    """O-LoRA's CL_Benchmark: lists of {"label", "sentence"}, and labels.json with the label set."""
    maker = SampleMaker(config, ("sentence", "prompt"), _label_set(config), default="{sentence}\nAnswer:")

    def convert(record: Any, where: str) -> Sample:
        found = fields_of(record, ("sentence", "label"))
        return maker.sample({"sentence": found["sentence"], "prompt": found["sentence"]}, (found["label"],), where)

    return _from_files(split_files(config.path, ".json"), maker, lambda file: _list(file, convert, data))


def superni(config: TaskConfig, data: DataConfig) -> Splits:
    """SuperNI: objects of a "Definition" and "Instances", one file or a folder of them, or one file for each split."""
    maker = SampleMaker(
        config, ("definition", "input", "prompt"), None, default="{definition}\n\nInput: {input}\nOutput:"
    )

    def read(file: Path) -> list[Sample]:
        definition, instances = _superni_file(file)

        def convert(record: Any, where: str) -> Sample:
            found = fields_of(record, ("input", "output"))
            output = [found["output"]] if isinstance(found["output"], str) else found["output"]
            if not isinstance(output, list) or not output:
                raise BadRecord(f"the output is empty or of type {type(output).__name__}; a list of texts is needed")
            text = found["input"]
            return maker.sample({"definition": definition, "input": text, "prompt": text}, tuple(output), where)

        return collect(file, numbered(file, instances, "instance"), convert, data.bad_records)

    path = Path(config.path)
    if path.is_dir() and (path / "train.json").is_file():
        return _from_files(split_files(config.path, ".json"), maker, read)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no .json file; a SuperNI folder holds one or more")
    return Splits([sample for file in files for sample in read(file)], None, None, maker)


def jsonl(config: TaskConfig, data: DataConfig) -> Splits:
    """JSONL: {"prompt", "completion" or "answer"} or {"messages"} a line; a folder of splits, or one file to divide."""
    names = column_names(config)
    maker = SampleMaker(config, ("prompt",), None)

    def convert(record: Any, where: str) -> Sample:
        if isinstance(record, dict) and "messages" in record and not names:
            return maker.chat(check_messages(record["messages"]), where)
        prompt = names.get("prompt", "prompt")
        spelled_answer = isinstance(record, dict) and "completion" not in record and "answer" in record
        answer = names.get("answer", "answer" if spelled_answer else "completion")
        found = fields_of(record, (prompt, answer))
        return maker.sample({"prompt": found[prompt]}, (found[answer],), where)

    def read(file: Path) -> list[Sample]:
        return collect(file, read_lines(file), convert, data.bad_records)

    path = Path(config.path)
    if path.is_file():
        return Splits(read(path), None, None, maker)
    return _from_files(split_files(config.path, ".jsonl"), maker, read)


def column_names(config: TaskConfig) -> Mapping[str, str]:
    """The recipe's `columns`, which may name prompt and answer."""
    for name in config.columns or {}:
        if name not in ("prompt", "answer"):
            raise UserError(f"task {config.name!r}: columns.{name}: no such key; allowed here: prompt, answer")
    return config.columns or {}


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages of a conversation whose last one is the assistant's."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRecord("messages is not a list of two or more messages")
    for number, message in enumerate(messages, start=1):
        found = fields_of(message, ("role", "content"))
        if found["role"] not in ROLES:
            raise BadRecord(f"message {number} has a role that is not known; allowed: {', '.join(ROLES)}")
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"the last message is the {messages[-1]['role']}'s; the assistant's is needed")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def split_files(folder: str, suffix: str) -> dict[str, Path]:
    """The file of each split that a folder holds; train and test must be there."""
    files = {}
    for split, stems in SPLIT_NAMES.items():
        found = [path for path in (Path(folder) / (stem + suffix) for stem in stems) if path.is_file()]
        if len(found) > 1:
            shown = " and ".join(path.name for path in found)
            raise UserError(f"{folder}: {shown} would both be the {split} split; keep one of them")
        if not found and split != "dev":
            raise UserError(f"{folder}: there is no {split} split; expected a file {stems[0]}{suffix}")
        if found:
            files[split] = found[0]
    return files


def _from_files(files: dict[str, Path], maker: SampleMaker, read: Callable[[Path], list[Sample]]) -> Splits:
    dev = read(files["dev"]) if "dev" in files else None
    return Splits(read(files["train"]), dev, read(files["test"]), maker)


def _list(file: Path, convert: Callable[[Any, str], Sample], data: DataConfig) -> list[Sample]:
    records = read_json(file)
    if not isinstance(records, list):
        raise UserError(f"{file}: holds a {type(records).__name__}; a list of records is needed")
    return collect(file, numbered(file, records), convert, data.bad_records)


def _label_set(config: TaskConfig) -> tuple[str, ...] | None:
    file = Path(config.path) / "labels.json"
    if config.labels is not None:
        return None
    if not file.is_file():
        raise UserError(f"{config.path}: there is no labels.json; add it, or give the task labels: [...]")
    labels = read_json(file)
    if not isinstance(labels, list):
        raise UserError(f"{file}: holds a {type(labels).__name__}; a list of labels is needed")
    return tuple(labels)


def _superni_file(file: Path) -> tuple[str, list[Any]]:
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
