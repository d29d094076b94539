"""Break production code in one small place at a time, and see whether the tests notice.

    python tools/mutants.py --check               is the list in tools/breakages.py up to date? (takes seconds)
    python tools/mutants.py --only shards         the breakages with this text in file, harm or tests
    python tools/mutants.py --drawn 100 --seed 0  random breakages over all modules instead of the list
    python tools/mutants.py --tests all           with exhaustive tests, not the fast suite alone
    python tools/mutants.py --part 1/2            the first half; another process may run the other half

The tool makes each breakage in a copy of the repository and runs the tests that should notice it there. The breakage is
caught if one of them fails or does not end in time. The same tests must pass without the breakage. Verdicts are kept in
a file, so that a second start continues where the first one stopped. A verdict is valid until the broken file or its
tests change. Exit status 0: all are caught; 1: some survived, or --check found a problem; 2: some could not be judged.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = "torch,deepspeed,transformers,peft,datasets"  # imported once, before each run of tests is forked
NOT_COPIED = (".git", ".venv", ".ci", "out", "build", "*.egg-info", "__pycache__", ".*_cache", ".venv.lock", ".cache")
MEMORY_FOLDER = "/dev/shm"  # folder of the copy, if it has space
NEEDED_SPACE = 2 << 30
CAUGHT, SURVIVED, UNCLEAR = "caught", "SURVIVED", "UNCLEAR"
NO_TESTS, CRASHED = 5, 120  # exit statuses: of pytest without tests, and of a forked process that could not run pytest
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
REPLACEMENTS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", ">="), ast.LtE: ("<=", ">"), ast.Gt: (">", "<="), ast.GtE: (">=", "<"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
COLLECTIVES = ("all_reduce_sum", "any_rank_true", "broadcast_from_main", "all_gather_objects")
DROPPED, TURNED, MOVED, LOCAL = "dropped", "turned", "moved", "without the other ranks"
KIND_SHARES = {DROPPED: 0.35, TURNED: 0.3, MOVED: 0.25, LOCAL: 0.1}  # share of each kind among random breakages


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A breakage with its position: bytes [start, stop) of the file become `after`."""

    name: str  # of a random breakage; else empty
    file: str
    start: int
    stop: int
    after: bytes
    line: int
    harm: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run of tests."""

    status: int | None  # pytest's exit status; None: they did not end in time
    seconds: float
    failed: str  # the first test that failed
    tail: str  # the end of the output


# ---- the list


def load_breakages(root: Path) -> Any:
    """The module tools/breakages.py of a tree."""
    spec = importlib.util.spec_from_file_location("breakages_of_the_tree", root / "tools" / "breakages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def listed_mutants(root: Path, breakages: Iterable[Any]) -> Iterator[Mutant]:
    """The breakages of the list, in which `find_problems` has found no problem."""
    for breakage in breakages:
        source, before = (root / breakage.file).read_bytes(), breakage.before.encode()
        start = source.index(before)
        line = source.count(b"\n", 0, start) + 1
        yield Mutant(
            "",
            breakage.file,
            start,
            start + len(before),
            breakage.after.encode(),
            line,
            breakage.harm,
            tuple(breakage.tests),
        )


def find_problems(root: Path, breakages: Any, num_random: int, seed: int) -> list[str]:
    """The problems of the list, one line each."""
    problems: list[str] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    for number, breakage in enumerate(breakages.BREAKAGES, 1):
        where = f"breakage {number} ({breakage.file}, {breakage.before.strip().splitlines()[0][:60]!r})"
        counts[breakage.file, breakage.before, breakage.after] += 1
        if counts[breakage.file, breakage.before, breakage.after] > 1:
            problems.append(f"{where}: is listed twice")
        if not breakage.tests:
            problems.append(f"{where}: names no test that should notice it")
        problems += [f"{where}: {problem}" for test in breakage.tests if (problem := _missing_test(root, test))]
        path = root / breakage.file
        if not path.is_file():
            problems.append(f"{where}: there is no such file")
            continue
        source = path.read_text("utf-8")
        if (count := source.count(breakage.before)) != 1:
            problems.append(f"{where}: its words occur {count} times in the file instead of once")
            continue
        if breakage.before == breakage.after or not _is_python(source.replace(breakage.before, breakage.after)):
            problems.append(f"{where}: the replacement changes nothing, or is no Python")
    broken = {breakage.file for breakage in breakages.BREAKAGES}
    code_files = [file for file in find_modules(root) if _has_code(root / file)]
    problems += [f"{file}: no breakage is listed" for file in code_files if file not in broken]
    for prefix, tests in breakages.TESTS_OF.items():
        problems += [f"TESTS_OF[{prefix!r}]: {problem}" for test in tests if (problem := _missing_test(root, test))]
    problems += [
        f"TESTS_OF: names no tests of {file}" for file in code_files if not find_tests(file, breakages.TESTS_OF)
    ]
    if breakages.HARMLESS:
        names = {mutant.name for mutant in random_mutants(root, breakages.TESTS_OF, num_random, seed)}
        unknown = sorted(set(breakages.HARMLESS) - names)
        problems += [
            f"HARMLESS: {name} is none of the {num_random} random breakages of seed {seed}" for name in unknown
        ]
    return problems


def find_modules(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / "dscl").rglob("*.py"))


def find_tests(file: str, table: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The tests of the longest prefix of the file's path in the table."""
    fitting = [prefix for prefix in table if file.startswith(prefix)]
    return tuple(table[max(fitting, key=len)]) if fitting else ()


