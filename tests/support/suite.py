"""Runs the tests; `tests/run.sh` calls it after lint and type checks.

The fast suite has two halves. Tests that start ranks or programs run one after another, because two at once would be
slower in total. All other tests run in two processes. Both halves always run.

The exhaustive suite (`--all`) runs each file in a process of its own. A file that has passed is not run again for the
same tree, so an interrupted suite resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = "DSCL_TESTS_TIMES"  # a file to which conftest.py writes a line for each test
SLOWEST = 25
LIMIT = 30.0  # seconds that a test may take
INTERRUPT_SECONDS = 30.0  # seconds that pytest gets to end when it is interrupted
MIN_FREE_BYTES = 4 << 30  # bytes that must be free for temporary folders in memory
# Files and folders whose tests start ranks or programs.
SEQUENTIAL_TESTS = (
    "tests/distributed",
    "tests/launch",
    "tests/training/test_preflight.py",
    "tests/cli/test_app.py",
)


def main(words: Sequence[str]) -> int:
    if "--all" in words:
        unknown = set(words) - {"--all", "--fresh"}
        if unknown:
            print(f"run.sh: given {' '.join(sorted(unknown))} with --all; allowed: --fresh", file=sys.stderr)
            return 2
        return run_exhaustive_suite("--fresh" in words)
    build_extension()
    with tempfile.TemporaryDirectory(prefix="dscl-tests-", dir=memory_folder()) as folder:
        times = Path(folder, "times.jsonl")
        times.touch()
        temporary = f"--basetemp={folder}/t"
        ignored = [f"--ignore={place}" for place in SEQUENTIAL_TESTS]
        halves = [[temporary, *SEQUENTIAL_TESTS], [f"{temporary}2", "-n2", "--dist=loadfile", *ignored, "tests"]]
        statuses: list[int] = []
        try:
            for half in [[temporary, *words]] if words else halves:
                statuses.append(run_pytest(half, times))
        except KeyboardInterrupt:
            statuses.append(1)
        counts = print_slowest_tests([json.loads(line) for line in times.read_text().splitlines()])
    print(f"tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", flush=True)
    return next((status for status in statuses if status), 0)


def build_extension() -> None:
    """Compile DeepSpeed's extension once, before the first test that needs it."""
    print("building DeepSpeed's extension (half a minute, once)", flush=True)
    command = [sys.executable, "-c", "from dscl.engine.deepspeed_patches import build_shm_extension as build; build()"]
    subprocess.run(command, cwd=REPOSITORY, check=False, stdout=subprocess.DEVNULL)


def run_pytest(words: Sequence[str], times: Path) -> int:
    command = [sys.executable, "-m", "pytest", *words]
    with subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, TIMES: str(times)}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait(INTERRUPT_SECONDS)  # pytest was interrupted too, and reports where
            raise


def print_slowest_tests(tests: list[dict[str, object]]) -> Counter[str]:
    """Print the slowest tests; the number of tests by outcome."""
    slowest = sorted(tests, key=lambda test: -float(str(test["seconds"])))[:SLOWEST]
    print(f"\nthe {len(slowest)} slowest of {len(tests)} tests:")
    for test in slowest:
        seconds = float(str(test["seconds"]))
        print(f"{seconds:7.1f} s  {test['test']}{f'  (more than {LIMIT:.0f} s)' if seconds > LIMIT else ''}")
    return Counter(str(test["outcome"]) for test in tests)


def memory_folder() -> str | None:
    """A folder in memory for temporary files; None if it has too little free space or programs may not run from it."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        return None
    return None if os.statvfs(folder).f_flag & os.ST_NOEXEC else str(folder)


def run_exhaustive_suite(fresh: bool) -> int:
    """Run every test file with all of its cases, then the kill campaign."""
    results = REPOSITORY / ".cache" / "tests-all.jsonl"
    results.parent.mkdir(exist_ok=True)
    if fresh:
        results.unlink(missing_ok=True)
    build_extension()
    tree = tree_digest()
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    passed_records = {record["part"]: record for record in records if record["tree"] == tree and record["status"] == 0}
    parts: dict[str, list[str]] = {
        str(path.relative_to(REPOSITORY)): ["-m", "pytest", "--all", str(path.relative_to(REPOSITORY))]
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
    }
    parts["tools/kill_campaign.py"] = ["tools/kill_campaign.py", "--kills", "50"]
    failed = []
    for number, (part, words) in enumerate(parts.items(), start=1):
        if part in passed_records:
            print(
                f"[{number} of {len(parts)}] {part}: passed before, in {passed_records[part]['seconds']:.0f} s",
                flush=True,
            )
            continue
        print(f"[{number} of {len(parts)}] {part}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="dscl-tests-", dir=memory_folder()) as folder:
            place = [f"--basetemp={folder}/t"] if "pytest" in words else []
            status = subprocess.run([sys.executable, *words, *place], cwd=REPOSITORY, check=False).returncode
        status = 0 if status == 5 else status  # pytest's status if no test of the file applies to this machine
        record = {"part": part, "tree": tree, "status": status, "seconds": time.monotonic() - start}
        passed_records[part] = record
        failed += [part] if status else []
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
    minutes = sum(float(record["seconds"]) for record in passed_records.values()) / 60
    print(f"\n{len(parts) - len(failed)} of {len(parts)} parts passed, {minutes:.0f} minutes in all")
    for part in failed:
        print(f"failed: {part}")
    return 1 if failed else 0


def tree_digest() -> str:
    """The checksum of all files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0")
    total = hashlib.sha256()
    for name in sorted(filter(None, set(names))):
        path = REPOSITORY / name
        if path.is_file():
            total.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
