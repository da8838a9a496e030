"""`grpo submit` against a real Ray head: the log is followed, the job's exit code is returned."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.cluster import RunFailure, _submitted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the dashboard of a Ray head started for these tests."""
    ports = []
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=true"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    command += [f"--dashboard-agent-listen-port={ports[3]}"]  # another cluster of the machine may have the usual one
    command += ["--temp-dir", str(Path("/tmp") / f"ray-{os.getpid()}"), "--disable-usage-stats"]
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                break
        assert head.poll() is None and time.monotonic() < deadline, (log.seek(0), log.read())[1]
        time.sleep(0.2)
    yield f"http://127.0.0.1:{ports[1]}"
    os.killpg(head.pid, signal.SIGKILL)  # this head alone: `ray stop` would stop every cluster of the machine
    head.wait(30)


@pytest.mark.ray
@pytest.mark.slow
def test_submit_follows_the_log_and_returns_the_exit_code(address: str, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(30)))
    command = [sys.executable, "-m", "grpo.cli", "submit", "configs/smoke.yaml", "--address", address]
    command += ["--data.task=", f"--data.path={data}", "--data.prompt_pattern=", "--sft=null"]
    command += [f"--run.output_dir={tmp_path / 'run'}", "--grpo.prompts_per_step=2", "--grpo.max_refills=0"]
    done = subprocess.run([*command, "--grpo.max_steps=2"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout and (tmp_path / "run" / "report.html").is_file()
    again = subprocess.run([*command, "--grpo.max_steps=2"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2, again.stdout + again.stderr  # the job itself found its output directory in use
    assert "--resume" in again.stdout


def test_no_cluster_is_one_clear_line() -> None:
    command = [sys.executable, "-m", "grpo.cli", "submit", "configs/smoke.yaml", "--address", "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "http://127.0.0.1:9" in errors[0], done.stderr


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray answers 500 until its agent is up; any other refusal ends the command."""
    monkeypatch.setattr("grpo.cluster.time.sleep", lambda _: None)
    answers = iter(
        [RuntimeError("status code 500: No available agent to submit job"), "job-1", RuntimeError("no room")]
    )

    class Client:
        def submit_job(self, **_: object) -> str:
            answer = next(answers)
            if isinstance(answer, RuntimeError):
                raise answer
            return answer

    assert _submitted(Client(), "true", ".") == "job-1"
    with pytest.raises(RunFailure, match="no room"):
        _submitted(Client(), "true", ".")
