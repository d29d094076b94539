"""The known layouts of a task's data, and their detection from the content of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dscl.config.schema import DataConfig, TaskConfig
from dscl.data import readers
from dscl.data.readers import DATASETS_BUILDERS, SAVED_DATASET_FILES, TaskSplits
from dscl.data.records import read_json
from dscl.utils.errors import UserError


def _read_tables(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """Read tables with the `datasets` library. It loads pandas and pyarrow, so it is imported only when needed."""
    from dscl.data.tables import read_tables

    return read_tables(config, data)


READERS: dict[str, Callable[[TaskConfig, DataConfig], TaskSplits]] = {
    "trace": readers.read_trace,
    "cl_benchmark": readers.read_cl_benchmark,
    "superni": readers.read_superni,
    "jsonl": readers.read_jsonl,
    "datasets": _read_tables,
}
LAYOUTS = (
    'trace (train.json, eval.json, test.json: lists of {"prompt", "answer"}); '
    'cl_benchmark (train.json, test.json: lists of {"label", "sentence"}; labels.json); '
    'superni (.json objects with "Definition" and "Instances"); '
    "jsonl (train.jsonl, test.jsonl or one .jsonl: prompt and completion, or messages); "
    "datasets (tables such as .csv and .parquet, or a hub id, with columns)"
)


def read_splits(config: TaskConfig, data: DataConfig) -> TaskSplits:
    """Read a task's data in the layout that the recipe names, or else in the detected layout."""
    path = Path(config.path)
    if config.format != "datasets" and not path.exists():
        raise UserError(
            f"task {config.name!r}: {config.path}: no such file or folder; correct `path` "
            "(a data set of the hub is named with format: datasets)"
        )
    layout = config.format or detect_layout(path)
    if config.columns is not None and layout not in ("jsonl", "datasets"):
        raise UserError(f"task {config.name!r}: columns does not apply to format {layout}; leave it out")
    if config.format in ("trace", "cl_benchmark") and not path.is_dir():
        raise UserError(f"task {config.name!r}: {config.path} is a file; format {layout} needs a folder")
    return READERS[layout](config, data)


def detect_layout(path: Path) -> str:
    """The name of the layout at an existing path."""
    if path.is_file():
        layout = _detect_file_layout(path)
    elif (path / "train.json").is_file():
        layout = _detect_json_layout(read_json(path / "train.json"))
    elif (path / "train.jsonl").is_file():
        layout = "jsonl"
    else:
        layout = _detect_folder_layout(path)
    if layout is None:
        raise UserError(
            f"{path}: no known layout; found {_describe_contents(path)}; known are {LAYOUTS}; or name one with `format`"
        )
    return layout


def _detect_file_layout(path: Path) -> str | None:
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".json":
        return "superni" if _detect_json_layout(read_json(path)) == "superni" else None
    return "datasets" if path.suffix in DATASETS_BUILDERS else None


def _detect_folder_layout(path: Path) -> str | None:
    if any((path / name).is_file() for name in SAVED_DATASET_FILES):
        return "datasets"
    files = sorted(path.glob("*.json"))
    if files and _detect_json_layout(read_json(files[0])) == "superni":
        return "superni"
    is_table = any(file.suffix in (".csv", ".tsv", ".parquet", ".arrow") for file in path.rglob("*"))
    return "datasets" if is_table else None


def _detect_json_layout(content: Any) -> str | None:
    if isinstance(content, dict):
        return "superni" if {"Definition", "Instances"} <= content.keys() else None
    if not isinstance(content, list):
        return None
    # Look at several records: the first one may be invalid.
    for record in content[:100]:
        if isinstance(record, dict) and {"prompt", "answer"} <= record.keys():
            return "trace"
        if isinstance(record, dict) and {"sentence", "label"} <= record.keys():
            return "cl_benchmark"
    return None


def _describe_contents(path: Path) -> str:
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
