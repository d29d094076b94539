"""The known layouts of a task's data, and how they are told apart by what they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data import readers
from dscl.data.readers import BUILDERS, SAVED, Splits
from dscl.data.records import read_json
from dscl.utils.errors import UserError


def tables(config: TaskConfig, data: DataConfig) -> Splits:
    """Whatever `datasets` reads; with it come pandas and pyarrow, so it is imported only for a task that needs it."""
    from dscl.data.tables import tables as read

    return read(config, data)


READERS: dict[str, Callable[[TaskConfig, DataConfig], Splits]] = {
    "trace": readers.trace,
    "cl_benchmark": readers.cl_benchmark,
    "superni": readers.superni,
    "jsonl": readers.jsonl,
    "datasets": tables,
}
LAYOUTS = (
    'trace (train.json, eval.json, test.json: lists of {"prompt", "answer"}); '
    'cl_benchmark (train.json, test.json: lists of {"label", "sentence"}; labels.json); '
    'superni (.json objects with "Definition" and "Instances"); '
    "jsonl (train.jsonl, test.jsonl or one .jsonl: prompt and completion, or messages); "
    "datasets (tables such as .csv and .parquet, or a hub id, with columns)"
)


def read_splits(config: TaskConfig, data: DataConfig) -> Splits:
    """Read a task's data in the layout that the recipe names or, when it names none, in the one that is found."""
    path = Path(config.path)
    if config.format != "datasets" and not path.exists():
        raise UserError(
            f"task {config.name!r}: {config.path}: no such file or folder; correct `path` "
            "(a data set of the hub is named with format: datasets)"
        )
    layout = config.format or recognise(path)
    if config.columns is not None and layout not in ("jsonl", "datasets"):
        raise UserError(f"task {config.name!r}: columns does not apply to format {layout}; leave it out")
    if config.format in ("trace", "cl_benchmark") and not path.is_dir():
        raise UserError(f"task {config.name!r}: {config.path} is a file; format {layout} needs a folder")
    return READERS[layout](config, data)


def recognise(path: Path) -> str:
    """The name of the layout at an existing path."""
    if path.is_file():
        found = _recognise_file(path)
    elif (path / "train.json").is_file():
        found = _recognise_json(read_json(path / "train.json"))
    elif (path / "train.jsonl").is_file():
        found = "jsonl"
    else:
        found = _recognise_folder(path)
    if found is None:
        raise UserError(
            f"{path}: no known layout; found {_describe(path)}; known are {LAYOUTS}; or name one with `format`"
        )
    return found


def _recognise_file(path: Path) -> str | None:
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".json":
        return "superni" if _recognise_json(read_json(path)) == "superni" else None
    return "datasets" if path.suffix in BUILDERS else None


def _recognise_folder(path: Path) -> str | None:
    if any((path / name).is_file() for name in SAVED):
        return "datasets"
    files = sorted(path.glob("*.json"))
    if files and _recognise_json(read_json(files[0])) == "superni":
        return "superni"
    is_table = any(file.suffix in (".csv", ".tsv", ".parquet", ".arrow") for file in path.rglob("*"))
    return "datasets" if is_table else None


def _recognise_json(content: Any) -> str | None:
    if isinstance(content, dict):
        return "superni" if {"Definition", "Instances"} <= content.keys() else None
    if not isinstance(content, list):
        return None
    # Not the first record alone: a bad record must not hide what the others are.
    for record in content[:100]:
        if isinstance(record, dict) and {"prompt", "answer"} <= record.keys():
            return "trace"
        if isinstance(record, dict) and {"sentence", "label"} <= record.keys():
            return "cl_benchmark"
    return None


def _describe(path: Path) -> str:
    file = path / "train.json" if (path / "train.json").is_file() else path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir())
        return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) or "an empty folder"
    if file.suffix != ".json":
        return f"a {file.suffix or 'nameless'} file"
    content = read_json(file)
    first = content[0] if isinstance(content, list) and content else content
    fields = f" with the fields {', '.join(map(str, first))}" if isinstance(first, dict) else ""
    return f"{file.name}, a {type(content).__name__} of {type(first).__name__}{fields}"
