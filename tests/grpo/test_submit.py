"""`grpo submit` against a real Ray head: the log is followed, the job's exit code is returned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.cluster import RunFailure, _submitted
from tests.command import run

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.mark.ray
@pytest.mark.slow
def test_submit_follows_the_log_and_returns_the_exit_code(
    ray_head: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(30)))
    argv = ["submit", SMOKE, "--address", ray_head[1], "--data.task=", f"--data.path={data}", "--data.prompt_pattern="]
    argv += [f"--run.output_dir={tmp_path / 'run'}", "--sft=null", "--grpo.prompts_per_step=2", "--grpo.max_refills=0"]
    argv += ["--rollout.num_workers=1"]
    code, out, err = run(capfd, *argv, "--grpo.max_steps=2")
    assert code == 0, out + err
    assert "report:" in out and (tmp_path / "run" / "report.html").is_file()
    code, out, err = run(capfd, *argv, "--grpo.max_steps=2")
    assert code == 2, out + err  # the job itself found its output directory in use
    assert "--resume" in out


def test_no_cluster_is_one_clear_line(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "submit", SMOKE, "--address", "http://127.0.0.1:9")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "http://127.0.0.1:9" in errors[0], err


def test_the_token_is_sent_whoever_imported_ray_first(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("00" * 32)
    lines = ["import ray", "from grpo.cluster import _send_token", "_send_token()"]
    lines += ["from ray._raylet import AuthenticationMode, get_authentication_mode"]
    lines += ["assert get_authentication_mode() == AuthenticationMode.TOKEN"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
