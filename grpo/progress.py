"""What training shows while it runs: a bar on a terminal, a plain line now and then elsewhere (CI, files, job logs)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

STAGES = ("rollout", "rewards", "learner", "sync")
PLAIN_INTERVAL_S = 10.0  # between lines where stdout is not a terminal


class Progress:
    """Shows steps `start` + 1 to `total`.

    with Progress(total=400, start=0) as progress:
        progress.step(metrics)
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None) -> None:
        self._total, self._first = total, start
        self._console = console or Console()
        self._accuracy: float | None = None  # of the last evaluation; most steps have none
        self._began = self._printed = 0.0
        self._bar = Bar(
            TextColumn("step"),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("", total=total, completed=start)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._bar, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Shows a step's metrics; those that are missing are left out."""
        step = int(metrics["step"])
        if metrics.get("eval/accuracy") is not None:
            self._accuracy = metrics["eval/accuracy"]
        now = time.monotonic()
        done = max(step - self._first, 1)
        left = _duration((now - self._began) / done * max(self._total - step, 0)) + " left"
        text = describe({**metrics, "eval/accuracy": self._accuracy})
        if self._live is not None:
            self._bar.update(self._task, completed=step, description=left)
            self._live.update(Group(self._bar, Text(text)))
        elif not self._printed or step >= self._total or now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            print(f"step {step}/{self._total}  {text}  {left}", file=self._console.file, flush=True)

    def warn(self, line: str) -> None:
        """A line that stays."""
        self._console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)


def describe(metrics: Mapping[str, Any]) -> str:
    """One line: reward, accuracy, length, and which share of the time each stage took."""
    parts = []
    for label, name, form in (
        ("reward", "reward", ".3f"),
        ("accepted", "acceptance_rate", ".3f"),
        ("accuracy", "eval/accuracy", ".3f"),
        ("loss", "loss", ".3f"),
        ("length", "completions/mean_length", ".1f"),
        ("s/step", "step_time", ".2f"),
    ):
        if metrics.get(name) is not None:
            parts.append(f"{label} {metrics[name]:{form}}")
    times = {stage: metrics[name] or 0.0 for stage in STAGES if (name := f"time/{stage}") in metrics}
    if total := sum(times.values()):
        parts.append(" ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in times.items()))
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
