"""Raw records out of files, and the policy for those that are not valid."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dscl.data.task import BadRecord, Sample
from dscl.utils.errors import UserError

log = logging.getLogger("dscl")


def read_json(path: Path) -> Any:
    """A whole JSON file. Bytes that are not UTF-8 become lone surrogates, so that the record with them can be named."""
    try:
        return json.loads(_decode(read_bytes(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}); correct the file") from None


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) for each line of a JSONL file that is not blank; a broken line's value is the BadRecord."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(_decode(line))
        except (ValueError, RecursionError) as error:
            value = BadRecord(f"broken JSON ({error})")
        yield f"{path}, line {number}", value


def numbered(path: Path, records: Iterable[Any], what: str = "record") -> Iterator[tuple[str, Any]]:
    """(where, value) for each record of a list, counted from 1."""
    for number, record in enumerate(records, start=1):
        yield f"{path}, {what} {number}", record


def collect(
    file: Path | str,
    records: Iterable[tuple[str, Any]],
    convert: Callable[[Any, str], Sample],
    bad_records: str,
) -> list[Sample]:
    """The samples of one file; a bad record stops, or is skipped and counted in one warning for the file."""
    samples: list[Sample] = []
    bad: list[str] = []
    for where, value in records:
        try:
            if isinstance(value, BadRecord):
                raise value
            samples.append(convert(value, where))
        except BadRecord as error:
            if bad_records == "stop":
                raise UserError(
                    f"{where}: {error}; correct the record, or set data.bad_records=skip to leave such records out"
                ) from None
            bad.append(f"{where}: {error}")
    if bad:
        log.warning("skipped %d of %d records of %s; first: %s", len(bad), len(bad) + len(samples), file, bad[0])
    return samples


def fields_of(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """The named fields of a record, all of which must be there."""
    if not isinstance(record, dict):
        raise BadRecord(f"it is a {type(record).__name__}; an object with the fields {', '.join(names)} is needed")
    found = {}
    for name in names:
        if name not in record:
            has = ", ".join(map(str, record)) or "none"
            raise BadRecord(f"the field {name!r} is missing (its fields: {has})")
        found[name] = record[name]
    return found


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="surrogateescape")
