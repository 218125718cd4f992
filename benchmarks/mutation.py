"""Mutation testing of a room of gemel/: small faults are put into its code one at a time; which do the tests miss?

    python -m benchmarks.mutation --room sharing --sample 100 --seed 0       # an hour on one core; `--tests` limits it

The tests run once, to learn which lines each of them executes and how long it takes (kept in --coverage). Per mutant, a
forked child that has the libraries loaded already imports the project with one file changed, and runs the tests that
execute the changed line, the quickest files first, until one fails. A mutant is killed when a test fails, the project
cannot be imported, or a test takes ten times as long as it should. Prints every mutant, and the share of those that
are killed with its 95 % interval (Wilson). Tests that run the project in another process do not see the mutant there.

Mutants are those of other tools (mutmut, cosmic-ray), text aside: comparisons and operators replaced, conditions
negated, numbers plus one, None returned, calls, raises and assignments removed.
"""

import argparse
import ast
import contextlib
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
WARM = (
    "torch",
    "torchvision",
    "scipy.optimize",
    "PIL.Image",
    "pycocotools.cocoeval",
    "hypothesis",
    "matplotlib.pyplot",
)
# CPU seconds: slower tests are left out; of all tests of a mutant; more that a test may take, as of fixtures it shares.
LIMITS = {"test": 20.0, "mutant": 30.0, "more": 8.0}
COMPARED: dict[type, Any] = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
}
OPERATORS: dict[type, Any] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
    **{ast.And: ast.Or, ast.Or: ast.And},
}
Covered = dict[str, dict[str, Any]]  # test -> {"seconds": CPU seconds, "lines": {file: [line, ...]}}


class Mutant(NamedTuple):
    """One change of one file: the `which`-th alternative of the `node`-th node of its syntax tree."""

    file: str
    line: int
    node: int
    which: int
    text: str


# ---- mutants ----------------------------------------------------------------------------------------------


