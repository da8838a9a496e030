"""Behind code_tests, in a worker process: the data set's test runs here, the model's program in a sandbox.

    trusted test: assert candidate(2, 3) == 5  -- (2, 3) -->  sandbox: add(2, 3)
                       compares here, with 5   <--  "5"  ---

The program never shares a process with a test or an expected value, and what it answers is a literal that was read as
text: an object that equals everything, a patched assert or a printed verdict have nothing here to act on. For the same
reason a function that changes its arguments in place changes a copy.
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rewards.sandbox.isolation import Isolation, Limits, interpreter, start_unsafe
from rewards.sandbox.process import Ended, Raised, Sandbox

# What a test may wait for with `except`. Never StopIteration: it would end the test's own loops early.
_EXCEPTIONS = (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, OverflowError, AttributeError, NameError)
_RAISED = {error.__name__: error for error in _EXCEPTIONS}


class _Broken(BaseException):  # past any `except Exception` of a test
    """The test itself cannot be used; the text says why."""


class CandidateError(Exception):
    """What a call of the program raised, where a test could not have waited for it."""


def make(
    *, timeout: float, memory_mb: int, partial: bool, tolerance: float, unsafe_local: bool, owner: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The function that judges one item (code_tests.item says what is in it).

    It gives {"value", "reason", "timed_out"}, or {"broken": why} where the test is at fault. Raises SandboxError if
    there is no sandbox to be had.
    """
    limits = Limits(timeout, memory_mb << 20)
    interpreter()  # looked up once, before workers are forked

    @functools.cache  # not before the worker is forked: a slot belongs to one process
    def isolation() -> Isolation:
        return Isolation(owner)

    def judge(item: Mapping[str, Any]) -> dict[str, Any]:
        start = (
            functools.partial(start_unsafe, limits) if unsafe_local else functools.partial(isolation().start, limits)
        )
        with Sandbox(start, timeout) as sandbox:
            if item["kind"] == "probe":
                return {"value": 1.0, "reason": ""}
            try:
                sandbox.ask({"source": item["source"], "stdin": item["kind"] == "stdin"})
            except (Raised, Ended) as error:
                return _verdict(0, 1, f"does not load: {error}", sandbox)
            tests = {"test": _test, "cases": _cases, "stdin": _programs}[item["kind"]]
            try:
                passed, total, reason = tests(item, sandbox, partial, tolerance)
            except _Broken as error:
                return {"broken": str(error)}
            if not partial:
                passed = total if passed == total and not reason else 0
            return _verdict(passed, total, reason, sandbox)

    return judge


def _verdict(passed: int, total: int, reason: str, sandbox: Sandbox) -> dict[str, Any]:
    ended = "" if sandbox.ended is None else str(sandbox.ended)
    return {"value": passed / total, "reason": ended or reason, "timed_out": ended.startswith("timeout")}


def _test(item: Mapping[str, Any], sandbox: Sandbox, partial: bool, _: float) -> tuple[int, int, str]:
    """(passed, of, why not) for `snippets` of test code, each a test; their one test is a check(candidate) maybe."""
    calls = [0]
    namespace: dict[str, Any] = {"__name__": "test"}
    for trusted in item["setup"]:
        try:
            exec(compile(trusted, "setup", "exec"), namespace)
        except SyntaxError:  # a prompt in words
            continue
        except Exception as error:
            raise _Broken(f"its set-up raises {type(error).__name__}: {error}") from None
    try:
        trees = [ast.parse(snippet) for snippet in item["snippets"]]
    except SyntaxError as error:
        raise _Broken(f"is not valid Python: {error.msg}") from None
    names = [item["entry"]] if item["entry"] else sorted({name for tree in trees for name in _called(tree, namespace)})
    if not names:
        raise _Broken("calls no function of the program")
    proxies = {name: _proxy(sandbox, name, calls) for name in names}
    namespace |= proxies
    counts = [0, 0]
    whole = sum(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))
    reason = ""
    if partial:
        namespace["__counted__"] = lambda passed: _count(counts, passed)
        trees = [ast.fix_missing_locations(_Counting().visit(tree)) for tree in trees]
    for tree in trees:
        try:
            exec(compile(tree, "test", "exec"), namespace)
            if item["entry"] and callable(namespace.get("check")):
                namespace["check"](proxies[item["entry"]])
        except (Exception, SystemExit) as error:  # the boundary: whatever a value made the test raise is its failure
            reason = f"test failed: {type(error).__name__}: {error}"[:300]
            counts[1] += 1
        if sandbox.ended is not None or (reason and not partial):
            break
    if not calls[0]:
        raise _Broken(f"never calls the program; {reason}" if reason else "never calls the program")
    if not partial:
        failed = bool(reason) or sandbox.ended is not None
        return int(not failed), 1, reason
    passed, failed = counts
    total = max(passed + failed, whole, 1)
    return passed, total, reason or ("" if passed == total else f"{passed} of {total} tests passed")


