"""The far side of rewards/worker.py: a nursery process that forks workers, and the loop a worker runs.

    trainer --control socket--> nursery (imports the heavy checkers once, runs nobody's input)
       |                           | fork, SIGKILL, reap
       +-------item socket------> worker (may hang, crash or run out of memory at any time)

The nursery, not multiprocessing's forkserver: that one re-imports the trainer's __main__ in every worker (all of Ray,
or a user's unguarded script) and its workers keep it alive after the trainer was killed. Messages are JSON; nothing
is pickled.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

_loaded: dict[str, Callable[[Any], Any]] = {}  # inherited by the workers: what the nursery loaded is not loaded again


def load(target: str, options: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The function that scores one item: `module:maker` called with the options, once per process.

    Raises whatever importing the module or calling the maker raises.
    """
    key = json.dumps([target, options], sort_keys=True)
    if key not in _loaded:
        module, _, maker = target.partition(":")
        _loaded[key] = getattr(importlib.import_module(module), maker)(**options)
    return _loaded[key]


def describe(error: BaseException) -> str:
    """One line: the exception and where the user's code raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:500] + place


def work(connection: Connection) -> None:
    """Answer items until the trainer hangs up. Two messages an item: loaded (the clock starts), then done."""
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            score = load(message["target"], message["options"])
            connection.send_bytes(b'{"started": true}')
            reply = json.dumps({"result": score(message["item"])})
        except BrokenPipeError:
            return
        except BaseException as error:  # the reward boundary: sys.exit() and MemoryError of user code are answers too
            reply = json.dumps({"error": describe(error)})
        connection.send_bytes(reply.encode())


def die_with(parent: int) -> None:
    """SIGKILL this process when the parent goes; a worker stuck inside C code would not notice a closed socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)


def fork_worker(control: socket.socket, item_fd: int, memory_bytes: int) -> int:
    """Fork a worker that serves `item_fd`, in a process group of its own so that what it starts dies with it."""
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        os.close(item_fd)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        die_with(nursery)
        control.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        work(Connection(item_fd))
        code = 0
    except BaseException:  # never return into the nursery's loop in a forked child
        traceback.print_exc()
    finally:
        os._exit(code)


def kill(pid: int) -> None:
    """SIGKILL a worker and its process group, and reap it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # not in its own group yet
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # an unreaped child's pid cannot be reused, so the kill cannot hit a stranger


def main() -> None:
    """Serve requests {"kill": pid or null} with the fd of the replacement's socket, until the trainer is gone."""
    control_fd, trainer, memory_bytes, preload = json.loads(sys.argv[2])
    os.dup2(2, 1)  # a reward's print must not land in the trainer's stdout
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    for target, options in preload:
        try:
            load(target, options)
        except Exception as error:
            # Not fatal here: every item for this target will be answered with the error.
            print(f"reward worker: cannot preload {target}: {describe(error)}", file=sys.stderr)
    workers: set[int] = set()
    try:
        while os.getppid() == trainer:  # a forked sibling may hold the socket open after the trainer died
            if not select.select([control], [], [], 1.0)[0]:
                continue
            data, fds, _, _ = socket.recv_fds(control, 64, 1)
            if not data:
                break
            os.set_inheritable(fds[0], False)
            old = json.loads(data)["kill"]
            if old in workers:  # not so when it died with an earlier nursery
                kill(old)
                workers.remove(old)
            pid = fork_worker(control, fds[0], memory_bytes)
            workers.add(pid)
            control.sendall(json.dumps(pid).encode().ljust(16))
    finally:
        for pid in workers:
            kill(pid)
