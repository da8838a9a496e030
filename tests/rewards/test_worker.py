"""The pool's processes: they start late, are replaced, are reaped, and never outlive the process that started them."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rewards.records import Status
from rewards.worker import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
TARGET = "rewards.user_function:make"


@pytest.fixture
def options(tmp_path):
    (tmp_path / "fns.py").write_text(
        textwrap.dedent(
            """
            import os, signal, subprocess, sys, time
            def fn(completion, prompt):
                if completion == "stuck":  # holds the interpreter lock inside C, deaf to signals' Python handlers
                    return float(len(str(9 ** (9 ** 9))))
                if completion == "sleep":
                    time.sleep(600)
                if completion == "child":
                    child = subprocess.Popen(["sleep", "600"])
                    open(prompt, "w").write(str(child.pid))
                    time.sleep(600)
                if completion == "kill nursery":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(600)
                return float(os.getpid())
            """
        )
    )
    return {"function": f"{tmp_path / 'fns.py'}:fn", "style": "own", "grouped": False, "kwargs": {}}


def item(text, prompt=""):
    return [{"completion": text, "prompt": prompt, "fields": {}}]


def alive(pid: int) -> bool:
    """Running, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, within=5.0) -> bool:
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def test_starts_on_use_ends_on_close_and_starts_again(options):
    pool = WorkerPool(2)
    assert pool.pids() == []
    [answer] = pool.run(TARGET, options, [item("a")], 5)
    assert answer.status is Status.OK and pool.pids() == [int(answer.result[0]["value"])]  # as many as there is work
    nursery = pool._nursery.pid
    pids = [nursery, *pool.pids()]
    pool.close()
    pool.close()
    assert gone(pids, 1.0) and not Path(f"/proc/{nursery}").exists()  # reaped, no zombie
    assert pool.run(TARGET, options, [item("a")], 5)[0].status is Status.OK
    pool.close()


def test_killed_worker_is_reaped_with_what_it_started(options, tmp_path):
    pool = WorkerPool(1)
    pid_file = tmp_path / "pid"
    [answer] = pool.run(TARGET, options, [item("child", str(pid_file))], 1.0)
    assert answer.status is Status.TIMEOUT
    assert gone([int(pid_file.read_text())], 2.0)
    assert children_of(pool._nursery.pid) == pool.pids()
    pool.close()


def test_workers_killed_from_outside_are_replaced(options):
    pool = WorkerPool(2)
    pool.run(TARGET, options, [item("a"), item("b")], 5)
    for pid in pool.pids():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    answers = pool.run(TARGET, options, [item("a"), item("b")], 5)
    assert [answer.status for answer in answers] == [Status.OK] * 2
    pool.close()


def test_survives_the_loss_of_the_nursery(options):
    pool = WorkerPool(2)
    answers = pool.run(TARGET, options, [item("kill nursery"), *[item("a")] * 4], 5)
    assert answers[0].status is Status.ERROR
    assert answers[-1].status is Status.OK
    answers = pool.run(TARGET, options, [item("a")] * 4, 5)
    assert [answer.status for answer in answers] == [Status.OK] * 4
    pool.close()


def test_threads_share_a_pool(options):
    pool = WorkerPool(2)
    answers = [[] for _ in range(4)]

    def use(place: int) -> None:
        answers[place] = pool.run(TARGET, options, [item("a")] * 20, 5)

    threads = [threading.Thread(target=use, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(len(part) == 20 and all(a.status is Status.OK for a in part) for part in answers)
    pool.close()


def test_an_item_that_is_no_json_is_the_callers_error(options):
    with pytest.raises(TypeError):
        WorkerPool(1).run(TARGET, options, [object()], 5)


@pytest.mark.parametrize("text", ["idle", "stuck"])
def test_nothing_outlives_a_parent_that_was_killed(options, text):
    script = f"""
    import sys, threading
    sys.path.insert(0, {str(ROOT)!r})
    from rewards.worker import WorkerPool
    pool, options = WorkerPool(2), {options!r}
    item = lambda text: [{{"completion": text, "prompt": "", "fields": {{}}}}]
    assert [answer.status for answer in pool.run({TARGET!r}, options, [item("a")] * 2, 5)] == ["ok"] * 2
    print(pool._nursery.pid, *pool.pids(), flush=True)
    if {text!r} == "stuck":
        pool.run({TARGET!r}, options, [item("stuck")] * 2, 600)
    threading.Event().wait()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3 and all(map(alive, pids))
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    assert gone(pids, 4.0)


def test_an_exiting_parent_leaves_nothing_and_needs_no_main_guard(options):
    script = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from rewards.worker import WorkerPool
    pool = WorkerPool(1)
    [answer] = pool.run({TARGET!r}, {options!r}, [[{{"completion": "a", "prompt": "", "fields": {{}}}}]], 5)
    assert answer.status == "ok", answer
    print("ran", pool._nursery.pid, *pool.pids())
    """
    path = Path(options["function"].rpartition(":")[0]).with_name("unguarded.py")
    path.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr, done.stdout.count("ran")) == (0, "", 1)
    assert gone([int(word) for word in done.stdout.split()[1:]], 2.0)
