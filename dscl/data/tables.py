"""The reader for whatever `datasets.load_dataset` reads: tables on disk, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data.readers import BUILDERS, SAVED, SPLIT_NAMES, Splits, check_messages, column_names
from dscl.data.records import collect, fields_of, numbered
from dscl.data.task import BadRecord, Sample, SampleMaker
from dscl.utils.errors import UserError


def tables(config: TaskConfig, data: DataConfig) -> Splits:
    """Splits of tables whose columns hold prompt and answer, or a template's fields."""
    parts = _load(config, data)
    features = parts["train"].features
    names = column_names(config)
    if "messages" in features and not names and config.template is None:
        return _read(config, data, parts, SampleMaker(config, (), None, default=""), _chat)
    prompt, answer = names.get("prompt", "prompt"), names.get("answer", "answer")
    kind = features.get(answer)
    classes = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    maker = SampleMaker(config, _offered(config, prompt, answer, list(features)), classes)

    def convert(maker: SampleMaker, row: Any, where: str) -> Sample:
        columns = {name: prompt if name == "prompt" else name for name in maker.used - {"labels"}}
        found = fields_of(row, (*columns.values(), answer))
        fields = {name: _text(found[column]) for name, column in columns.items()}
        return maker.sample(fields, _references(found[answer], classes), where)

    return _read(config, data, parts, maker, convert)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the terminal."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read(config: TaskConfig, data: DataConfig, parts: dict[str, Any], maker: SampleMaker, convert: Any) -> Splits:
    def read(split: str) -> list[Sample] | None:
        if split not in parts:
            return None
        rows = numbered(Path(f"{config.path} ({split})"), parts[split], "row")
        return collect(f"{config.path} ({split})", rows, lambda r, where: convert(maker, r, where), data.bad_records)

    return Splits(read("train") or [], read("dev"), read("test"), maker)


def _load(config: TaskConfig, data: DataConfig) -> dict[str, Any]:
    path = Path(config.path)
    cache = str(data.cache / "datasets")
    try:
        with _without_bars():
            if path.is_dir() and any((path / name).is_file() for name in SAVED):
                loaded = datasets.load_from_disk(str(path))
            elif path.is_file():
                if path.suffix not in BUILDERS:
                    raise UserError(f"{path}: no reader for {path.suffix!r} files; known: {', '.join(BUILDERS)}")
                options = {"sep": "\t"} if path.suffix == ".tsv" else {}
                builder = BUILDERS[path.suffix]
                loaded = datasets.load_dataset(builder, data_files=str(path), cache_dir=cache, **options)
            else:
                loaded = datasets.load_dataset(config.path, cache_dir=cache)
    except UserError:
        raise
    except Exception as error:  # whatever the library's many readers raise: all of it is about the given path
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{config.path}: datasets.load_dataset cannot read it ({reason})") from None
    return _by_split(config, loaded)


def _by_split(config: TaskConfig, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        return {"train": loaded}
    parts = {split: loaded[name] for split, names in SPLIT_NAMES.items() for name in names if name in loaded}
    if "train" not in parts or ("test" not in parts and len(loaded) > 1):
        needed = "test" if "train" in parts else "train"
        raise UserError(f"{config.path}: there is no {needed} split; it has {', '.join(map(str, loaded))}")
    return parts


def _offered(config: TaskConfig, prompt: str, answer: str, columns: list[str]) -> list[str]:
    """The fields that a template may use, after a check that the columns which are needed exist."""
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


def _chat(maker: SampleMaker, row: Any, where: str) -> Sample:
    return maker.chat(check_messages(row["messages"]), where)


def _references(value: Any, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    if classes is not None:
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise BadRecord("it has no label (none of the column's classes)")
        return (classes[value],)
    values = value if isinstance(value, list) and value else [value]
    return tuple(_text(item) for item in values)


def _text(value: Any) -> Any:
    """Numbers as text: CSV readers make numbers of columns that hold nothing else."""
    return str(value) if isinstance(value, int | float) else value