def alternatives(node: ast.AST) -> list[ast.AST]:
    """What may stand in the place of a node."""
    found: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            found.append(_with(node, ops=[*node.ops[:i], COMPARED[type(op)](), *node.ops[i + 1 :]]))
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OPERATORS:
        found.append(_with(node, op=OPERATORS[type(node.op)]()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found.append(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        found.append(_with(node, value=not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found.append(_with(node, value=node.value + 1))
    elif isinstance(node, ast.Return) and node.value and not _is_none(node.value):
        found.append(_with(node, value=ast.Constant(None)))
    if isinstance(node, ast.If | ast.While | ast.IfExp) and _worth_negating(node.test):
        found.append(_with(node, test=ast.UnaryOp(ast.Not(), node.test)))
    if _removable(node):
        found.append(ast.Pass())
    return found


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _worth_negating(test: ast.AST) -> bool:
    """Not where another mutant is the same: `not x` and `x == y` have their opposites already."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return isinstance(test.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    return not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))


def _removable(node: ast.AST) -> bool:
    """Statements without which the code still runs: calls, raises, jumps, assignments to parts of something."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Delete)


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """All mutants of a file; annotations are left alone."""
    tree = ast.parse(source)
    skipped = {id(part) for node in ast.walk(tree) for field in _annotations(node) for part in ast.walk(field)}
    for index, node in enumerate(ast.walk(tree)):
        for which, other in enumerate([] if id(node) in skipped else alternatives(node)):
            line = getattr(node, "lineno", 0)
            yield Mutant(file, line, index, which, f"{_text(node)}  ->  {_text(other)}")


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        if getattr(node, name, None) is not None:
            yield getattr(node, name)


def _text(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0][:100]


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The syntax tree with the mutant in it."""
    tree = ast.parse(source)
    target = next(node for index, node in enumerate(ast.walk(tree)) if index == mutant.node)
    other = ast.copy_location(alternatives(target)[mutant.which], target)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return other if node is target else self.generic_visit(node)

    changed: ast.Module = Replace().visit(tree)  # type: ignore[assignment]
    return ast.fix_missing_locations(changed)


# ---- children ---------------------------------------------------------------------------------------------


def forked(work: Any, log: Path, cpu_seconds: float) -> int | None:
    """Runs work() -> exit status in a forked child and group; None if it ran out of time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(log, "wb") as opened:
            os.dup2(opened.fileno(), 1)
            os.dup2(opened.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
        code = 3
        try:
            code = int(work())
        finally:
            sys.stdout.flush()
            os._exit(code)
    ends, status = time.monotonic() + cpu_seconds, None
    while status is None and time.monotonic() < ends:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started, and itself where it is out of time
    if status is None:
        os.waitpid(child, 0)
        return None
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def run_tests(tests: Sequence[str], folder: Path, plugins: Sequence[object] = (), *more: str) -> int:
    """pytest's exit status."""
    common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(folder / "tests"), *more]
    return int(pytest.main([*common, *tests], plugins=list(plugins)))


class Limits:
    """A plugin of pytest: a test that takes ten times its CPU seconds ends the process."""

    def __init__(self, covered: Covered):
        self.seconds = {test: entry["seconds"] for test, entry in covered.items()}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        signal.setitimer(signal.ITIMER_PROF, LIMITS["more"] + 10 * self.seconds.get(item.nodeid, 1.0))
        return (yield)


class Recorder:
    """A plugin of pytest: which lines of which files each test that passes executes, and its CPU seconds."""

    def __init__(self, files: Iterable[str], target: Path):
        self.files, self.target = {str(ROOT / file): file for file in files}, target
        self.covered: Covered = {}
        self.lines: dict[str, set[int]] = {}
        self.passed = True

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        lines = self.lines.setdefault(self.files[frame.f_code.co_filename], set())

        def local(frame: Any, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        lines.add(frame.f_lineno)
        return local

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.lines, self.passed, began = {}, True, time.process_time()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            if self.passed:
                lines = {file: sorted(found) for file, found in self.lines.items()}
                self.covered[item.nodeid] = {"seconds": time.process_time() - began, "lines": lines}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed = self.passed and report.outcome == "passed"

    def pytest_sessionfinish(self) -> None:
        self.target.write_text(json.dumps(self.covered))


def tests_of(mutant: Mutant, covered: Covered) -> list[str]:
    """Tests that execute the line, the quickest files and tests first.

    Where none does, because it runs on import: all tests of files with a test that executes anything of the file.
    """
    quick = {test: entry for test, entry in covered.items() if entry["seconds"] <= LIMITS["test"]}
    here = {test: entry["lines"].get(mutant.file, []) for test, entry in quick.items()}
    near = {test.split("::")[0] for test, lines in here.items() if lines}
    found = [test for test, lines in here.items() if mutant.line in lines]
    found = found or [test for test in quick if test.split("::")[0] in near]
    seconds = {test: quick[test]["seconds"] for test in found}
    files: dict[str, list[float]] = {}
    for test in found:
        files.setdefault(test.split("::")[0], []).append(seconds[test])
    mean = {file: sum(all_) / len(all_) for file, all_ in files.items()}
    chosen: list[str] = []
    total = 0.0
    for test in sorted(found, key=lambda test: (mean[test.split("::")[0]], test.split("::")[0], seconds[test])):
        total += seconds[test]
        if total > LIMITS["mutant"] and chosen:
            break
        chosen.append(test)
    return chosen


def outcome(mutant: Mutant, covered: Covered, folder: Path) -> str:
    """ "survived", "not covered", or "killed" and by what."""
    tests = tests_of(mutant, covered)
    if not tests:
        return "not covered"
    path = ROOT / mutant.file
    code = compile(mutated(path.read_text(), mutant), str(path), "exec")
    honest = SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        return code if self.path == str(path) else honest(self, name)

    def work() -> int:
        setattr(SourceFileLoader, "get_code", get_code)  # noqa: B010 (mypy refuses an assignment)
        return run_tests(tests, folder, [Limits(covered)], "-x", "--no-header", "--tb=line")

    log = folder / "output"
    status = forked(work, log, 3600)
    shutil.rmtree(folder / "tests", ignore_errors=True)
    if status is None:
        return "killed: time"
    lines = log.read_text(errors="replace").splitlines()
    by = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "cannot be imported")
    return "survived" if status == 0 else f"killed: {by[:120]}"


# ---- the command ------------------------------------------------------------------------------------------


def wilson(killed: int, total: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, share = 1.96, killed / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def coverage(args: argparse.Namespace, folder: Path) -> Covered:
    """What each test executes in all rooms of gemel; from --coverage, if it is there."""
    if not args.coverage.exists():
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gemel").rglob("*.py"))
        recorder = Recorder(files, args.coverage)
        forked(lambda: run_tests(args.tests, folder, [recorder]), folder / "output", 7200)
        shutil.rmtree(folder / "tests", ignore_errors=True)
    return json.loads(args.coverage.read_text())


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", required=True, help="a folder of gemel/, as sharing, or a file of it")
    parser.add_argument("--sample", type=int, default=100, help="how many mutants, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="*", default=["tests"], help="files, folders or names of tests")
    parser.add_argument("--coverage", type=Path, default=Path("coverage.json"), help="made if it is not there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; prints one line a mutant."""
    args = parse_arguments(argv)
    for name in WARM:
        __import__(name)
    place = ROOT / "gemel" / args.room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    mutants = [m for path in files for m in mutants_of(str(path.relative_to(ROOT)), path.read_text())]
    chosen = random.Random(args.seed).sample(mutants, min(args.sample or len(mutants), len(mutants)))
    with tempfile.TemporaryDirectory() as folder:
        covered = coverage(args, Path(folder))
        found = []
        for mutant in sorted(chosen):
            found.append(outcome(mutant, covered, Path(folder)))
            print(f"{mutant.file}:{mutant.line}  {mutant.text}  {found[-1]}", flush=True)
    killed = sum(text.startswith("killed") for text in found)
    low, high = wilson(killed, len(found))
    print(f"gemel/{args.room}: {killed} of {len(found)} mutants killed ({killed / len(found):.0%}, 95 % interval")
    print(f"{low:.0%} to {high:.0%}); {len(mutants)} mutants in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