def _missing_test(root: Path, test: str) -> str:
    """The problem with a test's id; empty if the test exists."""
    file, *names = test.partition("[")[0].split("::")
    if not (root / file).exists():
        return f"there is no test file {file}"
    if names and "::".join(names) not in _tests_in(root / file):
        return f"there is no test {test.partition('[')[0]}"
    return ""


@functools.cache
def _tests_in(path: Path) -> frozenset[str]:
    """The names of a file's functions, and of its methods as class::name."""

    def names(body: Sequence[ast.stmt], before: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield before + node.name
            elif isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{before}{node.name}::")

    return frozenset(names(ast.parse(path.read_text("utf-8")).body, ""))


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _has_code(path: Path) -> bool:
    """Whether a module has code to break. Protocols, imports, type aliases and docstrings have none."""

    def has_no_effect(node: ast.stmt) -> bool:
        if isinstance(node, ast.ClassDef):
            return all(map(has_no_effect, node.body))
        if isinstance(node, ast.FunctionDef):
            return all(isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) for inner in node.body)
        if isinstance(node, ast.Assign):
            return isinstance(node.value, ast.Subscript)
        if isinstance(node, ast.AnnAssign):
            return node.value is None
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        return isinstance(node, ast.Import | ast.ImportFrom)

    return not all(map(has_no_effect, ast.parse(path.read_text("utf-8")).body))


# ---- random breakages


def random_mutants(root: Path, table: Mapping[str, Sequence[str]], count: int, seed: int) -> list[Mutant]:
    """`count` breakages out of all mutation sites. Hashes of the seed and of the lines' text select them, so a breakage
    stays selected until its line changes."""
    sites: dict[str, list[Mutant]] = {kind: [] for kind in KIND_SHARES}
    for file in filter(lambda file: _has_code(root / file), find_modules(root)):
        source = (root / file).read_bytes()
        lines, counts = source.splitlines(), Counter[str]()
        for kind, start, stop, after in MutationSites(source).sites:
            line = source.count(b"\n", 0, start) + 1
            before = source[start:stop].decode()
            identity = f"{seed}|{file}|{lines[line - 1].strip().decode()}|{kind}|{before}"
            counts[identity] += 1  # numbers sites with the same text
            name = hashlib.sha256(f"{identity}|{counts[identity]}".encode()).hexdigest()[:10]
            change = " ".join(f"{before} → {after}".split())
            harm = f"{kind}: {change if len(change) <= 90 else change[:87] + '...'}"
            sites[kind].append(Mutant(name, file, start, stop, after.encode(), line, harm, find_tests(file, table)))
    selected = [
        mutant
        for kind, share in KIND_SHARES.items()
        for mutant in sorted(sites[kind], key=lambda mutant: mutant.name)[: round(share * count)]
    ]
    return sorted(selected, key=lambda mutant: (mutant.file, mutant.line, mutant.name))


