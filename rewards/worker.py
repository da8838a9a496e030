"""A small pool of worker processes that can be killed: the only way to stop a checker that hangs.

A thread or an asyncio timeout cannot interrupt `9^{9^{9^{9}}}`: the interpreter lock is held and the whole process
freezes. A worker here is a process with a deadline and a memory limit; past the deadline it gets SIGKILL and a fresh
one is forked from a process that has the checker imported already. The deadline counts from the moment the worker
starts on the item: imports and time in the queue are not charged to a completion. See rewards/worker_child.py for the
processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rewards.records import Status

LOAD_LIMIT_S = 300.0  # importing a user's module may be slow (torch from a network disk); forever is still a failure
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from rewards.worker_child import main; main()"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one item: `result` when status is OK, else the reason of a TIMEOUT or an ERROR."""

    status: Status
    result: Any = None
    reason: str = ""
    queue_s: float = 0.0
    run_s: float = 0.0


@dataclass(slots=True)
class _Worker:
    pid: int
    connection: Connection
    index: int = -1  # of the item it works on
    sent: float = 0.0
    started: float | None = None  # None while it loads the target


class WorkerPool:
    """Runs JSON items through `module:maker` targets in killable processes. Starts on first use; safe from any thread.

    `memory_gb` limits the address space of a worker (0: no limit).
    """

    def __init__(self, workers: int = 2, memory_gb: float = 4.0) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least 1 process is needed to run rewards")
        self._size = workers
        self._memory_bytes = int(memory_gb * 2**30)
        self._preload: list[tuple[str, Mapping[str, Any]]] = []
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._workers: list[_Worker] = []
        self._stop: weakref.finalize | None = None

    def preload(self, target: str, options: Mapping[str, Any]) -> None:
        """Load a trusted target before workers are forked, so that a replaced worker is ready at once."""
        if (target, options) not in self._preload:
            self._preload.append((target, options))

    def run(self, target: str, options: Mapping[str, Any], items: Sequence[Any], timeout: float | None) -> list[Answer]:
        """One Answer per item, in order. `timeout` is in seconds per item (None: no limit).

        Items must be plain JSON values (TypeError otherwise). A worker that dies costs its item an ERROR, never the
        others.
        """
        submitted = time.perf_counter()
        messages = [json.dumps({"target": target, "options": options, "item": item}).encode() for item in items]
        answers: list[Answer | None] = [None] * len(messages)
        with self._lock:
            try:
                self._run(messages, answers, submitted, timeout)
            except BaseException:
                self._close()  # workers may be in the middle of items: a later batch must not read their answers
                raise
        assert all(answer is not None for answer in answers)
        return answers  # type: ignore[return-value]

    def close(self) -> None:
        """Kill the workers and the nursery. The pool starts anew when it is used again."""
        with self._lock:
            self._close()

    def pids(self) -> list[int]:
        """Process ids of the workers, for tests and diagnostics."""
        return [worker.pid for worker in self._workers]

    def _run(
        self, messages: list[bytes], answers: list[Answer | None], submitted: float, timeout: float | None
    ) -> None:
        while len(self._workers) < min(self._size, len(messages)):
            self._workers.append(_Worker(*self._fork(None)))
        pending = deque(range(len(messages)))
        retried: set[int] = set()
        idle, busy = list(self._workers), dict[Connection, _Worker]()

        def finish(worker: _Worker, status: Status, result: Any = None, reason: str = "", broken: bool = False) -> None:
            now = time.perf_counter()
            start = worker.started if worker.started is not None else now
            answers[worker.index] = Answer(status, result, reason, start - submitted, now - start)
            del busy[worker.connection]
            if broken:
                worker.connection.close()
                worker.pid, worker.connection = self._fork(worker.pid)
            idle.append(worker)

        def lost(worker: _Worker) -> None:
            """The worker died. An item that it had not started on is not to blame: it gets another one, once."""
            index, started = worker.index, worker.started is not None
            finish(worker, Status.ERROR, reason="the worker process died (crash or out of memory)", broken=True)
            if not started and index not in retried:
                retried.add(index)
                pending.appendleft(index)

        while pending or busy:
            while pending and idle:
                worker = idle.pop()
                worker.index, worker.sent, worker.started = pending.popleft(), time.perf_counter(), None
                busy[worker.connection] = worker
                try:
                    worker.connection.send_bytes(messages[worker.index])
                except OSError:
                    lost(worker)
            if not busy:
                continue
            left = min(_deadline(worker, timeout) for worker in busy.values()) - time.perf_counter()
            ready = wait(list(busy), min(max(left, 0.0), 60.0))  # poll() cannot wait for an infinite time
            for connection in ready:
                worker = busy[connection]  # type: ignore[index]
                try:
                    reply = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    lost(worker)
                    continue
                if "started" in reply:
                    worker.started = time.perf_counter()
                elif "error" in reply:
                    finish(worker, Status.ERROR, reason=reply["error"])
                else:
                    finish(worker, Status.OK, reply["result"])
            now = time.perf_counter()
            for worker in [w for w in busy.values() if _deadline(w, timeout) <= now]:
                if worker.started is None:
                    finish(worker, Status.ERROR, reason=f"not loaded after {LOAD_LIMIT_S:g} s", broken=True)
                else:
                    finish(worker, Status.TIMEOUT, reason=f"no answer after {timeout:g} s", broken=True)

    def _fork(self, old: int | None) -> tuple[int, Connection]:
        """A new worker, in the place of `old`, which is killed first."""
        for _ in range(2):  # a nursery killed from outside took its workers along; one that dies at the start is a bug
            if self._nursery is not None and self._nursery.poll() is not None:
                self._stop_nursery()
            if self._nursery is None:
                self._start()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(self._control, [json.dumps({"kill": old}).encode()], [theirs.fileno()])
                reply = self._control.recv(16, socket.MSG_WAITALL)
            except OSError:
                reply = b""
            if reply:
                return json.loads(reply), Connection(ours.detach())
            ours.close()
            self._stop_nursery()
        raise RuntimeError("the process that forks reward workers dies when it starts; see its messages on stderr")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        home = str(Path(__file__).resolve().parent.parent)
        paths = list(dict.fromkeys([*(str(Path(p).resolve()) for p in sys.path), home]))
        arguments = [theirs.fileno(), os.getpid(), self._memory_bytes, self._preload]
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(paths), json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # forked: no thread pools
            )
        self._control = ours
        self._stop = weakref.finalize(self, _stop, ours, self._nursery)  # also at interpreter exit

    def _close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        self._workers = []
        self._stop_nursery()

    def _stop_nursery(self) -> None:
        if self._stop is not None:
            self._stop()
        self._nursery = self._control = self._stop = None


def _deadline(worker: _Worker, timeout: float | None) -> float:
    if worker.started is None:
        return worker.sent + LOAD_LIMIT_S
    return worker.started + (float("inf") if timeout is None else timeout)


def _stop(control: socket.socket, nursery: subprocess.Popen[bytes]) -> None:
    control.close()  # the nursery sees it, kills its workers and ends
    try:
        nursery.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        nursery.kill()
        nursery.wait()
