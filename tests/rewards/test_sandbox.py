"""Hostile programs get nothing, and leave no process, file, shared memory or control group behind."""

import contextlib
import functools
import importlib.util
import marshal
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.sandbox import cgroups, isolation, seccomp
from rewards.sandbox.isolation import Isolation, Limits
from rewards.sandbox.process import Ended, Raised, Sandbox, SandboxError, value_of

if not sys.platform.startswith("linux"):
    pytest.skip("the sandbox is Linux's", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("hostile_programs", Path(__file__).with_name("hostile_programs.py"))
assert _spec is not None and _spec.loader is not None
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)

MEMORY = (1 << 30) + os.getpid() * 4096  # its own in the command line of every process of these sandboxes
NUMBERS = (
    "".join(f"NR_{name} = {pair[seccomp.MACHINES[os.uname().machine][1]]}\n" for name, pair in seccomp.DENIED.items())
    + f"NR_clone = {seccomp.MACHINES[os.uname().machine][2][0]}\n"
)


@pytest.fixture(scope="module")
def slot():
    if why := isolation.why_not():
        pytest.fail(f"the sandbox {why}")
    yield Isolation(os.getpid())
    cgroups.remove(os.getpid())


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Canaries outside: a secret, listening sockets, a folder anyone may write to."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    (folder / "secret").write_text("the secret")
    (folder / "secret").chmod(0o644)
    os.environ["CANARY"] = "the secret"
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(f"\0canary-{os.getpid()}")
        unix.listen()
        tcp.setblocking(False)
        unix.setblocking(False)
        yield {
            "folder": str(folder),
            "secret": str(folder / "secret"),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "unix": f"canary-{os.getpid()}",
            "pid": os.getpid(),
        }
        for listener in (tcp, unix):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            udp.recv(1)
    del os.environ["CANARY"]


def test_the_search_for_what_is_left_finds_it(slot):
    with Sandbox(functools.partial(slot.start, Limits(5, MEMORY)), 5):
        assert len(left_behind(0.0)) >= 2
    assert left_behind() == []


def run(slot, source, *requests, seconds=10.0, stdin=False):
    with Sandbox(functools.partial(slot.start, Limits(seconds, MEMORY)), seconds) as sandbox:
        sandbox.ask({"source": source, "stdin": stdin})
        return [sandbox.ask(request) for request in requests]


def left_behind(within=0.2) -> list[str]:
    """Processes that one of our sandboxes started."""
    mark = marshal.dumps(MEMORY).hex().encode()[2:]
    deadline = time.monotonic() + within
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(path.parent.name)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def shared_memory() -> str:
    return Path("/proc/sysvipc/shm").read_text()


def test_at_least_29_hostile_programs():
    assert len(hostile.RETURNING) + len(hostile.ENDING) >= 29 + 2  # two more stand below


@pytest.mark.parametrize("name", hostile.RETURNING)
def test_hostile_program_gets_nothing(slot, host, name):
    source, expected = hostile.RETURNING[name]
    before = shared_memory(), sorted(os.listdir(host["folder"]))
    [got] = run(slot, hostile.CTYPES + NUMBERS + source, ("f", (host,), {}))
    assert expected(got) if callable(expected) else got == expected, got
    assert "the secret" not in repr(got)
    assert left_behind() == []
    assert (shared_memory(), sorted(os.listdir(host["folder"]))) == before


@pytest.mark.parametrize("name", hostile.ENDING)
def test_hostile_program_is_ended(slot, host, name):
    source, seconds, why = hostile.ENDING[name]
    start = time.monotonic()
    with pytest.raises(Ended, match=f"^{why}"):
        run(slot, source, ("f", (host,), {}), seconds=seconds)
    assert time.monotonic() - start < seconds + 4.0
    assert left_behind() == []


def test_printing_200_mb_is_cut_off(slot):
    source = "import os\nwhile True:\n    os.write(1, b'x' * 65536)"
    with pytest.raises(Raised, match=r"^output_limit"):
        run(slot, source, b"", stdin=True)
    assert left_behind() == []


def test_returning_100_mb_is_cut_off(slot):
    with pytest.raises(Raised, match=r"^output_limit"):
        run(slot, "def f(): return 'x' * (100 << 20)", ("f", (), {}))


def test_memory_of_all_processes_together_is_limited():
    if not cgroups.make(os.getpid(), 0, {"memory": 1 << 30}):
        assert os.geteuid() != 0, "root can make no control group here"
        return  # the bound is then 32 processes with `memory_mb` each
    slot, source = (
        Isolation(os.getpid()),
        """
import os, time
def f():
    children = []
    for _ in range(4):
        read, write = os.pipe()
        children.append(os.fork())
        if not children[-1]:
            block = bytearray(180 << 20)
            block[::4096] = bytes(len(block[::4096]))
            os.write(write, b"x")
            time.sleep(20)
            os._exit(0)
        os.close(write)
        os.read(read, 1)
    time.sleep(0.5)
    return sum(os.waitpid(child, os.WNOHANG)[0] == 0 for child in children)
""",
    )
    with Sandbox(functools.partial(slot.start, Limits(10, 256 << 20)), 10) as sandbox:
        sandbox.ask({"source": source, "stdin": False})
        assert sandbox.ask(("f", (), {})) <= 2  # 512 MB in all