class MutationSites:
    """All sites of a module where a small breakage is possible, as (kind, start, stop, replacement).

    Docstrings, messages, help texts, annotations and assertions are left out.
    """

    def __init__(self, source: bytes) -> None:
        self.sites: list[tuple[str, int, int, str]] = []
        self._source = source
        self._begins = [0]
        for line in source.splitlines(keepends=True):
            self._begins.append(self._begins[-1] + len(line))
        self._visit(ast.parse(source), False)

    def _visit(self, node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom) or _is_message(node):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return
        if isinstance(node, ast.keyword) and node.arg == "help":
            return
        if isinstance(node, ast.stmt) and in_function:
            self._drop(node)
        self._change(node)
        in_function = isinstance(node, ast.FunctionDef) or (in_function and not isinstance(node, ast.ClassDef))
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self._visit(child, in_function)

    def _drop(self, node: ast.stmt) -> None:
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        is_assignment = isinstance(node, ast.Assign | ast.AugAssign) or (isinstance(node, ast.AnnAssign) and node.value)
        if is_call or is_assignment:
            self._add(DROPPED, *self._span(node), "pass")

    def _change(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for operation, left, right in zip(node.ops, sides, sides[1:], strict=False):
                pattern, replacement = REPLACEMENTS[type(operation)]
                self._between(TURNED, left, right, rf"(?<![\w<>=!]){pattern}(?![\w<>=])", replacement)
        elif isinstance(node, ast.BoolOp):
            word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                self._between(TURNED, left, right, rf"\b{word}\b", other)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, stop = self._span(node)
            text = self._source[start:stop].decode()
            self._add(TURNED, start, stop, text.removeprefix("not").lstrip())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            self._add(MOVED, *self._span(node), repr(not value if isinstance(value, bool) else value + 1))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            function = ast.unparse(node.func)
            if node.func.attr == "sum_" or function in [f"comm.{name}" for name in COLLECTIVES]:
                start, stop = self._span(node.args[0])
                argument = f"({self._source[start:stop].decode()})"
                self._add(
                    LOCAL, *self._span(node), f"[{argument}]" if node.func.attr == "all_gather_objects" else argument
                )

    def _span(self, node: Any) -> tuple[int, int]:
        return self._begins[node.lineno - 1] + node.col_offset, self._begins[node.end_lineno - 1] + node.end_col_offset

    def _between(self, kind: str, left: ast.expr, right: ast.expr, pattern: str, replacement: str) -> None:
        start, stop = self._span(left)[1], self._span(right)[0]
        matches = list(re.finditer(pattern.encode(), self._source[start:stop]))
        if len(matches) == 1:  # otherwise a comment contains the operator too
            self._add(kind, start + matches[0].start(), start + matches[0].end(), replacement)

    def _add(self, kind: str, start: int, stop: int, after: str) -> None:
        self.sites.append((kind, start, stop, after))


def _is_message(node: ast.AST) -> bool:
    """Whether a node is a call, or a statement of one, that only prints, logs or warns."""
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("print", "log.", "warnings."))


# ---- running tests


