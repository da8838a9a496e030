"""A running sandbox, from outside: requests go in, bounded lines come out, and the whole thing can be killed.

Nothing that comes out is executed or unpickled: a value is text that ast.literal_eval reads.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import json
import marshal
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rewards.sandbox.isolation import OUTPUT_LIMIT, SandboxError, Started

START_LIMIT_S = 60.0  # a busy machine may take long; the program's own clock starts afterwards
_LINE_LIMIT = 4 * OUTPUT_LIMIT + 64
_DIGITS = 100_000  # of an int, as inside.py allows


class Ended(Exception):
    """The program is over and answers no more: it ran out of time, crashed, or said too much. The text says which."""


class Raised(Exception):
    """The call failed: `Type: message` as the program says. It may be called again."""


@functools.cache
def _adopt_orphans() -> None:
    """A program that ends by itself outlives bwrap for a moment as a zombie. Many systems' init reaps none, or late,
    and zombies count against the limit of processes. So they become this process's (PR_SET_CHILD_SUBREAPER).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _reap(pid: int) -> None:
    """Wait for a program's first process, killed or at its end, unless bwrap has done so."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:  # bwrap's, or reaped
            return
        time.sleep(0.001)


class Sandbox:
    """A context manager around one program. Answers that it has `seconds` for, in all, once it has started."""

    def __init__(self, start: Callable[[], Started], seconds: float) -> None:
        self.seconds = seconds
        self.ended: Ended | None = None  # why, if the program is over
        self._first_pid = 0
        _adopt_orphans()
        started = start()
        self._process, self._info, self._first = started.process, started.info, None
        self._buffer = b""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._deadline = time.monotonic() + START_LIMIT_S
        try:
            ready = self._line() == b"V ready"
        except Ended:
            ready = False
        if not ready:
            reason = self._complaint()
            self.close()
            raise SandboxError(reason)
        if self._info is not None:
            self._first_pid = json.loads(os.read(self._info, 4096))["child-pid"]
            self._first = os.pidfd_open(self._first_pid)
        self._deadline = time.monotonic() + seconds

    def ask(self, request: Any) -> Any:
        """The value that the program answers a request with (inside.py says which there are).

        Raised: it has none. Ended: now and from now on there is none. ValueError: the request is no plain value.
        """
        message = marshal.dumps(request)
        if self.ended is not None:
            raise self.ended
        self._send(message)
        kind, _, text = self._line().partition(b" ")
        if kind == b"E" and text == b"output_limit":
            raise Raised(f"output_limit: an answer of over {OUTPUT_LIMIT} bytes")
        if kind == b"V":
            try:
                return value_of(text.decode())
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
                raise Raised(f"unreadable value: {type(error).__name__}") from None
        raise Raised(text[:400].decode(errors="replace"))

    def close(self) -> None:
        """Kill the program with everything it started. Its files are gone with its mounts."""
        if self._first is None:
            self._process.kill()
        else:  # bwrap itself is left to reap it: then all are gone, and none is anybody's zombie
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
        for fd in (self._first, self._info):
            if fd is not None:
                os.close(fd)
        self._first = self._info = None
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._first_pid:
            _reap(self._first_pid)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not select.select([], [self._in], [], self._left())[1]:
                self._end("timeout")
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                continue
            except OSError:
                self._end("crash")

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > _LINE_LIMIT:
                self._end("output_limit")
            if not select.select([self._out], [], [], self._left())[0]:
                self._end("timeout")
            piece = os.read(self._out, 1 << 16)
            if not piece:
                self._end("crash")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _end(self, how: str) -> None:
        texts = {"timeout": f"timeout: no answer within {self.seconds:g} s"}
        texts["output_limit"] = f"output_limit: an answer of over {OUTPUT_LIMIT} bytes"
        if how == "crash":
            try:
                texts[how] = f"crash: the program ended with exit status {self._process.wait(1.0)}"
            except subprocess.TimeoutExpired:
                texts[how] = "crash: the program closed its answers"
        self.ended = Ended(texts[how])
        raise self.ended

    def _complaint(self) -> str:
        """bwrap's last words."""
        assert self._process.stderr is not None
        try:
            how = f"bwrap ended with exit status {self._process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            how = f"no sign of life within {START_LIMIT_S:g} s"
        words = self._process.stderr.read(4096).decode(errors="replace").strip().splitlines()
        return words[-1] if words else how


def value_of(text: str) -> Any:
    """The value of a literal; `nan` and `inf` are numbers too. What literal_eval raises, for anything else."""
    sys.set_int_max_str_digits(_DIGITS)
    if "nan" not in text and "inf" not in text:
        return ast.literal_eval(text)
    return ast.literal_eval(_Numbers().visit(ast.parse(text, mode="eval")))


class _Numbers(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("nan", "inf") else node
