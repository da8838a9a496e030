"""Run log and progress: rows on disk are whole and in order whatever happened to the writer."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from grpo.log import RunLog, load_metrics, load_samples
from grpo.progress import Progress, describe

ROOT = Path(__file__).resolve().parents[2]


def write(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with RunLog(run_dir, resume_step) as log:
        for step in steps:
            log.samples([{"step": step, "sample": i, "completion": f"{step}/{i}"} for i in range(2)])
            log.metrics({"step": step, "reward": step / 10, "eval/accuracy": 0.5})


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in load_metrics(run_dir)]


def events(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, round(event.value, 6)) for event in accumulator.Scalars(name)]


def test_rows_are_plain_json(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(
            {
                "step": np.int64(3),
                "a": np.float32(0.5),
                "b": torch.tensor(2.0),
                "c": float("nan"),
                "d": float("-inf"),
                "e": None,
            }
        )
        row = {"step": 3, "prompt": "\u00e9\u2028", "completion": "\ud800", "scores": {"x": None, "y": np.float64(1)}}
        log.samples([row, {"step": 3, "reward": float("nan")}])
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 3, "a": 0.5, "b": 2.0, "c": null, "d": null, "e": null}\n'
    assert load_samples(tmp_path) == [
        {"step": 3, "prompt": "\u00e9\u2028", "completion": "?", "scores": {"x": None, "y": 1.0}},
        {"step": 3, "reward": None},
    ]


def test_steps_strictly_increase(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics({"step": 0})
        log.metrics({"step": 2})
        for step in (2, 1):
            with pytest.raises(AssertionError, match=f"step={step} must come after 2"):
                log.metrics({"step": step})
    with RunLog(tmp_path, resume_step=2) as log, pytest.raises(AssertionError, match="must come after 2"):
        log.metrics({"step": 2})


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.metrics({"step": step})
            assert steps(tmp_path) == list(range(step + 1))


def test_a_resumed_run_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(7))
    write(tmp_path, range(5, 9), resume_step=4)
    assert steps(tmp_path) == list(range(9))
    assert [row["completion"] for row in load_samples(tmp_path)] == [f"{s}/{i}" for s in range(9) for i in range(2)]
    assert events(tmp_path, "reward") == [(step, step / 10) for step in range(9)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_with_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write(tmp_path, range(1))
    assert steps(tmp_path) == [0] and len(load_samples(tmp_path)) == 2


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_last_line_is_no_row(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(3))
    for name in ("metrics.jsonl", "samples.jsonl"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + content.splitlines()[-1][:cut])
    assert steps(tmp_path) == [0, 1, 2] and len(load_samples(tmp_path)) == 6
    write(tmp_path, range(3, 4), resume_step=2)
    assert steps(tmp_path) == [0, 1, 2, 3] and len(load_samples(tmp_path)) == 8


def test_damage_elsewhere_names_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().replace('{"step": 1', '{"step" 1'))
    for call in (load_metrics, lambda run_dir: RunLog(run_dir, 1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: damaged line"):
            call(tmp_path)


def test_a_missing_directory_is_an_error_and_a_missing_file_is_no_rows(tmp_path: Path) -> None:
    assert load_metrics(tmp_path) == load_samples(tmp_path) == []
    with pytest.raises(ValueError, match=r"run directory '.*gone' does not exist"):
        load_metrics(tmp_path / "gone")


def test_a_run_killed_in_the_middle_of_a_line_goes_on(tmp_path: Path) -> None:
    """The writer is killed with SIGKILL while a line of it is half on disk."""
    code = (
        "import sys, time\n"
        "from grpo.log import RunLog\n"
        "log = RunLog(sys.argv[1])\n"
        "for step in range(6):\n"
        "    log.samples([{'step': step, 'completion': 'x' * 50}])\n"
        "    log.metrics({'step': step, 'reward': step / 10})\n"
        'log._files[\'samples.jsonl\'].write(b\'{"step": 6, "completion": "x"}\\n\')\n'
        "log._files['metrics.jsonl'].write(b'{\"step\": 6, \"rew')\n"
        "print('half', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert writer.stdout and writer.stdout.readline() == b"half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert steps(tmp_path) == list(range(6))
    write(tmp_path, range(5, 8), resume_step=4)
    assert steps(tmp_path) == list(range(8))
    assert [row["step"] for row in load_samples(tmp_path)] == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7]
    for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines():
        json.loads(line)


# ---- progress


METRICS = {
    "reward": 0.25,
    "completions/mean_length": 12.34,
    "time/rollout": 3.0,
    "time/rewards": 0.0,
    "time/learner": 1.0,
    "time/sync": None,
    "step_time": 4.0,
}


def shown(terminal: bool, total: int, start: int, rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    with Progress(total, start, Console(file=out, force_terminal=terminal, width=120)) as progress:
        for row in rows:
            progress.step(row)
    return out.getvalue()


def test_a_line_says_what_there_is() -> None:
    assert describe({}) == ""
    assert describe({**METRICS, "eval/accuracy": 0.5, "loss": None}) == (
        "reward 0.250  accuracy 0.500  length 12.3  s/step 4.00  rollout 75% rewards 0% learner 25% sync 0%"
    )


def test_without_a_terminal_there_are_a_few_plain_lines() -> None:
    rows = [{"step": step, **METRICS} for step in range(101, 401)]
    rows[0]["eval/accuracy"] = 0.5
    lines = shown(False, 400, 100, rows).splitlines()
    assert len(lines) == 2, "the first and the last: the rest came within 10 s"
    assert lines[0].startswith("step 101/400  reward 0.250  accuracy 0.500  ") and "\x1b" not in lines[0]
    assert lines[1].startswith("step 400/400  ") and "accuracy 0.500" in lines[1] and lines[1].endswith("  0m00s left")


def test_on_a_terminal_there_is_a_bar() -> None:
    out = shown(True, 10, 0, [{"step": 1, **METRICS}, {"step": 2, **METRICS}])
    assert "2/10" in out and "reward 0.250" in out and "left" in out and "\x1b[" in out