class TreeCopy:
    """A copy of a tree to break, and a way to run tests in it."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch, self.tree = root, scratch, scratch / root.name
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
        if (root.parent / "shared").is_dir():  # data beside the checkout, which some tests read
            (scratch / "shared").symlink_to(root.parent / "shared")
        self._writes = 0

    def digest(self) -> str:
        """The checksum of all production code and of the shared test helpers."""
        digest = hashlib.sha256()
        tests = [path for path in (self.tree / "tests").rglob("*.py") if not path.name.startswith("test_")]
        for path in sorted([*(self.tree / "dscl").rglob("*.py"), *tests]):
            digest.update(str(path.relative_to(self.tree)).encode() + path.read_bytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def broken(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.file
        source, times = path.read_bytes(), path.stat()
        path.write_bytes(source[: mutant.start] + mutant.after + source[mutant.stop :])
        # Each breakage has its own modification time, so that Python does not use the bytecode of an earlier one.
        self._writes += 1
        os.utime(path, (times.st_mtime, times.st_mtime + 10 * self._writes))
        try:
            yield
        finally:
            path.write_bytes(source)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def run(self, arguments: Sequence[str], limit: float) -> Outcome:
        """Run pytest with these arguments in a forked process, and end all processes that it started."""
        log = self.scratch / "log"
        began = time.monotonic()
        process = os.fork()
        if not process:
            self._be_pytest(arguments, log)
        status: int | None = None
        try:
            while time.monotonic() < began + limit:
                ended, code = os.waitpid(process, os.WNOHANG)
                if ended:
                    status = os.waitstatus_to_exitcode(code)
                    break
                time.sleep(0.02)
        finally:
            _end_descendants()
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        seconds = time.monotonic() - began
        return Outcome(status, seconds, failed[1] if failed else "", "\n".join(text.splitlines()[-15:]))

    def _be_pytest(self, arguments: Sequence[str], log: Path) -> NoReturn:
        """Run pytest as the forked process."""
        code = CRASHED
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            with open(log, "wb") as file, open(os.devnull, "rb") as null:
                for here, there in ((null, 0), (file, 1), (file, 2)):
                    os.dup2(here.fileno(), there)
            os.chdir(self.tree)
            own = (self.root, self.root / "tools")
            sys.path[:] = [str(self.tree), *(path for path in sys.path if Path(path or ".").resolve() not in own)]
            temporary = self.scratch / "tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            os.environ.update(PYTHONPATH=str(self.tree), TMPDIR=str(temporary))
            tempfile.tempdir = None
            for name in [name for name in sys.modules if name.partition(".")[0] in ("dscl", "tests", "tools")]:
                del sys.modules[name]
            # Otherwise processes that tests start would import this file.
            sys.modules["__main__"] = types.ModuleType("__main__")
            _prefork_server()
            import pytest

            code = int(pytest.main([*arguments, "--basetemp", str(temporary / "pytest")]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _prefork_server() -> None:
    """Fork a process that becomes the fork server of the tests' ranks as soon as they start it. A fork of this process
    has most imports already. It is forked now, while there are no threads, and waits."""
    our_socket, server_socket = socket.socketpair()
    process = os.fork()
    if not process:
        our_socket.close()
        message, fds, *_ = socket.recv_fds(server_socket, 1 << 20, 8)
        if not message:
            os._exit(0)
        code, numbers = json.loads(message)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]  # above the numbers that the code uses
        for fd, number in zip(high, numbers, strict=True):
            os.dup2(fd, number)
        sys.argv = ["-c"]
        with contextlib.suppress(SystemExit):  # the server ends with SystemExit
            exec(code, {"__name__": "__main__"})
        os._exit(0)
    server_socket.close()
    spawn, waiting = util.spawnv_passfds, [process]

    def start(path: Any, words: Sequence[Any], fds: Sequence[int]) -> int:
        if waiting and "multiprocessing.forkserver" in words[-1]:
            socket.send_fds(our_socket, [json.dumps([words[-1], list(fds)]).encode()], list(fds))
            return waiting.pop()
        return int(spawn(path, words, fds))

    setattr(util, "spawnv_passfds", start)  # noqa: B010


def _end_descendants() -> None:
    """Kill all descendants of this process. Orphans of its children have become its own children."""
    for _ in range(50):
        below = _descendants()
        for process in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not below:
            return
        time.sleep(0.02)


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below, new = {os.getpid()}, [0]
    while new:
        new = [process for process, parent in parents.items() if parent in below and process not in below]
        below.update(new)
    return sorted(below - {os.getpid()})


class Verdicts:
    """The file of verdicts so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # the last line may be incomplete after a kill
                record = json.loads(line)
                self.known[record["key"]] = record

    def add(self, key: str, **record: Any) -> dict[str, Any]:
        self.known[key] = {"key": key, **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[key], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return self.known[key]


class Judge:
    """Decides for each breakage whether the tests notice it."""

    def __init__(self, copy: TreeCopy, verdicts: Verdicts, suite: str, limit: float) -> None:
        self.copy, self.verdicts, self.suite, self.limit = copy, verdicts, suite, limit
        self.words = ["-x", "-q", "-rfE", *(["--all"] if suite == "all" else ["-m", "not exhaustive"])]
        self._whole = copy.digest()

    def verdict_key(self, mutant: Mutant) -> str:
        """The checksum of all that a verdict depends on, except for the other modules."""
        files = [mutant.file, *sorted({test.partition("::")[0] for test in mutant.tests})]
        parts = [self._content(self.copy.tree / file) for file in files]
        words = [mutant.file, mutant.start, mutant.stop, mutant.after.decode(), mutant.tests, self.suite, parts]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    @staticmethod
    def _content(path: Path) -> str:
        paths = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        return hashlib.sha256(b"".join(map(Path.read_bytes, paths))).hexdigest()

    def judge(self, mutant: Mutant) -> dict[str, Any]:
        baseline = 0.0
        for test in mutant.tests:
            unbroken = self._unbroken(test)
            if unbroken["verdict"] != CAUGHT:
                return unbroken
            baseline += unbroken["seconds"]
        with self.copy.broken(mutant):
            outcome = self.copy.run([*self.words, *mutant.tests], min(self.limit, 30.0 + 5.0 * baseline))
            if outcome.status in (2, 4) and mutant.name and self._cannot_be_imported(mutant):
                outcome = dataclasses.replace(outcome, status=1, failed="the module cannot be imported")
        verdict, reason = UNCLEAR, outcome.tail
        if outcome.status in (None, 1):
            verdict, reason = CAUGHT, outcome.failed or "out of time"
        elif outcome.status == 0:
            verdict, reason = SURVIVED, "all tests passed"
        elif outcome.status == NO_TESTS and self.suite == "fast":
            verdict, reason = SURVIVED, "the fast suite has no test for it"
        record = {"verdict": verdict, "seconds": round(outcome.seconds, 2), "reason": reason}
        if verdict == UNCLEAR:  # not stored, so that the next start tries again
            return record
        what = f"{mutant.file}:{mutant.line}: {mutant.harm}"
        return self.verdicts.add(self.verdict_key(mutant), what=what, **record)

    def _unbroken(self, test: str) -> dict[str, Any]:
        """Run a test without the breakage: CAUGHT if it passes, with its seconds."""
        test_digest = self._content(self.copy.tree / test.partition("::")[0])
        key = hashlib.sha256(f"{self._whole}|{test_digest}|{self.suite}|{test}".encode()).hexdigest()
        if key in self.verdicts.known:
            return self.verdicts.known[key]
        outcome = self.copy.run([*self.words, test], self.limit)
        if outcome.status == 0 or (outcome.status == NO_TESTS and self.suite == "fast"):
            seconds = round(outcome.seconds, 2)
            return self.verdicts.add(key, what=f"{test}: passes unbroken", verdict=CAUGHT, seconds=seconds)
        reason = f"{test} does not pass without the breakage (status {outcome.status}):\n{outcome.tail}"
        return {"verdict": UNCLEAR, "seconds": outcome.seconds, "reason": reason}

    def _cannot_be_imported(self, mutant: Mutant) -> bool:
        """Whether the broken module cannot be imported. Pytest then has the same status as if a test did not exist."""
        module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        test = self.copy.scratch / "test_import.py"
        test.write_text(f"def test_import():\n    import {module}\n")
        return self.copy.run(["-q", "-p", "no:cacheprovider", "--noconftest", str(test)], self.limit).status == 1


# ---- the command


def main() -> int:
    options = _options()
    root = options.root.resolve()
    breakages = load_breakages(root)
    problems = find_problems(root, breakages, options.drawn or 100, options.seed)
    for line in problems:
        print(line)
    if problems or options.check:
        print(f"{len(breakages.BREAKAGES)} breakages, {len(problems)} problems")
        return int(bool(problems))
    if options.drawn:
        mutants = random_mutants(root, breakages.TESTS_OF, options.drawn, options.seed)
    else:
        mutants = list(listed_mutants(root, breakages.BREAKAGES))
    mutants = [m for m in mutants if options.only in " ".join((m.name, m.file, m.harm, *m.tests))]
    part, parts = options.part
    mutants = mutants[len(mutants) * (part - 1) // parts : len(mutants) * part // parts]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name} {mutant.file}:{mutant.line}: {mutant.harm}".lstrip())
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    for name in filter(None, ("pytest", *options.preload.split(","))):
        importlib.import_module(name)
    has_space = os.path.isdir(MEMORY_FOLDER) and shutil.disk_usage(MEMORY_FOLDER).free > NEEDED_SPACE
    # No TemporaryDirectory, which any forked process would remove as it exits.
    scratch = Path(tempfile.mkdtemp(prefix="dscl-mutants-", dir=MEMORY_FOLDER if has_space else None))
    scratch.chmod(0o711)  # for tests that start programs as another user
    try:
        judge = Judge(TreeCopy(root, scratch), Verdicts(options.results), options.tests, options.limit)
        verdicts = _judge_all(judge, mutants)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _summary(verdicts, breakages.HARMLESS)


def _judge_all(judge: Judge, mutants: Sequence[Mutant]) -> list[tuple[Mutant, dict[str, Any]]]:
    verdicts: list[tuple[Mutant, dict[str, Any]]] = []
    for number, mutant in enumerate(mutants, 1):
        record = judge.verdicts.known.get(judge.verdict_key(mutant))
        suffix = " (judged before)" if record else ""
        record = record or judge.judge(mutant)
        verdicts.append((mutant, record))
        progress = f"{number} of {len(mutants)}  {record['verdict']:8} {record['seconds']:6.1f} s  "
        print(f"{progress}{mutant.name} {mutant.file}:{mutant.line}: {mutant.harm}{suffix}", flush=True)
        if record["verdict"] == UNCLEAR:
            print(record["reason"], flush=True)
    return verdicts


def _summary(verdicts: Sequence[tuple[Mutant, Mapping[str, Any]]], harmless: Mapping[str, str]) -> int:
    counts = Counter(record["verdict"] for _, record in verdicts)
    survivors = [mutant for mutant, record in verdicts if record["verdict"] == SURVIVED]
    print(f"\n{counts[CAUGHT]} of {len(verdicts)} caught, {counts[SURVIVED]} survived, {counts[UNCLEAR]} not judged")
    for mutant in survivors:
        reason = f"; harmless: {harmless[mutant.name]}" if mutant.name in harmless else ""
        print(f"  {mutant.name} {mutant.file}:{mutant.line}: {mutant.harm}{reason}".replace("   ", "  "))
    if counts[UNCLEAR]:
        return 2
    return int(any(mutant.name not in harmless for mutant in survivors))


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: I/N with I from 1 to N, such as 1/2")
    return int(match[1]), int(match[2])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="only check that the list is up to date; run no tests")
    parser.add_argument("--list", action="store_true", help="only print the breakages")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only breakages with this text in file, harm, tests or name"
    )
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="N random breakages instead of the list")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random breakages (default: 0)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="only the I-th of N equal parts")
    parser.add_argument("--tests", choices=("fast", "all"), default="fast", help="all: with exhaustive tests")
    parser.add_argument("--results", type=Path, metavar="FILE", help="file of verdicts (default: out/mutants.jsonl)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="most seconds for one run of tests")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    parser.add_argument("--preload", default=PRELOAD, metavar="A,B", help="modules to import before tests are forked")
    options = parser.parse_args()
    options.results = options.results or options.root / "out" / "mutants.jsonl"
    return options


if __name__ == "__main__":
    sys.exit(main())