def test_no_byte_is_left_on_disk_and_no_control_group(slot):
    run(slot, "def f():\n    open('/w/file', 'w').write('x' * 1000)", ("f", (), {}))
    if os.geteuid() == 0:
        mine = [entry.path for top in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock") if os.path.isdir(top)
                for entry in os.scandir(top) if entry.stat(follow_symlinks=False).st_uid == slot._uid]  # fmt: skip
        assert mine == []
    cgroups.remove(os.getpid())
    assert not list(cgroups.ROOT.glob(f"**/{cgroups.PREFIX}{os.getpid()}-*"))


def test_one_program_cannot_meet_what_another_left(slot):
    assert run(slot, "def f(): open('/w/note', 'w').write('x')\n", ("f", (), {})) == [None]
    assert run(slot, "import os\ndef f(): return os.listdir('/w')", ("f", (), {})) == [[]]


def test_runs_of_a_script_start_afresh(slot):
    source = "try:\n    n += 1\nexcept NameError:\n    n = 1\nprint(n, input())"
    assert run(slot, source, b"a\n", b"b\n", stdin=True) == [b"1 a\n", b"1 b\n"]


def test_values_come_out_as_literals(slot):
    source = "from collections import Counter, namedtuple\nP = namedtuple('P', 'a b')\n"
    source += "def f(x): return [x, Counter('aab'), P(1, 2)]"
    value = [1, -0.0, True, None, "é\n\ud800", b"\x00", (1,), {2, 3}, set(), {"a": {1: [2]}}, 1e300 * 10, 2j]
    [[got, counts, pair]] = run(slot, source, ("f", (value,), {}))
    assert repr(got) == repr(value) and counts == {"a": 2, "b": 1} and pair == (1, 2)


@pytest.mark.parametrize(
    "value",
    ["object()", "iter([])", "type('L', (list,), {})()", "[print]", "{1: lambda: 0}", "(l := [], l.append(l), l)[2]"],
)
def test_values_of_other_types_do_not(slot, value):
    with pytest.raises(Raised, match=r"TypeError|RecursionError"):
        run(slot, f"def f(): return {value}", ("f", (), {}))


@pytest.mark.parametrize(
    "text", ["__import__('os').getpid()", "f()", "[" * 100_000, "-" * 100_000 + "1", "1 if 1 else 2", "nan()", "x"]
)
def test_what_comes_out_is_never_executed(text):
    with pytest.raises((ValueError, SyntaxError, MemoryError, RecursionError)):
        value_of(text)


def test_filters_are_well_formed():
    for machine in seccomp.MACHINES:
        data = seccomp.program(machine)
        assert len(data) % 8 == 0 and len(data) // 8 < 4096
    with pytest.raises(ValueError, match="no list of system calls for riscv64"):
        seccomp.program("riscv64")


def test_a_sandbox_that_cannot_start_says_why(slot):
    command = slot._command
    slot._command = [*command, "--ro-bind", "/nowhere/at/all", "/x"]
    try:
        with pytest.raises(SandboxError, match="/nowhere/at/all"):
            run(slot, "")
    finally:
        slot._command = command
    assert left_behind() == []


def test_a_plain_user_needs_no_root(tmp_path):
    """The same far side, started by an unprivileged process."""
    if os.geteuid() != 0:
        pytest.skip("the other tests ran unprivileged")
    python, root = "/usr/bin/python3", Path(__file__).resolve().parents[2]
    version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
    if version.stdout.strip() != b"True" or not all(parent.stat().st_mode & 1 for parent in root.parents):
        pytest.skip("no Python 3.11 or no checkout that every user can reach")
    forks = """
import os
def f():
    for count in range(99):
        try:
            if not os.fork():
                __import__("time").sleep(20)
        except OSError:
            return count, os.getuid()
"""
    script = """
import functools, sys
sys.path.insert(0, sys.argv[1])
from rewards.sandbox.isolation import Isolation, Limits
from rewards.sandbox.process import Sandbox
slot = Isolation(0)
with Sandbox(functools.partial(slot.start, Limits(5, 1 << 30)), 5) as sandbox:
    sandbox.ask({"source": sys.argv[2], "stdin": False})
    print(sandbox.ask(("f", (), {})))
"""
    command, nobody = [python, "-c", script, str(root), forks], 64321
    done = subprocess.run(
        command, user=nobody, group=nobody, extra_groups=[], cwd="/", env={}, capture_output=True, text=True
    )
    assert re.fullmatch(r"\(\d\d, 64321\)\n", done.stdout), done.stderr
    assert int(done.stdout[1:3]) < 40