def _proxy(sandbox: Sandbox, name: str, calls: list[int]) -> Callable[..., Any]:
    """The program's function as the test sees it."""

    def candidate(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        try:
            return sandbox.ask((name, args, kwargs))
        except ValueError:  # of marshal
            raise _Broken("passes an argument that is no plain value; only those can go into the sandbox") from None
        except Raised as error:
            kind, _, message = str(error).partition(": ")
            raise _RAISED.get(kind, CandidateError)(message if kind in _RAISED else str(error)) from None

    candidate.__name__ = candidate.__qualname__ = name
    return candidate


def _called(tree: ast.AST, known: Mapping[str, Any]) -> Iterator[str]:
    """Names that the test calls and nobody else defines."""
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
              if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name not in known and name not in bound and not hasattr(builtins, name):
                yield name


class _Counting(ast.NodeTransformer):
    """Each assert counts and none ends the test."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        frame = ast.parse("try:\n    assert 0\nexcept Exception:\n    __counted__(0)\nelse:\n    __counted__(1)").body[
            0
        ]
        assert isinstance(frame, ast.Try)
        frame.body = [node]
        return ast.copy_location(frame, node)


def _count(counts: list[int], passed: int) -> None:
    counts[0 if passed else 1] += 1


def _cases(item: Mapping[str, Any], sandbox: Sandbox, partial: bool, tolerance: float) -> tuple[int, int, str]:
    def run(args: Sequence[Any], expected: Any) -> str:
        try:
            value = sandbox.ask((item["entry"], tuple(args), {}))
        except (Raised, Ended) as error:
            return str(error)
        wrapped = item["wrapped"] and isinstance(expected, list) and len(expected) == 1
        if same(value, expected, tolerance) or (wrapped and same(value, expected[0], tolerance)):
            return ""
        return f"returned {value!r:.100} for {args!r:.100}"

    return _all(item["cases"], run, sandbox, partial)


def same(value: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether a returned value is the expected one, which may have been through JSON: lists are tuples, keys strings.

    True is not 1; 1 is 1.0; NaN is NaN. `tolerance`: of floats, relative and absolute.
    """
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        if isinstance(value, float) and isinstance(expected, float) and math.isnan(value):
            return math.isnan(expected)
        if value == expected:
            return True
        floats = isinstance(value, float) or isinstance(expected, float)
        try:
            return floats and tolerance > 0 and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(same(a, b, tolerance) for a, b in zip(value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        if all(isinstance(key, str) for key in expected):
            value = {key if isinstance(key, str) else str(key): entry for key, entry in value.items()}
        return value.keys() == expected.keys() and all(same(value[key], expected[key], tolerance) for key in expected)
    return type(value) is type(expected) and value == expected


def _programs(item: Mapping[str, Any], sandbox: Sandbox, partial: bool, tolerance: float) -> tuple[int, int, str]:
    def run(given: str, expected: str) -> str:
        try:
            output = sandbox.ask(given.encode())
        except (Raised, Ended) as error:
            return str(error)
        if not isinstance(output, bytes):
            return "no output"
        printed = output.decode(errors="replace")
        return "" if same_lines(printed, expected, tolerance) else f"printed {printed[:100]!r} for {given[:100]!r}"

    return _all(item["cases"], run, sandbox, partial)


def same_lines(printed: str, expected: str, tolerance: float = 0.0) -> bool:
    """All lines are equal, and there are as many; blanks at the end of a line and lines at the end do not count.

    `tolerance` above 0: words that are numbers may differ by it, relatively or absolutely.
    """
    ours, theirs = _lines(printed), _lines(expected)
    if len(ours) != len(theirs):
        return False
    return all(a == b or (tolerance > 0 and _same_words(a, b, tolerance)) for a, b in zip(ours, theirs))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_words(ours: str, theirs: str, tolerance: float) -> bool:
    def close(a: str, b: str) -> bool:
        try:
            return a == b or math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)
        except ValueError:
            return False

    words, expected = ours.split(), theirs.split()
    return len(words) == len(expected) and all(map(close, words, expected))


def _all(
    cases: Sequence[Sequence[Any]], run: Callable[[Any, Any], str], sandbox: Sandbox, partial: bool
) -> tuple[int, int, str]:
    passed, reason = 0, ""
    for given, expected in cases:
        why = run(given, expected)
        passed += not why
        reason = reason or why
        if (why and not partial) or sandbox.ended is not None:
            break
    return passed, len(cases), reason
