"""Break production code in one small place at a time, and see whether the tests notice.

    python tools/mutants.py --check               are the breakages of tools/breakages.py up to date? (takes seconds)
    python tools/mutants.py --only shards         those with this word in file, harm or tests
    python tools/mutants.py --drawn 100 --seed 0  breakages drawn by chance over all modules
    python tools/mutants.py --tests all           exhaustive tests run too, not the fast suite alone
    python tools/mutants.py --part 1/2            the first half, beside which another process may do the other one

Each breakage is made in a copy of the repository, where the tests that should notice it run. It is caught if one of
them fails, or does not end in time. Before that, the same tests have to pass without it. Verdicts are kept in a file,
so that a second start goes on where the first one was stopped; a verdict counts as long as the broken file and its
tests stay as they are. Exit status 0: all are caught; 1: some survived, or --check found something; 2: the tool could
not judge some.
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
PRELOAD = "torch,deepspeed,transformers,peft,datasets"  # imported once; each run of tests is forked from that
LEFT_OUT = (".git", ".venv", ".ci", "out", "build", "*.egg-info", "__pycache__", ".*_cache", ".venv.lock", ".cache")
FASTER = "/dev/shm"  # where the copy goes, if there is room
ROOM = 2 << 30
CAUGHT, SURVIVED, UNCLEAR = "caught", "SURVIVED", "UNCLEAR"
NO_TESTS, CRASHED = 5, 120  # exit statuses: pytest's, and that of a forked process that could not run pytest
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
TURNED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", ">="), ast.LtE: ("<=", ">"), ast.Gt: (">", "<="), ast.GtE: (">=", "<"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
OVER_RANKS = ("all_reduce_sum", "any_rank_true", "broadcast_from_main", "all_gather_objects")
DROPPED, TURN, MOVED, ALONE = "dropped", "turned", "moved", "without the other ranks"
SHARES = {DROPPED: 0.35, TURN: 0.3, MOVED: 0.25, ALONE: 0.1}  # of each kind among those that are drawn


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A breakage at its place: bytes [start, stop) of the file become `after`."""

    name: str  # of a drawn one; else empty
    file: str
    start: int
    stop: int
    after: bytes
    line: int
    harm: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of running some tests."""

    status: int | None  # pytest's exit status; None: they did not end in time
    seconds: float
    failed: str  # the first test that failed
    tail: str  # the end of what was printed


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


def named_mutants(root: Path, breakages: Iterable[Any]) -> Iterator[Mutant]:
    """The breakages of the list. `problems` has found nothing wrong with them."""
    for each in breakages:
        source, before = (root / each.file).read_bytes(), each.before.encode()
        start = source.index(before)
        line = source.count(b"\n", 0, start) + 1
        yield Mutant("", each.file, start, start + len(before), each.after.encode(), line, each.harm, tuple(each.tests))


def problems(root: Path, listed: Any, drawn: int, seed: int) -> list[str]:
    """What is out of date in the list, one line each."""
    found: list[str] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for number, each in enumerate(listed.BREAKAGES, 1):
        where = f"breakage {number} ({each.file}, {each.before.strip().splitlines()[0][:60]!r})"
        seen[each.file, each.before, each.after] += 1
        if seen[each.file, each.before, each.after] > 1:
            found.append(f"{where}: is listed twice")
        if not each.tests:
            found.append(f"{where}: names no test that should notice it")
        found += [f"{where}: {problem}" for test in each.tests if (problem := _missing_test(root, test))]
        path = root / each.file
        if not path.is_file():
            found.append(f"{where}: there is no such file")
            continue
        source = path.read_text("utf-8")
        if (count := source.count(each.before)) != 1:
            found.append(f"{where}: its words stand there {count} times instead of once")
            continue
        if each.before == each.after or not _is_python(source.replace(each.before, each.after)):
            found.append(f"{where}: what it puts there changes nothing, or is no Python")
    broken = {each.file for each in listed.BREAKAGES}
    acting = [file for file in modules(root) if _acts(root / file)]
    found += [f"{file}: no breakage is listed" for file in acting if file not in broken]
    for prefix, tests in listed.TESTS_OF.items():
        found += [f"TESTS_OF[{prefix!r}]: {problem}" for test in tests if (problem := _missing_test(root, test))]
    found += [f"TESTS_OF: names no tests of {file}" for file in acting if not tests_of(file, listed.TESTS_OF)]
    if listed.HARMLESS:
        names = {mutant.name for mutant in drawn_mutants(root, listed.TESTS_OF, drawn, seed)}
        gone = sorted(set(listed.HARMLESS) - names)
        found += [f"HARMLESS: {name} is none of the {drawn} breakages of seed {seed}" for name in gone]
    return found


def modules(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / "dscl").rglob("*.py"))


def tests_of(file: str, table: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Those of the longest entry that the file's path begins with."""
    fitting = [prefix for prefix in table if file.startswith(prefix)]
    return tuple(table[max(fitting, key=len)]) if fitting else ()


