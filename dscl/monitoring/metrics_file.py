"""metrics.jsonl: one JSON object for each optimizer step; truncated on resume so that no step stands in it twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dscl.utils.atomic_io import replace_atomically
from dscl.utils.errors import ExternalFailure

Record = Mapping[str, Any]


class MetricsFile:
    """Appends records to the file. Each record's `step` is the optimizer step of the whole run, counted from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def truncate_after(self, step: int) -> None:
        """Drop every record after `step`, and an incomplete last line."""
        self.close()
        if self.path.exists():
            self._replace_lines(self._read_until(step))

    def write(self, records: Iterable[Record]) -> None:
        """Append the records and flush them to the operating system, so that they survive a kill of this process."""
        lines = b"".join(_encode_record(record) for record in records)
        with _explain_os_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab")  # noqa: SIM115 (stays open as long as the run)
            self._file.write(lines)
            self._file.flush()

    def add_to_last_record(self, numbers: Record) -> None:
        """Add these numbers to those of the last record, if the file has one."""
        self.close()
        lines = list(self._read_until(math.inf)) if self.path.exists() else []
        if lines:
            last = json.loads(lines[-1])
            lines[-1] = _encode_record(
                {**last, **{name: last.get(name, 0.0) + value for name, value in numbers.items()}}
            )
            self._replace_lines(lines)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # `write` has raised it already
                self._file.close()
            self._file = None

    def _replace_lines(self, lines: Iterable[bytes]) -> None:
        """Replace the file's content atomically."""
        with (
            _explain_os_errors(self.path),
            replace_atomically(self.path) as partial,
            open(partial, "wb") as new_file,
        ):
            new_file.writelines(lines)

    def _read_until(self, step: float) -> Iterator[bytes]:
        """The lines of all complete records up to `step`."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record_step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    raise ExternalFailure(
                        f"{self.path}, line {number}: not a record of a step; repair or remove this line"
                    ) from None
                if record_step <= step:
                    yield line


def _encode_record(record: Record) -> bytes:
    # JSON has neither NaN nor infinity: they become null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def _explain_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExternalFailure(
            f"{path}: cannot be written ({error.strerror}); make room or choose another run_dir"
        ) from error
