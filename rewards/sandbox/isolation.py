"""How a sandbox starts: which interpreter it sees, which user it is, and the bwrap command around it.

bwrap started by root maps to the host's root, whatever --uid says. So root gives up its identity first, for good, and
an unprivileged process asks bwrap for the namespaces. That user may not be able to reach the interpreter (one under
/root): root shows it to the sandbox's own mount namespace before it steps down, file by file and nothing beside them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import marshal
import os
import platform
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox import cgroups, seccomp

INSTALL = "install it (apt-get install bubblewrap, dnf install bubblewrap)"
OUTPUT_LIMIT = 1 << 20  # bytes of one answer: a returned value, or the output of one run
WORK_BYTES, FILE_BYTES, OPEN_FILES, PROCESSES = 64 << 20, 32 << 20, 64, 32
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_PYTHON = ("-s", "-S", "-P", "-B")
_SHOW = """
import json, os, sys
for name in ("ctypes", "ssl", "hashlib", "zlib", "bz2", "lzma", "sqlite3", "decimal", "uuid", "_elementtree"):
    try:
        __import__(name)
    except ImportError:
        pass
maps = [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if ".so" in line and "/" in line]
print(json.dumps({"library": os.path.dirname(os.__file__), "shared": sorted(set(maps))}))
"""
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_SLAVE, _MS_NOSUID, _MS_NODEV = 0x20000, 4096, 0x4000, 1 << 19, 2, 4
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program: `seconds` of CPU time a process, bytes of address space a process."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Started:
    """bwrap's process, and the fd on which it tells the pid of the namespace's first process, whose end is the end of
    all; None: the process is the program itself."""

    process: subprocess.Popen[bytes]
    info: int | None


class SandboxError(RuntimeError):
    """The sandbox did not start: the machine's fault, not the program's."""


def why_not() -> str | None:
    """Why there can be no sandbox here, with the remedy; None if there can."""
    if sys.platform != "linux":
        return "runs programs in a sandbox of Linux; use a Linux machine"
    if shutil.which("bwrap") is None:
        return f"needs bubblewrap, which is not installed; {INSTALL}"
    if platform.machine() not in seccomp.MACHINES:
        return f"has no list of system calls for {platform.machine()}; use {' or '.join(seccomp.MACHINES)}"
    return None


@functools.cache
def interpreter() -> tuple[str, tuple[str, ...]]:
    """The real interpreter of this environment, and the files and folders outside /usr/lib that it cannot do without.

    Found by asking it; the packages beside its standard library are none of them.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if sys.platform != "linux":
        return python, ()
    shown = subprocess.run([python, *_PYTHON, "-c", _SHOW], env={}, capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    needed = [python, found["library"], *found["shared"]]
    roots = ["/usr/lib", "/usr/lib64", "/usr/bin"]
    visible: list[str] = []
    for path in needed:
        if not any(Path(path).is_relative_to(root) or Path(os.path.realpath(path)).is_relative_to(root)
                   for root in [*roots, *visible]):  # fmt: skip
            visible.append(path)
    return python, tuple(visible)


@functools.cache
def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text()


def _arguments(limits: Limits, processes: int | None) -> str:
    """What inside.py is told on its command line."""
    rlimits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": int(limits.seconds) + 2,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
    }
    if processes is not None:
        rlimits["RLIMIT_NPROC"] = processes
    return marshal.dumps((rlimits, OUTPUT_LIMIT)).hex()


_ENVIRONMENT = {
    "PATH": "/usr/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gives the same answer
    "MALLOC_ARENA_MAX": "2",  # or each thread costs 64 MB of address space
    "OPENBLAS_NUM_THREADS": "1",
}