def _missing_test(root: Path, test: str) -> str:
    """What is wrong with the name of a test file, or of a test; empty if it is there."""
    file, *names = test.partition("[")[0].split("::")
    if not (root / file).exists():
        return f"there is no test file {file}"
    if names and "::".join(names) not in _tests_in(root / file):
        return f"there is no test {test.partition('[')[0]}"
    return ""


@functools.cache
def _tests_in(path: Path) -> frozenset[str]:
    """The names of a file's functions, and of its classes' as class::name."""

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


def _acts(path: Path) -> bool:
    """Whether a module does anything: protocols, imports, names of types and docstrings do not."""

    def idle(node: ast.stmt) -> bool:
        if isinstance(node, ast.ClassDef):
            return all(map(idle, node.body))
        if isinstance(node, ast.FunctionDef):
            return all(isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) for inner in node.body)
        if isinstance(node, ast.Assign):
            return isinstance(node.value, ast.Subscript)
        if isinstance(node, ast.AnnAssign):
            return node.value is None
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        return isinstance(node, ast.Import | ast.ImportFrom)

    return not all(map(idle, ast.parse(path.read_text("utf-8")).body))


# ---- breakages by chance


def drawn_mutants(root: Path, table: Mapping[str, Sequence[str]], count: int, seed: int) -> list[Mutant]:
    """So many of all places where something small can be broken. Which ones, the seed and the lines' text decide: they
    stay the same until such a line changes."""
    found: dict[str, list[Mutant]] = {kind: [] for kind in SHARES}
    for file in filter(lambda file: _acts(root / file), modules(root)):
        source = (root / file).read_bytes()
        lines, seen = source.splitlines(), Counter[str]()
        for kind, start, stop, after in Places(source).found:
            line = source.count(b"\n", 0, start) + 1
            before = source[start:stop].decode()
            words = f"{seed}|{file}|{lines[line - 1].strip().decode()}|{kind}|{before}"
            seen[words] += 1  # of places that look alike, the first, the second
            name = hashlib.sha256(f"{words}|{seen[words]}".encode()).hexdigest()[:10]
            change = " ".join(f"{before} → {after}".split())
            harm = f"{kind}: {change if len(change) <= 90 else change[:87] + '...'}"
            found[kind].append(Mutant(name, file, start, stop, after.encode(), line, harm, tests_of(file, table)))
    chosen = [
        mutant
        for kind, share in SHARES.items()
        for mutant in sorted(found[kind], key=lambda mutant: mutant.name)[: round(share * count)]
    ]
    return sorted(chosen, key=lambda mutant: (mutant.file, mutant.line, mutant.name))


