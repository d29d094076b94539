"""Reader for tables on disk and data sets of the Hugging Face hub, through `datasets.load_dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.readers import (
    DATASETS_BUILDERS,
    SAVED_DATASET_FILES,
    SPLIT_NAMES,
    TaskSplits,
    check_messages,
    column_names,
)
from dscl.data.records import collect_samples, number_records, require_fields
from dscl.data.task import BadRecord, Sample, SampleBuilder
from dscl.utils.errors import UserError


def read_tables(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """Read the splits of tables whose columns hold prompt and answer, the fields of a template, or chat messages."""
    splits = _load_splits(config, data)
    features = splits["train"].features
    names = column_names(config)
    if "messages" in features and not names and config.template is None:
        return _build_splits(
            config, data, splits, SampleBuilder(config, (), None, default_template=""), _build_from_messages
        )
    prompt, answer = names.get("prompt", "prompt"), names.get("answer", "answer")
    answer_feature = features.get(answer)
    classes = tuple(answer_feature.names) if isinstance(answer_feature, datasets.ClassLabel) else None
    builder = SampleBuilder(config, _available_fields(config, prompt, answer, list(features)), classes)

    def build_sample(builder: SampleBuilder, row: Any, location: str) -> Sample:
        columns = {name: prompt if name == "prompt" else name for name in builder.template_fields - {"labels"}}
        values = require_fields(row, (*columns.values(), answer))
        fields = {name: _number_to_text(values[column]) for name, column in columns.items()}
        return builder.build_from_fields(fields, _parse_references(values[answer], classes), location)

    return _build_splits(config, data, splits, builder, build_sample)


@contextmanager
def _progress_bars_disabled() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the terminal."""
    bars_were_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars_were_enabled:
            datasets.enable_progress_bars()


def _build_splits(
    config: TaskConfig, data: DataConfig, splits: dict[str, Any], builder: SampleBuilder, build_sample: Any
) -> TaskSplits:
    def read(split: str) -> list[Sample] | None:
        if split not in splits:
            return None
        rows = number_records(Path(f"{config.path} ({split})"), splits[split], "row")
        return collect_samples(
            f"{config.path} ({split})",
            rows,
            lambda row, location: build_sample(builder, row, location),
            data.bad_records,
        )

    return TaskSplits(read("train") or [], read("dev"), read("test"), builder)


def _load_splits(config: TaskConfig, data: DataConfig) -> dict[str, Any]:
    path = Path(config.path)
    cache = str(data.cache / "datasets")
    try:
        with _progress_bars_disabled():
            if path.is_dir() and any((path / name).is_file() for name in SAVED_DATASET_FILES):
                loaded = datasets.load_from_disk(str(path))
            elif path.is_file():
                if path.suffix not in DATASETS_BUILDERS:
                    known = ", ".join(DATASETS_BUILDERS)
                    raise UserError(f"{path}: no reader for {path.suffix!r} files; known: {known}")
                options = {"sep": "\t"} if path.suffix == ".tsv" else {}
                format_name = DATASETS_BUILDERS[path.suffix]
                loaded = datasets.load_dataset(format_name, data_files=str(path), cache_dir=cache, **options)
            else:
                loaded = datasets.load_dataset(config.path, cache_dir=cache)
    except UserError:
        raise
    except Exception as error:  # the library's readers raise many types of errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{config.path}: datasets.load_dataset cannot read it ({reason})") from None
    return _select_splits(config, loaded)


def _select_splits(config: TaskConfig, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        return {"train": loaded}
    splits = {split: loaded[name] for split, names in SPLIT_NAMES.items() for name in names if name in loaded}
    if "train" not in splits or ("test" not in splits and len(loaded) > 1):
        needed = "test" if "train" in splits else "train"
        raise UserError(f"{config.path}: there is no {needed} split; it has {', '.join(map(str, loaded))}")
    return splits


def _available_fields(config: TaskConfig, prompt: str, answer: str, columns: list[str]) -> list[str]:
    """Check that the required columns exist; return the fields that a template may use."""
    needed = {"answer": answer}
    if config.template is None or "prompt" in (config.columns or {}):
        needed["prompt"] = prompt
    for name, column in needed.items():
        if column not in columns:
            raise UserError(
                f"{config.path}: there is no column {column!r}; its columns are {', '.join(columns)}; "
                f"name the one with the {name} as columns: {{{name}: ...}}"
            )
    return [*(["prompt"] if prompt in columns else []), *(column for column in columns if column != "prompt")]


def _build_from_messages(builder: SampleBuilder, row: Any, location: str) -> Sample:
    return builder.build_from_messages(check_messages(row["messages"]), location)


def _parse_references(value: Any, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    if classes is not None:
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise BadRecord("it has no label (none of the column's classes)")
        return (classes[value],)
    values = value if isinstance(value, list) and value else [value]
    return tuple(_number_to_text(item) for item in values)


def _number_to_text(value: Any) -> Any:
    """Convert a number to text: CSV readers parse columns that hold only numbers as numbers."""
    return str(value) if isinstance(value, int | float) else value
