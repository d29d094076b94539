"""Raw records from files, and the policy for invalid records."""

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
    """Parse a JSON file.

    Bytes that are not UTF-8 become lone surrogates, so that a later error message can name the record with them.
    """
    try:
        return json.loads(_decode_utf8(read_bytes(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}); correct the file") from None


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, value) for each non-blank line of a JSONL file; a malformed line yields a BadRecord."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(_decode_utf8(line))
        except (ValueError, RecursionError) as error:
            value = BadRecord(f"broken JSON ({error})")
        yield f"{path}, line {number}", value


def number_records(path: Path, records: Iterable[Any], noun: str = "record") -> Iterator[tuple[str, Any]]:
    """Yield (location, record) for each record of a list, counted from 1."""
    for number, record in enumerate(records, start=1):
        yield f"{path}, {noun} {number}", record


def collect_samples(
    file: Path | str,
    records: Iterable[tuple[str, Any]],
    build_sample: Callable[[Any, str], Sample],
    bad_records: str,
) -> list[Sample]:
    """Build the samples of one file.

    With `bad_records="stop"` an invalid record is an error. Otherwise invalid records are skipped, and one warning
    reports their number.
    """
    samples: list[Sample] = []
    errors: list[str] = []
    for location, value in records:
        try:
            if isinstance(value, BadRecord):
                raise value
            samples.append(build_sample(value, location))
        except BadRecord as error:
            if bad_records == "stop":
                raise UserError(
                    f"{location}: {error}; correct the record, or set data.bad_records=skip to leave such records out"
                ) from None
            errors.append(f"{location}: {error}")
    if errors:
        log.warning(
            "skipped %d of %d records of %s; first: %s", len(errors), len(errors) + len(samples), file, errors[0]
        )
    return samples


def require_fields(record: Any, names: Sequence[str]) -> dict[str, Any]:
    """The named fields of a record; a missing one raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"it is a {type(record).__name__}; an object with the fields {', '.join(names)} is needed")
    fields = {}
    for name in names:
        if name not in record:
            present = ", ".join(map(str, record)) or "none"
            raise BadRecord(f"the field {name!r} is missing (its fields: {present})")
        fields[name] = record[name]
    return fields


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decode_utf8(data: bytes) -> str:
    return data.decode("utf-8-sig", errors="surrogateescape")
