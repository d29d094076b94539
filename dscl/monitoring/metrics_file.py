"""metrics.jsonl: one JSON object for each optimizer step, cut back on resume so that nothing stands in it twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dscl.utils.errors import Failure

Record = Mapping[str, Any]


class MetricsFile:
    """Appends records; `step` in each is the global optimizer step over the whole stream, counted from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def rewind(self, step: int) -> None:
        """Drop every record after `step`, and a last line that was only half written."""
        self.close()
        if self.path.exists():
            self._rewrite(self._until(step))

    def write(self, records: Iterable[Record]) -> None:
        """Append the records and hand them to the system, where they outlive this process."""
        lines = b"".join(_line(record) for record in records)
        with _telling(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab")  # noqa: SIM115 (open as long as the run)
            self._file.write(lines)
            self._file.flush()

    def amend(self, numbers: Record) -> None:
        """Add these to the numbers of the last record, where there is one."""
        self.close()
        lines = list(self._until(math.inf)) if self.path.exists() else []
        if lines:
            last = json.loads(lines[-1])
            lines[-1] = _line({**last, **{name: last.get(name, 0.0) + value for name, value in numbers.items()}})
            self._rewrite(lines)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what `write` could not get rid of, and has told
                self._file.close()
            self._file = None

    def _rewrite(self, lines: Iterable[bytes]) -> None:
        """Put these in the place of what is there, or nothing."""
        rest = self.path.with_name(self.path.name + ".new")
        with _telling(self.path):
            with open(rest, "wb") as kept:
                kept.writelines(lines)
                kept.flush()
                os.fsync(kept.fileno())
            os.replace(rest, self.path)

    def _until(self, step: float) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    at = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    raise Failure(
                        f"{self.path}, line {number}: not a record of a step; repair or remove this line"
                    ) from None
                if at <= step:
                    yield line


def _line(record: Record) -> bytes:
    # JSON has no NaN and no infinity
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}); make room or choose another run_dir") from error
