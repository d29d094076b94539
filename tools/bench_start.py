"""`dscl train` up to the end of its first step, with a clock on what it does on the way; for tools/bench.py.

    python tools/bench_start.py RECIPE.yaml [key=value ...]

Prints an object: when it began and ended (seconds since 1970), and the seconds of each part.
"""

from __future__ import annotations

import time

BEGAN = time.time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from functools import wraps  # noqa: E402
from typing import Any  # noqa: E402

from dscl import cli  # noqa: E402
from dscl.observe.quiet import quiet  # noqa: E402

spent: dict[str, float] = {}


def main() -> None:
    quiet()  # before the libraries are imported
    began = time.perf_counter()
    from dscl import train
    from dscl.engine import Engine

    spent["imports"] = time.perf_counter() - began
    for place, name, what in (
        (train, "open_job", "tokenizer, data and checks"),
        (train.doctor, "agree", "agreement of ranks"),
        (train.Job, "engine", "model and DeepSpeed"),
        (train.Observer, "__init__", "TensorBoard"),
        (train, "examine", "evaluation before training"),
        (train, "save", "checkpoints"),
        (Engine, "step", "first step"),
    ):
        clock(place, name, what)
    raise SystemExit(cli.main(["train", *sys.argv[1:]]))  # it comes here only if there was no step


def clock(place: Any, name: str, what: str) -> None:
    original = getattr(place, name)

    @wraps(original)
    def clocked(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = original(*given, **named)
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - began
        if what == "first step":
            found = {"began": BEGAN, "ended": time.time(), "parts": spent}
            print("\n" + json.dumps(found), file=sys.__stdout__, flush=True)
            os._exit(0)  # the rest is not asked for
        return found

    setattr(place, name, clocked)


if __name__ == "__main__":
    main()