class Places:
    """All places of a module where something small can be broken, as (kind, start, stop, what comes there).

    Left out is what only a reader sees: docstrings, messages, help, annotations; and assertions.
    """

    def __init__(self, source: bytes) -> None:
        self.found: list[tuple[str, int, int, str]] = []
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
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        set_ = isinstance(node, ast.Assign | ast.AugAssign) or (isinstance(node, ast.AnnAssign) and node.value)
        if called or set_:
            self._add(DROPPED, *self._span(node), "pass")

    def _change(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for operation, left, right in zip(node.ops, sides, sides[1:], strict=False):
                words, turned = TURNED[type(operation)]
                self._between(TURN, left, right, rf"(?<![\w<>=!]){words}(?![\w<>=])", turned)
        elif isinstance(node, ast.BoolOp):
            word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                self._between(TURN, left, right, rf"\b{word}\b", other)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, stop = self._span(node)
            text = self._source[start:stop].decode()
            self._add(TURN, start, stop, text.removeprefix("not").lstrip())
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            self._add(MOVED, *self._span(node), repr(not value if isinstance(value, bool) else value + 1))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            whole = ast.unparse(node.func)
            if node.func.attr == "sum_" or whole in [f"comm.{name}" for name in OVER_RANKS]:
                start, stop = self._span(node.args[0])
                own = f"({self._source[start:stop].decode()})"
                self._add(ALONE, *self._span(node), f"[{own}]" if node.func.attr == "all_gather_objects" else own)

    def _span(self, node: Any) -> tuple[int, int]:
        return self._begins[node.lineno - 1] + node.col_offset, self._begins[node.end_lineno - 1] + node.end_col_offset

    def _between(self, kind: str, left: ast.expr, right: ast.expr, words: str, other: str) -> None:
        start, stop = self._span(left)[1], self._span(right)[0]
        matches = list(re.finditer(words.encode(), self._source[start:stop]))
        if len(matches) == 1:  # else a comment stands there too
            self._add(kind, start + matches[0].start(), start + matches[0].end(), other)

    def _add(self, kind: str, start: int, stop: int, after: str) -> None:
        self.found.append((kind, start, stop, after))


def _is_message(node: ast.AST) -> bool:
    """A call, or a statement that is one, which only tells something."""
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("print", "log.", "warnings."))


# ---- running tests


class Copy:
    """A copy of a tree to break, and a way to run tests in it."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch, self.tree = root, scratch, scratch / root.name
        shutil.copytree(root, self.tree, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        if (root.parent / "shared").is_dir():  # data beside the checkout, which tests look for there
            (scratch / "shared").symlink_to(root.parent / "shared")
        self._writes = 0

    def digest(self) -> str:
        """Of all production code and of what several test files use."""
        found = hashlib.sha256()
        tests = [path for path in (self.tree / "tests").rglob("*.py") if not path.name.startswith("test_")]
        for path in sorted([*(self.tree / "dscl").rglob("*.py"), *tests]):
            found.update(str(path.relative_to(self.tree)).encode() + path.read_bytes())
        return found.hexdigest()

    @contextlib.contextmanager
    def broken(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.file
        source, times = path.read_bytes(), path.stat()
        path.write_bytes(source[: mutant.start] + mutant.after + source[mutant.stop :])
        # A time of its own, so that no bytecode of another breakage, made within the same second, is taken for it.
        self._writes += 1
        os.utime(path, (times.st_mtime, times.st_mtime + 10 * self._writes))
        try:
            yield
        finally:
            path.write_bytes(source)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def run(self, words: Sequence[str], limit: float) -> Outcome:
        """Pytest with these words, in a process forked from this one; whatever it started ends with it."""
        log = self.scratch / "log"
        began = time.monotonic()
        process = os.fork()
        if not process:
            self._be_pytest(words, log)
        status: int | None = None
        try:
            while time.monotonic() < began + limit:
                done, code = os.waitpid(process, os.WNOHANG)
                if done:
                    status = os.waitstatus_to_exitcode(code)
                    break
                time.sleep(0.02)
        finally:
            _end_descendants()
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        seconds = time.monotonic() - began
        return Outcome(status, seconds, failed[1] if failed else "", "\n".join(text.splitlines()[-15:]))

    def _be_pytest(self, words: Sequence[str], log: Path) -> NoReturn:
        """In the forked process."""
        code = CRASHED
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            with open(log, "wb") as file, open(os.devnull, "rb") as nothing:
                for here, there in ((nothing, 0), (file, 1), (file, 2)):
                    os.dup2(here.fileno(), there)
            os.chdir(self.tree)
            own = (self.root, self.root / "tools")
            sys.path[:] = [str(self.tree), *(place for place in sys.path if Path(place or ".").resolve() not in own)]
            temporary = self.scratch / "tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            os.environ.update(PYTHONPATH=str(self.tree), TMPDIR=str(temporary))
            tempfile.tempdir = None
            for name in [name for name in sys.modules if name.partition(".")[0] in ("dscl", "tests", "tools")]:
                del sys.modules[name]
            sys.modules["__main__"] = types.ModuleType("__main__")  # or processes that tests start import this file
            _fork_the_server()
            import pytest

            code = int(pytest.main([*words, "--basetemp", str(temporary / "pytest")]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _fork_the_server() -> None:
    """Where tests start the server from which they fork ranks, let it be a fork of this process, which has imported
    most of what it needs. It is forked now, while there are no threads, and waits."""
    ours, theirs = socket.socketpair()
    process = os.fork()
    if not process:
        ours.close()
        message, fds, *_ = socket.recv_fds(theirs, 1 << 20, 8)
        if not message:
            os._exit(0)
        code, numbers = json.loads(message)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]  # out of the way of the numbers in the code
        for fd, number in zip(high, numbers, strict=True):
            os.dup2(fd, number)
        sys.argv = ["-c"]
        with contextlib.suppress(SystemExit):  # as which the server's end comes
            exec(code, {"__name__": "__main__"})
        os._exit(0)
    theirs.close()
    spawn, waiting = util.spawnv_passfds, [process]

    def start(path: Any, words: Sequence[Any], fds: Sequence[int]) -> int:
        if waiting and "multiprocessing.forkserver" in words[-1]:
            socket.send_fds(ours, [json.dumps([words[-1], list(fds)]).encode()], list(fds))
            return waiting.pop()
        return int(spawn(path, words, fds))

    setattr(util, "spawnv_passfds", start)  # noqa: B010


def _end_descendants() -> None:
    """Kill what this process's children have left running; orphans have become its own children."""
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
    below, found = {os.getpid()}, [0]
    while found:
        found = [process for process, parent in parents.items() if parent in below and process not in below]
        below.update(found)
    return sorted(below - {os.getpid()})