class Isolation:
    """One slot of a worker process: a user of its own, control groups, and the command. Start sandboxes one by one."""

    def __init__(self, owner: int) -> None:
        self._owner = owner
        self._root = os.geteuid() == 0
        self._uid, self._lock = _claim_uid() if self._root else (os.geteuid(), None)
        python, self._visible = interpreter()
        self._staged = [path for path in self._visible if self._root and not _open_to_all(path)]
        if self._staged:
            _libc()  # loaded before the fork
        self._command = self._bwrap(python)
        self._filter = seccomp.program()

    def start(self, limits: Limits) -> Started:
        """A sandbox that waits for its first request. Its stderr is bwrap's; the program cannot write there.

        SandboxError: this user may not do what it takes.
        """
        # Bounds on all processes together; bwrap's two and the pages of files that they share count too.
        groups = {"pids": PROCESSES + 4, "memory": 2 * limits.memory_bytes}
        joined = cgroups.make(self._owner, self._uid, groups) if self._root else []
        info, told = os.pipe()
        read, write = os.pipe()
        try:
            os.write(write, self._filter)
            process = subprocess.Popen(
                [*self._command, "--seccomp", str(read), "--info-fd", str(told), *self._run(limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[read, told],
                cwd="/",
                env={},  # /proc would show bwrap's own
                preexec_fn=functools.partial(self._step_down, joined, write),
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(info)
            raise SandboxError(f"{error}; it takes a root that may mount and change users, or a plain user") from None
        finally:
            for fd in (read, write, told):
                os.close(fd)
        return Started(process, info)

    def _run(self, limits: Limits) -> list[str]:
        return [interpreter()[0], *_PYTHON, "-c", _inside(), _arguments(limits, PROCESSES)]

    def _bwrap(self, python: str) -> list[str]:
        found = shutil.which("bwrap")
        assert found is not None
        bwrap = os.path.realpath(found)
        command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
        command += ["--hostname", "sandbox", "--cap-drop", "ALL"]
        if "--disable-userns" in _bwrap_help(bwrap):
            command.append("--disable-userns")
        for path in _SYSTEM:
            command += ["--ro-bind-try", path, path]
        for name in ("bin", "lib", "lib64"):
            link = Path("/", name)
            if link.is_symlink():
                command += ["--symlink", os.readlink(link), str(link)]
            elif link.is_dir():
                command += ["--ro-bind", str(link), str(link)]
        for device in ("/dev/null", "/dev/zero", "/dev/urandom"):  # bwrap's --dev comes with a writable tmpfs
            command += ["--dev-bind", device, device]
        for path in self._visible:
            source = _stage(self._staged.index(path)) if path in self._staged else path
            command += ["--ro-bind", source, path]
            packages = Path(path, "site-packages")
            if packages.is_dir():
                command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
        command += ["--size", str(WORK_BYTES), "--tmpfs", "/w", "--remount-ro", "/", "--chdir", "/w"]
        for name, value in {**_ENVIRONMENT, "HOME": "/w", "TMPDIR": "/w"}.items():
            command += ["--setenv", name, value]
        return command

    def _step_down(self, joined: Sequence[Path], write: int) -> None:
        """In the forked child, before bwrap."""
        os.close(write)  # bwrap reads the filter to its end
        for file in joined:
            file.write_text("0")
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go when the machine is out of memory
        if not self._root:
            return
        if self._staged:
            _show(self._staged)
        os.setgroups([])
        os.setresgid(self._uid, self._uid, self._uid)
        os.setresuid(self._uid, self._uid, self._uid)


def start_unsafe(limits: Limits) -> Started:
    """The same far side without a sandbox: for trusted programs only."""
    process = subprocess.Popen(
        [interpreter()[0], *_PYTHON, "-c", _inside(), _arguments(limits, None)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tempfile.gettempdir(),
        env=_ENVIRONMENT,
        preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
    )
    return Started(process, None)


def _die_with_parent() -> Callable[[], None]:
    libc = _libc()
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _claim_uid() -> tuple[int, socket.socket]:
    """A user id that nobody has, and the lock that keeps other workers of this machine off it while it is held.

    Limits on a user's processes then count those of one sandbox. The lock is an abstract socket: no file, gone with
    the process.
    """
    mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for uid in range(59999, 58999, -1):  # the end of the range that people's accounts are made from the start of
        if not any(first <= uid < first + count for first, _, count in mapped):
            continue
        try:
            pwd.getpwuid(uid)
            continue
        except KeyError:
            pass
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0grpo-sandbox-{uid}")
        except OSError:
            lock.close()
            continue
        return uid, lock
    raise RuntimeError("the code sandbox found no unused user id from 59000 to 59999; run as an unprivileged user")


def _open_to_all(path: str) -> bool:
    """Whether any user can reach and read the path."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in Path(path).parents) and bool(
        os.stat(path).st_mode & stat.S_IROTH
    )


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _stage(place: int) -> str:
    return f"/tmp/{place}"


def _show(paths: Sequence[str]) -> None:
    """Put the paths under a /tmp that only this process and its children see."""

    def done(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    libc = _libc()
    done(libc.unshare(_CLONE_NEWNS), "a mount namespace of its own")
    done(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "mounts that stay private")
    done(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=755"), "a private /tmp")
    for place, path in enumerate(paths):
        target = _stage(place)
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        done(libc.mount(path.encode(), target.encode(), None, _MS_BIND, None), path)


@functools.cache
def _bwrap_help(bwrap: str) -> str:
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True).stdout