class Verdicts:
    """The file of what was found so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # the last line of a process that was killed
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
    """Says of each breakage whether the tests notice it."""

    def __init__(self, copy: Copy, verdicts: Verdicts, suite: str, limit: float) -> None:
        self.copy, self.verdicts, self.suite, self.limit = copy, verdicts, suite, limit
        self.words = ["-x", "-q", "-rfE", *(["--all"] if suite == "all" else ["-m", "not exhaustive"])]
        self._whole = copy.digest()

    def key_of(self, mutant: Mutant) -> str:
        """Of all that the verdict depends on, but for the modules beside the broken one."""
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
            found = self._unbroken(test)
            if found["verdict"] != CAUGHT:
                return found
            baseline += found["seconds"]
        with self.copy.broken(mutant):
            outcome = self.copy.run([*self.words, *mutant.tests], min(self.limit, 30.0 + 5.0 * baseline))
            if outcome.status in (2, 4) and mutant.name and self._cannot_be_imported(mutant):
                outcome = dataclasses.replace(outcome, status=1, failed="the module cannot be imported")
        verdict, said = UNCLEAR, outcome.tail
        if outcome.status in (None, 1):
            verdict, said = CAUGHT, outcome.failed or "out of time"
        elif outcome.status == 0:
            verdict, said = SURVIVED, "all tests passed"
        elif outcome.status == NO_TESTS and self.suite == "fast":
            verdict, said = SURVIVED, "the fast suite has none of its tests"
        record = {"verdict": verdict, "seconds": round(outcome.seconds, 2), "said": said}
        if verdict == UNCLEAR:  # not kept: it is tried again
            return record
        what = f"{mutant.file}:{mutant.line}: {mutant.harm}"
        return self.verdicts.add(self.key_of(mutant), what=what, **record)

    def _unbroken(self, test: str) -> dict[str, Any]:
        """Whether these tests pass as long as nothing is broken, and how long that takes."""
        own = self._content(self.copy.tree / test.partition("::")[0])
        key = hashlib.sha256(f"{self._whole}|{own}|{self.suite}|{test}".encode()).hexdigest()
        if key in self.verdicts.known:
            return self.verdicts.known[key]
        outcome = self.copy.run([*self.words, test], self.limit)
        if outcome.status == 0 or (outcome.status == NO_TESTS and self.suite == "fast"):
            seconds = round(outcome.seconds, 2)
            return self.verdicts.add(key, what=f"{test}: passes unbroken", verdict=CAUGHT, seconds=seconds)
        said = f"{test} does not pass while nothing is broken (status {outcome.status}):\n{outcome.tail}"
        return {"verdict": UNCLEAR, "seconds": outcome.seconds, "said": said}

    def _cannot_be_imported(self, mutant: Mutant) -> bool:
        """Pytest says the same of a test file that cannot be imported as of a test that is not there."""
        module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        test = self.copy.scratch / "test_import.py"
        test.write_text(f"def test_import():\n    import {module}\n")
        return self.copy.run(["-q", "-p", "no:cacheprovider", "--noconftest", str(test)], self.limit).status == 1


# ---- the command


def main() -> int:
    options = _options()
    root = options.root.resolve()
    listed = load_breakages(root)
    found = problems(root, listed, options.drawn or 100, options.seed)
    for line in found:
        print(line)
    if found or options.check:
        print(f"{len(listed.BREAKAGES)} breakages, {len(found)} problems")
        return int(bool(found))
    if options.drawn:
        mutants = drawn_mutants(root, listed.TESTS_OF, options.drawn, options.seed)
    else:
        mutants = list(named_mutants(root, listed.BREAKAGES))
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
    roomy = os.path.isdir(FASTER) and shutil.disk_usage(FASTER).free > ROOM
    # No TemporaryDirectory, which any forked process would remove as it exits.
    scratch = Path(tempfile.mkdtemp(prefix="dscl-mutants-", dir=FASTER if roomy else None))
    scratch.chmod(0o711)  # for tests that start programs as another user
    try:
        judge = Judge(Copy(root, scratch), Verdicts(options.results), options.tests, options.limit)
        judged = _judge_all(judge, mutants)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _summary(judged, listed.HARMLESS)


def _judge_all(judge: Judge, mutants: Sequence[Mutant]) -> list[tuple[Mutant, dict[str, Any]]]:
    judged: list[tuple[Mutant, dict[str, Any]]] = []
    for number, mutant in enumerate(mutants, 1):
        record = judge.verdicts.known.get(judge.key_of(mutant))
        again = " (found before)" if record else ""
        record = record or judge.judge(mutant)
        judged.append((mutant, record))
        told = f"{number} of {len(mutants)}  {record['verdict']:8} {record['seconds']:6.1f} s  "
        print(f"{told}{mutant.name} {mutant.file}:{mutant.line}: {mutant.harm}{again}", flush=True)
        if record["verdict"] == UNCLEAR:
            print(record["said"], flush=True)
    return judged


def _summary(judged: Sequence[tuple[Mutant, Mapping[str, Any]]], harmless: Mapping[str, str]) -> int:
    counts = Counter(record["verdict"] for _, record in judged)
    survivors = [mutant for mutant, record in judged if record["verdict"] == SURVIVED]
    print(f"\n{counts[CAUGHT]} of {len(judged)} caught, {counts[SURVIVED]} survived, {counts[UNCLEAR]} not judged")
    for mutant in survivors:
        reason = f"; harmless: {harmless[mutant.name]}" if mutant.name in harmless else ""
        print(f"  {mutant.name} {mutant.file}:{mutant.line}: {mutant.harm}{reason}".replace("   ", "  "))
    if counts[UNCLEAR]:
        return 2
    return int(any(mutant.name not in harmless for mutant in survivors))


def _part(word: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", word)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"given {word!r}; allowed: I/N with I from 1 to N, such as 1/2")
    return int(match[1]), int(match[2])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="only see whether the list is up to date; run no test")
    parser.add_argument("--list", action="store_true", help="only print the breakages")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with this in file, harm, tests or name")
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="N breakages by chance, instead of the list")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="the I-th of N equal parts of them")
    parser.add_argument("--tests", choices=("fast", "all"), default="fast", help="all: exhaustive tests too")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where verdicts are kept (out/mutants.jsonl)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="seconds for one run of tests, at most")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree (default: this one)")
    parser.add_argument("--preload", default=PRELOAD, metavar="A,B", help="what is imported before tests are forked")
    options = parser.parse_args()
    options.results = options.results or options.root / "out" / "mutants.jsonl"
    return options


if __name__ == "__main__":
    sys.exit(main())
